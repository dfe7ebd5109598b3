"""Is the judge as strict as a person? Pictures to be named blind, and what came of it.

    python tutorial/zoo/blind.py draw FOLDER            # numbered sheets in no order, names.txt
    python tutorial/zoo/blind.py score FOLDER READER.txt [READER.txt ...]   # blind.png, the figures

A reader sees the sheets and the list of names, nothing else, and writes a line for each picture:
its number and a name, or "none". The majority counts, and is *none* where there is no majority.

    sample      two of each animal at the default settings, seed 20260, nobody choosing
    weak        ten of each of the eight animals that used to be shapeless
    other       another one of each animal
    malformed   45 that are meant to be rejected: mixtures, drowned in noise, drawn in two steps, or
                drawn by a policy with damaged weights
"""

import copy
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parents[2]))
import data
import ddpo
import judge as judge_module
import train
import train_judge
from scheduler import Sampler

WEAK = "beetle whale dolphin snake bird turtle fish ant".split()
SEED = 20260
COLUMNS, ROWS, TILE = 5, 4, 192  # of a sheet


def malformed(policy, animals):
    """Pictures that no one should recognise -> uint8 (B, 64, 64, 3), one an animal."""
    rng, device = np.random.default_rng(SEED), policy.device
    torch.manual_seed(SEED)
    few, art, drawn = len(animals) // 3, data.load_art(), []
    for _ in range(few):
        both, names = train_judge.two_each(rng, art, 1, device)
        latents = [policy.vae.encode(x) for x in both]
        drawn.append(policy.decode(train_judge.half_formed_latents(rng, policy, latents, names)))
    hasty = copy.copy(policy)
    hasty.sampler = Sampler(policy.sampler.schedule, 2, 1.0)
    damaged = copy.copy(policy)
    damaged.unet = copy.deepcopy(policy.unet)
    for p in damaged.unet.parameters():
        p.add_(0.12 * p.std(correction=0) * torch.randn_like(p))
    for poor, some in ((hasty, animals[few : 2 * few]), (damaged, animals[2 * few :])):
        names = [(SEED, 3, i) for i in range(len(some))]
        drawn += [images for _, images in poor.sample(some, names, len(some))]
    return np.concatenate(drawn)


@torch.no_grad()
def pictures():
    """All pictures, in order -> uint8 (B, 64, 64, 3), kinds, what each was asked to be."""
    config = train.merge({"model": "zoo"}, train.ZOO, ddpo.DDPO)
    policy = train.load_policy(train.ZOO, torch.device("cpu"), config)
    kinds = {"sample": data.ANIMALS * 2, "weak": WEAK * 10, "other": data.ANIMALS}
    images, kind_of, asked = [], [], []
    for n, (kind, animals) in enumerate(kinds.items()):
        names = [(SEED, n, i) for i in range(len(animals))]
        images += [some for _, some in policy.sample(animals, names, 60)]
        kind_of += [kind] * len(animals)
        asked += animals
    images.append(malformed(policy, data.ANIMALS))
    kind_of += ["malformed"] * len(data.ANIMALS)
    return np.concatenate(images), kind_of, asked + data.ANIMALS


def sheet(images, numbers, captions, columns, tile):
    """Enlarged pictures with a line of text under each -> PIL image."""
    rows, line = -(-len(images) // columns), 14
    whole = Image.new("RGB", (columns * tile, rows * (tile + line)), "white")
    draw = ImageDraw.Draw(whole)
    for i, (image, number, caption) in enumerate(zip(images, numbers, captions)):
        x, y = i % columns * tile, i // columns * (tile + line)
        whole.paste(Image.fromarray(image).resize((tile, tile), Image.BICUBIC), (x, y))
        draw.text((x + 3, y + tile + 1), f"{number} {caption}".strip(), fill="black")
    return whole


def draw(folder):
    """Sheets of twenty numbered pictures, the names to choose from, and, apart, the key."""
    folder.mkdir(parents=True, exist_ok=True)
    images, kinds, asked = pictures()
    order = np.random.default_rng(SEED).permutation(len(images))
    size = COLUMNS * ROWS
    for start in range(0, len(order), size):
        some = order[start : start + size]
        numbers = range(start, start + len(some))
        page = sheet(images[some], numbers, [""] * size, COLUMNS, TILE)
        page.save(folder / f"sheet_{start // size:02d}.png")
    (folder / "names.txt").write_text("\n".join([*data.ANIMALS, "none"]) + "\n")
    key = {"kinds": [kinds[i] for i in order], "asked": [asked[i] for i in order]}
    (folder / "key").mkdir(exist_ok=True)
    (folder / "key" / "key.json").write_text(json.dumps(key))
    np.save(folder / "key" / "images.npy", images[order])


def majority(readers, number):
    """What most readers call a picture; none of these where they disagree."""
    (word, votes), *_ = Counter(reader.get(number, "none") for reader in readers).most_common()
    return word if 2 * votes > len(readers) else "none"


def score(folder, files):
    """The eye's verdict and the judge's, as figures and as one small picture."""
    key = json.loads((folder / "key" / "key.json").read_text())
    images, readers = np.load(folder / "key" / "images.npy"), []
    for file in files:
        lines = [line.split() for line in Path(file).read_text().splitlines() if line.strip()]
        readers.append({int(words[0]): words[1] for words in lines})
    eye = [majority(readers, i) for i in range(len(images))]
    judged = judge_module.name(judge_module.load_judge(), images)
    judged = [word if word in data.ANIMALS else "none" for word in judged]
    kinds, asked = np.array(key["kinds"]), key["asked"]
    right = np.array([a == b for a, b in zip(eye, asked)])
    print(f"eye right on {right[kinds == 'sample'].mean():.1%} of samples", end="; ")
    print(f"each reader: {[sum(r.get(i) == a for i, a in enumerate(asked)) for r in readers]}")
    for animal in WEAK:
        some = [r for r, kind, a in zip(right, kinds, asked) if kind == "weak" and a == animal]
        print(f"  {animal}: {sum(some)} of {len(some)}")
    further = np.isin(kinds, ["other", "malformed"])
    rejected = further & ~right
    same = np.array([a == b for a, b in zip(judged, eye)])
    wrong = np.array([a != b for a, b in zip(judged, asked)])
    print(f"of {rejected.sum()} that the eye rejects, the judge does {wrong[rejected].mean():.1%}")
    print(f"of the other {(further & right).sum()} it agrees on {same[further & right].mean():.1%}")
    judge_right = ~wrong[kinds == "sample"]
    print(f"judge right on {judge_right.mean():.1%} of samples")
    captions = [f"{a}/{b}" for a, b in zip(eye, judged)]
    shown = np.flatnonzero(np.isin(kinds, ["sample", "other", "malformed"]))
    shown = sorted(shown, key=lambda i: list(kinds).index(kinds[i]))
    page = sheet(images[shown], [""] * len(shown), [captions[i] for i in shown], 18, 64)
    page.quantize(128).save(folder / "blind.png", optimize=True)


if __name__ == "__main__":
    if len(sys.argv) >= 3 and sys.argv[1] == "draw":
        draw(Path(sys.argv[2]))
    elif len(sys.argv) >= 4 and sys.argv[1] == "score":
        score(Path(sys.argv[2]), sys.argv[3:])
    else:
        raise SystemExit(__doc__)
