"""What the chapters share: the zoo's policy, rollouts, a short run, pictures.

python tutorial/lab.py runs/NAME     # the fixed pictures of a run, epoch by epoch: film.gif
python -i tutorial/lab.py            # a prompt at which a chapter's blocks can be pasted
"""

import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent / "zoo"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ddpo
import judge
import train

HERE = Path(__file__).resolve().parent
FIGURES = HERE / "figures"  # chapters.py has them drawn elsewhere, to compare them


def config(**given):
    """Every setting of train.py, as the zoo has them and as given here -> train.Config."""
    return train.placed(train.merge({"model": "zoo", **given}, train.ZOO), train.ZOO)


def policy(**given):
    """The zoo's Stable Diffusion, on the CPU. given: settings such as steps=50 -> ddpo.Policy."""
    return train.load_policy(train.ZOO, torch.device("cpu"), config(**given))


def roll(policy, prompts, seed=0):
    """Rollouts, picture i with the noise called (seed, i) -> Trajectories, images (B, H, W, 3)."""
    names = [(seed, i) for i in range(len(prompts))]
    parts = list(policy.sample(prompts, names, batch=64))
    trajectories = ddpo.Trajectories.cat([part[0] for part in parts])
    return trajectories, np.concatenate([part[1] for part in parts])


def quick_run(options, folder="runs/minute"):
    """`python train.py --model zoo --device cpu OPTIONS --out FOLDER`, anew -> the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    fixed = ["--model", "zoo", "--device", "cpu", "--out", folder]
    train.main([*fixed, *shlex.split(options)])
    return Path(folder)


def metrics(folder):
    """The lines of a run's metrics.jsonl -> list of dicts, one an epoch."""
    return train.read_lines(Path(folder) / "metrics.jsonl")


def fixed_prompts(folder):
    """The prompts of a run's fixed pictures -> list of str."""
    return train.read_json(Path(folder) / "samples" / "epoch_0000.json")["prompts"]


def evaluations(folder):
    """What a run has shown of its fixed pictures, the base model's first -> yields epochs behind
    it, uint8 (B, 64, 64, 3), rewards (B,)."""
    for path in sorted((Path(folder) / "samples").glob("epoch_*.json")):
        record = train.read_json(path)
        images = judge.grid_images(path.with_suffix(".png"))[: len(record["prompts"])]
        yield record["epoch"], images, np.array(record["rewards"])


def grid(images, columns, file=None, above="", top=(), left=()):
    """Pictures in rows, words above all, above the columns, beside the rows -> PIL image.

    uint8 (B, H, W, 3); file: where it is written to, in FIGURES.
    """
    font, line = ImageFont.load_default(13), 18
    B, H, W = images.shape[:3]
    x = round(max((font.getlength(str(word)) for word in left), default=-6)) + 6
    y = line * (bool(above) + bool(len(top)))
    canvas = Image.new("RGB", (x + columns * W, y + -(-B // columns) * H), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((canvas.width / 2, line / 2), above, "black", font, anchor="mm")
    for i, image in enumerate(images):
        canvas.paste(Image.fromarray(image), (x + i % columns * W, y + i // columns * H))
    for i, word in enumerate(top):
        draw.text((x + (i + 0.5) * W, y - line / 2), str(word), "black", font, anchor="mm")
    for i, word in enumerate(left):
        draw.text((0, y + (i + 0.5) * H), str(word), "black", font, anchor="lm")
    if file:
        canvas.quantize(256, dither=Image.Dither.NONE).save(FIGURES / file, optimize=True)
    return canvas


def gif(frames, file, ms=400, last=1600):
    """PIL images of one size, one after the other, `ms` each -> the path of the GIF."""
    durations = [ms] * (len(frames) - 1) + [last]
    path = FIGURES / file
    frames = [frame.quantize(128, dither=Image.Dither.NONE) for frame in frames]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return path


def film(folder, file, columns=8):
    """A GIF of a run's fixed pictures after each epoch that shows them -> its path."""
    frames = []
    for epoch, images, rewards in evaluations(folder):
        word = f"after {epoch} epochs: mean reward {rewards.mean():.2f}"
        frames.append(grid(images, columns, above=word))
    return gif(frames, file)


if __name__ == "__main__" and len(sys.argv) > 1:
    print(film(sys.argv[1], Path(sys.argv[1]).resolve() / "film.gif"))
