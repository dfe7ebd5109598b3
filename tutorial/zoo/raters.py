"""The zoo's simulated raters: they stand for the people who rated pictures for LAION's predictor.

There are no human ratings to learn from here, so these are made up, and say so. `truth` is what the
raters agree on, a pure function of pixels: a picture scores for colour, sharpness, a subject in the
middle, a calm ground, and for a taste of theirs, warm light. `rate` is the truth with each rater's
noise, which the aesthetic head (train_aesthetic.py) learns to predict from CLIP's embedding: a
proxy that can be over-optimised, and the truth stays beside it in the metrics of every run.
"""

import numpy as np


def colourfulness(images):
    """Hasler and Suesstrunk 2003: spread and strength of the two opponent colours.

    uint8 (B, H, W, 3) -> (B,), 0 is grey, 100 gaudy.
    """
    r, g, b = np.moveaxis(images.astype(np.float64), 3, 0)
    rg, yb = r - g, (r + g) / 2 - b  # (B, H, W)
    spread = np.hypot(rg.std((1, 2)), yb.std((1, 2)))
    return spread + 0.3 * np.hypot(rg.mean((1, 2)), yb.mean((1, 2)))


def border(images, width=4):
    """The pixels of the border. (B, H, W, 3) -> (B, pixels, 3)."""
    edge = np.ones(images.shape[1:3], bool)
    edge[width:-width, width:-width] = False
    return images[:, edge]


def saliency(images):
    """How far each pixel is from the ground's colour (the border's median), 0 to 1.

    uint8 (B, H, W, 3) -> (B, H, W).
    """
    ground = np.median(border(images), axis=1)[:, None, None]
    return np.abs(images.astype(np.float64) - ground).max(3) / 255


def sharpness(images):
    """The steepest slopes of brightness: the mean of the upper 5 %, in grey levels a pixel.

    uint8 (B, H, W, 3) -> (B,).
    """
    grey = images.astype(np.float64).mean(3)
    across = grey[:, 1:-1, 2:] - grey[:, 1:-1, :-2]
    down = grey[:, 2:, 1:-1] - grey[:, :-2, 1:-1]
    slopes = np.sort((np.hypot(across, down) / 2).reshape(len(images), -1), axis=1)
    return slopes[:, -slopes.shape[1] // 20 :].mean(1)


def off_centre(images):
    """Distance of what stands out from the middle, as a share of the picture's side.

    uint8 (B, H, W, 3) -> (B,).
    """
    s = saliency(images) + 1e-6
    H, W = images.shape[1:3]
    y, x = np.mgrid[:H, :W] + 0.5
    total = s.sum((1, 2))
    across, down = (s * x).sum((1, 2)) / total / W, (s * y).sum((1, 2)) / total / H
    return np.hypot(across - 0.5, down - 0.5)


def unrest(images):
    """How busy the ground is: the spread of the border's pixels, in grey levels.

    uint8 (B, H, W, 3) -> (B,).
    """
    return border(images).astype(np.float64).std(1).mean(1)


def warmth(images):
    """Red over blue, -1 to 1. uint8 (B, H, W, 3) -> (B,)."""
    return (images[..., 0].astype(np.float64) - images[..., 2]).mean((1, 2)) / 255


def truth(images, prompts=None):
    """What the raters agree on, 1 to 10; an average composite gets 5. uint8 (B, H, W, 3) -> (B,).

    Has the form of a reward, and is never one.
    """
    score = (
        5
        + 0.02 * (colourfulness(images) - 78)
        + 0.02 * (sharpness(images) - 48)
        - 4 * (off_centre(images) - 0.09)
        - 0.015 * (unrest(images) - 19)
        + 3 * (warmth(images) - 0.15)
    )
    return score.clip(1, 10)


def rate(rng, images, noise=0.5):
    """One rater's score of each picture. uint8 (B, H, W, 3) -> (B,)."""
    return (truth(images) + rng.normal(0, noise, len(images))).clip(1, 10)
