"""The files of tutorial/examples, as their first lines say to use them."""

import asyncio
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from rewards import compressibility, load_object
from test_train import resume, run, sampled

EXAMPLES = Path(train.__file__).parent / "tutorial" / "examples"
LORA = "pytorch_lora_weights.safetensors"
UNET = "unet/diffusion_pytorch_model.safetensors"


def test_every_example_is_tested_here_and_shows_its_command():
    assert sorted(path.name for path in EXAMPLES.glob("*")) == [
        *("__pycache__" for _ in EXAMPLES.glob("__pycache__")),
        "ema.py",
        "together.py",
        "weighted.py",
    ]
    for path in EXAMPLES.glob("*.py"):
        assert "python train.py --" in path.read_text()
        assert f" tutorial/examples/{path.name}:" in path.read_text()


def test_the_weighted_sum_is_that_of_its_parts_which_are_shown(tmp_path):
    spec = f"{EXAMPLES}/weighted.py:weighted"
    folder = run(tmp_path / "run", "--reward", spec, "--epochs", "1")
    record = sampled(folder, 0)
    parts = record["shown"]["reward"]
    assert set(parts) == {"aesthetic", "compressibility"}
    by_hand = np.array(parts["aesthetic"]) + 0.5 * np.array(parts["compressibility"])
    assert record["rewards"] == pytest.approx(by_hand, abs=1e-6)
    images = np.random.default_rng(0).integers(256, size=(3, 64, 64, 3), dtype=np.uint8)
    scores, shown = load_object(spec, "--reward", ())(images, ["a"] * 3)
    assert shown["compressibility"] == pytest.approx(compressibility(images, ["a"] * 3))
    assert len(set(scores)) == 3


def test_an_async_reward_keeps_the_order_and_asks_for_many_at_a_time(tmp_path, monkeypatch):
    together = load_object(f"{EXAMPLES}/together.py:together", "--reward", ())
    module, busy, most = sys.modules[together.__module__], [], []
    real = module.rate

    async def rate(image, prompt):
        busy.append(prompt)
        most.append(len(busy))
        await asyncio.sleep(0.01 if prompt == "a" else 0.02)  # they end in another order
        busy.remove(prompt)
        return await real(image, prompt)

    monkeypatch.setattr(module, "rate", rate)
    images = np.random.default_rng(0).integers(256, size=(32, 8, 8, 3), dtype=np.uint8)
    scores = together(images, ["b", "a"] * 16)
    assert scores == [i[..., 2].mean() - i[..., :2].mean() for i in images]
    assert max(most) == 16 and busy == []
    folder = run(tmp_path / "run", "--reward", f"{EXAMPLES}/together.py:together", "--epochs", "1")
    assert len(sampled(folder, 1)["rewards"]) == 4


@pytest.mark.parametrize("lora", [[], ["--lora-rank", "2"]], ids=["full", "lora"])
def test_the_average_of_the_weights_is_that_by_hand_and_goes_on(lora, tmp_path, monkeypatch):
    """After updates 1 to 4: a = 0.75 a + 0.25 theta; the stopped run's is the same to the bit."""
    spec = ["--algorithm", f"{EXAMPLES}/ema.py:EMA", "--set", "decay=0.75", *lora]
    cut = run(tmp_path / "cut", *spec, "--epochs", "1")
    resume(cut, "--epochs", "2")
    seen, real = [], train.ddpo.optimizer_step

    def step(policy, *others):
        seen.append(theta(policy.unet))
        result = real(policy, *others)
        seen.append(theta(policy.unet))
        return result

    def theta(net):
        named = net.named_parameters()
        return {name: p.detach().double().clone() for name, p in named if p.requires_grad}

    monkeypatch.setattr(train.ddpo, "optimizer_step", step)
    whole = run(tmp_path / "whole", *spec)
    average = seen[0]
    for after in seen[1::2]:
        average = {name: 0.75 * average[name] + 0.25 * after[name] for name in average}
    file = f"000004/{LORA if lora else UNET}"
    found = load_file(whole / "ema" / file)
    assert set(found) == {f"unet.{name}" if lora else name for name in average}
    for name, expected in average.items():
        saved = found[f"unet.{name}" if lora else name]
        torch.testing.assert_close(saved.double(), expected, rtol=1e-5, atol=1e-7)
        assert torch.equal(saved, load_file(cut / "ema" / file)[f"unet.{name}" if lora else name])
