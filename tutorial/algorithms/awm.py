"""Advantage-weighted matching (arXiv 2509.25050): RWR's loss with DDPO's signed advantages.

    python train.py --algorithm tutorial/algorithms/awm.py:AdvantageWeightedMatching

The denoising loss bounds -log p(x_0 | c) from above, so its fall is a step towards x_0, its rise a
step away. With x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, for t and eps drawn anew,

    l_theta = -||eps - eps_theta(x_t, t, c)||^2 / D          ratio = exp(l_theta - l_old)
    loss    = -min(ratio A, clip(ratio, 1 - clip_range, 1 + clip_range) A)

where l_old is of the same t and eps, under the policy that sampled. Only x_0 is kept, and `draws`
pairs (t, eps) a picture stand for DDPO's T, so that an epoch costs little more than its sampling.
Against RWR: bad samples are unlearnt, not only left out. Without the clip that has no bound.
"""

import numpy as np
import torch
from torch.utils.data import TensorDataset

from ddpo import DDPO, denoising_loss, ppo_loss, predict_noise, processes, share
from scheduler import add_noise, named_noise


class AdvantageWeightedMatching(DDPO):
    """PPO's loss on the denoising loss's change, `draws` noises a picture."""

    draws = 2

    def record(self, trajectories):
        """x_0 alone."""
        return trajectories.latents[:, -1].clone()

    def batches(self, policy, records, prompts, weights, name):
        """All pictures once, with `draws` timesteps and noises each, and l_old at these."""
        x_0, alphas_bar = torch.cat(records), policy.sampler.schedule.alphas_bar
        shape, rng = (len(prompts), self.draws), np.random.default_rng(name)
        t = torch.from_numpy(share(rng.integers(len(alphas_bar), size=shape))).flatten()
        noise = named_noise(x_0.shape[1:], shape[0] * shape[1], *name).unflatten(0, shape)
        t, noise = t.to(policy.device), share(noise).flatten(0, 1).to(policy.device)
        i = torch.arange(len(x_0), device=policy.device).repeat_interleave(self.draws)
        cond, advantages = policy.embed(share(prompts)), share(weights).to(policy.device)
        x_t = add_noise(x_0[i], noise, alphas_bar[t])
        rows = TensorDataset(x_t, t, cond[i], noise, advantages[i])
        with torch.no_grad():
            size = self.settings.micro_batch
            parts = [rows[start : start + size] for start in range(0, len(rows), size)]
            old = torch.cat([self.matching(policy, *part[:4]) for part in parts])
        rows = TensorDataset(*rows.tensors, old)
        size = self.settings.batch_size // processes()[1] * self.draws
        for start in range(0, len(rows), size):
            yield TensorDataset(*rows[start : start + size])

    def matching(self, policy, x_t, t, cond, noise):
        """l_theta, a row. -> (b,)."""
        guided = (policy.uncond(), self.settings.guidance)
        eps = predict_noise(policy.network, x_t, t, cond, *guided)
        return -denoising_loss(eps, noise, torch.ones_like(eps[:, 0, 0, 0]))

    def losses(self, policy, rows):
        """-> losses (b,), {name: (b,)}."""
        advantages, old = rows[4:]
        now = self.matching(policy, *rows[:4])
        losses, _ = ppo_loss(now, old, advantages, self.settings.clip_range)
        return losses, {"log_ratio": (now - old).detach()}
