"""ddpo.py against oracles that share no code with it: closed forms of Gaussian problems, torch.distributions, diffusers, numbers by hand.

The closed forms use the DDPM posterior (Ho et al. 2020, Eq. 6-7 and 11), which DDIM with eta = 1 equals but is written quite differently.
"""
import copy
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Normal

os.environ["HF_HUB_OFFLINE"] = "1"         # before diffusers is imported: no test may reach for the network
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ddpo  # noqa: E402
from ddpo import (  # noqa: E402
    PromptStatistics, Trajectories, guided_noise, named_noise, normalize_advantages, policy_log_prob, ppo_loss, predict_noise,
    reinforce_loss, sample, update)
from scheduler import Scheduler  # noqa: E402
from unet import UNet  # noqa: E402

SD = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
          set_alpha_to_one=False, clip_sample=False, prediction_type="epsilon", timestep_spacing="leading")
TOY = Scheduler(torch.linspace(0.8, 0.1, 12), 0.9, 3)      # timesteps 11, 7, 3 (T = 3); 9, 3 (T = 2); 3 (T = 1)
UNET = dict(in_channels=4, out_channels=4, block_out_channels=[16, 32], layers_per_block=1, norm_num_groups=8, cross_attention_dim=16,
            attention_head_dim=2, down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
            up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small are slower on several threads, ten times so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class ConstantNoise(nn.Module):
    """eps = theta, whatever x_t, t and c are: x_0 is then Gaussian, its mean linear in theta."""

    def __init__(self, theta):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta).reshape(4, 1, 1))

    def forward(self, x, timesteps, context):
        return self.theta.expand_as(x)


class NoisePerPrompt(nn.Module):
    """eps = context @ theta: one constant a prompt, prompts being one-hot contexts (B, 1, P)."""

    def __init__(self, prompts):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(prompts, 4))

    def forward(self, x, timesteps, context):
        return (context[:, 0] @ self.theta)[:, :, None, None]


class Recorder(nn.Module):
    """Passes calls on to a network and keeps the sizes of the batches."""

    def __init__(self, net):
        super().__init__()
        self.net, self.batches = net, []

    def forward(self, x, timesteps, context):
        self.batches.append(len(x))
        return self.net(x, timesteps, context)


def posterior_steps(scheduler, T):
    """Per step (t, a, b, variance) of x_{t-1} = a x_t + b eps + sqrt(variance) z: DDPM's posterior, in Python floats."""
    alphas_bar, stride = scheduler.alphas_bar.double().tolist(), len(scheduler.alphas_bar) // T
    steps = []
    for i in reversed(range(T)):
        t = i * stride + scheduler.steps_offset
        now, after = alphas_bar[t], alphas_bar[t - stride] if t >= stride else scheduler.final_alpha_bar
        beta = 1 - now / after
        a = 1 / math.sqrt(1 - beta)
        steps.append((t, a, -a * beta / math.sqrt(1 - now), beta * (1 - after) / (1 - now)))
    return steps


def x0_given_constant_noise(scheduler, T):
    """(K, V): x_0 ~ N(K theta, V I) when eps = theta."""
    K, V = 0.0, 1.0
    for _, a, b, variance in posterior_steps(scheduler, T):
        K, V = a * K + b, a * a * V + variance
    return K, V


def oracle_log_probs(unet, scheduler, trajectories, uncond, w):
    """log p of all recorded actions, (B, T): one big batch in float64, guidance by two passes, DDPM's posterior, torch.distributions."""
    T, B = len(trajectories.timesteps), len(trajectories)
    latents, cond = trajectories.latents.double(), trajectories.prompt_embeds.double()
    log_probs = []
    for i, (t, a, b, variance) in enumerate(posterior_steps(scheduler, T)):
        t = torch.full((B,), t)
        eps = w * unet(latents[:, i], t, cond) + (1 - w) * unet(latents[:, i], t, uncond.double().repeat(B, 1, 1))
        policy = Normal(a * latents[:, i] + b * eps, math.sqrt(variance))
        log_probs.append(policy.log_prob(latents[:, i + 1]).flatten(1).mean(1))
    return torch.stack(log_probs, 1)


def oracle_ppo(ratio, advantages, c):
    """PPO's loss in its other form: a bonus is capped on the side that the advantage pushes to, and only there."""
    capped = torch.where(advantages >= 0, ratio.clamp(max=1 + c), ratio.clamp(min=1 - c))
    return -capped * advantages


def toy_rollout(net, B, T, seed=0, context=None, uncond=None, w=1):
    noise = torch.randn(B, T + 1, 4, 1, 1, generator=torch.Generator().manual_seed(seed))
    context, uncond = (torch.zeros(n, 1, 1) if given is None else given for n, given in ((B, context), (1, uncond)))
    return sample(net, TOY, context, uncond, noise, T, 1.0, w)


def toy_update(net, trajectories, minibatch=None, optimizer=None, algorithm="ddpo-sf", clip_range=1e-4, micro_batch=10**6,
               max_grad_norm=math.inf, uncond=None, w=1):
    optimizer = optimizer or torch.optim.SGD(net.parameters(), lr=0.0)
    minibatch = torch.arange(len(trajectories)) if minibatch is None else minibatch
    return update(net, optimizer, TOY, trajectories, minibatch, torch.zeros(1, 1, 1) if uncond is None else uncond, algorithm=algorithm,
                  eta=1.0, w=w, clip_range=clip_range, micro_batch=micro_batch, max_grad_norm=max_grad_norm)


def small_unet(seed=0):
    torch.manual_seed(seed)
    net = UNet(UNET)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "attn2" in name:
                p.mul_(2)              # so that the prompt matters to a network that has learnt nothing
    return net


def unet_rollout(B=5, T=3, w=5.0, scheduler=None):
    """A real UNet's rollout on 8x8 latents, with advantages of both signs -> net, scheduler, trajectories, uncond."""
    net, scheduler = small_unet(), scheduler or Scheduler.from_config(SD)
    g = torch.Generator().manual_seed(1)
    cond, uncond = torch.randn(B, 7, 16, generator=g), torch.randn(1, 7, 16, generator=g)
    noise = torch.stack([named_noise((4, 8, 8), T + 1, 0, 0, i) for i in range(B)])
    trajectories = sample(net, scheduler, cond, uncond, noise, T, 1.0, w)
    trajectories.advantages = torch.tensor([1.5, -0.7, 0.3, -2.0, 0.9, -0.2, 1.1])[:B]
    return net, scheduler, trajectories, uncond


def unet_update(net, scheduler, trajectories, uncond, micro_batch, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(net.parameters(), lr=0.01)
    return update(net, optimizer, scheduler, trajectories, torch.arange(len(trajectories)), uncond, algorithm="ddpo-is", eta=1.0, w=5.0,
                  clip_range=0.02, micro_batch=micro_batch, max_grad_norm=math.inf)


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


def relative(x, y):
    return ((x.double() - y.double()).norm() / y.double().norm()).item()


# ---- 1. The gradient is that of E[r] ----

THETA, TARGET = [0.5, -0.3, 0.8, -1.0], torch.tensor([1.0, 0.5, -0.5, 0.2])
REWARDS = {   # r(x_0), and with x_0 ~ N(K theta, V I): E[r] and its gradient with respect to theta
    "linear": (lambda x: x @ TARGET, lambda K, V, theta: (K * theta @ TARGET.double(), K * TARGET.double())),
    "quadratic": (lambda x: -(x - TARGET).square().sum(1),
                  lambda K, V, theta: (-(K * theta - TARGET).square().sum() - 4 * V, -2 * K * (K * theta - TARGET.double()))),
}


def gradient_estimates(T, reward, algorithm="ddpo-sf", groups=100, size=2000):
    """`groups` independent Monte Carlo gradients through sample and update, (groups, 4), and the loss's analytic gradient (4,)."""
    net = ConstantNoise(THETA)
    K, V = x0_given_constant_noise(TOY, T)
    function, closed_form = REWARDS[reward]
    mean_reward, gradient = closed_form(K, V, torch.tensor(THETA).double())
    trajectories = toy_rollout(net, groups * size, T)
    # Any constant baseline leaves the gradient's mean alone; E[r] makes it less noisy.
    trajectories.advantages = function(trajectories.latents[:, -1].flatten(1)) - mean_reward.float()
    estimates = []
    for minibatch in torch.arange(groups * size).split(size):
        toy_update(net, trajectories, minibatch, algorithm=algorithm)
        estimates.append(net.theta.grad.flatten().double())
    # The loss is minus the objective, log-probs are means over D = 4 dimensions and losses means over T steps.
    D = 4
    return torch.stack(estimates), -gradient / (D * T)


def agrees(estimates, truth):
    """Every component within 4 standard errors."""
    standard_error = estimates.std(0) / math.sqrt(len(estimates))
    return bool(((estimates.mean(0) - truth).abs() <= 4 * standard_error).all())


@pytest.mark.parametrize("T", [1, 2, 3])
def test_rollout_with_constant_noise_has_the_closed_form_mean_and_variance(T):
    K, V = x0_given_constant_noise(TOY, T)
    x = toy_rollout(ConstantNoise(THETA), 100_000, T).latents[:, -1].flatten(1).double()
    assert ((x.mean(0) - K * torch.tensor(THETA)).abs() < 4 * math.sqrt(V / 100_000)).all()
    assert ((x.var(0) / V - 1).abs() < 4 * math.sqrt(2 / 100_000)).all()


@pytest.mark.parametrize("algorithm", ["ddpo-sf", "ddpo-is"])
@pytest.mark.parametrize("reward", list(REWARDS))
@pytest.mark.parametrize("T", [1, 2, 3])
def test_gradient_is_the_analytic_gradient_of_the_expected_reward(T, reward, algorithm):
    estimates, truth = gradient_estimates(T, reward, algorithm)
    assert (estimates.std(0) / math.sqrt(len(estimates)) <= 0.02 * truth.norm()).all()
    assert agrees(estimates, truth)


@pytest.mark.parametrize("factor", [-1, 4, 3, 1 / 4], ids=["sign", "D", "T", "one over D twice"])
def test_a_loss_with_a_wrong_sign_or_factor_fails_the_same_check(factor, monkeypatch):
    monkeypatch.setattr(ddpo, "reinforce_loss", lambda log_prob, advantages: -factor * advantages * log_prob)
    assert not agrees(*gradient_estimates(3, "quadratic"))


# ---- 2. Both objectives find the optimum ----

@pytest.mark.parametrize("algorithm, minibatches", [("ddpo-sf", 1), ("ddpo-is", 4)])
def test_training_reaches_the_optimum_of_every_prompt_through_guidance(algorithm, minibatches):
    """Two prompts with rewards on very different scales: without statistics per prompt the second one would learn nothing."""
    T, B, w, epochs = 2, 256, 3.0, 150
    targets = torch.tensor([[2.0, -1.0, 0.6, 0.0], [-1.2, 0.8, 0.0, 1.8]])
    scale, offset = torch.tensor([1000.0, 1.0]), torch.tensor([0.0, 500.0])
    K, _ = x0_given_constant_noise(TOY, T)
    net, statistics, which = NoisePerPrompt(2), PromptStatistics(size=64, min_count=16), torch.arange(B) % 2
    context, uncond = torch.eye(2)[which][:, None], torch.tensor([[[0.5, 0.0]]])       # eps_uncond isn't 0: guidance must be undone
    optimizer = torch.optim.Adam(net.parameters(), lr=0.03)
    g, history = torch.Generator().manual_seed(0), []
    for epoch in range(epochs):
        trajectories = toy_rollout(net, B, T, seed=epoch, context=context, uncond=uncond, w=w)
        x0 = trajectories.latents[:, -1].flatten(1)
        trajectories.rewards = offset[which] - scale[which] * (x0 - targets[which]).square().sum(1)
        mean_std = statistics.update([f"prompt {i}" for i in which], trajectories.rewards)
        trajectories.advantages = normalize_advantages(trajectories.rewards, *mean_std)
        for minibatch in torch.randperm(B, generator=g).chunk(minibatches):
            toy_update(net, trajectories, minibatch, optimizer, algorithm, clip_range=0.05, micro_batch=300, max_grad_norm=1.0,
                       uncond=uncond, w=w)
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - epoch / epochs)
        history.append(net.theta.detach().clone())
    theta = torch.stack(history[-50:]).mean(0)             # the average is less noisy than the last one
    guided = w * theta + (1 - w) * 0.5 * theta[0]
    assert relative(guided, targets / K) < 0.15             # it started from 0, where this is 1
    assert (guided - targets / K).abs().max() < 0.15


# ---- 3. The ratio before the first update is 1 ----

def test_ratio_is_exactly_1_before_the_first_update_at_the_rollouts_batch_size():
    net, *rollout = unet_rollout(B=7)
    assert unet_update(net, *rollout, micro_batch=7)["ratio_error"].item() == 0.0
    assert unet_update(net, *rollout, micro_batch=7)["ratio_error"].item() > 1e-4          # and not any more after it


@pytest.mark.parametrize("micro_batch", [1, 3, 7, 21])
def test_ratio_is_1_to_rounding_at_any_micro_batch(micro_batch):
    metrics = unet_update(*unet_rollout(B=7), micro_batch=micro_batch)
    assert metrics["ratio_error"].item() <= 1e-5


# ---- 4. Gradient accumulation ----

@pytest.fixture(scope="module")
def off_policy():
    """A rollout, weights that have moved since, and the gradient of the whole minibatch in one float64 batch of the oracle."""
    net, scheduler, trajectories, uncond = unet_rollout(scheduler=TOY)         # its last sigma isn't tiny: little rounding
    trajectories.log_probs += 0.03 * torch.randn(5, 3, generator=torch.Generator().manual_seed(2))
    net = moved(net)
    exact = copy.deepcopy(net).double()
    ratio = (oracle_log_probs(exact, scheduler, trajectories, uncond, 5.0) - trajectories.log_probs).exp()
    loss = oracle_ppo(ratio, trajectories.advantages[:, None].double(), 0.02).mean()
    loss.backward()
    return net, scheduler, trajectories, uncond, ratio.detach(), loss.item(), flat_grad(exact)


def test_off_policy_problem_has_ratios_on_both_sides_of_the_clip(off_policy):
    change = off_policy[4] - 1
    assert (change > 0.02).sum() >= 2 and (change < -0.02).sum() >= 2 and (change.abs() < 0.02).sum() >= 2
    assert (change.abs() - 0.02).abs().min() > 1e-4            # none so near the edge that rounding decides


@pytest.mark.parametrize("micro_batch", [1, 3, 5, 15])
def test_accumulated_gradient_is_that_of_one_big_batch(off_policy, micro_batch):
    net, scheduler, trajectories, uncond, ratio, loss, gradient = off_policy
    net = copy.deepcopy(net)
    metrics = unet_update(net, scheduler, trajectories, uncond, micro_batch)
    assert relative(flat_grad(net), gradient) < 2e-5
    assert metrics["loss"].item() == pytest.approx(loss, abs=1e-5)
    assert metrics["grad_norm"].item() == pytest.approx(gradient.norm().item(), rel=1e-5)
    assert metrics["ratio_error"].item() == pytest.approx((ratio - 1).abs().max().item(), rel=1e-3)


@pytest.mark.parametrize("micro_batch", [1, 3, 5])
def test_micro_batch_does_not_change_an_sgd_step(off_policy, micro_batch):
    nets = [copy.deepcopy(off_policy[0]) for _ in range(2)]
    for net, size in zip(nets, (micro_batch, 15)):
        unet_update(net, *off_policy[1:4], size)
    assert relative(flat_grad(nets[0]), flat_grad(nets[1])) < 2e-5
    assert relative(flat_weights(nets[0]), flat_weights(nets[1])) < 1e-6
    assert relative(flat_weights(nets[1]), flat_weights(off_policy[0])) > 1e-4          # a step was taken at all


@pytest.mark.parametrize("micro_batch", [1, 3, 5])
def test_micro_batch_does_not_change_an_adamw_step(off_policy, micro_batch):
    """Adam's first step is lr * sign(g): only weights whose gradient is rounding noise may move differently."""
    nets, lr = [copy.deepcopy(off_policy[0]) for _ in range(2)], 1e-4
    for net, size in zip(nets, (micro_batch, 15)):
        unet_update(net, *off_policy[1:4], size, torch.optim.AdamW(net.parameters(), lr=lr))
    difference = (flat_weights(nets[0]) - flat_weights(nets[1])).abs() / lr
    assert (difference > 1e-2).double().mean() < 1e-3


def test_order_of_a_minibatch_does_not_change_its_gradient_and_others_have_no_part_in_it():
    net, one = ConstantNoise(THETA), [toy_rollout(ConstantNoise(THETA), 6, 3) for _ in range(2)]
    gradients = []
    for trajectories, minibatch in zip(one, ([1, 4, 2], [4, 2, 1])):
        trajectories.advantages = torch.tensor([math.nan, 1.0, -2.0, math.nan, 0.5, math.nan])
        trajectories.latents[[0, 3, 5]] = math.nan
        toy_update(net, trajectories, torch.tensor(minibatch), micro_batch=2)
        gradients.append(net.theta.grad.clone())
    assert gradients[0].isfinite().all() and torch.allclose(*gradients, rtol=1e-5)


# ---- 5. Guidance ----

def test_guided_noise_is_equation_3():
    cond, uncond = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    for w in (0.0, 1.0, 5.0, 7.5, -1.0):
        torch.testing.assert_close(guided_noise(uncond, cond, w), w * cond + (1 - w) * uncond, rtol=1e-5, atol=1e-5)
    assert guided_noise(torch.tensor(2.0), torch.tensor(3.0), 5.0).item() == 7.0          # by hand: 5 * 3 - 4 * 2


def test_predict_noise_in_one_pass_equals_two_separate_passes():
    net, _, trajectories, uncond = unet_rollout()
    net, x, t, cond = Recorder(net), trajectories.latents[:, 0], torch.tensor([981, 1, 500, 1, 7]), trajectories.prompt_embeds
    with torch.no_grad():
        separate = 5.0 * net(x, t, cond) - 4.0 * net(x, t, uncond.repeat(5, 1, 1))
        net.batches.clear()
        together = predict_noise(net, x, t, cond, uncond, 5.0)
        plain = net.net(x, t, cond)
    assert net.batches == [10]
    assert (separate - plain).abs().max() > 0.1                # the prompt does matter here
    torch.testing.assert_close(together, separate, rtol=1e-4, atol=1e-4)


def test_guidance_1_is_the_plain_conditional_model_at_half_the_cost():
    net, _, trajectories, uncond = unet_rollout()
    net, x, t, cond = Recorder(net), trajectories.latents[:, 0], torch.tensor([981, 1, 500, 1, 7]), trajectories.prompt_embeds
    with torch.no_grad():
        plain, nearly = predict_noise(net, x, t, cond, uncond, 1.0), predict_noise(net, x, t, cond, uncond, 1.0 + 1e-7)
        expected = net.net(x, t, cond)
    assert net.batches == [5, 10]
    assert torch.equal(plain, expected)
    torch.testing.assert_close(nearly, expected, rtol=1e-4, atol=1e-4)


def test_predicted_noise_is_float32_however_the_network_computes():
    net, x = small_unet().bfloat16(), torch.zeros(2, 4, 8, 8, dtype=torch.bfloat16)
    context = torch.zeros(2, 7, 16, dtype=torch.bfloat16)
    for w in (1.0, 5.0):
        assert predict_noise(net, x, torch.tensor([1, 1]), context, context[:1], w).dtype == torch.float32


# ---- 6. The losses ----

@pytest.mark.parametrize("advantage, ratio, loss, slope", [      # clip range 0.2; slope is d loss / d log p = - A ratio, or 0
    (2.0, 1.5, -2.4, 0.0),          # good action, already likelier: capped at 1.2, no gradient
    (2.0, 0.5, -1.0, -1.0),         # good action that became unlikelier: the pessimistic minimum keeps the gradient
    (-2.0, 1.5, 3.0, 3.0),          # bad action that became likelier: kept
    (-2.0, 0.5, 1.6, 0.0),          # bad action, already unlikelier: capped at 0.8, no gradient
    (3.0, 1.1, -3.3, -3.3), (-3.0, 0.9, 2.7, 2.7), (0.0, 1.5, 0.0, 0.0)])
def test_ppo_loss_by_hand(advantage, ratio, loss, slope):
    old = torch.tensor([-1.3])
    log_prob = (old + math.log(ratio)).requires_grad_()
    value, ratios = ppo_loss(log_prob, old, torch.tensor([advantage]), 0.2)
    value.sum().backward()
    assert value.item() == pytest.approx(loss, rel=1e-5) and ratios.item() == pytest.approx(ratio, rel=1e-5)
    assert log_prob.grad.item() == pytest.approx(slope, rel=1e-5)
    assert slope != 0 or log_prob.grad.item() == 0.0            # exactly


FLOATS = dict(allow_nan=False, width=32)


@settings(deadline=None, derandomize=True)
@given(st.floats(-2, 2, **FLOATS), st.floats(-5, 5, **FLOATS), st.floats(-10, 10, **FLOATS), st.floats(1e-4, 0.5))
def test_ppo_loss_equals_its_other_form(shift, old, advantage, clip_range):
    old, advantage = torch.tensor([old]), torch.tensor([advantage])
    loss, ratio = ppo_loss(old + shift, old, advantage, clip_range)
    expected = math.exp((old + shift - old).item())
    assert ratio.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(loss, oracle_ppo(ratio, advantage, clip_range), rtol=1e-6, atol=1e-6)
    assert loss.item() >= -ratio.item() * advantage.item() - 1e-5         # pessimistic: never better than the unclipped objective


def test_reinforce_loss_by_hand():
    log_prob = torch.tensor([-1.0, 2.0, 0.5], requires_grad=True)
    loss = reinforce_loss(log_prob, torch.tensor([2.0, -3.0, 0.0]))
    loss.sum().backward()
    assert loss.tolist() == [2.0, 6.0, 0.0] and log_prob.grad.tolist() == [-2.0, 3.0, 0.0]


# ---- 7. Advantages ----

def test_statistics_are_of_the_last_size_rewards_of_each_prompt_this_epoch_included():
    statistics = PromptStatistics(size=3, min_count=2)
    mean, std = statistics.update(["a", "a", "b", "b"], torch.tensor([1.0, 3.0, 10.0, 30.0]))
    assert mean.tolist() == [2, 2, 20, 20] and std.tolist() == [1, 1, 10, 10]         # population std: divided by n
    mean, std = statistics.update(["a", "b", "a"], torch.tensor([5.0, 20.0, 1.0]))
    assert mean.tolist() == pytest.approx([3, 20, 3])          # a: 3 5 1, the first 1 is forgotten; b: 10 30 20
    assert std.tolist() == pytest.approx([math.sqrt(8 / 3), math.sqrt(200 / 3), math.sqrt(8 / 3)])


def test_a_prompt_with_few_rewards_is_normalised_by_the_whole_batch():
    statistics = PromptStatistics(size=8, min_count=3)
    mean, std = statistics.update(["a", "a", "a", "b"], torch.tensor([1.0, 2.0, 3.0, 10.0]))
    assert mean.tolist() == [2, 2, 2, 4]
    assert std.tolist() == pytest.approx([math.sqrt(2 / 3)] * 3 + [math.sqrt(12.5)])        # (9 + 4 + 1 + 36) / 4
    mean, std = statistics.update(["b", "b"], torch.tensor([4.0, 4.0]))             # now it has three: 10 4 4
    assert mean.tolist() == [6, 6] and std.tolist() == pytest.approx([math.sqrt(8)] * 2)


def test_paper_defaults_are_the_last_32_rewards_used_from_16_on():
    statistics = PromptStatistics()
    mean, _ = statistics.update(["a"] * 15 + ["b"], torch.tensor([0.0] * 15 + [32.0]))
    assert mean.tolist() == [2.0] * 16                         # 15 rewards: still the batch's mean
    mean, _ = statistics.update(["a"], torch.tensor([32.0]))
    assert mean.tolist() == [2.0]                              # 16: their own mean
    mean, _ = statistics.update(["a"] * 17, torch.zeros(17))
    assert mean.tolist() == [1.0] * 17                         # 33: one 0 is forgotten, 32 / 32


def test_advantages_by_hand_and_clipped():
    rewards, mean, std = torch.tensor([[5.0, 1.0, 1e3, -1e3, 7.0], [3.0, 3.0, 0.0, 0.0, 7.0], [1.0, 4.0, 2.0, 2.0, 0.0]])
    assert normalize_advantages(rewards, mean, std).tolist() == pytest.approx([2, -0.5, 10, -10, 0], rel=1e-5)
    assert normalize_advantages(rewards, mean, std, limit=5.0).tolist() == pytest.approx([2, -0.5, 5, -5, 0], rel=1e-5)


@settings(deadline=None, derandomize=True)
@given(st.floats(-1e6, 1e6, **FLOATS), st.integers(1, 40))
def test_a_constant_reward_gives_advantage_0(reward, count):
    rewards = torch.full((count,), reward)
    statistics = PromptStatistics(size=16, min_count=8)
    assert normalize_advantages(rewards, *statistics.update(["a"] * count, rewards)).tolist() == [0.0] * count


def test_statistics_survive_a_round_trip_through_json():
    first = PromptStatistics(size=4, min_count=2)
    first.update(["a", "b", "a", "a", "a", "a"], torch.tensor([0.1, 2.0, 3.3, 4.0, 5.0, 6.0]))
    second = PromptStatistics(size=4, min_count=2)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict()
    for statistics in (first, second):                         # the buffer's length is remembered too: "a" has one to forget
        assert statistics.update(["a"], torch.tensor([7.0]))[0].tolist() == [5.5]


def test_statistics_refuse_rewards_that_do_not_match_the_prompts():
    with pytest.raises(ValueError):
        PromptStatistics().update(["a", "b"], torch.zeros(3))


# ---- 8. Sampling ----

def test_rollouts_hold_float32_latents_from_noise_to_x0_and_their_normal_log_probs():
    net, scheduler, trajectories, uncond = unet_rollout()
    assert trajectories.latents.shape == (5, 4, 4, 8, 8) and trajectories.log_probs.shape == (5, 3) and len(trajectories) == 5
    assert trajectories.timesteps.tolist() == [667, 334, 1]
    assert trajectories.latents.dtype == trajectories.log_probs.dtype == torch.float32
    assert not trajectories.latents.requires_grad and not trajectories.log_probs.requires_grad
    assert torch.equal(trajectories.latents[2, 0], named_noise((4, 8, 8), 4, 0, 0, 2)[0])
    with torch.no_grad():
        expected = oracle_log_probs(copy.deepcopy(net).double(), scheduler, trajectories, uncond, 5.0)
    torch.testing.assert_close(trajectories.log_probs.double(), expected, rtol=0, atol=2e-5)


def test_log_probs_are_recomputed_for_any_pairs_in_any_order():
    net, scheduler, trajectories, uncond = unet_rollout()
    samples, steps = torch.tensor([4, 0, 2, 2, 1, 4]), torch.tensor([2, 0, 1, 2, 0, 0])
    log_prob = policy_log_prob(net, scheduler, trajectories, samples, steps, uncond, 1.0, 5.0)
    assert log_prob.requires_grad
    torch.testing.assert_close(log_prob.detach(), trajectories.log_probs[samples, steps], rtol=0, atol=2e-5)


@pytest.mark.parametrize("split", [[6], [2, 4], [1] * 6, [5, 1]], ids=str)
def test_samples_depend_on_their_names_not_on_the_batch(split):
    net, scheduler = small_unet(), Scheduler.from_config(SD)
    cond = torch.randn(6, 7, 16, generator=torch.Generator().manual_seed(1))

    def rollout(indices):
        noise = torch.stack([named_noise((4, 8, 8), 4, 42, 3, i) for i in indices])
        return sample(net, scheduler, cond[indices], torch.zeros(1, 7, 16), noise, 3, 1.0, 5.0)

    whole = rollout(list(range(6)))
    joined = Trajectories.cat([rollout(part.tolist()) for part in torch.arange(6).split(split)])
    assert (joined.latents - whole.latents).abs().max() < 1e-5 * whole.latents.abs().max()        # relative to their size, about 10 here
    torch.testing.assert_close(joined.log_probs, whole.log_probs, rtol=1e-5, atol=2e-5)
    assert torch.equal(joined.prompt_embeds, cond) and torch.equal(joined.timesteps, whole.timesteps) and joined.rewards is None


def test_joined_trajectories_keep_rewards_and_advantages_in_order():
    parts = [Trajectories(torch.zeros(b, 3, 4, 1, 1), torch.zeros(b, 2), torch.tensor([5, 1]), torch.zeros(b, 1, 1),
                          torch.full((b,), float(b)), torch.full((b,), -float(b))) for b in (2, 1)]
    joined = Trajectories.cat(parts)
    assert joined.rewards.tolist() == [2, 2, 1] and joined.advantages.tolist() == [-2, -2, -1] and joined.timesteps.tolist() == [5, 1]


def test_noise_is_fixed_by_its_whole_name_and_leaves_torchs_own_stream_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    names = [(s, e, i) for s in (0, 1, 2**32 + 7) for e in (0, 1) for i in (0, 1, 300)]
    draws = [named_noise((4, 8, 8), 3, *name) for name in names]
    assert torch.equal(torch.get_rng_state(), before)
    for name, draw in zip(names, draws):
        assert draw.shape == (3, 4, 8, 8) and torch.equal(draw, named_noise((4, 8, 8), 3, *name))
    for i, draw in enumerate(draws):
        assert all((draw - other).abs().max() > 1 for other in draws[:i])
        assert (draw[0] - draw[1]).abs().max() > 1             # x_T and the noise of the steps differ too
    values = torch.stack(draws).flatten()
    assert values.mean().abs() < 4 / math.sqrt(len(values)) and (values.std() - 1).abs() < 4 / math.sqrt(2 * len(values))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("T", [2, 7, 50])
def test_sampling_equals_diffusers_ddim_loop(T, eta):
    DDIMScheduler = pytest.importorskip("diffusers").DDIMScheduler
    net, peer = small_unet(), DDIMScheduler(**SD)
    g = torch.Generator().manual_seed(3)
    cond, uncond, noise = (torch.randn(*shape, generator=g) for shape in ((2, 7, 16), (1, 7, 16), (2, T + 1, 4, 8, 8)))
    trajectories = sample(net, Scheduler.from_config(SD), cond, uncond, noise, T, eta, 5.0)
    peer.set_timesteps(T)
    assert peer.timesteps.tolist() == trajectories.timesteps.tolist()
    x = noise[:, 0]
    with torch.no_grad():
        for i, t in enumerate(peer.timesteps):
            eps = 5.0 * net(x, t.expand(2), cond) - 4.0 * net(x, t.expand(2), uncond.repeat(2, 1, 1))
            x = peer.step(eps, t, x, eta=eta, variance_noise=noise[:, i + 1]).prev_sample
            assert relative(trajectories.latents[:, i + 1], x) < 1e-5
    assert (trajectories.log_probs == 0).all() == (eta == 0)


# ---- 9. What update reports and does ----

# Log ratios of 4 samples at 3 steps; sample 1 isn't trained on.
DELTAS = [[0.0, 0.05, -0.3], [9.0, 9.0, 9.0], [0.15, -0.05, 0.2], [0.0, 0.12, 0.01]]


def shifted_problem():
    """Old log-probs displaced by hand so that every ratio is known: exp(DELTAS)."""
    net = ConstantNoise(THETA)
    trajectories = toy_rollout(net, 4, 3)
    trajectories.log_probs = trajectories.log_probs - torch.tensor(DELTAS)
    trajectories.advantages = torch.tensor([1.0, 100.0, -2.0, 0.5])
    return net, trajectories, torch.tensor([2, 3, 0])


@pytest.mark.parametrize("micro_batch", [1, 2, 9])
def test_ratio_metrics_by_hand(micro_batch):
    net, trajectories, minibatch = shifted_problem()
    metrics = toy_update(net, trajectories, minibatch, algorithm="ddpo-is", clip_range=0.1, micro_batch=micro_batch)
    # outside [0.9, 1.1]: 0.15 at step 0; 0.12 at step 1; -0.3 and 0.2 at step 2 (exp(0.05) and exp(-0.05) are inside)
    assert metrics["clip_fraction_by_step"].tolist() == pytest.approx([1 / 3, 1 / 3, 2 / 3])
    assert metrics["clip_fraction"].item() == pytest.approx(4 / 9)
    used = [d for i in (0, 2, 3) for d in DELTAS[i]]
    assert metrics["approx_kl"].item() == pytest.approx(sum(d * d for d in used) / 9 / 2, rel=1e-3)
    assert metrics["ratio_error"].item() == pytest.approx(1 - math.exp(-0.3), rel=1e-4)
    # min(r, 1.1) where A > 0, max(r, 0.9) where A < 0
    e = math.exp
    bonus = 1 * (1 + e(0.05) + e(-0.3)) - 2 * (e(0.15) + e(-0.05) + e(0.2)) + 0.5 * (1 + 1.1 + e(0.01))
    assert metrics["loss"].item() == pytest.approx(-bonus / 9, rel=1e-4)


def test_loss_of_the_score_function_estimator_by_hand():
    net, trajectories, minibatch = shifted_problem()
    new = (trajectories.log_probs + torch.tensor(DELTAS))[minibatch]
    expected = -(trajectories.advantages[minibatch, None] * new).mean().item()
    metrics = toy_update(net, trajectories, minibatch, algorithm="ddpo-sf", clip_range=0.1)
    assert metrics["loss"].item() == pytest.approx(expected, rel=1e-4)
    assert metrics["clip_fraction"].item() == pytest.approx(4 / 9)         # reported all the same: how far a stale policy would be


def gradient_by_hand(trajectories, minibatch, clip_range):
    """-mean over pairs of A r dlogp/dtheta, where dlogp/dtheta_j = b (x_{t-1} - mean)_j / (4 variance); 0 where the clip holds. -> (4,)"""
    total, latents = np.zeros(4), trajectories.latents.flatten(2).double().numpy()
    for i in minibatch.tolist():
        for k, (_, a, b, variance) in enumerate(posterior_steps(TOY, 3)):
            A, ratio = trajectories.advantages[i].item(), math.exp(DELTAS[i][k])
            if not (A > 0 and ratio > 1 + clip_range or A < 0 and ratio < 1 - clip_range):
                total -= A * ratio * b * (latents[i, k + 1] - a * latents[i, k] - b * np.array(THETA)) / (4 * variance)
    return total / (3 * len(minibatch))


@pytest.mark.parametrize("micro_batch", [2, 9])
def test_gradient_and_its_norm_by_hand(micro_batch):
    net, trajectories, minibatch = shifted_problem()
    metrics = toy_update(net, trajectories, minibatch, algorithm="ddpo-is", clip_range=0.1, micro_batch=micro_batch)
    expected = gradient_by_hand(trajectories, minibatch, 0.1)
    assert net.theta.grad.flatten().tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    assert metrics["grad_norm"].item() == pytest.approx(np.linalg.norm(expected), rel=1e-4)


def test_gradient_norm_is_reported_before_clipping_and_the_step_is_clipped():
    net, trajectories, minibatch = shifted_problem()
    expected = gradient_by_hand(trajectories, minibatch, 0.1)
    limit = 0.3 * np.linalg.norm(expected)
    metrics = toy_update(net, trajectories, minibatch, torch.optim.SGD(net.parameters(), lr=1.0), "ddpo-is", 0.1, 4, limit)
    assert metrics["grad_norm"].item() == pytest.approx(np.linalg.norm(expected), rel=1e-4)
    step = net.theta.detach().flatten() - torch.tensor(THETA)
    assert step.tolist() == pytest.approx((-0.3 * expected).tolist(), rel=1e-3)           # the same direction, as long as the limit


def test_updates_start_from_a_gradient_of_zero():
    net, trajectories, minibatch = shifted_problem()
    first = toy_update(net, trajectories, minibatch)["grad_norm"]
    assert toy_update(net, trajectories, minibatch)["grad_norm"].item() == first.item()


def test_frozen_weights_stay_and_do_not_count():
    net, trajectories, minibatch = shifted_problem()
    net.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    net.frozen.grad = torch.full((3,), 1e3)                    # left over from somewhere: must not enter the norm
    metrics = toy_update(net, trajectories, minibatch, torch.optim.SGD([net.theta], lr=1.0))
    assert metrics["grad_norm"].item() < 100 and net.frozen.tolist() == [1, 1, 1]


def test_a_deterministic_last_step_gives_no_gradient_and_no_nan():
    """A schedule that ends at alpha_bar = 1 has sigma = 0 there: the other steps' gradient is left, and it is finite."""
    ends_at_1, noise = Scheduler(TOY.alphas_bar, 1.0, 3), torch.randn(6, 4, 4, 1, 1, generator=torch.Generator().manual_seed(0))
    net = ConstantNoise(THETA)
    trajectories = sample(net, ends_at_1, torch.zeros(6, 1, 1), torch.zeros(1, 1, 1), noise, 3, 1.0, 1)
    trajectories.advantages = torch.tensor([1.0, -1.0, 2.0, 0.5, -3.0, 1.0])
    gradients = []
    for algorithm in ("ddpo-sf", "ddpo-is"):
        update(net, torch.optim.SGD(net.parameters(), lr=0.0), ends_at_1, trajectories, torch.arange(6), torch.zeros(1, 1, 1),
               algorithm=algorithm, eta=1.0, w=1, clip_range=0.1, micro_batch=6, max_grad_norm=math.inf)
        gradients.append(net.theta.grad.flatten().clone())
    expected = torch.zeros(4)
    for k, (_, a, b, variance) in enumerate(posterior_steps(TOY, 3)[:2]):
        score = b * (trajectories.latents[:, k + 1] - a * trajectories.latents[:, k] - b * net.theta.detach()).flatten(1) / (4 * variance)
        expected -= (trajectories.advantages[:, None] * score).sum(0) / 18
    assert (trajectories.log_probs[:, 2] == 0).all()
    for gradient in gradients:
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_names_of_other_lengths_are_other_names():
    assert not torch.equal(ddpo.named_noise((4,), 1, 3, 5), ddpo.named_noise((4,), 1, 3, 5, 0))
