"""Predict, then run: six questions, with numbers of one's own.

    python tutorial/assignments/questions.py                        # the questions
    python tutorial/assignments/questions.py predict 4 1.5 "since std is ..."
    python tutorial/assignments/questions.py head                   # hand this in, then
    python tutorial/assignments/questions.py run 4                  # what it is
    python tutorial/assignments/questions.py explain 4 "I had forgotten that ..."

What is said goes into questions.jsonl, each line with the hash of the one before, so that a
prediction is older than every line behind it, and `head`, handed in before anything is run, stands
for all of them. Points are for reasons and for explaining the difference, none for being right: so
don't look it up, and don't correct a prediction. own.json holds your numbers.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
from parts import KEY, chosen, drawn

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))  # its modules are imported where they are needed, for torch is slow
FILE = "questions.jsonl"

QUESTIONS = [
    "The zoo's policy draws your eight prompts in T = {T} steps; then all its weights move a "
    "little. Of which step, 0 being the noisiest, do log-ratios leave the clip range first?",
    "T = {T}. The same eight pictures are drawn again, with the same noise up to the action of "
    "step {k}, included, and other noise from then on. How large is the mean difference of their "
    "pixels, if that of two drawings without any noise in common is 1?",
    "Eight pictures of one prompt have the rewards {rewards}. What is the largest of their RWR "
    "weights at beta = {beta}? (And in your reason: what does RWR train on at beta = 0?)",
    "What is log p, as `gaussian_log_prob` has it, of the last of T = {T} steps of the zoo's "
    "sampler, if the action is the mean itself?",
    "An epoch draws {draws} of 45 prompts, {each} pictures of each; a prompt has its own "
    "statistics from its {min_count}th reward on. After how many epochs, on average, has "
    "a prompt its own?",
    "By how much does log p of an action that was sampled lie below log p of the mean, on average "
    "over many pictures and steps? (And in your reason: by how much does this vary, and how does "
    "that depend on D?)",
]


def numbers(student, key=KEY):
    """What is a student's own in the questions and in the final project."""

    def one(what, items):
        return chosen(key, student, what, items, 1)[0]

    each, T = one("each", [2, 4, 8]), one("T", [8, 10, 12, 16, 20])
    animals = (ROOT / "tutorial" / "prompts" / "common-animals.txt").read_text().split("\n")
    animals = [line.strip() for line in animals if line.strip()]
    rewards = [round(3 + 4 * drawn(key, student, f"reward {n}"), 1) for n in range(8)]
    return {
        "student": student,
        "prompts": chosen(key, student, "prompts", animals, 8),
        "seed": int(1000 * drawn(key, student, "seed")),
        "T": T,
        "k": one("k", [2, 3, T // 2, T - 3]),
        "rewards": rewards,
        "beta": one("beta", [0.3, 0.5, 1, 2]),
        "draws": one("draws", [4, 8, 16]),
        "each": each,
        "min_count": one("min_count", [8, 16]),
    }


def text(own):
    """The questions, with a student's numbers."""
    asked = [question.format(**own) for question in QUESTIONS]
    return "\n".join(f"{n}. {question}" for n, question in enumerate(asked, 1))


def digest(line):
    """The hash of a line without its own."""
    kept = {name: value for name, value in line.items() if name != "hash"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def chained(lines, line):
    """A line, with the hash of the one before and its own."""
    line = {**line, "before": lines[-1]["hash"] if lines else "begin"}
    return {**line, "hash": digest(line)}


def broken(lines):
    """The first line, from 1, that does not fit the one before; 0 where all do."""
    before = "begin"
    for n, line in enumerate(lines, 1):
        if line.get("before") != before or line.get("hash") != digest(line):
            return n
        before = line["hash"]
    return 0


def read(path):
    """The lines of questions.jsonl, each a dict."""
    if not path.is_file():
        return []
    return [dict(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def policy_of(T):
    """The zoo's, on the CPU."""
    import ddpo
    import train

    config = train.merge({"model": "zoo", "steps": T}, train.ZOO, ddpo.DDPO)
    return train.load_policy(train.ZOO, train.choose_device("cpu"), config)


def noises(policy, own, epoch):
    """Of the eight pictures (8, T + 1, 4, h, w)."""
    import torch

    from scheduler import named_noise

    shape = (4, policy.unet.config["sample_size"], policy.unet.config["sample_size"])
    names = [(own["seed"], epoch, i) for i in range(len(own["prompts"]))]
    return torch.stack([named_noise(shape, policy.sampler.T + 1, *name) for name in names])


def rolled(policy, own, noise):
    """Trajectories of the eight prompts."""
    import ddpo

    inputs = (policy.embed(own["prompts"]), policy.uncond(), noise)
    return ddpo.sample(policy.network, policy.sampler, *inputs, policy.guidance)


def run_1(own):
    """The step whose log-ratios are largest, after a small random move of all weights."""
    import torch

    import ddpo

    policy = policy_of(own["T"])
    trajectories = rolled(policy, own, noises(policy, own, 0))
    torch.manual_seed(own["seed"])
    with torch.no_grad():
        for p in policy.unet.parameters():
            p.add_(1e-4 * p.abs().mean() * torch.randn_like(p))
        i = torch.arange(len(own["prompts"]))
        moved = []
        for k in range(own["T"]):
            actions = (trajectories, i, torch.full_like(i, k))
            guided = (policy.uncond(), policy.guidance)
            now = ddpo.policy_log_prob(policy.network, policy.sampler, *actions, *guided)
            moved.append((now - trajectories.log_probs[:, k]).abs().mean().item())
    print("mean size of the log-ratio by step:", *[f"{value:.1e}" for value in moved])
    return int(np.argmax(moved))


def run_2(own):
    """The difference of pixels, in that of drawings without any noise in common."""
    import torch

    policy = policy_of(own["T"])
    first, second = noises(policy, own, 0), noises(policy, own, 1)
    since = own["k"] + 2  # noise 0 is x_T, noise k + 1 the action of step k
    mixed = torch.cat([first[:, :since], second[:, since:]], dim=1)
    drawn_three = [rolled(policy, own, noise).latents[:, -1] for noise in (first, mixed, second)]
    pictures = [policy.decode(latents).astype(float) for latents in drawn_three]
    near, far = (np.abs(pictures[0] - other).mean() for other in pictures[1:])
    return near / far


def run_3(own):
    """The largest weight."""
    import torch

    import ddpo

    rewards = torch.tensor(own["rewards"], dtype=torch.float64)
    return ddpo.rwr_weights(["a cat"] * len(rewards), rewards, own["beta"]).max().item()


def run_4(own):
    """log p of the mean at the last timestep."""
    import torch

    from scheduler import gaussian_log_prob

    policy = policy_of(own["T"])
    x, last = torch.zeros(1, 4, 8, 8), policy.sampler.timesteps[-1:]
    mean, std = policy.sampler.mean_std(x, x, last)
    return gaussian_log_prob(mean, mean, std).item()


def run_5(own):
    """The mean over 45 prompts and 40 runs."""
    import torch

    import ddpo
    import train

    prompts, epochs = [str(n) for n in range(45)], []
    for seed in range(40):
        statistics, found, epoch = ddpo.PromptStatistics(32, own["min_count"]), {}, 0
        while len(found) < len(prompts):
            rng, count = np.random.default_rng([seed, epoch]), own["draws"] * own["each"]
            some = train.draw_prompts(prompts, count, own["each"], rng)
            statistics.remember(some, torch.zeros(count))
            epoch += 1
            for prompt, history in statistics.history.items():
                if len(history) >= own["min_count"]:
                    found.setdefault(prompt, epoch)
        epochs += found.values()
    return float(np.mean(epochs))


def run_6(own):
    """The mean difference, over eight pictures and all steps."""
    import torch

    import ddpo

    policy = policy_of(own["T"])
    trajectories = rolled(policy, own, noises(policy, own, 0))
    below = []
    i = torch.arange(len(own["prompts"]))
    for k in range(own["T"]):
        actions = (trajectories, i, torch.full_like(i, k))
        with torch.no_grad():
            guided = (policy.uncond(), policy.guidance)
            inputs = (policy.network, policy.sampler, *actions, *guided)
            mean, std = ddpo.policy_mean_std(*inputs)
        top = ddpo.gaussian_log_prob(mean, mean, std)
        below.append(top - trajectories.log_probs[:, k])
    below = torch.stack(below)
    D = trajectories.latents[0, 0].numel()
    print(f"its standard deviation, at D = {D}: {below.std():.3f}")
    return below.mean().item()


RUNS = [run_1, run_2, run_3, run_4, run_5, run_6]


def own_numbers():
    """Of own.json, or of the public key."""
    path = ROOT / "own.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else numbers("public")


def add(path, line):
    """A line at the end of questions.jsonl."""
    line = chained(read(path), line)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def is_number(text):
    """Is it a finite number?"""
    try:
        return abs(float(text)) < float("inf")
    except ValueError:
        return False


def main(argv=None):
    """The program."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    whats = ["show", "predict", "head", "run", "explain"]
    parser.add_argument("what", nargs="?", choices=whats, default="show")
    parser.add_argument("number", nargs="?", type=int, choices=range(1, 7), help="of the question")
    parser.add_argument("said", nargs="*", help="a number and its reason, or an explanation")
    options = parser.parse_args(argv)
    path, own = ROOT / FILE, own_numbers()
    what, said = options.what, options.said
    if what == "show":
        print(text(own))
        return
    if what == "head":
        lines = read(path)
        print(lines[-1]["hash"] if lines else "nothing is predicted yet")
        return
    predicted = [line for line in read(path) if line["question"] == options.number]
    line = {"what": what, "question": options.number}
    if options.number is None:
        parser.error("which question?")
    done = [x["what"] for x in predicted]
    if what == "predict" and (predicted or len(said) != 2 or not is_number(said[0])):
        parser.error("a number, and a reason in quotes, once; such as: predict 4 1.5 'since ...'")
    if what != "predict" and not predicted:
        parser.error(f"predict {options.number} first")
    if what == "explain" and ("run" not in done or not said):
        parser.error(f"run {options.number} first, then say what differs, in quotes")
    if what == "predict":
        line.update(number=float(said[0]), reason=said[1])
    elif what == "run":
        line["found"] = round(RUNS[options.number - 1](own), 4)
        print(f"{line['found']}; predicted: {predicted[0]['number']}")
    else:
        line["difference"] = " ".join(said)
    add(path, line)
    if what == "predict":
        print("kept. Hand in what `head` says when all are predicted, before the first `run`")


if __name__ == "__main__":
    main()
