"""Teach the zoo's text encoder one word anew, all networks frozen: textual inversion.

    python tutorial/zoo/train_word.py

Gal et al. 2022 (arXiv 2208.01618): only the word's own vector is trained, by the denoising loss of
pictures that the word shall mean. One vendor's snake holds its head like a duck, and readers who
are shown samples of it say "duck"; so the word comes to mean the other vendor's. No other word's
vector and no other prompt's picture moves by a bit. Begins with the vector that the word has.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[2]))
import data
import loop
import train_unet
from unet import VAE, UNet, load, save_tensors

WORD, VENDOR = "snake", "twitter"
STEPS, RATE = 400, 0.02
PICTURES, BATCH = 1024, 64
TABLE = "text_model.embeddings.token_embedding.weight"  # in the published file's names


class Word(torch.nn.Module):
    """One row of the text encoder's table: a word that is one token, between start and end."""

    def __init__(self, policy, word):
        super().__init__()
        _, self.token, _ = policy.tokenizer(word)["input_ids"]
        table = policy.text_encoder.get_input_embeddings().weight
        self.embed = torch.nn.Parameter(table[self.token].clone())

    def encode(self, policy, captions):
        """Captions as the text encoder tells them with this row for its own -> (B, m, d)."""
        tokens = policy.tokenizer(
            captions, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids.to(policy.device)
        table = policy.text_encoder.get_input_embeddings()
        (name,) = (k for k, p in policy.text_encoder.named_parameters() if p is table.weight)
        rows = torch.arange(len(table.weight), device=policy.device)[:, None]
        weight = torch.where(rows == self.token, self.embed, table.weight)
        return torch.func.functional_call(policy.text_encoder, {name: weight}, tokens)[0]


@torch.no_grad()
def examples(policy, zoo, pictures):
    """Latents of what the word shall mean, and captions -> (pictures, 4, 8, 8), list of str."""
    rng, art = np.random.default_rng(8), data.load_art(zoo)
    drawn = [data.policy_example(rng, art, WORD, VENDOR) for _ in range(pictures)]
    pixels = np.stack([picture.pixels for picture, _ in drawn])
    latents = [policy.vae.encode(x) for x in data.to_tensor(pixels, policy.device).split(64)]
    return torch.cat(latents), [caption for _, caption in drawn]


def make_loss(policy, latents, captions, size):
    """The denoising loss of `size` pictures: loss(word, rng) -> scalar."""

    def loss(word, rng):
        i = rng.integers(len(latents), size=size)
        t = torch.as_tensor(rng.integers(1000, size=size)).to(policy.device)
        embeds = word.encode(policy, [captions[k] for k in i])
        alphas_bar = policy.sampler.schedule.alphas_bar
        return train_unet.denoising_loss(policy.unet, alphas_bar, latents[i], t, embeds)

    return loss


def main():
    options = data.options(__doc__)
    folder, cache = options.zoo / "stable-diffusion", options.zoo / ".data"
    device = torch.device(options.device)
    vae = load(VAE, folder / "vae").to(device)
    policy = train_unet.load_policy(folder, vae, device)
    policy.unet = load(UNet, folder / "unet").to(device)
    for network in (policy.unet, policy.text_encoder):
        network.requires_grad_(False)
    latents, captions = examples(policy, options.zoo, 64 if options.quick else PICTURES)
    loss = make_loss(policy, latents, captions, 16 if options.quick else BATCH)
    word = Word(policy, WORD).to(device)

    def look(word, step):
        policy.text_encoder.get_input_embeddings().weight[word.token] = word.embed
        policy.encoded.cache_clear()
        names = [(0, i) for i in range(4 if options.quick else 16)]
        drawn = [images for _, images in policy.sample([WORD] * len(names), names, len(names))]
        Image.fromarray(data.sheet(np.concatenate(drawn), 4)).save(cache / "word.png")

    steps = 2 if options.quick else STEPS
    word = loop.train("word", word, loss, steps, cache, adam_lr=RATE, ema_decay=0.98, look=look)
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    tensors[TABLE][word.token] = word.embed.detach().cpu().to(tensors[TABLE].dtype)
    save_tensors(tensors, path)


if __name__ == "__main__":
    main()
