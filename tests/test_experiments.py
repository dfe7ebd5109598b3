"""tutorial/experiments.py: which runs are skipped, resumed, refused; who wins the search.

train.py itself is not run here: test_scripts.py and `--quick` do that.
"""

import json
import sys
from pathlib import Path

import pytest

from conftest import ROOT

sys.path.append(str(ROOT / "tutorial"))
import experiments
import train
import trl_gain

ARGUMENTS = "--model zoo --device cpu --reward compressibility --epochs 3 --samples-per-epoch 64"


class Runs:
    """Stands in for train.main: writes what a run leaves, and remembers the command lines."""

    def __init__(self):
        self.commands = []
        self.epochs = None  # how many are behind a run; None: all
        self.stop = None  # what it says when it ends early
        self.warnings = []  # of its last epoch
        self.gains = {}  # {part of a folder's name: (gain, the judge's share after it)}

    def __call__(self, words):
        self.commands.append(words)
        folder = Path(words[words.index("--out") + 1])
        if "--resume" not in words:
            given = {**train.parse(words), "out": str(folder)}
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(json.dumps(experiments.resolve(given)))
        epochs = json.loads((folder / "config.json").read_text())["epochs"]
        found = [gain for name, gain in self.gains.items() if name in folder.name]
        gain, after = found[0] if found else (0.0, 0.9)
        count = epochs if self.epochs is None else self.epochs
        lines = [self.line(epoch, gain, after) for epoch in range(count)]
        lines[-1]["warnings"] = self.warnings
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if self.stop:
            sys.exit(self.stop)

    def line(self, epoch, gain, after):
        """An epoch's metrics: nothing gained in the first one, everything from the second on."""
        return {
            "epoch": epoch,
            "warnings": [],
            "eval_queries": epoch,
            "eval_gain_sd": gain if epoch else 0.0,
            "eval_gain_t": 1.0,
            "eval_judged_right_mean": after if epoch else 0.9,
        }


@pytest.fixture
def runs(monkeypatch):
    made = Runs()
    monkeypatch.setattr(train, "main", made)
    return made


def test_a_finished_run_is_not_run_again(runs, tmp_path):
    experiments.run(tmp_path / "a", ARGUMENTS)
    assert runs.commands == [["--out", str(tmp_path / "a"), *ARGUMENTS.split()]]
    experiments.run(tmp_path / "a", ARGUMENTS)
    assert len(runs.commands) == 1


def test_a_run_that_broke_off_is_resumed(runs, tmp_path):
    runs.epochs, runs.stop = 1, "train.py: the disk is full"
    with pytest.raises(SystemExit, match="the disk is full\n.*a: the run stopped"):
        experiments.run(tmp_path / "a", ARGUMENTS)
    runs.epochs, runs.stop = None, None
    experiments.run(tmp_path / "a", ARGUMENTS)
    assert runs.commands[1] == ["--out", str(tmp_path / "a"), "--resume"]


@pytest.mark.parametrize("other", ["--lr 0.5", "--epochs 4", "--guidance 2"])
def test_a_folder_with_other_settings_is_refused(runs, tmp_path, other):
    experiments.run(tmp_path / "a", ARGUMENTS)
    with pytest.raises(SystemExit, match=f"holds a run with another {other.split()[0][2:]}"):
        experiments.run(tmp_path / "a", f"{ARGUMENTS} {other}")
    assert len(runs.commands) == 1


def test_the_optimizer_of_a_finished_run_makes_room(runs, tmp_path):
    experiments.run(tmp_path / "a", ARGUMENTS)
    checkpoint = tmp_path / "a" / "checkpoints" / "000003"
    checkpoint.mkdir(parents=True)
    for name in ("optimizer.safetensors", "state.json"):
        (checkpoint / name).touch()
    experiments.run(tmp_path / "a", ARGUMENTS)
    assert [path.name for path in checkpoint.iterdir()] == ["state.json"]


def test_a_run_that_diverged_is_neither_repeated_nor_in_the_way_and_loses(runs, tmp_path):
    runs.epochs, runs.stop, runs.warnings = 2, "train.py: not finite", ["not finite"]
    for _ in range(2):
        folder = experiments.run(tmp_path / "a", ARGUMENTS)
    assert len(runs.commands) == 1
    lost = experiments.outcome(folder)
    assert lost.sd == -float("inf") and lost.cost == 1


def test_the_search_gives_each_algorithm_six_cells_of_512_queries(runs, tmp_path):
    experiments.search(tmp_path, quick=False)
    given = [train.parse(command[2:]) for command in runs.commands]
    algorithms = [settings["algorithm"] for settings in given]
    assert [algorithms.count(name) for name in experiments.SEARCH] == [6] * 4
    assert {settings["epochs"] * settings["samples_per_epoch"] for settings in given} == {512}
    assert len({str(sorted(settings.items())) for settings in given}) == 24


def test_the_largest_gain_that_spares_the_judge_wins(runs, tmp_path):
    runs.gains = {"ddpo-is_4e-4_16": (0.5, 0.8), "ddpo-is_8e-4": (0.9, 0.74), "ddpo-is": (0.3, 0.9)}
    winners, text = experiments.search(tmp_path, quick=False)
    assert winners["ddpo-is"].endswith("--lr 4e-4 --batch-size 16")
    chosen = [line for line in text.splitlines() if "**chosen**" in line]
    assert len(chosen) == 4
    row = "| ddpo-is | `--lr 4e-4 --batch-size 16` | +0.50 | 1.0 | 90% → 80% | **chosen** |"
    assert chosen[0] == row


def test_where_all_hurt_the_judge_the_gentlest_wins(runs, tmp_path):
    runs.gains = {"ddpo-is_2e-4": (0.1, 0.7), "ddpo-is": (0.9, 0.1)}
    assert "--lr 2e-4" in experiments.search(tmp_path, False, ["ddpo-is"])[0]["ddpo-is"]


def test_no_cfg_training_is_for_rwr_alone(runs, tmp_path, monkeypatch):
    """train.py refuses it for DDPO."""
    monkeypatch.setattr(experiments, "evaluations", lambda folder: ([0, 64], [-2, -1], [1, 0.9]))
    line = {**runs.line(1, 0.5, 0.9), "reward_queries": 64, "seconds_training": 3.0}
    monkeypatch.setattr(runs, "line", lambda *_: line)
    for name in ("fig4", "fig10"):
        experiments.EXPERIMENTS[name](tmp_path, quick=True)
    unguided = [command for command in runs.commands if "--no-cfg-training" in command]
    assert [train.parse(command[2:])["algorithm"] for command in unguided] == ["rwr-sparse"]


def test_a_page_without_its_marks_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "HERE", tmp_path)
    page = tmp_path / "experiments.md"
    page.write_text("before\n<!-- fig4 -->\nold\n<!-- end of fig4 -->\nafter\n")
    experiments.write("fig4", None, "new", False, tmp_path)
    assert page.read_text() == "before\n<!-- fig4 -->\nnew\n<!-- end of fig4 -->\nafter\n"
    page.write_text("before\n<!-- fig4 -->\nold\nafter\n")
    with pytest.raises(SystemExit, match="has lost its marks"):
        experiments.write("fig4", None, "new", False, tmp_path)
    assert page.read_text() == "before\n<!-- fig4 -->\nold\nafter\n"


def test_a_smoke_run_leaves_the_page_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "HERE", tmp_path)  # without a page
    experiments.write("fig4", None, "new", True, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_every_table_of_the_page_has_its_marks():
    page = (ROOT / "tutorial" / "experiments.md").read_text(encoding="utf-8")
    for name in experiments.EXPERIMENTS:
        assert page.count(f"<!-- {name} -->\n") == page.count(f"<!-- end of {name} -->\n") == 1


def evaluated(gains, judge, seconds):
    """The lines of a run of 64 pictures an epoch that is evaluated at its beginning and after."""
    parts = {"seconds_sampling": seconds - 3.0, "seconds_reward": 1.0, "seconds_training": 2.0}
    names = ("eval_gain_sd", "eval_judged_right_mean", "eval_queries")
    rest = {"eval_truth_mean": 6.0, "eval_diversity": 0.25}
    rows = zip(gains, judge, range(0, 64 * len(gains), 64))
    seen = [dict(zip(names, row)) for row in rows]
    return [{"reward_queries": 64 * (n + 1), **parts, **rest, **x} for n, x in enumerate(seen)]


def test_when_a_gain_is_reached_by_hand():
    """Half way from 0.2 to 0.6 is 0.4: at 1.5 evaluations, of 64 queries and 10 seconds each."""
    assert experiments.crossing([0, 64, 128], [0.0, 0.2, 0.6], 0.4) == pytest.approx(96)
    assert experiments.crossing([0, 64, 128], [0.0, 0.2, 0.6], 0.6) == 128
    assert experiments.crossing([0, 64], [0.0, 0.2], 0.4) is None
    runs = [evaluated([0.0, 0.1, 0.5], [0.9, 0.8, 0.6], 10.0)]
    runs.append(evaluated([0.0, 0.3, 0.7], [1.0, 0.8, 0.6], 10.0))
    row = experiments.variant_row("x", runs, 0.4)
    assert row[:4] == ["x", "128", "0.60 ± 0.10 (0.50, 0.70)", "95% → 60%"]
    assert row[4:] == ["6.00", "0.25", "10.0", "96", "15", "70%"]
    assert experiments.variant_row("x", runs, 0.7)[-3:] == ["never", "", ""]


def test_runs_of_trl_are_averaged_and_their_seconds_found(tmp_path, monkeypatch, capsys):
    """By hand: gains 0, 1, 2 and 0, 0.5, 1 after 0, 256, 512 queries reach 1.125 after 384."""
    for name, slope, seconds in (("a", 1, [30, 10]), ("b", 0.5, [20, 18])):
        (tmp_path / name).mkdir()
        keys = ("eval_queries", "eval_gain_sd", "eval_judged_right_mean")
        lines = [dict(zip(keys, (256 * i, slope * i, 1 - 0.1 * i))) for i in range(3)]
        (tmp_path / name / trl_gain.EVALUATED).write_text(json.dumps(lines))
        (tmp_path / name / trl_gain.SECONDS).write_text(json.dumps(seconds))
    folders = [str(tmp_path / name) for name in "ab"]
    monkeypatch.setattr(sys, "argv", ["trl_gain.py", "table", *folders, "--level", "1.125"])
    trl_gain.main()
    *_, last, end = capsys.readouterr().out.splitlines()
    assert last == "  512 queries: gain 1.50 ± 0.50 (2.00, 1.00), judge 80%"
    assert end.startswith("19.0 seconds an epoch")
    assert end.endswith("after 384 queries, 114 seconds, judge 85%")
    (tmp_path / "b" / trl_gain.SECONDS).unlink()
    with pytest.raises(SystemExit, match="seconds.json: not there; train and evaluate"):
        trl_gain.main()
