"""Processes: two that train as one, one that is killed, and runs that go on to the bit from a
kill -9 at any point.

Some seventy runs in half a minute: two workers (`pool`) import everything once, without computing
anything, and fork a child for each run.
"""

import itertools
import json
import multiprocessing
import os
import random
import shlex
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
import rewards
import train
import unet
from helpers import HEARD
from test_train import metrics, no_curve, settings_of, tiny, without_seconds

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="forks processes that have torch imported"
)
OPTIONS = "--epochs 4 --eval-samples 2 --eval-every 2 --warmup 3 --micro-batch 8".split()
KINDS = {"full": [], "lora": ["--lora-rank", "2"]}


# In the workers


def ready():
    """Import what train.py imports as it goes: transformers' names are imported when asked for."""
    import transformers

    for name in "CLIPImageProcessor CLIPTextModel CLIPTokenizer CLIPVisionModel".split():
        getattr(transformers, name)


def child(arguments, log, first, environment):
    """train.py, after `first()`, its output in a file -> exit code."""
    try:
        os.environ.update(environment)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(file, stream)
        torch.set_num_threads(1)
        signal.alarm(120)  # a child that hangs ends
        if first:
            first()
        train.main(arguments)
        return 0
    except SystemExit as error:
        if not isinstance(error.code, str):
            return error.code
        print(error, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    return 1


def start(arguments, log, first=None, **environment):
    """`child` in a fork of this process -> pid."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = child(arguments, log, first, environment)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return pid


def kill_after(pid, seconds):
    """kill -9, once a child has had so many seconds of the CPU.

    The load of the machine does not move that moment, as it does a clock's.
    """
    state, used = "", 0
    while state != "Z" and used < seconds:
        time.sleep(0.002)
        text = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
        state, *fields = text.split()
        used = (int(fields[10]) + int(fields[11])) / os.sysconf("SC_CLK_TCK")
    os.kill(pid, signal.SIGKILL)  # one that has ended is none the worse


def end(pid):
    """-> exit code (-9 after a SIGKILL), seconds of the CPU."""
    _, status, used = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime


def run(arguments, folder, first=None):
    """A run from beginning to end -> seconds of the CPU."""
    code, seconds = end(start([*arguments, "--out", folder], f"{folder}.log", first))
    assert code == 0, Path(f"{folder}.log").read_text()
    return seconds


def mute(folder):
    """Of several processes only the first may write: in the others this fails.

    At their end they say what has been written.
    """
    for name in ("write_json", "write_checkpoint", "write_metrics", "draw_curve"):
        setattr(train, name, None)
    train.Image.Image.save = None
    real = train.main

    def main(arguments):
        real(arguments)
        names = [path.name for path in Path(folder, "checkpoints").iterdir()]
        print("checkpoints:", names, file=sys.stderr)

    train.main = main


def linger():
    """Write checkpoints slowly."""
    real = train.write_checkpoint

    def write_checkpoint(run, epoch):
        time.sleep(0.3)
        real(run, epoch)

    train.write_checkpoint = write_checkpoint


def pair(arguments, folder):
    """Two processes as torchrun starts them -> exit codes, logs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs, pids = [f"{folder}.{rank}.log" for rank in range(2)], []
    for rank in range(2):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "none",
        }
        first = partial(mute, folder) if rank else linger
        pids.append(start([*arguments, "--out", folder], logs[rank], first, **environment))
    return [end(pid)[0] for pid in pids], [Path(log).read_text() for log in logs]


def polite():
    """Ctrl-C is heard, also where a shell keeps it from what runs in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def wait_for(path):
    """Until there is such a file."""
    for _ in range(6000):
        if os.path.exists(path):
            return
        time.sleep(0.01)
    raise TimeoutError(path)


def asking(marker):
    """Leave a file before a picture is described by a server."""
    polite()
    real = rewards.ChatServer.describe

    def describe(self, question, image):
        Path(marker).touch()
        return real(self, question, image)

    rewards.ChatServer.describe = describe


def interrupt(arguments, folder, marker, number, first=polite):
    """A signal to a run that hangs -> exit code, log, the seconds that it takes to end."""
    pid = start([*arguments, "--out", folder], f"{folder}.log", first)
    wait_for(marker)
    os.kill(pid, number)
    begin = time.monotonic()
    code, _ = end(pid)
    return code, Path(f"{folder}.log").read_text(), time.monotonic() - begin


def once(arguments, log, first=None):
    """A run -> exit code, log."""
    code, _ = end(start(arguments, log, first))
    return code, Path(log).read_text()


def contents(folder):
    """All files of a folder, and when they were last written."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def two(arguments, folder, marker):
    """Two more runs in the folder of one that hangs, which then is killed; the last goes on.

    -> codes, logs; did the two leave the folder alone?
    """
    pid = start([*arguments, "--out", folder], f"{folder}.log")
    wait_for(marker)
    before, again = contents(folder), ["--out", folder, "--resume"]
    ends = [once([*arguments, "--out", folder], f"{folder}.1.log"), once(again, f"{folder}.2.log")]
    same = contents(folder) == before
    os.kill(pid, signal.SIGKILL)
    end(pid)
    ends.append(once(again, f"{folder}.3.log"))
    return *zip(*ends), same


def limit(name, most):
    """Let this process have no more of a resource; of memory, no more than it has already."""
    import resource

    if name == "RLIMIT_AS":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most += pages * resource.getpagesize()
    resource.setrlimit(getattr(resource, name), (most, most))


# What a call that is killed still gets done: `real` is the function itself


def half(real, path, text, **more):
    real(path, text[: len(text) // 2], **more)


def cut_file(real, tensors, path, **more):
    real(tensors, path, **more)
    os.truncate(path, os.path.getsize(path) // 2)


def remove_some(real, path, **more):
    next(file for file in sorted(path.rglob("*")) if file.is_file()).unlink()


def nothing(real, *arguments, **more):
    pass


def wholly(real, *arguments, **more):
    real(*arguments, **more)


# Which calls are meant, by their arguments


def anything(*arguments, **more):
    return True


def to_checkpoint(old, new):
    return Path(new).name.isdigit()


def old_checkpoint(path, **more):
    return Path(path).name.isdigit()


def weights(tensors, path, **more):
    return Path(path).name != "optimizer.safetensors"


def optimizer(tensors, path, **more):
    return Path(path).name == "optimizer.safetensors"


class Named:
    """A path called so, `.tmp` aside, among the first two arguments, at a place."""

    def __init__(self, name, place=0):
        self.name, self.place = name, place

    def __call__(self, *arguments, **more):
        return Path(arguments[self.place]).name.removesuffix(".tmp") == self.name


CONFIG, METRICS, STATE = "config.json", "metrics.jsonl", "state.json"
PROMPTS = "prompts.jsonl"
CHECKPOINT = "the renaming of the checkpoint"
# a moment -> the function that is killed, in which of its calls, and what it still gets done
MOMENTS = {
    "updating": (torch.nn.utils, "clip_grad_norm_", anything, nothing),
    "updated": (ddpo, "optimizer_step", anything, wholly),
    f"in {CONFIG}": (Path, "write_text", Named(CONFIG), half),
    f"in {PROMPTS}": (Path, "write_text", Named(PROMPTS), half),
    f"{CONFIG} there": (Path, "replace", Named(CONFIG, 1), wholly),
    f"in {METRICS}": (Path, "write_text", Named(METRICS), half),
    f"before the renaming of {METRICS}": (Path, "replace", Named(METRICS, 1), nothing),
    f"after the renaming of {METRICS}": (Path, "replace", Named(METRICS, 1), wholly),
    "in the weights": (unet, "save_file", weights, cut_file),
    "in the optimizer": (unet, "save_file", optimizer, cut_file),
    f"in {STATE}": (Path, "write_text", Named(STATE), half),
    f"before {CHECKPOINT}": (os, "replace", to_checkpoint, nothing),
    f"after {CHECKPOINT}": (os, "replace", to_checkpoint, wholly),
    "removing an old checkpoint": (shutil, "rmtree", old_checkpoint, remove_some),
}


def doom(kill=None):
    """Let this process be killed the n-th time that it comes to a moment (name, n).

    Of seconds, instead of a moment, its parent takes care.
    """
    train.draw_curve = no_curve  # most of so small a run's time, and nothing reads it
    if kill is None or isinstance(kill, float):
        return
    moment, nth = kill
    (owner, name), (when, last) = MOMENTS[moment][:2], MOMENTS[moment][2:]
    real, calls = getattr(owner, name), itertools.count(1)

    def fatal(*arguments, **more):
        if when(*arguments, **more) and next(calls) == nth:
            last(real, *arguments, **more)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **more)

    setattr(owner, name, fatal)


def live(arguments, folder, kills):
    """A run that is killed and resumed, killed and resumed ... and at last left alone.

    -> after each kill (exit code, whole checkpoints); exit code and log of the end.
    """
    hits = []
    for kill in [*kills, None]:
        command = ["--resume"] if Path(folder, CONFIG).is_file() else arguments
        pid = start([*command, "--out", folder], f"{folder}.log", partial(doom, kill))
        if isinstance(kill, float):
            kill_after(pid, kill)
        code, _ = end(pid)
        whole = Path(folder, "checkpoints").glob("[0-9]" * 6)
        hits.append((code, sorted(int(path.name) for path in whole)))
    return hits[:-1], code, Path(f"{folder}.log").read_text()


# In the tests


@pytest.fixture(scope="module")
def pool():
    """-> a function: `pool(f, jobs)` is [f(*job) for job in jobs], two at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        # spawned, not forked: pytest's own process has computed, and has threads
        with multiprocessing.get_context("spawn").Pool(2, ready) as workers:

            def both(function, jobs):
                return workers.starmap_async(function, jobs, chunksize=1).get(400)

            yield both


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", train.__file__, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


def moments(folder):
    """The optimizer's of the newest checkpoint, the means of the gradients: {name: tensor}."""
    newest = sorted((folder / "checkpoints").glob("[0-9]" * 6))[-1]
    state = load_file(newest / "optimizer.safetensors")
    return {name: value for name, value in state.items() if name.endswith("exp_avg")}


# Gradients are not clipped, for that hides their scale.
COMMON = """
    --epochs 1 --samples-per-epoch 8 --batch-size 8 --lr 1e-5 --max-grad-norm 1e6
""".split()
CASES = {
    "full": [],
    "lora": ["--lora-rank", "4"],
    "rwr": "--algorithm rwr --beta 1 --updates 2 --batch-size 6".split(),
    "rwr-sparse": "--algorithm rwr-sparse --percentile 0.5 --updates 1 --batch-size 6".split(),
    "ddpo-sf": ["--algorithm", "ddpo-sf"],
    "two updates": ["--batch-size", "4"],
    "metadata": "--reward FOLDER/mine.py:aimed --prompts FOLDER/three.jsonl".split(),
}
# Smooth, for a JPEG's size jumps by bytes when a pixel rounds the other way.
BRIGHTNESS = """
def brightness(images, prompts):
    return (images / 16).mean((1, 2, 3)), {"first": images[:, 0, 0, 0].tolist()}

def aimed(images, prompts, metadata):
    return [image.mean() / 16 + data["aim"] for image, data in zip(images, metadata)]
"""


@pytest.fixture(scope="module")
def one_and_two(pool, tmp_path_factory):
    """Each case in one process and in two -> {case: (folder, folder)}."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "mine.py").write_text(BRIGHTNESS)
    lines = [{"prompt": f"a {name}", "aim": len(name)} for name in ("cat", "bee", "lion")]
    (folder / "three.jsonl").write_text("\n".join(map(json.dumps, lines)))
    common = tiny("--reward", f"{folder}/mine.py:brightness", *COMMON)
    real = torchrun(*common, "--out", folder / "full2")
    options = {case: [*common, *more] for case, more in CASES.items()}
    for case, given in options.items():
        options[case] = [option.replace("FOLDER", str(folder)) for option in given]
    pool(run, [(options[case], str(folder / f"{case}1")) for case in CASES])
    two = [case for case in CASES if case != "full"]
    pairs = pool(pair, [(options[case], str(folder / f"{case}2")) for case in two])
    assert [codes for codes, _ in pairs] == [[0, 0]] * len(two), pairs
    for _, logs in pairs:  # none ends before the last checkpoint is written
        assert "checkpoints: ['000001']" in logs[1]
    out, errors = real.communicate(timeout=200)
    assert real.returncode == 0, errors
    said = out.splitlines()
    assert out.count("epoch   0") == 1 and len(said) == len(set(said))  # one voice
    return {case: (folder / f"{case}1", folder / f"{case}2") for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one_does(case, one_and_two):
    one, two = (moments(folder) for folder in one_and_two[case])
    largest = max(value.abs().max() for value in one.values())
    near = 1e-2 if case in ("rwr", "two updates") else 1e-4  # Adam amplifies rounding
    assert one.keys() == two.keys() and largest > 0
    for name in one:  # a tenth of the gradient after the first update
        scale = max(one[name].abs().max(), 1e-3 * largest)
        assert (two[name] - one[name]).abs().max() <= near * scale, name
    [line], [other] = (metrics(folder) for folder in one_and_two[case])
    assert line.keys() == other.keys()
    assert line["reward_queries"] == other["reward_queries"] == 8
    assert line["warnings"] == other["warnings"] == []
    assert line["grad_norm"] > 1e-3
    for name in set(line) - {"warnings"}:
        if line[name] is other[name] is None or name.startswith("seconds"):
            continue
        assert other[name] == pytest.approx(line[name], rel=10 * near, abs=1e-6), name


def test_two_processes_draw_the_same_evaluation(one_and_two):
    for one, two in one_and_two.values():
        for name in ("epoch_0000.json", "epoch_0001.json"):
            mine, other = (
                json.loads((folder / "samples" / name).read_text()) for folder in (one, two)
            )
            assert mine["prompts"] == other["prompts"]
            assert other["rewards"] == pytest.approx(mine["rewards"], rel=1e-3)


def test_two_processes_leave_one_run(one_and_two):
    for one, two in one_and_two.values():
        left, right = (
            sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
            for folder in (one, two)
        )
        assert left == right and len(metrics(two)) == 1


def test_the_first_process_shows_its_own_pictures(one_and_two):
    """Every other one of the fixed pictures."""
    for epoch in (0, 1):
        paths = [folder / "samples" / f"epoch_{epoch:04d}.json" for folder in one_and_two["full"]]
        one, two = (json.loads(path.read_text())["shown"]["reward"]["first"] for path in paths)
        assert len(one) == 2 * len(two) > 0
        assert all(abs(a - b) <= 1 for a, b in zip(one[::2], two))


def test_a_batch_that_two_processes_cannot_share_is_refused_in_one_line(pool, tmp_path):
    options = ["--samples-per-epoch", "6", "--batch-size", "3"]
    [(codes, logs)] = pool(pair, [(tiny(*options), str(tmp_path / "odd"))])
    assert codes == [1, 1] and not (tmp_path / "odd").exists()
    for rank, log in enumerate(logs):
        # a library's own lines, of a machine whose name nobody resolves for one, begin with [
        [line] = [line for line in log.splitlines() if not line.startswith("[")]
        assert line.startswith(f"train.py: process {rank} of 2: "), log
        HEARD.append(line)
        assert "--batch-size 3" in line
        assert "multiples of the number of processes, 2" in line


FATAL = """import os, signal, time
calls = []
def fatal(images, prompts):
    calls.append(len(images))
    if len(calls) == 4 and os.environ.get("RANK") == "1":
        while not os.path.isdir({checkpoint!r}):
            time.sleep(0.01)
        open({died!r}, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return (images / 16).mean((1, 2, 3))
"""


def fatal(path):
    """-> a run's folder, a file that is there when its second process has died, its options."""
    folder, died = path / "run", path / "died"
    code = FATAL.format(checkpoint=str(folder / "checkpoints" / "000002"), died=str(died))
    (path / "mine.py").write_text(code)
    reward = ["--reward", f"{path}/mine.py:fatal"]
    return folder, died, tiny(*reward, "--epochs", "4", "--eval-every", "4")


def test_a_process_that_is_killed_ends_them_all_and_the_checkpoint_before_goes_on(pool, tmp_path):
    """The fourth call of the reward is the third epoch's: the fixed pictures', then two epochs'.

    The first process may still write then.
    """
    folder, died, arguments = fatal(tmp_path)
    job = torchrun(*arguments, "--out", folder)
    out, errors = job.communicate(timeout=200)
    assert job.returncode != 0 and time.time() - died.stat().st_mtime < 60
    said = [line for line in errors.splitlines() if line.startswith("train.py: ")]
    # on a busy machine torchrun ends the first process before it hears of the other's death
    assert len(said) == 1 and "--resume" in said[0], errors
    assert "Traceback" not in errors.partition("train.py: ")[0], errors
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["000001", "000002"]
    assert [line["epoch"] for line in metrics(folder)] == [0, 1]
    [(_, code, log)] = pool(live, [(arguments, str(folder), [])])
    assert code == 0 and "resuming from" in log and "000002" in log, log
    assert [line["epoch"] for line in metrics(folder)] == [0, 1, 2, 3]


def test_the_other_process_says_that_one_was_killed(pool, tmp_path):
    """Where nobody ends it before it can."""
    folder, _, arguments = fatal(tmp_path)
    [(codes, logs)] = pool(pair, [(arguments, str(folder))])
    assert codes == [1, -signal.SIGKILL]
    [said] = [line for line in logs[0].splitlines() if line.startswith("train.py: ")]
    assert said.startswith("train.py: process 0 of 2: ") and "Traceback" not in logs[0], logs[0]
    HEARD.append(said.replace("process 0 of 2: ", ""))


@pytest.fixture(scope="module")
def uninterrupted(pool, tmp_path_factory):
    """-> {kind: (folder, seconds of the CPU)}."""
    folders = {kind: tmp_path_factory.mktemp("whole") / kind for kind in KINDS}
    jobs = [(tiny(*OPTIONS, *KINDS[kind]), str(folder), doom) for kind, folder in folders.items()]
    return dict(zip(KINDS, zip(folders.values(), pool(run, jobs))))


def left(folder, but=()):
    """All that a run leaves, to the bit; without the clock, and whether it was resumed."""
    files = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_file() and not name.startswith(tuple(but)):
            files[name] = path.read_bytes()
    files[METRICS] = without_seconds(metrics(folder))
    files[CONFIG] = {**settings_of(folder), "resume": None, "out": None}
    return files


def check(pool, uninterrupted, kind, lives, tmp_path):
    """Live each of several lives; the end of all is that of the uninterrupted run.

    -> the (exit code, checkpoints) of all kills.
    """
    whole, hits, options = left(uninterrupted[kind][0]), [], tiny(*OPTIONS, *KINDS[kind])
    jobs = [(options, str(tmp_path / str(n)), kills) for n, kills in enumerate(lives)]
    for n, (hit, code, log) in enumerate(pool(live, jobs)):
        checkpoints = hit[-1][1]
        finished = checkpoints[-1:] == [4]  # so late a kill may leave an old checkpoint
        over = "has 4 behind it; give more epochs" in log
        assert (code, over) == ((1, True) if finished else (0, False)), (lives[n], hit, log)
        old = [f"checkpoints/{epoch:06d}" for epoch in checkpoints[:-2]] if finished else ()
        found = left(tmp_path / str(n), old)
        differ = [name for name in {*whole, *found} if whole.get(name) != found.get(name)]
        assert differ == [], (lives[n], hit)
        hits += hit
    return hits


@pytest.mark.parametrize("kind, count", [("full", 6), ("lora", 3)])
def test_a_run_killed_at_any_moment_goes_on_to_the_bit(kind, count, pool, uninterrupted, tmp_path):
    rng, seconds = random.Random(0), uninterrupted[kind][1]
    lives = [[seconds * (n + rng.random()) / count] for n in range(count)]
    hits = check(pool, uninterrupted, kind, lives, tmp_path)
    killed = [checkpoints for code, checkpoints in hits if code == -signal.SIGKILL]
    assert len(killed) >= count - 1
    # before the first checkpoint, and after
    assert {bool(checkpoints) for checkpoints in killed} == {True, False}


LIVES = {
    "full": [
        [(f"in {CONFIG}", 1), (f"{CONFIG} there", 1), ("updating", 3)],
        [(f"in {PROMPTS}", 1), ("removing an old checkpoint", 1), ("updating", 1)],
        [(f"before the renaming of {METRICS}", 3), ("in the weights", 1)],
        [(f"after {CHECKPOINT}", 2), ("in the optimizer", 1)],
        [("in the optimizer", 1), (f"in {STATE}", 2), (f"in {METRICS}", 1), ("updated", 3)],
        [(f"before {CHECKPOINT}", 1), (f"before {CHECKPOINT}", 2)],
        [(f"after the renaming of {METRICS}", 2), (f"before {CHECKPOINT}", 3)],
    ],
    "lora": [
        [("in the optimizer", 1), (f"after {CHECKPOINT}", 1), ("in the weights", 2)],
        [(f"before {CHECKPOINT}", 2), ("updated", 1)],
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_where_it_hurts_again_and_again_goes_on_to_the_bit(
    kind, pool, uninterrupted, tmp_path
):
    hits = check(pool, uninterrupted, kind, LIVES[kind], tmp_path)
    assert [code for code, _ in hits] == [-signal.SIGKILL] * sum(map(len, LIVES[kind]))


def test_a_run_killed_at_any_moments_in_a_row_goes_on_to_the_bit(pool, uninterrupted, tmp_path):
    seconds = uninterrupted["full"][1]
    lives = [[0.8 * seconds, 0.3 * seconds, 0.5 * seconds]]
    hits = check(pool, uninterrupted, "full", lives, tmp_path)
    assert len({code for code, _ in hits[:2]}) == 1


# The ends that a run can have


HANGING = """import os, time
def hanging(images, prompts):
    if not os.path.exists({marker!r}):
        open({marker!r}, "w").close()
        {how}
    return (images / 16).mean((1, 2, 3))
"""
HOW = {"sleeps": "time.sleep(100)", "computes": "while True: pass"}


def hanging(folder, how):
    """-> options of a run whose reward hangs the first time; a file that is there when it does."""
    code = HANGING.format(marker=str(folder / "hangs"), how=HOW[how])
    (folder / "mine.py").write_text(code)
    return tiny("--reward", f"{folder}/mine.py:hanging"), str(folder / "hangs")


@pytest.mark.parametrize(
    "how, number, code",
    [
        ("sleeps", signal.SIGINT, 130),
        ("computes", signal.SIGINT, 130),
        ("sleeps", signal.SIGTERM, 143),
    ],
    ids=["sleeps, Ctrl-C", "computes, Ctrl-C", "SIGTERM"],
)
def test_a_reward_that_hangs_is_ended_and_the_last_line_goes_on(how, number, code, pool, tmp_path):
    """In a folder whose name a shell would cut."""
    arguments, marker = hanging(tmp_path, how)
    folder = tmp_path / "my run"
    [(ended, said, _)] = pool(interrupt, [(arguments, str(folder), marker, number)])
    assert ended == code and said.count("train.py: ") == 1 and "Traceback" not in said, said
    HEARD.append(said)
    command = shlex.split(said.rpartition("to begin again: python ")[2])[1:]
    [(ended, said)] = pool(once, [(command, str(tmp_path / "log"))])
    assert ended == 0, said
    assert [line["epoch"] for line in metrics(folder)] == [0, 1]


def test_ctrl_c_does_not_wait_for_a_server_that_hangs(pool, server, tmp_path):
    """It took five minutes: until the last of five tries was over."""
    server.then, marker = "hang", str(tmp_path / "asked")
    arguments = tiny("--reward", "alignment", "--vlm-url", server.url)
    job = (arguments, str(tmp_path / "run"), marker, signal.SIGINT, partial(asking, marker))
    [(code, said, seconds)] = pool(interrupt, [job])
    assert code == 130 and seconds < 45 and "Traceback" not in said, (said, seconds)
    HEARD.append(said)


def test_a_run_that_is_ended_before_it_begins_leaves_nothing(pool, tmp_path):
    """While its reward is imported."""
    marker = str(tmp_path / "marker")
    (tmp_path / "mine.py").write_text(f"open({marker!r}, 'w')\nimport time\ntime.sleep(100)")
    arguments = tiny("--reward", f"{tmp_path}/mine.py:f")
    [(code, said, _)] = pool(interrupt, [(arguments, str(tmp_path / "run"), marker, signal.SIGINT)])
    assert code == 130 and not (tmp_path / "run").exists(), said
    HEARD.append(said)


def test_of_two_runs_in_one_folder_the_second_is_refused_until_the_first_has_ended(pool, tmp_path):
    """Also by kill -9."""
    arguments, marker = hanging(tmp_path, "sleeps")
    [(codes, logs, same)] = pool(two, [(arguments, str(tmp_path / "run"), marker)])
    assert codes == (1, 1, 0) and same, logs
    assert "holds a run already: add --resume" in logs[0]
    assert "another run is at work in it" in logs[1]
    assert [line["epoch"] for line in metrics(tmp_path / "run")] == [0, 1]
    HEARD.extend(logs)


@pytest.fixture
def mounted(tmp_path):
    """mounted(options) -> a folder of its own file system, where root may make one."""
    folder = tmp_path / "mounted"
    folder.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"needs leave to mount a file system: {done.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True)


def test_a_disk_that_fills_up_leaves_the_checkpoint_before(pool, uninterrupted, mounted, tmp_path):
    """A real one, with room for one and a half; with more the run goes on to the bit."""
    whole = uninterrupted["full"][0]
    size = sum(path.stat().st_size for path in (whole / "checkpoints" / "000004").rglob("*"))
    disk, log = mounted(f"size={3 * size // 2}"), str(tmp_path / "log")
    arguments = ["--out", str(disk / "run")]
    [(code, said)] = pool(once, [(tiny(*OPTIONS, *arguments), log, doom)])
    assert code == 1 and said.count("train.py: ") == 1 and "Traceback" not in said, said
    assert [path.name for path in (disk / "run" / "checkpoints").glob("[0-9]" * 6)] == ["000001"]
    HEARD.append(said)
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    [(code, said)] = pool(once, [([*arguments, "--resume"], log, doom)])
    assert code == 0, said
    assert left(disk / "run") == left(whole)


def test_a_file_that_may_not_be_that_large_is_as_a_full_disk(pool, tmp_path):
    """A quota that needs no root: RLIMIT_FSIZE."""
    quota = partial(limit, "RLIMIT_FSIZE", 50_000)
    arguments = tiny("--out", str(tmp_path / "run"))
    [(code, said)] = pool(once, [(arguments, str(tmp_path / "log"), quota)])
    assert code == 1 and said.count("train.py: ") == 1 and "Traceback" not in said, said
    assert not [*(tmp_path / "run" / "checkpoints").glob("[0-9]" * 6)]
    HEARD.append(said)


def test_a_file_system_that_is_read_only_ends_in_one_line(pool, mounted, tmp_path):
    """To root, too."""
    arguments = tiny("--out", str(mounted("ro") / "run"))
    [(code, said)] = pool(once, [(arguments, str(tmp_path / "log"))])
    assert code == 1 and said.count("train.py: ") == 1 and "Traceback" not in said, said
    HEARD.append(said)


def test_a_cpu_out_of_memory_ends_in_one_line_that_says_what_to_try(pool, tmp_path):
    """A real one: 200 MB more than what is loaded. The first checkpoint is not yet written."""
    memory = partial(limit, "RLIMIT_AS", 200 * 2**20)
    sizes = ["--samples-per-epoch", "2048", "--sample-batch", "2048"]
    arguments = tiny(*sizes, "--out", str(tmp_path / "run"))
    [(code, said)] = pool(once, [(arguments, str(tmp_path / "log"), memory)])
    assert code == 1 and said.count("train.py: ") == 1 and "Traceback" not in said, said
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        CONFIG,
        "lock",
        METRICS,
        PROMPTS,
        "samples",
    ]
    HEARD.append(said)


ENDS = {  # what is typed -> the exit code, and the lines of standard error where they are few
    "a bad setting": (["--eta", "1.5"], 1, 1),
    "an unknown option": (["--nosuch", "3"], 2, 2),
    "a bad setting, --debug": (["--eta", "1.5", "--debug"], 1, None),
    "a reward that raises": (["--reward", "{folder}/mine.py:raising"], 1, None),
}


@pytest.mark.parametrize("case", ENDS)
def test_the_exit_code_says_how_it_ended(case, pool, tmp_path):
    """What only its author can mend, and all with --debug, keeps its traceback."""
    options, expected, lines = ENDS[case]
    (tmp_path / "mine.py").write_text(
        "def raising(images, prompts):\n    raise ValueError('soon')\n"
    )
    arguments = tiny(*[option.format(folder=tmp_path) for option in options])
    arguments += ["--out", str(tmp_path / "run")]
    [(code, said)] = pool(once, [(arguments, str(tmp_path / "log"))])
    assert code == expected, said
    if lines:
        assert len(said.splitlines()) == lines, said
    else:
        assert "Traceback" in said and "train.py: " not in said
    HEARD.append(said.replace("train.py: error: ", ""))
