"""tutorial/experiments.py: which runs are skipped, resumed, refused; who wins the search. train.py itself is not run here (--quick does that)."""
import json
import sys
from types import SimpleNamespace

import pytest

from conftest import ROOT

sys.path.append(str(ROOT / "tutorial"))
import experiments  # noqa: E402

ARGUMENTS = "--model zoo --device cpu --reward compressibility --epochs 3 --samples-per-epoch 64"


@pytest.fixture
def calls(monkeypatch):
    """Stand in for train.py: writes the folder of a run that has `epochs` behind it, all if not told otherwise."""
    made = SimpleNamespace(commands=[], epochs=None, code=0, warnings=[], gain={})

    def fake(command):
        made.commands.append(command[2:])
        folder = experiments.Path(command[command.index("--out") + 1])
        if "--resume" not in command:
            config = experiments.train.resolve({**experiments.train.parse(command[4:]), "out": str(folder)}, experiments.train.ZOO)
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(json.dumps(vars(config)))
        epochs = json.loads((folder / "config.json").read_text())["epochs"]
        gain, after = next((value for name, value in made.gain.items() if name in folder.name), (0.0, 0.9))
        lines = [{"epoch": epoch, "warnings": [], "eval_queries": epoch, "eval_gain_sd": gain * (epoch > 0), "eval_gain_se": 1, "eval_judged_right_mean": after if epoch else 0.9}
                 for epoch in range(epochs if made.epochs is None else made.epochs)]
        if lines:
            lines[-1]["warnings"] = made.warnings
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return SimpleNamespace(returncode=made.code)

    monkeypatch.setattr(experiments.subprocess, "run", fake)
    return made


def test_a_finished_run_is_not_run_again(calls, tmp_path):
    experiments.run(tmp_path / "a", ARGUMENTS)
    assert calls.commands == [["--out", str(tmp_path / "a"), *ARGUMENTS.split()]]
    experiments.run(tmp_path / "a", ARGUMENTS)
    assert len(calls.commands) == 1


def test_a_run_that_broke_off_is_resumed(calls, tmp_path):
    calls.epochs, calls.code = 1, 1
    with pytest.raises(SystemExit, match="a: the run stopped"):
        experiments.run(tmp_path / "a", ARGUMENTS)
    calls.epochs, calls.code = None, 0
    experiments.run(tmp_path / "a", ARGUMENTS)
    assert calls.commands[1] == ["--out", str(tmp_path / "a"), "--resume"]


@pytest.mark.parametrize("other", ["--lr 0.5", "--epochs 4", "--guidance 2"])
def test_a_folder_with_other_settings_is_refused(calls, tmp_path, other):
    experiments.run(tmp_path / "a", ARGUMENTS)
    with pytest.raises(SystemExit, match=f"holds a run with another {other.split()[0][2:]}"):
        experiments.run(tmp_path / "a", f"{ARGUMENTS} {other}")


def test_a_run_that_diverged_is_neither_repeated_nor_in_the_way_and_loses(calls, tmp_path):
    calls.epochs, calls.code, calls.warnings = 2, 1, ["not finite"]
    for _ in range(2):
        folder = experiments.run(tmp_path / "a", ARGUMENTS)
    assert len(calls.commands) == 1 and experiments.judged(folder)[0] == -float("inf")


def test_the_search_gives_each_algorithm_six_cells_of_512_queries_and_takes_the_largest_gain_that_spares_the_judge(calls, tmp_path):
    calls.gain = {"ddpo-is_4e-4_16": (0.5, 0.8), "ddpo-is_8e-4": (0.9, 0.74), "ddpo-is": (0.3, 0.9)}
    winners, text = experiments.search(tmp_path, quick=False)
    given = [experiments.train.parse(command[2:]) for command in calls.commands]
    assert [sum(g["algorithm"] == algorithm for g in given) for algorithm in experiments.SEARCH] == [6] * 4
    assert {g["epochs"] * g["samples_per_epoch"] for g in given} == {512}
    assert winners["ddpo-is"].endswith("--lr 4e-4 --batch-size 16") and text.count("**chosen**") == 4


def test_where_all_hurt_the_judge_the_gentlest_wins(calls, tmp_path):
    calls.gain = {"ddpo-is_2e-4": (0.1, 0.7), "ddpo-is": (0.9, 0.1)}
    assert "--lr 2e-4" in experiments.search(tmp_path, quick=False)[0]["ddpo-is"]


def test_a_page_without_its_marks_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "__file__", str(tmp_path / "experiments.py"))
    page = tmp_path / "experiments.md"
    page.write_text("before\n<!-- fig4 -->\nold\n<!-- end of fig4 -->\nafter\n")
    experiments.write("fig4", None, "new", False, tmp_path)
    assert page.read_text() == "before\n<!-- fig4 -->\nnew\n<!-- end of fig4 -->\nafter\n"
    page.write_text("before\n<!-- fig4 -->\nold\nafter\n")
    with pytest.raises(SystemExit, match="has lost its marks"):
        experiments.write("fig4", None, "new", False, tmp_path)
    assert page.read_text() == "before\n<!-- fig4 -->\nold\nafter\n"
