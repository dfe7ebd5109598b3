"""Faults that were found by reading and by trying, each with the line that it ends in.

The table of all faults is README.md; at the end of this file is what keeps it whole.
"""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ddpo
import table
import train
from conftest import ROOT
from helpers import HEARD
from rewards import make_reward
from test_style import MODULES
from test_train import metrics, refusal, resume, run, small_model, tiny
from test_unet import nobody


@pytest.mark.parametrize("algorithm", ["ddpo-is", "ddpo-sf"])
def test_ddpo_without_cfg_training_is_refused(algorithm, tmp_path):
    """Its ratio was off 1 by 1.0, and all of its pairs clipped."""
    options = ["--algorithm", algorithm, "--no-cfg-training", "--batch-size", "4"]
    line = refusal(train.main, tiny(*options, "--out", str(tmp_path / "run")))
    assert "--no-cfg-training is for rwr" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("algorithm, lr", [("ddpo-is", 0.025), ("ddpo-sf", 0.025), ("rwr", 1e-5)])
def test_an_algorithms_own_learning_rate_is_not_lost_with_lora(algorithm, lr):
    """The zoo's LoRA section overrode its RWR section: 0.025 for RWR, 2,500 times too much."""
    given = {"algorithm": algorithm, "lora_rank": 4}
    assert train.merge(given, train.ZOO).lr == lr


def rwr_batches(rewards, algorithm="rwr", **settings):
    """All batches that an algorithm deals of one prompt's samples -> their weights."""
    model = small_model()
    given = {"algorithm": algorithm, "batch_size": 2, "updates": 6, "beta": 1.0, **settings}
    given.update(samples_per_epoch=len(rewards), steps=2)
    config = train.merge(given, model)
    policy = train.load_policy(model, torch.device("cpu"), config)
    learner = ddpo.ALGORITHMS[algorithm](config)
    prompts, x_0 = ["a cat"] * len(rewards), torch.zeros(len(rewards), 4, 8, 8)
    weights = learner.weights(prompts, torch.tensor(rewards))
    batches = learner.batches(policy, [x_0], prompts, weights, [0, 0, 1])
    return torch.cat([batch.tensors[4] for batch in batches])


def test_rwr_weights_that_underflow_leave_the_others_at_1():
    """Weights 4, 0, 0, 0 were drawn as 4, 4, 4 ...: four times the learning rate."""
    weights = rwr_batches([0.0, -200.0, -200.0, -200.0])
    assert weights.tolist() == [1.0] * 12
    weights = rwr_batches([0.0, 0.0, -200.0, -200.0])
    assert weights.tolist() == [1.0] * 12


def test_rwr_starts_each_round_without_adams_moments(tmp_path):
    """As the authors' code does; DDPO keeps them. Adam counts its steps."""
    for algorithm, steps in (("rwr", 3), ("ddpo-is", 4)):
        folder = tmp_path / algorithm
        updates = ["--updates", "3", "--lr", "1e-5"] if algorithm == "rwr" else []
        run(folder, "--algorithm", algorithm, *updates)
        weights = load_file(folder / "checkpoints" / "000002" / "optimizer.safetensors")
        assert {x.item() for key, x in weights.items() if key.endswith(".step")} == {steps}


def test_large_rewards_keep_their_spread():
    """1e9 +- 14 lost it in float32, where neighbours are 64 apart, before the mean came off."""
    small = torch.arange(8.0, dtype=torch.float64) * 4
    settings = train.Config(history_size=8, min_count=8)
    expected = (small - small.mean()) / small.std(correction=0)
    for rewards in (small, small + 1e9):
        advantages = ddpo.DDPO(settings).weights(["a cat"] * 8, rewards)
        assert advantages.dtype == torch.float32
        torch.testing.assert_close(advantages.double(), expected, rtol=1e-6, atol=0)


def test_prompt_files_are_cut_at_newlines_only(tmp_path):
    """They were also cut at U+2028, form feeds and NEL."""
    path = tmp_path / "prompts.txt"
    odd = ["a\u2028cat", "a\x0cdog", "a\x85bee", "a\x1clion", "a\u2029fox"]
    path.write_text("\r\n".join(odd) + "\n\n  an ant \n", encoding="utf-8", newline="")
    assert list(train.load_prompts(str(path))) == [*odd, "an ant"]


def test_a_terminal_that_cannot_print_a_prompt_does_not_end_the_run(tmp_path):
    """UnicodeEncodeError, after the sampling of the first epoch."""
    reward = tmp_path / "mine.py"
    reward.write_text(
        "def loud(images, prompts):\n    print(prompts)\n    return range(len(images))\n"
    )
    (tmp_path / "cats.txt").write_text("a \u732b\na cat\n", encoding="utf-8")
    options = [
        "--reward",
        f"{reward}:loud",
        "--prompts",
        str(tmp_path / "cats.txt"),
        "--epochs",
        "1",
    ]
    command = [sys.executable, train.__file__, *tiny(*options, "--out", str(tmp_path / "run"))]
    surroundings = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "a \\u732b" in done.stdout


def test_a_tokenizer_without_a_limit_takes_the_text_encoders(tmp_path):
    """It is then 1e30, and padding to it an OverflowError."""
    model = tmp_path / "model"
    shutil.copytree(small_model(), model)
    path = model / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["model_max_length"]
    path.write_text(json.dumps(config))
    run(tmp_path / "run", "--model", str(model), "--epochs", "1")
    run(tmp_path / "other", "--epochs", "1")
    assert metrics(tmp_path / "run")[0]["loss"] == metrics(tmp_path / "other")[0]["loss"]


def test_a_reward_without_spread_is_said_to_be_one(tmp_path, capsys):
    """The advice was to raise the learning rate."""
    reward = tmp_path / "mine.py"
    reward.write_text("def flat(images, prompts):\n    return [1.0] * len(images)\n")
    run(tmp_path / "run", "--reward", f"{reward}:flat", "--epochs", "4", "--lr", "1e-9")
    assert [line["warnings"] for line in metrics(tmp_path / "run")] == [["spread"]] * 4
    said = capsys.readouterr().out
    HEARD.append(said)
    assert "nothing to learn" in said and "larger --lr" not in said


def test_prompts_of_which_the_end_is_not_read_are_named(tmp_path, capsys):
    """The text encoder reads 16 tokens; that what comes after is lost was not said."""
    long = "cat " * 20
    (tmp_path / "prompts.txt").write_text(f"{long}on a red background\n{long}on blue\na dog\n")
    run(tmp_path / "run", "--epochs", "1", "--prompts", str(tmp_path / "prompts.txt"))
    warning = f"warning: 2 prompts are read up to token 16 only, as {long!r}"
    said = capsys.readouterr().out
    HEARD.append(said)
    assert warning[:-1] in said


def test_rwr_sparse_says_that_few_samples_a_prompt_are_nearly_all_kept(tmp_path, capsys):
    """Of one sample a prompt a percentile of 0.9 keeps all."""
    run(tmp_path / "few", "--algorithm", "rwr-sparse", "--updates", "1")
    said = capsys.readouterr().out
    HEARD.append(said)
    assert "rwr-sparse keeps 50% of the samples, not 10%" in said
    many = [
        "--samples-per-epoch",
        "10",
        "--samples-per-prompt",
        "10",
        "--updates",
        "1",
        "--seed",
        "1",
    ]
    run(tmp_path / "many", "--algorithm", "rwr-sparse", *many)
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("name", train.NEEDED)
def test_a_line_of_metrics_without_a_number_is_named_before_it_goes_on(name, tmp_path):
    """It was a traceback, after an epoch's work."""
    run(tmp_path, "--epochs", "1")
    [line] = metrics(tmp_path)
    text = json.dumps({key: value for key, value in line.items() if key != name}) + "\n"
    (tmp_path / "metrics.jsonl").write_text(text)
    line = refusal(resume, tmp_path, "--epochs", "2")
    assert line == f"train.py: {tmp_path}/metrics.jsonl is damaged: no '{name}'"
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_a_run_that_was_moved_goes_on_with_the_prompts_and_rewards_that_it_had(tmp_path):
    """Its prompt file edited, the model's folder and the reward's file elsewhere."""
    home = tmp_path / "home"
    shutil.copytree(small_model(), home / "model")
    (home / "mine.py").write_text(
        "def red(images, prompts):\n    return images[..., 0].mean((1, 2))\n"
    )
    (home / "prompts.txt").write_text("a cat\na bee\n")
    options = ["--model", str(home / "model"), "--reward", f"{home / 'mine.py'}:red"]
    options += ["--prompts", str(home / "prompts.txt")]
    whole = run(tmp_path / "whole", *options)
    run(home / "run", *options, "--epochs", "1")
    (home / "prompts.txt").write_text("a fox\n")
    shutil.move(home, tmp_path / "elsewhere")
    del sys.modules["mine"]  # as in a process of its own
    home = tmp_path / "elsewhere"
    assert "mine.py" in refusal(
        resume, home / "run", "--epochs", "2", "--model", str(home / "model")
    )
    moved = ["--model", str(home / "model"), "--reward", f"{home / 'mine.py'}:red"]
    resume(home / "run", "--epochs", "2", *moved)
    for one, other in zip(metrics(whole), metrics(home / "run"), strict=True):
        for name in one:
            assert name.startswith("seconds") or one[name] == other[name]


def test_a_run_of_a_renamed_clone_goes_on_and_model_paths_may_be_given_anew(tmp_path):
    """config.json keeps ../clip as the model's ddpo.json has it: seen from the model's folder.

    And prompts.json the prompts, whatever their file says now.
    """
    one, two, zoo = tmp_path / "one", tmp_path / "two", train.ZOO.parent
    shutil.copytree(small_model(), one / "model")
    (one / "clip").symlink_to(zoo / "clip")
    own = json.loads((one / "model" / "ddpo.json").read_text())
    own["all"]["clip"] = "../clip"
    (one / "model" / "ddpo.json").write_text(json.dumps(own))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na bee\n")
    given = ["--model", str(one / "model"), "--prompts", str(prompts), "--epochs", "1"]
    run(one / "run", *given)
    prompts.write_text("a fox\n")
    one.rename(two)
    model = ["--model", str(two / "model")]
    resume(two / "run", *model, "--epochs", "2")
    assert json.loads((two / "run" / "config.json").read_text())["clip"] == "../clip"
    others = [f"--{name}=not-needed" for name in ("aesthetic-head", "vlm", "bert")]
    resume(two / "run", *model, f"--clip={zoo / 'clip'}", *others, "--epochs", "3")
    assert all(0 < line["diversity"] < 1 for line in metrics(two / "run"))
    last = json.loads((two / "run" / "samples" / "epoch_0003.json").read_text())
    assert last["prompts"] == ["a cat", "a bee"] * 2


def test_another_function_of_a_users_file_is_another_reward(tmp_path):
    """Only the folder of the file may change."""
    path = tmp_path / "mine.py"
    text = "def {}(images, prompts):\n    return images[..., 0].mean((1, 2))\n"
    path.write_text(text.format("red") + text.format("rot"))
    run(tmp_path / "run", "--reward", f"{path}:red", "--epochs", "1")
    (tmp_path / "yours.py").write_text(text.format("red"))
    for other in (f"{path}:rot", f"{tmp_path}/yours.py:red", "compressibility"):
        said = refusal(resume, tmp_path / "run", "--reward", other, "--epochs", "2")
        assert "leave out --reward" in said


def test_a_users_function_is_no_reward_of_ours_of_the_same_name(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def compressibility(images, prompts):\n    return images[..., 0].mean((1, 2))\n"
    )
    spec = f"{tmp_path}/mine.py:compressibility"
    run(tmp_path / "run", "--reward", spec, "--metrics", "", "--epochs", "1")
    said = refusal(resume, tmp_path / "run", "--reward", "compressibility", "--epochs", "2")
    assert "leave out --reward" in said


def test_one_of_several_processes_that_cannot_find_the_others_is_refused(tmp_path, monkeypatch):
    """As job queues start them: RANK and WORLD_SIZE set, no torchrun. Each ran by itself."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    line = refusal(train.main, tiny("--out", str(tmp_path / "run")))
    assert "MASTER_ADDR expected, but not set" in line and not (tmp_path / "run").exists()


def test_warm_up_begins_anew_where_adam_does(tmp_path, monkeypatch):
    """Once for DDPO; in each round for RWR, whose Adam is fresh."""
    for algorithm, expected in (("ddpo-is", [1, 2, 3, 4]), ("rwr", [1, 2, 1, 2])):
        rates, step = [], ddpo.optimizer_step

        def spy(policy, algorithm, optimizer, *rest, rates=rates, step=step):
            rates.append(optimizer.param_groups[0]["lr"])
            return step(policy, algorithm, optimizer, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(ddpo, "optimizer_step", spy)
            options = ["--algorithm", algorithm, "--warmup", "9", "--lr", "1e-3", "--updates", "2"]
            run(tmp_path / algorithm, *options)
        assert rates == pytest.approx([n * 1e-4 for n in expected])


def test_help_shows_every_default_and_every_setting_has_a_line(capsys, monkeypatch):
    """--warmup's 0 counted as none."""
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for name, f in train.FIELDS.items():
        text = " ".join(f.metadata["help"].split())
        if f.type is not bool and f.default is not None:
            text += f" [{f.default}]"
        assert train.flag(name) in said and text in said


def test_a_plug_in_without_a_batch_size_takes_the_whole_epoch():
    """TypeError: int % NoneType."""
    settings = train.Config(samples_per_epoch=6)
    ddpo.DDPO.settle(settings, {})
    assert (settings.batch_size, settings.updates) == (6, 1)


def test_rwr_sparse_blames_few_samples_only_where_they_are_the_cause(capsys):
    """With all rewards alike it said to raise --samples-per-prompt."""
    learner = ddpo.RWRSparse(train.Config())
    alike, two = torch.ones(20, dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert learner.weights(["a cat"] * 20, alike).tolist() == [1] * 20
    assert capsys.readouterr().out == ""
    learner.weights(["a cat"] * 2, two)
    assert "--samples-per-prompt" in capsys.readouterr().out


def test_a_reward_to_watch_that_is_not_there_is_named_with_its_own_flag(tmp_path):
    """The line named --reward."""
    line = refusal(train.main, tiny("--metrics", "nowhere.py:f", "--out", str(tmp_path / "run")))
    assert "--metrics nowhere.py:f" in line


def test_twenty_thousand_prompts_are_a_run_as_any_other(tmp_path):
    """Their embeddings took gigabytes: now those of 512 are kept."""
    (tmp_path / "many.txt").write_text("\n".join(f"a cat no. {i}" for i in range(20_000)))
    folder = run(tmp_path / "run", "--prompts", str(tmp_path / "many.txt"), "--epochs", "1")
    assert len(train.load_prompts(str(folder / "prompts.jsonl"))) == 20_000


def test_a_whole_number_that_no_float_holds_is_refused(tmp_path):
    """OverflowError, when it was asked whether it is finite."""
    line = refusal(train.main, tiny("--epochs", "9" * 400, "--out", str(tmp_path / "run")))
    assert (
        line.endswith("999; needed: a number from 1 to 1000000") and not (tmp_path / "run").exists()
    )


@pytest.mark.parametrize("options", ["--nosuch 3", "--epochs x", "--out"])
def test_an_option_that_is_none_ends_in_two_lines(options, capsys):
    """The usage took twenty."""
    with pytest.raises(SystemExit, match="2"):
        train.main(options.split())
    usage, line = capsys.readouterr().err.splitlines()
    HEARD.append(line.partition(": ")[2])
    assert usage == "usage: python train.py [options]" and options.split()[0] in line


def test_half_precision_where_a_device_has_none_is_refused_before_anything_is_loaded(
    tmp_path, monkeypatch
):
    """As torch says it of a card."""

    def autocast(device, dtype):
        raise RuntimeError("Current CUDA Device does not support bfloat16. Please switch dtype")

    monkeypatch.setattr(torch, "autocast", autocast)
    line = refusal(train.main, tiny("--precision", "bf16", "--out", str(tmp_path / "run")))
    assert "--precision bf16: Current CUDA Device does not support bfloat16" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("when", ["new", "resumed"])
def test_a_folder_that_may_not_be_written_ends_in_one_line(when, monkeypatch):
    """Root may write everywhere: the run is somebody else's from the first writing on."""
    loop = train.loop

    def anothers(run):
        with nobody():
            loop(run)

    with tempfile.TemporaryDirectory() as home:  # pytest's tmp_path is its user's alone
        folder = Path(home, "run")
        if when == "resumed":
            run(folder, "--epochs", "1")
        monkeypatch.setattr(train, "loop", anothers)
        for path in [Path(home), *Path(home).rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        line = refusal(resume if when == "resumed" else run, folder, "--epochs", "2")
        assert f"{folder} cannot be written: [Errno 13] Permission denied" in line
        assert folder.exists() == (when == "resumed")
        for path in [Path(home), *Path(home).rglob("*")]:
            path.chmod(0o755)


def test_a_path_of_windows_is_a_file_and_a_function(tmp_path, monkeypatch):
    """The drive's colon is not the one before the function. Elsewhere that is a file's name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "C:\\x.py").write_text("def f(images, prompts):\n    return [3.0]\n")
    reward = make_reward("C:\\x.py:f", None, "cpu")
    assert reward(None, None) == [3.0]
    line = refusal(train.main, tiny("--reward", "C:\\y.py:f"))
    assert "--reward C:\\y.py:f: there is no such file; needed: file.py:name" in line


POSIX = "fcntl grp posixpath pty pwd resource syslog termios tty".split()


@pytest.mark.parametrize("path", MODULES)
def test_a_module_is_imported_where_there_is_no_posix(path, monkeypatch):
    """What it imports itself; PyTorch and all else are there already."""
    for name in set(POSIX) - {"posixpath"}:
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("again", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "again", module)
    spec.loader.exec_module(module)
    used = {"os": set(), "signal": set()}
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) in used:
            used[node.value.id].add(node.attr)
    assert used["signal"] <= {"signal", "SIGTERM", "SIG_DFL", "SIG_IGN"}
    assert used["os"] <= {
        "chdir",
        "chmod",
        "devnull",
        "environ",
        "getcwd",
        "path",
        "replace",
        "stat",
    }


# The table


def test_the_table_of_faults_has_sixty_rows_or_more_and_none_twice():
    rows = table.rows()
    assert len(rows) >= 60
    assert len({row.fault for row in rows}) == len({row.test for row in rows}) == len(rows)
    for row in rows:
        assert all(row[:1] + row[2:]), row
        assert row.code in {"0", "1", "2", "130", "137", "143"}, row


def test_every_test_of_the_table_is_there(request):
    """By its whole name where its file is collected; a name in the table may be wrong otherwise."""
    whole = not any("::" in argument for argument in request.config.args)
    files = {name.partition("::")[0] for name in request.config.collected}
    for row in table.rows():
        file, _, name = row.test.partition("::")
        if whole and file in files:
            assert row.test in request.config.collected
        else:
            assert f"def {name.partition('[')[0]}(" in (ROOT / "tests" / file).read_text()


@pytest.mark.parametrize(
    "said, right",
    [
        ("train.py: /a/b: no c", True),
        ("/a/b: no c", True),
        ("x\n  /a/b: no c\ny", True),
        ("/a/b: no cat", False),
        ("a b: no c", False),
        ("", False),
    ],
)
def test_a_row_that_is_not_true_is_seen(said, right):
    assert table.says(said, "train.py: /…: no c") == right
