"""The sampler: a noise schedule, and DDIM with noise as the Gaussian policy p(x_{t-1} | x_t, c).

Denoising is an MDP with exact likelihoods (Sec. 4.3) because each step is an isotropic Gaussian
whose mean the network sets and whose standard deviation is fixed: Eq. 2, mu_theta and sigma_t.
Timesteps t are of the 1000 that the network was trained with; sampling visits T of them, and
x_{t-1}, alpha_bar_prev are those of the next one visited. What the numbers of a `Sampler` make it:

    T = 1000, eta = 1       DDPM with the posterior's variance (Ho et al. 2020); steps_offset 0
    T < 1000, eta = 1       on a subsequence: the paper's T = 50 (App. D.5); DDIM, eta: the code's
    T < 1000, 0 < eta < 1   DDIM with less noise (Song et al. 2021, Eq. 16)
    eta = 0                 deterministic DDIM: no density, hence no policy gradient
    another `mean_std`      another Gaussian, such as std^2 = 1 - alpha_bar_t / alpha_bar_prev

Deviations from the paper's text, and from its authors' code where that is named:

    what                           why                          effect
    log p is the mean over the D   as in both of their codes    ratios are D-th roots: a clip range
    dimensions of x, not the sum                                holds for one D only; REINFORCE's
                                                                gradient is 1/D of the true one
    a step with std = 0 has        theirs gives NaN (PyTorch)   a step without density adds nothing
    log p = 0                      or std = 1e-6 (JAX)          to the gradient
    the last step ends at          their PyTorch code never     none for SD v1.4; x_0 differs by up
    `final_alpha_bar`              gets there                   to 0.15 where that is 1

At D = 16,384 (512 x 512 pictures) a clip range of 1e-4 on the mean lets the joint log-ratio move by
1.64; at the zoo's D = 256 the same joint range is 6.4e-3.
"""

import json
import math
import reprlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch


class UserError(ValueError):
    """Something outside this program is wrong: one line that names it and says what to do."""


def require(condition, message):
    """Raise UserError unless `condition` holds."""
    if not condition:
        raise UserError(message)


def one_line(error):
    """What an error says, in one line of at most 300 characters."""
    return " ".join(f"{'no ' * isinstance(error, KeyError)}{error}".split())[:300]


@contextmanager
def refusing(message, *errors):
    """Any of these errors becomes a UserError: the message, and what the error says."""
    try:
        yield
    except errors as error:
        raise UserError(f"{message}: {one_line(error)}") from error


def read_json(path):
    """The object {name: value} in a JSON file. Raises UserError."""
    with refusing(f"{path} cannot be read as JSON", OSError, ValueError, RecursionError):
        value = json.loads(path.read_text(encoding="utf-8"))
    require(isinstance(value, dict), f"{path} is not a JSON object")
    return value


def number(config, name, least, most, default=None):
    """A number of a config in its bounds, an int where these are ints. Raises UserError."""
    value = config.get(name, default)
    fits = type(value) in (int, type(least)) and least <= value <= most
    require(fits, f"{name} = {reprlib.repr(value)}; needed: a number from {least} to {most}")
    return value


# What some fields show a model to be. Nothing makes an SD v1.x of these.
OTHERS = {"addition_embed_type = 'text_time'": "SDXL", "use_linear_projection = True": "SD 2.x"}
OTHERS |= {"prediction_type = 'v_prediction'": "a model of v-prediction"}
OTHERS |= {"in_channels = 9": "an inpainting model"}


def with_fields(config, known, **needed):
    """A config with the fields `needed`. Raises UserError where it differs from them or `known`."""
    for name, value in {**known, **needed}.items():
        given, right = config.get(name, value), value or "false or null"
        said, fits = f"{name} = {reprlib.repr(given)}", given == value or not (given or value)
        kind = f": this is {OTHERS[said]}, which cannot be converted" if said in OTHERS else ""
        require(fits, f"{said}; needed: {right}{kind}")
    return {**config, **needed}


def expand(values, like):
    """(B,) -> (B, 1, 1, 1), to multiply a (B, 4, h, w)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def add_noise(x_0, noise, alpha_bar_t):
    """The forward process q(x_t | x_0), Sec. 3.1.

        x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise

    x_0, noise (B, 4, h, w); alpha_bar_t (B,), for `expand` -> (B, 4, h, w).
    """
    signal = expand(alpha_bar_t.sqrt(), x_0)
    return signal * x_0 + expand((1 - alpha_bar_t).sqrt(), x_0) * noise


def predicted_x0(eps, x_t, alpha_bar_t):
    """`add_noise` solved for x_0: the picture that the predicted noise leaves.

        x_0 = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t)

    eps, x_t (B, 4, h, w); alpha_bar_t (B,) -> (B, 4, h, w).
    """
    return (x_t - expand((1 - alpha_bar_t).sqrt(), x_t) * eps) / expand(alpha_bar_t.sqrt(), x_t)


def ddim_std(alpha_bar_t, alpha_bar_prev, eta):
    """sigma_t of Eq. 2. Eq. 16 of Song et al. 2021 (arXiv 2010.02502).

        std = eta sqrt((1 - alpha_bar_prev) / (1 - alpha_bar_t) (1 - alpha_bar_t / alpha_bar_prev))

    alpha_bar_t, alpha_bar_prev (B,) -> (B,).
    """
    variance = (1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_prev)
    return eta * variance.sqrt()


def ddim_mean_std(eps, x_t, alpha_bar_t, alpha_bar_prev, eta):
    """mu_theta and sigma_t of Eq. 2: p(x_{t-1} | x_t, c). Eq. 12 of Song et al. 2021.

        mean = sqrt(alpha_bar_prev) x_0 + sqrt(1 - alpha_bar_prev - std^2) eps

    eps, x_t (B, 4, h, w); alpha_bar_t, alpha_bar_prev (B,) -> mean (B, 4, h, w), std (B,).
    """
    x_0 = predicted_x0(eps, x_t, alpha_bar_t)
    std = ddim_std(alpha_bar_t, alpha_bar_prev, eta)
    # rounding may leave -1e-8 where the difference is near 0
    towards_x_t = (1 - alpha_bar_prev - std**2).clamp(min=0).sqrt()
    mean = expand(alpha_bar_prev.sqrt(), x_t) * x_0 + expand(towards_x_t, x_t) * eps
    return mean, std


def gaussian_log_prob(x, mean, std):
    """log N(x; mean, std^2 I) of Eq. 2 and Sec. 4.3, averaged over the D dimensions of x.

        log p = -(x - mean)^2 / (2 std^2) - log std - log(2 pi) / 2          mean over D

    x is an action already taken and std is fixed, so the gradient flows through `mean` only.
    0 where std = 0. So is its gradient.
    x, mean (B, 4, h, w) of any float type; std (B,) -> float32 (B,).
    """
    x, mean, std = x.detach().float(), mean.float(), std.float()
    has_density = std > 0
    std = torch.where(has_density, std, 1.0)
    squared_error = (x - mean).square().flatten(1).mean(1)
    log_prob = -squared_error / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    return torch.where(has_density, log_prob, 0.0)


def named_noise(shape, count, *name):
    """`count` standard normal tensors from a generator of their own, seeded by their name.

    A name is a few integers such as (seed, epoch, sample): noise then depends neither on the batch
    size nor on what was drawn before. -> float32 (count, *shape), on the CPU.
    """
    entropy = (len(name), *name)  # numpy pads names with zeros: (3, 5) would be (3, 5, 0)
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(state >> 1))  # torch takes 63 bits
    return torch.randn(count, *shape, generator=generator)


# What a scheduler file of Stable Diffusion v1.x says where it has these fields; None: 0 or false.
KNOWN_FIELDS = {"prediction_type": "epsilon", "trained_betas": None}
KNOWN_FIELDS |= dict.fromkeys(["clip_sample", "thresholding", "rescale_betas_zero_snr"])


@dataclass
class NoiseSchedule:
    """alpha_bar of all training timesteps, and where the ones of sampling lie and end."""

    alphas_bar: torch.Tensor  # (N,) float32
    final_alpha_bar: float  # after the last step: 1, or alphas_bar[0] as in Stable Diffusion
    steps_offset: int

    @classmethod
    def from_config(cls, config):
        """From the numbers of a diffusers scheduler config, whatever class it names (v1.4's: PNDM).

        A file that is silent on `clip_sample` counts as False, as SD's; diffusers' DDIM takes True.
        Its timestep_spacing, a sampler's choice, is not used. Raises UserError.
        """
        with_fields(config, KNOWN_FIELDS)
        first = number(config, "beta_start", 1e-9, 0.9999)
        last = number(config, "beta_end", first, 0.9999)
        count = number(config, "num_train_timesteps", 1, 10**6, default=1000)
        offset = number(config, "steps_offset", 0, 10**6, default=0)
        kind, kinds = config.get("beta_schedule"), ["linear", "scaled_linear"]
        require(kind in kinds, f"beta_schedule = {kind!r}; needed: {' or '.join(kinds)}")
        power = 2 if kind == "scaled_linear" else 1
        betas = torch.linspace(first ** (1 / power), last ** (1 / power), count) ** power
        alphas_bar = torch.cumprod(1 - betas, dim=0)
        final = 1.0 if config.get("set_alpha_to_one", True) else alphas_bar[0].item()
        return cls(alphas_bar, final, offset)

    @classmethod
    def from_folder(cls, folder):
        """From `folder`/scheduler_config.json. Raises UserError."""
        path = Path(folder) / "scheduler_config.json"
        with refusing(path, UserError):
            return cls.from_config(read_json(path))


class Sampler:
    """DDIM on T of a schedule's timesteps with noise eta: the Gaussians that the policy acts by.

    `timesteps` (T,) int64, noisiest first: multiples of 1000 // T, plus the offset (T = 50: 981,
    961 ... 1). Other samplers override `mean_std`; train.load_policy makes the one that is used.
    Raises UserError for a T that cannot be had.
    """

    def __init__(self, schedule, T, eta):
        N, device = len(schedule.alphas_bar), schedule.alphas_bar.device
        require(1 <= T <= N, f"--steps {T}: between 1 and {N} denoising steps are possible")
        self.schedule, self.T, self.eta = schedule, T, eta
        self.stride, offset = N // T, schedule.steps_offset
        first = (T - 1) * self.stride + offset
        require(first < N, f"--steps {T}: with steps_offset {offset}, timestep {first} of {N}")
        self.timesteps = torch.arange(first, offset - 1, -self.stride, device=device)

    def alpha_bar(self, timesteps):
        """alpha_bar at each timestep and at the next one of sampling. (B,) -> (B,), (B,)."""
        alphas_bar, final = self.schedule.alphas_bar, self.schedule.final_alpha_bar
        previous = timesteps - self.stride
        prev = torch.where(previous >= 0, alphas_bar[previous.clamp(min=0)], final)
        return alphas_bar[timesteps], prev

    def mean_std(self, eps, x_t, timesteps):
        """The policy's Gaussian in states x_t at timesteps of their own.

        eps, x_t (B, 4, h, w), timesteps (B,) -> mean (B, 4, h, w), std (B,).
        """
        return ddim_mean_std(eps, x_t, *self.alpha_bar(timesteps), self.eta)

    def step(self, eps, x_t, timesteps, noise):
        """One action, x_{t-1} = mean + std noise -> x_{t-1}, mean (B, 4, h, w), std (B,)."""
        mean, std = self.mean_std(eps, x_t, timesteps)
        return mean + expand(std, x_t) * noise, mean, std
