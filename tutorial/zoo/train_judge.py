"""Train the zoo's judge: composites of every thing on every ground, and pictures of nothing, blurred, noisy and shuffled as a bad model's are.

    python tutorial/zoo/train_judge.py
"""
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from safetensors.torch import save_file

import data
import judge as judge_module
import loop

STEPS, BATCH = 1800, 64
ART = data.load_art()


def nothing(rng):
    """A picture of nothing: a bare ground, noise, a heavy blur, a shuffled picture, or two halves of different things."""
    colour = lambda: str(rng.choice(list(data.COLOURS)))
    picture = lambda: data.compose(rng, ART, data.random_name(rng), colour()).pixels
    kind = rng.integers(5)
    if kind == 0:
        return data.draw_ground(rng, colour(), str(rng.choice(["flat", "gradient", "striped", "checkered", "dotted", "cloudy"]))).clip(0, 255).astype(np.uint8)
    if kind == 1:
        noise = rng.normal(rng.uniform(60, 200), rng.uniform(5, 90), (data.SIZE // 2, data.SIZE // 2, 3)).clip(0, 255).astype(np.uint8)
        return np.asarray(Image.fromarray(noise).resize((data.SIZE, data.SIZE), int(rng.choice([Image.NEAREST, Image.BICUBIC]))))
    if kind == 2:
        return np.asarray(Image.fromarray(picture()).filter(ImageFilter.GaussianBlur(rng.uniform(7, 10))))
    if kind == 3:
        side = data.SIZE // 4
        blocks = picture().reshape(4, side, 4, side, 3).swapaxes(1, 2).reshape(16, side, side, 3)
        return blocks[rng.permutation(16)].reshape(4, 4, side, side, 3).swapaxes(1, 2).reshape(data.SIZE, data.SIZE, 3)
    first, second = picture(), picture()
    return np.concatenate([first[:, :data.SIZE // 2], second[:, :data.SIZE // 2]], axis=1)


def composite(rng, name, colour):
    """A composite, a little off its place, sometimes a little blurred or noisy: a diffusion model's samples are -> uint8 (64, 64, 3)."""
    pixels = data.compose(rng, ART, name, colour).pixels
    y, x = rng.integers(9, size=2)
    pixels = np.pad(pixels, ((4, 4), (4, 4), (0, 0)), mode="edge")[y:y + data.SIZE, x:x + data.SIZE]
    if rng.random() < 0.4:
        pixels = np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.5))))
    if rng.random() < 0.4:
        pixels = (pixels + rng.normal(0, rng.uniform(2, 15), pixels.shape)).clip(0, 255).astype(np.uint8)
    return pixels


def batch(rng, n):
    labels = np.where(rng.random(n) < 0.15, len(data.NAMES), rng.integers(len(data.NAMES), size=n))
    pictures = [nothing(rng) if label == len(data.NAMES) else composite(rng, judge_module.LABELS[label], str(rng.choice(list(data.COLOURS)))) for label in labels]
    return np.stack(pictures), torch.as_tensor(labels)


def loss(net, rng):
    pictures, labels = batch(rng, BATCH)
    return F.cross_entropy(net(data.to_tensor(pictures)), labels, label_smoothing=0.05)


@torch.no_grad()
def look(net, step):
    pictures, labels = batch(np.random.default_rng(12345), 1024)
    right = net(data.to_tensor(pictures)).argmax(1) == labels
    nothing = labels == len(data.NAMES)
    print(f"judge: right on {right[~nothing].float().mean():.1%} of held-out composites, on {right[nothing].float().mean():.1%} of nothings", flush=True)


if __name__ == "__main__":
    torch.manual_seed(1000)
    judge = loop.train("judge", judge_module.Judge().to(memory_format=torch.channels_last), loss, STEPS, look=look, ema_decay=0.995)
    judge_module.FOLDER.mkdir(exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in judge.state_dict().items()}, judge_module.FOLDER / "model.safetensors")
