"""Mark a submission: `python tutorial/assignments/grade.py SUBMISSION --out results.json`.

    --student ID --key FILE     the numbers that this student's functions are tried on
    --parts 5,8                 these only; 20: bugs, 21: questions, 22: the final project
    --heads FILE                {student: [heads of questions.jsonl handed in before]}, in JSON

SUBMISSION is a folder with scheduler.py, ddpo.py and rewards.py. A unit is run with the student's
function and everybody else's from this project, so that one mistake is paid once, in a process of
its own for each part (worker.py), which this one never trusts: it imports nothing of the student's,
keeps the right answers to itself, and has the last word in results.json (Gradescope's format).
That file is there from the first second, with zeros, and is renamed into place after each part.
What only a person can mark stands in its `extra_data`, as `ungraded`, with what to look for.
"""

import argparse
import ctypes
import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from check import SECONDS, ask, earned, judge, part_numbers, sentences
from handout import ROOT, questions
from marks import SECTIONS
from marks import mark as mark_section
from parts import KEY, PARTS, variants_of

WHOLE = 8 * 60  # seconds by the clock for all parts; check.py has those of one part
NO_TIME = f"no time was left for this part: the limit of {WHOLE} seconds for all parts was hit"


def adopt_orphans():
    """Whatever a student's code leaves behind becomes a child of this process, which ends it."""
    with suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def unreachable():
    """A folder of Python's that `nobody`, whom a worker becomes, cannot look into, or None."""
    for folder in map(Path, (sys.prefix, sys.base_prefix) if os.getuid() == 0 else ()):
        for path in (folder, *folder.resolve().parents):
            if not path.stat().st_mode & 0o001:
                return path
    return None


def mark(part, submission, student, key, left):
    """-> what Gradescope shows of a part. left: seconds by the clock, of all parts'."""
    asked = questions(part, student, key)
    answers = ask([asked], submission, ROOT, confined=True, seconds=SECONDS, left=left)
    verdicts = judge(part, asked, answers)
    lines = sentences(part, verdicts)
    points = round(float(earned(part, verdicts)), 2)
    return entry(part, points, "\n".join(lines) or f"right. On screen: {part.picture}")


def entry(part, points, text):
    """One of results.json's tests."""
    return {
        "name": f"part {part.number}: {', '.join(unit.name for unit in part.units)}",
        "score": points,
        "max_score": part.points,
        "output": text,
    }


def section(number, text):
    """The test of a section that isn't marked yet."""
    return {"name": SECTIONS[number], "score": 0.0, "max_score": 0, "output": text}


def save(path, entries, began):
    """results.json, aside and then renamed."""
    tests = list(entries.values())
    score = round(sum(test["score"] for test in tests), 2)
    seconds = round(time.monotonic() - began)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    waiting = [wait for test in tests for wait in test.get("ungraded", [])]
    tests = [{k: v for k, v in test.items() if k != "ungraded"} for test in tests]
    results = {"score": score, "execution_time": seconds, "tests": tests}
    results["extra_data"] = {"ungraded": waiting}
    aside.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)


def grade(submission, out, student="public", key=KEY, numbers=None, heads=None):
    """All parts, one after the other, or those of these numbers, then bugs, questions, final."""
    began = time.monotonic()
    parts = [*PARTS, *variants_of(student, key)]
    parts = [part for part in parts if numbers is None or part.number in numbers]
    entries = {part.number: entry(part, 0.0, "not marked yet") for part in parts}
    sections = [number for number in SECTIONS if numbers is None or number in numbers]
    for number in sections:
        entries[number] = section(number, "not marked yet")
    save(out, entries, began)
    for part in parts:
        left = WHOLE - (time.monotonic() - began)
        if left > 1:
            entries[part.number] = mark(part, submission, student, key, left)
        else:
            entries[part.number] = entry(part, 0.0, NO_TIME)
        save(out, entries, began)
    for number in sections:
        found = mark_section(number, submission, student, key, heads)
        entries.pop(number)
        entries.update({(number, n): test for n, test in enumerate(found)})
        save(out, entries, began)


def main(argv=None):
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("submission", type=Path, help="the student's folder")
    parser.add_argument("--student", default="public", help="a name or number")
    parser.add_argument("--key", type=Path, help="a file that holds the lecturer's key")
    parser.add_argument("--parts", type=part_numbers, help="such as 5,8")
    parser.add_argument("--heads", type=Path, help="a JSON file, {student: [heads]}")
    parser.add_argument("--out", type=Path, default=Path("results.json"))
    options = parser.parse_args(argv)
    if not options.submission.is_dir():
        parser.error(f"{options.submission} is no folder")
    adopt_orphans()
    if unreachable():
        print(f"{unreachable()} is closed to others: what students import may not be found there")
    key = options.key.read_bytes().strip() if options.key else KEY
    heads = json.loads(options.heads.read_text()) if options.heads else None
    mine = None if heads is None else heads.get(options.student, [])
    grade(options.submission, options.out, options.student, key, options.parts, mine)
    for test in json.loads(options.out.read_text())["tests"]:
        print(f"{test['name']}: {test['score']:.2f} of {test['max_score']}")
        print("    " + test["output"].replace("\n", "\n    "))


if __name__ == "__main__":
    main()
