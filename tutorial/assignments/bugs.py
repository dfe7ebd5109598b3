"""Twelve modules, one fault each, but for one that has none. Students do not get this file.

    python tutorial/assignments/bugs.py record 5      # the run of a bug, into recorded/05
    python tutorial/assignments/bugs.py sheet ada     # what to look for in ada's four

A bug is a piece of text in the place of another one. What students get is the module after
`rewrite`, in words of their own (the seed is the student's), so that neither a diff nor another
student's line number helps; and a recorded run: metrics, the fixed pictures before and after.
The faults lie where the core parts' checks do not look: check.py finds all of these modules right.

Handed in are, in bugs.json, {"5": {"place": "ddpo.py:123", "sentence": "..."}}, and test_05.py.
The place is worth 1 point, the test 2, the sentence 1, which a machine cannot mark. A test must
fail on the fault (in other words than the student's) and pass on the project's module and two
rewrites of it. Of the module without a fault the place is "none", and the test must fail on a
module where what the run may be taken for is real.
"""

import argparse
import json
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from parts import KEY, chosen, drawn
from PIL import Image
from rewrite import rewrite
from trial import ask, texts_of

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RUNS = HERE / "recorded"
SECRET = secrets.token_hex(8)  # of the words that tests are tried on
COUNT, POINTS = 4, 4  # bugs a student, points a bug: 1 for the place, 2 the test, 1 the sentence
LARGEST = 2**16  # bytes of a test file
SMALL = "--model zoo --device cpu --epochs 3 --samples-per-epoch 16 --samples-per-prompt 4"
SMALL += " --steps 6 --eval-samples 16 --eval-every 1 --min-count 4 --metrics compressibility"
PPO = f"{SMALL} --reward aesthetic --algorithm ddpo-is --lr 4e-4 --batch-size 8 --warmup 0"
PAIRS = f"{PPO} --micro-batch 8 --sample-batch 8"
RWR = f"{SMALL} --reward aesthetic --algorithm rwr --batch-size 16 --updates 12 --lr 3e-5"
SF = f"{SMALL} --reward aesthetic --algorithm ddpo-sf --lr 4e-4"


@dataclass(frozen=True)
class Bug:
    """A fault: `new` stands where `old` did; whole: it may be anywhere in its function."""

    number: int
    file: str
    old: str
    new: str
    options: str  # of train.py, for the recorded run
    cause: str  # for the lecturer: what is wrong, and how the run shows it
    whole: str = ""  # the function where something is missing
    as_if: int = 0  # of the module without a fault: the bug that it may be taken for


BUGS = [
    Bug(
        1,
        "scheduler",
        "entropy = (len(name), *name)",
        "entropy = (len(name), *name[:2])",
        PPO,
        "the last number of a name, the picture's, is not used: all pictures of an epoch begin "
        "with the same noise, those of one prompt are alike, and diversity is 0",
    ),
    Bug(
        2,
        "scheduler",
        'power = 2 if kind == "scaled_linear" else 1',
        'power = 2 if kind == "linear" else 1',
        PPO,
        "the two beta schedules have changed places: the sampler's alpha_bar is not that of the "
        "network's training, and the base model's pictures are bad before any training",
    ),
    Bug(
        3,
        "ddpo",
        "(decoded.float() / 2 + 0.5).clamp(0, 1)",
        "decoded.float() / 2 + 0.5",
        PPO,
        "pixels are not held between 0 and 1 before they become bytes: what is brighter than white "
        "comes out dark, as specks in the lightest places, and the other way round",
    ),
    Bug(
        4,
        "ddpo",
        "advantages[i.flatten()])",
        "advantages[samples].repeat_interleave(len(steps)))",
        PPO,
        "pairs go timestep by timestep, their advantages picture by picture: most actions are "
        "praised for another picture. The metrics are sound, and in three epochs the reward says "
        "nothing: this one is found by reading, or by a test",
    ),
    Bug(
        5,
        "ddpo",
        "old = pairs.trajectories.log_probs[pairs.i, pairs.k]",
        "old = now.detach()",
        PPO,
        "the old log p is the present one, so that the ratio is always 1: approx_kl and "
        "clip_fraction are exactly 0 though there are two updates an epoch, and nothing is clipped",
    ),
    Bug(
        6,
        "ddpo",
        "parts, total = [], len(batch) * processes()[1]",
        "parts, total = [], micro_batch * processes()[1]",
        PAIRS,
        "each micro-batch is averaged by itself and the averages are added: the gradient grows "
        "with their number, 6 here; grad_norm depends on --micro-batch",
    ),
    Bug(
        7,
        "ddpo",
        "    optimizer.zero_grad(set_to_none=True)\n",
        "",
        PPO.replace("--batch-size 8", "--batch-size 4"),
        "gradients are not set to zero before an update: each update of an epoch adds to those "
        "before, and grad_norm, averaged over four updates, is too large",
        whole="optimizer_step",
    ),
    Bug(
        8,
        "ddpo",
        "cond = policy.embed([prompts[i] for i in chosen])",
        "cond = policy.embed([prompts[i] for i in range(len(chosen))])",
        RWR,
        "a batch's pictures are shuffled, its prompts are not: pictures are trained on with other "
        "pictures' prompts. The first epoch's loss is 3.3, of the right module 0.5",
    ),
    Bug(
        9,
        "ddpo",
        "return trajectories.latents[:, -1].clone()",
        "return trajectories.latents[:, 0].clone()",
        RWR,
        "the first latent is kept, which is noise, where the last one is the picture: the network "
        "is trained to draw noise. The first epoch's loss is 2.9, of the right module 0.5",
    ),
    Bug(
        10,
        "rewards",
        "return head.eval()",
        "return head",
        PPO,
        "the aesthetic head is left in training mode: its dropout makes the scores of the very "
        "same pictures differ: 5.115 for the base model's, of the right module 5.126",
    ),
    Bug(
        11,
        "rewards",
        "(index[:, None] == index) & ~torch.eye(len(prompts), dtype=torch.bool)",
        "index[:, None] == index",
        PPO,
        "a picture counts as a pair with itself, at distance 0: of n pictures a prompt the "
        "diversity is (n - 1) / n of the true one, half for the fixed pictures",
    ),
    Bug(
        12,
        "ddpo",
        "",
        "",
        SF,
        "no fault: DDPO-SF takes one update an epoch, so that log p is that of the policy that "
        "sampled; approx_kl and clip_fraction are 0 because they must be",
        as_if=5,
    ),
]
BY_NUMBER = {bug.number: bug for bug in BUGS}


def bugs_of(student, key=KEY):
    """The student's four -> list of Bug."""
    return sorted(chosen(key, student, "bugs", BUGS, COUNT), key=lambda bug: bug.number)


def faulty(bug):
    """The module with its fault, in the project's own words -> its text, (first, last) line."""
    text = (ROOT / f"{bug.file}.py").read_text(encoding="utf-8")
    if not bug.old:
        return text, None
    if text.count(bug.old) != 1:
        raise ValueError(f"bug {bug.number}: {bug.old!r} is there {text.count(bug.old)} times")
    before, after = text.split(bug.old)
    line = before.count("\n") + 1
    return before + bug.new + after, (line, line + max(bug.new.count("\n"), 0))


@cache
def module(bug, seed):
    """The module with its fault in other words -> its text, the lines that are a right answer."""
    text, lines = faulty(bug)
    text, lines = rewrite(text, f"bug {bug.number}, {seed}", lines)
    if bug.whole:
        lines = extent(text, bug.whole)
    return text, lines


def extent(text, name):
    """Where a function lies in a text -> (first, last)."""
    lines = text.split("\n")
    first = next(n for n, line in enumerate(lines, 1) if line.startswith(f"def {name}("))
    inside = [n for n, line in enumerate(lines, 1) if n > first and line.startswith("    ")]
    last = first
    while last + 1 in inside:
        last += 1
    return first, last


def seed_of(student, key, bug):
    """Of the student's own words."""
    return drawn(key, student, f"words of bug {bug.number}")


def hand_out(bug, student, key, folder):
    """What a student gets of a bug: the module, the run, the command."""
    folder.mkdir(parents=True)
    text, _ = module(bug, seed_of(student, key, bug))
    (folder / f"{bug.file}.py").write_text(text, encoding="utf-8")
    for path in sorted((RUNS / f"{bug.number:02d}").iterdir()):
        shutil.copy(path, folder / path.name)


def record(bug, folder):
    """The run of a bug, by train.py with its module, into a folder: metrics.jsonl, pictures.png."""
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        for path in ROOT.glob("*.py"):
            shutil.copy(path, place)
        (place / "tutorial").symlink_to(ROOT / "tutorial")
        (place / f"{bug.file}.py").write_text(module(bug, "record")[0], encoding="utf-8")
        options = [*bug.options.split(), "--out", "run"]
        subprocess.run([sys.executable, "train.py", *options], cwd=place, check=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "command.txt").write_text(f"python train.py {bug.options}\n")
        lines = (place / "run" / "metrics.jsonl").read_text().splitlines()
        (folder / "metrics.jsonl").write_text("".join(timeless(line) for line in lines))
        shown = sorted((place / "run" / "samples").glob("epoch_*.png"))
        pair = [Image.open(path) for path in (shown[0], shown[-1])]
        both = Image.new("RGB", (2 * pair[0].width + 8, pair[0].height), "white")
        both.paste(pair[0], (0, 0))
        both.paste(pair[1], (pair[0].width + 8, 0))
        both.quantize(256, dither=Image.Dither.NONE).save(folder / "pictures.png", optimize=True)


def timeless(line):
    """A line of metrics.jsonl without seconds, five digits a number."""
    kept = {}
    for name, value in json.loads(line).items():
        if not name.startswith("seconds"):
            kept[name] = shorter(value)
    return json.dumps(kept) + "\n"


def shorter(value):
    """A number, or a list of numbers, in five digits."""
    if isinstance(value, list):
        return [shorter(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


@cache
def like(name, n):
    """A module in the n-th other words of this process."""
    return rewrite((ROOT / f"{name}.py").read_text(encoding="utf-8"), f"{SECRET} {n}")[0]


def versions(bug):
    """What a test is tried on -> [(what it is, shall the test pass?, the modules' texts)]."""
    whole, name = texts_of(ROOT), bug.file
    found = [("the project's own module", True, whole)]
    for n in (1, 2):
        texts = {**whole, name: like(name, n)}
        found.append((f"a version that behaves the same ({n})", True, texts))
    if bug.as_if:
        found.append(("its module", True, {**whole, name: module(bug, "another")[0]}))
        bug = BY_NUMBER[bug.as_if]
    text, _ = module(bug, SECRET)
    return [*found, ("the fault", False, {**whole, bug.file: text})]


def read_answers(submission):
    """bugs.json -> {number: {"place": str, "sentence": str}}, what is wrong with it."""
    path = submission / "bugs.json"
    try:
        given = json.loads(path.read_text(encoding="utf-8")[:LARGEST])
        found = {int(n): {k: str(v) for k, v in answer.items()} for n, answer in given.items()}
    except OSError:
        return {}, "hand in bugs.json and a test for each bug"
    except (ValueError, AttributeError, RecursionError):
        return {}, 'bugs.json is not as {"5": {"place": "ddpo.py:123", "sentence": "..."}}'
    return found, ""


def judge_place(bug, place, lines):
    """-> points, a sentence."""
    named = re.fullmatch(r"\s*(\w+)\.py\s*:\s*(\d+)\s*", place)
    if not place.strip():
        return 0, "no place is named"
    if place.strip().lower() == "none":
        return (1, "there is none: right") if not bug.old else (0, "there is a fault in it")
    if not named:
        return 0, f"the place is not as {bug.file}.py:123, or none: {place[:60]}"
    if not bug.old:
        return 0, f"there is no fault at {place.strip()}, nor anywhere else in it"
    file, line = named[1], int(named[2])
    if file == bug.file and lines[0] <= line <= lines[1]:
        return 1, "the place is right"
    return 0, f"{place.strip()} is not where the fault is"


def judge_test(bug, said, tried):
    """said: what the test said of each of `versions` -> points, a sentence."""
    for (what, passes, _), line in zip(tried, said, strict=True):
        if passes and line:
            return 0, f"the test fails on {what}, where nothing is wrong: {line}"
    if not said[-1]:
        which = "what one may take the run for" if bug.as_if else "the fault"
        return 0, f"the test passes on a module with {which}: there it has to fail"
    return 2, f"the test is right: on the fault it says {said[-1]}"


def mark(submission, student="public", key=KEY, seconds=60):
    """A student's four -> [{name, score, max_score, output, ungraded}]."""
    answers, problem = read_answers(submission)
    asked, tried = [], {}
    for bug in bugs_of(student, key):
        path = submission / f"test_{bug.number:02d}.py"
        if path.is_file() and not path.is_symlink() and path.stat().st_size <= LARGEST:
            test = path.read_text(encoding="utf-8", errors="replace")
            tried[bug.number] = versions(bug)
            for _, _, texts in tried[bug.number]:
                trial = {"token": secrets.token_hex(8), "name": path.name, "test": test}
                asked.append((bug.number, {**trial, "texts": texts}))
    mixed = sorted((trial for _, trial in asked), key=lambda trial: trial["token"])
    said = ask(mixed, confined=True, seconds=seconds) if mixed else {}
    entries = []
    for bug in bugs_of(student, key):
        lines = [said[trial["token"]] for number, trial in asked if number == bug.number]
        answer = answers.get(bug.number, {})
        words = seed_of(student, key, bug)
        points, place = judge_place(bug, answer.get("place", ""), module(bug, words)[1])
        if problem:
            place = problem
        more, test = 0, f"there is no test_{bug.number:02d}.py, of at most {LARGEST} bytes"
        if lines:
            more, test = judge_test(bug, lines, tried[bug.number])
        entries.append(entry(bug, points + more, f"{place}\n{test}", answer.get("sentence", "")))
    return entries


def entry(bug, points, output, sentence):
    """One of results.json's tests; the sentence waits for the lecturer."""
    name = f"bug {bug.number:02d}"
    wait = {"name": name, "max_score": 1, "handed in": sentence[:2000], "look for": bug.cause}
    found = {"name": name, "score": float(points), "max_score": POINTS - 1, "output": output}
    return {**found, "ungraded": [wait] if sentence.strip() else []}


def main(argv=None):
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["record", "sheet"])
    parser.add_argument("who", help="a bug's number, or a student")
    parser.add_argument("--key", type=Path, help="a file that holds the lecturer's key")
    options = parser.parse_args(argv)
    if options.what == "record":
        bug = BY_NUMBER[int(options.who)]
        record(bug, RUNS / f"{bug.number:02d}")
        return
    key = options.key.read_bytes().strip() if options.key else KEY
    for bug in bugs_of(options.who, key):
        lines = module(bug, seed_of(options.who, key, bug))[1]
        place = f"{bug.file}.py, lines {lines[0]} to {lines[1]}" if lines else "no fault"
        print(f"bug {bug.number:02d}: {place}: {bug.cause}")


if __name__ == "__main__":
    main()
