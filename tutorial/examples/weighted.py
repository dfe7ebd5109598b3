"""A weighted sum of rewards, each part of it shown beside.

    python train.py --reward tutorial/examples/weighted.py:weighted

The parts of every fixed picture are in samples/epoch_0000.json, under "shown"; a part that is also
among --metrics has a curve. Weights belong to units: a point of aesthetics, a kB of JPEG.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from rewards import make_reward

ZOO = Path(__file__).parents[1] / "zoo"  # for SD v1.4: train.py's defaults of these two
SETTINGS = SimpleNamespace(clip=str(ZOO / "clip"), aesthetic_head=str(ZOO / "aesthetic"))
WEIGHTS = {"aesthetic": 1.0, "compressibility": 0.5}
REWARDS = {name: make_reward(name, SETTINGS, "cpu") for name in WEIGHTS}


def weighted(images, prompts):
    """r(x, c) = sum_i w_i r_i(x, c) -> (B,), {name of i: (B,)}."""
    parts = {name: np.asarray(reward(images, prompts)) for name, reward in REWARDS.items()}
    return sum(WEIGHTS[name] * part for name, part in parts.items()), parts
