"""The paper's experiments on the zoo: each is a list of train.py command lines, a table and a picture.

    python tutorial/experiments.py                  # all of them, one run at a time: about an hour and a quarter on two CPU cores
    python tutorial/experiments.py fig4             # one of them (and the search that it takes its settings from)
    python tutorial/experiments.py --quick          # does everything still run? Two epochs a cell; shows nothing else

A run lies in a folder of its own, runs/experiments/<experiment>/<cell>: one that is finished is not run again, one that broke off goes on
from its last checkpoint. Delete the folder when the zoo's weights or the code have changed: only settings are compared.
Tables go into experiments.md between their marks, pictures beside it; the words around them are a person's.
"""
import argparse
import dataclasses
import json
import math
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train                                        # noqa: E402

COMMON = "--model zoo --device cpu --reward compressibility"
# The same search for each algorithm: 3 learning rates times 2 values of the setting that matters most beside it; 512 queries each.
# DDPO_IS: pictures an update. DDPO_SF: pictures an epoch, which is an update. RWR: inverse temperature, per kB. RWR-sparse: the percentile.
SEARCH = {
    "ddpo-is": ("--warmup 4 --samples-per-epoch 64", "--lr", ("2e-4", "4e-4", "8e-4"), "--batch-size", ("16", "32")),
    "ddpo-sf": ("--warmup 4", "--lr", ("4e-4", "8e-4", "1.6e-3"), "--samples-per-epoch", ("32", "64")),
    "rwr": ("--warmup 4 --samples-per-epoch 128 --batch-size 64 --updates 24", "--lr", ("1e-5", "3e-5", "1e-4"), "--beta", ("5", "20")),
    "rwr-sparse": ("--warmup 4 --samples-per-epoch 128 --batch-size 64 --updates 24", "--lr", ("1e-5", "3e-5", "1e-4"), "--percentile", ("0.5", "0.9"))}
QUERIES, COST = 512, 0.15                           # reward queries of a cell and of a curve; the share of pictures that the winner may lose
SMOKE = "--epochs 2 --steps 2 --samples-per-epoch 32 --eval-samples 4 --micro-batch 32 --sample-batch 32"


def lines_of(folder):
    """The metrics of a run, an epoch each."""
    return train.read_lines(folder / "metrics.jsonl")


def diverged(folder):
    return any("not finite" in line["warnings"] for line in lines_of(folder))


def run(folder, arguments):
    """`python train.py <arguments>` in a folder of its own -> the folder. Nothing to do where it is finished; resumed where it broke off."""
    wanted = dataclasses.asdict(train.resolve({**train.parse(shlex.split(arguments)), "out": str(folder)}, train.ZOO))
    before = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else None
    if other := [name for name in wanted if before and before.get(name) != wanted[name] and name != "resume"]:
        raise SystemExit(f"{folder} holds a run with another {other[0]}: move it away, or delete it")
    if not before or (len(lines_of(folder)) < wanted["epochs"] and not diverged(folder)):
        print(f"\n$ python train.py {arguments} --out {folder}", flush=True)
        command = [sys.executable, str(ROOT / "train.py"), "--out", str(folder), *(["--resume"] if before else shlex.split(arguments))]
        if subprocess.run(command).returncode and not diverged(folder):
            raise SystemExit(f"{folder}: the run stopped (see above); the same command goes on with it")
    for optimizer in folder.glob("checkpoints/*/optimizer.safetensors"):               # two thirds of the disk space, of no more use
        optimizer.unlink()
    return folder


def length(algorithm, settings, quick, *more, queries=QUERIES):
    """The options that say how long a cell runs: `queries` pictures; in a smoke run next to nothing."""
    if quick:
        return SMOKE + (" --updates 2 --batch-size 16" if algorithm.startswith("rwr") else "")
    epochs = queries // per_epoch(settings)
    return " ".join([f"--epochs {epochs} --checkpoint-every {epochs // 4}", *more])


def per_epoch(settings):
    words = shlex.split(settings)
    return int(words[words.index("--samples-per-epoch") + 1])


def evaluations(folder):
    """What the fixed pictures scored: queries, reward, share that the judge finds right, each a list over evaluations, the base's first."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("samples/*.json"))]
    return ([r["epoch"] for r in records], *([sum(r[key]) / len(r[key]) for r in records] for key in ("rewards", "judged_right")))


def judged(folder):
    """A finished run's gain in the base's standard deviations and in paired standard errors, the judge before and after; one that diverged has lost all."""
    if diverged(folder):
        return -math.inf, -math.inf, 1, 0
    first, *_, last = [line for line in lines_of(folder) if "eval_queries" in line]
    return last["eval_gain_sd"], last["eval_gain_se"], first["eval_judged_right_mean"], last["eval_judged_right_mean"]


def table(header, rows):
    return "\n".join(["| " + " | ".join(map(str, row)) + " |" for row in (header, ["---"] * len(header), *rows)])


def search(out, quick):
    """Each algorithm's settings, by the same search -> {algorithm: the winner's options}, a table.

    The winner has the largest gain in reward of those that cost the judge at most 15 points; where none is so gentle, it is the gentlest.
    """
    winners, rows = {}, []
    for algorithm, (common, first, firsts, second, seconds) in SEARCH.items():
        cells = []
        for a, b in [(a, b) for a in firsts for b in seconds][:2 if quick else None]:
            settings = f"{common} {first} {a} {second} {b}"
            folder = run(out / "search" / f"{algorithm}_{a}_{b}", f"{COMMON} --algorithm {algorithm} {settings} {length(algorithm, settings, quick, '--eval-every 1000')}")
            cells.append((settings, f"`{first} {a} {second} {b}`", *judged(folder)))
        gentle = [cell for cell in cells if cell[4] - cell[5] <= COST]
        winner = max(gentle, key=lambda cell: cell[2]) if gentle else min(cells, key=lambda cell: cell[4] - cell[5])
        winners[algorithm] = winner[0]
        rows += [[algorithm, name, f"{sd:+.2f}", f"{se:.1f}", f"{before:.0%} → {after:.0%}", "**chosen**" if settings == winner[0] else ""]
                 for settings, name, sd, se, before, after in cells]
    return winners, table(["algorithm", "settings", "gain, sd of the base", "paired s.e.", "judge", ""], rows)


def panels(label):
    """A picture of two: the reward of the fixed pictures on the left, what the judge finds right on the right -> figure, left, right."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.set(xlabel=label, ylabel="compressibility (minus kB), 64 fixed pictures")
    right.set(xlabel=label, ylabel="share that the judge finds right", ylim=(0, 1))
    return figure, left, right


def fig4(out, quick):
    """Fig. 4 on one of its three rewards: reward against reward queries for the four algorithms, each with the winner of the search, on a seed that the search has not seen."""
    (figure, left, right), rows = panels("reward queries"), []
    winners = search(out, quick)[0]
    for name, settings in {**winners, "no-preference": winners["rwr"] + " --beta 1e-9"}.items():         # RWR with equal weights: what self-training alone does
        algorithm = "rwr" if name == "no-preference" else name
        more = length(algorithm, settings, quick, f"--eval-every {max(1, 128 // per_epoch(settings))}")
        folder = run(out / "fig4" / name, f"{COMMON} --algorithm {algorithm} {settings} --seed 1 {more}")
        epochs, reward, right_share = evaluations(folder)
        queries = [epoch * lines_of(folder)[0]["reward_queries"] for epoch in epochs]
        left.plot(queries, reward, "o-", label=name)
        right.plot(queries, right_share, "o-", label=name)
        sd, se, before, after = judged(folder)
        seconds = sum(value for line in lines_of(folder) for name, value in line.items() if name.startswith("seconds"))
        rows.append([name, f"`{settings}`", queries[-1], f"{reward[0]:.3f} → {reward[-1]:.3f}", f"{sd:+.2f}", f"{se:.1f}", f"{before:.0%} → {after:.0%}", f"{seconds:.0f}"])
    left.legend()
    return figure, table(["algorithm", "settings", "queries", "reward, fixed pictures", "gain, sd of the base", "paired s.e.", "judge", "seconds"], rows)


def fig10(out, quick):
    """Fig. 10: RWR-sparse with and without CFG training, round by round; sampling is guided in both."""
    (figure, left, right), rows = panels("rounds"), []
    settings = search(out, quick)[0]["rwr-sparse"]
    for name, flag in (("with CFG training", ""), ("without", "--no-cfg-training")):
        more = length("rwr-sparse", settings, quick, "--eval-every 1", queries=5 * per_epoch(settings))
        rounds, reward, right_share = evaluations(run(out / "fig10" / name.replace(" ", "-"), f"{COMMON} --algorithm rwr-sparse {settings} {flag} --seed 1 {more}"))
        left.plot(rounds, reward, "o-", label=name)
        right.plot(rounds, right_share, "o-", label=name)
        rows += [[name, "reward", *(f"{r:.3f}" for r in reward)], [name, "judge", *(f"{j:.0%}" for j in right_share)]]
    left.legend()
    return figure, table(["RWR-sparse", "fixed pictures", "base", *(f"round {n}" for n in rounds[1:])], rows)


EXPERIMENTS = {"search": lambda out, quick: (None, search(out, quick)[1]), "fig4": fig4, "fig10": fig10}


def write(name, figure, text, quick, out):
    """The table into experiments.md, between its marks, and the picture beside it; of a smoke run only the picture, into its own folder."""
    if figure:
        figure.savefig((out if quick else Path(__file__).parent) / f"{name}.png")
    print(f"\n{name}\n{text}", flush=True)
    page, begin, end = Path(__file__).with_suffix(".md"), f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    if not quick:
        before, found, rest = page.read_text().partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise SystemExit(f"{page} has lost its marks {begin.strip()} and {end.strip()}: put them back")
        page.write_text(f"{before}{begin}{text}\n{end}{after}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="The paper's experiments on the zoo.")
    parser.add_argument("experiments", nargs="*", metavar="experiment", help=f"which (default: all): {', '.join(EXPERIMENTS)}")
    parser.add_argument("--quick", action="store_true", help="a smoke run of two epochs a cell, in runs/quick, that leaves experiments.md alone")
    given = parser.parse_args(argv)
    if unknown := set(given.experiments) - set(EXPERIMENTS):
        parser.error(f"{', '.join(unknown)}: there are {', '.join(EXPERIMENTS)}")
    out = ROOT / "runs" / ("quick" if given.quick else "experiments")
    if given.quick:
        shutil.rmtree(out, ignore_errors=True)          # nothing is skipped
    try:
        for name in given.experiments or EXPERIMENTS:
            write(name, *EXPERIMENTS[name](out, given.quick), given.quick, out)
    except (KeyboardInterrupt, ValueError) as error:
        raise SystemExit(f"experiments.py: {error or 'stopped; the same command goes on'}") from None


if __name__ == "__main__":
    main()
