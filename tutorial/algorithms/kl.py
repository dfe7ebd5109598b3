"""DDPO with a KL penalty to the base model, as DPOK has it (Fan et al. 2023, arXiv 2305.16381).

    python train.py --algorithm tutorial/algorithms/kl.py:DDPOWithKL --set kl_weight=0.01

Both policies are Gaussians of one standard deviation, so that the divergence has a closed form:

    KL(p_theta || p_base) = ||mu_theta - mu_base||^2 / (2 sigma^2)

Like log-probabilities in this project it is a mean over the D dimensions; 0 where sigma = 0. It is
taken at the states that sampling visited, and its gradient flows through mu_theta alone.
"""

import copy
from dataclasses import replace

import torch

from ddpo import DDPO, policy_mean_std, ppo_loss
from scheduler import gaussian_log_prob


def gaussian_kl(mean, mean_base, std):
    """KL(N(mean, std^2 I) || N(mean_base, std^2 I)) / D. means (B, 4, h, w), std (B,) -> (B,)."""
    squared = (mean - mean_base).square().flatten(1).mean(1)
    return torch.where(std > 0, squared / (2 * torch.where(std > 0, std, 1.0) ** 2), 0.0)


class DDPOWithKL(DDPO):
    """loss = PPO's + kl_weight KL(p_theta || p_base), a pair."""

    kl_weight = 0.01

    def setup(self, policy):
        """Keep the base model: a copy of what is trained, which shares what is frozen (LoRA)."""
        shared = {id(p): p for p in policy.unet.parameters() if not p.requires_grad}
        base = copy.deepcopy(policy.unet, shared).requires_grad_(False)
        self.base = replace(policy, unet=base)

    def losses(self, policy, pairs):
        """-> losses (b,), {name: (b,)}."""
        data = (policy.sampler, pairs.trajectories, pairs.i, pairs.k)
        guided = (policy.uncond(), self.settings.guidance)
        mean, std = policy_mean_std(policy.network, *data, *guided)
        with torch.no_grad():
            mean_base, _ = policy_mean_std(self.base.network, *data, *guided)
        kl = gaussian_kl(mean, mean_base, std)
        now = gaussian_log_prob(pairs.trajectories.latents[pairs.i, pairs.k + 1], mean, std)
        old = pairs.trajectories.log_probs[pairs.i, pairs.k]
        losses, _ = ppo_loss(now, old, pairs.advantages, self.settings.clip_range)
        logged = {"k": pairs.k, "log_ratio": (now - old).detach(), "kl": kl.detach()}
        return losses + self.kl_weight * kl, logged

    def metrics(self, logged):
        """DDPO's, and the divergence from the base model."""
        return {**super().metrics(logged), "kl_to_base": logged["kl"].mean()}
