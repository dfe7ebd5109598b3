"""Train the zoo's VAE: 64x64 pictures <-> 8x8x4 latents, SD's own architecture and factor of 8.

    python tutorial/zoo/train_vae.py

First encoder and decoder together; then the decoder alone, which learns to be sharp and to bear the
small errors that a UNet makes; then both again, more gently; at last the decoder against a critic
of patches, as SD's own VAE was trained, for what is averaged over all possible edges is blurred.
Where the zoo has a VAE already, this last part alone, so that its latents stay what they are.
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).parents[2]))
import data
import loop
from unet import VAE, load, save

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
SHARPER, SETTLED = 2400, 1200
BATCH = 16
GENTLY = {"lr": 0.012, "adam_lr": 1e-3, "min_lr": 0.03}
STRICT, MILD = 0.02, 0.008  # weights of the critic's opinion, beside pixels that differ by 0.04


def batch(art, device, rng, n=BATCH, varied=1.0):
    """Composites, a share of them varied as the judge sees them -> (n, 3, 64, 64) in [-1, 1]."""
    pictures = []
    for _ in range(n):
        pair = data.random_name(rng), data.random_colour(rng)
        picture = data.compose(rng, art, *pair, varied=varied == 1 or rng.random() < varied)
        pictures.append(picture.pixels)
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


@torch.no_grad()
def with_errors(vae, x):
    """Latents of the encoder that are off by 0 to 0.1 deviations, as a UNet's are."""
    z = vae.encode(x)
    noise = torch.randn_like(z, device="cpu") * torch.rand(len(z), 1, 1, 1)
    return z + noise.to(z.device) * 0.1


def decoder_loss(draw, vae, rng):
    """Difference, with the encoder frozen -> scalar."""
    x = draw(rng)
    return difference(vae.decode(with_errors(vae, x)), x)


class Critic(nn.Module):
    """Is this a picture, or a decoder's? Of each patch of 18 pixels: (B, 3, H, W) -> (B, 1, h, w).

    As in PatchGAN (Isola et al. 2017, arXiv 1611.07004), smaller.
    """

    def __init__(self, channels=32):
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels, 4, stride=2, padding=1)
        self.conv1 = nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1)
        self.norm = nn.GroupNorm(8, 2 * channels)
        self.mid = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1)
        self.head = nn.Conv2d(2 * channels, 1, 1)

    def forward(self, x):
        x = F.leaky_relu(self.conv_in(x), 0.2)
        x = F.leaky_relu(self.norm(self.conv1(x)), 0.2)
        return self.head(F.leaky_relu(self.mid(x), 0.2))


def sharper_loss(draw, weight, pair, rng):
    """`decoder_loss`, the critic's opinion of the decoder, and the critic's own hinge -> scalar.

    pair: a ModuleDict of vae and critic. Neither learns from the other's part of the loss.
    """
    vae, critic = pair["vae"], pair["critic"]
    x = draw(rng)
    z = with_errors(vae, x)
    y = vae.decode(z)
    frozen = {name: p.detach() for name, p in critic.named_parameters()}
    opinion = functional_call(critic, frozen, y).mean()
    hinge = F.relu(1 - critic(x)).mean() + F.relu(1 + critic(y.detach())).mean()
    return difference(y, x) - weight * opinion + hinge


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


def freeze_encoder(vae):
    """Leave the decoder to be trained."""
    vae.requires_grad_(True)  # an average comes without
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)
    return vae


def train_anew(draw, options, show):
    """Encoder and decoder, together and apart -> the VAE."""
    cache = options.zoo / ".data"
    together, decoder = partial(together_loss, draw), partial(decoder_loss, draw)
    steps, batches = [TOGETHER, DECODER_ONLY, AGAIN], 8
    if options.quick:
        steps, batches = [2, 2, 2], 1
    vae = loop.initialize(VAE(CONFIG)).to(options.device)
    vae = loop.train("vae-together", vae, together, steps[0], cache, look=show, min_lr=0.1)
    rescale(draw, vae, batches)
    vae = loop.train("vae-decoder", freeze_encoder(vae), decoder, steps[1], cache, look=show)
    vae.requires_grad_(True)
    vae = loop.train("vae-joint", vae, together, steps[2], cache, look=show, **GENTLY)
    rescale(draw, vae, batches)
    return vae


def sharpen(draw, vae, show, options):
    """The decoder against the critic; then with less of it, for pixels count too -> the VAE."""
    critic = loop.initialize(Critic()).to(options.device)
    pair = nn.ModuleDict({"vae": vae, "critic": critic})

    def train(name, weight, steps, pair, **rates):
        pair["critic"].requires_grad_(True)
        freeze_encoder(pair["vae"])
        steps, loss = 2 if options.quick else steps, partial(sharper_loss, draw, weight)
        rates.update(look=lambda pair, step: show(pair["vae"], step), ema_decay=0.995)
        return loop.train(name, pair, loss, steps, options.zoo / ".data", **rates)

    pair = train("vae-sharper", STRICT, SHARPER, pair, **GENTLY)
    gentler = {"lr": 0.008, "adam_lr": 7e-4, "min_lr": 0.03}
    return train("vae-settled", MILD, SETTLED, pair, **gentler)["vae"]


def main():
    options = data.options(__doc__)
    cache, folder = options.zoo / ".data", options.zoo / "stable-diffusion" / "vae"
    draw = partial(batch, data.load_art(options.zoo), options.device)
    show = partial(look, draw, cache / "vae.png")
    torch.manual_seed(0)
    if not folder.is_dir():
        save(train_anew(draw, options, show), folder, torch.float16)
    vae = load(VAE, folder).to(options.device, memory_format=torch.channels_last)
    save(sharpen(partial(draw, varied=0.5), vae, show, options), folder, torch.float16)


if __name__ == "__main__":
    main()
