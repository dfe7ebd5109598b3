"""Looking at what was trained: tutorial/draw.py, and the snippets of tutorial/real_sd.md."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

import train
import unet
from conftest import ROOT
from helpers import normal
from test_scale import awaken
from test_train import no_curve, run, small_model


@pytest.fixture(scope="module", autouse=True)
def without_curves():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_curve", no_curve)
        yield


def newest(run):
    """The folder of a run's last checkpoint, in the zoo's own number of epochs for the reward."""
    epochs = train.merge({"reward": "aesthetic"}, train.ZOO).epochs
    return f"runs/{run}/checkpoints/{epochs:06d}"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Where the page's commands would have left a tuned UNet and a LoRA of the zoo -> folder."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "tutorial").symlink_to(ROOT / "tutorial")
    net = unet.load(unet.UNet, train.ZOO / "unet")
    net.conv_in.bias.data += 0.3 * normal(*net.conv_in.bias.shape)
    unet.save(net, folder / newest("aesthetic") / "unet")
    lora = folder / newest("lora")
    lora.mkdir(parents=True)
    unet.save_tensors(unet.lora_weights(awaken(unet.add_lora(net, 4), 0.05)), lora / unet.LORA)
    return folder


def snippets():
    """The Python code of the page, block by block."""
    page = (ROOT / "tutorial" / "real_sd.md").read_text()
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


def test_diffusers_takes_the_zoo_and_what_was_trained_as_the_page_says(home, monkeypatch):
    """No dtype is given anywhere; the pictures differ as the networks do."""
    monkeypatch.chdir(home)
    drawn = StableDiffusionPipeline.from_pretrained("tutorial/zoo/stable-diffusion")("a cat")
    assert drawn.images[0].size == (64, 64)
    exec(snippets()[0], {})
    base, *others = (np.asarray(Image.open(f"{name}.png")) for name in ("base", "tuned", "lora"))
    for picture in others:
        assert picture.shape == (64, 64, 3)
        assert np.abs(base.astype(int) - picture.astype(int)).mean() > 3


def test_a_lora_has_kohyas_names_after_the_pages_second_snippet(home, monkeypatch):
    """lora_unet_<diffusers' name, with underscores>, and an alpha that makes its scale 1."""
    monkeypatch.chdir(home)
    exec(snippets()[1], {})
    theirs, ours = load_file("lora.safetensors"), load_file(f"{newest('lora')}/{unet.LORA}")
    expected = {}
    for key in UNet2DConditionModel.from_pretrained(train.ZOO / "unet").state_dict():
        if re.search(r"attn[12]\.to_(q|k|v|out\.0)\.weight", key):
            layer, name = key.removesuffix(".weight"), "lora_unet_" + key[:-7].replace(".", "_")
            expected[f"{name}.lora_down.weight"] = ours[f"unet.{layer}.lora_A.weight"]
            expected[f"{name}.lora_up.weight"] = ours[f"unet.{layer}.lora_B.weight"]
            expected[f"{name}.alpha"] = torch.tensor(4)
    assert len(expected) == 3 * 56 and theirs.keys() == expected.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in expected.items())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two epochs each of a tiny run, full and LoRA, with every checkpoint -> folder."""
    folder = tmp_path_factory.mktemp("runs")
    run(folder / "full", "--keep-checkpoints", "0")
    run(folder / "lora", "--keep-checkpoints", "0", "--lora-rank", "2", "--lr", "0.02")
    return folder


def fixed(folder, epoch):
    """What a run asked for in an evaluation, and its four pictures at 128 pixels -> list, array."""
    path = folder / "samples" / f"epoch_{epoch:04d}.png"
    grid = np.asarray(Image.open(path))
    tiles = [grid[y : y + 32, x : x + 32] for y in (0, 32) for x in (0, 32)]
    large = [np.asarray(Image.fromarray(tile).resize((128, 128))) for tile in tiles]
    return json.loads(path.with_suffix(".json").read_text())["prompts"], np.stack(large)


def drawn(path, columns, rows):
    """The pictures of a sheet, four a prompt -> uint8 (columns, rows, 4, 128, 128, 3)."""
    sheet = np.asarray(Image.open(path).convert("RGB"))
    assert sheet.shape == (24 + rows * 152, columns * (512 + 16) - 16, 3)
    lines = [sheet[48 + 152 * row :][:128] for row in range(rows)]
    tiles = [
        [line[:, 528 * c + 128 * i :][:, :128] for i in range(4)]
        for c in range(columns)
        for line in lines
    ]
    return np.stack(tiles).reshape(columns, rows, 4, 128, 128, 3)


def furthest(one, other):
    return np.abs(one.astype(int) - other.astype(int)).max()


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("checkpoint", [[], ["--checkpoint", 1]], ids=["newest", "first"])
def test_base_and_tuned_are_drawn_from_the_noises_of_the_runs_own_pictures(
    kind, checkpoint, runs, start
):
    """The run drew prompt i from noise i: its pictures are on the sheet's diagonals."""
    folder, epoch = runs / kind, checkpoint[1] if checkpoint else 2
    asked, before = fixed(folder, 0)
    after = fixed(folder, epoch)[1]
    prompts = sorted(set(asked))
    status, said = start("tutorial/draw.py", folder, *checkpoint, *prompts)
    assert (status, said) == (0, f"{folder / 'drawn.png'}\n")
    base, tuned = drawn(folder / "drawn.png", 2, len(prompts))
    for i, prompt in enumerate(asked):
        row = prompts.index(prompt)
        assert furthest(base[row, i], before[i]) <= 2 and furthest(tuned[row, i], after[i]) <= 2
    assert furthest(base, tuned) > 8 and furthest(before, after) > 8


def test_a_model_alone_is_drawn_as_a_runs_base(runs, start, tmp_path):
    asked, before = fixed(runs / "full", 0)
    out = tmp_path / "alone.png"
    # the settings of the run, which are not the model's
    model = shutil.copytree(small_model(), tmp_path / "model")
    own = json.loads((model / "ddpo.json").read_text())
    own["all"].update(steps=3, sample_batch=4)
    (model / "ddpo.json").write_text(json.dumps(own))
    assert start("tutorial/draw.py", model, asked[0], "--out", out) == (0, f"{out}\n")
    assert furthest(drawn(out, 1, 1)[0, 0, 0], before[0]) <= 2


def frames(path):
    """Of a gif -> list of uint8 (H, W, 3), list of milliseconds."""
    gif, pictures, times = Image.open(path), [], []
    for i in range(gif.n_frames):
        gif.seek(i)
        pictures.append(np.asarray(gif.convert("RGB")).astype(int))
        times.append(gif.info["duration"])
    return pictures, times


def test_the_gif_of_a_run_is_its_fixed_pictures_by_epochs(runs, start):
    folder = runs / "full"
    assert start("tutorial/draw.py", folder, "--gif") == (0, f"{folder / 'samples.gif'}\n")
    shown, times = frames(folder / "samples.gif")
    assert times == [700, 700, 2500]
    for epoch, frame in enumerate(shown):
        grid = np.asarray(Image.open(folder / "samples" / f"epoch_{epoch:04d}.png")).astype(int)
        errors = [np.abs(other[-64:] - grid).mean() for other in shown]
        assert errors[epoch] == min(errors) < 15  # 256 colours


def test_the_gif_of_a_prompt_goes_through_the_checkpoints(runs, start, tmp_path):
    folder, out = runs / "lora", tmp_path / "bee.gif"
    asked = fixed(folder, 0)[0]
    assert start("tutorial/draw.py", folder, asked[0], "--gif", "--out", out) == (0, f"{out}\n")
    shown, _ = frames(out)
    for epoch, frame in enumerate(shown):
        errors = [np.abs(other[48:, :128] - fixed(folder, epoch)[1][0]).mean() for other in shown]
        assert errors[epoch] == min(errors) < 15
    assert len(shown) == 3


REFUSED = [
    ("RUN", "which prompts?"),
    ("RUN fox --checkpoint 7", "--checkpoint 7: RUN has kept 1, 2"),
    ("RUN fox --pictures 0", "--pictures 0"),
    ("RUN fox --gif --checkpoint 1", "--gif: shows all checkpoints"),
    ("RUN fox --out RUN/none/x.png", "RUN/none/x.png cannot be written: .*No such file"),
    ("RUN fox --out RUN/x.doc", "RUN/x.doc cannot be written: unknown file extension"),
    ("RUN fox --model RUN/none", "--model RUN/none: neither a folder"),
    ("MODEL fox --checkpoint 1", "MODEL is no run"),
    ("MODEL fox --gif", "MODEL is no run"),
    ("RUN/checkpoints/000001 fox", "is a checkpoint: give its run, RUN, and --checkpoint 1"),
    ("RUN/checkpoints/000001/unet fox", "is a checkpoint: give its run, RUN, and --checkpoint 1"),
    ("NEW fox", "NEW has no checkpoint yet"),
    ("NEW --gif", "NEW holds no samples"),
    ("none fox", "--model none: neither a folder"),
]


@pytest.mark.parametrize("options, words", REFUSED, ids=[options for options, _ in REFUSED])
def test_what_cannot_be_drawn_is_said_in_one_line(options, words, runs, start, tmp_path):
    shutil.copy(runs / "full" / "config.json", tmp_path)
    places = {"RUN": runs / "full", "MODEL": small_model(), "NEW": tmp_path}
    for name, place in places.items():
        options, words = options.replace(name, str(place)), words.replace(name, str(place))
    line = start("tutorial/draw.py", *options.split())[0]
    assert line.startswith("draw.py: ") and re.search(words, line) and "\n" not in line


def test_prompts_of_other_languages_can_be_read(monkeypatch):
    """No letter is the box that stands for a missing one."""
    monkeypatch.syspath_prepend(str(ROOT / "tutorial"))
    import draw

    missing = draw.words("\U000f0000", 100)
    seen = [draw.words(letter, 100) for letter in "äßŁёжλ"]
    assert not any(np.array_equal(one, missing) for one in seen)
    assert len({one.tobytes() for one in seen}) == 6
