"""TRL's DDPO on the zoo's aesthetic reward, to set beside `tutorial/experiments.py faster`.

    PYTHON tests/trl_gain.py train runs/trl --lr 4e-4 --seed 4      # PYTHON: with trl 0.23.1
    python tests/trl_gain.py evaluate runs/trl --seed 4             # with this project's own
    python tests/trl_gain.py table runs/trl-4 runs/trl-5 --level 1.52   # several seeds: means

The same model, reward, prompts, pictures an epoch and an update, steps, guidance and clip range as
ours; TRL knows no warm-up. Its networks are judged by our evaluation, on the noises of the seed.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tutorial"))
import bench
import experiments
import train  # TRL's interpreter has to have its packages too

EVERY = 4  # epochs between the networks that are kept
PICTURES = 64  # an epoch
JUDGE, EVALUATED, SECONDS = "judged_right_mean", "evaluated.json", "seconds.json"


def config(args):
    """TRL's settings, with the zoo's numbers."""
    sizes = SimpleNamespace(steps=12, pictures=PICTURES, batch=16)
    numbers = {"sample_guidance_scale": 4.0, "per_prompt_stat_tracking_min_count": 8}
    own = {"train_learning_rate": args.lr, "train_timestep_fraction": args.fraction}
    return bench.trl_config(sizes, seed=args.seed, **numbers, **own)


def run_trl(args):
    """Train; the seconds of each epoch go into seconds.json, a UNet is kept every few epochs."""
    import torch
    from accelerate import PartialState
    from trl import DDPOTrainer, DefaultDDPOStableDiffusionPipeline

    settings = train.merge({"model": "zoo", "reward": "aesthetic", "metrics": ""}, train.ZOO)
    settings = train.placed(settings, train.ZOO)
    score = train.make_reward("aesthetic", settings, "cpu")
    animals = list(train.load_prompts(settings.prompts))
    rngs = (np.random.default_rng([args.seed, epoch]) for epoch in itertools.count())
    drawn = (prompt for rng in rngs for prompt in train.draw_prompts(animals, PICTURES, 8, rng))

    def reward(images, prompts, metadata):
        pictures = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
        return torch.as_tensor(score(pictures, list(prompts))), {}

    PartialState(cpu=True)  # TRL logs before it makes its own
    model = DefaultDDPOStableDiffusionPipeline(pretrained_model_name=str(train.ZOO), use_lora=False)
    trainer = DDPOTrainer(config(args), reward, lambda: (next(drawn), {}), model)
    seconds, step = [], 0
    for epoch in range(args.epochs):
        begin = time.time()
        step = trainer.step(epoch, step)
        seconds.append(round(time.time() - begin, 2))
        print(epoch + 1, seconds[-1], flush=True)
        if (epoch + 1) % EVERY == 0:
            model.unet.save_pretrained(args.folder / f"{epoch + 1:02d}")
    (args.folder / SECONDS).write_text(json.dumps(seconds))


def evaluate(args):
    """A line for each network that was kept: queries, gain, judge, raters' truth."""
    out, lines = args.folder / "evaluated", []
    (out / "samples").mkdir(parents=True, exist_ok=True)
    given = {"model": "zoo", "device": "cpu", "reward": "aesthetic", "seed": args.seed}
    run = train.prepare({**given, "out": str(out)})
    lines.append(train.evaluate(run, 0))
    for folder in sorted(args.folder.glob("[0-9]" * 2)):
        weights = train.unet.load(train.unet.UNet, folder).state_dict()
        run.policy.unet.load_state_dict(weights)
        lines.append(train.evaluate(run, int(folder.name)))
        texts = [f"{lines[-1][f'eval_{name}']:.2f}" for name in ("gain_sd", JUDGE)]
        truth = lines[-1]["eval_truth_mean"]
        print(lines[-1]["eval_queries"], *texts, f"{truth:.2f}", flush=True)
    (args.folder / EVALUATED).write_text(json.dumps(lines))


def table(args):
    """Runs of several seeds: their means at each evaluation, and where these reach a gain."""
    for path in (folder / name for folder in args.folders for name in (EVALUATED, SECONDS)):
        if not path.is_file():
            raise SystemExit(f"{path}: not there; train and evaluate the run first")
    runs = [json.loads((folder / EVALUATED).read_text()) for folder in args.folders]
    keys = ("queries", "gain_sd", JUDGE)
    queries, gains, judge = (experiments.means(runs, f"eval_{key}") for key in keys)
    for n, at in enumerate(zip(*runs)):
        each = experiments.spread([line["eval_gain_sd"] for line in at], 2)
        print(f"{queries[n]:5.0f} queries: gain {each}, judge {judge[n]:.0%}")
    seconds = [s for folder in args.folders for s in json.loads((folder / SECONDS).read_text())]
    each, needed = statistics.median(seconds), experiments.crossing(queries, gains, args.level)
    print(f"{each:.1f} seconds an epoch; a mean gain of {args.level}:", end=" ")
    if needed is None:
        print("never")
        return
    share = np.interp(needed, queries, judge)
    print(f"after {needed:.0f} queries, {needed / PICTURES * each:.0f} seconds, judge {share:.0%}")


def main():
    parser = argparse.ArgumentParser(description="TRL's DDPO on the zoo's aesthetic reward.")
    parser.add_argument("what", choices=["train", "evaluate", "table"])
    parser.add_argument("folders", type=Path, nargs="+", metavar="folder", help="of a run")
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--fraction", type=float, default=1.0, help="train_timestep_fraction")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--level", type=float, default=1.52, help="of gain, for the table")
    args = parser.parse_args()
    if args.what != "table":
        if len(args.folders) > 1:
            parser.error(f"{args.what} takes one folder")
        args.folder = args.folders[0]
        args.folder.mkdir(parents=True, exist_ok=True)
    {"train": run_trl, "evaluate": evaluate, "table": table}[args.what](args)


if __name__ == "__main__":
    main()
