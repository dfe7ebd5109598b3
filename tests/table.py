"""The table of faults in README.md, and what keeps it true.

Whenever a test runs that stands in a row, conftest.py looks for the row's line in what it hears.
"""

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

README = Path(__file__).with_name("README.md")


class Row(NamedTuple):
    """What is done, the line that comes of it, the exit code, what is left on disk, its test."""

    fault: str
    line: str
    code: str
    left: str
    test: str


@cache
def rows():
    """The rows of the table -> list of Row; a line that is no code, as "nothing", is empty."""
    lines = README.read_text(encoding="utf-8").splitlines()
    cells = [line[2:-2].split(" | ") for line in lines if line.startswith("| ")]
    rows = [Row(*row) for row in cells if len(row) == 5][2:]
    code = [row._replace(line=row.line.strip("` ") if "`" in row.line else "") for row in rows]
    return [row._replace(test=row.test.strip("`")) for row in code]


def says(text, line):
    """Is there the table's `line` in a text? ... stands for anything in it."""
    pattern = ".*".join(map(re.escape, line.removeprefix("train.py: ").split("…")))
    found = (spoken.strip().removeprefix("train.py: ") for spoken in text.splitlines())
    return any(re.fullmatch(pattern, spoken) for spoken in found)
