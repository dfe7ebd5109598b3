"""Train the zoo's VAE: 64x64 pictures <-> 8x8x4 latents, SD's own architecture and factor of 8.

    python tutorial/zoo/train_vae.py

First encoder and decoder together; then the decoder alone, which learns to be sharp and to bear the
small errors that a UNet makes; then both again, more gently.
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))
import data
import loop

from unet import VAE, save

CONFIG = {
    "act_fn": "silu",
    "block_out_channels": [32, 32, 64, 96],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "out_channels": 3,
    "sample_size": 64,
    "scaling_factor": 1.0,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
TOGETHER, DECODER_ONLY, AGAIN = 2000, 4200, 4400  # steps
BATCH = 16


def batch(art, device, rng, n=BATCH):
    """Composites -> (n, 3, 64, 64) in [-1, 1]."""
    pictures = [
        data.compose(rng, art, data.random_name(rng), data.random_colour(rng)).pixels
        for _ in range(n)
    ]
    return data.to_tensor(np.stack(pictures), device)


def difference(x, y):
    """L1 of the pixels and, for sharp edges, of their horizontal and vertical differences."""
    d = x - y
    return d.abs().mean() + 0.5 * (d.diff(dim=-1).abs().mean() + d.diff(dim=-2).abs().mean())


def together_loss(draw, vae, rng):
    """Difference and a little KL, with a latent sampled from the posterior -> scalar."""
    x = draw(rng)
    mean, log_var = vae.posterior(x)
    kl = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).mean()
    noise = torch.randn_like(mean, device="cpu").to(mean.device)
    z = mean + noise * (0.5 * log_var).exp()
    return difference(vae.decode(z * vae.scaling_factor), x) + 1e-4 * kl


def decoder_loss(draw, vae, rng):
    """Difference, with latents of the encoder that are off by 0 to 0.1 deviations -> scalar."""
    x = draw(rng)
    with torch.no_grad():
        z = vae.encode(x)
        noise = torch.randn_like(z, device="cpu") * torch.rand(len(z), 1, 1, 1)
        z = z + noise.to(z.device) * 0.1
    return difference(vae.decode(z), x)


@torch.no_grad()
def look(draw, path, vae, step):
    """Twelve held-out composites and what is left of them, into a picture; L1."""
    x = draw(np.random.default_rng(0), 12)
    z = vae.encode(x)
    y = vae.decode(z).clamp(-1, 1)
    pixels = ((torch.cat([x, y]) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    Image.fromarray(data.sheet(pixels, 12)).resize((1536, 256)).save(path)
    print(f"vae: L1 {(x - y).abs().mean():.4f}, latents of std {z.std():.3f}", flush=True)


@torch.no_grad()
def rescale(draw, vae, batches):
    """Set the scale that makes the latents' standard deviation 1, as SD's 0.18215 does."""
    means = [vae.posterior(draw(np.random.default_rng(i), 64))[0] for i in range(batches)]
    vae.scaling_factor = 1 / torch.cat(means).std().item()
    vae.config["scaling_factor"] = vae.scaling_factor


def main():
    options = data.options(__doc__)
    cache = options.zoo / ".data"
    draw = partial(batch, data.load_art(options.zoo), options.device)
    together, decoder = partial(together_loss, draw), partial(decoder_loss, draw)
    show = partial(look, draw, cache / "vae.png")
    steps, batches = [TOGETHER, DECODER_ONLY, AGAIN], 8
    if options.quick:
        steps, batches = [2, 2, 2], 1

    torch.manual_seed(0)
    vae = loop.initialize(VAE(CONFIG)).to(options.device)
    vae = loop.train("vae-together", vae, together, steps[0], cache, look=show, min_lr=0.1)
    rescale(draw, vae, batches)
    vae.requires_grad_(True)  # an average comes without
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)
    vae = loop.train("vae-decoder", vae, decoder, steps[1], cache, look=show)
    vae.requires_grad_(True)
    gently = {"lr": 0.012, "adam_lr": 1e-3, "min_lr": 0.03}
    vae = loop.train("vae-joint", vae, together, steps[2], cache, look=show, **gently)
    rescale(draw, vae, batches)
    save(vae, options.zoo / "stable-diffusion" / "vae", torch.float16)


if __name__ == "__main__":
    main()
