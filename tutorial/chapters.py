"""Runs the chapters, and keeps true what they quote, print and show.

    python tutorial/chapters.py               # run all; refresh quotes, outputs, figures, notebooks
    python tutorial/chapters.py 4             # run one
    python tutorial/chapters.py --check [4]   # run, write nothing; fail where a chapter is not true
    python tutorial/chapters.py --quotes      # refresh the quotes alone: after a change of the code
    python tutorial/chapters.py --notebooks   # write the notebooks alone

A chapter is a Markdown file, the only thing that is written by hand. Its conventions:

    ```python                     a block: run in the chapter's own process, in one namespace with
                                  the blocks above it, offline, on one thread, in the repository's
                                  root. `import lab` finds tutorial/lab.py, which finds all else
    ```text right behind it       what the block printed; written here, never by hand
    lab.FIGURES / "4-clip.png"    where a block draws a picture; its name begins with the chapter's
                                  number. The text shows it, ![what one sees](figures/4-clip.png),
                                  on a line of its own anywhere below the block
    <!-- varies -->               above a block that trains, or shows what was trained: its numbers
                                  differ with threads and machines. What it prints and draws is
                                  refreshed, never compared; what must hold it asserts itself, as
                                  an inequality with room (a gain of at least 0.5 deviations)
    <!-- quote ddpo.ppo_loss -->  above a block that is the source of a function, class or method
                                  (module.Class.method): filled in here, not run
    ```sh, other ```text          shown, not run
    ```math and $`x`$             formulas, as GitHub and KaTeX set them
    <details><summary>...         the answers to the questions, folded away

--check compares all else: words exactly, numbers to 1 % or one unit of their last digit, pictures
to three grey levels in the mean.
"""

import argparse
import ast
import contextlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
REPOSITORY = "https://github.com/OWNER/ddpo"  # where the notebooks clone it from
SOURCES = [ROOT, HERE, HERE / "zoo", HERE / "algorithms"]  # where quoted modules lie
TOGETHER = 2  # chapters at a time
FIGURES = HERE / "figures"
OFFLINE = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "HF_HUB_OFFLINE": "1"}

MARK = r"(?:<!-- (quote|varies)(?: ([\w.]+))? -->\n)?"
BLOCK = re.compile(MARK + r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.DOTALL)
IMAGE = re.compile(r"^!\[[^\]]*\]\(figures/([\w.-]+)\)$", re.MULTILINE)
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


FIRST_CELL = f"""\
!git clone -q --depth 1 {REPOSITORY} ddpo
%cd ddpo
!grep -v torch requirements.txt > /tmp/requirements.txt && pip install -q -r /tmp/requirements.txt
import sys

import matplotlib
import torch
import transformers
from IPython.display import Image

matplotlib.use("agg")  # figures are shown once, from their files
sys.path += ["tutorial", "tutorial/zoo"]
print(sys.version, torch.__version__, transformers.__version__)"""


def paths():
    """The chapters, in order."""
    return sorted(HERE.glob("[0-9]*-*.md"), key=number)


def number(path):
    """The number of a chapter."""
    return int(path.name.split("-")[0])


def quotation(name):
    """The source of "module.function" or "module.Class.method", its file's name above."""
    module, *inner = name.split(".")
    files = [folder / f"{module}.py" for folder in SOURCES]
    path = next(filter(Path.is_file, files), ROOT / f"{module}.py")
    text = path.read_text(encoding="utf-8")
    node = ast.parse(text)
    for wanted in inner:
        named = [n for n in node.body if getattr(n, "name", None) == wanted]
        if not named:
            raise SystemExit(f"{path} has no {'.'.join(inner)} to quote")
        node = named[0]
    first = min([node.lineno, *[decorator.lineno for decorator in node.decorator_list]])
    source = "\n".join(text.splitlines()[first - 1 : node.end_lineno])
    return f"# {path.relative_to(ROOT).as_posix()}\n{textwrap.dedent(source)}\n"


def written(mark, name, code, output):
    """A block as it stands in a chapter."""
    above = f"<!-- {' '.join(filter(None, [mark, name]))} -->\n" if mark else ""
    below = f"\n```text\n{output}```\n" if output else ""
    return f"{above}```python\n{code}```\n{below}"


def quoted(text):
    """A chapter with its quotes as the source is now."""

    def fresh(match):
        mark, name = match.group(1, 2)
        if mark != "quote":
            return match.group()
        return written(mark, name, quotation(name), match.group(4))

    return BLOCK.sub(fresh, text)


def execute(code, where, line, namespace):
    """Run a block whose code begins at a line of its chapter -> what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile("\n" * line + code, where, "exec"), namespace)
    return "".join(f"{line.rstrip()}\n" for line in printed.getvalue().strip("\n").splitlines())


def refuse(*arguments):
    """In the place of a connection."""
    raise OSError("chapters are run offline")


class Chapter:
    """A chapter being run: its new text and figures, and where the old ones are not true."""

    def __init__(self, path, folder):
        self.path, self.folder, self.faults = path, folder, []
        self.namespace, self.varying = {"__name__": "__main__"}, set()

    def figures(self, folder):
        """The chapter's figures in a folder -> set of names."""
        return {path.name for path in folder.glob(f"{number(self.path)}-*")}

    def run(self):
        """Run all blocks -> the chapter with quotes and outputs as they are now."""
        old = self.path.read_text(encoding="utf-8")
        new = quoted(old)
        if new != old:
            self.faults.append(f"{self.path.name}: a quote is not the source's; try --quotes")
        return BLOCK.sub(self.block, new)

    def block(self, match):
        """Run a block, unless it is a quote -> it, and what it printed."""
        mark, name, code = match.group(1, 2, 3)
        if mark == "quote":
            return match.group()
        line, drawn = match.string.count("\n", 0, match.start(3)), self.figures(self.folder)
        output = execute(code, str(self.path), line, self.namespace)
        if mark == "varies":
            self.varying |= self.figures(self.folder) - drawn
        elif not alike(match.group(4) or "", output):
            where = f"{self.path.name}:{line + 1} printed"
            self.faults.append(f"{where}\n{output}where the chapter has\n{match.group(4)}")
        return written(mark, name, code, output)

    def compare_figures(self):
        """Add the figures that are not as they were to the faults."""
        old, new = self.figures(FIGURES), self.figures(self.folder)
        if old != new:
            lists = f"{sorted(new)} where figures/ has {sorted(old)}"
            self.faults.append(f"{self.path.name} draws {lists}")
        for name in sorted((old & new) - self.varying):
            off = grey_levels(FIGURES / name, self.folder / name)
            if off > 3:
                self.faults.append(f"figures/{name} is off by {off:.1f} grey levels in the mean")

    def write(self, text):
        """The new text, the new figures in the place of the old."""
        self.path.write_text(text, encoding="utf-8")
        for name in self.figures(FIGURES):
            (FIGURES / name).unlink()
        for name in self.figures(self.folder):
            shutil.copy(self.folder / name, FIGURES / name)


def alike(before, now):
    """Are two outputs the same, numbers to 1 % or one unit of the last digit?"""
    if NUMBER.sub("#", before) != NUMBER.sub("#", now):
        return False
    return all(map(close, NUMBER.findall(before), NUMBER.findall(now)))


def close(a, b):
    """Are two numbers, as they were printed, the same to 1 % or one unit of the last digit?"""
    mantissa, _, exponent = a.partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    a, b = float(a), float(b)
    return abs(a - b) <= max(0.01 * max(abs(a), abs(b)), 1.01 * unit)


def grey_levels(before, now):
    """How far two pictures, or films, are apart in the mean; infinitely where sizes differ."""
    films = []
    for path in (before, now):
        with Image.open(path) as picture:
            frames = [np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(picture)]
        films.append(np.stack(frames).astype(float))
    if films[0].shape != films[1].shape:
        return np.inf
    return np.abs(films[0] - films[1]).mean()


def run_chapter(path, check):
    """One chapter, in this process. With `check` nothing is written -> where it is not true."""
    import lab

    socket.socket.connect = refuse
    with tempfile.TemporaryDirectory() as folder:
        chapter, lab.FIGURES = Chapter(path, Path(folder)), Path(folder)
        text = chapter.run()
        if not check:
            chapter.write(text)
            return []
        chapter.compare_figures()
    return chapter.faults


def run_apart(path, options):
    """One chapter in a process of its own -> did it go well?"""
    command = [sys.executable, str(Path(__file__).resolve()), str(number(path)), *options]
    return subprocess.run(command).returncode == 0


def links_made_whole(text):
    """A chapter's links, seen from a notebook: they lead to the repository."""
    text = re.sub(r"\]\(\.\./(?!/)", f"]({REPOSITORY}/blob/main/", text)
    return re.sub(r"\]\((?=[\w-]+(?:/[\w.-]+)*\.\w+)", f"]({REPOSITORY}/blob/main/tutorial/", text)


def prose(text):
    """Text between two blocks as a notebook's cells; its pictures are those of the reader's run."""
    text = re.sub(r"```math\n(.*?)```", r"$$\n\1$$", text, flags=re.DOTALL)
    text = re.sub(r"\$`(.*?)`\$", r"$\1$", text)
    cells = []
    for i, part in enumerate(IMAGE.split(text)):
        if i % 2:
            cells.append(cell("code", f'Image(lab.FIGURES / "{part}")'))
        elif part.strip():
            cells.append(cell("markdown", links_made_whole(part.strip())))
    return cells


def cell(kind, source):
    """A cell of a notebook."""
    empty = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "metadata": {}, "source": source.splitlines(True), **empty}


def notebook(text):
    """A chapter as a notebook without outputs: nbformat 4 -> JSON."""
    cells, at = [cell("code", FIRST_CELL)], 0
    for match in BLOCK.finditer(text):
        if match.group(1) != "quote":
            cells += [*prose(text[at : match.start()]), cell("code", match.group(3).strip())]
            at = match.end()
    cells += prose(text[at:])
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    whole = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 4}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def write_notebooks():
    """colab/*.ipynb, of all chapters."""
    for path in paths():
        text = notebook(path.read_text(encoding="utf-8"))
        (HERE / "colab" / f"{path.stem}.ipynb").write_text(text, encoding="utf-8")


def main():
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("chapter", type=int, nargs="?", help="one of them; by default all")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    parser.add_argument("--quotes", action="store_true", help="refresh the quotes alone")
    parser.add_argument("--notebooks", action="store_true", help="write the notebooks alone")
    given = parser.parse_args()
    chosen = [path for path in paths() if given.chapter in (None, number(path))]
    faults = []
    if given.quotes:
        for path in chosen:
            path.write_text(quoted(path.read_text(encoding="utf-8")), encoding="utf-8")
    elif given.chapter is not None:
        start = time.time()
        faults = run_chapter(chosen[0], given.check)
        print(f"{chosen[0].name}: {time.time() - start:.0f} s", *faults, sep="\n", flush=True)
    elif not given.notebooks:
        options = ["--check"] if given.check else []
        with ThreadPoolExecutor(TOGETHER) as pool:
            went_well = list(pool.map(lambda path: run_apart(path, options), chosen))
        faults = [path.name for path, well in zip(chosen, went_well) if not well]
    if not given.check:
        write_notebooks()
    sys.exit(bool(faults))


if __name__ == "__main__":
    os.environ.update(OFFLINE)  # before torch is imported
    os.chdir(ROOT)
    main()
