"""Write what students get: `python tutorial/assignments/handout.py OUT`.

    --without-formulas      take the formulas out of the docstrings too

The hand-out is this project with the bodies of parts.py's functions cut out by their places in the
syntax tree: signatures, docstrings and every comment outside stay as they are, and nothing is kept
twice. `graft` puts bodies back: cut and graft give the source to the byte. Beside the modules it
holds the zoo, the prompts, the chapters (the functions that they quote are cut as well), the
assignments' text, and check.py with its questions; no tests, no oracles.
"""

import argparse
import ast
import re
import shutil
from pathlib import Path

import variants
from check import store
from oracles import sheet
from parts import KEY, PARTS, UNITS, VARIANTS, chapters

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MODULES = ("scheduler.py", "ddpo.py", "rewards.py", "unet.py", "train.py")
COPIED = ("requirements.txt", "LICENSE", ".gitignore", "tutorial/prompts", "tutorial/figures")
SCRIPTS = ("lab.py", "redness.py", "zoo/data.py", "zoo/judge.py", "zoo/raters.py")
QUOTE = re.compile(r"(<!-- quote \w+\.([\w.]+) -->\n```python\n)(.*?)(\n```\n)", re.DOTALL)
OURS = ("README.md", "check.py", "parts.py", "worker.py", "trial.py", "questions.py", "show.py")
# What the two READMEs say of files that are not handed out
ABSENT = [
    (
        r"Learning alone\? .*",
        "Not handed out, though some texts name or link it: `experiments.md`,\n"
        "`chapters.py`, the notebooks, the tests, and what marks you.\n",
    ),
    (r", open its\nnotebook in \[.*?\n```\n", ".\n"),
    (r"From the whole repository make.*?Then, in the hand-out:\n\n", ""),
]


def functions(source):
    """{name, of a method Class.name: its node in the syntax tree}."""
    found = {}
    for node in ast.parse(source).body:
        found[getattr(node, "name", "")] = node
        for inner in node.body if isinstance(node, ast.ClassDef) else []:
            found[f"{node.name}.{getattr(inner, 'name', '')}"] = inner
    return found


def places(source, names):
    """Where the bodies lie, docstrings excluded -> [(name, first line, one after the last)]."""
    nodes = functions(source)
    found = []
    for name in [name for name in names if name in nodes]:
        body = nodes[name].body
        if not ast.get_docstring(nodes[name]) or len(body) < 2:
            raise ValueError(f"{name} has no docstring, or no body")
        found.append((name, body[0].end_lineno, body[-1].end_lineno))
    return sorted(found, key=lambda place: place[1])


def cut(source, lines):
    """Put one line in the place of each body. lines: {name: it} -> the text, {name: the body}."""
    text, bodies = source.split("\n"), {}
    for name, first, last in reversed(places(source, lines)):
        body = text[first:last]
        indent = len(body[-1]) - len(body[-1].lstrip()) if len(body) == 1 else indent_of(body)
        bodies[name] = "\n".join(body)
        text[first:last] = [" " * indent + lines[name]]
    return "\n".join(text), bodies


def indent_of(lines):
    """The spaces before the first line that is code."""
    code = next(line for line in lines if line.strip())
    return len(code) - len(code.lstrip())


def graft(text, bodies):
    """The inverse of `cut`: its text, {name: body} -> the source."""
    lines = text.split("\n")
    for name, first, last in reversed(places(text, bodies)):
        lines[first:last] = bodies[name].split("\n")
    return "\n".join(lines)


def asks(name, chapter):
    """What stands where a body was."""
    return f'raise NotImplementedError("write {name} (chapter {chapter})")'


def hollow(source):
    """A module without the bodies of all parts."""
    return cut(source, {name: asks(name, chapter) for name, chapter in chapters().items()})[0]


def hollow_quotes(chapter):
    """A chapter, the functions that it quotes without their bodies."""

    def hollowed(match):
        quoted, lines = match[2], {}
        for name, number in chapters().items():
            if name == quoted or name.startswith(f"{quoted}."):
                lines[name if name != quoted else name.split(".")[-1]] = asks(name, number)
        return match[1] + (cut(match[3], lines)[0] if lines else match[3]) + match[4]

    return QUOTE.sub(hollowed, chapter)


def without_formulas(source):
    """The docstrings of the parts' functions without their indented lines."""
    lines, nodes = source.split("\n"), functions(source)
    for name in sorted(set(chapters()) & set(nodes), key=lambda n: -nodes[n].lineno):
        doc = nodes[name].body[0]
        kept = []
        for line in lines[doc.lineno - 1 : doc.end_lineno]:
            indented = line.startswith(" " * (doc.col_offset + 1))
            if not indented and (line.strip() or kept[-1].strip()):
                kept.append(line)
        lines[doc.lineno - 1 : doc.end_lineno] = kept
    return "\n".join(lines)


def signatures(part, folder=ROOT):
    """{unit: "(x_0, noise, alpha_bar_t)"} of a part; of a class, its __init__'s."""
    found = {}
    for unit in part.units:
        nodes = functions((folder / f"{unit.file}.py").read_text(encoding="utf-8"))
        node = nodes.get(f"{unit.name}.__init__", nodes[unit.name])
        found[unit.name] = f"({ast.unparse(node.args).removeprefix('self, ')})"
    return found


def questions(part, student="public", key=KEY):
    """A part's, or a variant's, as one student gets them -> check.Sheet."""
    if part in VARIANTS:
        return sheet(part, signatures(part, HERE), student, key, variants)
    return sheet(part, signatures(part), student, key)


def present(text):
    """A chapter or README without what it says of files that are not handed out."""
    for absent, instead in ABSENT:
        text = re.sub(absent, instead, text, flags=re.DOTALL)
    return text


def copy(name, out):
    """A file, or a folder's data and not its scripts, from the same place in the project."""
    source, target = ROOT / name, out / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        without = shutil.ignore_patterns("*.py", ".data", "__pycache__")
        shutil.copytree(source, target, ignore=without, dirs_exist_ok=True)
    else:
        shutil.copy(source, target)


def write(out, formulas=True, zoo=True):
    """The hand-out, into a folder that isn't there yet; zoo: with its weights."""
    out.mkdir(parents=True)
    for name in MODULES:
        text = hollow((ROOT / name).read_text(encoding="utf-8"))
        (out / name).write_text(text if formulas else without_formulas(text), encoding="utf-8")
    ours = [f"tutorial/assignments/{name}" for name in OURS]
    scripts = [f"tutorial/{name}" for name in SCRIPTS]
    for name in [*COPIED, *ours, *scripts, *(["tutorial/zoo"] if zoo else [])]:
        copy(name, out)
    for path in [*ROOT.glob("tutorial/[0-9]*-*.md"), ROOT / "tutorial" / "README.md"]:
        text = hollow_quotes(path.read_text(encoding="utf-8"))
        (out / "tutorial" / path.name).write_text(present(text), encoding="utf-8")
    shutil.copy(HERE / "ai-policy.md", out / "AGENTS.md")
    for path in (out / "README.md", out / "tutorial" / "assignments" / "README.md"):
        path.write_text(present((HERE / "README.md").read_text(encoding="utf-8")), encoding="utf-8")
    names = [unit.name for part in VARIANTS for unit in part.units]
    (out / "variants.py").write_text(variants.stubs(names), encoding="utf-8")
    for part in (*PARTS, *VARIANTS):
        store(questions(part), out / "tutorial" / "assignments" / "checks")


def main(argv=None):
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="a folder that isn't there yet")
    parser.add_argument("--without-formulas", action="store_true", help="in docstrings")
    options = parser.parse_args(argv)
    if options.out.exists():
        parser.error(f"{options.out} is there already")
    write(options.out, not options.without_formulas)
    print(f"{len(UNITS)} units of {len(PARTS)} parts: {options.out}")


if __name__ == "__main__":
    main()
