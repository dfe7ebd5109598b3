"""RWR and RWR-sparse (ddpo.py) against hand-worked numbers, numpy, diffusers' noising and plain autograd; the alarms against made-up runs."""
import copy
import math
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ddpo
from scheduler import Scheduler
from unet import UNet

SD = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
          set_alpha_to_one=False, clip_sample=False, prediction_type="epsilon", timestep_spacing="leading")
UNET = dict(in_channels=4, out_channels=4, block_out_channels=[16, 32], layers_per_block=1, norm_num_groups=8, cross_attention_dim=16,
            attention_head_dim=2, down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"], up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"])
PROMPTS, NAME = ["a cat", "a dog", "", "a bee"], [3, 1, 1]
EMBEDS = dict(zip(PROMPTS, torch.randn(4, 7, 16, generator=torch.Generator().manual_seed(1))))


def policy():
    torch.manual_seed(0)
    return SimpleNamespace(unet=UNet(UNET), scheduler=Scheduler.from_config(SD), device=torch.device("cpu"),
                           embed=lambda prompts: torch.stack([EMBEDS[prompt] for prompt in prompts]))


def samples(n=5):
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(2))


def regress(policy, optimizer, weights, prompts, updates=3, w=5.0, batch=4, micro_batch=3, lr=0.01, limit=math.inf):
    return ddpo.regress(policy, optimizer, samples(len(weights)), prompts, weights, batch, NAME, [lr] * updates, w, micro_batch=micro_batch, max_grad_norm=limit)


def by_hand(policy, optimizer, weights, prompts, updates, w, batch):
    """The same training written down from the text of Sec. 4.2 and App. E.1, with diffusers' forward process and two separate passes -> losses."""
    noising = diffusers.DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False)
    x_0, rng, losses = samples(len(weights)), np.random.default_rng(NAME), []
    order = []
    while len(order) < updates * batch:
        order += rng.permutation([i for i in range(len(weights)) if weights[i] > 0]).tolist()
    for n in range(updates):
        chosen, t = order[n * batch:(n + 1) * batch], torch.from_numpy(rng.integers(1000, size=batch))
        noise = ddpo.named_noise((4, 8, 8), batch, *NAME, n)
        x_t = noising.add_noise(x_0[chosen], noise, t)
        cond = torch.stack([EMBEDS[prompts[i]] for i in chosen])
        eps = policy.unet(x_t, t, cond)
        if w != 1:
            eps = w * eps + (1 - w) * policy.unet(x_t, t, EMBEDS[""].expand(batch, 7, 16))
        loss = sum(weights[i] * F.mse_loss(eps[k], noise[k]) for k, i in enumerate(chosen)) / batch
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# Weights

def test_rwr_weights_by_hand():
    prompts, rewards = ["a", "b", "a", "c", "b", "b"], torch.tensor([0.0, 1.0, math.log(3), 7.0, 1.0, 1.0])
    assert ddpo.rwr_weights(prompts, rewards, 1.0).tolist() == pytest.approx([0.5, 1, 1.5, 1, 1, 1])
    assert ddpo.rwr_weights(prompts, rewards, 2.0).tolist() == pytest.approx([0.2, 1, 1.8, 1, 1, 1])


def test_rwr_weights_average_1_within_a_prompt_and_survive_large_rewards():
    rng = np.random.default_rng(0)
    prompts, rewards = [str(i) for i in rng.integers(5, size=200)], torch.from_numpy(rng.normal(-30_000, 40, 200))
    weights = ddpo.rwr_weights(prompts, rewards, 0.2).numpy()
    for prompt in set(prompts):
        mine = np.array(prompts) == prompt
        r = rewards.numpy()[mine]
        assert weights[mine].mean() == pytest.approx(1)
        assert np.log(weights[mine][0] / weights[mine][1]) == pytest.approx(0.2 * (r[0] - r[1]))          # exp(beta r), whatever Z is


@pytest.mark.parametrize("percentile", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_sparse_weights_are_1_from_numpys_percentile_on(percentile):
    rng = np.random.default_rng(1)
    prompts, rewards = [str(i) for i in rng.integers(7, size=150)], rng.normal(size=150).astype(np.float32)
    weights = ddpo.sparse_weights(prompts, torch.from_numpy(rewards), percentile).tolist()
    for prompt, reward, weight in zip(prompts, rewards, weights):
        mine = rewards[np.array(prompts) == prompt]
        assert weight == float(reward >= np.percentile(mine, 100 * percentile).astype(np.float32))


def test_sparse_weights_by_hand():
    few = ["a"] * 8 + ["b"] * 2
    assert ddpo.sparse_weights(few, torch.tensor([3.0, 1, 8, 2, 5, 4, 7, 6, 0, 0]), 0.9).tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 1, 1]
    assert ddpo.sparse_weights(["a"] * 11, torch.arange(11.0), 0.9).tolist() == [0] * 9 + [1, 1]
    assert ddpo.sparse_weights(few, torch.arange(10.0), 0).tolist() == [1] * 10


def test_denoising_loss_by_hand():
    eps, noise = torch.zeros(2, 1, 2, 2), torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]], [[[2.0, 2.0], [2.0, 2.0]]]])
    assert ddpo.denoising_loss(eps, noise, torch.tensor([2.0, 0.5])).tolist() == [15.0, 2.0]


# Training

@pytest.mark.parametrize("w", [1.0, 5.0])
def test_regression_equals_weighted_denoising_training_by_hand(w):
    prompts, weights, mine, theirs = ["a cat", "a dog", "a bee", "a cat", "a cat"], torch.tensor([0.5, 2.0, 0.0, 1.0, 1.5]), policy(), policy()
    metrics = regress(mine, torch.optim.AdamW(mine.unet.parameters(), lr=1.0, eps=1e-3), weights, prompts, w=w)
    losses = by_hand(theirs, torch.optim.AdamW(theirs.unet.parameters(), lr=0.01, eps=1e-3), weights, prompts, 3, w, 4)
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    for one, other in zip(mine.unet.parameters(), theirs.unet.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weigh", [lambda prompts, rewards: ddpo.rwr_weights(prompts, rewards, 1e-12),
                                   lambda prompts, rewards: ddpo.sparse_weights(prompts, rewards, 0.0)], ids=["rwr, beta -> 0", "sparse, percentile 0"])
def test_with_one_prompt_and_no_preference_it_is_plain_denoising_training(weigh):
    prompts, mine, theirs = ["a cat"] * 6, policy(), policy()
    weights = weigh(prompts, torch.tensor([1.0, -2.0, 3.0, 10.0, 0.0, 0.5]))
    regress(mine, torch.optim.SGD(mine.unet.parameters(), lr=1.0), weights, prompts, updates=4)
    by_hand(theirs, torch.optim.SGD(theirs.unet.parameters(), lr=0.01), torch.ones(6), prompts, 4, 5.0, 4)
    for one, other in zip(mine.unet.parameters(), theirs.unet.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_every_sample_comes_once_before_any_comes_again_and_those_of_weight_0_never():
    seen, p = [], policy()
    real = p.embed
    p.embed = lambda prompts: seen.extend(prompts) or real(prompts)
    numbered = {f"{i}": torch.zeros(7, 16) for i in range(8)}
    EMBEDS.update(numbered)
    regress(p, torch.optim.SGD(p.unet.parameters(), lr=0.0), torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1]), list("01234567"), updates=3, batch=4)
    drawn = [prompt for prompt in seen if prompt]
    assert sorted(drawn[:6]) == sorted(drawn[6:]) == list("023567") and drawn[:6] != drawn[6:]


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_micro_batches_do_not_change_the_step(micro_batch):
    weights, prompts, whole = torch.tensor([0.5, 2.0, 0.0, 1.0, 1.5]), ["a cat", "a dog", "a bee", "a cat", "a cat"], policy()
    cut = copy.deepcopy(whole)
    for one, size in ((whole, 100), (cut, micro_batch)):
        regress(one, torch.optim.SGD(one.unet.parameters(), lr=1.0), weights, prompts, updates=1, micro_batch=size)
    for one, other in zip(whole.unet.parameters(), cut.unet.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_learning_rates_and_the_clipping_of_the_gradient_reach_the_steps():
    p = policy()
    before = [q.detach().clone() for q in p.unet.parameters()]
    metrics = regress(p, torch.optim.SGD(p.unet.parameters(), lr=1.0), torch.ones(5), ["a cat"] * 5, updates=1, lr=0.5, limit=0.01)
    moved = math.sqrt(sum((q - b).square().sum().item() for q, b in zip(p.unet.parameters(), before)))
    assert moved == pytest.approx(0.5 * 0.01, rel=1e-3) and metrics["grad_norm"] > 0.02


# Alarms

def run(epochs, **changes):
    """The lines of a healthy run, with the figures of its last epoch changed."""
    line = {"grad_norm": 0.4, "clip_fraction": 0.1, "clip_fraction_by_step": [0.0, 0.2], "first_ratio_error": 1e-6, "loss": -0.1, "reward_mean": 5.0}
    lines = [{"epoch": epoch, **line} for epoch in range(epochs)]
    lines[0].update(eval_diversity=0.3, eval_reward_mean=5.0, eval_reward_std=1.0)
    lines[-1].update(changes)
    return lines


def test_a_healthy_run_sets_off_no_alarm():
    for epochs in (1, 2, 5, 50):
        assert ddpo.alarms(run(epochs), updates=3) == {}
    rwr = run(9)
    for line in rwr:
        line.update(clip_fraction=None, clip_fraction_by_step=None, first_ratio_error=None)
    assert ddpo.alarms(rwr, updates=0) == {}


@pytest.mark.parametrize("changes, name, words", [
    ({"loss": math.nan}, "not finite", "--lr"),
    ({"clip_fraction_by_step": [0.0, math.inf]}, "not finite", "--lr"),
    ({"first_ratio_error": 2e-5}, "ratio", "off 1 by 2.0e-05"),
    ({"grad_norm": 4.1}, "gradient", "over 10 times"),
    ({"eval_diversity": 0.14, "eval_reward_mean": 5.6}, "diversity", "0.30 -> 0.14"),
])
def test_an_alarm_for_each_way_to_fail(changes, name, words):
    found = ddpo.alarms(run(6, **changes), updates=3)
    assert list(found) == [name] and words in found[name]


@pytest.mark.parametrize("changes", [{"first_ratio_error": 9e-6}, {"grad_norm": 3.9}, {"eval_diversity": 0.16, "eval_reward_mean": 5.6},
                                     {"eval_diversity": 0.14, "eval_reward_mean": 5.4}, {"clip_fraction": 0.0}])
def test_short_of_the_threshold_there_is_no_alarm(changes):
    assert ddpo.alarms(run(6, **changes), updates=3) == {}


def test_updates_that_fp16_skipped_are_no_norm_to_compare_with():
    lines = run(6)
    for line in lines[:3]:
        line["grad_norm"] = 0
    assert ddpo.alarms(lines, updates=3) == {} and ddpo.alarms(run(4, grad_norm=0), updates=3) == {}


@pytest.mark.parametrize("fraction, words", [(0.0005, "larger --lr"), (0.69, "wider --clip-range")])             # of 4 updates at most 75 % can clip
def test_three_epochs_of_clipping_nothing_or_everything(fraction, words):
    lines = run(6)
    for line in lines[-2:]:
        line["clip_fraction"] = fraction
    lines[-3]["clip_fraction"] = fraction
    assert words in ddpo.alarms(lines, updates=3)["clipping"]
    assert ddpo.alarms(lines, updates=0) == {} and ddpo.alarms(lines[:2], updates=3) == {}
