"""RWR and RWR-sparse against numbers by hand, numpy, diffusers' noising and plain autograd.

And the alarms against made-up runs.
"""

import copy
import json
import math

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ddpo
from ddpo import RWR, RWRSparse, Trajectories, averaged, optimizer_step
from helpers import SD, BarePolicy, choices, normal, small_unet
from scheduler import NoiseSchedule, Sampler, named_noise

PROMPTS, NAME = ["a cat", "a dog", "", "a bee"], [3, 1, 1]
EMBEDS = dict(zip(PROMPTS, normal(4, 7, 16, seed=1), strict=True))
# of five samples, one is not to be drawn
MIXED, WEIGHTS = ["a cat", "a dog", "a bee", "a cat", "a cat"], torch.tensor([0.5, 2, 0, 1, 1.5])


def bare_policy():
    """T is 3: that training draws from all of the schedule's timesteps has to show."""
    sampler = Sampler(NoiseSchedule.from_config(SD), 3, 1.0)
    return BarePolicy(small_unet(), sampler, dict(EMBEDS))


def samples(n=5):
    return normal(n, 4, 8, 8, seed=2)


def records(x_0, sizes=(2, 3)):
    """What RWR keeps of batches of such sizes whose last latents are x_0."""
    parts = []
    for part in x_0.split(sizes):
        latents = torch.cat([normal(len(part), 3, 4, 8, 8, seed=7), part[:, None]], dim=1)
        rows = (torch.zeros(len(part), 3), torch.arange(3), torch.zeros(len(part), 7, 16))
        parts.append(RWR(choices()).record(Trajectories(latents, *rows)))
    return parts


def learner(updates=3, batch=4, guidance=5.0, cls=RWR, **more):
    return cls(choices(updates=updates, batch_size=batch, guidance=guidance, **more))


def regress(policy, optimizer, weights, prompts, micro_batch=3, limit=math.inf, **numbers):
    """An epoch of RWR -> metrics, averaged."""
    algorithm, updates = learner(**numbers), []
    kept = records(samples(len(weights)), (2, len(weights) - 2))
    for batch in algorithm.batches(policy, kept, prompts, weights, NAME):
        updates.append(optimizer_step(policy, algorithm, optimizer, batch, micro_batch, limit))
    return averaged(updates)


def by_hand(policy, optimizer, weights, prompts, updates, guidance, batch):
    """The same training written down from the text of Sec. 4.2 and App. E.1 -> losses.

    With diffusers' forward process, guidance by two separate passes, weights that average 1.
    """
    weights = weights / sum(weights) * sum(weights > 0)
    noising = diffusers.DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False)
    x_0, rng, losses = samples(len(weights)), np.random.default_rng(NAME), []
    order = []
    while len(order) < updates * batch:
        order += rng.permutation([i for i in range(len(weights)) if weights[i] > 0]).tolist()
    for n in range(updates):
        chosen = order[n * batch : (n + 1) * batch]
        t = torch.from_numpy(rng.integers(1000, size=batch))
        noise = named_noise((4, 8, 8), batch, *NAME, n)
        x_t = noising.add_noise(x_0[chosen], noise, t)
        eps = policy.unet(x_t, t, torch.stack([EMBEDS[prompts[i]] for i in chosen]))
        if guidance != 1:
            without = policy.unet(x_t, t, EMBEDS[""].expand(batch, 7, 16))
            eps = guidance * eps + (1 - guidance) * without
        rows = zip(chosen, eps, noise, strict=True)
        loss = sum(weights[i] * F.mse_loss(guess, truth) for i, guess, truth in rows) / batch
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_same_weights(mine, theirs, rtol=1e-4, atol=1e-5):
    for one, other in zip(mine.unet.parameters(), theirs.unet.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


# ---- Weights -------------------------------------------------------------------------------------


def test_rwr_weights_by_hand():
    prompts = ["a", "b", "a", "c", "b", "b"]
    rewards = torch.tensor([0.0, 1.0, math.log(3), 7.0, 1.0, 1.0])
    expected = [0.5, 1, 1.5, 1, 1, 1]
    assert ddpo.rwr_weights(prompts, rewards, 1.0).tolist() == pytest.approx(expected)
    expected = [0.2, 1, 1.8, 1, 1, 1]
    assert ddpo.rwr_weights(prompts, rewards, 2.0).tolist() == pytest.approx(expected)
    assert learner(beta=2.0).weights(prompts, rewards).tolist() == pytest.approx(expected)


def test_rwr_weights_average_1_within_a_prompt_and_survive_large_rewards():
    rng = np.random.default_rng(0)
    prompts = [str(i) for i in rng.integers(5, size=200)]
    rewards = torch.from_numpy(rng.normal(-30_000, 40, 200))
    weights = ddpo.rwr_weights(prompts, rewards, 0.2).numpy()
    for prompt in set(prompts):
        mine = np.array(prompts) == prompt
        r, w = rewards.numpy()[mine], weights[mine]
        assert w.mean() == pytest.approx(1)
        # exp(beta r), whatever Z is
        assert np.log(w[0] / w[1]) == pytest.approx(0.2 * (r[0] - r[1]))


@pytest.mark.parametrize("percentile", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_sparse_weights_are_1_from_numpys_percentile_on(percentile):
    rng = np.random.default_rng(1)
    prompts = [str(i) for i in rng.integers(7, size=150)]
    rewards = rng.normal(size=150).astype(np.float32)
    weights = ddpo.sparse_weights(prompts, torch.from_numpy(rewards), percentile).tolist()
    for prompt, reward, weight in zip(prompts, rewards, weights, strict=True):
        mine = rewards[np.array(prompts) == prompt]
        threshold = np.percentile(mine, 100 * percentile).astype(np.float32)
        assert weight == float(reward >= threshold)


def test_sparse_weights_by_hand():
    few, rewards = ["a"] * 8 + ["b"] * 2, torch.tensor([3.0, 1, 8, 2, 5, 4, 7, 6, 0, 0])
    best = [0, 0, 1, 0, 0, 0, 0, 0, 1, 1]
    assert ddpo.sparse_weights(few, rewards, 0.9).tolist() == best
    assert learner(cls=RWRSparse, percentile=0.9).weights(few, rewards).tolist() == best
    assert ddpo.sparse_weights(["a"] * 11, torch.arange(11.0), 0.9).tolist() == [0] * 9 + [1, 1]
    assert ddpo.sparse_weights(few, torch.arange(10.0), 0).tolist() == [1] * 10


KEPT = [  # samples a prompt, percentile, of which are kept, what is said
    (2, 0.9, 1, "keeps 50% of the samples, not 10%"),
    (4, 0.9, 1, "keeps 25% of the samples, not 10%"),
    (6, 0.9, 1, ""),
    (10, 0.9, 1, ""),
    (4, 0.5, 2, ""),
]


@pytest.mark.parametrize("count, percentile, kept, words", KEPT)
def test_sparse_weights_that_keep_more_than_twice_what_was_asked_say_so(
    count, percentile, kept, words, capsys
):
    algorithm = learner(cls=RWRSparse, percentile=percentile)
    weights = algorithm.weights(["a"] * count + ["b"] * count, torch.arange(2.0 * count))
    assert weights.sum().item() == 2 * kept
    said = capsys.readouterr().out.splitlines()
    assert len(said) == bool(words) and words in "".join(said)


def test_denoising_loss_by_hand():
    eps = torch.zeros(2, 1, 2, 2, requires_grad=True)
    noise = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]], [[[2.0, 2.0], [2.0, 2.0]]]])
    losses = ddpo.denoising_loss(eps, noise, torch.tensor([2.0, 0.5]))
    assert losses.tolist() == pytest.approx([15.0, 2.0])
    losses.sum().backward()
    # -2 weight (noise - eps) / D
    assert eps.grad[0].flatten().tolist() == [-1, -2, -3, -4]
    assert eps.grad[1].flatten().tolist() == [-0.5] * 4


# ---- The algorithm's parts -----------------------------------------------------------------------


def test_of_a_trajectory_x_0_alone_is_kept_and_no_view_of_the_rest():
    latents = normal(3, 4, 4, 8, 8)
    rows = (torch.zeros(3, 3), torch.arange(3), torch.zeros(3, 7, 16))
    kept = RWR(choices()).record(Trajectories(latents, *rows))
    assert torch.equal(kept, latents[:, 3])
    assert kept.untyped_storage().nbytes() == 3 * 4 * 8 * 8 * 4


def test_a_batch_is_rows_of_x_t_timesteps_prompts_noise_and_weights():
    """Each row noised as at its own timestep; all of the schedule's 1000 are drawn from."""
    policy = bare_policy()
    noising = diffusers.DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False)
    # samples that can be told apart from x_t and noise; rows differ, so do weights and prompts
    x_0, prompts = samples(), [*PROMPTS, "a cow"]
    policy.embeds["a cow"] = normal(7, 16, seed=9)
    weights = torch.tensor([0.5, 1.25, 0.0, 0.75, 1.5])  # those above 0 average 1
    algorithm, drawn = learner(updates=50, batch=8), []
    batches = list(algorithm.batches(policy, records(x_0), prompts, weights, NAME))
    assert len(batches) == 50
    for n, batch in enumerate(batches):
        assert len(batch) == 8
        x_t, t, cond = batch[:][:3]
        noise, row_weights = batch[:][3:]
        assert torch.equal(noise, named_noise((4, 8, 8), 8, *NAME, n))
        which = [weights.tolist().index(weight) for weight in row_weights.tolist()]
        expected = torch.stack([policy.embeds[prompts[i]] for i in which])
        assert torch.equal(cond, expected)
        torch.testing.assert_close(x_t, noising.add_noise(x_0[which], noise, t))
        drawn += t.tolist()
    assert 0 <= min(drawn) < 30 and 970 < max(drawn) < 1000 and len(set(drawn)) > 250


def row_weights(weights):
    """The weights in an epoch's batches, every sample drawn once, in order."""
    weights = torch.as_tensor(weights)
    algorithm, n = learner(updates=1, batch=int((weights > 0).sum())), len(weights)
    kept = records(samples(n), (2, n - 2))
    [batch] = algorithm.batches(bare_policy(), kept, ["a cat"] * n, weights, NAME)
    return sorted(batch[:][4].tolist())


def test_weights_average_1_over_what_is_drawn_although_some_underflow():
    rewards = torch.tensor([0.0, -1e4, -2e4, -1e5, 3.0, 3.0, 3.0, 3.0], dtype=torch.float64)
    weights = learner(beta=1.0).weights(["a cat"] * 4 + ["a dog"] * 4, rewards)
    assert weights.tolist() == pytest.approx([4, 0, 0, 0, 1, 1, 1, 1])
    assert weights.dtype == torch.float32
    assert row_weights(weights[:4]) == pytest.approx([1])  # and not 4
    assert row_weights(weights) == pytest.approx([0.625] * 4 + [2.5])
    assert row_weights([0.5, 1.5, 1.0]) == [0.5, 1.0, 1.5]


def test_a_slice_of_a_batch_is_what_the_losses_take():
    policy, algorithm = bare_policy(), learner(updates=1)
    [batch] = algorithm.batches(policy, records(samples()), MIXED, WEIGHTS, NAME)
    whole, logged = algorithm.losses(policy, batch[0:4])
    assert logged == {} and whole.shape == (4,) and whole.requires_grad
    parts = [algorithm.losses(policy, batch[start : start + 3])[0] for start in (0, 3)]
    assert [len(part) for part in parts] == [3, 1]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cls", [RWR, RWRSparse])
def test_nothing_is_carried_from_epoch_to_epoch(cls):
    algorithm, settings = learner(cls=cls), choices(updates=3)
    assert json.loads(json.dumps(algorithm.state_dict())) == {}
    assert algorithm.load_state_dict({}) is None and algorithm.setup(bare_policy()) is None
    assert algorithm.metrics({"loss": torch.zeros(4)}) == {}
    assert cls.fresh_optimizer  # nor are Adam's moments
    before = copy.copy(settings)
    cls.settle(settings, {"updates": 3})
    assert settings == before


# ---- Training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_regression_equals_weighted_denoising_training_by_hand(guidance):
    mine, theirs = bare_policy(), bare_policy()

    def adam(policy):
        return torch.optim.AdamW(policy.unet.parameters(), lr=0.01, eps=1e-3)

    metrics = regress(mine, adam(mine), WEIGHTS, MIXED, guidance=guidance)
    losses = by_hand(theirs, adam(theirs), WEIGHTS, MIXED, 3, guidance, 4)
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert_same_weights(mine, theirs)


def test_without_cfg_training_the_plain_prediction_is_trained():
    mine, theirs = bare_policy(), bare_policy()
    optimizer = torch.optim.SGD(mine.unet.parameters(), lr=0.01)
    metrics = regress(mine, optimizer, WEIGHTS, MIXED, guidance=5.0, no_cfg_training=True)
    optimizer = torch.optim.SGD(theirs.unet.parameters(), lr=0.01)
    losses = by_hand(theirs, optimizer, WEIGHTS, MIXED, 3, 1.0, 4)
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert_same_weights(mine, theirs)


@pytest.mark.parametrize("cls, numbers", [(RWR, {"beta": 1e-12}), (RWRSparse, {"percentile": 0.0})])
def test_with_one_prompt_and_no_preference_it_is_plain_denoising_training(cls, numbers):
    prompts, mine, theirs = ["a cat"] * 6, bare_policy(), bare_policy()
    rewards = torch.tensor([1.0, -2.0, 3.0, 10.0, 0.0, 0.5])
    weights = learner(cls=cls, **numbers).weights(prompts, rewards)
    regress(mine, torch.optim.SGD(mine.unet.parameters(), lr=0.01), weights, prompts, updates=4)
    optimizer = torch.optim.SGD(theirs.unet.parameters(), lr=0.01)
    by_hand(theirs, optimizer, torch.ones(6), prompts, 4, 5.0, 4)
    assert_same_weights(mine, theirs)


def test_every_sample_comes_once_before_any_comes_again_and_those_of_weight_0_never():
    policy = bare_policy()
    policy.embeds.update({f"{i}": torch.zeros(7, 16) for i in range(8)})
    weights = torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1])
    kept = records(samples(8), (5, 3))
    for _ in learner().batches(policy, kept, list("01234567"), weights, NAME):
        pass
    drawn = policy.embedded
    assert len(drawn) == 12
    assert sorted(drawn[:6]) == sorted(drawn[6:]) == list("023567")
    assert drawn[:6] != drawn[6:]


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_micro_batches_do_not_change_the_step(micro_batch):
    whole = bare_policy()
    cut = copy.deepcopy(whole)
    for policy, size in ((whole, 100), (cut, micro_batch)):
        optimizer = torch.optim.SGD(policy.unet.parameters(), lr=0.01)
        regress(policy, optimizer, WEIGHTS, MIXED, updates=1, micro_batch=size)
    assert_same_weights(whole, cut, atol=1e-6)


def test_learning_rates_and_the_clipping_of_the_gradient_reach_the_steps():
    policy = bare_policy()
    before = [q.detach().clone() for q in policy.unet.parameters()]
    optimizer = torch.optim.SGD(policy.unet.parameters(), lr=0.5)
    metrics = regress(policy, optimizer, torch.ones(5), ["a cat"] * 5, updates=1, limit=0.01)
    pairs = zip(policy.unet.parameters(), before, strict=True)
    moved = math.sqrt(sum((q - b).square().sum().item() for q, b in pairs))
    assert moved == pytest.approx(0.5 * 0.01, rel=1e-3)
    assert metrics["grad_norm"] > 0.02


def test_what_three_processes_draw_is_what_one_does_dealt_in_turn(monkeypatch):
    """Each has the shares of the samples; prompts and weights are all processes'."""
    x_0, prompts = samples(6), ["a cat", "a dog", "a bee", "a cat", "a cat", "a dog"]
    weights = torch.tensor([0.5, 2.0, 0.0, 1.0, 1.5, 0.25])
    whole = list(learner(batch=6).batches(bare_policy(), [x_0], prompts, weights, NAME))
    parts = []
    for rank in range(3):
        monkeypatch.setattr(ddpo, "processes", lambda rank=rank: (rank, 3))

        def all_gather(shares, mine, rank=rank):
            assert torch.equal(mine, x_0[rank::3])
            for other, share in enumerate(shares):
                share.copy_(x_0[other::3])

        monkeypatch.setattr(ddpo.dist, "all_gather", all_gather)
        mine = [x_0[rank::3][:1], x_0[rank::3][1:]]
        parts.append(list(learner(batch=6).batches(bare_policy(), mine, prompts, weights, NAME)))
    for n in range(3):
        for rank in range(3):
            assert len(parts[rank][n]) == 2
            for ours, all_rows in zip(parts[rank][n][:], whole[n][:], strict=True):
                assert torch.equal(ours, all_rows[rank::3])


# ---- Alarms --------------------------------------------------------------------------------------


def run(epochs, **changes):
    """The lines of a healthy run, with the figures of its last epoch changed."""
    line = {
        "grad_norm": 0.4,
        "clip_fraction": 0.1,
        "first_ratio_error": 1e-6,
        "loss": -0.1,
        "reward_mean": 5.0,
        "reward_std": 0.5,
        "diversity": None,
    }
    lines = [{"epoch": epoch, **line} for epoch in range(epochs)]
    lines[0].update(eval_diversity=0.3, eval_reward_mean=5.0, eval_reward_std=1.0)
    lines[-1].update(changes)
    return lines


def test_a_healthy_run_sets_off_no_alarm():
    for epochs in (1, 2, 5, 50):
        assert ddpo.alarms(run(epochs), updates=4) == {}
    rwr = run(9)
    for line in rwr:
        line.update(clip_fraction=None, first_ratio_error=None)
    assert ddpo.alarms(rwr, updates=400) == {}


FAILING = [
    ({"loss": math.nan}, "not finite", "--lr"),
    ({"mine_by_step": [0.0, math.inf]}, "not finite", "--lr"),
    ({"grad_norm": -math.inf}, "not finite", "--lr"),
    ({"first_ratio_error": 2e-5}, "ratio", "off 1 by 2.0e-05"),
    ({"grad_norm": 4.1}, "gradient", "is 10 times what it was"),
    ({"eval_diversity": 0.14, "eval_reward_mean": 5.6}, "diversity", "to 47% of the base"),
    ({"reward_std": 0.0}, "spread", "all rewards of the epoch are alike"),
]


@pytest.mark.parametrize("changes, name, words", FAILING)
def test_an_alarm_for_each_way_to_fail(changes, name, words):
    found = ddpo.alarms(run(6, **changes), updates=4)
    assert list(found) == [name] and words in found[name]


def test_several_alarms_at_once():
    found = ddpo.alarms(run(6, grad_norm=5.0, first_ratio_error=1.0), updates=4)
    assert set(found) == {"gradient", "ratio"}


NEARLY = [
    {"first_ratio_error": 9e-6},
    {"grad_norm": 3.9},
    {"eval_diversity": 0.16, "eval_reward_mean": 5.6},
    {"eval_diversity": 0.14, "eval_reward_mean": 5.4},
    {"clip_fraction": 0.0},
    {"eval_diversity": None},
]


@pytest.mark.parametrize("changes", NEARLY)
def test_short_of_the_threshold_there_is_no_alarm(changes):
    assert ddpo.alarms(run(6, **changes), updates=4) == {}


def test_a_gradient_is_compared_with_the_median_of_up_to_20_epochs_before():
    lines = run(26, grad_norm=4.1)
    for line in lines[:5]:
        line["grad_norm"] = 100.0  # forgotten
    for line in lines[5:14]:
        line["grad_norm"] = 100.0  # nine of twenty: the median does not mind
    assert "gradient" in ddpo.alarms(lines, updates=4)
    lines[14]["grad_norm"] = 100.0  # ten of twenty
    assert ddpo.alarms(lines, updates=4) == {}
    assert "gradient" in ddpo.alarms(run(4, grad_norm=4.1), updates=4)
    assert ddpo.alarms(run(3, grad_norm=4.1), updates=4) == {}  # two are too few to judge by


def test_updates_that_fp16_skipped_are_no_norm_to_compare_with():
    lines = run(6)
    for line in lines[:3]:
        line["grad_norm"] = 0
    assert ddpo.alarms(lines, updates=4) == {}
    assert ddpo.alarms(run(4, grad_norm=0), updates=4) == {}


def test_diversity_is_that_of_the_first_and_of_the_last_evaluation():
    lines = run(9)
    lines[3].update(eval_diversity=0.05, eval_reward_mean=9.0, eval_reward_std=1.0)
    assert "diversity" in ddpo.alarms(lines, updates=4)
    lines[6].update(eval_diversity=0.25, eval_reward_mean=9.0, eval_reward_std=1.0)
    assert ddpo.alarms(lines, updates=4) == {}


# of 4 updates at most 75 % can clip; the advice, and the share of the three that can
CLIPPING = [(0.0005, "larger --lr", "0.1%"), (0.69, "wider --clip-range", "92.0%")]


@pytest.mark.parametrize("fraction, words, share", CLIPPING)
def test_three_epochs_of_clipping_nothing_or_everything(fraction, words, share):
    lines = run(6)
    for line in lines[-3:]:
        line["clip_fraction"] = fraction
    message = ddpo.alarms(lines, updates=4)["clipping"]
    assert words in message and message.startswith(share)
    assert "clipping" in ddpo.alarms(lines[-3:], updates=4)
    assert ddpo.alarms(lines, updates=1) == {} and ddpo.alarms(lines[-2:], updates=4) == {}
    # nothing to learn from: no advice about the learning rate
    assert list(ddpo.alarms([*lines, {**lines[-1], "reward_std": 0.0}], updates=4)) == ["spread"]
    lines[-3]["clip_fraction"] = 0.4
    assert ddpo.alarms(lines, updates=4) == {}  # on average of the three


@pytest.mark.parametrize("fraction", [0.0009, 0.003, 0.3, 0.66])
def test_clipping_of_0_1_to_90_percent_is_healthy(fraction):
    lines = run(6)
    for line in lines:
        line["clip_fraction"] = fraction
    assert ddpo.alarms(lines, updates=4) == {}
