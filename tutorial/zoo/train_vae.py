"""Train the zoo's VAE: 64x64 pictures <-> 8x8x4 latents, SD's own architecture with SD's own factor of 8.

    python tutorial/zoo/train_vae.py

First encoder and decoder together; then the decoder alone, which learns to be sharp and to bear the small errors that a UNet makes; then
both again, more gently.
"""
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))
import data
import loop
from unet import VAE, save

CONFIG = {"act_fn": "silu", "block_out_channels": [32, 32, 64, 96], "down_block_types": ["DownEncoderBlock2D"] * 4, "in_channels": 3,
          "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 8, "out_channels": 3, "sample_size": 64, "scaling_factor": 1.0,
          "up_block_types": ["UpDecoderBlock2D"] * 4}
TOGETHER, DECODER_ONLY, AGAIN, BATCH = 2000, 4200, 4400, 16
ART = data.load_art()


def batch(rng, n=BATCH):
    pictures = [data.compose(rng, ART, data.random_name(rng), str(rng.choice(list(data.COLOURS)))).pixels for _ in range(n)]
    return data.to_tensor(np.stack(pictures))


def difference(x, y):
    """L1 of the pixels and, for sharp edges, of their horizontal and vertical differences."""
    d = x - y
    return d.abs().mean() + 0.5 * (d.diff(dim=-1).abs().mean() + d.diff(dim=-2).abs().mean())


def together_loss(vae, rng):
    x = batch(rng)
    mean, log_var = vae.posterior(x)
    kl = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).mean()
    z = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
    return difference(vae.decode(z * vae.scaling_factor), x) + 1e-4 * kl


def decoder_loss(vae, rng):
    x = batch(rng)
    with torch.no_grad():
        z = vae.encode(x)
        z = z + torch.randn_like(z) * torch.rand(len(z), 1, 1, 1) * 0.1
    return difference(vae.decode(z), x)


@torch.no_grad()
def look(vae, step):
    x = batch(np.random.default_rng(0), 12)
    z = vae.encode(x)
    y = vae.decode(z).clamp(-1, 1)
    pixels = ((torch.cat([x, y]) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).reshape(2, 12, 64, 64, 3)
    Image.fromarray(pixels.permute(0, 2, 1, 3, 4).reshape(128, 768, 3).numpy()).resize((1536, 256)).save(data.CACHE / "vae.png")
    print(f"vae: L1 {(x - y).abs().mean():.4f}, latents of std {z.std():.3f}", flush=True)


def main():
    folder = data.HERE / "stable-diffusion" / "vae"
    torch.manual_seed(0)
    vae = loop.train("vae-together", loop.initialize(VAE(CONFIG)), together_loss, TOGETHER, look=look, min_lr=0.1)
    rescale(vae)
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)
    vae = loop.train("vae-decoder", vae, decoder_loss, DECODER_ONLY, look=look).requires_grad_(True)
    vae = loop.train("vae-joint", vae, together_loss, AGAIN, look=look, lr=0.012, adam_lr=1e-3, min_lr=0.03)
    rescale(vae)
    save(vae, folder, torch.float16)


@torch.no_grad()
def rescale(vae):
    """Set the scale that makes the latents' standard deviation 1, as SD's 0.18215 does."""
    std = torch.cat([vae.posterior(batch(np.random.default_rng(i), 64))[0] for i in range(8)]).std().item()
    vae.config["scaling_factor"] = vae.scaling_factor = 1 / std


if __name__ == "__main__":
    main()
