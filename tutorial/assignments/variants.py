"""The eight variants: their tasks, the right answers, the mistakes that have a name.

Students do not get this file. They get `stubs`, the signatures and docstrings of the eight oracles
below, and write three of them (parts.variants_of), which no file of this project holds: neither
the modules nor the chapters nor algorithms/. The oracles are brute force, in float64: equations
solved, densities integrated, pairs counted, exponentials of any size by `decimal`.

As in oracles.py a mistake is a function `variant__mistake`, whose docstring the student reads.
"""

import ast
import math
from decimal import Decimal, getcontext
from pathlib import Path

import numpy as np

getcontext().prec = 40
HEADER = '''"""Three functions that no file of this project holds.

Write yours, which `own.md` names, and leave the others alone. Arguments are tensors, but for
numbers and lists of str. scheduler.py and ddpo.py may be imported.
"""

import torch
'''


def v_to_noise(v, x_t, alpha_bar_t):
    """Noise and picture from a network that predicts v (Salimans and Ho 2022, arXiv 2202.00512).

    Such a network is trained to predict v = sqrt(alpha_bar_t) noise - sqrt(1 - alpha_bar_t) x_0,
    where x_t is as in `add_noise`. All of this project wants the noise instead. It should be exact
    for every alpha_bar_t from 0 to 1, both ends included.
    v, x_t (B, 4, h, w); alpha_bar_t (B,) -> eps (B, 4, h, w), x_0 (B, 4, h, w).
    """
    eps, x_0 = np.empty_like(v), np.empty_like(v)
    for b, alpha_bar in enumerate(alpha_bar_t):
        signal, rest = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        known = np.stack([x_t[b].ravel(), v[b].ravel()])
        found = np.linalg.solve([[signal, rest], [-rest, signal]], known)
        x_0[b], eps[b] = found.reshape(2, *v[b].shape)
    return eps, x_0


def v_to_noise__sign(v, x_t, alpha_bar_t):
    """the sign of v is turned"""
    return v_to_noise(-v, x_t, alpha_bar_t)


def v_to_noise__order(v, x_t, alpha_bar_t):
    """both are right, but in the other order: the noise comes first"""
    return v_to_noise(v, x_t, alpha_bar_t)[::-1]


def v_to_noise__roots_forgotten(v, x_t, alpha_bar_t):
    """the square roots are forgotten: alpha_bar_t is a variance"""
    now = alpha_bar_t[:, None, None, None]
    return now * v + (1 - now) * x_t, now * x_t - (1 - now) * v


def v_to_noise__divided(v, x_t, alpha_bar_t):
    """divided by the root of alpha_bar_t: at 0 that is no number, and no division is needed"""
    now = alpha_bar_t[:, None, None, None]
    _, x_0 = v_to_noise(v, x_t, alpha_bar_t)
    with np.errstate(all="ignore"):
        return (v + (1 - now) ** 0.5 * x_0) / now**0.5, x_0


def bayes(x_t, x_0, alpha_bar_t, alpha_bar_prev):
    """x_{t-1} given x_t and x_0: a slice of their joint Gaussian -> mean, variance. Numbers."""
    alpha = alpha_bar_t / alpha_bar_prev
    covariance = alpha**0.5 * (1 - alpha_bar_prev)
    slope = covariance / (1 - alpha_bar_t)
    mean = alpha_bar_prev**0.5 * x_0 + slope * (x_t - alpha_bar_t**0.5 * x_0)
    return mean, 1 - alpha_bar_prev - slope * covariance


def variances(alpha_bar_t, alpha_bar_prev):
    """-> the smaller one, of the posterior, the larger one, of a step forward; both (B,)."""
    pairs = zip(alpha_bar_t, alpha_bar_prev, strict=True)
    small = np.array([bayes(0, 0, now, before)[1] for now, before in pairs])
    return np.maximum(small, 0), 1 - alpha_bar_t / alpha_bar_prev


def ddpm_mean(eps, x_t, alpha_bar_t, alpha_bar_prev):
    """The posterior's, sample by sample."""
    x_0, mean = np.empty_like(x_t), np.empty_like(x_t)
    for b, (now, before) in enumerate(zip(alpha_bar_t, alpha_bar_prev, strict=True)):
        x_0[b] = (x_t[b] - (1 - now) ** 0.5 * eps[b]) / now**0.5
        mean[b] = bayes(x_t[b], x_0[b], now, before)[0]
    return mean


def ddpm_mean_std(eps, x_t, alpha_bar_t, alpha_bar_prev, large):
    """DDPM's Gaussian with a variance between its two (Nichol and Dhariwal 2021, 2102.09672).

    Ho et al. 2020 allow two variances: the small one is the posterior's, as here at eta = 1; the
    large one is that of one step forward. `large` says how much of the large one there is, on a
    logarithmic scale: log std^2 lies between the logarithms of the two, at 0 on the small one, at 1
    on the large one. Where the small one is 0, std is 0, unless large is 1. The mean is always the
    posterior's: it does not depend on `large`.
    eps, x_t (B, 4, h, w); alpha_bar_t, alpha_bar_prev (B,) -> mean (B, 4, h, w), std (B,).
    """
    small, most = variances(alpha_bar_t, alpha_bar_prev)
    std = [s ** (1 - large) * m**large for s, m in zip(small, most, strict=True)]
    return ddpm_mean(eps, x_t, alpha_bar_t, alpha_bar_prev), np.array(std) ** 0.5


def ddpm_mean_std__linear(eps, x_t, alpha_bar_t, alpha_bar_prev, large):
    """the variances themselves are mixed, where their logarithms are to be"""
    small, most = variances(alpha_bar_t, alpha_bar_prev)
    std = (small * (1 - large) + most * large) ** 0.5
    return ddpm_mean(eps, x_t, alpha_bar_t, alpha_bar_prev), std


def ddpm_mean_std__ends_swapped(eps, x_t, alpha_bar_t, alpha_bar_prev, large):
    """the two have changed places: large = 1 should be the larger one"""
    return ddpm_mean_std(eps, x_t, alpha_bar_t, alpha_bar_prev, 1 - large)


def ddpm_mean_std__variance(eps, x_t, alpha_bar_t, alpha_bar_prev, large):
    """the mean is right, but the second output is the variance, not its root"""
    mean, std = ddpm_mean_std(eps, x_t, alpha_bar_t, alpha_bar_prev, large)
    return mean, std**2


def ddpm_mean_std__ddim(eps, x_t, alpha_bar_t, alpha_bar_prev, large):
    """the mean is DDIM's for this std: here it is the posterior's, whatever the std"""
    _, std = ddpm_mean_std(eps, x_t, alpha_bar_t, alpha_bar_prev, large)
    now, before = (a[:, None, None, None] for a in (alpha_bar_t, alpha_bar_prev))
    x_0 = (x_t - (1 - now) ** 0.5 * eps) / now**0.5
    towards = np.maximum(1 - before - std[:, None, None, None] ** 2, 0) ** 0.5
    return before**0.5 * x_0 + towards * eps, std


def ddpm_mean_std__log_of_zero(eps, x_t, alpha_bar_t, alpha_bar_prev, large):
    """a variance of 0 has no logarithm: std is 0 there, or at 1 the large one's"""
    small, most = variances(alpha_bar_t, alpha_bar_prev)
    with np.errstate(all="ignore"):
        std = np.exp((1 - large) * np.log(small) + large * np.log(most)) ** 0.5
    return ddpm_mean(eps, x_t, alpha_bar_t, alpha_bar_prev), std


def joint_ppo_loss(log_prob, log_prob_old, advantages, dimensions, limit):
    """PPO's loss by the ratio of whole actions, not its D-th root, with a clip range to match.

    log_prob and log_prob_old are means over D = `dimensions`, as everywhere here. The ratio is that
    of the densities of all D numbers together. Its logarithm is first held between -5 and 5, so
    that nothing overflows, and clipped between -limit and limit: the ratio is clipped to a range
    that is wider above 1 than below. The loss takes the lesser of the two as `ppo_loss` does.
    log_prob, log_prob_old, advantages (B,) -> losses (B,), ratios before the clip (B,).
    """
    return joint(log_prob, log_prob_old, advantages, dimensions, np.exp(-limit), np.exp(limit))


def joint(log_prob, log_prob_old, advantages, dimensions, low, high, most=math.exp(5)):
    """By the cells of PPO's table; the density ratio is multiplied dimension by dimension."""
    losses, ratios = [], []
    for now, old, A in zip(log_prob, log_prob_old, advantages, strict=True):
        with np.errstate(over="ignore"):
            ratio = np.prod(np.full(dimensions, np.exp(now - old)))
        ratio = min(max(ratio, 1 / most), most)
        held = min(ratio, high) if A >= 0 else max(ratio, low)
        with np.errstate(invalid="ignore"):
            losses.append(-A * held if ratio < np.inf else -min(ratio * A, high * A))
        ratios.append(ratio)
    return np.array(losses), np.array(ratios)


def joint_ppo_loss__root(log_prob, log_prob_old, advantages, dimensions, limit):
    """that is still the D-th root of the ratio, as in `ppo_loss`: log_prob is a mean over D"""
    return joint(log_prob, log_prob_old, advantages, 1, np.exp(-limit), np.exp(limit))


def joint_ppo_loss__symmetric(log_prob, log_prob_old, advantages, dimensions, limit):
    """the ratio is clipped to 1 +- limit, where its logarithm is to be, to +-limit"""
    return joint(log_prob, log_prob_old, advantages, dimensions, 1 - limit, 1 + limit)


def joint_ppo_loss__sign(log_prob, log_prob_old, advantages, dimensions, limit):
    """the sign is turned: a loss falls, and the reward should rise"""
    loss, ratio = joint_ppo_loss(log_prob, log_prob_old, advantages, dimensions, limit)
    return -loss, ratio


def joint_ppo_loss__not_held(log_prob, log_prob_old, advantages, dimensions, limit):
    """the exponential overflows: its argument is to be held between -5 and 5"""
    with np.errstate(all="ignore"):
        ratio = np.exp(dimensions * (log_prob - log_prob_old))
        clipped = np.clip(ratio, np.exp(-limit), np.exp(limit))
        return -np.minimum(ratio * advantages, clipped * advantages), ratio


def joint_ppo_loss__max_for_min(log_prob, log_prob_old, advantages, dimensions, limit):
    """the larger of the two is taken: the bound should be the pessimistic one, their minimum"""
    ratio = np.exp(np.clip(dimensions * (log_prob - log_prob_old), -5, 5))
    clipped = np.clip(ratio, np.exp(-limit), np.exp(limit))
    return -np.maximum(ratio * advantages, clipped * advantages), ratio


def leave_one_out(prompts, rewards):
    """Advantages against the others of the same prompt (RLOO, Ahmadian et al. 2024, 2402.14740).

    The baseline of a sample is the mean reward of the *other* samples of its prompt, in this batch;
    of a sample that is alone with its prompt, its own reward. The advantage is what the reward
    lies above it. No deviation, no limit. Rewards may be near 1e9 and differ by less than 1.
    prompts: B str, rewards float64 (B,) -> advantages float32 (B,), baseline float64 (B,).
    """
    baseline = []
    for i, prompt in enumerate(prompts):
        others = [rewards[j] for j, p in enumerate(prompts) if p == prompt and j != i]
        baseline.append(math.fsum(others) / len(others) if others else rewards[i])
    return rewards - np.array(baseline), np.array(baseline)


def leave_one_out__own_included(prompts, rewards):
    """a sample's own reward is in its baseline: that shrinks the advantage by 1 - 1/n"""
    of = [[r for r, q in zip(rewards, prompts, strict=True) if q == p] for p in prompts]
    baseline = np.array([np.mean(some) for some in of])
    return rewards - baseline, baseline


def leave_one_out__whole_batch(prompts, rewards):
    """the others of the whole batch are taken: those of the same prompt are meant"""
    return leave_one_out(["all"] * len(prompts), rewards)


def leave_one_out__divided(prompts, rewards):
    """the advantage is divided by a deviation: here it is not"""
    advantages, baseline = leave_one_out(prompts, rewards)
    of = [[r for r, q in zip(rewards, prompts, strict=True) if q == p] for p in prompts]
    return advantages / (np.array([np.std(some) for some in of]) + 1e-6), baseline


def leave_one_out__alone(prompts, rewards):
    """a sample that is alone with its prompt divides 0 by 0: its advantage is 0"""
    advantages, baseline = leave_one_out(prompts, rewards)
    alone = np.array([prompts.count(p) == 1 for p in prompts])
    return np.where(alone, np.nan, advantages), np.where(alone, np.nan, baseline)


def leave_one_out__single_precision(prompts, rewards):
    """float32 comes too soon: of rewards near 1e9 it keeps every 64th, take the mean off before"""
    single = rewards.astype(np.float32).astype(np.float64)
    advantages, _ = leave_one_out(prompts, single)
    return advantages, leave_one_out(prompts, rewards)[1]


def rank_advantages(prompts, rewards):
    """Advantages by rank: only the order of a prompt's rewards counts.

    The worst of a prompt's n samples gets -1, the best 1, the others lie between at equal
    distances; of equal rewards each gets the mean of the places that they take together. 0 where
    all are equal, or where there is one sample.
    prompts: B str, rewards float64 (B,) -> float32 (B,).
    """
    return np.array(counted(prompts, rewards))


def counted(prompts, rewards, less=1, lost=1):
    """How many of its prompt each beats, less how many beat it, of n - 1."""
    found = []
    for prompt, reward in zip(prompts, rewards, strict=True):
        mine = [r for r, q in zip(rewards, prompts, strict=True) if q == prompt]
        beaten, better = sum(r < reward for r in mine), sum(r > reward for r in mine)
        found.append((beaten - better) / max(len(mine) - less, 1))
    return found


def rank_advantages__whole_batch(prompts, rewards):
    """the ranks are those in the whole batch: each prompt has its own"""
    return rank_advantages(["all"] * len(prompts), rewards)


def rank_advantages__ties_in_order(prompts, rewards):
    """equal rewards get different ranks, by their place in the batch: they share the mean"""
    later = rewards + 1e-9 * np.arange(len(rewards))
    return rank_advantages(prompts, later)


def rank_advantages__lowest_of_ties(prompts, rewards):
    """equal rewards all get the lowest of their places: they share the mean of these"""
    found = []
    for prompt, reward in zip(prompts, rewards, strict=True):
        mine = [r for r, q in zip(rewards, prompts, strict=True) if q == prompt]
        below = sum(r < reward for r in mine)
        found.append(2 * below / (len(mine) - 1) - 1 if len(mine) > 1 else 0)
    return np.array(found, dtype=float)


def rank_advantages__reversed(prompts, rewards):
    """the order is reversed: the best should get 1"""
    return -rank_advantages(prompts, rewards)


def rank_advantages__divided_by_n(prompts, rewards):
    """divided by n, where there are n - 1 distances: the best does not reach 1"""
    return np.array(counted(prompts, rewards, less=0))


def trajectory_weights(log_probs, log_probs_old, dimensions):
    """True importance weights of whole trajectories, and how many samples they are worth.

    log_probs and log_probs_old are means over D = `dimensions`, of T actions each. The weight of a
    trajectory is the ratio of the densities of all T actions, of D numbers each; weights are then
    divided by their mean over the batch. The effective size is (sum w)^2 / sum w^2. Ratios may be
    far too large, or too small, for a float: the weights must not be.
    log_probs, log_probs_old (B, T) -> weights (B,), effective size ().
    """
    return weighed(log_probs, log_probs_old, dimensions)


def weighed(log_probs, log_probs_old, dimensions, steps=1.0):
    """The exponentials in 40 digits with exponents of any size."""
    ratios = []
    for now, old in zip(log_probs, log_probs_old, strict=True):
        moved = sum(Decimal(float(a)) - Decimal(float(b)) for a, b in zip(now, old, strict=True))
        ratios.append((moved * dimensions * Decimal(steps)).exp())
    weights = np.array([float(ratio * len(ratios) / sum(ratios)) for ratio in ratios])
    return weights, np.sum(weights) ** 2 / np.sum(weights**2)


def trajectory_weights__root(log_probs, log_probs_old, dimensions):
    """that is the D-th root of the ratio: log_probs are means over D numbers"""
    return weighed(log_probs, log_probs_old, 1)


def trajectory_weights__averaged(log_probs, log_probs_old, dimensions):
    """averaged over the steps: the densities of all T actions are multiplied"""
    return weighed(log_probs, log_probs_old, dimensions, 1 / log_probs.shape[1])


def trajectory_weights__sum_one(log_probs, log_probs_old, dimensions):
    """the weights add up to 1: they should average 1"""
    weights, size = weighed(log_probs, log_probs_old, dimensions)
    return weights / len(weights), size


def trajectory_weights__inverted(log_probs, log_probs_old, dimensions):
    """the ratio is upside down: the present policy's density stands above"""
    return weighed(log_probs_old, log_probs, dimensions)


def trajectory_weights__overflow(log_probs, log_probs_old, dimensions):
    """the exponentials overflow, or all vanish: take off the largest first, or use a softmax"""
    with np.errstate(all="ignore"):
        ratio = np.exp((dimensions * (log_probs - log_probs_old).sum(1)).astype(np.float32))
        weights = (ratio / ratio.mean()).astype(np.float64)
        return weights, weights.sum() ** 2 / (weights**2).sum()


def kl_estimators(log_probs, log_probs_ref, dimensions):
    """Three estimators of KL(p || p_ref) from recorded actions (Schulman, "Approximating KL").

    The actions were drawn from p; log_probs and log_probs_ref are means over D = `dimensions`, of T
    actions each. With rho the ratio p_ref / p of the densities of one action, all D numbers of it,

        k1 = -log rho        k2 = (log rho)^2 / 2        k3 = rho - 1 - log rho

    A trajectory's is the sum over its steps. `means` holds the batch's means of k1, k2, k3;
    `errors` their standard errors: the deviation, with n - 1, over sqrt(n); 0 for n = 1.
    log_probs, log_probs_ref (B, T) -> means (3,), errors (3,).
    """
    return estimated(log_probs, log_probs_ref, dimensions)


def estimated(log_probs, log_probs_ref, dimensions, sign=1, ddof=1):
    """Action by action."""
    rows = []
    for now, ref in zip(log_probs, log_probs_ref, strict=True):
        sums = [0.0, 0.0, 0.0]
        for a, b in zip(now, ref, strict=True):
            x = sign * dimensions * (b - a)
            sums = [sums[0] - x, sums[1] + x * x / 2, sums[2] + math.expm1(x) - x]
        rows.append(sums)
    rows, n = np.array(rows), len(rows)
    squares = ((rows - rows.mean(0)) ** 2).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        errors = (squares / (n - ddof) / n) ** 0.5 if n > ddof else 0 * squares
    return rows.mean(0), errors


def kl_estimators__root(log_probs, log_probs_ref, dimensions):
    """that is a mean over D: the ratio is that of all D numbers of an action"""
    return estimated(log_probs, log_probs_ref, 1)


def kl_estimators__direction(log_probs, log_probs_ref, dimensions):
    """the ratio is upside down: that estimates another divergence, where p_ref has drawn"""
    return estimated(log_probs, log_probs_ref, dimensions, sign=-1)


def kl_estimators__ddof(log_probs, log_probs_ref, dimensions):
    """the deviation of the errors is with n: with n - 1, for the mean is an estimate too"""
    return estimated(log_probs, log_probs_ref, dimensions, ddof=0)


def kl_estimators__added_first(log_probs, log_probs_ref, dimensions):
    """the steps are added first: k2 and k3 are not linear, each action has its own"""
    now, ref = log_probs.sum(1, keepdims=True), log_probs_ref.sum(1, keepdims=True)
    return estimated(now, ref, dimensions)


def kl_estimators__averaged(log_probs, log_probs_ref, dimensions):
    """averaged over the steps: a trajectory's is their sum"""
    means, errors = estimated(log_probs, log_probs_ref, dimensions)
    return means / log_probs.shape[1], errors / log_probs.shape[1]


def kl_to_go(rewards, log_probs, log_probs_ref, dimensions, coefficient):
    """What each action is to answer for: the reward, less the divergence that is still to come.

    The penalty of a step is coefficient (log p - log p_ref), of all D numbers of its action;
    log_probs and log_probs_ref are means over D = `dimensions`. What action k can change is the
    reward at the end and the penalties of the steps from k on, its own included: their sum is its
    return. Returns are numbers that weigh gradients: no gradient flows through them.
    rewards (B,), log_probs, log_probs_ref (B, T), noisiest step first -> float32 (B, T).
    """
    return returned(rewards, log_probs, log_probs_ref, dimensions, coefficient)


def returned(rewards, log_probs, log_probs_ref, dimensions, coefficient, counts=None):
    """A double loop. counts(j, k): does the penalty of step j count for action k?"""
    counts = counts or (lambda j, k: j >= k)
    B, T = log_probs.shape
    returns = np.empty((B, T))
    for i in range(B):
        for k in range(T):
            steps = [j for j in range(T) if counts(j, k)]
            moved = [dimensions * (log_probs[i, j] - log_probs_ref[i, j]) for j in steps]
            returns[i, k] = rewards[i] - coefficient * sum(moved)
    return returns


def kl_to_go__all_steps(**inputs):
    """all steps' penalties count for each action: what is behind it, it cannot change"""
    return returned(**inputs, counts=lambda j, k: True)


def kl_to_go__behind(**inputs):
    """the steps behind the action count, where those still to come should"""
    return returned(**inputs, counts=lambda j, k: j <= k)


def kl_to_go__own_left_out(**inputs):
    """the action's own penalty is left out: it is the one that it can change most"""
    return returned(**inputs, counts=lambda j, k: j > k)


def kl_to_go__sign(**inputs):
    """the penalty is added: leaving the reference would be rewarded"""
    return returned(**{**inputs, "coefficient": -inputs["coefficient"]})


def kl_to_go__root(**inputs):
    """that is a mean over D: the penalty is that of all D numbers of an action"""
    return returned(**{**inputs, "dimensions": 1})


def kl_to_go__with_gradient(**inputs):
    """a gradient flows through the returns: they are numbers that weigh gradients, detach them"""
    return returned(**inputs)


def stubs(names):
    """What students get: these functions' signatures and docstrings -> the text of variants.py."""
    source = Path(__file__).read_text(encoding="utf-8")
    nodes = {getattr(node, "name", ""): node for node in ast.parse(source).body}
    lines, parts = source.splitlines(), [HEADER]
    for name in names:
        first, last = nodes[name].lineno - 1, nodes[name].body[0].end_lineno
        parts.append("\n".join(lines[first:last]))
        parts[-1] += f'\n    raise NotImplementedError("write {name}")\n'
    return "\n\n".join(parts)
