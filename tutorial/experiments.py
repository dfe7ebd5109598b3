"""The paper's experiments on the zoo: each is a list of train.py command lines, a table, a picture.

    python tutorial/experiments.py            # all of them: a day on two CPU cores
    python tutorial/experiments.py fig4       # one of them, and the search it has its settings from
    python tutorial/experiments.py --quick    # does everything still run? Shows nothing else

A run lies in a folder of its own, runs/experiments/<experiment>/<cell>: one that is finished is not
run again, one that broke off goes on from its last checkpoint. Delete the folder when the zoo's
weights or the code have changed: only settings are compared. Tables go into experiments.md between
their marks, pictures beside it; the words around them are a person's.
"""

import argparse
import dataclasses
import json
import math
import shlex
import shutil
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ddpo
import lab
import train

HERE = Path(__file__).resolve().parent
ZOO = "--model zoo --device cpu"
COMMON = f"{ZOO} --reward compressibility"
RATES = {  # reward: epochs, learning rates
    "aesthetic": (12, ("4e-4", "8e-4")),
    "alignment": (20, ("2e-4", "8e-4")),
    "compressibility": (15, ("1e-4", "2e-4", "4e-4")),
    "incompressibility": (15, ("4e-4", "8e-4")),
}
SEEDS, SEARCH_SEED = (0, 1, 2), 3
QUERIES = 512  # reward queries of a cell and of a curve
COST = 0.15  # the share of pictures, in the judge's eyes, that a winner may lose
PLUGGED = f"--algorithm '{HERE}/algorithms"
FASTER = {  # after the paper: what a variant's runs have in common, learning rates, epochs
    "ddpo-is": ("--algorithm ddpo-is", ("2e-4", "4e-4", "8e-4"), 20),
    "ddpo-is, clip x 4": ("--algorithm ddpo-is --clip-range 0.0256", ("4e-4", "8e-4"), 0),
    "ddpo-equal": ("--algorithm ddpo-equal", ("2e-4", "4e-4", "8e-4"), 12),
    "some steps": (f"{PLUGGED}/some_steps.py:SomeSteps' --set K=4", ("2e-4", "4e-4", "8e-4"), 20),
    "some steps, equal credit": (
        f"{PLUGGED}/some_steps.py:SomeStepsEqualCredit' --set K=4",
        ("4e-4", "8e-4"),
        16,
    ),
    "matching": (
        f"{PLUGGED}/awm.py:AdvantageWeightedMatching' --clip-range 0.02 --warmup 8",
        ("5e-5", "1e-4", "2e-4"),
        20,
    ),
}
FASTER_SEEDS = (4, 5, 6)
WARM_4 = "--warmup 4"  # updates: an epoch's instead of five epochs'
SOONER = {  # the same with a warm-up of an epoch
    "ddpo-is": (f"--algorithm ddpo-is {WARM_4}", ("4e-4", "8e-4"), 20),
    "ddpo-equal": (f"--algorithm ddpo-equal {WARM_4}", ("4e-4", "8e-4"), 12),
    "some steps, equal credit": (
        f"{PLUGGED}/some_steps.py:SomeStepsEqualCredit' --set K=4 {WARM_4}",
        ("4e-4", "8e-4"),
        16,
    ),
    "matching": (
        f"{PLUGGED}/awm.py:AdvantageWeightedMatching' --clip-range 0.02 {WARM_4}",
        ("1e-4", "2e-4"),
        12,
    ),
}
SOONER_SEEDS = (4, 5, 6, 7, 8)
COSTS = ("queries", "seconds", "judge")
SMOKE = "--epochs 2 --steps 2 --samples-per-epoch 32 --eval-samples 4 "
SMOKE += "--micro-batch 32 --sample-batch 32"


@dataclasses.dataclass
class Grid:
    """What an algorithm's search tries: each learning rate with each value of another setting."""

    common: str
    rates: tuple
    option: str
    values: tuple

    def cells(self):
        """-> [(the settings that differ, all of them, a short name)]."""
        pairs = [(rate, value) for rate in self.rates for value in self.values]
        differing = [f"--lr {rate} {self.option} {value}" for rate, value in pairs]
        names = [f"{rate}_{value}" for rate, value in pairs]
        return [(own, f"{self.common} {own}", name) for own, name in zip(differing, names)]


# The same search for each: 3 learning rates times 2 values of what matters most beside them.
# DDPO_IS: pictures an update. DDPO_SF: pictures an epoch, which is an update. RWR: inverse
# temperature, per kB. RWR-sparse: the percentile.
ROUNDS = "--warmup 4 --samples-per-epoch 128 --batch-size 64 --updates 24"
SEARCH = {
    "ddpo-is": Grid(
        "--warmup 4 --samples-per-epoch 64", ("2e-4", "4e-4", "8e-4"), "--batch-size", ("16", "32")
    ),
    "ddpo-sf": Grid("--warmup 4", ("4e-4", "8e-4", "1.6e-3"), "--samples-per-epoch", ("32", "64")),
    "rwr": Grid(ROUNDS, ("1e-5", "3e-5", "1e-4"), "--beta", ("5", "20")),
    "rwr-sparse": Grid(ROUNDS, ("1e-5", "3e-5", "1e-4"), "--percentile", ("0.5", "0.9")),
}


def lines_of(folder):
    """The metrics of a run, an epoch each."""
    return train.read_lines(folder / "metrics.jsonl")


def diverged(folder):
    """Did the run end in numbers that are not finite?"""
    return any("not finite" in line["warnings"] for line in lines_of(folder))


def resolve(given):
    """The settings that train.py makes of a command line -> {name: value}. Raises UserError."""
    config = train.merge(given, train.ZOO)
    train.check(config, given)
    return dataclasses.asdict(config)


def run(folder, arguments):
    """`python train.py <arguments>` in a folder of its own, in this process -> the folder.

    Nothing is to be done where it is finished; it is resumed where it broke off.
    """
    words, config = shlex.split(arguments), folder / "config.json"
    wanted = resolve({**train.parse(words), "out": str(folder)})
    before = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else None
    if before:
        names = [name for name in wanted if before.get(name) != wanted[name]]
        names = [name for name in names if name not in ("out", "resume")]  # it may have moved
        if names:
            raise SystemExit(
                f"{folder} holds a run with another {names[0]}: move it away, or delete it"
            )
    if not before or (len(lines_of(folder)) < wanted["epochs"] and not diverged(folder)):
        print(f"\n$ python train.py {arguments} --out {folder}", flush=True)
        try:
            train.main(["--out", str(folder), *(["--resume"] if before else words)])
        except SystemExit as stop:
            if not diverged(folder):
                advice = "the run stopped; the same command goes on with it"
                raise SystemExit(f"{stop.code}\n{folder}: {advice}") from None
    for optimizer in folder.glob("checkpoints/*/optimizer.safetensors"):
        optimizer.unlink()  # two thirds of the disk space, of no more use
    return folder


def per_epoch(settings):
    """The pictures an epoch among settings."""
    words = shlex.split(settings)
    return int(words[words.index("--samples-per-epoch") + 1])


def length(algorithm, settings, quick, more, queries=QUERIES):
    """The options for how long a cell runs: `queries` pictures; in a smoke run next to nothing."""
    if quick:
        return SMOKE + (" --updates 2 --batch-size 16" if algorithm.startswith("rwr") else "")
    epochs = queries // per_epoch(settings)
    return f"--epochs {epochs} --checkpoint-every {epochs // 4} {more}"


@dataclasses.dataclass
class Outcome:
    """A finished run's gain in reward and what the judge makes of it."""

    sd: float  # the gain in the base's standard deviations
    t: float  # in paired standard errors
    before: float  # the share that the judge finds right
    after: float

    @property
    def cost(self):
        """The share that the judge no longer finds right."""
        return self.before - self.after

    def texts(self):
        """As columns of a table; GAINS are their headings."""
        return [f"{self.sd:+.2f}", f"{self.t:.1f}", f"{self.before:.0%} → {self.after:.0%}"]


GAINS = ["gain, sd of the base", "paired s.e.", "judge"]


def outcome(folder):
    """-> Outcome; a run that diverged has lost all."""
    if diverged(folder):
        return Outcome(-math.inf, -math.inf, 1, 0)
    evaluated = [line for line in lines_of(folder) if "eval_queries" in line]
    first, last, judge = evaluated[0], evaluated[-1], "eval_judged_right_mean"
    return Outcome(last["eval_gain_sd"], last["eval_gain_t"], first[judge], last[judge])


def evaluations(folder):
    """What the fixed pictures scored, the base's first.

    -> epochs, rewards and shares that the judge finds right, a number each.
    """
    paths = sorted(folder.glob("samples/*.json"))
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]

    def means(key):
        return [sum(record[key]) / len(record[key]) for record in records]

    return [record["epoch"] for record in records], means("rewards"), means("judged_right")


def table(header, rows):
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def best(outcomes):
    """The place of the winner: the largest gain among those that cost the judge at most COST.

    Where none is so gentle, the gentlest.
    """
    gentle = [i for i, found in enumerate(outcomes) if found.cost <= COST]
    if gentle:
        return max(gentle, key=lambda i: outcomes[i].sd)
    return min(range(len(outcomes)), key=lambda i: outcomes[i].cost)


def marked(heads, outcomes, mark="**chosen**"):
    """The place of the winner, and a row of a table for each outcome, the winner's marked."""
    winner = best(outcomes)
    rows = [[*head, *found.texts(), ""] for head, found in zip(heads, outcomes)]
    rows[winner][-1] = mark
    return winner, rows


def search(out, quick, algorithms=tuple(SEARCH)):
    """Each algorithm's settings, by the same search -> {algorithm: the winner's}, a table."""
    winners, rows = {}, []
    for algorithm in algorithms:
        cells = SEARCH[algorithm].cells()[: 2 if quick else None]
        outcomes = []
        for _, settings, name in cells:
            how_long = length(algorithm, settings, quick, "--eval-every 1000")
            arguments = f"{COMMON} --algorithm {algorithm} {settings} {how_long}"
            outcomes.append(outcome(run(out / "search" / f"{algorithm}_{name}", arguments)))
        winner, found = marked([[algorithm, f"`{own}`"] for own, _, _ in cells], outcomes)
        winners[algorithm] = cells[winner][1]
        rows += found
    return winners, table(["algorithm", "settings", *GAINS, ""], rows)


def only_search(out, quick):
    """The search's table, without a picture."""
    return None, search(out, quick)[1]


def panels(label):
    """A picture of two: reward and judge of the fixed pictures -> figure, left, right."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.set(xlabel=label, ylabel="compressibility (minus kB), 64 fixed pictures")
    right.set(xlabel=label, ylabel="share that the judge finds right", ylim=(0, 1))
    return figure, left, right


def fig4(out, quick):
    """Fig. 4 on one of its three rewards: reward against reward queries.

    Each algorithm has the winner of the search, on a seed that the search has not seen; and RWR
    with equal weights shows what self-training alone does.
    """
    (figure, left, right), rows = panels("reward queries"), []
    winners = search(out, quick)[0]
    for name, settings in {**winners, "no-preference": winners["rwr"] + " --beta 1e-9"}.items():
        algorithm = "rwr" if name == "no-preference" else name
        often = f"--eval-every {max(1, 128 // per_epoch(settings))}"
        how_long = length(algorithm, settings, quick, often)
        arguments = f"{COMMON} --algorithm {algorithm} {settings} --seed 1 {how_long}"
        folder = run(out / "fig4" / name, arguments)
        lines, (epochs, reward, right_share) = lines_of(folder), evaluations(folder)
        queries = [epoch * lines[0]["reward_queries"] for epoch in epochs]
        left.plot(queries, reward, "o-", label=name)
        right.plot(queries, right_share, "o-", label=name)
        seconds = sum(line[part] for line in lines for part in line if part.startswith("seconds"))
        gain = f"{reward[0]:.3f} → {reward[-1]:.3f}"
        texts = [gain, *outcome(folder).texts(), f"{seconds:.0f}"]
        rows.append([name, f"`{settings}`", queries[-1], *texts])
    left.legend()
    header = ["algorithm", "settings", "queries", "reward, fixed pictures", *GAINS, "seconds"]
    return figure, table(header, rows)


def fig10(out, quick):
    """Fig. 10: RWR-sparse with and without CFG training; sampling is guided in both."""
    (figure, left, right), rows = panels("rounds"), []
    settings = search(out, quick, ["rwr-sparse"])[0]["rwr-sparse"]
    queries = 5 * per_epoch(settings)
    how_long = length("rwr-sparse", settings, quick, "--eval-every 1", queries)
    for name, flag in (("with CFG training", ""), ("without", "--no-cfg-training")):
        arguments = f"{COMMON} --algorithm rwr-sparse {settings} {flag} --seed 1 {how_long}"
        folder = run(out / "fig10" / name.replace(" ", "-"), arguments)
        rounds, reward, right_share = evaluations(folder)
        left.plot(rounds, reward, "o-", label=name)
        right.plot(rounds, right_share, "o-", label=name)
        rows.append([name, "reward", *[f"{r:.3f}" for r in reward]])
        rows.append([name, "judge", *[f"{share:.0%}" for share in right_share]])
    left.legend()
    header = ["RWR-sparse", "fixed pictures", "base", *[f"round {n}" for n in rounds[1:]]]
    return figure, table(header, rows)


def rates(out, quick):
    """The learning rate for each reward at the zoo's other defaults, on a seed of its own."""
    rows, few = [], slice(1 if quick else None)
    for reward, (epochs, values) in list(RATES.items())[few]:
        outcomes = []
        for rate in values[few]:
            length = SMOKE if quick else f"--epochs {epochs}"
            arguments = f"{ZOO} --reward {reward} --algorithm ddpo-is --lr {rate} "
            arguments += f"--seed {SEARCH_SEED} {length}"
            outcomes.append(outcome(run(out / "rates" / f"{reward}_{rate}", arguments)))
        heads = [[f"{reward}, {epochs}", f"`--lr {rate}`"] for rate in values]
        rows += marked(heads, outcomes, "**best**")[1]
    return None, table(["reward, epochs", "learning rate", *GAINS, ""], rows)


def spread(values, digits, unit=""):
    """mean ± standard deviation of a few seeds, and each of them -> str."""
    mean, each = statistics.mean(values), ", ".join(f"{value:.{digits}f}" for value in values)
    return f"{mean:.{digits}f} ± {statistics.pstdev(values):.{digits}f}{unit} ({each})"


def rewards(out, quick):
    """The four rewards at the zoo's defaults, three seeds each."""
    figure, left, right = panels("reward queries")
    left.set(ylabel="gain, standard deviations of the base")
    rows, few = [], slice(1 if quick else None)
    for reward in list(train.REWARDS)[few]:
        curves, ends, seconds = [], [], []
        for seed in SEEDS[few]:
            arguments = f"{ZOO} --reward {reward} --seed {seed} {SMOKE if quick else ''}"
            lines = lines_of(run(out / "rewards" / f"{reward}_{seed}", arguments))
            curves.append([line for line in lines if "eval_queries" in line])
            ends.append((curves[-1][0], curves[-1][-1]))
            parts = [line[part] for line in lines for part in line if part.startswith("seconds")]
            seconds.append(sum(parts))
        queries = [line["eval_queries"] for line in curves[0]]
        for axis, name in ((left, "eval_gain_sd"), (right, "eval_judged_right_mean")):
            values = [[line[name] for line in at] for at in zip(*curves)]
            axis.plot(queries, [statistics.mean(v) for v in values], "o-", label=reward)
            axis.fill_between(
                queries, [min(v) for v in values], [max(v) for v in values], alpha=0.2
            )

        def both(name, digits):
            first, last = ([end[i][name] for end in ends] for i in (0, 1))
            return f"{statistics.mean(first):.{digits}f} → {statistics.mean(last):.{digits}f}"

        judge = [[100 * end["eval_judged_right_mean"] for end in pair] for pair in ends]
        row = [f"`{reward}`", f"{lines[-1]['epoch'] + 1} / {queries[-1]}"]
        row += [both("eval_reward_mean", 3), spread([last["eval_gain_sd"] for _, last in ends], 2)]
        row += [f"{min(last['eval_gain_t'] for _, last in ends):.1f}"]
        row += [
            f"{statistics.mean(a for a, _ in judge):.0f} % → {spread([b for _, b in judge], 0)}"
        ]
        row += [both("eval_truth_mean", 2), both("eval_diversity", 2)]
        rows.append([*row, f"{statistics.mean(seconds) / 60:.1f}"])
    right.legend(loc="lower right")  # the room is there
    header = ["reward", "epochs / queries", "reward, fixed pictures", "gain, sd of the base"]
    header += ["least paired s.e.", "judge, %", "raters' truth", "diversity", "minutes"]
    return figure, table(header, rows)


def variants_search(out, quick, variants):
    """Each variant's learning rate for the aesthetic reward -> {variant: settings}, a table."""
    winners, rows, few = {}, [], slice(1 if quick else None)
    for name, (common, values, _) in list(variants.items())[few]:
        cells, outcomes = [f"{common} --lr {rate}" for rate in values[few]], []
        for settings, rate in zip(cells, values):
            length = SMOKE if quick else "--epochs 10"
            arguments = f"{ZOO} --reward aesthetic {settings} --seed {SEARCH_SEED} {length}"
            folder = out / f"{name.replace(' ', '-')}_{rate}"
            outcomes.append(outcome(run(folder, arguments)))
        winner, found = marked([[name, f"`--lr {rate}`"] for rate in values], outcomes)
        winners[name] = cells[winner]
        rows += found
    return winners, table(["variant", "learning rate", *GAINS, ""], rows)


def crossing(xs, ys, level):
    """Where the broken line through the points first reaches a level; None if it never does."""
    for x_0, y_0, x_1, y_1 in zip(xs, ys, xs[1:], ys[1:]):
        if y_0 < level <= y_1:
            return x_0 + (level - y_0) / (y_1 - y_0) * (x_1 - x_0)
    return None


def means(runs, key):
    """What the fixed pictures gave, averaged over runs of several seeds: one number a time."""
    seen = [[line[key] for line in lines if key in line] for lines in runs]
    return [statistics.mean(at) for at in zip(*seen)]


def seconds_an_epoch(runs):
    """Of sampling, reward and training: the median over all epochs."""
    parts = ("seconds_sampling", "seconds_reward", "seconds_training")
    lines = [line for lines in runs for line in lines]
    return statistics.median(sum(line[part] for part in parts) for line in lines)


def variant_row(name, runs, level):
    """A variant's row of the table; `level`: the gain that is to be reached."""
    queries, gains = means(runs, "eval_queries"), means(runs, "eval_gain_sd")
    judge, each = means(runs, "eval_judged_right_mean"), seconds_an_epoch(runs)
    needed, row = crossing(queries, gains, level), [name, f"{queries[-1]:.0f}"]
    ends = [[line for line in lines if "eval_queries" in line][-1] for lines in runs]
    row += [spread([line["eval_gain_sd"] for line in ends], 2), f"{judge[0]:.0%} → {judge[-1]:.0%}"]
    row += [f"{means(runs, 'eval_truth_mean')[-1]:.2f}"]
    row += [f"{means(runs, 'eval_diversity')[-1]:.2f}", f"{each:.1f}"]
    if needed is None:
        return [*row, "never", "", ""]
    seconds = needed / runs[0][0]["reward_queries"] * each
    return [*row, f"{needed:.0f}", f"{seconds:.0f}", f"{np.interp(needed, queries, judge):.0%}"]


def compare(out, quick, variants, seeds):
    """What came after the paper, on the aesthetic reward: gain against queries and seconds.

    Seeds are the outer loop, so that a machine's moods meet all variants.
    """
    winners, searched = variants_search(out, quick, variants)
    few, runs = slice(1 if quick else None), {}
    for seed in seeds[few]:
        for name, settings in winners.items():
            epochs = variants[name][2]
            length = SMOKE if quick else f"--epochs {epochs} --eval-every 4"
            arguments = f"{ZOO} --reward aesthetic {settings} --seed {seed} {length}"
            folder = out / f"{name.replace(' ', '-')}_seed{seed}"
            if epochs:
                runs.setdefault(name, []).append(lines_of(run(folder, arguments)))
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.set(xlabel="reward queries", ylabel="gain, standard deviations of the base")
    right.set(xlabel="seconds of sampling, reward and training")
    for name, several in runs.items():
        queries, gains = means(several, "eval_queries"), means(several, "eval_gain_sd")
        each = seconds_an_epoch(several) / several[0][0]["reward_queries"]
        left.plot(queries, gains, "o-", label=name)
        right.plot([each * n for n in queries], gains, "o-")
    left.legend()
    level = means(runs["ddpo-is"], "eval_gain_sd")[-1]
    header = ["variant", "queries", "gain, sd of the base", "judge", "truth", "diversity"]
    header += ["seconds an epoch", *[f"{what} at {level:.2f}" for what in COSTS]]
    rows = [variant_row(name, several, level) for name, several in runs.items()]
    return figure, f"{searched}\n\n{table(header, rows)}"


def faster(out, quick):
    """With the warm-up of the zoo's defaults, 20 updates; three seeds."""
    return compare(out / "faster", quick, FASTER, FASTER_SEEDS)


def sooner(out, quick):
    """With a warm-up of 4 updates; five seeds."""
    return compare(out / "sooner", quick, SOONER, SOONER_SEEDS)


@torch.no_grad()
def ratios_off_1(policy, trajectories, micro_batch):
    """The largest |ratio - 1| of each step before any update -> list of T."""
    samples = torch.arange(len(trajectories))
    pairs = ddpo.all_pairs(trajectories, samples, torch.zeros(len(samples)))
    guided, log_ratios = (policy.uncond(), policy.guidance), []
    for i, k in zip(pairs.i.split(micro_batch), pairs.k.split(micro_batch)):
        actions = (trajectories, i, k)
        now = ddpo.policy_log_prob(policy.network, policy.sampler, *actions, *guided)
        log_ratios.append(now - trajectories.log_probs[i, k])
    off_1 = (torch.cat(log_ratios).exp() - 1).abs()
    return off_1.reshape(-1, len(trajectories)).amax(1).tolist()


def ratios(out, quick):
    """What moves the ratio before the first update: other batches, latents stored in half."""
    rows, animals = [], list(train.load_prompts("common-animals"))[:8]
    for name, dtype in train.PRECISIONS.items():
        policy = lab.policy(**{"steps": 3} if quick else {})
        policy.dtype = dtype
        trajectories, _ = lab.roll(policy, animals)
        cases = [(f"micro-batches of {size}", trajectories, size) for size in (8, 3, 1)]
        for kind in (torch.float16, torch.bfloat16):
            stored = dataclasses.replace(
                trajectories, latents=trajectories.latents.to(kind).float()
            )
            cases.append((f"latents stored as {str(kind).removeprefix('torch.')}", stored, 8))
        for what, those, size in cases[: 1 if quick else None]:
            *early, loud, last = ratios_off_1(policy, those, size)
            rows.append([name, what, *[f"{x:.0e}" if x else "0" for x in (max(early), loud, last)]])
    w = ddpo.noise_weights(policy.sampler).tolist()
    heads = [f"steps 1 to {len(w) - 2}, w ≤ {max(w[:-2]):.2f}"]
    heads += [f"step {k + 1}, w = {w[k]:.2f}" for k in (len(w) - 2, len(w) - 1)]
    return None, table(["networks", "other than in sampling", *heads], rows)


EXPERIMENTS = {
    "rates": rates,
    "rewards": rewards,
    "search": only_search,
    "fig4": fig4,
    "fig10": fig10,
    "faster": faster,
    "sooner": sooner,
    "ratios": ratios,
}


def write(name, figure, text, quick, out):
    """The table into experiments.md, between its marks, and the picture beside it.

    Of a smoke run only the picture, into the runs' folder.
    """
    if figure:
        figure.savefig((out if quick else HERE) / f"{name}.png")
    print(f"\n{name}\n{text}", flush=True)
    if quick:
        return
    page, begin, end = HERE / "experiments.md", f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(
            f"{page} has lost its marks {begin.strip()} and {end.strip()}: put them back"
        )
    page.write_text(f"{before}{begin}{text}\n{end}{after}", encoding="utf-8")


def main(argv=None):
    parser = argparse.ArgumentParser(description="The paper's experiments on the zoo.")
    which = f"which of {', '.join(EXPERIMENTS)} (default: all)"
    parser.add_argument("experiments", nargs="*", metavar="experiment", help=which)
    quick = "a smoke run of two epochs a cell, in runs/quick, that leaves experiments.md alone"
    parser.add_argument("--quick", action="store_true", help=quick)
    runs = "the folder in which experiments/ or quick/ lies [%(default)s]"
    parser.add_argument("--runs", type=Path, default=HERE.parent / "runs", help=runs)
    given = parser.parse_args(argv)
    unknown = [name for name in given.experiments if name not in EXPERIMENTS]
    if unknown:
        parser.error(f"{', '.join(unknown)}: there are {', '.join(EXPERIMENTS)}")
    out = given.runs / ("quick" if given.quick else "experiments")
    if given.quick:
        shutil.rmtree(out, ignore_errors=True)  # nothing is skipped
    try:
        for name in given.experiments or EXPERIMENTS:
            write(name, *EXPERIMENTS[name](out, given.quick), given.quick, out)
    except train.UserError as error:
        raise SystemExit(f"experiments.py: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("experiments.py: stopped; the same command goes on") from None


if __name__ == "__main__":
    main()
