"""Processes: two that train as one, one that is killed, and runs that go on to the bit from a kill -9 at any point.

Some seventy runs in a minute or two: two workers (`pool`) import everything once, without computing anything, and fork a child for each run.
"""
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ddpo
import train
import unet
from test_train import TINY, metrics, without_seconds

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks processes that have torch imported")
RUN = [*TINY, "--metrics", "compressibility", "--epochs", "4", "--eval-samples", "2", "--eval-every", "2", "--warmup", "3", "--micro-batch", "8"]    # last wins
KINDS = {"full": [], "lora": ["--lora-rank", "2"]}


# ---- in the workers


def ready():
    """What train.py imports as it goes."""
    from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection             # noqa: F401


def start(arguments, log, first=None, **environment):
    """train.py in a fork of this process, after `first()`, its output in a file -> pid."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.environ.update(environment)
        [os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), stream) for stream in (1, 2)]
        torch.set_num_threads(1)
        signal.alarm(120)                                   # a child that hangs ends
        first and first()
        train.main(arguments)
        code = 0
    except SystemExit as error:
        print(error, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def kill_after(pid, seconds):
    """kill -9, once a child has had so many seconds of the CPU: the load of the machine does not move that moment, as it does a clock's."""
    while True:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if state == "Z" or (int(fields[10]) + int(fields[11])) / os.sysconf("SC_CLK_TCK") >= seconds:
            return os.kill(pid, signal.SIGKILL)             # one that has ended is none the worse
        time.sleep(0.002)


def end(pid):
    """-> exit code (-9 after a SIGKILL), seconds of the CPU."""
    _, status, used = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime


def run(arguments, folder, first=None):
    """A run from beginning to end -> seconds of the CPU."""
    code, seconds = end(start([*arguments, "--out", folder], f"{folder}.log", first))
    assert code == 0, Path(f"{folder}.log").read_text()
    return seconds


def mute():
    """Of several processes only the first may write: in the others this fails."""
    train.write_json = train.write_checkpoint = train.write_metrics = train.draw_curve = train.Image.Image.save = None


def pair(arguments, folder):
    """Two processes as torchrun starts them -> exit codes, logs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [f"{folder}.{rank}.log" for rank in range(2)]
    pids = [start([*arguments, "--out", folder], logs[rank], mute if rank else None, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                  MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="none") for rank in range(2)]
    return [end(pid)[0] for pid in pids], [Path(log).read_text() for log in logs]


def half(real, path, text):
    real(path, text[:len(text) // 2])


def cut_file(real, tensors, path, **more):
    real(tensors, path, **more)
    os.truncate(path, os.path.getsize(path) // 2)


def remove_some(real, path, **more):
    next(file for file in sorted(path.rglob("*")) if file.is_file()).unlink()


def nothing(real, *arguments, **more):
    pass


def wholly(real, *arguments, **more):
    real(*arguments, **more)


def anything(*arguments, **more):
    return True


def to_checkpoint(old, new):
    return Path(new).name.isdigit()


def old_checkpoint(path, **more):
    return Path(path).name.isdigit()


def named(name, place):
    return lambda *arguments: Path(arguments[place]).name.removesuffix(".tmp") == name


# a moment -> the function that is killed, in which of its calls, and what it still gets done
MOMENTS = {"updating": (torch.nn.utils, "clip_grad_norm_", anything, nothing),
           "updated": (ddpo, "update", anything, wholly),
           "in the text of config.json": (Path, "write_text", named("config.json", 0), half),
           "config.json there": (os, "replace", named("config.json", 1), wholly),
           "in the text of metrics.jsonl": (Path, "write_text", named("metrics.jsonl", 0), half),
           "before the renaming of metrics.jsonl": (os, "replace", named("metrics.jsonl", 1), nothing),
           "after the renaming of metrics.jsonl": (os, "replace", named("metrics.jsonl", 1), wholly),
           "in the weights": (unet, "save_file", anything, cut_file),
           "in the optimizer": (train, "save_file", anything, cut_file),
           "in state.json": (Path, "write_text", named("state.json", 0), half),
           "before the renaming of the checkpoint": (os, "replace", to_checkpoint, nothing),
           "after the renaming of the checkpoint": (os, "replace", to_checkpoint, wholly),
           "removing an old checkpoint": (shutil, "rmtree", old_checkpoint, remove_some)}


def doom(kill=None):
    """Let this process be killed the n-th time that it comes to a moment (name, n); of seconds its parent takes care."""
    train.draw_curve = lambda out, config: None             # a quarter of so small a run's time, and nothing reads it
    if kill is None or isinstance(kill, float):
        return
    (owner, name, when, last), nth, calls = MOMENTS[kill[0]], kill[1], itertools.count(1)
    real = getattr(owner, name)

    def fatal(*arguments, **more):
        if when(*arguments, **more) and next(calls) == nth:
            last(real, *arguments, **more)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **more)

    setattr(owner, name, fatal)


def live(arguments, folder, kills):
    """A run that is killed and resumed, killed and resumed ... and at last left alone -> after each kill (exit code, whole checkpoints);
    exit code and log of the end."""
    hits = []
    for n, kill in enumerate([*kills, None]):
        command = ["--resume"] if Path(folder, "config.json").is_file() else arguments
        pid = start([*command, "--out", folder], f"{folder}.log", partial(doom, kill))
        if isinstance(kill, float):
            kill_after(pid, kill)
        code, _ = end(pid)
        hits.append((code, sorted(int(path.name) for path in Path(folder, "checkpoints").glob("[0-9]" * 6))))
    return hits[:-1], code, Path(f"{folder}.log").read_text()


# ---- in the tests


@pytest.fixture(scope="module")
def pool():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")                # spawned, not forked: pytest's own process has computed, and has threads
        with multiprocessing.get_context("spawn").Pool(2, ready) as workers:
            yield lambda function, jobs: workers.starmap_async(function, jobs, chunksize=1).get(400)


def torchrun(*arguments):
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", train.__file__, *map(str, arguments)],
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def moments(folder):
    """The optimizer's of the newest checkpoint: {name: tensor}."""
    return load_file(sorted((folder / "checkpoints").glob("[0-9]" * 6))[-1] / "optimizer.safetensors")


# The reward is smooth, for a JPEG's size jumps by bytes when a pixel rounds the other way; gradients are not clipped, for that hides their scale.
CASES = {"full": [], "lora": ["--lora-rank", "4"], "rwr": ["--algorithm", "rwr", "--beta", "1", "--updates", "2", "--batch-size", "6"],
         "two updates": ["--batch-size", "4"]}


@pytest.fixture(scope="module")
def one_and_two(pool, tmp_path_factory):
    """Each case in one process and in two -> {case: (folder, folder)}."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "mine.py").write_text("def brightness(images, prompts):\n    return (images / 16).mean((1, 2, 3))\n")
    common = [*TINY, "--reward", f"{folder}/mine.py:brightness", "--metrics", "", "--epochs", "1", "--samples-per-epoch", "8", "--batch-size", "8",
              "--lr", "1e-5", "--max-grad-norm", "1e6"]
    real = torchrun(*common, "--out", folder / "full2")
    pool(run, [([*common, *more], str(folder / f"{case}1")) for case, more in CASES.items()])
    pairs = pool(pair, [([*common, *more], str(folder / f"{case}2")) for case, more in CASES.items() if more])
    assert [codes for codes, _ in pairs] == [[0, 0]] * 3, pairs
    out, errors = real.communicate(timeout=200)
    assert real.returncode == 0, errors
    assert out.count("epoch   0") == 1                      # one voice
    return {case: (folder / f"{case}1", folder / f"{case}2") for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one_does(one_and_two, case):
    one, two = (moments(folder) for folder in one_and_two[case])
    largest, near = max(value.abs().max() for name, value in one.items() if name.endswith("exp_avg")), 1e-4 if case in ("full", "lora") else 1e-2
    assert one.keys() == two.keys() and largest > 0
    for name in (name for name in one if name.endswith("exp_avg")):        # a tenth of the gradient after the first update, whose rounding Adam amplifies
        assert (two[name] - one[name]).abs().max() <= near * max(one[name].abs().max(), 1e-3 * largest), name
    [line], [other] = (metrics(folder) for folder in one_and_two[case])
    assert line.keys() == other.keys() and line["reward_queries"] == other["reward_queries"] == 8 and line["warnings"] == other["warnings"] == []
    assert line["grad_norm"] > 1e-3 and (case == "rwr" or len(other["clip_fraction_by_step"]) == 3)
    for name in set(line) - {"warnings"}:
        if not name.startswith("seconds") and (line[name], other[name]) != (None, None):
            assert other[name] == pytest.approx(line[name], rel=10 * near, abs=1e-6), name


def test_two_processes_leave_one_run(one_and_two):
    for one, two in one_and_two.values():
        left, right = (sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (one, two))
        assert left == right and len(metrics(two)) == 1


def test_a_batch_that_two_processes_cannot_share_is_refused_in_one_line(pool, tmp_path):
    [(codes, logs)] = pool(pair, [([*TINY, "--samples-per-epoch", "6", "--batch-size", "3"], str(tmp_path / "odd"))])
    assert codes == [1, 1] and not (tmp_path / "odd").exists()
    for rank, log in enumerate(logs):
        [line] = [line for line in log.splitlines() if not line.startswith("[Gloo]")]
        assert line.startswith(f"train.py: process {rank} of 2: ") and "--batch-size 3" in line and "multiples of the number of processes, 2" in line


def test_a_process_that_is_killed_ends_them_all_and_the_checkpoint_before_goes_on(pool, tmp_path):
    """The fourth call of the reward is the third epoch's: first come the fixed pictures, then two epochs. The first process may still write then."""
    (tmp_path / "mine.py").write_text(f"""import os, signal, time
calls = []
def fatal(images, prompts):
    calls.append(len(images))
    if len(calls) == 4 and os.environ.get("RANK") == "1":
        while not os.path.isdir({str(tmp_path / "run" / "checkpoints" / "000002")!r}):
            time.sleep(0.01)
        open({str(tmp_path / "died")!r}, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return (images / 16).mean((1, 2, 3))
""")
    arguments = [*TINY, "--reward", f"{tmp_path}/mine.py:fatal", "--metrics", "", "--epochs", "4", "--eval-every", "4"]
    job = torchrun(*arguments, "--out", tmp_path / "run")
    out, errors = job.communicate(timeout=200)
    assert job.returncode != 0 and time.time() - (tmp_path / "died").stat().st_mtime < 60
    said = [line for line in errors.splitlines() if line.startswith("train.py: ")]
    assert len(said) == 1 and ("process 0 of 2" in said[0] or "--resume" in said[0]), errors
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == ["000001", "000002"]
    assert [line["epoch"] for line in metrics(tmp_path / "run")] == [0, 1]
    [(_, code, log)] = pool(live, [(arguments, str(tmp_path / "run"), [])])
    assert code == 0 and "resuming from" in log and "000002" in log, log
    assert [line["epoch"] for line in metrics(tmp_path / "run")] == [0, 1, 2, 3]


@pytest.fixture(scope="module")
def uninterrupted(pool, tmp_path_factory):
    """-> {kind: (folder, seconds of the CPU)}."""
    folders = {kind: tmp_path_factory.mktemp("whole") / kind for kind in KINDS}
    seconds = pool(run, [([*RUN, *KINDS[kind]], str(folder), doom) for kind, folder in folders.items()])
    return dict(zip(KINDS, zip(folders.values(), seconds)))


def left(folder, but=()):
    """All that a run leaves, to the bit; without the clock, and whether it was resumed."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    files = {name: data for name, data in files.items() if not name.startswith(tuple(but))}
    return {**files, "metrics.jsonl": without_seconds(metrics(folder)), "config.json": {**json.loads(files["config.json"]), "resume": None, "out": None}}


def check(pool, uninterrupted, kind, lives, tmp_path):
    """Live each of several lives; the end of all is that of the uninterrupted run -> the (exit code, checkpoints) of all kills."""
    whole, hits = left(uninterrupted[kind][0]), []
    for n, (hit, code, log) in enumerate(pool(live, [([*RUN, *KINDS[kind]], str(tmp_path / str(n)), kills) for n, kills in enumerate(lives)])):
        finished = hit[-1][1][-1:] == [4]                   # so late a kill may leave an old checkpoint
        assert (code, "4 epochs behind it already" in log) == ((1, True) if finished else (0, False)), (lives[n], hit, log)
        found = left(tmp_path / str(n), [f"checkpoints/{epoch:06d}" for epoch in hit[-1][1][:-2]] if finished else ())
        assert [name for name in sorted(whole.keys() | found.keys()) if whole.get(name) != found.get(name)] == [], (lives[n], hit)
        hits += hit
    return hits


@pytest.mark.parametrize("kind, count", [("full", 10), ("lora", 3)])
def test_a_run_killed_at_any_moment_goes_on_to_the_bit(pool, uninterrupted, kind, count, tmp_path):
    rng, seconds = random.Random(0), uninterrupted[kind][1]
    hits = check(pool, uninterrupted, kind, [[seconds * (n + rng.random()) / count] for n in range(count)], tmp_path)
    killed = [checkpoints for code, checkpoints in hits if code == -signal.SIGKILL]
    assert len(killed) >= count - 1 and {bool(checkpoints) for checkpoints in killed} == {True, False}              # before the first checkpoint, and after


@pytest.mark.parametrize("kind, lives", [
    ("full", [[("in the text of config.json", 1), ("config.json there", 1), ("updating", 3), ("removing an old checkpoint", 1)],
              [("before the renaming of metrics.jsonl", 3), ("in the weights", 1), ("after the renaming of the checkpoint", 2), ("in the optimizer", 1)],
              [("in the optimizer", 1), ("in state.json", 2), ("in the text of metrics.jsonl", 1), ("updated", 3)],
              [("before the renaming of the checkpoint", 1), ("before the renaming of the checkpoint", 2), ("after the renaming of metrics.jsonl", 2),
               ("before the renaming of the checkpoint", 3)]]),
    ("lora", [[("in the optimizer", 1), ("after the renaming of the checkpoint", 1), ("in the weights", 2)],
              [("before the renaming of the checkpoint", 2), ("updated", 1)]])])
def test_a_run_killed_where_it_hurts_again_and_again_goes_on_to_the_bit(pool, uninterrupted, kind, lives, tmp_path):
    hits = check(pool, uninterrupted, kind, lives, tmp_path)
    assert [code for code, _ in hits] == [-signal.SIGKILL] * sum(map(len, lives))


def test_a_run_killed_at_any_moments_in_a_row_goes_on_to_the_bit(pool, uninterrupted, tmp_path):
    seconds = uninterrupted["full"][1]
    hits = check(pool, uninterrupted, "full", [[0.8 * seconds, 0.3 * seconds, 0.5 * seconds]], tmp_path)
    assert len({code for code, _ in hits[:2]}) == 1
