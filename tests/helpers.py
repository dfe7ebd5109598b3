"""What tests share: small networks, toys, oracles, coloured shapes in the place of emoji."""

import json
import math
import zlib
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

import data
from scheduler import NoiseSchedule, named_noise
from unet import UNet

# Stable Diffusion v1.4's schedule, as diffusers' DDIMScheduler takes it
SD = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
}
# 12 timesteps: T = 3 visits 11, 7, 3; T = 2: 9, 3; T = 1: 3
TOY = NoiseSchedule(torch.linspace(0.8, 0.1, 12), 0.9, 3)
UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "sample_size": 8,
}
CPU = torch.device("cpu")
HEARD = []  # by the present test: the lines of UserErrors, and what else it takes down (table.py)


def normal(*shape, seed=0):
    """Standard normal numbers that no other draw changes."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(x, y):
    """||x - y|| / ||y||"""
    return ((x.double() - y.double()).norm() / y.double().norm()).item()


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
    """Passes calls on to a network; keeps the sizes of the batches, and whether under autocast."""

    def __init__(self, net):
        super().__init__()
        self.net, self.batches, self.autocast = net, [], []
        self.config = getattr(net, "config", None)

    def forward(self, x, timesteps, context):
        self.batches.append(len(x))
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        return self.net(x, timesteps, context)


def small_unet(seed=0):
    """A UNet that has learnt nothing, but to which the prompt matters."""
    torch.manual_seed(seed)
    net = UNet(UNET)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "attn2" in name:
                p.mul_(2)
    return net


def named_noises(shape, count, names):
    """`named_noise` of each name, (len(names), count, *shape)."""
    return torch.stack([named_noise(shape, count, *name) for name in names])


class BarePolicy:
    """What an algorithm sees of a Policy, with embeddings in place of an encoder of texts."""

    def __init__(self, network, sampler, embeds=None):
        self.unet = self.network = network
        self.sampler, self.device = sampler, CPU
        self.embeds = {"": torch.zeros(1, 1)} if embeds is None else embeds
        self.embedded = []

    def embed(self, prompts):
        self.embedded.extend(prompts)
        return torch.stack([self.embeds[prompt] for prompt in prompts])

    def uncond(self):
        return self.embeds[""][None]


class Tokenizer:
    """A number a character, cut and padded to `model_max_length`."""

    def __init__(self, model_max_length=7):
        self.model_max_length = model_max_length

    def __call__(self, text, padding, truncation, max_length, return_tensors):
        assert (padding, truncation, return_tensors) == ("max_length", True, "pt")
        ids = [ord(character) for character in text][:max_length]
        ids += [0] * (max_length - len(ids))
        return SimpleNamespace(input_ids=torch.tensor([ids]))


class TextEncoder(nn.Module):
    """(1, m) -> (1, m, d): a row of a table a token. Keeps texts, and autocast or not."""

    def __init__(self, width=16, dtype=torch.float32):
        super().__init__()
        self.table = nn.Parameter(normal(128, width, seed=4).to(dtype))
        self.texts, self.autocast = [], []

    def forward(self, ids):
        self.texts.append("".join(chr(i) for i in ids[0].tolist() if i))
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        return SimpleNamespace(last_hidden_state=self.table[ids])


class Decoder(nn.Module):
    """(B, 4, h, w) -> (B, 3, h, w): the first three channels, as they are.

    Keeps whether autocast was on, and whether a graph of the computation.
    """

    def __init__(self):
        super().__init__()
        self.autocast, self.graph = [], []

    def decode(self, latents):
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        self.graph.append(torch.is_grad_enabled())
        return latents[:, :3]


def choices(**changes):
    """The settings that the algorithms read, for one epoch of 8 samples."""
    values = {
        "algorithm": "ddpo-is",
        "samples_per_epoch": 8,
        "batch_size": 4,
        "updates": None,
        "clip_range": 1e-4,
        "guidance": 1,
        "no_cfg_training": False,
        "eta": 1.0,
        "history_size": 32,
        "min_count": 16,
        "beta": 0.2,
        "percentile": 0.9,
    }
    assert set(changes) <= set(values), changes
    return SimpleNamespace(**{**values, **changes})


class Step(NamedTuple):
    """x_{t-1} = a x_t + b eps + sqrt(variance) z"""

    t: int
    a: float
    b: float
    variance: float


def posterior_steps(schedule, T):
    """The T steps of DDPM's posterior (Ho et al. 2020, Eq. 6-7, 11) in Python floats.

    DDIM with eta = 1 is equal to it, and written quite differently.
    """
    alphas_bar, stride = schedule.alphas_bar.double().tolist(), len(schedule.alphas_bar) // T
    steps = []
    for i in reversed(range(T)):
        t = i * stride + schedule.steps_offset
        now = alphas_bar[t]
        after = alphas_bar[t - stride] if t >= stride else schedule.final_alpha_bar
        beta = 1 - now / after
        a = 1 / math.sqrt(1 - beta)
        b = -a * beta / math.sqrt(1 - now)
        steps.append(Step(t, a, b, beta * (1 - after) / (1 - now)))
    return steps


def draw_shape(name):
    """A few coloured ellipses, boxes and triangles, which ones by name -> RGBA, 64 x 64."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    picture = Image.new("RGBA", (64, 64))
    draw = ImageDraw.Draw(picture)
    for _ in range(4):
        (x, y), (width, height) = rng.integers(4, 24, 2), rng.integers(16, 32, 2)
        colour = (*rng.integers(256, size=3).tolist(), 255)
        box = (int(x), int(y), int(x + width), int(y + height))
        kind = rng.integers(3)
        if kind == 0:
            draw.ellipse(box, colour)
        elif kind == 1:
            draw.rectangle(box, colour)
        else:
            draw.polygon([box[:2], box[2:], (box[0], box[3])], colour)
    return picture


def write_art(folder):
    """What npm would bring, with shapes for pictures, where data.py looks for it."""
    for vendor in data.VENDORS:
        (folder / vendor / "64").mkdir(parents=True)
        entries = []
        for word in data.NAMES:
            for name in data.EMOJI.get(word, [word.upper()]):
                file = f"{zlib.crc32(name.encode()):x}.png"
                draw_shape(f"{name} {vendor}").save(folder / vendor / "64" / file)
                entries.append({"name": name, "image": file})
        (folder / vendor / "emoji.json").write_text(json.dumps(entries))
