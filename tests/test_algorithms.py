"""The plug-ins of tutorial/algorithms, each against an independent computation."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence

import train
from rewards import load_object
from test_train import refusal, run, tiny

ALGORITHMS = Path(train.__file__).parent / "tutorial" / "algorithms"
KL = f"{ALGORITHMS / 'kl.py'}:DDPOWithKL"
WEIGHTS = "checkpoints/000002/unet/diffusion_pytorch_model.safetensors"


def metrics(folder):
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_kl_equals_that_of_torch_distributions():
    """Averaged over the dimensions, as log-probabilities are; 0 for a step without noise."""
    gaussian_kl = load_object(f"{ALGORITHMS / 'kl.py'}:gaussian_kl", "--algorithm", ())
    mean, base = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64)
    std = torch.tensor([0.3, 1.7, 0.0], dtype=torch.float64)
    kl = gaussian_kl(mean, base, std)
    for i in (0, 1):
        theirs = kl_divergence(Normal(mean[i], std[i]), Normal(base[i], std[i])).mean()
        torch.testing.assert_close(kl[i], theirs, rtol=1e-12, atol=0)
    assert kl[2] == 0


def test_kl_of_weight_0_is_ddpo(tmp_path):
    """To the bit."""
    run(tmp_path / "ddpo")
    run(tmp_path / "kl", "--algorithm", KL, "--set", "kl_weight=0")
    one, other = (load_file(tmp_path / name / WEIGHTS) for name in ("ddpo", "kl"))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    "options", [["--precision", "bf16"], ["--lora-rank", "2", "--lr", "0.02"]], ids=["bf16", "lora"]
)
def test_kl_is_0_at_the_base_and_holds_the_policy_there(options, tmp_path):
    """Before the first update the policy is the base; a heavy penalty then keeps it near."""
    options = [*options, "--algorithm", KL, "--epochs", "1"]
    one_update = ["--batch-size", "4", "--set", "kl_weight=1"]
    run(tmp_path / "first", *options, *one_update)
    assert metrics(tmp_path / "first")[0]["kl_to_base"] == 0
    free, held = tmp_path / "free", tmp_path / "held"
    options += ["--samples-per-epoch", "16", "--clip-range", "1"]
    run(free, *options, "--set", "kl_weight=0")
    run(held, *options, "--set", "kl_weight=1e6")
    assert 0 < metrics(held)[0]["kl_to_base"] < 0.7 * metrics(free)[0]["kl_to_base"]


def test_settings_of_an_algorithms_own_are_checked(tmp_path):
    """Unknown ones and words for numbers."""
    options = ["--algorithm", KL, "--out", str(tmp_path / "run")]
    for text, words in (
        ("kl=1", "no such setting"),
        ("kl_weight=a", "float"),
        ("kl_weight", "float"),
    ):
        assert words in refusal(train.main, tiny(*options, "--set", text))
    assert not (tmp_path / "run").exists()


def test_the_readmes_own_algorithm_and_reward_work_as_printed(tmp_path):
    """The blocks are cut out of it; their first line says file and command."""
    readme = (Path(train.__file__).parent / "README.md").read_text(encoding="utf-8")
    for file in ("sign.py", "mine.py"):
        code = next(c for c in readme.split("```") if c.startswith(f"python\n# {file}"))
        code = code.removeprefix("python\n")
        (tmp_path / file).write_text(code)
        options = code.splitlines()[0].partition("python train.py ")[2].split()
        options[1] = str(tmp_path / options[1])
        run(tmp_path / f"run-{file}", *options, "--epochs", "2")
        assert len(metrics(tmp_path / f"run-{file}")) == 2
