"""App. F on the zoo: does what a run has learned hold for prompts that it was not trained on?

    python tutorial/recorded/unseen.py runs/NAME      # its last checkpoint against the base

One picture of each of the paper's 45 animals, of 38 others and of 50 things, from the same noises
-> unseen.json: {set: {"base", "tuned": {"aesthetic", "truth", "judge": mean}, "t": of the gain}}.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lab
import raters
import rewards
import unet

HERE = Path(__file__).resolve().parent
words = lab.judge.data
SETS = {"trained on": words.ANIMALS, "other animals": words.OTHER_ANIMALS, "things": words.OBJECTS}


def scores(policy, prompts, reward):
    """What one picture each of the prompts gets -> {name: (B,)}."""
    images = lab.roll(policy, prompts, seed=2024)[1]
    found = {"aesthetic": reward(images, prompts), "truth": raters.truth(images)}
    return {**found, "judge": lab.judge.judged_right(images, prompts)}


def compare(before, after):
    """Means of both; the aesthetic gain in its paired standard errors."""
    gain = after["aesthetic"] - before["aesthetic"]
    base, tuned = ({k: round(float(v.mean()), 3) for k, v in s.items()} for s in (before, after))
    t = gain.mean() / (gain.std(ddof=1) / len(gain) ** 0.5)
    return {"base": base, "tuned": tuned, "t": round(float(t), 1)}


if __name__ == "__main__":
    run = Path(sys.argv[1])
    settings = lab.train.placed(lab.config(), lab.train.ZOO)
    reward = rewards.make_reward("aesthetic", settings, torch.device("cpu"))
    base, tuned = lab.policy(), lab.policy()
    last = sorted(run.glob("checkpoints/[0-9]*"))[-1]
    tuned.unet = unet.load(unet.UNet, last / "unet")
    table = {}
    for name, prompts in SETS.items():
        table[name] = compare(*(scores(policy, prompts, reward) for policy in (base, tuned)))
        print(name, json.dumps(table[name]))
    (HERE / "unseen.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
