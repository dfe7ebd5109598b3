"""Train the zoo's aesthetic head: LAION's linear layers on CLIP's image embeddings, to predict the simulated raters (raters.py).

    python tutorial/zoo/train_aesthetic.py

As LAION did: embeddings of rated pictures, computed once; then a small regression. It is learned on whitened embeddings, where gradient
descent gets to the bottom (0.914 instead of 0.907), and the whitening is then folded into the first layer. Prints the rank correlation
with the truth on held-out composites (gate: at least 0.9); on the policy's samples: gates.py (at least 0.5).
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

PICTURES, HELD_OUT, STEPS, BATCH = 20_000, 2_000, 5000, 512
FOLDER = data.HERE / "aesthetic"


def rank_correlation(a, b):
    """Spearman's: the correlation of the ranks (no ties among continuous scores)."""
    return float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])


def rated(clip, rng, count):
    """Composites with one rating each -> embeddings (count, d), ratings (count,), truth (count,)."""
    art, rows = data.load_art(), []
    for _ in tqdm(range(count // 100), desc="rating", mininterval=10):
        names, colours = rng.choice(list(data.NAMES), 100), rng.choice(list(data.COLOURS), 100)
        pixels = np.stack([data.compose(rng, art, str(name), str(colour)).pixels for name, colour in zip(names, colours)])
        rows.append((clip(pixels), torch.as_tensor(raters.rate(rng, pixels)), torch.as_tensor(raters.truth(pixels))))
    return [torch.cat(column).float() for column in zip(*rows)]


def whitening(embeds):
    """The mean of (count, d) and the matrix (d, d) that makes their covariance the identity."""
    mean = embeds.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(embeds.T.double()))
    return mean, (vectors / values.clamp(min=1e-7).sqrt()).T.float()


def fold(head, mean, matrix):
    """Make head(x) of it that was head(matrix (x - mean)), in place."""
    first = head.layers[0]
    first.weight.copy_(first.weight @ matrix)
    first.bias.sub_(first.weight @ mean)


def main():
    torch.manual_seed(0)
    clip = ClipEmbedder(data.HERE / "clip", "cpu")
    embeds, ratings, _ = rated(clip, np.random.default_rng(11), PICTURES)
    held_out, _, truth = rated(clip, np.random.default_rng(12), HELD_OUT)
    mean, matrix = whitening(embeds)
    embeds, held_out = (embeds - mean) @ matrix.T, (held_out - mean) @ matrix.T
    head = AestheticHead(embeds.shape[1]).eval()            # no dropout: 20,000 ratings are plenty for 128 numbers
    with torch.no_grad():
        head.layers[-1].bias.fill_(ratings.mean())

    def loss(net, rng):
        i = torch.as_tensor(rng.integers(len(embeds), size=BATCH))
        return F.mse_loss(net(embeds[i]), ratings[i])

    def look(net, step):
        print(f"aesthetic: rank correlation with the truth on held-out composites {rank_correlation(net(held_out).numpy(), truth.numpy()):.3f}", flush=True)

    head = loop.train("aesthetic", head, loss, STEPS, look=torch.no_grad()(look), lr=0.02, adam_lr=2e-3, ema_decay=0.99, every=1000)
    with torch.no_grad():
        fold(head, mean, matrix)
    FOLDER.mkdir(exist_ok=True)
    save_file({key: value.half().contiguous() for key, value in head.state_dict().items()}, FOLDER / "model.safetensors")


if __name__ == "__main__":
    main()
