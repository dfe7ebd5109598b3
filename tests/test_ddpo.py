"""ddpo.py against oracles that share no code with it.

They are closed forms of Gaussian problems, torch.distributions, diffusers, and numbers by hand. The
closed forms use DDPM's posterior, which DDIM with eta = 1 equals but is written quite differently.
"""

import ast
import copy
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Normal

import ddpo
from ddpo import (
    DDPO,
    DDPOScoreFunction,
    Pairs,
    Policy,
    PromptStatistics,
    Trajectories,
    all_pairs,
    guided_noise,
    normalize_advantages,
    optimizer_step,
    policy_log_prob,
    policy_mean_std,
    ppo_loss,
    predict_noise,
    reinforce_loss,
    sample,
)
from helpers import (
    CPU,
    SD,
    TOY,
    BarePolicy,
    ConstantNoise,
    Decoder,
    NoisePerPrompt,
    Recorder,
    TextEncoder,
    Tokenizer,
    choices,
    named_noises,
    normal,
    posterior_steps,
    relative,
    small_unet,
)
from scheduler import (
    NoiseSchedule,
    Sampler,
    UserError,
    add_noise,
    ddim_mean_std,
    ddim_std,
    gaussian_log_prob,
    named_noise,
    predicted_x0,
)

ESTIMATORS = {"ddpo-sf": DDPOScoreFunction, "ddpo-is": DDPO}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small are slower on several threads, ten times so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def oracle_log_probs(unet, schedule, trajectories, uncond, guidance):
    """log p of all recorded actions, (B, T).

    One big batch in float64, guidance by two passes, DDPM's posterior, torch.distributions.
    """
    T, B = len(trajectories.timesteps), len(trajectories)
    latents, cond = trajectories.latents.double(), trajectories.prompt_embeds.double()
    log_probs = []
    for i, step in enumerate(posterior_steps(schedule, T)):
        t, x_t = torch.full((B,), step.t), latents[:, i]
        without = unet(x_t, t, uncond.double().repeat(B, 1, 1))
        eps = guidance * unet(x_t, t, cond) + (1 - guidance) * without
        policy = Normal(step.a * x_t + step.b * eps, math.sqrt(step.variance))
        log_probs.append(policy.log_prob(latents[:, i + 1]).flatten(1).mean(1))
    return torch.stack(log_probs, 1)


def oracle_ppo(ratio, advantages, c):
    """PPO's loss in its other form: a bonus is capped on the side that the advantage pushes to."""
    capped = torch.where(advantages >= 0, ratio.clamp(max=1 + c), ratio.clamp(min=1 - c))
    return -capped * advantages


def toy_rollout(net, B, T, seed=0, context=None, uncond=None, guidance=1):
    noise = normal(B, T + 1, 4, 1, 1, seed=seed)
    context = torch.zeros(B, 1, 1) if context is None else context
    uncond = torch.zeros(1, 1, 1) if uncond is None else uncond
    return sample(net, Sampler(TOY, T, 1.0), context, uncond, noise, guidance)


def train_on(
    policy,
    trajectories,
    advantages,
    samples=None,
    algorithm="ddpo-sf",
    lr=0.0,
    limit=math.inf,
    **more,
):
    """One optimizer step of `algorithm` on all pairs of some trajectories -> metrics."""
    micro_batch, optimizer = more.pop("micro_batch", 10**6), more.pop("optimizer", None)
    samples = torch.arange(len(trajectories)) if samples is None else torch.tensor(samples)
    weights = [p for p in policy.unet.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.SGD(weights, lr=lr)
    pairs = all_pairs(trajectories, samples, advantages)
    learner = ESTIMATORS[algorithm](choices(**more))
    return optimizer_step(policy, learner, optimizer, pairs, micro_batch, limit)


def toy_policy(net, T=3):
    return BarePolicy(net, Sampler(TOY, T, 1.0))


@dataclass
class Rollout:
    """A real UNet's rollout on 8x8 latents, guidance 5, with advantages of both signs."""

    policy: BarePolicy
    trajectories: Trajectories
    advantages: torch.Tensor

    @property
    def net(self):
        return self.policy.unet

    @property
    def uncond(self):
        return self.policy.uncond()

    def train(self, micro_batch, **more):
        """An update of DDPO_IS -> metrics."""
        more = {"algorithm": "ddpo-is", "lr": 0.01, "clip_range": 0.02, "guidance": 5.0, **more}
        more["micro_batch"] = micro_batch
        return train_on(self.policy, self.trajectories, self.advantages, **more)

    def moved(self, net):
        """The same trajectories, other weights."""
        policy = BarePolicy(net, self.policy.sampler, self.policy.embeds)
        return Rollout(policy, self.trajectories, self.advantages)


def unet_rollout(B=5, T=3, schedule=None, cls=Sampler):
    net = small_unet()
    sampler = cls(schedule or NoiseSchedule.from_config(SD), T, 1.0)
    g = torch.Generator().manual_seed(1)
    cond, uncond = torch.randn(B, 7, 16, generator=g), torch.randn(7, 16, generator=g)
    noise = named_noises((4, 8, 8), T + 1, [(0, 0, i) for i in range(B)])
    trajectories = sample(net, sampler, cond, uncond[None], noise, 5.0)
    advantages = torch.tensor([1.5, -0.7, 0.3, -2.0, 0.9, -0.2, 1.1])[:B]
    return Rollout(BarePolicy(net, sampler, {"": uncond}), trajectories, advantages)


def moved(net, size=0.003):
    """A copy whose weights are off by relative noise, so that ratios aren't 1."""
    net = copy.deepcopy(net)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1 + size * torch.randn(p.shape, generator=g))
    return net


def flat_grad(net):
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def flat_weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


# ---- 1. The gradient is that of E[r] -------------------------------------------------------------

THETA, TARGET = [0.5, -0.3, 0.8, -1.0], torch.tensor([1.0, 0.5, -0.5, 0.2])


def x0_given_constant_noise(T):
    """(K, V): x_0 ~ N(K theta, V I) when eps = theta."""
    K, V = 0.0, 1.0
    for step in posterior_steps(TOY, T):
        K = step.a * K + step.b
        V = step.a**2 * V + step.variance
    return K, V


def linear(x):
    return x @ TARGET


def mean_linear(K, V, theta):
    """E[r], and its gradient with respect to theta."""
    return K * theta @ TARGET.double(), K * TARGET.double()


def quadratic(x):
    return -(x - TARGET).square().sum(1)


def mean_quadratic(K, V, theta):
    off = K * theta - TARGET.double()
    return -off.square().sum() - 4 * V, -2 * K * off


REWARDS = {"linear": (linear, mean_linear), "quadratic": (quadratic, mean_quadratic)}


def gradient_estimates(T, reward, algorithm="ddpo-sf", groups=100, size=2000):
    """Monte Carlo gradients through `sample` and an update, (groups, 4), and the exact one (4,)."""
    net, (K, V) = ConstantNoise(THETA), x0_given_constant_noise(T)
    function, closed_form = REWARDS[reward]
    mean_reward, gradient = closed_form(K, V, torch.tensor(THETA).double())
    trajectories = toy_rollout(net, groups * size, T)
    # Any constant baseline leaves the gradient's mean alone; E[r] makes it less noisy.
    advantages = function(trajectories.latents[:, -1].flatten(1)) - mean_reward.float()
    estimates = []
    for samples in torch.arange(groups * size).split(size):
        train_on(toy_policy(net, T), trajectories, advantages, samples.tolist(), algorithm)
        estimates.append(net.theta.grad.flatten().double())
    # The loss is minus the objective, log p a mean over D = 4 dimensions, losses one over T steps.
    D = 4
    return torch.stack(estimates), -gradient / (D * T)


def agrees(estimates, truth):
    """Every component within 4 standard errors."""
    standard_error = estimates.std(0) / math.sqrt(len(estimates))
    return bool(((estimates.mean(0) - truth).abs() <= 4 * standard_error).all())


@pytest.mark.parametrize("T", [1, 2, 3])
def test_rollout_with_constant_noise_has_the_closed_form_mean_and_variance(T):
    K, V = x0_given_constant_noise(T)
    x = toy_rollout(ConstantNoise(THETA), 100_000, T).latents[:, -1].flatten(1).double()
    assert ((x.mean(0) - K * torch.tensor(THETA)).abs() < 4 * math.sqrt(V / 100_000)).all()
    assert ((x.var(0) / V - 1).abs() < 4 * math.sqrt(2 / 100_000)).all()


@pytest.mark.parametrize("algorithm", ESTIMATORS)
@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize("T", [1, 2, 3])
def test_gradient_is_the_analytic_gradient_of_the_expected_reward(T, reward, algorithm):
    estimates, truth = gradient_estimates(T, reward, algorithm)
    assert (estimates.std(0) / math.sqrt(len(estimates)) <= 0.02 * truth.norm()).all()
    assert agrees(estimates, truth)


@pytest.mark.parametrize("factor", [-1, 4, 3, 1 / 4], ids=["sign", "D", "T", "one over D twice"])
def test_a_loss_with_a_wrong_sign_or_factor_fails_the_same_check(factor, monkeypatch):
    def wrong(log_prob, advantages):
        return -factor * advantages * log_prob

    monkeypatch.setattr(ddpo, "reinforce_loss", wrong)
    assert not agrees(*gradient_estimates(3, "quadratic"))


# ---- 2. Both algorithms find the optimum ---------------------------------------------------------


@pytest.mark.parametrize("algorithm, batch_size", [("ddpo-sf", 256), ("ddpo-is", 64)])
def test_training_reaches_the_optimum_of_every_prompt_through_guidance(algorithm, batch_size):
    """Two prompts, rewards of very different scales: by common statistics one would not learn."""
    B, guidance, epochs = 256, 3.0, 150
    targets = torch.tensor([[2.0, -1.0, 0.6, 0.0], [-1.2, 0.8, 0.0, 1.8]])
    scale, offset = torch.tensor([1000.0, 1.0]), torch.tensor([0.0, 500.0])
    K, _ = x0_given_constant_noise(2)
    net, which = NoisePerPrompt(2), torch.arange(B) % 2
    # eps_uncond isn't 0: guidance must be undone
    context, uncond = torch.eye(2)[which][:, None], torch.tensor([[0.5, 0.0]])
    prompts = [f"prompt {i}" for i in which]
    policy = BarePolicy(net, Sampler(TOY, 2, 1.0), {"": uncond})
    numbers = {"batch_size": batch_size, "history_size": 64, "clip_range": 0.05}
    learner = ESTIMATORS[algorithm](choices(**numbers, guidance=guidance))
    optimizer, history = torch.optim.Adam(net.parameters(), lr=0.03), []
    for epoch in range(epochs):
        rollout = toy_rollout(net, B, 2, epoch, context, uncond[None], guidance)
        records = [learner.record(rollout)]
        x0 = rollout.latents[:, -1].flatten(1)
        rewards = offset[which] - scale[which] * (x0 - targets[which]).square().sum(1)
        weights = learner.weights(prompts, rewards)
        for batch in learner.batches(policy, records, prompts, weights, [epoch]):
            optimizer_step(policy, learner, optimizer, batch, 300, 1.0)
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - epoch / epochs)
        history.append(net.theta.detach().clone())
    theta = torch.stack(history[-50:]).mean(0)  # the average is less noisy than the last one
    guided = guidance * theta + (1 - guidance) * 0.5 * theta[0]
    assert relative(guided, targets / K) < 0.15  # it started from 0, where this is 1
    assert (guided - targets / K).abs().max() < 0.15


# ---- 3. The ratio before the first update is 1 ---------------------------------------------------


class LargeVariance(Sampler):
    """A sampler of another kind: DDPM's mean, and the larger of Ho et al.'s variances."""

    def mean_std(self, eps, x_t, timesteps):
        alpha_bar_t, alpha_bar_prev = self.alpha_bar(timesteps)
        mean, _ = ddim_mean_std(eps, x_t, alpha_bar_t, alpha_bar_prev, self.eta)
        return mean, (1 - alpha_bar_t / alpha_bar_prev).sqrt()


@pytest.mark.parametrize("cls", [Sampler, LargeVariance])
def test_ratio_is_exactly_1_before_the_first_update_at_the_rollouts_batch_size(cls):
    rollout = unet_rollout(B=7, cls=cls)
    assert rollout.train(micro_batch=7)["first_ratio_error"].item() == 0.0
    # and not any more after it
    assert rollout.train(micro_batch=7)["first_ratio_error"].item() > 1e-4


@pytest.mark.parametrize("micro_batch", [1, 3, 7, 21])
def test_ratio_is_1_to_rounding_at_any_micro_batch(micro_batch):
    metrics = unet_rollout(B=7).train(micro_batch)
    assert metrics["first_ratio_error"].item() <= 1e-5


def test_a_sampler_of_another_kind_acts_and_is_scored_by_its_own_gaussian():
    """Its std is in the noise that is added, and in log p at sampling and training alike."""
    rollout, usual = unet_rollout(cls=LargeVariance), unet_rollout()
    ours, schedule = rollout.trajectories, rollout.policy.sampler.schedule
    x_T, t = ours.latents[:, 0], ours.timesteps[0].expand(5)
    assert torch.equal(x_T, usual.trajectories.latents[:, 0])
    now, after = schedule.alphas_bar[667].double(), schedule.alphas_bar[334].double()
    large, small = (1 - now / after).sqrt(), ddim_std(now, after, 1.0)
    noise = named_noises((4, 8, 8), 4, [(0, 0, i) for i in range(5)])
    difference = ours.latents[:, 1] - usual.trajectories.latents[:, 1]
    torch.testing.assert_close(
        difference, (large - small) * noise[:, 1], check_dtype=False, rtol=1e-3, atol=1e-4
    )
    expected = (
        -noise[:, 1].square().flatten(1).mean(1) / 2 - large.log() - math.log(2 * math.pi) / 2
    )
    torch.testing.assert_close(ours.log_probs[:, 0], expected.float(), rtol=0, atol=2e-5)
    for k in range(3):
        actions = (ours, torch.arange(5), torch.full((5,), k))
        again = policy_log_prob(rollout.net, rollout.policy.sampler, *actions, rollout.uncond, 5.0)
        assert torch.equal(again, ours.log_probs[:, k])
    with torch.no_grad():
        eps = predict_noise(rollout.net, x_T, t, ours.prompt_embeds, rollout.uncond, 5.0)
    mean, std = rollout.policy.sampler.mean_std(eps, x_T, t)
    assert torch.equal(ours.latents[:, 1], mean + std.view(5, 1, 1, 1) * noise[:, 1])


# ---- 4. Gradient accumulation --------------------------------------------------------------------


@dataclass
class OffPolicy:
    """A rollout, weights that have moved since, and what one float64 batch of the oracle gives."""

    rollout: Rollout
    ratio: torch.Tensor
    loss: float
    gradient: torch.Tensor

    def fresh(self):
        """The same, its weights its own."""
        return self.rollout.moved(copy.deepcopy(self.rollout.net))


@pytest.fixture(scope="module")
def off_policy():
    rollout = unet_rollout(schedule=TOY)  # its last sigma isn't tiny: little rounding
    trajectories = rollout.trajectories
    trajectories.log_probs += 0.03 * normal(5, 3, seed=2)
    rollout = rollout.moved(moved(rollout.net))
    exact = copy.deepcopy(rollout.net).double()
    now = oracle_log_probs(exact, TOY, trajectories, rollout.uncond, 5.0)
    ratio = (now - trajectories.log_probs).exp()
    loss = oracle_ppo(ratio, rollout.advantages[:, None].double(), 0.02).mean()
    loss.backward()
    return OffPolicy(rollout, ratio.detach(), loss.item(), flat_grad(exact))


def test_off_policy_problem_has_ratios_on_both_sides_of_the_clip(off_policy):
    change = off_policy.ratio - 1
    assert (change > 0.02).sum() >= 2 and (change < -0.02).sum() >= 2
    assert (change.abs() < 0.02).sum() >= 2
    assert (change.abs() - 0.02).abs().min() > 1e-4  # none so near that rounding decides


@pytest.mark.parametrize("micro_batch", [1, 3, 5, 15])
def test_accumulated_gradient_is_that_of_one_big_batch(off_policy, micro_batch):
    rollout = off_policy.fresh()
    metrics = rollout.train(micro_batch)
    error = (off_policy.ratio - 1).abs().max().item()
    assert relative(flat_grad(rollout.net), off_policy.gradient) < 2e-5
    assert metrics["loss"].item() == pytest.approx(off_policy.loss, abs=1e-5)
    norm = off_policy.gradient.norm().item()
    assert metrics["grad_norm"].item() == pytest.approx(norm, rel=1e-5)
    assert metrics["first_ratio_error"].item() == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("micro_batch", [1, 3, 5])
def test_micro_batch_does_not_change_an_sgd_step(off_policy, micro_batch):
    cut, whole = off_policy.fresh(), off_policy.fresh()
    cut.train(micro_batch)
    whole.train(15)
    assert relative(flat_grad(cut.net), flat_grad(whole.net)) < 2e-5
    assert relative(flat_weights(cut.net), flat_weights(whole.net)) < 1e-6
    # a step was taken at all
    assert relative(flat_weights(whole.net), flat_weights(off_policy.rollout.net)) > 1e-4


@pytest.mark.parametrize("micro_batch", [1, 3, 5])
def test_micro_batch_does_not_change_an_adamw_step(off_policy, micro_batch):
    """Adam's first step is lr * sign(g): only where g is rounding noise may it differ."""
    cut, whole, lr = off_policy.fresh(), off_policy.fresh(), 1e-4
    for rollout, size in ((cut, micro_batch), (whole, 15)):
        optimizer = torch.optim.AdamW(rollout.net.parameters(), lr=lr)
        rollout.train(size, optimizer=optimizer)
    difference = (flat_weights(cut.net) - flat_weights(whole.net)).abs() / lr
    assert (difference > 1e-2).double().mean() < 1e-3


def test_order_of_a_minibatch_does_not_change_its_gradient_and_others_have_no_part_in_it():
    net, gradients = ConstantNoise(THETA), []
    advantages = torch.tensor([math.nan, 1.0, -2.0, math.nan, 0.5, math.nan])
    for samples in ([1, 4, 2], [4, 2, 1]):
        trajectories = toy_rollout(net, 6, 3)
        trajectories.latents[[0, 3, 5]] = math.nan
        train_on(toy_policy(net), trajectories, advantages, samples, micro_batch=2)
        gradients.append(net.theta.grad.clone())
    assert gradients[0].isfinite().all() and torch.allclose(*gradients, rtol=1e-5)


# ---- 5. Guidance ---------------------------------------------------------------------------------


def test_guided_noise_is_equation_3():
    cond, uncond = normal(2, 3, 4, 5, 5)
    for w in (0.0, 1.0, 5.0, 7.5, -1.0):
        expected = w * cond + (1 - w) * uncond
        torch.testing.assert_close(guided_noise(uncond, cond, w), expected, rtol=1e-5, atol=1e-5)
    # by hand: 5 * 3 - 4 * 2
    assert guided_noise(torch.tensor(2.0), torch.tensor(3.0), 5.0).item() == 7.0


def prediction_problem():
    """A recorded UNet, and what it is asked -> net, (x, timesteps, cond), uncond."""
    rollout = unet_rollout()
    t = torch.tensor([981, 1, 500, 1, 7])
    inputs = (rollout.trajectories.latents[:, 0], t, rollout.trajectories.prompt_embeds)
    return Recorder(rollout.net), inputs, rollout.uncond


@torch.no_grad()
def test_predict_noise_in_one_pass_equals_two_separate_passes():
    net, inputs, uncond = prediction_problem()
    plain = net.net(*inputs)
    separate = 5.0 * plain - 4.0 * net.net(*inputs[:2], uncond.repeat(5, 1, 1))
    together = predict_noise(net, *inputs, uncond, 5.0)
    assert net.batches == [10]
    assert (separate - plain).abs().max() > 0.1  # the prompt does matter here
    torch.testing.assert_close(together, separate, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_guidance_1_is_the_plain_conditional_model_at_half_the_cost():
    net, inputs, uncond = prediction_problem()
    expected = net.net(*inputs)
    plain = predict_noise(net, *inputs, uncond, 1.0)
    nearly = predict_noise(net, *inputs, uncond, 1.0 + 1e-7)
    assert net.batches == [5, 10]
    assert torch.equal(plain, expected)
    torch.testing.assert_close(nearly, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_guidance_0_is_the_unconditional_model():
    net, inputs, uncond = prediction_problem()
    expected = net.net(*inputs[:2], uncond.repeat(5, 1, 1))
    unguided = predict_noise(net, *inputs, uncond, 0.0)
    torch.testing.assert_close(unguided, expected, rtol=1e-4, atol=1e-4)


def test_predicted_noise_is_float32_however_the_network_computes():
    net, x = small_unet().bfloat16(), torch.zeros(2, 4, 8, 8, dtype=torch.bfloat16)
    context, t = torch.zeros(2, 7, 16, dtype=torch.bfloat16), torch.tensor([1, 1])
    for guidance in (1.0, 5.0):
        eps = predict_noise(net, x, t, context, context[:1], guidance)
        assert eps.dtype == torch.float32


# ---- 6. The losses -------------------------------------------------------------------------------

HAND = [  # advantage, ratio, loss, slope: clip range 0.2; d loss / d log p = - A ratio, or 0
    (2.0, 1.5, -2.4, 0.0),  # good action, already likelier: capped at 1.2, no gradient
    (2.0, 0.5, -1.0, -1.0),  # good action that became unlikelier: the minimum keeps the gradient
    (-2.0, 1.5, 3.0, 3.0),  # bad action that became likelier: kept
    (-2.0, 0.5, 1.6, 0.0),  # bad action, already unlikelier: capped at 0.8, no gradient
    (3.0, 1.1, -3.3, -3.3),
    (-3.0, 0.9, 2.7, 2.7),
    (0.0, 1.5, 0.0, 0.0),
]


@pytest.mark.parametrize("advantage, ratio, loss, slope", HAND)
def test_ppo_loss_by_hand(advantage, ratio, loss, slope):
    old = torch.tensor([-1.3])
    log_prob = (old + math.log(ratio)).requires_grad_()
    value, ratios = ppo_loss(log_prob, old, torch.tensor([advantage]), 0.2)
    value.sum().backward()
    assert value.item() == pytest.approx(loss, rel=1e-5)
    assert ratios.item() == pytest.approx(ratio, rel=1e-5)
    assert log_prob.grad.item() == pytest.approx(slope, rel=1e-5)
    assert slope != 0 or log_prob.grad.item() == 0.0  # exactly


FLOATS = {"allow_nan": False, "width": 32}
BOUNDED = (st.floats(-2, 2, **FLOATS), st.floats(-5, 5, **FLOATS), st.floats(-10, 10, **FLOATS))


@settings(deadline=None, derandomize=True)
@given(*BOUNDED, st.floats(1e-4, 0.5))
def test_ppo_loss_equals_its_other_form(shift, old, advantage, clip_range):
    old, advantage = torch.tensor([old]), torch.tensor([advantage])
    loss, ratio = ppo_loss(old + shift, old, advantage, clip_range)
    expected = math.exp((old + shift - old).item())
    assert ratio.item() == pytest.approx(expected, rel=1e-5)
    other = oracle_ppo(ratio, advantage, clip_range)
    torch.testing.assert_close(loss, other, rtol=1e-6, atol=1e-6)
    # pessimistic: never better than the unclipped objective
    assert loss.item() >= -ratio.item() * advantage.item() - 1e-5


def test_reinforce_loss_by_hand():
    log_prob = torch.tensor([-1.0, 2.0, 0.5], requires_grad=True)
    loss = reinforce_loss(log_prob, torch.tensor([2.0, -3.0, 0.0]))
    loss.sum().backward()
    assert loss.tolist() == [2.0, 6.0, 0.0]
    assert log_prob.grad.tolist() == [-2.0, 3.0, 0.0]


def test_equations_are_functions_of_their_tensors_wherever_these_are():
    """On "meta" there are no numbers: what asked a device for one, or made its own, would fail."""
    with torch.device("meta"):
        a, b, rows = torch.empty(3, 4, 2, 2), torch.empty(3, 4, 2, 2), torch.rand(3)
    results = [
        add_noise(a, b, rows),
        predicted_x0(a, b, rows),
        ddim_std(rows, rows, 1.0),
        *ddim_mean_std(a, b, rows, rows, 1.0),
        gaussian_log_prob(a, b, rows),
        guided_noise(a, b, 5.0),
        normalize_advantages(rows, rows, rows),
        reinforce_loss(rows, rows),
        *ppo_loss(rows, rows, rows, 0.1),
        ddpo.denoising_loss(a, b, rows),
    ]
    assert {result.device.type for result in results} == {"meta"}
    assert [tuple(result.shape) for result in results[-5:]] == [(3,)] * 5


@pytest.mark.parametrize("module", ["ddpo", "scheduler"])
def test_the_mathematics_imports_neither_settings_nor_networks_nor_rewards(module):
    tree = ast.parse((Path(ddpo.__file__).parent / f"{module}.py").read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    assert "torch" in names
    assert not names & {"train", "rewards", "unet", "transformers", "diffusers", "argparse"}


# ---- 7. Advantages -------------------------------------------------------------------------------


def updated(statistics, prompts, rewards):
    """An epoch's rewards taken in -> mean and std for each of its samples."""
    statistics.remember(prompts, rewards)
    return statistics.mean_std(prompts, rewards)


def test_statistics_are_of_the_last_size_rewards_of_each_prompt_this_epoch_included():
    statistics = PromptStatistics(size=3, min_count=2)
    mean, std = updated(statistics, ["a", "a", "b", "b"], torch.tensor([1.0, 3.0, 10.0, 30.0]))
    assert mean.tolist() == [2, 2, 20, 20]
    assert std.tolist() == [1, 1, 10, 10]  # population std: divided by n
    mean, std = updated(statistics, ["a", "b", "a"], torch.tensor([5.0, 20.0, 1.0]))
    # a: 3 5 1, the first 1 is forgotten; b: 10 30 20
    assert mean.tolist() == pytest.approx([3, 20, 3])
    expected = [math.sqrt(8 / 3), math.sqrt(200 / 3), math.sqrt(8 / 3)]
    assert std.tolist() == pytest.approx(expected)


def test_a_prompt_with_few_rewards_is_normalised_by_the_whole_batch():
    statistics = PromptStatistics(size=8, min_count=3)
    mean, std = updated(statistics, ["a", "a", "a", "b"], torch.tensor([1.0, 2.0, 3.0, 10.0]))
    assert mean.tolist() == [2, 2, 2, 4]
    # (9 + 4 + 1 + 36) / 4
    assert std.tolist() == pytest.approx([math.sqrt(2 / 3)] * 3 + [math.sqrt(12.5)])
    # now it has three: 10 4 4
    mean, std = updated(statistics, ["b", "b"], torch.tensor([4.0, 4.0]))
    assert mean.tolist() == [6, 6] and std.tolist() == pytest.approx([math.sqrt(8)] * 2)


def test_paper_defaults_are_the_last_32_rewards_used_from_16_on():
    statistics = PromptStatistics()
    mean, _ = updated(statistics, ["a"] * 15 + ["b"], torch.tensor([0.0] * 15 + [32.0]))
    assert mean.tolist() == [2.0] * 16  # 15 rewards: still the batch's mean
    mean, _ = updated(statistics, ["a"], torch.tensor([32.0]))
    assert mean.tolist() == [2.0]  # 16: their own mean
    mean, _ = updated(statistics, ["a"] * 17, torch.zeros(17))
    assert mean.tolist() == [1.0] * 17  # 33: one 0 is forgotten, 32 / 32


def test_statistics_can_be_asked_without_being_told():
    """Of a prompt never heard of, and of another that was: asking changes nothing."""
    statistics = PromptStatistics(size=4, min_count=2)
    statistics.remember(["a", "a"], torch.tensor([1.0, 3.0]))
    mean, std = statistics.mean_std(["new", "a"], torch.tensor([5.0, 9.0]))
    assert mean.tolist() == [7.0, 2.0] and std.tolist() == [2.0, 1.0]
    assert statistics.history == {"a": [1.0, 3.0]}


def test_advantages_by_hand_and_clipped():
    rewards = torch.tensor([5.0, 1.0, 1e3, -1e3, 7.0])
    mean, std = torch.tensor([[3.0, 3.0, 0.0, 0.0, 7.0], [1.0, 4.0, 2.0, 2.0, 0.0]])
    advantages = normalize_advantages(rewards, mean, std)
    assert advantages.tolist() == pytest.approx([2, -0.5, 10, -10, 0], rel=1e-5)
    advantages = normalize_advantages(rewards, mean, std, limit=5.0)
    assert advantages.tolist() == pytest.approx([2, -0.5, 5, -5, 0], rel=1e-5)


def test_rewards_that_hardly_differ_are_not_blown_up():
    """1e-6 is added to the deviation: a spread of 1e-6 counts half."""
    advantages = normalize_advantages(torch.tensor([1e-6]), torch.zeros(1), torch.tensor([1e-6]))
    assert advantages.item() == pytest.approx(0.5, rel=1e-5)


@settings(deadline=None, derandomize=True)
@given(st.floats(-1e6, 1e6, **FLOATS), st.integers(1, 40))
def test_a_constant_reward_gives_advantage_0(reward, count):
    rewards = torch.full((count,), reward)
    mean, std = updated(PromptStatistics(size=16, min_count=8), ["a"] * count, rewards)
    assert normalize_advantages(rewards, mean, std).tolist() == [0.0] * count


def test_statistics_survive_a_round_trip_through_json():
    first, second = (PromptStatistics(size=4, min_count=2) for _ in range(2))
    rewards = torch.tensor([0.1, 2.0, 3.3, 4.0, 5.0, 6.0])
    first.remember(["a", "b", "a", "a", "a", "a"], rewards)
    second.history = json.loads(json.dumps(first.history))
    assert second.history == first.history
    # the buffer's length is remembered too: "a" has one to forget
    for statistics in (first, second):
        assert updated(statistics, ["a"], torch.tensor([7.0]))[0].tolist() == [5.5]


def test_statistics_refuse_rewards_that_do_not_match_the_prompts():
    with pytest.raises(ValueError):
        PromptStatistics().remember(["a", "b"], torch.zeros(3))


# ---- 8. Sampling ---------------------------------------------------------------------------------


def test_rollouts_hold_float32_latents_from_noise_to_x0_and_their_normal_log_probs():
    rollout = unet_rollout()
    ours, schedule = rollout.trajectories, rollout.policy.sampler.schedule
    assert ours.latents.shape == (5, 4, 4, 8, 8) and ours.log_probs.shape == (5, 3)
    assert len(ours) == 5 and ours.timesteps.tolist() == [667, 334, 1]
    assert ours.latents.dtype == ours.log_probs.dtype == torch.float32
    assert not ours.latents.requires_grad and not ours.log_probs.requires_grad
    assert torch.equal(ours.latents[2, 0], named_noise((4, 8, 8), 4, 0, 0, 2)[0])
    exact = copy.deepcopy(rollout.net).double()
    with torch.no_grad():
        expected = oracle_log_probs(exact, schedule, ours, rollout.uncond, 5.0)
    torch.testing.assert_close(ours.log_probs.double(), expected, rtol=0, atol=2e-5)


def test_log_probs_are_recomputed_for_any_pairs_in_any_order():
    rollout = unet_rollout()
    ours, sampler = rollout.trajectories, rollout.policy.sampler
    i, k = torch.tensor([4, 0, 2, 2, 1, 4]), torch.tensor([2, 0, 1, 2, 0, 0])
    log_prob = policy_log_prob(rollout.net, sampler, ours, i, k, rollout.uncond, 5.0)
    assert log_prob.requires_grad
    expected = ours.log_probs[i, k]
    torch.testing.assert_close(log_prob.detach(), expected, rtol=0, atol=2e-5)


def test_the_policys_gaussian_in_recorded_states_is_the_posterior_with_gradient():
    rollout = unet_rollout(schedule=TOY)
    ours, sampler, net = rollout.trajectories, rollout.policy.sampler, rollout.net
    i, k = torch.tensor([4, 0, 2, 2, 1]), torch.tensor([2, 0, 1, 2, 0])
    mean, std = policy_mean_std(net, sampler, ours, i, k, rollout.uncond, 5.0)
    steps = posterior_steps(TOY, 3)
    assert std.tolist() == pytest.approx([math.sqrt(steps[n].variance) for n in k], rel=1e-5)
    for row, (n, m) in enumerate(zip(i, k, strict=True)):
        x_t, t = ours.latents[n, m][None], torch.tensor([steps[m].t])
        with torch.no_grad():
            eps = 5.0 * net(x_t, t, ours.prompt_embeds[n][None]) - 4.0 * net(x_t, t, rollout.uncond)
        expected = steps[m].a * x_t + steps[m].b * eps
        torch.testing.assert_close(mean[row : row + 1].detach(), expected, rtol=1e-4, atol=1e-4)
    assert mean.requires_grad and not std.requires_grad


@pytest.mark.parametrize("split", [[6], [2, 4], [1] * 6, [5, 1]], ids=str)
def test_samples_depend_on_their_names_not_on_the_batch(split):
    net, sampler = small_unet(), Sampler(NoiseSchedule.from_config(SD), 3, 1.0)
    cond = normal(6, 7, 16, seed=1)

    def rollout(indices):
        noise = named_noises((4, 8, 8), 4, [(42, 3, i) for i in indices])
        return sample(net, sampler, cond[indices], torch.zeros(1, 7, 16), noise, 5.0)

    whole = rollout(list(range(6)))
    parts = [rollout(part.tolist()) for part in torch.arange(6).split(split)]
    joined = Trajectories.cat(parts)
    # relative to their size, about 10 here
    difference = (joined.latents - whole.latents).abs().max()
    assert difference < 1e-5 * whole.latents.abs().max()
    torch.testing.assert_close(joined.log_probs, whole.log_probs, rtol=1e-5, atol=2e-5)
    assert torch.equal(joined.prompt_embeds, cond)
    assert torch.equal(joined.timesteps, whole.timesteps)


def test_joined_trajectories_keep_their_order_and_have_timesteps_once():
    def part(b):
        rows = (torch.full((b, 3, 4, 1, 1), float(b)), torch.full((b, 2), -float(b)))
        return Trajectories(*rows, torch.tensor([5, 1]), torch.full((b, 1, 1), 10.0 * b))

    joined = Trajectories.cat([part(2), part(1)])
    assert joined.latents[:, 0, 0, 0, 0].tolist() == [2, 2, 1]
    assert joined.log_probs[:, 1].tolist() == [-2, -2, -1]
    assert joined.prompt_embeds.flatten().tolist() == [20, 20, 10]
    assert joined.timesteps.tolist() == [5, 1] and len(joined) == 3


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("T", [2, 7, 50])
def test_sampling_equals_diffusers_ddim_loop(T, eta):
    net, peer = small_unet(), DDIMScheduler(**SD)
    g = torch.Generator().manual_seed(3)
    cond, uncond = torch.randn(2, 7, 16, generator=g), torch.randn(1, 7, 16, generator=g)
    noise = torch.randn(2, T + 1, 4, 8, 8, generator=g)
    sampler = Sampler(NoiseSchedule.from_config(SD), T, eta)

    ours = sample(net, sampler, cond, uncond, noise, 5.0)
    peer.set_timesteps(T)
    assert peer.timesteps.tolist() == ours.timesteps.tolist()
    x = noise[:, 0]
    with torch.no_grad():
        for i, t in enumerate(peer.timesteps):
            without = net(x, t.expand(2), uncond.repeat(2, 1, 1))
            eps = 5.0 * net(x, t.expand(2), cond) - 4.0 * without
            x = peer.step(eps, t, x, eta=eta, variance_noise=noise[:, i + 1]).prev_sample
            assert relative(ours.latents[:, i + 1], x) < 1e-5
    assert (ours.log_probs == 0).all() == (eta == 0)


# ---- 9. What an update reports and does ----------------------------------------------------------

# Log ratios of 4 samples at 3 steps; sample 1 isn't trained on.
DELTAS = [[0.0, 0.05, -0.3], [9.0, 9.0, 9.0], [0.15, -0.05, 0.2], [0.0, 0.12, 0.01]]
USED, ADVANTAGES = [2, 3, 0], torch.tensor([1.0, 100.0, -2.0, 0.5])


@dataclass
class Shifted:
    """Old log-probs displaced by hand so that every ratio is known: exp(DELTAS)."""

    net: nn.Module
    trajectories: Trajectories

    def train(self, algorithm="ddpo-is", **more):
        policy = toy_policy(self.net)
        more = {"clip_range": 0.1, **more}
        return train_on(policy, self.trajectories, ADVANTAGES, USED, algorithm, **more)


@pytest.fixture
def shifted():
    net = ConstantNoise(THETA)
    trajectories = toy_rollout(net, 4, 3)
    trajectories.log_probs = trajectories.log_probs - torch.tensor(DELTAS)
    return Shifted(net, trajectories)


@pytest.mark.parametrize("micro_batch", [1, 2, 9])
def test_ratio_metrics_by_hand(shifted, micro_batch):
    metrics = shifted.train(micro_batch=micro_batch)
    # outside [0.9, 1.1]: 0.15 at step 0; 0.12 at step 1; -0.3 and 0.2 at step 2
    # (exp(0.05) and exp(-0.05) are inside)
    assert metrics["clip_fraction"].item() == pytest.approx(4 / 9)
    used = [d for i in USED for d in DELTAS[i]]
    expected = sum(d * d for d in used) / 9 / 2
    assert metrics["approx_kl"].item() == pytest.approx(expected, rel=1e-3)
    assert metrics["first_ratio_error"].item() == pytest.approx(1 - math.exp(-0.3), rel=1e-4)
    # min(r, 1.1) where A > 0, max(r, 0.9) where A < 0
    e = math.exp
    bonus = 1 * (1 + e(0.05) + e(-0.3)) - 2 * (e(0.15) + e(-0.05) + e(0.2))
    bonus += 0.5 * (1 + 1.1 + e(0.01))
    assert metrics["loss"].item() == pytest.approx(-bonus / 9, rel=1e-4)


def test_loss_of_the_score_function_estimator_by_hand(shifted):
    new = (shifted.trajectories.log_probs + torch.tensor(DELTAS))[USED]
    expected = -(ADVANTAGES[USED, None] * new).mean().item()
    metrics = shifted.train("ddpo-sf")
    assert metrics["loss"].item() == pytest.approx(expected, rel=1e-4)
    # reported all the same: how far a stale policy would be
    assert metrics["clip_fraction"].item() == pytest.approx(4 / 9)


def gradient_by_hand(trajectories, clip_range):
    """-mean over pairs of A r dlogp/dtheta, 0 where the clip holds. -> (4,)

    dlogp/dtheta_j = b (x_{t-1} - mean)_j / (4 variance).
    """
    total, latents = np.zeros(4), trajectories.latents.flatten(2).double().numpy()
    for i in USED:
        for k, step in enumerate(posterior_steps(TOY, 3)):
            A, ratio = ADVANTAGES[i].item(), math.exp(DELTAS[i][k])
            if A > 0 and ratio > 1 + clip_range or A < 0 and ratio < 1 - clip_range:
                continue
            mean = step.a * latents[i, k] + step.b * np.array(THETA)
            total -= A * ratio * step.b * (latents[i, k + 1] - mean) / (4 * step.variance)
    return total / (3 * len(USED))


@pytest.mark.parametrize("micro_batch", [2, 9])
def test_gradient_and_its_norm_by_hand(shifted, micro_batch):
    metrics = shifted.train(micro_batch=micro_batch)
    expected = gradient_by_hand(shifted.trajectories, 0.1)
    gradient = shifted.net.theta.grad.flatten().tolist()
    assert gradient == pytest.approx(expected.tolist(), rel=1e-4)
    assert metrics["grad_norm"].item() == pytest.approx(np.linalg.norm(expected), rel=1e-4)


def test_gradient_norm_is_reported_before_clipping_and_the_step_is_clipped(shifted):
    expected = gradient_by_hand(shifted.trajectories, 0.1)
    limit = 0.3 * np.linalg.norm(expected)
    metrics = shifted.train(micro_batch=4, lr=1.0, limit=limit)
    assert metrics["grad_norm"].item() == pytest.approx(np.linalg.norm(expected), rel=1e-4)
    step = shifted.net.theta.detach().flatten() - torch.tensor(THETA)
    # the same direction, as long as the limit
    assert step.tolist() == pytest.approx((-0.3 * expected).tolist(), rel=1e-3)


def test_updates_start_from_a_gradient_of_zero(shifted):
    first = shifted.train("ddpo-sf")["grad_norm"]
    assert shifted.train("ddpo-sf")["grad_norm"].item() == first.item()


def test_frozen_weights_stay_and_do_not_count(shifted):
    shifted.net.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    # left over from somewhere: must not enter the norm
    shifted.net.frozen.grad = torch.full((3,), 1e3)
    metrics = shifted.train("ddpo-sf", lr=1.0)
    assert metrics["grad_norm"].item() < 100 and shifted.net.frozen.tolist() == [1, 1, 1]


def test_a_deterministic_last_step_gives_no_gradient_and_no_nan():
    """Where a schedule ends at alpha_bar = 1, std is 0: the other steps' gradient is left."""
    sampler = Sampler(NoiseSchedule(TOY.alphas_bar, 1.0, 3), 3, 1.0)
    net = ConstantNoise(THETA)
    context, noise = torch.zeros(6, 1, 1), normal(6, 4, 4, 1, 1)
    ours = sample(net, sampler, context, context[:1], noise, 1)
    advantages = torch.tensor([1.0, -1.0, 2.0, 0.5, -3.0, 1.0])
    expected, latents = torch.zeros(4), ours.latents.flatten(2)
    for k, step in enumerate(posterior_steps(TOY, 3)[:2]):
        mean = step.a * latents[:, k] + step.b * torch.tensor(THETA)
        score = step.b * (latents[:, k + 1] - mean) / (4 * step.variance)
        expected -= (advantages[:, None] * score).sum(0) / 18
    assert (ours.log_probs[:, 2] == 0).all()
    for algorithm in ESTIMATORS:
        train_on(BarePolicy(net, sampler), ours, advantages, None, algorithm, clip_range=0.1)
        gradient = net.theta.grad.flatten()
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def scaled(shifted, scale, size=1):
    """An update with a GradScaler, advantages `size` times as large -> metrics, the scaler."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    policy = toy_policy(shifted.net)
    optimizer = torch.optim.SGD(shifted.net.parameters(), lr=1.0)
    pairs = all_pairs(shifted.trajectories, torch.tensor(USED), size * ADVANTAGES)
    learner = DDPO(choices(clip_range=0.1))
    return optimizer_step(policy, learner, optimizer, pairs, 4, 0.05, scaler), scaler


def test_a_loss_scaled_for_fp16_changes_neither_gradient_nor_norm_nor_clipping(shifted):
    metrics, scaler = scaled(shifted, 1024.0)
    expected = gradient_by_hand(shifted.trajectories, 0.1)
    norm = np.linalg.norm(expected)
    assert norm > 0.05
    assert metrics["grad_norm"].item() == pytest.approx(norm, rel=1e-4)
    step = shifted.net.theta.detach().flatten() - torch.tensor(THETA)
    assert step.tolist() == pytest.approx((-0.05 * expected / norm).tolist(), rel=1e-3, abs=1e-6)
    assert scaler.get_scale() == 1024.0


def test_an_update_that_overflows_is_skipped_its_norm_0_and_the_scale_halved(shifted):
    metrics, scaler = scaled(shifted, 2.0**100, size=1e20)
    assert metrics["grad_norm"].item() == 0 and metrics["loss"].isfinite()
    assert shifted.net.theta.flatten().tolist() == pytest.approx(THETA)
    assert scaler.get_scale() == 2.0**99


def test_without_a_scaler_a_norm_that_is_not_finite_is_seen(shifted):
    shifted.trajectories.latents[0, 1] = math.inf
    assert not shifted.train("ddpo-sf")["grad_norm"].isfinite()


# ---- 10. Policy: from prompts to pictures --------------------------------------------------------


def tiny_policy(sampler=None, **parts):
    """A Policy on 8x8 latents: a UNet that has learnt nothing, an encoder that is a table."""
    sampler = sampler or Sampler(NoiseSchedule.from_config(SD), 3, 1.0)
    given = {"unet": small_unet(), "vae": Decoder(), "tokenizer": Tokenizer()}
    given = {**given, "text_encoder": TextEncoder(), "device": CPU, "guidance": 5.0, **parts}
    return Policy(sampler=sampler, **given)


def encoded_by_hand(policy, prompt):
    """(m, d): a row of the table for each of the first 7 characters, row 0 for those missing."""
    ids = [ord(character) for character in prompt[:7].ljust(7, "\0")]
    return policy.text_encoder.table[ids].detach().float()


def test_a_copy_of_the_unet_runs_its_own_weights_in_half_precision():
    policy = tiny_policy(dtype=torch.bfloat16)
    other = dataclasses.replace(policy, unet=copy.deepcopy(policy.unet))
    inputs = (normal(2, 4, 8, 8), torch.tensor([981, 1]), normal(2, 7, 16, seed=1))
    before = policy.network(*inputs)
    assert torch.equal(other.network(*inputs), before)
    with torch.no_grad():
        for p in other.unet.parameters():
            p.mul_(1.2)
    with torch.autocast("cpu", torch.bfloat16):
        expected = other.unet(*inputs)
    assert torch.equal(other.network(*inputs), expected)
    assert relative(expected, before) > 0.1
    assert torch.equal(policy.network(*inputs), before)
    assert before.dtype == torch.bfloat16 and before.requires_grad


class Watched(Sampler):
    """Keeps whether autocast was on where the mathematics is done."""

    def mean_std(self, eps, x_t, timesteps):
        self.autocast = [*getattr(self, "autocast", []), torch.is_autocast_enabled("cpu")]
        return super().mean_std(eps, x_t, timesteps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_around_the_networks_and_nothing_else(dtype):
    half = dtype == torch.bfloat16
    unet, sampler = Recorder(small_unet()), Watched(NoiseSchedule.from_config(SD), 3, 1.0)
    policy = tiny_policy(sampler, unet=unet, dtype=dtype)
    [(trajectories, _)] = policy.sample(["a", "b"], [(0,), (1,)], 2)
    assert unet.autocast == [half] * 3 and policy.vae.autocast == [half]
    assert sampler.autocast == [False] * 3
    assert policy.text_encoder.autocast == [False] * 3  # "a", "b", the empty prompt
    for name in ("latents", "log_probs", "prompt_embeds"):
        assert getattr(trajectories, name).dtype == torch.float32
    x, t = trajectories.latents[:, 0], trajectories.timesteps[0].expand(2)
    assert policy.network(x, t, trajectories.prompt_embeds).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_prompts_to_a_loss_the_first_ratios_are_exactly_1(dtype):
    """In half precision, too: the losses call the network as sampling did."""
    policy = tiny_policy(dtype=dtype)
    learner = DDPO(choices(samples_per_epoch=4, batch_size=4, guidance=5.0, min_count=2))
    prompts = ["a", "b", "a", "b"]
    [(trajectories, _)] = policy.sample(prompts, [(0, i) for i in range(4)], 4)
    weights = learner.weights(prompts, torch.tensor([1.0, 2.0, 3.0, 5.0]))
    [batch] = learner.batches(policy, [learner.record(trajectories)], prompts, weights, [7])
    optimizer = torch.optim.SGD(policy.unet.parameters(), lr=0.0)
    metrics = optimizer_step(policy, learner, optimizer, batch, 4, math.inf)
    # rows in another order: the CPU's half-precision kernels do not mind, nor float32's
    assert metrics["first_ratio_error"].item() == 0.0
    assert metrics["grad_norm"] > 0


def test_each_prompt_is_encoded_once_and_rows_keep_their_order():
    policy = tiny_policy()
    prompts = ["b", "a", "b", "", "a cat or a dog"]
    embeds = policy.embed(prompts)
    assert embeds.shape == (5, 7, 16) and not embeds.requires_grad
    for row, prompt in zip(embeds, prompts, strict=True):
        assert torch.equal(row, encoded_by_hand(policy, prompt))
    policy.embed(prompts)
    assert torch.equal(policy.uncond(), embeds[3:4])
    assert sorted(policy.text_encoder.texts) == ["", "a", "a cat o", "b"]


def test_embeddings_are_float32_whatever_the_encoder_computes_in():
    policy = tiny_policy(text_encoder=TextEncoder(dtype=torch.float16))
    assert policy.embed(["a"]).dtype == torch.float32
    assert torch.equal(policy.embed(["a"])[0], encoded_by_hand(policy, "a"))


def test_a_policy_with_another_encoder_has_other_embeddings():
    policy = tiny_policy()
    first, encoder = policy.embed(["a"]), TextEncoder()
    with torch.no_grad():
        encoder.table.mul_(2)
    assert torch.equal(dataclasses.replace(policy, text_encoder=encoder).embed(["a"]), 2 * first)
    assert torch.equal(policy.embed(["a"]), first)


def test_of_2000_prompts_the_last_512_embeddings_are_kept_and_all_are_right():
    policy, prompts = tiny_policy(), [f"{i} cats" for i in range(2000)]
    texts = policy.text_encoder.texts
    for start in range(0, 2000, 100):
        some = prompts[start : start + 100]
        expected = torch.stack([encoded_by_hand(policy, prompt) for prompt in some])
        assert torch.equal(policy.embed(some), expected)
    assert len(texts) == 2000 and policy.encoded.cache_info().currsize == 512
    policy.embed(prompts[-512:])
    assert len(texts) == 2000
    assert torch.equal(policy.embed(prompts[:1])[0], encoded_by_hand(policy, prompts[0]))
    assert texts[2000:] == ["0 cats"]


def test_more_prompts_at_once_than_are_kept():
    policy, prompts = tiny_policy(), [f"{i}" for i in range(700)]
    expected = torch.stack([encoded_by_hand(policy, prompt) for prompt in prompts])
    assert torch.equal(policy.embed(prompts), expected)


@torch.no_grad()
def test_texts_are_cut_and_padded_to_the_tokenizers_length(zoo):
    """With CLIP's own classes, against token ids put together by hand."""
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(zoo / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(zoo / "text_encoder", dtype=torch.float32).eval()
    policy = tiny_policy(tokenizer=tokenizer, text_encoder=encoder)
    long, end = "a red cat and a blue dog " * 9, tokenizer.eos_token_id
    rows = policy.embed([long, long + "and two", "a cat"])
    ids, short = tokenizer(long).input_ids, tokenizer("a cat").input_ids
    assert len(ids) > 16 and len(short) < 16 and ids[-1] == short[-1] == end
    expected = [[*ids[:15], end], [*ids[:15], end], short + [end] * (16 - len(short))]
    expected = encoder(torch.tensor(expected)).last_hidden_state
    assert rows.shape == (3, 16, 128)
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(rows[0], rows[1])


NAMES = [(3, 1, 4), (3, 1, 0), (3, 2, 4), (7,), (3, 1, 9)]  # in no order


def test_policy_samples_batches_in_order_each_sample_by_its_own_name():
    policy, prompts = tiny_policy(), ["a", "b", "a", "", "c"]
    parts = list(policy.sample(prompts, NAMES, 2))
    assert [len(trajectories) for trajectories, _ in parts] == [2, 2, 1]
    whole = Trajectories.cat([trajectories for trajectories, _ in parts])
    noise = named_noises((4, 8, 8), 4, NAMES)
    assert torch.equal(whole.latents[:, 0], noise[:, 0])
    assert torch.equal(whole.prompt_embeds, policy.embed(prompts))
    first = (policy.embed(prompts[:2]), policy.uncond(), noise[:2], 5.0)
    expected = sample(policy.unet, policy.sampler, *first)
    assert torch.equal(parts[0][0].latents, expected.latents)
    assert torch.equal(parts[0][0].log_probs, expected.log_probs)
    for trajectories, images in parts:
        assert images.dtype == np.uint8 and images.shape == (len(trajectories), 8, 8, 3)
        assert np.array_equal(images, policy.decode(trajectories.latents[:, -1]))
    with pytest.raises(StopIteration):
        next(policy.sample([], [], 2))


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 100])
def test_pictures_do_not_depend_on_the_split_into_batches(batch):
    policy, prompts = tiny_policy(), ["a", "b", "a", "", "c"]
    [(whole, pictures)] = policy.sample(prompts, NAMES, 5)
    parts = list(policy.sample(prompts, NAMES, batch))
    joined = Trajectories.cat([trajectories for trajectories, _ in parts])
    difference = (joined.latents - whole.latents).abs().max()
    assert difference < 1e-5 * whole.latents.abs().max()
    torch.testing.assert_close(joined.log_probs, whole.log_probs, rtol=1e-5, atol=2e-5)
    images = np.concatenate([images for _, images in parts])
    off = np.abs(images.astype(int) - pictures)
    assert off.max() <= 1 and (off > 0).mean() < 0.01  # rounding decides but few


def test_a_batch_is_drawn_when_it_is_asked_for():
    net = Recorder(small_unet())
    batches = tiny_policy(unet=net).sample(["a", "b", "c"], NAMES[:3], 1)
    assert net.batches == []
    next(batches)
    assert net.batches == [2] * 3  # one sample, both halves of guidance, three steps


def test_decoded_pictures_by_hand():
    """-1 ... 1 becomes 0 ... 255, rounded, what lies outside clipped; channels come last."""
    latents = torch.zeros(2, 4, 1, 2)
    latents[0, 0, 0] = torch.tensor([-1.0, 1.0])
    latents[0, 1, 0] = torch.tensor([-3.0, 7.0])
    latents[0, 2, 0] = torch.tensor([0.2, -0.2])  # 0.6, 0.4 of 255
    latents[1, 0, 0, 1] = 1 / 255  # 128 of 255
    policy = tiny_policy()
    images = policy.decode(latents)
    assert images.dtype == np.uint8 and policy.vae.graph == [False]
    assert images[0].tolist() == [[[0, 0, 153], [255, 255, 102]]]
    assert images[1, 0, 1].tolist() == [128, 128, 128]


# ---- 11. Algorithms, each part alone -------------------------------------------------------------


def numbered(sizes, T=3, first=0):
    """Records of batches of such sizes: sample n has latents n, log p = 10 n + k, embedding n."""
    records = []
    for size in sizes:
        n = torch.arange(first, first + size).float()
        latents = n.view(-1, 1, 1, 1, 1).expand(size, T + 1, 4, 1, 1)
        log_probs = 10 * n[:, None] + torch.arange(T)
        records.append(Trajectories(latents, log_probs, torch.arange(T), n.view(-1, 1, 1)))
        first += size
    return records


WEIGHTS = torch.tensor([0.5, -1.0, 2.0, -3.0, 0.0, 7.0, -0.1, 1.5])


def dealt(learner, records, name, weights=WEIGHTS):
    """The batches of an epoch, as a list."""
    prompts = ["a"] * len(weights)
    return list(learner.batches(toy_policy(None), records, prompts, weights, name))


@pytest.mark.parametrize("algorithm, size", [("ddpo-is", 4), ("ddpo-is", 2), ("ddpo-sf", 8)])
def test_an_epoch_trains_on_each_action_of_each_trajectory_once(algorithm, size):
    learner = ESTIMATORS[algorithm](choices(batch_size=size))
    records = [learner.record(part) for part in numbered([3, 3, 2])]
    batches, seen = dealt(learner, records, [1, 2]), []
    assert [len(batch) for batch in batches] == [3 * size] * (8 // size)
    for batch in batches:
        i, k = batch.i.tolist(), batch.k.tolist()
        # timestep by timestep, its samples each time in the same order
        assert k == [step for step in range(3) for _ in range(size)]
        assert i == i[:size] * 3
        assert torch.equal(batch.advantages, WEIGHTS[batch.i])
        assert batch.trajectories.latents[batch.i, 0].flatten(1)[:, 0].tolist() == i
        log_probs = batch.trajectories.log_probs[batch.i, batch.k]
        assert torch.equal(log_probs, 10.0 * batch.i + batch.k)
        seen += i[:size]
    assert seen == list(range(8))  # in the order of sampling, which is random already
    assert not learner.fresh_optimizer


def test_all_pairs_by_hand():
    pairs = all_pairs(numbered([5])[0], torch.tensor([4, 0]), WEIGHTS)
    assert pairs.i.tolist() == [4, 0, 4, 0, 4, 0] and pairs.k.tolist() == [0, 0, 1, 1, 2, 2]
    assert pairs.advantages.tolist() == [0.0, 0.5] * 3


def test_a_slice_of_pairs_is_pairs_of_the_same_trajectories():
    pairs = all_pairs(numbered([5])[0], torch.tensor([4, 0, 2]), WEIGHTS)
    some = pairs[4:7]
    assert isinstance(some, Pairs) and len(some) == 3 and len(pairs) == 9
    assert some.i.tolist() == [0, 2, 4] and some.k.tolist() == [1, 1, 2]
    assert some.advantages.tolist() == [0.5, 2.0, 0.0]
    assert some.trajectories is pairs.trajectories
    assert len(pairs[8:100]) == 1


@pytest.mark.parametrize("algorithm", ESTIMATORS)
def test_losses_a_pair_by_hand(shifted, algorithm):
    learner = ESTIMATORS[algorithm](choices(clip_range=0.1))
    pairs = all_pairs(shifted.trajectories, torch.tensor(USED), ADVANTAGES)
    losses, logged = learner.losses(toy_policy(shifted.net), pairs)
    deltas = torch.tensor(DELTAS)[pairs.i, pairs.k]
    new = shifted.trajectories.log_probs[pairs.i, pairs.k] + deltas
    expected = oracle_ppo(deltas.exp(), pairs.advantages, 0.1)
    if algorithm == "ddpo-sf":
        expected = -pairs.advantages * new
    torch.testing.assert_close(losses.detach(), expected, rtol=1e-4, atol=1e-4)
    assert losses.requires_grad and set(logged) == {"k", "log_ratio"}
    assert logged["k"].tolist() == pairs.k.tolist()
    torch.testing.assert_close(logged["log_ratio"], deltas, rtol=1e-4, atol=1e-5)
    assert not logged["log_ratio"].requires_grad


def test_an_algorithm_predicts_with_the_guidance_of_its_settings():
    """Guidance 5 in sampling and in training: elsewhere ratios would be off 1."""
    rollout = unet_rollout()
    assert rollout.train(5, guidance=5.0)["first_ratio_error"].item() == 0
    assert rollout.train(5, guidance=1.0)["first_ratio_error"].item() > 1e-3


def test_metrics_of_ratios_by_hand():
    log_ratio = torch.tensor([1.05, 1.5, 1.0, 0.85, 0.7]).log()
    logged = {"log_ratio": log_ratio, "loss": torch.zeros(5)}
    metrics = DDPO(choices(clip_range=0.1)).metrics(logged)
    assert set(metrics) == {"approx_kl", "clip_fraction", "first_ratio_error"}
    assert metrics["clip_fraction"].item() == pytest.approx(3 / 5)
    assert metrics["first_ratio_error"].item() == pytest.approx(0.5)
    expected = 0.5 * np.mean(np.log([1.05, 1.5, 1.0, 0.85, 0.7]) ** 2)
    assert metrics["approx_kl"].item() == pytest.approx(expected, rel=1e-5)


def test_advantages_of_an_epoch_by_hand():
    """Prompt "a" has its own three rewards, "b" but one: the epoch's then."""
    learner = DDPO(choices(history_size=3, min_count=2))
    advantages = learner.weights(["a", "b", "a", "a"], torch.tensor([1.0, 9.0, 2.0, 3.0]))
    s = math.sqrt(2 / 3)
    whole = (9 - 15 / 4) / math.sqrt(np.var([1, 9, 2, 3]))
    assert advantages.tolist() == pytest.approx([-1 / s, whole, 0, 1 / s], rel=1e-5)
    # of "a", 2 3 7 are the last three; of "b", 9 and 5
    advantages = learner.weights(["a", "b"], torch.tensor([7.0, 5.0]))
    assert advantages.tolist() == pytest.approx([3 / math.sqrt(14 / 3), -1.0], rel=1e-5)


def test_a_small_spread_of_large_rewards_is_not_lost():
    """1e9 + 7 +- 14: in float32 these are multiples of 64."""
    rewards = 1e9 + torch.tensor([21.0, -7.0, 21.0, -7.0], dtype=torch.float64)
    for min_count in (16, 2):  # by the epoch's statistics, by the prompt's
        advantages = DDPO(choices(min_count=min_count)).weights(["a"] * 4, rewards)
        assert advantages.dtype == torch.float32
        assert advantages.tolist() == pytest.approx([1, -1, 1, -1], rel=1e-5)


def test_advantages_are_float64s_of_numpy_rounded_once():
    rewards = normal(64).double() * math.pi
    r = rewards.numpy()
    expected = ((r - r.mean()) / (r.std() + 1e-6)).astype(np.float32)
    advantages = DDPO(choices(history_size=64)).weights(["a"] * 64, rewards)
    assert advantages.numpy().tolist() == expected.tolist()


def test_the_limit_of_advantages_can_be_set():
    rewards, prompts = torch.tensor([0.0] * 199 + [100.0]), ["a"] * 200
    for limit in (10.0, 0.25):
        learner = DDPO(choices(history_size=200))
        learner.advantage_limit = limit
        assert learner.weights(prompts, rewards).max().item() == limit
    assert DDPO.advantage_limit == 10.0


@pytest.mark.parametrize("algorithm", ESTIMATORS)
def test_what_an_algorithm_remembers_survives_json(algorithm):
    settings = choices(history_size=4, min_count=2)
    first, second = ESTIMATORS[algorithm](settings), ESTIMATORS[algorithm](settings)
    first.weights(["a", "b", "a", "a"], torch.tensor([0.1, 2.0, 3.3, 4.0]))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict() != ESTIMATORS[algorithm](settings).state_dict()
    both = [learner.weights(["a", "a"], torch.tensor([1.0, 7.0])) for learner in (first, second)]
    assert torch.equal(*both)


def test_settle_fills_in_the_updates_of_an_epoch():
    for updates in (None, 4):
        settings = choices(samples_per_epoch=8, batch_size=2, updates=updates)
        DDPO.settle(settings, {})
        assert (settings.updates, settings.batch_size) == (4, 2)
    settings = choices(algorithm="ddpo-sf", batch_size=256)  # the default's, not typed
    DDPOScoreFunction.settle(settings, {})
    assert (settings.updates, settings.batch_size) == (1, 8)
    settings = choices(algorithm="ddpo-sf", batch_size=8, updates=1)
    DDPOScoreFunction.settle(settings, {"batch_size": 8, "updates": 1})
    assert (settings.updates, settings.batch_size) == (1, 8)


REFUSED = [  # which algorithm, settings, what was typed, how the message begins
    ("ddpo-is", {"eta": 0.0}, "eta", "--eta 0"),
    ("ddpo-sf", {"eta": 0.0}, "eta", "--eta 0"),
    ("ddpo-is", {"batch_size": 3}, "batch_size", "--updates 2 of --batch-size 3"),
    ("ddpo-is", {"batch_size": 16}, "batch_size", "--updates 0 of --batch-size 16"),
    ("ddpo-is", {"updates": 3}, "updates", "--updates 3"),
    ("ddpo-sf", {"updates": 2}, "updates", "--updates 2"),
    ("ddpo-is", {"no_cfg_training": True}, "no_cfg_training", "--no-cfg-training"),
    ("ddpo-sf", {"no_cfg_training": True}, "no_cfg_training", "--no-cfg-training"),
    ("ddpo-sf", {"batch_size": 4}, "batch_size", "ddpo-sf takes one update an epoch"),
    ("ddpo-sf", {"batch_size": 16}, "batch_size", "--updates 0 of --batch-size 16"),
]


@pytest.mark.parametrize("algorithm, changes, typed, begins", REFUSED)
def test_settle_refuses_what_cannot_be_in_one_line(algorithm, changes, typed, begins):
    settings = choices(algorithm=algorithm, **changes)
    with pytest.raises(UserError) as caught:
        ESTIMATORS[algorithm].settle(settings, {typed: changes[typed]})
    assert str(caught.value).startswith(begins) and "\n" not in str(caught.value)


def test_a_new_algorithm_is_a_subclass_of_a_few_lines():
    """Of which the parts that it does not give do nothing."""

    class Last(ddpo.Algorithm):
        def weights(self, prompts, rewards):
            return rewards.float()

        def batches(self, policy, records, prompts, weights, name):
            pairs = all_pairs(records[0], torch.tensor([0, 1]), weights)
            yield pairs[2:]

        def losses(self, policy, pairs):
            actions = (pairs.trajectories, pairs.i, pairs.k)
            now = policy_log_prob(policy.network, policy.sampler, *actions, policy.uncond(), 1)
            return -now * pairs.advantages, {"which": pairs.i}

    net, settings = ConstantNoise(THETA), choices()
    learner, rollout, before = Last(settings), toy_rollout(net, 2, 3), copy.copy(settings)
    assert learner.setup(toy_policy(net)) is None and learner.record(rollout) is rollout
    Last.settle(settings, {})
    assert settings == SimpleNamespace(**{**vars(before), "updates": 2})
    assert learner.settings is settings
    assert learner.state_dict() == {} and learner.load_state_dict({}) is None
    weights = learner.weights(["a", "b"], torch.tensor([1.0, -1.0]))
    [batch] = learner.batches(None, [rollout], ["a", "b"], weights, [0])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    metrics = optimizer_step(toy_policy(net), learner, optimizer, batch, 3, math.inf)
    assert set(metrics) == {"loss", "grad_norm"}
    assert net.theta.flatten().tolist() != pytest.approx(THETA)


@pytest.mark.parametrize("batch_size, updates", [(None, None), (8, 1), (2, 7), (None, 3)])
def test_an_algorithm_is_settled_on_batches_of_whole_epochs_unless_told(batch_size, updates):
    settings = choices(batch_size=batch_size, updates=updates)
    ddpo.Algorithm.settle(settings, {})
    assert (settings.batch_size, settings.updates) == (batch_size or 8, updates or 1)


@pytest.mark.parametrize("lacking", ["weights", "batches", "losses"])
def test_an_algorithm_without_one_of_its_three_parts_is_none(lacking):
    def part(self, *inputs):
        """Of no interest here."""

    parts = {name: part for name in ("weights", "batches", "losses") if name != lacking}
    with pytest.raises(TypeError, match=lacking):
        type("Partial", (ddpo.Algorithm,), parts)(choices())


def test_algorithms_by_name_and_the_papers_numbers():
    names = ["ddpo-is", "ddpo-sf", "ddpo-equal", "rwr", "rwr-sparse"]
    assert list(ddpo.ALGORITHMS) == names
    found = {name: cls.defaults for name, cls in ddpo.ALGORITHMS.items()}
    assert found["ddpo-is"] == {"batch_size": 64} and found["ddpo-sf"] == {"batch_size": 256}
    for name in ("rwr", "rwr-sparse"):
        numbers = [found[name][key] for key in ("samples_per_epoch", "batch_size", "updates")]
        assert numbers == [10_000, 128, 400]


def test_averaged_by_hand():
    def update(loss, by_step, error):
        metrics = {"loss": loss, "mine_by_step": by_step, "first_ratio_error": error}
        return {name: torch.tensor(value) for name, value in metrics.items()}

    updates = [update(1.0, [0.0, 0.5], 0.25), update(2.0, [0.5, 0.75], 9.0)]
    expected = {"loss": 1.5, "mine_by_step": [0.25, 0.625], "first_ratio_error": 0.25}
    assert ddpo.averaged(updates) == expected
    assert type(ddpo.averaged(updates)["loss"]) is float
    assert ddpo.averaged(updates[1:])["first_ratio_error"] == 9.0


# ---- 12. Several processes, played by one (test_processes.py starts them) ------------------------


def test_one_process_shares_and_gathers_all_of_it():
    ddpo.join(CPU)
    assert ddpo.processes() == (0, 1)
    rows = torch.arange(6).view(3, 2)
    assert ddpo.gather(rows) is rows and torch.equal(ddpo.share(rows), rows)
    assert ddpo.share(["a", "b"]) == ["a", "b"]
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.tensor([1.0, 2.0])
    ddpo.sum_gradients([p])
    assert p.grad.tolist() == [1, 2]


def started(monkeypatch, device, **environment):
    """`join` in an environment -> what it asked of torch.distributed."""
    asked = []

    def init_process_group(timeout):
        asked.append(f"{timeout}")

    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ddpo.dist, "init_process_group", init_process_group)
    monkeypatch.setattr(ddpo.dist, "barrier", lambda: asked.append("until all are there"))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.append(str(device)))
    ddpo.join(torch.device(device))
    return asked


MEETING = {"RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def test_processes_meet_where_they_were_told_to(monkeypatch):
    assert started(monkeypatch, "cpu") == []
    assert started(monkeypatch, "cpu", WORLD_SIZE="1") == []
    two = {"WORLD_SIZE": "2", **MEETING}
    expected = ["2:00:00", "until all are there"]
    assert started(monkeypatch, "cpu", **two) == expected
    assert started(monkeypatch, "cuda:1", **two) == ["cuda:1", *expected]
    monkeypatch.setattr(ddpo.dist, "is_initialized", lambda: True)
    assert started(monkeypatch, "cpu", **two) == []


@pytest.mark.parametrize("missing", MEETING)
def test_processes_that_cannot_meet_are_refused(missing, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", **MEETING}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    with pytest.raises(UserError, match=f"WORLD_SIZE is set.*{missing} expected") as caught:
        ddpo.join(torch.device("cpu"))
    assert "\n" not in str(caught.value)


@pytest.fixture
def acting_as(monkeypatch):
    """acting_as(rank, world): the rest of the test is this one of so many processes."""

    def act(rank, world):
        monkeypatch.setattr(ddpo, "processes", lambda: (rank, world))

    return act


def test_shares_are_dealt_in_turn_and_gathered_in_the_same_order(acting_as, monkeypatch):
    rows = torch.arange(24).view(3, 8).T  # (8, 3), not contiguous
    shares = []
    for rank in range(4):
        acting_as(rank, 4)
        shares.append(ddpo.share(rows))
        assert ddpo.share(list("abcdefgh")) == list("abcdefgh")[rank::4]

    def all_gather(parts, mine):
        assert mine.is_contiguous() and torch.equal(mine, shares[3])
        for part, theirs in zip(parts, shares, strict=True):
            part.copy_(theirs)

    monkeypatch.setattr(ddpo.dist, "all_gather", all_gather)
    assert torch.equal(ddpo.gather(shares[3]), rows)


def test_processes_train_on_each_trajectory_once_between_them(acting_as):
    seen = []
    for rank in range(2):
        acting_as(rank, 2)
        learner = DDPO(choices(batch_size=4))
        [whole] = numbered([8])
        mine = Trajectories(
            ddpo.share(whole.latents),
            ddpo.share(whole.log_probs),
            whole.timesteps,
            ddpo.share(whole.prompt_embeds),
        )
        for batch in dealt(learner, [mine], [5]):
            which = batch.trajectories.latents[batch.i, 0].flatten(1)[:, 0].long()
            assert len(batch) == 2 * 3  # two samples of the four
            assert torch.equal(batch.advantages, WEIGHTS[which])
            seen += which[:2].tolist()
    assert sorted(seen) == list(range(8))


def test_two_processes_on_the_same_rows_take_the_step_of_one(shifted, acting_as, monkeypatch):
    """Gradients are summed, so each divides by all processes' rows; metrics are of all rows."""
    net = copy.deepcopy(shifted.net)
    expected = shifted.train(lr=1.0, micro_batch=4, limit=0.05)
    acting_as(1, 2)

    def all_reduce(gradient):
        gradient.mul_(2)

    def all_gather(parts, mine):
        for part in parts:
            part.copy_(mine)

    monkeypatch.setattr(ddpo.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(ddpo.dist, "all_gather", all_gather)
    metrics = Shifted(net, shifted.trajectories).train(lr=1.0, micro_batch=4, limit=0.05)
    torch.testing.assert_close(net.theta, shifted.net.theta, rtol=1e-6, atol=1e-6)
    assert set(metrics) == set(expected)
    for name in metrics:
        torch.testing.assert_close(metrics[name], expected[name], rtol=1e-5, atol=1e-6)


def test_another_process_that_has_ended_is_said_in_one_line():
    with pytest.raises(UserError, match="another process has ended.*: connection closed") as caught:
        with ddpo.together():
            raise RuntimeError("connection closed\nby peer")
    assert "\n" not in str(caught.value)
    with pytest.raises(KeyError):
        with ddpo.together():
            raise KeyError("a fault of the program")
