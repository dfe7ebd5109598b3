"""What is one student's own: `python tutorial/assignments/own.py ID --key FILE --out FOLDER`.

Writes what goes on top of the hand-out: own.md, which names the student's variants, bugs,
questions, prompts and seed; own.json and own-prompts.txt; the bugs' modules and runs. All of it
follows from HMAC-SHA256(key, ID). Without a key it is "public", for those who learn alone.
"""

import argparse
import json
from pathlib import Path

import bugs
import final
import questions
from parts import KEY, variants_of

TEXT = """# Of {student}'s own

This folder goes on top of the hand-out: what is in it belongs beside `train.py`.

## Variants (20 points)

Write in `variants.py`, whose docstrings say what; `check.py --parts {numbers}` tries them:

{variants}

## Bugs (16 points)

Each folder holds one module in other words, with at most one fault in it, and the run that it
made: the command, `metrics.jsonl`, the fixed pictures before and after. Compare with the same
command on your own modules. One module of the twelve has no fault at all. Functions, methods and
parameters have the names that they have everywhere.

{bugs}

Hand in `bugs.json`,

    {{"5": {{"place": "ddpo.py:123", "sentence": "what is wrong, and how the run shows it"}}}}

the number being the folder's, or "none" for the place; and for each a file such as `test_05.py` of
functions `test_...()`. It must fail on that module, pass on yours, and pass on versions written
otherwise that behave the same.
Where nothing is wrong, it must pass on all of these, and fail where what you suspected is real.
`python tutorial/assignments/trial.py test_05.py bugs/05` tries it on two of them.

## Predict, then run (12 points)

{questions}

First all predictions, each with its reason; then hand in the one line that `head` prints, for a
prediction counts only if it was there before; then run, and explain the difference:

    python tutorial/assignments/questions.py predict 4 1.5 "since std is ..."
    python tutorial/assignments/questions.py head
    python tutorial/assignments/questions.py run 4
    python tutorial/assignments/questions.py explain 4 "I had forgotten that ..."

## Final project (12 points)

{final}
"""


def listed(lines):
    """A Markdown list."""
    return "\n".join(f"- {line}" for line in lines)


def write(student, key, out):
    """Into a folder that isn't there yet."""
    out.mkdir(parents=True)
    mine = bugs.bugs_of(student, key)
    for bug in mine:
        bugs.hand_out(bug, student, key, out / "bugs" / f"{bug.number:02d}")
    own = questions.numbers(student, key)
    names = [(part, part.units[0].name) for part in variants_of(student, key)]
    text = TEXT.format(
        student=student,
        numbers=",".join(str(part.number) for part, _ in names),
        variants=listed(f"`{name}`, {part.points} points" for part, name in names),
        bugs=listed(f"`bugs/{bug.number:02d}/{bug.file}.py`, 4 points" for bug in mine),
        questions=questions.text(own),
        final=final.TEXT.format(**own, prompts_file=final.PROMPTS),
    )
    (out / "own.json").write_text(json.dumps(own, indent=1) + "\n", encoding="utf-8")
    (out / final.PROMPTS).write_text("\n".join(own["prompts"]) + "\n", encoding="utf-8")
    (out / "own.md").write_text(text, encoding="utf-8")


def main(argv=None):
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("student", help="a name or number")
    parser.add_argument("--key", type=Path, help="a file that holds the lecturer's key")
    parser.add_argument("--out", type=Path, required=True, help="a folder that isn't there yet")
    options = parser.parse_args(argv)
    key = options.key.read_bytes().strip() if options.key else KEY
    write(options.student, key, options.out)


if __name__ == "__main__":
    main()
