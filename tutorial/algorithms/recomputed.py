"""DDPO whose ratio begins at exactly 1, also in half precision with batches of unequal sizes.

    python train.py --algorithm tutorial/algorithms/recomputed.py:Recomputed --micro-batch 3

A network's output depends on how many rows it is given: other sizes, other kernels, another order
of additions. In bf16 that moves log p at the loud step by enough for ratios of 0.98 before the
first update. No choice of arithmetic brings two sizes together; but nothing forces the ratio to
compare training with *sampling*. Here the log-probabilities of the sampled actions are computed
again before the first update, in the very micro-batches that training will use:

    ratio = p_theta(x_{t-1} | x_t, c) / p_theta_old(x_{t-1} | x_t, c)    both as training computes

The actions were drawn from a Gaussian whose mean was off by rounding, which is left as it is. The
price is a forward pass a pair, about a third of an update. Where --micro-batch is --sample-batch,
plain DDPO begins at 1 as well, for nothing.
"""

import torch

from ddpo import DDPO


class Recomputed(DDPO):
    """DDPO_IS with old log-probabilities of training's own arithmetic."""

    def batches(self, policy, records, prompts, weights, name):
        """DDPO's, all made before the first update -> list of Pairs."""
        batches = list(super().batches(policy, records, prompts, weights, name))
        size = self.settings.micro_batch
        for batch in batches:
            for start in range(0, len(batch), size):
                pairs = batch[start : start + size]
                with torch.no_grad():
                    now = self.log_probs(policy, pairs)[0]
                pairs.trajectories.log_probs[pairs.i, pairs.k] = now
        return batches
