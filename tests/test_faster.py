"""Equal credit, some of the steps and advantage-weighted matching against independent sums."""

import itertools
import json
import math
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train
from ddpo import (
    DDPO,
    DDPOEqualCredit,
    DDPOScoreFunction,
    Pairs,
    Trajectories,
    all_pairs,
    noise_weights,
    sample,
)
from helpers import SD, TOY, BarePolicy, choices, normal, posterior_steps, small_unet
from scheduler import NoiseSchedule, Sampler, named_noise
from test_train import run

ALGORITHMS = Path(train.__file__).parent / "tutorial" / "algorithms"
NAME, SCHEDULE = [3, 1, 1], NoiseSchedule.from_config(SD)


SomeSteps = train.choose_algorithm(f"{ALGORITHMS / 'some_steps.py'}:SomeSteps")
Recomputed = train.choose_algorithm(f"{ALGORITHMS / 'recomputed.py'}:Recomputed")
BOTH = train.choose_algorithm(f"{ALGORITHMS / 'some_steps.py'}:SomeStepsEqualCredit")
Matching = train.choose_algorithm(f"{ALGORITHMS / 'awm.py'}:AdvantageWeightedMatching")


class NoisePerStep(nn.Module):
    """eps = theta[step], so that each step's gradient stands by itself. (T, 4)."""

    def __init__(self, sampler):
        super().__init__()
        self.theta = nn.Parameter(normal(sampler.T, 4, seed=3))
        self.timesteps = sampler.timesteps

    def forward(self, x, timesteps, context):
        k = (timesteps[:, None] == self.timesteps).int().argmax(1)
        return self.theta[k][:, :, None, None].expand_as(x)


def problem(schedule, T, B):
    """-> policy, trajectories of B samples, the noise of each action (B, T, 4)."""
    sampler = Sampler(schedule, T, 1.0)
    policy = BarePolicy(NoisePerStep(sampler), sampler)
    noise = normal(B, T + 1, 4, 1, 1, seed=1)
    trajectories = sample(
        policy.network, sampler, torch.zeros(B, 1, 1), policy.uncond(), noise, 1.0
    )
    return policy, trajectories, noise[:, 1:].flatten(2)


def gradient(policy, algorithm, pairs):
    """Of the mean of the pairs' losses, by step -> float64 (T, 4)."""
    policy.unet.zero_grad()
    algorithm.losses(policy, pairs)[0].mean().backward()
    return policy.unet.theta.grad.double()


# ---- Equal credit --------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [3, 12, 50])
def test_noise_weights_are_autograds(T):
    sampler = Sampler(SCHEDULE, T, 1.0)
    x, eps = normal(T, 4, 3, 3), normal(T, 4, 3, 3, seed=1).requires_grad_()
    mean, std = sampler.mean_std(eps, x, sampler.timesteps)
    mean[:, 2, 1, 0].sum().backward()
    assert (eps.grad != 0).sum() == T  # no other pixel has a part in it
    expected = eps.grad[:, 2, 1, 0].abs() / std
    torch.testing.assert_close(noise_weights(sampler), expected, rtol=2e-4, atol=0)


def test_the_last_step_but_one_is_the_spike_of_the_docstring():
    w = noise_weights(Sampler(SCHEDULE, 12, 1.0))
    assert w[10].item() == pytest.approx(7.4, abs=0.05)
    assert 0.8 < w[torch.arange(12) != 10].min() and w[torch.arange(12) != 10].max() < 1.3


def test_a_step_without_noise_has_weight_and_credit_0():
    schedule = NoiseSchedule(SCHEDULE.alphas_bar, 1.0, 1)
    policy, trajectories, _ = problem(schedule, 3, 4)
    advantages = normal(4, seed=2)
    assert noise_weights(policy.sampler)[-1] == 0
    algorithm = DDPOEqualCredit(choices())
    algorithm.setup(policy)
    found = gradient(policy, algorithm, all_pairs(trajectories, torch.arange(4), advantages))
    assert (found[-1] == 0).all() and found.isfinite().all() and (found[:-1] != 0).all()


@pytest.mark.parametrize("schedule, T", [(TOY, 3), (SCHEDULE, 12)], ids=["toy", "sd"])
def test_equal_credit_gives_each_step_the_same_weight(schedule, T):
    """At ratio 1: -A mean(w) sign(k_t) z / D, with k_t and sigma_t of DDPM's posterior."""
    B, D = 64, 4
    policy, trajectories, z = problem(schedule, T, B)
    advantages = normal(B, seed=2)
    algorithm = DDPOEqualCredit(choices(clip_range=1.0))
    algorithm.setup(policy)
    found = gradient(policy, algorithm, all_pairs(trajectories, torch.arange(B), advantages))
    steps = posterior_steps(schedule, T)
    w = [abs(step.b) / math.sqrt(step.variance) for step in steps]
    for k, step in enumerate(steps):
        expected = -(advantages[:, None] * z[:, k]).double().sum(0) / (B * T * D)
        expected *= math.copysign(1, step.b) * sum(w) / T
        torch.testing.assert_close(found[k], expected, rtol=3e-3, atol=1e-6)


# ---- Some of the steps ---------------------------------------------------------------------------


class SomeStepsScoreFunction(SomeSteps):
    """The same of DDPO_SF."""

    estimator = DDPOScoreFunction.estimator


def chosen(algorithm, policy, draw, K):
    """One of the algorithms, set up."""
    made = algorithm(choices(clip_range=0.02))
    made.draw, made.K = draw, K
    made.setup(policy)
    return made


@pytest.mark.parametrize("draw", ["uniform", "weighted"])
@pytest.mark.parametrize(
    "some, full",
    [(SomeSteps, DDPO), (SomeStepsScoreFunction, DDPOScoreFunction), (BOTH, DDPOEqualCredit)],
    ids=["is", "sf", "equal"],
)
def test_the_expectation_over_all_draws_is_the_whole_gradient(some, full, draw):
    """All T^K of them, some pairs outside the clip, on either side of 1."""
    T, K, B = 3, 2, 5
    policy, trajectories, _ = problem(TOY, T, B)
    advantages = normal(B, seed=2)
    with torch.no_grad():
        policy.unet.theta += 0.1 * normal(T, 4, seed=5)
    samples = torch.arange(B)
    pairs = all_pairs(trajectories, samples, advantages)
    all_steps = full(choices(clip_range=0.02))
    all_steps.setup(policy)
    off = all_steps.losses(policy, pairs)[1]["log_ratio"].exp() - 1
    assert (off > 0.02).any() and (off < -0.02).any() and (off.abs() < 0.02).any()
    whole = gradient(policy, all_steps, pairs)
    algorithm, expected = chosen(some, policy, draw, K), torch.zeros(T, 4, dtype=torch.float64)
    for draws in itertools.product(range(T), repeat=K):
        k = torch.tensor(draws).repeat_interleave(B)
        pairs = Pairs(trajectories, samples.repeat(K), k, advantages.repeat(K))
        probability = math.prod(algorithm.p[k].item() for k in draws)
        expected += probability * gradient(policy, algorithm, pairs)
    torch.testing.assert_close(expected, whole, rtol=1e-5, atol=1e-6 * whole.abs().max().item())


def test_the_variance_of_each_choice():
    """Of one draw of one picture: sum_t w_t^2 / (T^2 p_t); drawn by w_t it is the least there is.

    For the toy network, whose steps share no weights; z^2 A^2 / D^2 is left out on both sides.
    """
    T, second = 12, {}
    policy, trajectories, z = problem(SCHEDULE, T, 1)
    w = noise_weights(policy.sampler).double()
    for draw in ("uniform", "weighted"):
        algorithm, second[draw] = chosen(SomeSteps, policy, draw, 1), 0.0
        for k in range(T):
            pairs = Pairs(trajectories, torch.tensor([0]), torch.tensor([k]), torch.ones(1))
            found = gradient(policy, algorithm, pairs)[k] * 4 / z[0, k]
            second[draw] += algorithm.p[k].item() * found.square().mean().item()
    assert second["uniform"] == pytest.approx((w.square().sum() / T).item(), rel=2e-3)
    assert second["weighted"] == pytest.approx((w.sum() ** 2 / T**2).item(), rel=2e-3)
    assert second["weighted"] < 0.5 * second["uniform"]


@pytest.mark.parametrize("draw", ["uniform", "weighted"])
def test_steps_are_drawn_as_often_as_said_and_by_name(draw):
    T, B, K = 12, 40, 50
    policy, trajectories, _ = problem(SCHEDULE, T, B)
    advantages = normal(B, seed=2)
    algorithm = chosen(SomeSteps, policy, draw, K)
    algorithm.settings.batch_size = 20
    first, again, other = (
        list(algorithm.batches(policy, [trajectories], ["x"] * B, advantages, name))
        for name in (NAME, NAME, [3, 2, 1])
    )
    k = torch.cat([pairs.k for pairs in first])
    i = torch.cat([pairs.i for pairs in first])
    assert torch.equal(i.bincount(), torch.full((B,), K)) and len(first) == 2
    share, p = k.bincount(minlength=T) / len(k), algorithm.p
    assert ((share - p).abs() < 4 * (p * (1 - p) / len(k)).sqrt()).all()
    for pairs in first:
        assert torch.equal(pairs.advantages, advantages[pairs.i])
    assert torch.equal(k, torch.cat([pairs.k for pairs in again]))
    assert not torch.equal(k, torch.cat([pairs.k for pairs in other]))


# ---- Advantage-weighted matching -----------------------------------------------------------------


def test_matching_equals_the_same_training_by_hand():
    """Two updates of three pictures, two draws each, with diffusers' noise and guidance by hand."""
    n, draws = 6, 2
    clip, lr, guidance = 0.003, 0.05, 3.0
    embeds = dict(zip(["a", "b", ""], normal(3, 7, 16, seed=1), strict=True))
    prompts, advantages = ["a", "b", "a", "b", "a", "b"], torch.tensor([2.0, -1, 0.5, 0, -2, 1])
    mine, theirs = (BarePolicy(small_unet(), Sampler(SCHEDULE, 3, 1.0), embeds) for _ in range(2))
    x_0 = normal(n, 4, 8, 8, seed=2)

    algorithm = Matching(choices(batch_size=3, clip_range=clip, guidance=guidance))
    algorithm.settings.micro_batch = 4
    rows = torch.zeros(n, 3), torch.arange(3), torch.zeros(n, 7, 16)
    latents = torch.cat([normal(n, 3, 4, 8, 8, seed=7), x_0[:, None]], dim=1)
    kept = [algorithm.record(Trajectories(latents, *rows))]
    optimizer, ratios = torch.optim.SGD(mine.unet.parameters(), lr), []
    for batch in algorithm.batches(mine, kept, prompts, advantages, NAME):
        optimizer.zero_grad()
        losses, logged = algorithm.losses(mine, batch[:])
        losses.mean().backward()
        optimizer.step()
        ratios.append(logged["log_ratio"].exp())

    t = torch.from_numpy(np.random.default_rng(NAME).integers(1000, size=(n, draws)))
    noise = named_noise((4, 8, 8), n * draws, *NAME).view(n, draws, 4, 8, 8)
    noising = diffusers.DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False)

    def l_theta(i, j):
        x_t = noising.add_noise(x_0[i : i + 1], noise[i, j : j + 1], t[i, j : j + 1])
        with_prompt = theirs.unet(x_t, t[i, j : j + 1], embeds[prompts[i]][None])
        without = theirs.unet(x_t, t[i, j : j + 1], embeds[""][None])
        eps = guidance * with_prompt + (1 - guidance) * without
        return -F.mse_loss(eps[0], noise[i, j])

    with torch.no_grad():
        old = torch.tensor([[l_theta(i, j) for j in range(draws)] for i in range(n)])
    optimizer, clipped = torch.optim.SGD(theirs.unet.parameters(), lr), 0
    for pictures in ((0, 1, 2), (3, 4, 5)):
        optimizer.zero_grad()
        for i, j in itertools.product(pictures, range(draws)):
            ratio, A = (l_theta(i, j) - old[i, j]).exp(), advantages[i]
            outside = ratio > 1 + clip if A > 0 else ratio < 1 - clip
            clipped += bool(outside)
            if not outside:
                (-ratio * A / (len(pictures) * draws)).backward()
        optimizer.step()
    assert 0 < clipped < n * draws / 2
    assert (ratios[0] - 1).abs().max() < 1e-5 and (ratios[1] - 1).abs().max() > clip
    for one, other in zip(mine.unet.parameters(), theirs.unet.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-6)


# ---- All three, through train.py -----------------------------------------------------------------


@pytest.mark.parametrize(
    "algorithm",
    [
        "ddpo-equal",
        f"{ALGORITHMS / 'some_steps.py'}:SomeSteps",
        f"{ALGORITHMS / 'awm.py'}:AdvantageWeightedMatching",
    ],
    ids=["equal", "some", "awm"],
)
def test_runs_begin_at_ratio_1_and_go_on_where_they_stopped(algorithm, tmp_path):
    options = ["--algorithm", algorithm, "--checkpoint-every", "1"]
    run(tmp_path / "whole", *options)
    run(tmp_path / "halves", *options, "--epochs", "1")
    train.main(["--out", str(tmp_path / "halves"), "--resume", "--epochs", "2", "--device", "cpu"])
    lines = []
    for name in ("whole", "halves"):
        text = (tmp_path / name / "metrics.jsonl").read_text()
        lines.append([json.loads(line) for line in text.splitlines()])
    assert len(lines[0]) == len(lines[1]) == 2
    for one, other in zip(*lines, strict=True):
        assert one["first_ratio_error"] == 0
        for key in ("reward_mean", "loss", "grad_norm", "approx_kl"):
            assert one[key] == other[key], key


class CountsRows(NoisePerStep):
    """A network whose answer depends on how many rows it is asked at once, as kernels' do."""

    def forward(self, x, timesteps, context):
        return super().forward(x, timesteps, context) * (1 + len(x) / 1000)


@pytest.mark.parametrize("algorithm, begins_at_1", [(DDPO, False), (Recomputed, True)])
def test_recomputed_ratios_begin_at_exactly_1_whatever_the_batches(algorithm, begins_at_1):
    """Four pictures sampled at once, three pairs a micro-batch; the second update's too."""
    sampler = Sampler(SCHEDULE, 4, 1.0)
    policy, noise = BarePolicy(CountsRows(sampler), sampler), normal(4, 5, 4, 1, 1, seed=1)
    condition = (torch.zeros(4, 1, 1), policy.uncond())
    trajectories = sample(policy.network, sampler, *condition, noise, 1.0)
    before = trajectories.latents.clone()
    chosen = algorithm(choices(batch_size=2))
    chosen.settings.micro_batch = 3
    for batch in chosen.batches(policy, [trajectories], ["x"] * 4, torch.ones(4), NAME):
        pieces = [batch[start : start + 3] for start in range(0, len(batch), 3)]
        logged = [chosen.losses(policy, piece)[1]["log_ratio"] for piece in pieces]
        assert bool(torch.cat(logged).abs().max() == 0) == begins_at_1
    assert len(batch) == 2 * 4 and torch.equal(trajectories.latents, before)
