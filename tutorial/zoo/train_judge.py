"""Train the zoo's judge on composites of every thing on every ground, and on pictures of nothing.

    python tutorial/zoo/train_judge.py

Pictures of nothing are blurred, noisy, shuffled, or half-formed: the zoo's own VAE and UNet draw
mixtures of two things, and things that their noise has left hardly a trace of. So that the judge
does not take their style for a fault, they draw whole things too. The judge goes on from the one
that the zoo has, or begins anew where there is none.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from safetensors.torch import load_file
from tqdm import tqdm

import data
import judge as judge_module
import loop
import train_unet
from ddpo import sample
from scheduler import add_noise, expand, predicted_x0
from unet import VAE, UNet, load, save_tensors

BATCH = 64
ANEW = {"steps": 1800}
ONWARDS = {"steps": 2000, "lr": 0.01, "adam_lr": 1e-3}
DRAWN = 6400  # pictures by the zoo's networks, cached
NOTHING = len(data.NAMES)  # its label


def nothing(rng, art):
    """A bare ground, noise, a heavy blur, a shuffled picture, or halves of two -> uint8."""
    kind = rng.integers(5)
    if kind == 0:
        return data.draw_ground(rng, data.random_colour(rng), str(rng.choice(list(data.GROUNDS))))
    if kind == 1:
        return noise(rng)
    first = anything(rng, art)
    if kind == 2:
        blur = ImageFilter.GaussianBlur(rng.uniform(7, 10))
        return np.asarray(Image.fromarray(first).filter(blur))
    if kind == 3:
        return shuffled(rng, first)
    half = data.SIZE // 2
    return np.concatenate([first[:, :half], anything(rng, art)[:, :half]], axis=1)


def anything(rng, art):
    """A composite of any thing -> uint8 (64, 64, 3)."""
    return data.compose(rng, art, data.random_name(rng), data.random_colour(rng)).pixels


def noise(rng):
    """Coarse noise of any brightness and contrast, sharp or smooth -> uint8 (64, 64, 3)."""
    half = data.SIZE // 2
    pixels = rng.normal(rng.uniform(60, 200), rng.uniform(5, 90), (half, half, 3))
    coarse = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    how = int(rng.choice([Image.NEAREST, Image.BICUBIC]))
    return np.asarray(coarse.resize((data.SIZE, data.SIZE), how))


def shuffled(rng, pixels):
    """The sixteen parts of a picture in another order. (64, 64, 3) -> the same."""
    side = data.SIZE // 4
    blocks = pixels.reshape(4, side, 4, side, 3).swapaxes(1, 2).reshape(16, side, side, 3)
    rows = blocks[rng.permutation(16)].reshape(4, 4, side, side, 3).swapaxes(1, 2)
    return rows.reshape(data.SIZE, data.SIZE, 3)


def two_each(rng, art, n, device, words=tuple(data.NAMES)):
    """n pairs of different things on grounds of their own -> [pixels, pixels], [names, names]."""
    pairs = [rng.choice(words, 2, replace=False) for _ in range(n)]
    pixels, names = [], []
    for side in zip(*pairs):
        varied = rng.random() < 0.5
        drawn = [data.compose(rng, art, x, data.random_colour(rng), varied=varied) for x in side]
        pixels.append(data.to_tensor(np.stack([picture.pixels for picture in drawn]), device))
        names.append([str(name) for name in side])
    return pixels, names


def whole_latents(rng, policy, z, names):
    """Latents of whole things: the VAE's, what the policy sees in a little noise, or its samples.

    z: of pictures of the names, n each -> (n, 4, 8, 8).
    """
    kind = rng.integers(3)
    if kind == 0:
        return z + 0.1 * torch.randn(z.shape).to(z.device)
    if kind == 1:
        return seen_in_noise(policy, z, names, rng.integers(50, 400, len(z)))
    return sampled(policy, policy.embed(names))


def half_formed_latents(rng, policy, latents, names):
    """Latents of two things mixed or grown together, or of one that has nearly drowned in noise.

    latents, names: of the one and of the other, n each -> (n, 4, 8, 8).
    """
    z, other = latents
    kind, n = rng.integers(4), len(z)
    if kind == 0:
        share = torch.as_tensor(rng.uniform(0.38, 0.62, n), dtype=z.dtype, device=z.device)
        return expand(share, z) * z + expand(1 - share, z) * other
    if kind == 1:  # each has a part of the picture, with a soft seam
        mask = F.interpolate(torch.randn(n, 1, 3, 3), 8, mode="bicubic").mul(4).sigmoid()
        return mask.to(z.device) * z + (1 - mask.to(z.device)) * other
    if kind == 2:
        return seen_in_noise(policy, z, names[0], rng.integers(900, 990, n))
    return sampled(policy, (policy.embed(names[0]) + policy.embed(names[1])) / 2)  # asked for both


def sampled(policy, context):
    """Latents that the policy draws from noise, asked for a context. (n, m, d) -> (n, 4, 8, 8)."""
    shape = (len(context), policy.sampler.T + 1, policy.unet.config["in_channels"], 8, 8)
    inputs = (context, policy.uncond(), torch.randn(shape).to(context.device), policy.guidance)
    return sample(policy.network, policy.sampler, *inputs).latents[:, -1]


def seen_in_noise(policy, z, names, timesteps):
    """What the policy takes for x_0 when it sees a latent in the noise of a timestep."""
    t = torch.as_tensor(timesteps, device=z.device)
    alpha_bar = policy.sampler.schedule.alphas_bar[t]
    noisy = add_noise(z, torch.randn(z.shape).to(z.device), alpha_bar)
    eps = policy.network(noisy, t, policy.embed(names)).float()
    return predicted_x0(eps, noisy, alpha_bar)


@torch.no_grad()
def drawn_by_networks(zoo, art, device, count):
    """Things whole and half-formed by the zoo's networks, drawn once -> pixels, labels (count,).

    uint8 (count, 64, 64, 3). Delete .data/drawn.safetensors when a network that draws has changed.
    """
    path = zoo / ".data" / "drawn.safetensors"
    if not path.is_file():
        folder, rng, size = zoo / "stable-diffusion", np.random.default_rng(11), min(64, count // 4)
        policy = train_unet.load_policy(folder, load(VAE, folder / "vae").to(device), device)
        policy.unet = load(UNet, folder / "unet").to(device)
        pixels, labels = [], []
        for n in tqdm(range(count // size), desc="drawn by the networks", mininterval=10):
            words = data.NAMES if n % 4 else data.ANIMALS  # the policy draws these best
            both, names = two_each(rng, art, size, device, words)
            if n % 2:
                z = half_formed_latents(rng, policy, [policy.vae.encode(x) for x in both], names)
                labels += [NOTHING] * size
            else:
                z = whole_latents(rng, policy, policy.vae.encode(both[0]), names[0])
                labels += [data.NAMES.index(name) for name in names[0]]
            pixels.append(torch.from_numpy(policy.decode(z)))
        save_tensors({"pixels": torch.cat(pixels), "labels": torch.tensor(labels)}, path)
    tensors = load_file(path)
    return tensors["pixels"].numpy(), tensors["labels"].numpy()


def composite(rng, art, name, colour):
    """A composite, as a diffusion model's samples are -> uint8 (64, 64, 3)."""
    return worn(rng, data.compose(rng, art, name, colour).pixels)


def worn(rng, pixels):
    """A picture a little off its place, maybe a little blurred or noisy. (64, 64, 3) -> same."""
    y, x = rng.integers(9, size=2)
    padded = np.pad(pixels, ((4, 4), (4, 4), (0, 0)), mode="edge")
    pixels = padded[y : y + data.SIZE, x : x + data.SIZE]
    if rng.random() < 0.4:
        blur = ImageFilter.GaussianBlur(rng.uniform(0.3, 1.5))
        pixels = np.asarray(Image.fromarray(pixels).filter(blur))
    if rng.random() < 0.4:
        pixels = pixels + rng.normal(0, rng.uniform(2, 15), pixels.shape)
    return pixels.clip(0, 255).astype(np.uint8)


def batch(rng, art, drawn, n):
    """Half of it drawn by the networks -> pictures uint8 (n, 64, 64, 3), labels (n,)."""
    pixels, labels = drawn
    some = rng.integers(len(labels), size=n // 2)
    pictures = [worn(rng, pixels[i]) for i in some]
    more = np.where(rng.random(n - n // 2) < 0.15, NOTHING, rng.integers(NOTHING, size=n - n // 2))
    for label in more:
        if label == NOTHING:
            pictures.append(nothing(rng, art))
        else:
            pictures.append(composite(rng, art, data.NAMES[label], data.random_colour(rng)))
    return np.stack(pictures), torch.as_tensor(np.concatenate([labels[some], more]))


def begin(zoo, device):
    """The judge to start from -> the training's name, its rates, the network."""
    torch.manual_seed(1000)
    known = (zoo / "judge" / "model.safetensors").is_file()
    net = judge_module.load_judge(zoo).requires_grad_(True) if known else judge_module.Judge()
    net = net.to(device, memory_format=torch.channels_last)
    return ("judge-strict", ONWARDS, net) if known else ("judge", ANEW, net)


def main():
    options = data.options(__doc__)
    art, device = data.load_art(options.zoo), options.device
    count, few, size = (64, 32, 16) if options.quick else (DRAWN, 1024, BATCH)
    pixels, labels = drawn_by_networks(options.zoo, art, torch.device(device), count)
    fresh, drawn = (pixels[:few], labels[:few]), (pixels[few:], labels[few:])

    def loss(net, rng):
        pictures, labels = batch(rng, art, drawn, size)
        logits = net(data.to_tensor(pictures, device))
        return F.cross_entropy(logits, labels.to(device), label_smoothing=0.05)

    @torch.no_grad()
    def look(net, step):
        pictures, labels = batch(np.random.default_rng(12345), art, fresh, 2 * few)
        right = net(data.to_tensor(pictures, device)).argmax(1).cpu() == labels
        for kind, some in (("drawn by networks", slice(few)), ("others", slice(few, None))):
            things, right_here = labels[some] != NOTHING, right[some].float()
            shares = f"{right_here[things].mean():.1%} of things, {right_here[~things].mean():.1%}"
            print(f"judge, held-out pictures {kind}: right on {shares} of nothings", flush=True)

    name, rates, judge = begin(options.zoo, device)
    if options.quick:
        rates = {**rates, "steps": 2}
    cache = options.zoo / ".data"
    judge = loop.train(name, judge, loss, cache=cache, look=look, ema_decay=0.995, **rates)
    (options.zoo / "judge").mkdir(exist_ok=True)
    save_tensors(judge.state_dict(), options.zoo / "judge" / "model.safetensors", torch.float16)


if __name__ == "__main__":
    main()
