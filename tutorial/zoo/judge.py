"""The zoo's judge, an independent eye: what does a picture show, on which ground? Never a reward.

    python tutorial/zoo/judge.py runs/NAME    # its verdict on a run of train.py; before_after.png

A small CNN trained (train_judge.py) from another seed, on data of its own, to name 133 things or to
say *none of these*. The ground's colour is measured: the named colour nearest to the median pixel
of the border.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import data

NONE = "none of these"
LABELS = [*data.NAMES, NONE]


class Judge(nn.Module):
    """Pictures (B, 3, 64, 64) in [-1, 1] -> logits (B, len(LABELS))."""

    def __init__(self, channels=(32, 48, 96, 128)):
        super().__init__()
        self.convs, self.norms, c_in = nn.ModuleList(), nn.ModuleList(), 3
        for c in channels:
            self.convs.append(nn.Conv2d(c_in, c, 3, padding=1))
            self.norms.append(nn.GroupNorm(8, c))
            c_in = c
        self.hidden = nn.Linear(c_in * 16, 192)
        self.head = nn.Linear(192, len(LABELS))

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms):
            x = F.max_pool2d(F.relu(norm(conv(x))), 2)  # 64 -> 32 -> 16 -> 8 -> 4
        return self.head(F.relu(self.hidden(x.flatten(1))))


def load_judge(zoo=data.HERE):
    """The judge of a zoo."""
    judge = Judge()
    judge.load_state_dict(load_file(Path(zoo) / "judge" / "model.safetensors"))
    return judge.float().eval()


@torch.no_grad()
def name(judge, images):
    """What each picture shows, in the judge's eyes. uint8 (B, 64, 64, 3) -> list of B words."""
    return [LABELS[i] for i in judge(data.to_tensor(images)).argmax(1).tolist()]


def ground_colour(images):
    """The colour nearest to the border's median pixel. uint8 (B, 64, 64, 3) -> list of B words."""
    edges = [images[:, :2], images[:, -2:], images[:, :, :2], images[:, :, -2:]]
    border = np.concatenate([edge.reshape(len(images), -1, 3) for edge in edges], axis=1)
    median = np.median(border, axis=1)  # (B, 3)
    palette = np.array(list(data.COLOURS.values()))  # (10, 3)
    nearest = np.abs(median[:, None] - palette).sum(2).argmin(1)
    return [list(data.COLOURS)[i] for i in nearest]


def first_of(words, prompt):
    """The first word of the prompt that is one of `words`, or None."""
    return next((word for word in prompt.split() if word in words), None)


def subject(prompt):
    """The thing that a prompt asks for: "a cat on a red background" -> "cat"."""
    return first_of(data.NAMES, prompt)


def judged_right(images, prompts, judge=None):
    """Does the judge see the thing that the prompt asks for and, if it names one, the ground?

    uint8 (B, 64, 64, 3), B str -> 1 or 0 each, (B,). Has the form of a reward, and is never one.
    """
    things, grounds = name(judge or load_judge(), images), ground_colour(images)
    right = [
        thing == subject(prompt) and first_of(data.COLOURS, prompt) in (None, ground)
        for thing, ground, prompt in zip(things, grounds, prompts, strict=True)
    ]
    return np.array(right, dtype=float)


def accuracy(judge, images, prompts):
    """The share of pictures that show, in the judge's eyes, the thing their prompt asks for."""
    seen = name(judge, images)
    return float(np.mean([a == subject(prompt) for a, prompt in zip(seen, prompts, strict=True)]))


def accuracy_none(judge, images):
    """The share of pictures on which the judge sees none of the things it knows."""
    return float(np.mean([seen == NONE for seen in name(judge, images)]))


def grid_images(path, side=64):
    """The pictures of a grid that train.py drew -> uint8 (B, side, side, 3), row by row."""
    grid = np.asarray(Image.open(path).convert("RGB"))
    rows, columns = grid.shape[0] // side, grid.shape[1] // side
    tiles = grid.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
    return tiles.reshape(-1, side, side, 3)


def main(run):
    """The verdict on every evaluation of a run, and its first and last twelve pictures."""
    records = sorted((run / "samples").glob("epoch_*.json"))
    ends = [grid_images(path.with_suffix(".png"))[:12] for path in (records[0], records[-1])]
    Image.fromarray(np.concatenate([data.sheet(images, 12) for images in ends])).save(
        run / "before_after.png"
    )
    for path in records:
        record = json.loads(path.read_text(encoding="utf-8"))
        prompts, rewards = record["prompts"], record["rewards"]
        images = grid_images(path.with_suffix(".png"))[: len(prompts)]
        print(
            f"{path.stem}: reward {np.mean(rewards):8.3f} +- {np.std(rewards):.3f}   "
            f"judge finds right {judged_right(images, prompts).mean():.1%}"
        )


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "samples").is_dir():
        raise SystemExit(
            "usage: python tutorial/zoo/judge.py RUN_FOLDER   (one that train.py has written)"
        )
    main(Path(sys.argv[1]))
