"""The zoo's judge: an independent eye that names what a picture shows and on which ground. Never a reward.

    python tutorial/zoo/judge.py runs/NAME       # the judge's accuracy on every evaluation grid of a run of train.py, and before_after.png

A small CNN trained (train_judge.py) from another seed, on data of its own, to name 133 things or to say *none of these*. The ground's
colour is measured: the named colour nearest to the median pixel of the border.
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

sys.path.insert(0, str(Path(__file__).parent))
import data

FOLDER = Path(__file__).parent / "judge"
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
            x = F.max_pool2d(F.relu(norm(conv(x))), 2)          # 64 -> 32 -> 16 -> 8 -> 4
        return self.head(F.relu(self.hidden(x.flatten(1))))


def load_judge(folder=FOLDER):
    judge = Judge()
    judge.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    return judge.float().eval()


@torch.no_grad()
def name(judge, images):
    """What each picture shows, in the judge's eyes. uint8 (B, 64, 64, 3) -> list of B words."""
    return [LABELS[i] for i in judge(data.to_tensor(images)).argmax(1).tolist()]


def ground_colour(images):
    """The named colour nearest to the median pixel of the border. uint8 (B, 64, 64, 3) -> list of B words."""
    border = np.concatenate([images[:, :2].reshape(len(images), -1, 3), images[:, -2:].reshape(len(images), -1, 3),
                             images[:, :, :2].reshape(len(images), -1, 3), images[:, :, -2:].reshape(len(images), -1, 3)], axis=1)
    median = np.median(border, axis=1)                          # (B, 3)
    palette = np.array(list(data.COLOURS.values()))             # (10, 3)
    nearest = np.abs(median[:, None] - palette).sum(2).argmin(1)
    return [list(data.COLOURS)[i] for i in nearest]


def subject(prompt):
    """The thing that a prompt asks for: "a cat on a red background" -> "cat"."""
    words = [word for word in prompt.split() if word in data.NAMES]
    return words[0] if words else None


def judged_right(images, prompts):
    """1 where the judge sees the thing that the prompt asks for and, if it names one, the ground's colour; else 0. Has the form of a reward -> (B,)."""
    asked = [next((word for word in prompt.split() if word in data.COLOURS), None) for prompt in prompts]
    things, grounds = name(load_judge(), images), ground_colour(images)
    return np.array([float(thing == subject(prompt) and colour in (None, ground)) for thing, prompt, colour, ground in zip(things, prompts, asked, grounds)])


def accuracy(judge, images, prompts):
    """The share of pictures that show, in the judge's eyes, the thing their prompt asks for."""
    return float(np.mean([seen == subject(prompt) for seen, prompt in zip(name(judge, images), prompts)]))


def accuracy_none(judge, images):
    """The share of pictures on which the judge sees none of the things it knows."""
    return float(np.mean([seen == NONE for seen in name(judge, images)]))


def grid_images(path, side=64):
    """The pictures of a grid that train.py drew -> uint8 (B, side, side, 3), row by row."""
    grid = np.asarray(Image.open(path).convert("RGB"))
    rows, columns = grid.shape[0] // side, grid.shape[1] // side
    return grid.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)


def main(run):
    records = sorted((Path(run) / "samples").glob("epoch_*.json"))
    rows = [np.concatenate(list(grid_images(path.with_suffix(".png"))[:12]), axis=1) for path in (records[0], records[-1])]
    Image.fromarray(np.concatenate(rows)).save(Path(run) / "before_after.png")
    for path in records:
        record = json.loads(path.read_text())
        images = grid_images(path.with_suffix(".png"))[:len(record["prompts"])]
        print(f"{path.stem}: reward {np.mean(record['rewards']):8.3f} +- {np.std(record['rewards']):.3f}   "
              f"judge finds right {judged_right(images, record['prompts']).mean():.1%}")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "samples").is_dir():
        raise SystemExit("usage: python tutorial/zoo/judge.py RUN_FOLDER   (one that train.py has written)")
    main(sys.argv[1])
