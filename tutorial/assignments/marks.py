"""What copying can't answer, marked for grade.py: bugs, questions, the final project.

What a machine cannot mark goes into results.json as *ungraded*: what was handed in, how many points
it may get, what to look for. Students do not get this file.
"""

import bugs
import final
import questions
import trial
from parts import KEY

LOOK_FOR = [
    "the last but one: how far a move of the prediction moves log p goes with |d mean / d eps| / "
    "std, and there the mean still depends on the prediction while std is already small; the last "
    "step comes second. Reasons from the size of std alone are half of it",
    "what is decided by step k stays: large forms come early, texture late, so the share falls "
    "with k, from about 0.25 at k = 3 of 16 to 0.02 three steps before the end [measured]. Between "
    "0 and 1, and why",
    "n softmax(beta r): at most 8, and 1 for all at beta = 0, where RWR is plain training on the "
    "policy's own pictures, bad ones as well as good ones: it learns nothing about the reward",
    "-log std - log(2 pi) / 2 of the last step's std, 0.02: 2.96, above 0, for a density is no "
    "probability, and whatever T is: the last step always ends at the same two alpha_bars",
    "a prompt needs min_count / each draws and gets draws / 45 an epoch: about 45 min_count / "
    "(each draws) epochs, exact but for draws without repetition. That is why the zoo has few "
    "prompts and many pictures of each",
    "1/2: the squared term is a mean of D squares of standard normals over 2; its deviation is "
    "1 / sqrt(2 D), 0.04 at D = 256. Answers of D/2 have summed, where this project averages",
]


def asked(submission, heads):
    """-> what there is to say of questions.jsonl, the lines that count."""
    path = submission / questions.FILE
    if not path.is_file() or path.is_symlink() or path.stat().st_size > 2**20:
        return f"there is no {questions.FILE}", []
    try:
        lines = questions.read(path)
    except (ValueError, TypeError, RecursionError, UnicodeDecodeError):
        return f"{questions.FILE} is not lines of JSON", []
    wrong = questions.broken(lines)
    if wrong:
        return f"line {wrong} does not fit the one before: no prediction counts", []
    if heads is None:
        return f"{len(lines)} lines; no heads are known to the grader", lines
    known = [n for n, line in enumerate(lines, 1) if line["hash"] in heads]
    if not known:
        return "no head of it was handed in before: no prediction counts", []
    since = max(known)
    late = [line for line in lines[since:] if line.get("what") == "predict"]
    return f"a head of line {since} was handed in before", [x for x in lines if x not in late]


def mark_questions(submission, heads=None):
    """-> results.json's test, six waiting marks. heads: those handed in before, or None."""
    said, lines = asked(submission, heads)
    waiting = []
    for number, look_for in enumerate(LOOK_FOR, 1):
        mine = [line for line in lines if line.get("question") == number]
        ran = next((n for n, x in enumerate(mine) if x.get("what") == "run"), len(mine))
        if any(line.get("what") == "predict" for line in mine[:ran]):
            wait = {"name": f"question {number}", "max_score": 2, "look for": look_for}
            kept = ("number", "reason", "found", "difference")
            handed = [{k: line[k] for k in kept if k in line} for line in mine]
            waiting.append({**wait, "handed in": handed})
    output = f"{said}; {len(waiting)} of 6 predictions count, and wait for the lecturer"
    found = {"name": "questions", "score": 0.0, "max_score": 0, "output": output}
    return {**found, "ungraded": waiting}


def mark(number, submission, student="public", key=KEY, heads=None):
    """Section 20, 21 or 22 -> results.json's tests."""
    if number == 20:
        return bugs.mark(submission, student, key)
    if number == 21:
        return [mark_questions(submission, heads)]
    own = questions.numbers(student, key)
    return [final.mark(submission, own, student, key, trial.score)]


SECTIONS = {20: "bugs", 21: "questions", 22: "final project"}
