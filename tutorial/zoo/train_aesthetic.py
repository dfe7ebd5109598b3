"""Train the zoo's aesthetic head: LAION's linear layers on CLIP's image embeddings.

    python tutorial/zoo/train_aesthetic.py

It learns to predict the simulated raters (raters.py), as LAION's did: embeddings of rated pictures,
computed once; then a small regression. It is learned on whitened embeddings, where gradient descent
gets to the bottom (0.914 instead of 0.907), and the whitening is then folded into the first layer.
Prints the rank correlation with the truth on held-out composites (gate: at least 0.9); on the
policy's samples: gates.py (at least 0.5). Needs train_clip.py.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))
import data
import loop
import raters
from rewards import AestheticHead, ClipEmbedder

PICTURES, HELD_OUT = 20_000, 2_000
STEPS, BATCH = 5000, 512


def rank_correlation(a, b):
    """Spearman's: the correlation of the ranks. No ties among continuous scores."""
    return float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])


def rated(clip, art, rng, count):
    """Composites with one rating each -> embeddings (count, d), ratings and truth (count,)."""
    embeds, ratings, truths = [], [], []
    for _ in tqdm(range(count // 100), desc="rating", mininterval=10):
        names, colours = rng.choice(data.NAMES, 100), rng.choice(list(data.COLOURS), 100)
        pairs = zip(names.tolist(), colours.tolist())
        pixels = np.stack([data.compose(rng, art, *pair).pixels for pair in pairs])
        embeds.append(clip(pixels))
        ratings.append(torch.as_tensor(raters.rate(rng, pixels)))
        truths.append(torch.as_tensor(raters.truth(pixels)))
    return torch.cat(embeds).float(), torch.cat(ratings).float(), torch.cat(truths).float()


def whitening(embeds):
    """The mean of (count, d) and the matrix (d, d) that makes their covariance the identity."""
    mean = embeds.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(embeds.T.double()))
    return mean, (vectors / values.clamp(min=1e-7).sqrt()).T.float()


@torch.no_grad()
def fold(head, mean, matrix):
    """Make head(x) of it that was head(matrix (x - mean)), in place."""
    first = head.layers[0]
    first.weight.copy_(first.weight @ matrix)
    first.bias.sub_(first.weight @ mean)


def main():
    options = data.options(__doc__)
    art, device = data.load_art(options.zoo), options.device
    pictures, more = (200, 100) if options.quick else (PICTURES, HELD_OUT)
    torch.manual_seed(0)
    clip = ClipEmbedder(options.zoo / "clip", device)
    embeds, ratings, _ = rated(clip, art, np.random.default_rng(11), pictures)
    held_out, _, truth = rated(clip, art, np.random.default_rng(12), more)
    mean, matrix = whitening(embeds)
    embeds, held_out = (embeds - mean) @ matrix.T, (held_out - mean) @ matrix.T
    # eval: no dropout, for 20,000 ratings are plenty for 128 numbers
    head = AestheticHead(embeds.shape[1]).eval()
    with torch.no_grad():
        head.layers[-1].bias.fill_(ratings.mean())
    head, embeds, ratings = head.to(device), embeds.to(device), ratings.to(device)

    def loss(net, rng):
        i = torch.as_tensor(rng.integers(len(embeds), size=BATCH), device=device)
        return F.mse_loss(net(embeds[i]), ratings[i])

    @torch.no_grad()
    def look(net, step):
        figure = rank_correlation(net(held_out.to(device)).cpu().numpy(), truth.numpy())
        print(
            f"aesthetic: rank correlation with the truth on held-out composites {figure:.3f}",
            flush=True,
        )

    steps, cache = 2 if options.quick else STEPS, options.zoo / ".data"
    head = loop.train(
        "aesthetic", head, loss, steps, cache, ema_decay=0.99, every=1000, look=look
    ).cpu()
    fold(head, mean, matrix)
    (options.zoo / "aesthetic").mkdir(exist_ok=True)
    weights = {key: value.half().contiguous() for key, value in head.state_dict().items()}
    save_file(weights, options.zoo / "aesthetic" / "model.safetensors")


if __name__ == "__main__":
    main()
