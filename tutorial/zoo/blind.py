"""Is the judge as strict as a person? Pictures to be named blind, and what came of it.

    python tutorial/zoo/blind.py draw FOLDER            # numbered sheets in no order, names.txt
    python tutorial/zoo/blind.py score FOLDER READER.txt [READER.txt ...]  # blind.json, blind.jpg

A reader sees the sheets and the list of names, nothing else, and writes a line for each picture:
its number and a name, or "none". The majority counts, and is *none* where there is no majority.

    sample      two of each animal at the default settings, seed 20260, nobody choosing
    weak        ten of each of the eight animals that used to be shapeless
    other       another one of each animal
    malformed   45 that are meant to be rejected: mixtures, drowned in noise, drawn in two steps, or
                drawn by a policy with damaged weights
"""

import copy
import hashlib
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parents[2]))
import data
import judge as judge_module
import train
import train_judge
from scheduler import Sampler

WEAK = "beetle whale dolphin snake bird turtle fish ant".split()
SEED = 20260
COLUMNS, ROWS, TILE = 5, 4, 192  # of a sheet


def malformed(policy, animals):
    """Pictures that no one should recognise -> uint8 (B, 64, 64, 3), and what each was to be."""
    rng, device = np.random.default_rng(SEED), policy.device
    torch.manual_seed(SEED)
    few, art = len(animals) // 3, data.load_art()
    drawn, asked = [], []
    for _ in range(few):
        both, names = train_judge.two_each(rng, art, 1, device, animals)
        latents = [policy.vae.encode(x) for x in both]
        drawn.append(policy.decode(train_judge.half_formed_latents(rng, policy, latents, names)))
        asked += names[0]
    hasty = copy.copy(policy)
    hasty.sampler = Sampler(policy.sampler.schedule, 2, 1.0)
    damaged = copy.copy(policy)
    damaged.unet = copy.deepcopy(policy.unet)
    for p in damaged.unet.parameters():
        p.add_(0.12 * p.std(correction=0) * torch.randn_like(p))
    for poor, some in ((hasty, animals[few : 2 * few]), (damaged, animals[2 * few :])):
        names = [(SEED, 3, i) for i in range(len(some))]
        drawn += [images for _, images in poor.sample(some, names, len(some))]
    return np.concatenate(drawn), asked + animals[few:]


@torch.no_grad()
def pictures():
    """All pictures, in order -> uint8 (B, 64, 64, 3), kinds, what each was asked to be."""
    config = train.merge({"model": "zoo"}, train.ZOO)
    policy = train.load_policy(train.ZOO, torch.device("cpu"), config)
    kinds = {"sample": data.ANIMALS * 2, "weak": WEAK * 10, "other": data.ANIMALS}
    images, kind_of, asked = [], [], []
    for n, (kind, animals) in enumerate(kinds.items()):
        names = [(SEED, n, i) for i in range(len(animals))]
        images += [some for _, some in policy.sample(animals, names, 60)]
        kind_of += [kind] * len(animals)
        asked += animals
    poor, meant = malformed(policy, data.ANIMALS)
    kind_of += ["malformed"] * len(poor)
    return np.concatenate([*images, poor]), kind_of, asked + meant


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


def fingerprint(zoo=data.HERE):
    """Of the weights that draw and judge: figures are theirs, and of no others."""
    folders = [zoo / "stable-diffusion" / part for part in ("text_encoder", "unet", "vae")]
    folders.append(zoo / "judge")
    files = [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def figures(kinds, asked, eye, judged):
    """The shares that decide, of lists of B words -> {name: share}."""
    kinds, right = np.array(kinds), np.array(eye) == np.array(asked)
    accepted, samples = np.array(judged) == np.array(asked), kinds == "sample"
    further = np.isin(kinds, ["other", "malformed"])
    found = {"eye names samples": right[samples].mean()}
    found["judge names samples"] = accepted[samples].mean()
    for animal in WEAK:
        some = (kinds == "weak") & (np.array(asked) == animal)
        found[f"eye names {animal}"] = right[some].mean()
    found["judge rejects what the eye rejects"] = 1 - accepted[further & ~right].mean()
    found["judge agrees on the rest"] = accepted[further & right].mean()
    found["share that the eye rejects"] = 1 - right[further].mean()
    return {name: round(float(share), 4) for name, share in found.items()}


def score(folder, files, zoo=data.HERE):
    """The eye's verdict and the judge's, as figures and as one small picture, into the zoo."""
    key = json.loads((folder / "key" / "key.json").read_text())
    images, readers = np.load(folder / "key" / "images.npy"), []
    for file in files:
        lines = [line.split() for line in Path(file).read_text().splitlines() if line.strip()]
        readers.append({int(words[0]): words[1] for words in lines})
    eye = [majority(readers, i) for i in range(len(images))]
    judged = judge_module.name(judge_module.load_judge(zoo), images)
    judged = [word if word in data.ANIMALS else "none" for word in judged]
    found = figures(key["kinds"], key["asked"], eye, judged)
    each = [
        np.mean([reader.get(i) == word for i, word in enumerate(eye)]).round(4)
        for reader in readers
    ]
    found = {"weights": fingerprint(zoo), "each reader agrees with the majority": each, **found}
    (zoo / "blind.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    shown = [i for kind in ("sample", "other", "malformed") for i in places(key["kinds"], kind)]
    captions = [eye[i] if eye[i] == judged[i] else f"{eye[i]}/{judged[i]}" for i in shown]
    page = sheet(images[shown], [""] * len(shown), captions, 15, 72)
    page.save(zoo / "blind.jpg", quality=88)


def places(kinds, kind):
    """Where a kind of picture stands -> list of int."""
    return [i for i, other in enumerate(kinds) if other == kind]


if __name__ == "__main__":
    if len(sys.argv) >= 3 and sys.argv[1] == "draw":
        draw(Path(sys.argv[2]))
    elif len(sys.argv) >= 4 and sys.argv[1] == "score":
        score(Path(sys.argv[2]), sys.argv[3:])
    else:
        raise SystemExit(__doc__)
