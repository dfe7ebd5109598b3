"""Pretrain the zoo's policy: the UNet of a small Stable Diffusion, on latents of the zoo's VAE and captions through its text encoder.

    python tutorial/zoo/train_unet.py

Needs train_vae.py's encoder and train_clip.py's text encoder. Latents are cached once; the loss is the denoising loss (Eq. 1) with
min-SNR weights (Hang et al. 2023, gamma = 5), captions dropped 15 % of the time so that guidance (Eq. 3) has its unconditional half.
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))
import data
import ddpo
import judge as judge_module
import loop
from rewards import COMMON_ANIMALS
from scheduler import Scheduler, add_noise, expand
from unet import VAE, UNet, load, save

FOLDER = data.HERE / "stable-diffusion"
PICTURES, STEPS, BATCH, DROP = 32_000, 5400, 128, 0.15
CONFIG = {"act_fn": "silu", "attention_head_dim": 4, "block_out_channels": [64, 128, 160], "center_input_sample": False,
          "cross_attention_dim": 128, "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
          "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 1,
          "mid_block_scale_factor": 1, "norm_eps": 1e-5, "norm_num_groups": 8, "out_channels": 4, "sample_size": 8,
          "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]}
SCHEDULE = {"_class_name": "DDIMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False,
            "num_train_timesteps": 1000, "prediction_type": "epsilon", "set_alpha_to_one": False, "steps_offset": 1,
            "timestep_spacing": "leading", "trained_betas": None}
INDEX = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.35.2", "feature_extractor": [None, None], "requires_safety_checker": False,
         "safety_checker": [None, None], "scheduler": ["diffusers", "DDIMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
         "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}


@torch.no_grad()
def cached_latents(vae):
    """Latents of PICTURES composites and their captions, encoded once -> float (PICTURES, 4, 8, 8), list of str.

    Delete .data/latents.safetensors after a change to the VAE's encoder or to data.py.
    """
    path = data.CACHE / "latents.safetensors"
    if not path.is_file():
        art, rng, latents, captions = data.load_art(), np.random.default_rng(7), [], []
        for _ in tqdm(range(PICTURES // 64), desc="latents", mininterval=10):
            examples = [data.policy_example(rng, art) for _ in range(64)]
            latents.append(vae.encode(data.to_tensor(np.stack([picture.pixels for picture, _ in examples]))))
            captions += [caption for _, caption in examples]
        path.with_suffix(".json").write_text(json.dumps(captions))
        save_file({"latents": torch.cat(latents).contiguous()}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
    return load_file(path)["latents"], json.loads(path.with_suffix(".json").read_text())


def policy_of(unet):
    """The UNet with the other parts of its folder -> ddpo.Policy, at T = 20, eta = 1, w = 3."""
    tokenizer = CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(FOLDER / "text_encoder", dtype=torch.float32).eval()
    return ddpo.Policy(unet, load(VAE, FOLDER / "vae"), Scheduler.from_config(SCHEDULE), tokenizer, encoder, torch.device("cpu"), 20, 1.0, 3.0)


def main():
    torch.manual_seed(0)
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "scheduler").mkdir(exist_ok=True)
    (FOLDER / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULE, indent=2) + "\n")
    (FOLDER / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n")
    scheduler = Scheduler.from_config(SCHEDULE)
    latents, captions = cached_latents(load(VAE, FOLDER / "vae"))
    print(f"{len(latents)} latents, std {latents.std():.3f}")
    distinct = sorted(set(captions) | {""})
    place = {caption: i for i, caption in enumerate(distinct)}
    embeds, index = policy_of(None).embed(distinct), torch.tensor([place[caption] for caption in captions])
    snr = scheduler.alphas_bar / (1 - scheduler.alphas_bar)
    weights = snr.clamp(max=5) / snr

    def loss(net, rng):
        i = torch.as_tensor(rng.integers(len(latents), size=BATCH))
        x_0, t, noise = latents[i], torch.as_tensor(rng.integers(1000, size=BATCH)), torch.randn(BATCH, 4, 8, 8)
        caption = torch.where(torch.as_tensor(rng.random(BATCH) < DROP), place[""], index[i])
        eps = net(add_noise(x_0, noise, scheduler.alphas_bar[t]), t, embeds[caption])
        return (expand(weights[t], eps) * (eps - noise) ** 2).mean()

    def look(net, step):
        images = policy_of(net).sample(COMMON_ANIMALS, (0,), 45)[1]
        rows = [np.concatenate(list(images[i:i + 15]), axis=1) for i in range(0, 45, 15)]
        Image.fromarray(np.concatenate(rows)).save(data.CACHE / "unet.png")
        if judge_module.FOLDER.is_dir():
            print(f"unet: the judge names {judge_module.accuracy(judge_module.load_judge(), images, COMMON_ANIMALS):.1%}", flush=True)
        save(net, FOLDER / "unet", torch.float16)

    net = loop.train("unet", loop.initialize(UNet(CONFIG)), loss, STEPS, look=look, every=250)
    save(net, FOLDER / "unet", torch.float16)


if __name__ == "__main__":
    main()
