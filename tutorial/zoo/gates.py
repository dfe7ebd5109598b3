"""Is the zoo good enough to teach on? Draws samples (samples.png), asks the judge, prints every gate; exit status 1 if one is missed.

    python tutorial/zoo/gates.py

Composites need the emoji art (fetched through npm once); without npm those gates are skipped, and said to be.
"""
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))
import data
import judge as judge_module
import raters
import train
import train_bert
from rewards import COMMON_ANIMALS, ClipEmbedder, Llava, load_head, load_prompts, spread_prompts
from train_aesthetic import rank_correlation

PER_ANIMAL = 4


def gate(name, figure, needed, at_least=True, unit="%"):
    """Print a line; return whether it is passed. Percentages come as shares."""
    scale = 100 if unit == "%" else 1
    passed = figure >= needed if at_least else figure <= needed
    print(f"{'pass' if passed else 'MISS'}  {name}: {figure * scale:.{1 if unit in ('%', 'MB') else 3}f} {unit} ({'at least' if at_least else 'at most'} {needed * scale:g})")
    return passed


def samples(prompts):
    """A picture a prompt at the zoo's default settings -> uint8 (B, 64, 64, 3)."""
    config = train.resolve({"model": "zoo", "sample_batch": 60, "seed": 100}, train.ZOO)
    policy = train.load_policy(train.ZOO, train.choose_device("cpu"), config)
    return train.draw(policy, config, prompts, train.EVALUATION, "sampling")[1]


def main():
    judge, passed = judge_module.load_judge(), []
    prompts = COMMON_ANIMALS * PER_ANIMAL
    images = samples(prompts)
    Image.fromarray(np.concatenate([np.concatenate(list(images[i:i + 15]), axis=1) for i in (0, 15, 30)])).save(data.HERE / "samples.png")
    seen = np.array(judge_module.name(judge, images))
    right = seen == np.array(prompts)
    passed.append(gate(f"judge names the animal on {len(prompts)} samples at the default settings", right.mean(), 0.80))
    worst = sorted(COMMON_ANIMALS, key=lambda animal: right[np.array(prompts) == animal].mean())[:5]
    print("      hardest:", ", ".join(f"{animal} ({', '.join(seen[np.array(prompts) == animal])})" for animal in worst))

    rng = np.random.default_rng(2**20)                      # no training's stream
    noise = rng.integers(0, 256, (200, 64, 64, 3), dtype=np.uint8)
    passed.append(gate("judge says none on noise", judge_module.accuracy_none(judge, noise), 0.95))
    blanks = np.broadcast_to(rng.integers(0, 256, (200, 1, 1, 3), dtype=np.uint8), (200, 64, 64, 3))
    passed.append(gate("judge says none on blanks", judge_module.accuracy_none(judge, blanks), 0.95))
    if shutil.which("npm") or all((data.CACHE / vendor / "emoji.json").is_file() for vendor in data.VENDORS):
        art, names, colours = data.load_art(), list(data.NAMES), list(data.COLOURS)
        truth = [(str(rng.choice(names)), str(rng.choice(colours))) for _ in range(1000)]
        composites = np.stack([data.compose(rng, art, *pair).pixels for pair in truth])
        passed.append(gate("judge names held-out composites", np.mean(np.array(judge_module.name(judge, composites)) == [n for n, _ in truth]), 0.95))
        passed.append(gate("ground colour of held-out composites", np.mean(np.array(judge_module.ground_colour(composites)) == [c for _, c in truth]), 0.95))
    else:
        print("skip  composites: the emoji art needs npm")
    head, clip = load_head(str(data.HERE / "aesthetic")), ClipEmbedder(str(data.HERE / "clip"), "cpu")
    aesthetic = lambda pictures: head(clip(pictures)).detach().numpy()
    passed.append(gate("aesthetic head against the raters' truth, rank correlation on samples", rank_correlation(aesthetic(images), raters.truth(images)),
                       0.5, unit=""))
    if shutil.which("npm") or (data.CACHE / "google").is_dir():
        passed.append(gate("the same on held-out composites", rank_correlation(aesthetic(composites), raters.truth(composites)), 0.9, unit=""))
        said = Llava(str(data.HERE / "llava"), "cpu")(composites[:400], "what is in this picture?")
        right = [a == f"{data.article(n)} on {data.article(c)} background" for a, (n, c) in zip(said, truth)]
        passed.append(gate("LLaVA names thing and ground of held-out composites", np.mean(right), 0.9))
    first, thing, colour = train_bert.gate()
    passed.append(gate("BERTScore puts the right caption first", first, 0.99))
    passed.append(gate("a wrong thing costs at least", thing, 0.05, unit="of recall"))
    passed.append(gate("a wrong colour costs at least", colour, 0.05, unit="of recall"))
    prompts = spread_prompts(load_prompts(str(data.HERE / "animals-on-grounds.txt")), 128)
    success = judge_module.judged_right(samples(prompts), prompts).mean()
    passed.append(gate("judge finds animal and ground right on the base's alignment prompts", success, 0.20))
    passed.append(gate("the same", success, 0.60, at_least=False))
    megabytes = sum(path.stat().st_size for path in data.HERE.glob("**/*.safetensors") if data.CACHE not in path.parents) / 1e6
    passed.append(gate("all weights together", megabytes, 40, at_least=False, unit="MB"))
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
