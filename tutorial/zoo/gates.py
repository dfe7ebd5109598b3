"""Is the zoo good enough to teach on? Prints every gate; exit status 1 if one is missed.

    python tutorial/zoo/gates.py

Draws the policy's pictures into samples.png, asks the judge, and tries each of the other networks.
Composites need the emoji art (fetched through npm once); without npm those gates are skipped, and
said to be.
"""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))
import blind
import data
import judge as judge_module
import raters
import train
import train_bert
from rewards import ClipEmbedder, Llava, aesthetic, load_head
from train_aesthetic import rank_correlation
from unet import VAE, load

PER_ANIMAL = 4  # pictures of each
EMPTY, COMPOSITES = 200, 1000
STREAM = 2**20  # no training's random numbers


def gate(name, figure, needed, at_least=True, unit="%"):
    """Print a gate's line -> is it passed? Percentages come as shares."""
    passed = figure >= needed if at_least else figure <= needed
    scale = 100 if unit == "%" else 1
    digits = 1 if unit in ("%", "MB") else 3
    bound = f"({'at least' if at_least else 'at most'} {needed * scale:g})"
    words = [f"{figure * scale:.{digits}f}", unit, bound]
    print(f"{'pass' if passed else 'MISS'}  {name}: {' '.join(filter(None, words))}", flush=True)
    return passed


def samples(zoo, prompts, device, reward="aesthetic"):
    """A picture a prompt at the zoo's settings for a reward -> uint8 (B, 64, 64, 3)."""
    config = train.merge({"model": "zoo", "reward": reward}, train.ZOO)
    policy = train.load_policy(zoo / "stable-diffusion", torch.device(device), config)
    names = [(100, train.EVALUATION, i) for i in range(len(prompts))]
    return np.concatenate([images for _, images in policy.sample(prompts, names, 60)])


def sample_gates(judge, images, prompts):
    """Does the judge see the animals that the policy was asked for? -> list of bool."""
    seen, asked = np.array(judge_module.name(judge, images)), np.array(prompts)
    right = seen == asked

    def share_right(animal):
        return right[asked == animal].mean()

    name = f"judge names the animal on {len(prompts)} samples at the default settings"
    passed = gate(name, right.mean(), 0.80)
    hardest = sorted(dict.fromkeys(prompts), key=share_right)[:5]
    told = [f"{animal} ({', '.join(seen[asked == animal])})" for animal in hardest]
    print("      hardest:", ", ".join(told))
    return [passed]


def nothing_gates(judge, rng, count):
    """Does the judge see nothing where nothing is? -> list of bool."""
    noise = rng.integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    colours = rng.integers(0, 256, (count, 1, 1, 3), dtype=np.uint8)
    blanks = np.broadcast_to(colours, noise.shape)
    return [
        gate("judge says none on noise", judge_module.accuracy_none(judge, noise), 0.95),
        gate("judge says none on blanks", judge_module.accuracy_none(judge, blanks), 0.95),
    ]


def share_equal(said, truth):
    """The share of places where two lists agree."""
    return np.mean([a == b for a, b in zip(said, truth, strict=True)])


def composite_gates(zoo, judge, score, art, rng, count):
    """Judge, aesthetic head and LLaVA on composites of all things -> list of bool."""
    colours = list(data.COLOURS)
    truth = [(str(rng.choice(data.NAMES)), str(rng.choice(colours))) for _ in range(count)]
    pixels = np.stack([data.compose(rng, art, *pair).pixels for pair in truth])
    names, grounds = zip(*truth)
    seen, ground = judge_module.name(judge, pixels), judge_module.ground_colour(pixels)
    correlation = rank_correlation(score(pixels, None), raters.truth(pixels))
    few = slice(0, 400)
    said = Llava(str(zoo / "llava"), "cpu")(pixels[few], "what is in this picture?")
    told = [data.on_ground(*pair) for pair in truth[few]]
    return [
        gate("judge names held-out composites", share_equal(seen, names), 0.95),
        gate("ground colour of held-out composites", share_equal(ground, grounds), 0.95),
        gate(
            "aesthetic head against the raters' truth on held-out composites, rank correlation",
            correlation,
            0.9,
            unit="",
        ),
        gate("LLaVA names thing and ground of held-out composites", share_equal(said, told), 0.9),
    ]


def gradient_energy(x):
    """The sum of all absolute differences of neighbouring pixels. (B, 3, H, W) -> (B,)."""
    across, down = x.diff(dim=-1).abs(), x.diff(dim=-2).abs()
    return across.sum((1, 2, 3)) + down.sum((1, 2, 3))


@torch.no_grad()
def vae_gates(zoo, art, rng, count):
    """What the VAE leaves of composites of the paper's animals -> list of bool."""
    vae, losses, sharpness = load(VAE, zoo / "stable-diffusion" / "vae"), [], []
    for _ in range(count):
        name, colour = str(rng.choice(data.ANIMALS)), data.random_colour(rng)
        x = data.to_tensor(data.compose(rng, art, name, colour).pixels[None])
        y = vae.decode(vae.encode(x)).clamp(-1, 1)
        losses.append((x - y).abs().mean().item())
        sharpness.append((gradient_energy(y) / gradient_energy(x)).item())
    return [
        gate(
            "reconstruction of held-out animals, L1 of pixels in [-1, 1]",
            np.mean(losses),
            0.042,
            at_least=False,
            unit="",
        ),
        gate(
            "their sharpness, gradient energy against the pictures' own",
            np.mean(sharpness),
            0.9,
            unit="",
        ),
    ]


def bert_gates(zoo, count):
    """Does BERTScore tell captions apart? -> list of bool."""
    first, thing, colour = train_bert.gate(zoo / "bert", count=count)
    return [
        gate("BERTScore puts the right caption first", first, 0.99),
        gate("a wrong thing costs at least", thing, 0.05, unit="of recall"),
        gate("a wrong colour costs at least", colour, 0.05, unit="of recall"),
    ]


def alignment_gates(judge, images, prompts):
    """Does the policy follow the prompt's colour now and then? -> list of bool."""
    success = judge_module.judged_right(images, prompts, judge).mean()
    name = "judge finds animal and ground right on the base's alignment prompts"
    return [gate(name, success, 0.20), gate("the same", success, 0.60, at_least=False)]


def blind_gates(zoo):
    """What readers who were told nothing made of pictures, beside the judge -> list of bool."""
    found = json.loads((zoo / "blind.json").read_text()) if (zoo / "blind.json").is_file() else {}
    if found.pop("weights", None) != blind.fingerprint(zoo):
        print("MISS  blind naming: not done with these weights, see blind.py")
        return [False]
    weakest = min(found[f"eye names {animal}"] for animal in blind.WEAK)
    print(f"      the judge names {found['judge names samples']:.1%} of the same 90 samples")
    return [
        gate("three readers name the animal on 90 samples", found["eye names samples"], 0.9),
        gate("and on ten samples of the weakest of eight", weakest, 0.8),
        gate("judge rejects what they reject", found["judge rejects what the eye rejects"], 0.8),
        gate("and agrees with them on the rest", found["judge agrees on the rest"], 0.9),
    ]


def size_gate(zoo):
    """All weights of the zoo -> bool."""
    files = [path for path in zoo.glob("**/*.safetensors") if ".data" not in path.parts]
    megabytes = sum(path.stat().st_size for path in files) / 1e6
    return gate("all weights together", megabytes, 40, at_least=False, unit="MB")


def main():
    options = data.options(__doc__)
    zoo, few = options.zoo, options.quick
    judge, rng = judge_module.load_judge(zoo), np.random.default_rng(STREAM)
    animals = list(train.load_prompts("common-animals"))
    prompts = animals[:8] if few else animals * PER_ANIMAL
    images = samples(zoo, prompts, options.device)
    Image.fromarray(data.sheet(images[: len(animals)], 15)).save(zoo / "samples.png")
    passed = sample_gates(judge, images, prompts)
    passed += nothing_gates(judge, rng, 8 if few else EMPTY)

    clip, head = ClipEmbedder(zoo / "clip", "cpu"), load_head(str(zoo / "aesthetic"), 128)
    score = partial(aesthetic, clip=clip, head=head)
    name = "aesthetic head against the raters' truth on samples, rank correlation"
    correlation = rank_correlation(score(images, prompts), raters.truth(images))
    passed.append(gate(name, correlation, 0.5, unit=""))
    if shutil.which("npm") or data.has_art(zoo):
        art, count = data.load_art(zoo), 16 if few else COMPOSITES
        passed += composite_gates(zoo, judge, score, art, rng, count)
        passed += vae_gates(zoo, art, rng, count)
    else:
        print("skip  composites: the emoji art needs npm")

    passed += bert_gates(zoo, 1 if few else 40)
    prompts = list(train.load_prompts(str(data.HERE / "animals-on-grounds.txt")))
    prompts = prompts[:8] if few else prompts
    images = samples(zoo, prompts, options.device, "alignment")
    passed += alignment_gates(judge, images, prompts)
    passed += [*blind_gates(zoo), size_gate(zoo)]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
