"""What is on screen when a part is right: `python tutorial/assignments/show.py 3`.

It draws with your functions, those of this part and of earlier ones (from part 4 on with part 5's
too), into runs/shown/. Nothing here says whether they are right: check.py does.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import ddpo
import lab
import rewards
import scheduler
import train
from redness import redness

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "runs" / "shown"
ANIMALS = "cat dog monkey zebra sheep lion tiger fox bear whale mouse frog duck pig bee turtle"
ANIMALS = ANIMALS.split()
REDNESS = f"--reward '{ROOT}/tutorial/redness.py:redness' --steps 6 --samples-per-epoch 32 "
REDNESS += "--batch-size 8 "
REDNESS += "--eval-samples 16 --eval-every 1 "


def save(canvas, name):
    """A picture's path, printed."""
    OUT.mkdir(parents=True, exist_ok=True)
    canvas.save(OUT / name)
    print(OUT / name)


@torch.no_grad()
def steps(policy, count, predict):
    """Drawing. predict(x_t, t) -> eps; yields t, x_t and the guessed x_0, at last x_0 twice."""
    T, device = policy.sampler.T, policy.device
    noises = [scheduler.named_noise((4, 8, 8), T + 1, 5, i).to(device) for i in range(count)]
    state = torch.stack([some[0] for some in noises])
    for n, t in enumerate(policy.sampler.timesteps, 1):
        t = t.repeat(count)
        guess = predict(state, t)
        alpha_bar = policy.sampler.alpha_bar(t)[0]
        yield t[0], state, scheduler.predicted_x0(guess, state, alpha_bar)
        fresh = torch.stack([some[n] for some in noises])
        state = policy.sampler.step(guess, state, t, fresh)[0]
    yield None, state, state


def show_1():
    """A fox dissolves."""
    policy = lab.policy()
    fox = Image.open(lab.FIGURES / "1-dissolving.png").convert("RGB").crop((0, 18, 64, 82))
    pixels = torch.from_numpy(np.array(fox)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        x_0 = policy.vae.encode(pixels)
    times = torch.tensor([0, 100, 200, 300, 400, 500, 600, 700, 800, 999])
    noise = scheduler.named_noise((4, 8, 8), 1, 1)
    alphas_bar = policy.sampler.schedule.alphas_bar
    dissolving = [scheduler.add_noise(x_0, noise, alphas_bar[t : t + 1]) for t in times]
    strip = policy.decode(torch.cat(dissolving))
    save(lab.grid(strip, 10, top=[f"t = {t}" for t in times]), "1.png")


def show_2():
    """Chapter 1's film, without guidance, which is part 3's."""
    policy = lab.policy()
    subjects = ["a fox", "a zebra", "a frog", "a penguin"]
    cond, frames = policy.embed(subjects), []
    for t, x_t, guess in steps(policy, 4, lambda x, t: policy.network(x, t, cond)):
        both = np.concatenate([policy.decode(x_t), policy.decode(guess)])
        frames.append(lab.grid(both, 4, above="the picture" if t is None else f"t = {t}"))
    OUT.mkdir(parents=True, exist_ok=True)
    print(lab.gif(frames, OUT / "2.gif"))


def show_3():
    """The grid of guidance weights."""
    policy, rows, words = lab.policy(), [], [0, 1, 2, 4, 8, 16]
    cond = policy.embed([f"a {animal} on a blue background" for animal in ANIMALS[:8]])
    for w in words:

        def predict(x, t, w=w):
            return ddpo.predict_noise(policy.network, x, t, cond, policy.uncond(), w)

        rows.append(policy.decode([x for _, x, _ in steps(policy, 8, predict)][-1]))
    left = [f"w = {w}" for w in words]
    save(lab.grid(np.concatenate(rows), 8, top=ANIMALS[:8], left=left), "3.png")


def show_4():
    """16 animals."""
    save(lab.grid(lab.roll(lab.policy(), ANIMALS, seed=1)[1], 8), "4.png")


def show_5():
    """Log p by step."""
    trajectories, _ = lab.roll(lab.policy(), ANIMALS, seed=2)
    for k, value in enumerate(trajectories.log_probs.mean(0)):
        print(f"step {k:2}: {value:5.2f}  {'*' * round(10 * (value.item() + 1.5))}")


def show_6():
    """First ratio error 0."""
    policy = lab.policy()
    trajectories, _ = lab.roll(policy, ANIMALS[:4], seed=2)
    i, k = torch.meshgrid(torch.arange(4), torch.arange(policy.sampler.T), indexing="ij")
    pairs, guided = (trajectories, i.flatten(), k.flatten()), (policy.uncond(), policy.guidance)
    with torch.no_grad():
        now = ddpo.policy_log_prob(policy.network, policy.sampler, *pairs, *guided)
    ratio = (now - trajectories.log_probs.flatten()).exp()
    print(f"largest |ratio - 1| before any update: {(ratio - 1).abs().max():.0e}, by rounding")


def show_7():
    """Pictures by advantage, for chapter 0's reward."""
    prompts = [animal for animal in ANIMALS[3:7] for _ in range(8)]
    images = lab.roll(lab.policy(), prompts, seed=7)[1]
    given = torch.from_numpy(redness(images, prompts))
    statistics = ddpo.PromptStatistics(min_count=8)
    statistics.remember(prompts, given)
    advantages = ddpo.normalize_advantages(given, *statistics.mean_std(prompts, given))
    order = advantages.reshape(4, 8).argsort(dim=1, descending=True)
    order += torch.arange(0, 32, 8)[:, None]
    for animal, row in zip(prompts[::8], order, strict=True):
        print(f"{animal:6}", *[f"{a:5.2f}" for a in advantages[row]])
    top = ["best", *[""] * 6, "worst"]
    save(lab.grid(images[order.flatten().numpy()], 8, top=top, left=prompts[::8]), "7.png")


def show_8():
    """Chapter 0's reward climbs: its run of a minute."""
    options = "--epochs 8 --warmup 6 --lr 8e-4 --clip-range 0.02"
    print(lab.film(lab.quick_run(REDNESS + options, str(OUT / "8")), OUT / "8.gif"))


def show_9():
    """Two rounds of RWR."""
    options = "--algorithm rwr --beta 0.03 --epochs 2 --updates 12 --lr 1e-4"
    print(lab.film(lab.quick_run(REDNESS + options, str(OUT / "9")), OUT / "9.gif"))


def show_10():
    """Best and worst description."""
    settings = train.placed(lab.config(), train.ZOO)
    colours = [(animal, colour) for animal in ANIMALS[3:11] for colour in ("red", "blue")]
    prompts = [f"a {animal} on a {colour} background" for animal, colour in colours]
    images = lab.roll(lab.policy(), prompts, seed=2)[1]
    score = rewards.BertScore(settings.bert, settings.bert_layer, "cpu")
    described = (rewards.Llava(settings.vlm, "cpu"), score, settings.vlm_question)
    recall, shown = rewards.alignment(images, prompts, *described)
    ends = [int(recall.argmax()), int(recall.argmin())]
    for word, n in zip(("best", "worst"), ends, strict=True):
        size = rewards.incompressibility(images[[n]], None)[0]
        print(f"{word}: {recall[n]:.3f}, asked {prompts[n]!r}, seen {shown['description'][n]!r};")
        print(f"    a file of {size:.2f} kB")
    save(lab.grid(images[ends], 2, top=["best", "worst"]), "10.png")


def main(argv=None):
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", type=int, choices=range(1, 11))
    show = globals()[f"show_{parser.parse_args(argv).part}"]
    print(" ".join(show.__doc__.split()))
    try:
        show()
    except NotImplementedError as error:
        sys.exit(f"{error} first")


if __name__ == "__main__":
    main()
