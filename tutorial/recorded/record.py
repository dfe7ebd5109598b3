"""What chapters 7 and 8 keep of a run: how its fixed pictures scored, and some of them.

    python tutorial/recorded/record.py runs/NAME 8 4      # NAME.json and, of 8 pictures at every
                                                          # 4th evaluation, NAME.png

NAME.json: {"base_std": {score: deviation of the base model's}, "evaluations": [{"epoch", "queries",
score: mean}], "lines": [{"epoch", "diversity", "grad_norm", "warnings", ...}]}; a score is "reward"
or another that was watched. NAME.png: a row an evaluation.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lab

HERE = Path(__file__).resolve().parent
KEPT = ("epoch", "diversity", "grad_norm", "approx_kl", "clip_fraction", "warnings")


def record(folder):
    """The scores of a run -> what goes into its JSON file."""
    lines, evaluations, base_std = lab.metrics(folder), [], {}
    for path in sorted((folder / "samples").glob("epoch_*.json")):
        found = lab.train.read_json(path)
        scores = {name: found[name] for name in found if name not in ("epoch", "prompts", "shown")}
        scores["reward"] = scores.pop("rewards")
        base_std = base_std or {name: np.std(values) for name, values in scores.items()}
        at = {"epoch": found["epoch"], "queries": found["epoch"] * lines[0]["reward_queries"]}
        means = {name: round(float(np.mean(values)), 4) for name, values in scores.items()}
        evaluations.append({**at, **means})
    kept = [{name: line[name] for name in KEPT} for line in lines]
    return {"base_std": base_std, "evaluations": evaluations, "lines": kept}


def strip(folder, count, every):
    """The first `count` fixed pictures, a row for every `every`-th evaluation -> PIL image."""
    rows = [images[:count] for _, images, _ in lab.evaluations(folder)][::every]
    return lab.grid(np.concatenate(rows), count).quantize(128, dither=Image.Dither.NONE)


if __name__ == "__main__":
    run = Path(sys.argv[1])
    text = json.dumps(record(run), indent=1) + "\n"
    (HERE / f"{run.name}.json").write_text(text, encoding="utf-8")
    if len(sys.argv) > 2:
        strip(run, *map(int, sys.argv[2:])).save(HERE / f"{run.name}.png", optimize=True)
