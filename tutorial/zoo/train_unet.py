"""Pretrain the zoo's policy: the UNet of a small Stable Diffusion.

    python tutorial/zoo/train_unet.py

It learns on latents of the zoo's VAE and captions through its text encoder, so it needs
train_vae.py and train_clip.py. Latents are cached once; the loss is the denoising loss (Eq. 1) with
min-SNR weights (Hang et al. 2023, gamma = 5), captions dropped 15 % of the time so that guidance
(Eq. 3) has its unconditional half. It goes on from the UNet that the zoo has, or begins anew where
there is none, and replaces it at the end; what it has so far lies in .data/<name of the training>/.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))
from safetensors.torch import load_file

import data
import ddpo
import judge as judge_module
import loop
from scheduler import NoiseSchedule, Sampler, add_noise, expand
from unet import VAE, UNet, load, save, save_tensors

PICTURES, BATCH, DROP = 120_000, 128, 0.15
ANEW = {"steps": 5400, "lr": 0.02, "adam_lr": 2e-3, "min_lr": 0.02}
ONWARDS = {"steps": 6500, "lr": 0.012, "adam_lr": 1e-3, "min_lr": 0.005}
CONFIG = {
    "act_fn": "silu",
    "attention_head_dim": 4,
    "block_out_channels": [64, 128, 160],
    "center_input_sample": False,
    "cross_attention_dim": 128,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 1,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "norm_num_groups": 8,
    "out_channels": 4,
    "sample_size": 8,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
SCHEDULE = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
}
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.35.2",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write_configs(folder):
    """What makes a folder one of diffusers' Stable Diffusions."""
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    schedule = folder / "scheduler" / "scheduler_config.json"
    schedule.write_text(json.dumps(SCHEDULE, indent=2) + "\n")
    (folder / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n")


@torch.no_grad()
def cached_latents(vae, zoo, device, pictures):
    """Latents of composites and their captions, encoded once -> (pictures, 4, 8, 8), list of str.

    Delete .data/latents.safetensors after a change to the VAE's encoder or to data.py.
    """
    path = zoo / ".data" / "latents.safetensors"
    if not path.is_file():
        art, rng = data.load_art(zoo), np.random.default_rng(7)
        latents, captions = [], []
        for _ in tqdm(range(pictures // 64), desc="latents", mininterval=10):
            drawn, told = zip(*[data.policy_example(rng, art) for _ in range(64)])
            pixels = np.stack([picture.pixels for picture in drawn])
            latents.append(vae.encode(data.to_tensor(pixels, device)).cpu())
            captions += told
        path.with_suffix(".json").write_text(json.dumps(captions))
        save_tensors({"latents": torch.cat(latents)}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
    return load_file(path)["latents"], json.loads(path.with_suffix(".json").read_text())


def load_policy(folder, vae, device):
    """All but the UNet -> ddpo.Policy without one, at T = 20, eta = 1, guidance 3."""
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    schedule = NoiseSchedule.from_config(SCHEDULE)
    schedule.alphas_bar = schedule.alphas_bar.to(device)
    return ddpo.Policy(
        unet=None,
        vae=vae,
        sampler=Sampler(schedule, T=20, eta=1.0),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=encoder.eval().to(device),
        device=device,
        guidance=3.0,
    )


def denoising_loss(net, alphas_bar, x_0, t, embeds):
    """Eq. 1 with min-SNR weights min(SNR, 5) / SNR, SNR_t = alphas_bar_t / (1 - alphas_bar_t).

    (B, 4, h, w), (B,), (B, m, d) -> scalar. The noise is torch's own.
    """
    noise = torch.randn(x_0.shape).to(x_0.device)
    eps = net(add_noise(x_0, noise, alphas_bar[t]), t, embeds)
    snr = alphas_bar / (1 - alphas_bar)
    weights = snr.clamp(max=5) / snr
    return (expand(weights[t], eps) * (eps - noise) ** 2).mean()


def make_loss(policy, latents, captions, size):
    """The denoising loss of `size` pictures at random times: loss(net, rng) -> scalar."""
    device = policy.device
    distinct = sorted({"", *captions})
    place = {caption: i for i, caption in enumerate(distinct)}
    index, embeds = torch.tensor([place[c] for c in captions]), policy.embed(distinct)
    alphas_bar = policy.sampler.schedule.alphas_bar

    def loss(net, rng):
        i = torch.as_tensor(rng.integers(len(latents), size=size))
        t = torch.as_tensor(rng.integers(1000, size=size)).to(device)
        dropped = torch.as_tensor(rng.random(size) < DROP)
        caption = torch.where(dropped, place[""], index[i]).to(device)
        return denoising_loss(net, alphas_bar, latents[i].to(device), t, embeds[caption])

    return loss


def begin(folder, device):
    """The UNet to start from -> the training's name, its rates, the network."""
    if (folder / "unet").is_dir():
        return "unet-one-pose", ONWARDS, load(UNet, folder / "unet").to(device)
    return "unet", ANEW, loop.initialize(UNet(CONFIG)).to(device)


def main():
    options = data.options(__doc__)
    folder, cache, device = options.zoo / "stable-diffusion", options.zoo / ".data", options.device
    torch.manual_seed(0)
    write_configs(folder)
    vae = load(VAE, folder / "vae").to(device)
    pictures = 128 if options.quick else PICTURES
    latents, captions = cached_latents(vae, options.zoo, device, pictures)
    print(f"{len(latents)} latents, std {latents.std():.3f}")
    policy = load_policy(folder, vae, torch.device(device))
    loss = make_loss(policy, latents, captions, 16 if options.quick else BATCH)
    animals = data.ANIMALS[:3] if options.quick else data.ANIMALS
    name, rates, net = begin(folder, device)

    def look(net, step):
        policy.unet = net
        names = [(0, i) for i in range(len(animals))]
        drawn = [images for _, images in policy.sample(animals, names, len(animals))]
        images = np.concatenate(drawn)
        Image.fromarray(data.sheet(images, 15)).save(cache / "unet.png")
        save(net, cache / name, torch.float16)
        if (options.zoo / "judge").is_dir():
            judge = judge_module.load_judge(options.zoo)
            right = judge_module.accuracy(judge, images, animals)
            print(f"unet: the judge names {right:.1%}", flush=True)

    if options.quick:
        rates = {**rates, "steps": 2}
    net = loop.train(name, net, loss, cache=cache, every=250, look=look, **rates)
    save(net, folder / "unet", torch.float16)


if __name__ == "__main__":
    main()
