"""The tutorial's chapters: what can be seen without running them (tutorial/chapters.py --check)."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "tutorial"))
import chapters
import train

ROOT = Path(__file__).parents[1]
TUTORIAL = ROOT / "tutorial"

TEXTS = [ROOT / "README.md", *sorted(TUTORIAL.glob("*.md")), *sorted(TUTORIAL.glob("*/*.md"))]
# What the paper numbers: each has a row in the map.
NUMBERED = ["Eq. 1", "Eq. 2", "Eq. 3", "3.1", "3.2", "4.1", "4.2", "4.3", "5.1", "5.2", "5.3"]
NUMBERED += ["6.1", "6.2", "6.3", "A", "B", "C", "D.1", "D.2", "D.3", "D.4", "D.5", "D.6"]
NUMBERED += ["E.1", "E.2", "F", "Table 1", *[f"Fig. {n}" for n in range(1, 13)]]


def prose(path):
    """A text without its blocks of code."""
    return re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(path):
    """What #... may follow a link to a text."""
    headings = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if not link.startswith(("http://", "https://")):
            file, _, anchor = link.partition("#")
            target = path.parent / file if file else path
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("path", chapters.paths(), ids=lambda path: path.stem)
def test_a_chapter_is_what_the_source_and_its_notebook_are(path):
    text = path.read_text(encoding="utf-8")
    assert chapters.quoted(text) == text, "try: python tutorial/chapters.py --quotes"
    built = (TUTORIAL / "colab" / f"{path.stem}.ipynb").read_text(encoding="utf-8")
    assert chapters.notebook(text) == built, "try: python tutorial/chapters.py --notebooks"
    for match in chapters.BLOCK.finditer(text):
        compile(match.group(3), path.name, "exec")


def test_every_figure_is_shown_and_all_are_small():
    shown = [name for path in chapters.paths() for name in chapters.IMAGE.findall(prose(path))]
    drawn = [path.name for path in chapters.FIGURES.iterdir()]
    assert sorted(shown) == sorted(drawn)
    assert sum(path.stat().st_size for path in chapters.FIGURES.iterdir()) <= 3_000_000


def test_the_map_covers_the_paper_and_leads_to_what_there_is():
    text = (TUTORIAL / "README.md").read_text(encoding="utf-8")
    rows = [row.split("|")[1].strip() for row in text.split("\n") if row.startswith("|")]
    assert set(NUMBERED) <= set(rows)
    entries = re.findall(r"`(\w+)\.py:([\w.]+)`", text)
    assert len(entries) > 20
    for module, name in entries:
        chapters.quotation(f"{module}.{name}")


def test_the_lab_is_small():
    assert len((TUTORIAL / "lab.py").read_text(encoding="utf-8").splitlines()) <= 120


BEFORE = """\
# 3. Three

```python
import lab

x = 3
print(f"x = {x} of {1 / 3:.3f}")
lab.grid(lab.np.full((2, 8, 8, 3), 100 + SHADE, lab.np.uint8), 2, "3-grey.png")
```

```text
x = 3 of 0.333
```

![grey](figures/3-grey.png)

<!-- quote redness.redness -->
```python
old
```

<!-- varies -->
```python
print(x + 1)
```

The formula $`x`$, [a link](../ddpo.py).

```math
x = 3
```
"""


@pytest.fixture
def chapter(tmp_path, monkeypatch):
    """chapters.run_chapter of a text -> faults."""
    monkeypatch.setattr(chapters, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(chapters.socket.socket, "connect", None)
    monkeypatch.setattr("lab.FIGURES", None)
    (tmp_path / "figures").mkdir()
    path = tmp_path / "3-three.md"

    def run(text, check):
        path.write_text(text, encoding="utf-8")
        return chapters.run_chapter(path, check)

    run.path = path
    return run


def test_a_run_refreshes_and_a_check_compares(chapter):
    text = BEFORE.replace("+ SHADE", "")
    assert chapter(text, check=False) == []
    fresh = chapter.path.read_text(encoding="utf-8")
    assert "def redness" in fresh and "old" not in fresh
    assert "print(x + 1)\n```\n\n```text\n4\n```\n" in fresh
    assert np.array(Image.open(chapters.FIGURES / "3-grey.png").convert("RGB")).max() == 100
    assert chapter(fresh, check=True) == []
    assert chapter(fresh.replace("```text\n4\n", "```text\n5\n"), check=True) == []  # it varies
    assert chapter.path.read_text(encoding="utf-8") != fresh, "a check writes nothing"


@pytest.mark.parametrize(
    "old, new, fault",
    [
        ("0.333\n", "0.339\n", "printed"),
        ("x = 3 of", "y = 3 of", "printed"),
        ("grey.png", "gray.png", "draws"),
        ("100,", "130,", "grey levels"),
        ("def redness", "def blueness", "quote"),
    ],
)
def test_what_is_not_true_is_a_fault(chapter, old, new, fault):
    chapter(BEFORE.replace(" + SHADE", ""), check=False)
    fresh = chapter.path.read_text(encoding="utf-8")
    assert old in fresh
    (found,) = chapter(fresh.replace(old, new), check=True)
    assert fault in found


@pytest.mark.parametrize(
    "before, now, same",
    [
        ("gain 1.50 sd", "gain 1.51 sd", True),
        ("gain 1.50 sd", "gain 1.53 sd", False),
        ("3e-05", "4e-05", True),
        ("3.0e-05", "3.3e-05", False),
        ("12 of 45", "13 of 45", True),
        ("-1200", "-1210", True),
        ("-1200", "1200", False),
        ("a cat", "a cow", False),
        ("", "1", False),
    ],
)
def test_numbers_are_compared_to_a_hundredth(before, now, same):
    assert chapters.alike(before, now) == same


def test_a_notebook_has_the_blocks_the_formulas_and_no_outputs():
    book = json.loads(chapters.notebook(BEFORE))
    kinds = [cell["cell_type"] for cell in book["cells"]]
    assert kinds == ["code", "markdown", "code", "code", "markdown", "code", "markdown"]
    sources = ["".join(cell["source"]) for cell in book["cells"]]
    assert sources[3] == 'Image(lab.FIGURES / "3-grey.png")'
    assert sources[5] == "print(x + 1)"
    assert "formula $x$" in sources[6] and "$$\nx = 3\n$$" in sources[6]
    assert f"]({chapters.REPOSITORY}/blob/main/ddpo.py)" in sources[6]
    assert all(cell["outputs"] == [] for cell in book["cells"] if cell["cell_type"] == "code")


def test_the_torch_that_texts_install_is_the_one_required():
    """Another one would be fetched a second time, with CUDA."""
    (pinned,) = re.findall("torch==.*", (ROOT / "requirements.txt").read_text(encoding="utf-8"))
    lines = [line for path in TEXTS for line in path.read_text(encoding="utf-8").splitlines()]
    installed = [line for line in lines if "download.pytorch.org" in line]
    assert len(installed) >= 2 and all(f"install {pinned} " in line for line in installed)


def test_the_reference_has_the_zoos_numbers():
    """Of epochs, pictures and rates: that of most runs first, and by name all that have another."""
    kinds = {reward: {"reward": reward} for reward in ("aesthetic", "incompressibility")}
    plain = {"reward": "compressibility"}
    kinds |= {"alignment": {"reward": "alignment"}, "": plain}
    kinds |= {"DDPO-SF": {**plain, "algorithm": "ddpo-sf"}, "RWR": {**plain, "algorithm": "rwr"}}
    lines = (TUTORIAL / "reference.md").read_text(encoding="utf-8").splitlines()
    for name in ("epochs", "samples_per_epoch", "lr"):
        (row,) = [line for line in lines if line.startswith(f"| `{train.flag(name)}`")]
        cell = row.split(" | ")[-1]
        said = re.findall(f"({'|'.join(filter(None, kinds))}) ([0-9.e-]+)", cell)
        said = {"": re.match("[0-9.e-]+", cell)[0], **dict(said)}
        for kind, given in kinds.items():
            runs = getattr(train.merge(given, train.ZOO), name)
            assert runs == float(said.get(kind, said[""])), f"{name} {kind}"
    (row,) = [line for line in lines if line.startswith("| `--algorithm`")]
    for given in ("aesthetic", "compressibility", "incompressibility", "alignment", "mine.py:f"):
        runs = train.merge({"reward": given}, train.ZOO).algorithm
        own = given in ("alignment", "mine.py:f")
        assert runs == re.findall("`([a-z-]+)`", row.split(" | ")[-1])[own]
