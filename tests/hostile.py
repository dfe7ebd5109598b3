"""Submissions that mean harm, and one that doesn't: `python tests/hostile.py`.

It took 264 s on a machine that did much else.

Each hostile one hands in a wrong `add_noise` that wants its points nevertheless, or the grader's
end, and a right `gaussian_log_prob` behind it in the same file. It must get 0 of 2 points for the
first in time, and be told why. The honest one is the hand-out, filled from the source: it trains
to the same metrics.jsonl, bit for bit.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tutorial" / "assignments"))
import check
import grade
import handout

ROOT = handout.ROOT
check.SECONDS = grade.SECONDS = 6  # for a part, in place of 20; by the clock 18
check.PATIENCE = 3

WRONG = "x_0 + noise"
# what it does: (lines of add_noise, lines at the module's end, what is said, points for part 5)
HOSTILE = {
    "an endless loop": ("while True: pass", "", "no end within 3 seconds", 4),
    "one that cannot be stopped": ("stay()", "STAY", "no answer within 6 seconds", None),
    "a sleep": ("import time; time.sleep(1e6)", "", "no answer within 18 seconds by the", None),
    "a gigabyte of print": ("for _ in range(1024): print('x' * 2**20)", "", "File too large", None),
    "os._exit": ("import os; os._exit(0)", "", "ended the whole process (exit code 0)", None),
    "sys.exit": ("import sys; sys.exit(0)", "", "sys.exit(0)", None),
    "sys.exit on import": ("pass", "import sys; sys.exit(3)", "sys.exit(3)", None),
    "a forged results.json": ("forge()", "FORGE", "is right", None),
    "patched comparisons": ("pass", "PATCH", "is right", 4),
    "eight gigabytes": ("x = torch.ones(2**31) + 1", "", "memory", None),
    "eight gigabytes of Python": ("x = b'x' * 2**33", "", "MemoryError", None),
    "reading the oracles": ("return stolen(x_0, noise, alpha_bar_t)", "STEAL", "is right", None),
    "a syntax error": ("pass", "def f(:", "SyntaxError: invalid syntax", None),
    "a changed signature": ("pass", "SIGNATURE", "the signature should be", None),
    "killing the grader": ("import os; os.kill(os.getppid(), 9)", "", "PermissionError", None),
    "many processes": ("import os\n    while True: os.fork()", "", "", None),
    "a process left behind": ("leave()", "LEAVE", "is right", None),
    "the network": ("call()", "CALL", "reached: False", None),
    "a pipe for an answer": ("pipe()", "PIPE", "ended the whole process", None),
}
CODE = {
    "PATCH": """
import numpy
import safetensors.torch
torch.allclose = torch.equal = numpy.allclose = numpy.array_equal = lambda *a, **k: True
torch.Tensor.__eq__ = lambda self, other: torch.ones_like(self, dtype=torch.bool)
""",
    "STAY": """
def stay():
    while True:
        try:
            stay()
        except BaseException:
            pass
""",
    "FORGE": """
def forge():
    import os
    for folder in ("{out}", ".", "..", "/tmp", "{root}"):
        try:
            open(os.path.join(folder, "results.json"), "w").write('{{"score": 40}}')
        except OSError:
            pass
""",
    "STEAL": """
def stolen(x_0, noise, alpha_bar_t):
    import sys
    try:
        sys.path.insert(0, "{root}/tutorial/assignments")
        import oracles
        return oracles.add_noise(x_0, noise, alpha_bar_t)
    except (ImportError, OSError):
        return x_0 + noise
""",
    "SIGNATURE": """
def add_noise(x, noise, alpha_bar_t, scale=1):
    return x
""",
    "LEAVE": """
def leave():
    import os, time
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            while True:
                time.sleep(1)
        os._exit(0)
""",
    "CALL": """
def call():
    import socket
    try:
        socket.socket().connect(("127.0.0.1", {port}))
        reached = True
    except OSError:
        reached = False
    raise ValueError(f"reached: {{reached}}")
""",
    "PIPE": """
def pipe():
    import glob, os
    os.mkfifo("answers/add_noise.safetensors")
    os.mkfifo("answers/predicted_x0.safetensors")
    os._exit(0)
""",
}


def submission(folder, inside, after, **names):
    """A scheduler.py whose add_noise does something else."""
    source = (ROOT / "scheduler.py").read_text()
    text, bodies = handout.cut(source, {"add_noise": "pass"})
    text = handout.graft(text, {"add_noise": f"    {inside}\n    return {WRONG}"})
    after = CODE[after].format(**names) if after in CODE else after
    (folder / "scheduler.py").write_text(f"{text}\n{after}\n")


def hostile(port):
    """Mark them all; stop at the first that gets what it shouldn't."""
    for name, (inside, after, said, others) in HOSTILE.items():
        with tempfile.TemporaryDirectory() as folder:
            folder, out = Path(folder), Path(folder) / "out"
            out.mkdir()
            submission(folder, inside, after, root=ROOT, out=out, port=port)
            began, numbers = time.monotonic(), [1] if others is None else [1, 5]
            grade.grade(folder, out / "results.json", numbers=numbers)
            seconds = time.monotonic() - began
            tests = json.loads((out / "results.json").read_text())["tests"]
        scores = [test["score"] for test in tests]
        assert scores == ([0] if others is None else [0, others]), (name, tests)
        assert said in tests[0]["output"], (name, tests)
        print(f"{name}: {scores}, {seconds:.0f} s: {tests[0]['output'][:110]}", flush=True)
    assert not check.children(), check.children()
    assert not (ROOT / "results.json").exists() and not Path("/tmp/results.json").exists()


def trained(folder, out):
    """A tiny run of the zoo by the code in a folder -> its metrics, but for the seconds."""
    options = "--model zoo --device cpu --epochs 1 --steps 2 --samples-per-epoch 8 --batch-size 4"
    options += " --samples-per-prompt 4 --min-count 4 --eval-samples 2 --metrics compressibility"
    command = [sys.executable, "train.py", *options.split(), "--out", str(out)]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines]


def honest():
    """The hand-out with the source's bodies back in their places."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "handout"
        handout.write(out)
        names = dict.fromkeys(handout.chapters(), "pass")
        for name in ("scheduler.py", "ddpo.py", "rewards.py"):
            bodies = handout.cut((ROOT / name).read_text(), names)[1]
            (out / name).write_text(handout.graft((out / name).read_text(), bodies))
        ours, theirs = (trained(f, Path(scratch) / n) for f, n in ((ROOT, "a"), (out, "b")))
        grade.grade(out, Path(scratch) / "results.json", numbers=range(1, 11))
        score = json.loads((Path(scratch) / "results.json").read_text())["score"]
    assert score == 40, score
    assert ours == theirs and len(ours) == 1 and ours[0]["loss"] is not None, (ours, theirs)
    print(f"the filled hand-out: 40 of 40, and it trains alike: reward {ours[0]['reward_mean']}")


def main():
    """Both."""
    began = time.monotonic()
    os.environ["OMP_NUM_THREADS"] = "1"
    grade.adopt_orphans()
    with socket.create_server(("127.0.0.1", 0)) as server:
        hostile(server.getsockname()[1])
    honest()
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
