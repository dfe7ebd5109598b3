"""DDPO on some of each picture's steps: cheaper updates, and on average the same gradient.

    python train.py --algorithm tutorial/algorithms/some_steps.py:SomeSteps --set K=4

A picture's loss is the mean over its T steps of l_t. Here K of them are drawn independently, with
replacement, step t with probability p_t, and each is weighed so that the expectation stays:

    1/T sum_t l_t  =  E[ 1/K sum_j l_{t_j} / (T p_{t_j}) ]

The weight stands outside the clip, so that this holds for DDPO_SF's gradient and for DDPO_IS's
surrogate, clipped pairs included. p_t is uniform, as others have it (`timestep_fraction`), or in
proportion to w_t of `ddpo.noise_weights`: then the steps with the large gradients are drawn more
often, and weighed down.
"""

import numpy as np
import torch

from ddpo import DDPO, DDPOEqualCredit, Pairs, Trajectories, noise_weights, processes, share


def step_weights(p, k):
    """1 / (T p_k) of steps k that were drawn with probabilities p. (T,), (b,) -> (b,)."""
    return 1 / (len(p) * p[k])


class SomeSteps(DDPO):
    """K steps a picture; `draw`: uniform, or weighted by w_t."""

    K = 4
    draw = "uniform"

    def setup(self, policy):
        """p_t: the probability of each step."""
        super().setup(policy)
        w = noise_weights(policy.sampler)
        w = w if self.draw == "weighted" else torch.ones_like(w)
        self.p = w / w.sum()

    def batches(self, policy, records, prompts, weights, name):
        """As DDPO's, with (N, K) steps drawn from `name` -> yields Pairs (K * b,)."""
        trajectories = Trajectories.cat(records)
        records.clear()
        p = self.p.double().numpy(force=True)
        rng, shape = np.random.default_rng(name), (len(prompts), self.K)
        steps = rng.choice(len(p), size=shape, p=p / p.sum())
        steps, advantages = torch.from_numpy(share(steps)), share(weights).to(policy.device)
        samples = torch.arange(len(trajectories), device=policy.device)
        for some in samples.split(self.settings.batch_size // processes()[1]):
            i = some.repeat(self.K)
            k = steps.to(policy.device)[some].T.flatten()  # draw by draw, as `all_pairs` does
            yield Pairs(trajectories, i, k, advantages[i])

    def losses(self, policy, pairs):
        """-> losses (b,), {name: (b,)}."""
        losses, logged = super().losses(policy, pairs)
        return losses * step_weights(self.p, pairs.k), logged


class SomeStepsEqualCredit(SomeSteps, DDPOEqualCredit):
    """Both: what is drawn has equal credit, so that no draw is much louder than another."""
