"""Train the zoo's judge on composites of every thing on every ground, and on pictures of nothing.

    python tutorial/zoo/train_judge.py

Pictures of nothing are blurred, noisy and shuffled, as a bad model's are.
"""

import data
import judge as judge_module
import loop
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from safetensors.torch import save_file

STEPS, BATCH = 1800, 64
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


def composite(rng, art, name, colour):
    """A composite a little off its place, sometimes a little blurred or noisy -> uint8 (64, 64, 3).

    As a diffusion model's samples are.
    """
    pixels = data.compose(rng, art, name, colour).pixels
    y, x = rng.integers(9, size=2)
    padded = np.pad(pixels, ((4, 4), (4, 4), (0, 0)), mode="edge")
    pixels = padded[y : y + data.SIZE, x : x + data.SIZE]
    if rng.random() < 0.4:
        blur = ImageFilter.GaussianBlur(rng.uniform(0.3, 1.5))
        pixels = np.asarray(Image.fromarray(pixels).filter(blur))
    if rng.random() < 0.4:
        pixels = pixels + rng.normal(0, rng.uniform(2, 15), pixels.shape)
    return pixels.clip(0, 255).astype(np.uint8)


def batch(rng, art, n):
    """-> pictures uint8 (n, 64, 64, 3), labels (n,)."""
    labels = np.where(rng.random(n) < 0.15, NOTHING, rng.integers(NOTHING, size=n))
    pictures = []
    for label in labels:
        if label == NOTHING:
            pictures.append(nothing(rng, art))
        else:
            pictures.append(composite(rng, art, data.NAMES[label], data.random_colour(rng)))
    return np.stack(pictures), torch.as_tensor(labels)


def main():
    options = data.options(__doc__)
    art, device = data.load_art(options.zoo), options.device
    torch.manual_seed(1000)
    judge = judge_module.Judge().to(device, memory_format=torch.channels_last)

    def loss(net, rng):
        pictures, labels = batch(rng, art, BATCH)
        logits = net(data.to_tensor(pictures, device))
        return F.cross_entropy(logits, labels.to(device), label_smoothing=0.05)

    @torch.no_grad()
    def look(net, step):
        pictures, labels = batch(np.random.default_rng(12345), art, 1024)
        right = net(data.to_tensor(pictures, device)).argmax(1).cpu() == labels
        things, nothings = right[labels != NOTHING], right[labels == NOTHING]
        print(
            f"judge: right on {things.float().mean():.1%} of held-out composites, "
            f"on {nothings.float().mean():.1%} of nothings",
            flush=True,
        )

    steps, cache = 2 if options.quick else STEPS, options.zoo / ".data"
    judge = loop.train("judge", judge, loss, steps, cache, look=look, ema_decay=0.995)
    (options.zoo / "judge").mkdir(exist_ok=True)
    weights = {key: value.half().cpu().contiguous() for key, value in judge.state_dict().items()}
    save_file(weights, options.zoo / "judge" / "model.safetensors")


if __name__ == "__main__":
    main()
