"""Looking at what was trained: tutorial/draw.py, and the snippets of tutorial/real_sd.md."""

import re

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

import train
import unet
from conftest import ROOT
from helpers import normal
from test_scale import awaken


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Where the page's commands would have left a tuned UNet and a LoRA of the zoo -> folder."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "tutorial").symlink_to(ROOT / "tutorial")
    net = unet.load(unet.UNet, train.ZOO / "unet")
    net.conv_in.bias.data += 0.3 * normal(*net.conv_in.bias.shape)
    unet.save(net, folder / "runs" / "aesthetic" / "checkpoints" / "000016" / "unet")
    lora = folder / "runs" / "lora" / "checkpoints" / "000016"
    lora.mkdir(parents=True)
    unet.save_lora(awaken(unet.add_lora(net, 4), 0.05), lora)
    return folder


def snippets():
    """The Python code of the page, block by block."""
    page = (ROOT / "tutorial" / "real_sd.md").read_text()
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


def test_diffusers_takes_the_zoo_and_what_was_trained_as_the_page_says(home, monkeypatch):
    """No dtype is given anywhere; the pictures differ as the networks do."""
    monkeypatch.chdir(home)
    exec(snippets()[0], {})
    base, *others = (np.asarray(Image.open(f"{name}.png")) for name in ("base", "tuned", "lora"))
    for picture in others:
        assert picture.shape == (64, 64, 3)
        assert np.abs(base.astype(int) - picture.astype(int)).mean() > 3


def test_a_lora_has_kohyas_names_after_the_pages_second_snippet(home, monkeypatch):
    """lora_unet_<diffusers' name, with underscores>, and an alpha that makes its scale 1."""
    monkeypatch.chdir(home)
    exec(snippets()[1], {})
    theirs, ours = (
        load_file("lora.safetensors"),
        load_file(f"runs/lora/checkpoints/000016/{unet.LORA}"),
    )
    expected = {}
    for key in UNet2DConditionModel.from_pretrained(train.ZOO / "unet").state_dict():
        if re.search(r"attn[12]\.to_(q|k|v|out\.0)\.weight", key):
            layer, name = key.removesuffix(".weight"), "lora_unet_" + key[:-7].replace(".", "_")
            expected[f"{name}.lora_down.weight"] = ours[f"unet.{layer}.lora_A.weight"]
            expected[f"{name}.lora_up.weight"] = ours[f"unet.{layer}.lora_B.weight"]
            expected[f"{name}.alpha"] = torch.tensor(4)
    assert len(expected) == 3 * 56 and theirs.keys() == expected.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in expected.items())
