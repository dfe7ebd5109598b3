"""Every script of the tutorial starts and ends: the zoo's recipe from nothing, its gates, its
judge, the experiments. Two steps each, on coloured shapes in the place of the emoji art, in folders
of their own.

They run in this process, for torch and transformers take seconds to import, but as `python SCRIPT`
would (conftest.start).
"""

import json
import re
import shutil

import pytest
from PIL import Image
from safetensors.torch import load_file

from conftest import ROOT
from helpers import write_art

ZOO = ROOT / "tutorial" / "zoo"
VOCABULARY = ZOO / "stable-diffusion" / "tokenizer" / "vocab.json"
RECIPE = ["clip", "vae", "unet", "word", "judge", "aesthetic", "bert", "llava"]


@pytest.fixture(scope="module")
def art(tmp_path_factory):
    folder = tmp_path_factory.mktemp("art") / ".data"
    write_art(folder)
    return folder


def files_of(zoo):
    """The files of a zoo's networks, by their place in it."""
    folders = ["clip", "judge", "aesthetic", "bert", "llava", "stable-diffusion"]
    files = [path for folder in folders for path in (zoo / folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(zoo)) for path in files}


def weights_of(zoo):
    """What the weights of a zoo are, without reading them."""
    return {path: path.stat().st_mtime_ns for path in sorted(zoo.glob("**/*.safetensors"))}


def rows_that_differ(zoo):
    """The words that the policy's text encoder tells otherwise than CLIP's."""
    parts = (zoo / "stable-diffusion" / "text_encoder", zoo / "clip")
    table = "text_model.embeddings.token_embedding.weight"
    ours, clips = (load_file(part / "model.safetensors")[table] for part in parts)
    return (ours != clips).any(1).nonzero().flatten().tolist()


def test_the_recipe_makes_a_whole_zoo_from_nothing(start, art, tmp_path):
    before, zoo = weights_of(ZOO), tmp_path / "zoo"
    shutil.copytree(art, zoo / ".data")
    said = {}
    for name in RECIPE:
        options = ("--quick", "--zoo", zoo)
        status, said[name] = start(f"tutorial/zoo/train_{name}.py", *options)
        assert status == 0, name
    assert files_of(zoo) == files_of(ZOO) - {"stable-diffusion/ddpo.json"}
    encoder = "stable-diffusion/text_encoder/config.json"
    assert json.loads((zoo / encoder).read_text()) == json.loads((ZOO / encoder).read_text())
    assert weights_of(ZOO) == before
    assert rows_that_differ(zoo) == [json.loads(VOCABULARY.read_text())["snake</w>"]]
    figures = {
        "clip": r"the right caption of 256 for [\d.]+%",
        "vae": r"L1 0\.\d+, latents of std",
        "judge": r"drawn by networks: right on [\d.]+% of things, [\d.]+% of nothings",
        "unet": r"unet step 2: loss",
        "word": r"word step 2: loss",
        "aesthetic": r"rank correlation .* -?[\d.]+",
        "bert": r"layer 3: right first [\d.]+%",
        "llava": r"right on [\d.]+% of held-out composites",
    }
    for name, figure in figures.items():
        assert re.search(figure, said[name]), name
    # called again, each goes on from the network there is
    status, again = start("tutorial/zoo/train_judge.py", "--quick", "--zoo", zoo)
    assert "judge-strict step 2" in again and "resuming" not in again
    status, again = start("tutorial/zoo/train_unet.py", "--quick", "--zoo", zoo)
    assert "unet-one-pose step 2" in again and "resuming" not in again
    assert re.search(r"the judge names [\d.]+%", again)
    status, again = start("tutorial/zoo/train_clip.py", "--quick", "--zoo", zoo)
    assert "resuming clip at step 2" in again


def test_gates_runs_on_a_few_pictures(start, art, tmp_path):
    """The shipped networks, on animals that they have never seen: what needs the art is missed."""
    zoo = tmp_path / "zoo"
    shutil.copytree(ZOO, zoo, ignore=shutil.ignore_patterns(".data", "*.py", "__pycache__"))
    shutil.copytree(art, zoo / ".data")
    (zoo / "samples.png").unlink()
    status, said = start("tutorial/zoo/gates.py", "--quick", "--zoo", zoo)
    lines = [line for line in said.splitlines() if line[:4] in ("pass", "MISS")]
    passed = {line[6:].partition(":")[0]: line[:4] == "pass" for line in lines}
    assert len(lines) == 20 and status == 1
    assert passed["judge names the animal on 8 samples at the default settings"]
    assert passed["judge says none on noise"] and passed["judge says none on blanks"]
    assert passed["BERTScore puts the right caption first"] and passed["all weights together"]
    assert not passed["judge names held-out composites"]
    sharpness = re.search(r"sharpness, .*: (\d\.\d+) \(at least 0.9\)", said)
    assert 0.3 < float(sharpness[1]) < 1.2
    assert Image.open(zoo / "samples.png").size == (8 * 64, 64)


def test_gates_says_what_it_skips_without_npm(start, tmp_path, monkeypatch):
    zoo = tmp_path / "zoo"
    shutil.copytree(ZOO, zoo, ignore=shutil.ignore_patterns(".data", "*.py", "__pycache__"))
    monkeypatch.setenv("PATH", "")
    said = start("tutorial/zoo/gates.py", "--quick", "--zoo", zoo)[1]
    assert "skip  composites: the emoji art needs npm" in said
    assert len(re.findall("^(?:pass|MISS)  ", said, re.MULTILINE)) == 14
    status, said = start("tutorial/zoo/data.py", "--zoo", zoo)
    assert "needs npm" in status


@pytest.mark.parametrize("name", ["train_unet", "gates"])
def test_a_quick_run_never_overwrites_the_zoo_that_is_here(start, name, capsys):
    before = weights_of(ZOO)
    assert start(f"tutorial/zoo/{name}.py", "--quick")[0] == 2
    assert weights_of(ZOO) == before


def test_data_draws_composites_to_look_at(start, art, tmp_path):
    shutil.copytree(art, tmp_path / ".data")
    status, said = start("tutorial/zoo/data.py", "--zoo", tmp_path)
    assert status == 0 and len(said.splitlines()) == 8
    assert Image.open(tmp_path / ".data" / "composites.png").size == (12 * 64, 8 * 64)


def test_experiments_and_the_judge_of_one_of_their_runs(start, tmp_path):
    """One run alone; --quick itself runs all, in CI."""
    page = ROOT / "tutorial" / "experiments.md"
    before = page.read_bytes()
    status, said = start("tutorial/experiments.py", "rates", "--quick", "--runs", tmp_path)
    assert status == 0 and "| aesthetic, 12 | `--lr 4e-4` | " in said
    assert page.read_bytes() == before
    [run] = (tmp_path / "quick" / "rates").iterdir()
    assert json.loads((run / "config.json").read_text())["lr"] == 4e-4
    status, said = start("tutorial/zoo/judge.py", run)
    assert status == 0 and len(re.findall(r"judge finds right [\d.]+%", said)) == 2
    assert Image.open(run / "before_after.png").size == (4 * 64, 2 * 64)


def test_the_judge_says_how_it_is_used(start, tmp_path):
    assert "usage" in start("tutorial/zoo/judge.py", tmp_path)[0]
