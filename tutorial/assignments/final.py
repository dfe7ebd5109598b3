"""The final project: a reward of one's own, learnt by a LoRA, and redrawn by the grader.

Handed in is a folder final/: reward.py, and of the run config.json, metrics.jsonl, samples/ and
the last checkpoint's pytorch_lora_weights.safetensors. Of the 64 fixed pictures, whose noises have
names, the grader draws eight again from the LoRA and eight from the base model, which ones the
student cannot know. Where pictures and rewards are as handed in, the rest is believed, and
measured: by the student's reward, locked up as all code of theirs is, by the judge, and by CLIP.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
from parts import chosen
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = "own-prompts.txt"
LORA = "pytorch_lora_weights.safetensors"
COUNT, REDRAWN, QUERIES = 64, 8, 1280
POINTS = {"rules": 1, "redrawn": 3, "gain": 2, "best of 4": 2, "judge": 1, "diversity": 1}
WRITTEN = 2  # points for what a machine cannot mark
LEVELS = 3  # of 255: how far redrawn pixels may be off on another machine, in the mean

TEXT = """Write a reward of your own, `reward(images, prompts)` in `final/reward.py`, out of numpy,
torch and Pillow alone, and let the zoo learn it:

    python train.py --model zoo --device cpu --reward final/reward.py:reward --lora-rank 4 \\
        --prompts {prompts_file} --seed {seed} --out runs/final

with at most 1,280 reward queries; the number of epochs and pictures, the learning rate and the
algorithm are yours, steps, guidance, eta and the 64 fixed pictures are not. Copy into `final/` the
run's `config.json`, `metrics.jsonl` and `samples/`, and from the last checkpoint
`pytorch_lora_weights.safetensors`. On the fixed pictures it should gain at least one of the base
model's standard deviations (2 points), and more than the best of four of the base model's pictures
has (2); the judge should still name at least 70 % of them (1), and their diversity be at least half
of what it was (1). 3 points are for that the grader's own drawings from your LoRA are the pictures
that you handed in, 1 for these rules, 2 for `final/report.md`: what the reward was meant to do,
what the policy did instead, one thing that you tried and that did not work."""

LOOK_FOR = (
    "what the reward rewards is said, and seen in the pictures; where the policy cheats is found, "
    "or looked for in a way that would find it; a failure is told with its number"
)


def settings(own):
    """What a run's config.json must say."""
    fixed = {"lora_rank": 4, "seed": own["seed"], "steps": 12, "guidance": 4.0, "eta": 1.0}
    return {**fixed, "eval_samples": COUNT, "algorithm": None}


def read(folder, own):
    """-> config, the reward queries, the two evaluations (images, rewards), what is wrong."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    queries = max(int(json.loads(line)["reward_queries"]) for line in lines)
    paths = sorted((folder / "samples").glob("epoch_*.json"))
    found, prompts = [], [own["prompts"][i % len(own["prompts"])] for i in range(COUNT)]
    for path in (paths[0], paths[-1]):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["prompts"] != prompts:
            raise ValueError(f"{path.name} is of other prompts than {PROMPTS}, or in another order")
        found.append((cells(path.with_suffix(".png")), record["rewards"]))
    return config, queries, found


def cells(path):
    """The pictures of a grid -> uint8 (64, 64, 64, 3)."""
    side = math.isqrt(COUNT)
    grid = np.asarray(Image.open(path).convert("RGB"))
    if grid.shape != (64 * side, 64 * side, 3):
        raise ValueError(f"{path.name} is no grid of {COUNT} pictures of 64 x 64")
    return grid.reshape(side, 64, side, 64, 3).swapaxes(1, 2).reshape(COUNT, 64, 64, 3)


def policies(config, lora):
    """The zoo with and without a LoRA."""
    sys.path.insert(0, str(ROOT))
    import train
    import unet

    given = {"model": "zoo", "lora_rank": 4, "seed": int(config["seed"])}
    made = []
    for path in (None, lora):
        c = train.merge(given, train.ZOO)
        policy = train.load_policy(train.ZOO, train.choose_device("cpu"), c)
        if path:
            unet.load_lora(policy.unet, path.parent)
        made.append(policy)
    return made


def redraw(policy, own, which):
    """The fixed pictures of these numbers -> uint8 (n, 64, 64, 3)."""
    import train

    prompts = [own["prompts"][i % len(own["prompts"])] for i in which]
    names = [(own["seed"], train.EVALUATION, i) for i in which]
    return np.concatenate([images for _, images in policy.sample(prompts, names, len(which))])


def best_of(rewards, n):
    """The mean of the best of every n pictures of a prompt. rewards: (64,), prompts in turn."""
    rows = np.reshape(rewards, (-1, n, 8))  # 8 prompts in turn
    return rows.max(1).mean()


def off(drawn, handed_in):
    """The mean difference of pixels, of the worst picture."""
    return np.abs(drawn.astype(float) - handed_in).mean((1, 2, 3)).max()


def measures(base, last, scores, own):
    """-> {what: (does it hold, a sentence)}; base, last (64, 64, 64, 3), scores of both (64,)."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tutorial" / "zoo")]
    import judge
    from rewards import clip_embedder, diversity

    prompts = [own["prompts"][i % len(own["prompts"])] for i in range(COUNT)]
    before, after = (np.asarray(s, dtype=np.float64) for s in scores)
    gain = (after.mean() - before.mean()) / max(before.std(), 1e-12)
    bar = best_of(before, 4)
    named = np.mean(judge.judged_right(last, prompts))
    clip = clip_embedder(str(ROOT / "tutorial" / "zoo" / "clip"), "cpu")
    spread = [diversity(clip(images).numpy(), prompts) for images in (base, last)]
    left = spread[1] / spread[0]
    return {
        "gain": (gain >= 1, f"it gains {gain:.2f} of the base's deviations; needed: 1"),
        "best of 4": (after.mean() > bar, f"its mean is {after.mean():.4g}; the bar: {bar:.4g}"),
        "judge": (named >= 0.7, f"the judge names {named:.0%}; needed: 70 %"),
        "diversity": (left >= 0.5, f"diversity is {left:.0%} of the base's; needed: 50 %"),
    }


def rules(config, queries, lora, own):
    """-> does all hold, a sentence."""
    wanted = settings(own)
    odd = [n for n, v in wanted.items() if v is not None and config.get(n) != v]
    if odd:
        return False, f"config.json should say {', '.join(f'{n} = {wanted[n]}' for n in odd)}"
    if queries > QUERIES:
        return False, f"{queries} reward queries; allowed: {QUERIES}"
    if lora.stat().st_size > 2**20:
        return False, f"{lora.name} is larger than 1 MB"
    return True, f"{queries} reward queries, LoRA of {lora.stat().st_size / 1000:.0f} kB"


def judged(folder, own, student, key, score):
    """Everything that a machine can mark -> {what: (does it hold, a sentence)}.

    score(text of reward.py, lots of images, of prompts) -> lots of scores; raises ValueError.
    """
    lora = folder / LORA
    config, queries, ((base, _), (last, rewards)) = read(folder, own)
    found = {"rules": rules(config, queries, lora, own)}
    if lora.stat().st_size > 2**20:
        return found
    which = chosen(key, student, "redrawn", list(range(COUNT)), REDRAWN)
    drawn = [redraw(policy, own, which) for policy in policies(config, lora)]
    for pictures, given, whose in zip(drawn, (base, last), ("the base", "your LoRA"), strict=True):
        worst = off(pictures, given[which])
        found["redrawn"] = (worst <= LEVELS, f"redrawn from {whose}: {worst:.1f} levels off")
        if worst > LEVELS:
            return found
    prompts = [own["prompts"][i % len(own["prompts"])] for i in range(COUNT)]
    text = (folder / "reward.py").read_text(encoding="utf-8")
    lots = [prompts, prompts, [prompts[i] for i in which]]
    *scores, again = score(text, [base, last, drawn[1]], lots)
    far = np.abs(np.array(again) - np.array(rewards)[which]).max() / max(np.std(scores[0]), 1e-12)
    line = f"{found['redrawn'][1]}; their rewards {far:.2f} of a deviation off those handed in"
    found["redrawn"] = (far <= 0.2, line)
    return {**found, **measures(base, last, scores, own)}


def mark(submission, own, student, key, score):
    """The final project -> one of results.json's tests, the report among the ungraded."""
    folder, reached = submission / "final", {}
    paths = [folder / name for name in ("config.json", "metrics.jsonl", "reward.py", LORA)]
    large = [p.name for p in paths if p.is_symlink() or p.is_file() and p.stat().st_size > 2**22]
    problem = f"{', '.join(large)}: too large, or a link" if large else ""
    if not folder.is_dir():
        problem = "there is no folder final/"
    if not problem:
        try:
            reached = judged(folder, own, student, key, score)
        except Exception as error:  # whatever somebody else's files may do
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    lines = [f"{what}: {line}" for what, (_, line) in reached.items()] + [problem] * bool(problem)
    points = sum(POINTS[what] for what, (holds, _) in reached.items() if holds)
    report = folder / "report.md"
    wait = {"name": "final report", "max_score": WRITTEN, "look for": LOOK_FOR}
    handed = report.is_file() and not report.is_symlink()
    wait["handed in"] = report.read_text(errors="replace")[:20_000] if handed else ""
    found = {"name": "final project", "score": float(points), "max_score": sum(POINTS.values())}
    return {**found, "output": "\n".join(lines), "ungraded": [wait] if handed else []}
