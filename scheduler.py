"""The sampler: Stable Diffusion's noise schedule and DDIM with noise, as the Gaussian policy p_theta(x_{t-1} | x_t, c).

The paper's Sec. 3.1 samples with the DDPM posterior; in practice (Sec. 5, Song et al. 2021) it is DDIM with eta = 1 on T = 50 of the 1000
timesteps. Each step is an isotropic Gaussian whose mean the UNet sets and whose standard deviation is fixed: that is all that makes
denoising an MDP with exact likelihoods (Sec. 4.3).

    alpha_bar_t                 how much of the picture is left at timestep t: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise
    ddim_mean_std               the Gaussian's mean and sigma
    gaussian_log_prob           log N(x_{t-1}; mean, sigma), *averaged* over the latent's dimensions
    add_noise                   the forward process q(x_t | x_0)
    named_noise                 every sample's noise, drawn by a name of its own
    Trajectories                what sampling records of all this, for training to go through again; ddpo.py adds rewards and advantages

Deviations from the paper's text, as in its authors' code:
- log p is the mean over the D dimensions of the latent, not the sum. Effect: ratios are geometric means of the per-dimension ratios, the
  policy gradient is 1/D of the true one (Adam forgives a constant factor, but its epsilon and the clipping of the gradient then bind
  elsewhere), and a clip range holds for one D only: 1e-4 at D = 16,384 lets the joint log-ratio move by 1.64; at the zoo's D = 256 that
  takes a clip range of 6.4e-3.
- A step with sigma = 0 (eta = 0, or the last step of a schedule that ends at alpha_bar = 1) has no density: its log-prob is 0 by
  definition, and it contributes no gradient.
"""
import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch


def expand(values, like):
    """(B,) -> (B, 1, 1, 1), to multiply a (B, 4, h, w)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def ddim_mean_std(eps, x_t, alpha_bar_t, alpha_bar_prev, eta):
    """Mean and standard deviation of p(x_{t-1} | x_t, c). Song et al. 2021 (arXiv 2010.02502), Eq. 12 and 16.

        x_0   = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t)
        sigma = eta sqrt((1 - alpha_bar_prev) / (1 - alpha_bar_t)) sqrt(1 - alpha_bar_t / alpha_bar_prev)
        mean  = sqrt(alpha_bar_prev) x_0 + sqrt(1 - alpha_bar_prev - sigma^2) eps

    eps, x_t (B, 4, h, w); alpha_bar_t, alpha_bar_prev (B,) -> mean (B, 4, h, w), std (B,).
    """
    variance = (1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_prev)
    std = eta * variance.sqrt()
    x_0 = (x_t - expand((1 - alpha_bar_t).sqrt(), x_t) * eps) / expand(alpha_bar_t.sqrt(), x_t)
    direction = (1 - alpha_bar_prev - std**2).clamp(min=0).sqrt()           # clamp: rounding may leave -1e-8 where it is 0
    return expand(alpha_bar_prev.sqrt(), x_t) * x_0 + expand(direction, x_t) * eps, std


def gaussian_log_prob(x, mean, std):
    """log N(x; mean, std^2 I), averaged over all dimensions but the first; 0 where std = 0 (a deterministic step has no density).

        log p = -(x - mean)^2 / (2 std^2) - log std - log(2 pi) / 2

    x, mean (B, ...); std (B,) -> (B,), float32 whatever comes in. x is a sample already taken: the gradient flows through mean only.
    """
    x, mean, std = x.detach().float(), mean.float(), std.float()
    random = std > 0
    std = torch.where(random, std, 1.0)
    squared = (x - mean).square().flatten(1).mean(1)
    log_prob = -squared / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    return torch.where(random, log_prob, 0.0)


def add_noise(x_0, noise, alpha_bar_t):
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise. x_0, noise (B, 4, h, w); alpha_bar_t (B,) -> (B, 4, h, w)."""
    return expand(alpha_bar_t.sqrt(), x_0) * x_0 + expand((1 - alpha_bar_t).sqrt(), x_0) * noise


def named_noise(shape, count, *name):
    """`count` standard normal tensors from a generator of their own, seeded by a name such as (seed, epoch, sample). -> float32 (count, *shape)."""
    entropy = (len(name), *name)                        # numpy pads names with zeros: (3, 5) would be (3, 5, 0)
    seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class Scheduler:
    """A noise schedule of N training timesteps and the numbers that say how T of them are chosen. Stateless: every call names its T."""
    alphas_bar: torch.Tensor        # (N,) float32
    final_alpha_bar: float          # alpha_bar after the last step: 1, or alphas_bar[0] as in Stable Diffusion
    steps_offset: int

    @classmethod
    def from_config(cls, config, where="scheduler_config.json"):
        """From the numbers in a diffusers scheduler config, whatever class it names (v1.4's says PNDM). Raises ValueError, one line."""
        for name, value in dict(prediction_type="epsilon", clip_sample=False, thresholding=False, trained_betas=None, timestep_spacing="leading",
                                rescale_betas_zero_snr=False).items():
            if config.get(name, value) != value:
                raise ValueError(f"{where} has {name} = {config[name]!r}; only {value!r} (Stable Diffusion v1.x) is implemented")
        count, first, last = config.get("num_train_timesteps", 1000), config.get("beta_start"), config.get("beta_end")
        if not (isinstance(first, (int, float)) and isinstance(last, (int, float)) and 0 < first <= last < 1):
            raise ValueError(f"{where} has beta_start = {first!r}, beta_end = {last!r}; needed: 0 < beta_start <= beta_end < 1")
        if not (isinstance(count, int) and count > 0):
            raise ValueError(f"{where} has num_train_timesteps = {count!r}; needed: a whole number above 0")
        kind = config.get("beta_schedule")
        if kind == "scaled_linear":
            betas = torch.linspace(first**0.5, last**0.5, count, dtype=torch.float32) ** 2
        elif kind == "linear":
            betas = torch.linspace(first, last, count, dtype=torch.float32)
        else:
            raise ValueError(f"{where} has beta_schedule = {kind!r}; 'scaled_linear' and 'linear' are implemented")
        alphas_bar = torch.cumprod(1 - betas, dim=0)
        final = 1.0 if config.get("set_alpha_to_one", True) else alphas_bar[0].item()
        return cls(alphas_bar, final, config.get("steps_offset", 0))

    @classmethod
    def from_folder(cls, folder):
        """From `folder`/scheduler_config.json."""
        path = Path(folder) / "scheduler_config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: not the scheduler folder of a model in the diffusers layout")
        try:
            config = json.loads(path.read_text())
        except ValueError as error:                     # not JSON, or not even text
            raise ValueError(f"{path} is not JSON: {error}") from None
        if not isinstance(config, dict):
            raise ValueError(f"{path} is not a JSON object")
        return cls.from_config(config, path)

    def to(self, device):
        return Scheduler(self.alphas_bar.to(device), self.final_alpha_bar, self.steps_offset)

    def timesteps(self, T):
        """The T timesteps of sampling, noisiest first: evenly spaced, plus the offset (T = 50: 981, 961 ... 1). -> int64 (T,)."""
        N = len(self.alphas_bar)
        if not 1 <= T <= N:
            raise ValueError(f"steps = {T}: between 1 and {N} denoising steps are possible")
        if (first := (T - 1) * (N // T) + self.steps_offset) >= N:
            raise ValueError(f"steps = {T} with steps_offset = {self.steps_offset} asks for timestep {first} of {N}")
        return torch.arange(T - 1, -1, -1, device=self.alphas_bar.device) * (N // T) + self.steps_offset

    def alpha_bar(self, timesteps, T):
        """alpha_bar at each timestep and at the one after it in sampling with T steps. (B,) -> (B,), (B,)."""
        previous = timesteps - len(self.alphas_bar) // T
        after = torch.where(previous >= 0, self.alphas_bar[previous.clamp(min=0)], self.final_alpha_bar)
        return self.alphas_bar[timesteps], after

    def mean_std(self, eps, x_t, timesteps, T, eta):
        """`ddim_mean_std` of a step from each sample's own timestep (B,)."""
        return ddim_mean_std(eps, x_t, *self.alpha_bar(timesteps, T), eta)

    def step(self, eps, x_t, timesteps, T, eta, noise):
        """One action: x_{t-1} = mean + std noise, and log p(x_{t-1} | x_t, c). -> (B, 4, h, w), (B,)."""
        mean, std = self.mean_std(eps, x_t, timesteps, T, eta)
        x_prev = mean + expand(std, x_t) * noise
        return x_prev, gaussian_log_prob(x_prev, mean, std)


@dataclass
class Trajectories:
    """A batch of rollouts: all that sampling hands to training. float32, wherever and however the networks compute.

    Of the latents only x_0 (B, 1, 4, h, w), and no prompt_embeds, where `Policy.sample` is not asked for whole trajectories.
    """
    latents: torch.Tensor           # (B, T+1, 4, h, w): x_T first, x_0 last
    log_probs: torch.Tensor         # (B, T): log p(x_{t-1} | x_t, c) under the policy that sampled
    timesteps: torch.Tensor         # (T,)
    prompt_embeds: torch.Tensor     # (B, m, d)
    rewards: torch.Tensor = None    # (B,)
    advantages: torch.Tensor = None     # (B,)
    places: torch.Tensor = None     # (B,): which of the epoch's samples these are; with several processes each has some

    def __len__(self):
        return len(self.latents)

    @staticmethod
    def cat(parts):
        """Several batches of one epoch as one (timesteps are common to all)."""
        joined = {f.name: [getattr(part, f.name) for part in parts] for f in fields(Trajectories)}
        return Trajectories(**{name: values[0] if name == "timesteps" or values[0] is None else torch.cat(values) for name, values in joined.items()})
