"""Try what you have written, on your own machine: `python tutorial/assignments/check.py`.

    --parts 5,8         these only; 11 to 18 are the variants

It names mistakes without knowing a formula: the hand-out carries questions, the right answers, and
the wrong ones that common mistakes give, each with its cause (checks/). What fits none of them is
described: its shape, its type, where it is not a number, and whether it is a x + b of what is
right. A function is tried with all your others, so go through the parts in order. grade.py judges
by the functions in here too, with other numbers, and with the reference's in place of the others.
"""

import argparse
import json
import math
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from parts import KINDS, PARTS, UNITS, VARIANTS, has
from safetensors import safe_open
from safetensors.numpy import save_file

HERE = Path(__file__).parent
# Limits count what a process has computed, in seconds: by the clock it may take far longer on a
# machine that does much else, and right code would pay for that. Only who waits is ended by it.
SECONDS, PATIENCE = 20, 5  # for a part, and for each of its three units at most
STARTUP, CLOCK = 120, 3  # seconds for importing torch; times a part's seconds, by the clock
TOLERANCE = 2e-5  # float32 is good for 1e-6
LARGEST = 2**24  # bytes of a file that a worker may write
NOBODY = 65534


@dataclass
class Sheet:
    """The questions of a part, and what is right and wrong. Keys: "unit/number of the case"."""

    number: int
    signatures: dict  # {unit: "(x_0, noise, alpha_bar_t)"}
    questions: dict  # {key: {input: array, number, bool or list}}
    right: dict  # {key: {output: array}}
    wrong: list  # [(unit, cause, {key: {output: array}})]


@dataclass
class Verdict:
    """One kind of a unit's cases, judged."""

    unit: str
    kind: str
    right: bool
    what: str = ""  # one number that is wrong, and what it should be
    why: str = ""


def answer_key(unit, number):
    """What a case is called in files."""
    return f"{unit.name}/{number}"


def write(path, nested, **texts):
    """{key: {name: value}} as one safetensors file; what isn't an array goes in as JSON."""
    arrays, plain = {}, {}
    for key, values in nested.items():
        for name, value in values.items():
            if isinstance(value, np.ndarray):
                contiguous = np.ascontiguousarray(value)  # makes 1-d what is 0-d
                arrays[f"{key}/{name}"] = contiguous.reshape(value.shape)
            else:
                plain[f"{key}/{name}"] = value
    metadata = {"plain": json.dumps(plain), **{k: json.dumps(v) for k, v in texts.items()}}
    save_file(arrays, path, metadata)


def read(path):
    """What `write` wrote -> {key: {name: value}}, the metadata."""
    nested = {}
    with safe_open(path, framework="numpy") as file:
        metadata = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
        flat = {name: file.get_tensor(name) for name in file.keys()}
    for path, value in {**flat, **metadata.pop("plain", {})}.items():
        key, _, name = path.rpartition("/")
        nested.setdefault(key, {})[name] = value
    return nested, metadata


def store(sheet, folder):
    """A sheet, as the hand-out carries it."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"questions": sheet.questions, "right": sheet.right}
    parts.update({f"wrong {n}": answers for n, (_, _, answers) in enumerate(sheet.wrong)})
    nested = {f"{part}/{key}": v for part, keys in parts.items() for key, v in keys.items()}
    causes = [(unit, cause) for unit, cause, _ in sheet.wrong]
    path = folder / f"part{sheet.number:02d}.safetensors"
    write(path, nested, number=sheet.number, signatures=sheet.signatures, causes=causes)


def stored(path):
    """What `store` wrote -> Sheet."""
    nested, metadata = read(path)
    parts = {}
    for key, values in nested.items():
        part, _, rest = key.partition("/")
        parts.setdefault(part, {})[rest] = values
    wrong = [(*causes, parts[f"wrong {n}"]) for n, causes in enumerate(metadata["causes"])]
    known = (metadata["number"], metadata["signatures"])
    return Sheet(*known, parts["questions"], parts["right"], wrong)


def job_of(sheets, submission, reference, confined):
    """What the worker must know beside the questions."""
    units = [unit for part in PARTS for unit in part.units]
    cut = [(unit.file, name.partition(".")[0]) for unit in units for name in unit.cut]
    units += [unit for part in VARIANTS for unit in part.units]
    signatures = {name: text for sheet in sheets for name, text in sheet.signatures.items()}
    tasks = []
    for unit in [unit for unit in units if unit.name in signatures]:
        task = {"file": unit.file, "name": unit.name, "outputs": unit.outputs}
        task["cases"] = [(case.kind, case.wrt) for case in unit.cases]
        task["names"] = [name.partition(".")[0] for name in unit.cut]
        tasks.append({**task, "signature": signatures[unit.name]})
    job = {"submission": str(submission), "reference": str(reference or ""), "units": tasks}
    return {**job, "cut": cut, "confined": confined, "patience": PATIENCE}


def ask(sheets, submission, reference=None, confined=False, seconds=SECONDS, left=math.inf):
    """What the code in the folder `submission` answers, in a process of its own -> {key: {...}}.

    {"error": why} where it answers nothing. reference: the folder with everybody else's functions.
    left: seconds by the clock, after which nobody waits any more.
    """
    scratch = Path(tempfile.mkdtemp(prefix="ddpo-")).resolve()
    try:
        questions = {k: v for sheet in sheets for k, v in sheet.questions.items()}
        if confined:
            submission = received(submission, scratch / "submission")
        job = job_of(sheets, submission, reference, confined)
        write(scratch / "questions.safetensors", questions, job=job)
        (scratch / "answers").mkdir()
        if confined and os.getuid() == 0:
            for path in (scratch, scratch / "answers"):
                os.chown(path, NOBODY, NOBODY)
        ended = run(scratch, seconds, quiet=confined, left=left)
        return collected(scratch / "answers", questions, ended)
    finally:
        with suppress(RecursionError):  # folders in folders in folders
            shutil.rmtree(scratch, ignore_errors=True)


def received(submission, folder):
    """Copy the Python files of what was handed in, so that no other file of it can be seen."""
    folder.mkdir()
    for path in sorted(submission.glob("*.py")):
        if path.is_file() and not path.is_symlink() and path.stat().st_size <= LARGEST:
            shutil.copyfile(path, folder / path.name)
    return folder


def run(scratch, seconds, quiet, program="worker.py", left=math.inf):
    """It runs in a process group of its own -> how it ended, for whoever gave no answer.

    seconds: of computing, once it is ready; left: by the clock, for all that it does.
    """
    command = [sys.executable, "-I", str(HERE / program), str(scratch)]
    kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT") if name in os.environ}
    environment = {**kept, "TMPDIR": str(scratch), "HOME": str(scratch)}
    environment.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    with open(scratch / "said.txt", "wb") as said:
        pipes = {"stdin": subprocess.DEVNULL}
        pipes.update({"stdout": said, "stderr": said} if quiet else {})
        options = {"cwd": scratch, "env": environment, "start_new_session": True}
        before = children()
        worker = subprocess.Popen(command, **pipes, **options)
        try:
            limit = waited(worker, scratch / "ready", seconds, left)
        finally:
            end(worker, before)
    if limit:
        return limit
    if not (scratch / "ready").exists():
        text = (scratch / "said.txt").read_text(errors="replace")
        raise RuntimeError(f"{program} did not start: {text[-2000:]}")
    code = worker.returncode
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"your code ended the whole process ({how})"


def waited(worker, ready, seconds, left):
    """Until the worker's end -> "", or the limit that was hit before it, in words."""
    began, since, before = time.monotonic(), None, 0.0
    while worker.poll() is None:
        now = time.monotonic()
        if since is None and ready.exists():
            since, before = now, computed(worker.pid)
        if now - began > left:
            return "no time was left: the limit for all parts together was hit"
        if since is None and now - began > STARTUP:
            return f"torch was not imported within {STARTUP} seconds: a busy machine, mark it again"
        if since and computed(worker.pid) - before > seconds:
            return f"no answer within {seconds} seconds of computing: does a loop never end?"
        if since and now - since > CLOCK * seconds:
            return f"no answer within {CLOCK * seconds} seconds by the clock: what is waited for?"
        time.sleep(0.02)
    return ""


def computed(pid):
    """Seconds that a process and its children that ended have computed; 0 without a /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def end(worker, before):
    """No process of the worker's is left: neither its group nor, where grade.py adopts it, others.

    before: the children that this process had already.
    """
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.pid, signal.SIGKILL)
    else:
        worker.kill()
    worker.wait()
    while children() - before:
        for pid in children() - before:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)


def children():
    """The children of this process -> set of their numbers; empty where there is no /proc."""
    found = set()
    for path in Path("/proc/self/task").glob("*/children"):
        found.update(map(int, path.read_text().split()))
    return found


def collected(folder, questions, ended):
    """The answers that were written -> {key: {output: array, "type output": str, or "error"}}."""
    answers = {}
    for name in {key.partition("/")[0] for key in questions}:
        path = folder / f"{name}.safetensors"
        with suppress(Exception):  # whatever somebody else's file may do
            regular = stat.S_ISREG(path.lstat().st_mode) and path.lstat().st_size < LARGEST
            answers.update(read(path)[0] if regular else {})
    return {key: answers.get(key, {"error": ended}) for key in questions}


def close(given, right):
    """Is it right, but for the rounding of float32? NaN is NaN."""
    if given.shape != right.shape:
        return False
    lost = np.isfinite(right) & np.isfinite(given)
    if not np.array_equal(np.where(lost, 0, given), np.where(lost, 0, right), equal_nan=True):
        return False
    given, right = given[lost], right[lost]
    size = np.abs(right) + (np.sqrt(np.mean(right**2)) if right.size else 0) + 1e-3
    return bool(np.all(np.abs(given - right) <= TOLERANCE * size))


def fits(given, right):
    """Do all outputs of a case fit?"""
    return "error" not in given and all(
        name in given and close(np.asarray(given[name], dtype=np.float64), value)
        for name, value in right.items()
    )


def wrong_type(unit, given, right):
    """Which output has another type than it should: "loss is float64 where float32 is wanted"."""
    for name in [name for name in right if name in unit.outputs]:
        wanted, got = unit.dtypes.get(name, "float32"), given.get(f"type {name}")
        if wanted and got and got != wanted:
            return f"{name} is {got} where {wanted} is wanted"
    return ""


def judge(part, sheet, answers):
    """Each unit's kinds of cases -> [Verdict]."""
    verdicts = []
    for unit in part.units:
        for kind in [kind for kind in KINDS if has(unit, kind)]:
            keys = [answer_key(unit, n) for n, case in enumerate(unit.cases) if case.kind == kind]
            failed = [key for key in keys if not fits(answers[key], sheet.right[key])]
            types = [wrong_type(unit, answers[key], sheet.right[key]) for key in keys]
            what, why = "", next(filter(None, types), "")
            if failed:
                what, why = explained(unit, failed, sheet, answers, why)
            verdicts.append(Verdict(unit.name, kind, not why, what, why))
    return verdicts


def explained(unit, failed, sheet, answers, wrong_type):
    """Why cases failed: the mistake that fits the most of them -> a number, the cause."""
    errors = [answers[key]["error"] for key in failed if "error" in answers[key]]
    if errors:
        return "", " ".join(str(errors[0]).split())[:300]
    best, score, where = None, 0, failed[0]
    cases = [answer_key(unit, n) for n in range(len(unit.cases))]
    for cause, given in [(cause, given) for name, cause, given in sheet.wrong if name == unit.name]:
        hit = [key for key in failed if fits(answers[key], given[key])]
        total = 100 * len(hit) + sum(fits(answers[key], given[key]) for key in cases)
        if hit and total > score:
            best, score, where = cause, total, hit[0]
    what = numbers(answers[where], sheet.right[where])
    sizes = sizes_of(sheet.questions[where])
    if best:
        for letter, size in sizes.items():
            best = best.replace(f"{{{letter}}}", str(size))
        return what, best
    if wrong_type:
        return what, wrong_type
    only = all(name.startswith("d_") for key in failed for name in sheet.right[key])
    return what, described(answers[where], sheet.right[where], sizes, only)


def numbers(given, right):
    """What is there and what should be, where they differ most: "-30.1 where -1.25 is right"."""
    for name, value in right.items():
        got = np.asarray(given.get(name, np.zeros(0)), dtype=np.float64)
        if got.shape != value.shape:
            return f"{name} has the shape {list(got.shape)} where {list(value.shape)} is wanted"
        if not close(got, value):
            off = np.where(np.isfinite(got), np.abs(got - value), np.inf)
            worst = np.unravel_index(off.argmax(), off.shape)
            place = f"[{', '.join(map(str, worst))}]" if worst else ""
            return f"{name}{place} is {got[worst]:.5g} where {value[worst]:.5g} is right"
    return ""


def sizes_of(inputs):
    """The case's own numbers: B samples, D numbers in a latent, T steps -> {letter: number}."""
    arrays = [value for value in inputs.values() if isinstance(value, np.ndarray)]
    large = [array[0].size for array in arrays if array.ndim == 4]
    sizes = {"D": large[0]} if large else {}
    if "T" in inputs:
        sizes["T"] = inputs["T"]
    if arrays:
        sizes["B"] = len(arrays[-1])
    return sizes


def described(given, right, sizes, only):
    """What can be said of a mistake that has no name. only: of gradients, the values are right."""
    for name, value in right.items():
        got = np.asarray(given[name], dtype=np.float64)
        if close(got, value):
            continue
        if got.shape != value.shape:
            return "look at the shapes line by line"
        if name.startswith("d_") and not got.any():
            return "no gradient comes back: was something detached, or made by numpy or .item()?"
        if not np.isfinite(got).all():
            lost = f"{int((~np.isfinite(got)).sum())} of {got.size} are no finite numbers"
            if only:
                return f"{lost}: torch.where passes on the NaN of the branch that it does not take"
            return f"{lost}: a division by 0, a root or a log?"
        if only:
            return "the values are right, so a part of the gradient is lost: detached, or no_grad?"
        return fitted(got.ravel(), value.ravel(), sizes)
    return ""


def fitted(y, x, sizes):
    """Is y = a x + b? With words for an a that is known."""
    size = max(np.abs(x).max(), 1e-6)
    if np.ptp(y) < 1e-6 * size:
        return f"all of yours are {y[0]:.5g}"
    if len(x) < 3 or np.ptp(x) < 1e-6 * size:
        return "none of the mistakes that have a name"
    a, b = np.polyfit(x, y, 1)
    if np.abs(y - a * x - b).max() > 1e-4 * np.ptp(y):
        return "none of the mistakes that have a name, nor a x + b of what is right"
    shift = "" if abs(b) < 1e-4 * np.abs(y).max() else f" {b:+.4g}"
    return f"yours is {a:.5g} times what is right{shift}{known_factor(a, sizes)}"


def known_factor(a, sizes):
    """What a factor may mean -> ", which is B = 5"."""
    words = {-1.0: "the sign is turned", 0.5: "a half is too many", 2.0: "a half is missing"}
    for letter, n in sizes.items():
        words.setdefault(float(n), f"that is {letter} = {n}")
        words.setdefault(1 / n, f"that is 1 / {letter}, {letter} = {n}")
    for n in range(2, 33):
        words.setdefault(n / (n - 1), f"that is n / (n - 1) for n = {n}")
        words.setdefault((n / (n - 1)) ** 0.5, f"that is the root of n / (n - 1) for n = {n}")
    for value, text in words.items():
        if abs(a - value) < 1e-4 * abs(value):
            return f": {text}"
    return ""


def sentences(part, verdicts):
    """What a student reads of a part: each cause once, with a number -> list of str."""
    found = {}
    for v in [v for v in verdicts if not v.right]:
        found.setdefault((v.unit, v.why), []).append(v)
    lines = []
    for (unit, why), some in found.items():
        where = f"part {part.number}, {unit}, {', '.join(v.kind for v in some)}"
        what = f"{some[0].what}: " if some[0].what else ""
        whole = f"{where}: {what}{why} (chapter {part.chapter})"
        lines.append(why if why.startswith("write ") else whole)
    return list(dict.fromkeys(lines))


def earned(part, verdicts):
    """The points of a part -> Fraction."""
    units = {unit.name: unit for unit in part.units}
    shares = [part.share(units[v.unit], v.kind) for v in verdicts if v.right]
    return sum(shares, Fraction(0))


def part_numbers(text):
    """ "5,8" -> [5, 8]."""
    return [int(number) for number in text.split(",")]


def main(argv=None):
    """Check the folder that this file lies in, two levels up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = [part.number for part in PARTS]
    parser.add_argument("--parts", type=part_numbers, default=every, help="such as 5,8")
    wanted = parser.parse_args(argv).parts
    # what a part calls is looked at as well; part 10 calls nothing, and takes long to import
    some = [part for part in PARTS if part.number in wanted or part.number < 10]
    some += [part for part in VARIANTS if part.number in wanted]
    if not (HERE / "checks").is_dir():
        made = "python tutorial/assignments/handout.py handout && cd handout"
        sys.exit(f"check.py: it tries a hand-out, and this is none; make one: {made}")
    sheets = {p.number: stored(HERE / "checks" / f"part{p.number:02d}.safetensors") for p in some}
    answers = ask(sheets.values(), HERE.parents[1], seconds=SECONDS * len(some))
    wrong = set()
    for part in some:
        verdicts = judge(part, sheets[part.number], answers)
        for verdict in [v for v in verdicts if not v.right]:
            unit = UNITS.get(verdict.unit)
            waits = [name for name in (unit.needs if unit else ()) if name in wrong]
            unwritten = verdict.why.removeprefix("write ").partition(" ")[0]
            if unit and verdict.why.startswith("write ") and unwritten not in unit.cut:
                number = next(p.number for p in PARTS for u in p.units if unwritten in u.cut)
                verdict.why = f"it calls {unwritten}: write part {number} first"
            elif waits and not verdict.why.startswith("write "):
                verdict.what, verdict.why = "", f"make {', '.join(waits)} right first"
            wrong.add(verdict.unit)
        if part.number in wanted:
            points = float(earned(part, verdicts))
            print(f"part {part.number}: {points:.2f} of {part.points}")
            for line in sentences(part, verdicts):
                print(f"    {line}")
            if points == part.points and part.number <= len(PARTS):
                print(f"    {part.picture}: python tutorial/assignments/show.py {part.number}")


if __name__ == "__main__":
    main()
