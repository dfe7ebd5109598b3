"""What `ruff` doesn't look at: functions that fit a screen, statements that are statements."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = ["scheduler.py", "ddpo.py", "rewards.py", "unet.py", "train.py"]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def sources():
    """Every Python file of the project: those that git has, or will have."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split()
    return listed or sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("**/*.py"))


def faults(text):
    """The lines that are against the style guide -> [(line, what)]."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, FUNCTIONS) and node.end_lineno - node.lineno >= 50:
            found.append((node.lineno, f"{node.name} has over 50 lines"))
        if isinstance(node, ast.NamedExpr):
            found.append((node.lineno, "a walrus"))
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
            found.append((node.lineno, "a lambda with a name"))
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            if len(node.targets[0].elts) > 3:
                found.append((node.lineno, "an assignment of more than three"))
        if isinstance(node, ast.Expr) and isinstance(
            node.value, (ast.ListComp, ast.BoolOp, ast.IfExp, ast.Tuple)
        ):
            found.append((node.lineno, "an expression for its side effect"))
        if isinstance(node, ast.IfExp) and isinstance(node.orelse, ast.IfExp):
            found.append((node.lineno, "a chain of ternaries"))
    for number, line in enumerate(text.splitlines(), 1):
        if "# no" + "qa" in line or "# fmt: " + "off" in line:
            found.append((number, "a linter switched off"))
    return found


@pytest.mark.parametrize("path", sources())
def test_functions_fit_a_screen_and_statements_are_statements(path):
    assert faults((ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "def f():\n" + "    x = 1\n" * 50,
        "if (n := 3) > 2:\n    pass\n",
        "f = lambda x: x\n",
        "a, b, c, d = 1, 2, 3, 4\n",
        "[print(x) for x in range(3)]\n",
        "True and print(3)\n",
        "x = 1 if y else 2 if z else 3\n",
        "import os  # no" + "qa\n",
    ],
)
def test_a_fault_is_seen(text):
    assert len(faults(text)) == 1


def test_every_function_of_the_five_modules_says_what_it_does():
    """But for the methods that Python or torch call, and functions inside of functions."""
    for path in MODULES:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        nodes = list(tree.body)
        for node in tree.body:
            nodes += node.body if isinstance(node, ast.ClassDef) else []
        for node in nodes:
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and node.name != "forward":
                special = node.name.startswith("__")
                assert special or ast.get_docstring(node), f"{path}: {node.name}"
