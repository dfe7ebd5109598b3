"""Look at what was trained: any prompts before and after, from the same noises.

    python tutorial/draw.py runs/x "a fox" "a fox on a blue background"
    python tutorial/draw.py runs/x "a fox" --checkpoint 5       # not the newest
    python tutorial/draw.py zoo "a fox"                         # a model alone: a folder, a hub id
    python tutorial/draw.py runs/x --gif                        # the fixed pictures, by epochs
    python tutorial/draw.py runs/x "a fox" --gif                # any prompts, by checkpoints

With the settings of the run, or the model's own; picture i of every prompt has the noises of the
run's fixed picture i. The gifs are the paper's Fig. 1 in motion. A run keeps its last two
checkpoints, or all, with train.py's --keep-checkpoints 0.
"""

import argparse
import math
import sys
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from scheduler import UserError, read_json, refusing, require

LINE, GAP = 24, 16  # pixels between lines, between columns
FONT = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"  # Pillow's own knows no umlauts


def parse():
    """The command line."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument(
        "source", type=Path, help="a run's folder; or zoo, a model's folder, hub id"
    )
    parser.add_argument("prompts", nargs="*")
    parser.add_argument("--checkpoint", type=int, metavar="N", help="of epoch N [the newest]")
    parser.add_argument("--gif", action="store_true", help="a frame an epoch, or a checkpoint")
    parser.add_argument("--pictures", type=int, default=4, metavar="N", help="of each prompt [4]")
    parser.add_argument("--model", help="where the run's model lies now, if it was moved")
    parser.add_argument("--device", default="auto", help="[auto]")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="[in the run's folder; of a model: here]"
    )
    return parser.parse_intermixed_args()  # options may stand before the prompts


def load(given, is_run):
    """The model as it was before the run -> ddpo.Policy, Config."""
    device = train.choose_device(given.device)
    stored = train.resumed({"out": given.source.as_posix(), "resume": True}) if is_run else {}
    name = {"model": given.model or stored.get("model", given.source.as_posix())}
    folder = train.choose_model(name, device)[1]
    config = train.Config(**stored) if is_run else train.merge(name, folder)
    return train.load_policy(folder, device, config), config


def checkpoints(given):
    """The run's checkpoints that are asked for -> {epochs: folder}."""
    found = sorted((given.source / "checkpoints").glob("[0-9]" * 6))
    kept = {int(path.name): path for path in found}
    require(kept, f"{given.source} has no checkpoint yet")
    if given.gif:
        return kept
    epoch, there = given.checkpoint or max(kept), ", ".join(map(str, kept))
    require(epoch in kept, f"--checkpoint {epoch}: {given.source} has kept {there}")
    return {epoch: kept[epoch]}


def draw(policy, config, prompts, count):
    """`count` pictures of each prompt, of the same noises -> list of uint8 (count, H, W, 3)."""
    asked = [prompt for prompt in prompts for _ in range(count)]
    names = [(config.seed, train.EVALUATION, i) for i in range(count)] * len(prompts)
    batches = policy.sample(asked, names, config.sample_batch)
    total = math.ceil(len(asked) / config.sample_batch)
    drawn = [images for _, images in train.progress(batches, "drawing", total)]
    return np.split(np.concatenate(drawn), len(prompts))


def words(text, width):
    """A text in lines -> uint8 (height, width, 3)."""
    lines = textwrap.wrap(text, width // 8) or [""]
    image = Image.new("RGB", (width, LINE * len(lines)), "white")
    font = ImageFont.truetype(FONT, 15)
    ImageDraw.Draw(image).text((4, 0), "\n".join(lines), "black", font, spacing=LINE - 15)
    return np.asarray(image)


def column(title, prompts, pictures):
    """The pictures of each prompt in a row, its words above -> uint8 (height, width, 3)."""
    side = pictures[0].shape[1]
    tile = min(max(side, 128), 256)
    parts = [words(title, tile * len(pictures[0]))]
    for prompt, some in zip(prompts, pictures):
        tiles = [Image.fromarray(picture).resize((tile, tile)) for picture in some]
        parts += [words(prompt, tile * len(some)), np.hstack(tiles)]
    return np.vstack(parts)


def fixed_pictures(run):
    """The run's evaluations, each with epoch and reward above -> list of uint8 (H, W, 3)."""
    frames = []
    for path in sorted((run / "samples").glob("epoch_*.png")):
        record = read_json(path.with_suffix(".json"))
        title = f"epoch {record['epoch']}: reward {np.mean(record['rewards']):.3f}"
        grid = np.asarray(Image.open(path).convert("RGB"))
        frames.append(np.vstack([words(title, grid.shape[1]), grid]))
    require(frames, f"--gif: {run} holds no samples/epoch_*.png, as a run does")
    return frames


def write(path, frames):
    """One picture, or a gif of several."""
    images, options = [Image.fromarray(frame) for frame in frames], {}
    if len(images) > 1:
        for image in images:
            image.thumbnail((1024, 4096))
        durations = [700] * (len(images) - 1) + [2500]  # milliseconds
        options = {"append_images": images[1:], "duration": durations, "loop": 0, "save_all": True}
    with refusing(f"{path} cannot be written", OSError, ValueError):
        images[0].save(path, **options)
    print(path)


def main(given):
    """Draw what is asked for, and print where it lies."""
    source, prompts, is_run = given.source, given.prompts, (given.source / "config.json").is_file()
    for folder in (source, source.parent):  # a checkpoint is no model of its own
        of = f"give its run, {folder.parent.parent}, and --checkpoint {folder.name.lstrip('0')}"
        require(folder.parent.name != "checkpoints", f"{source} is a checkpoint: {of}")
    require(prompts or given.gif, f'which prompts? For example: draw.py {source} "a fox"')
    require(given.pictures > 0, f"--pictures {given.pictures}: at least 1")
    require(is_run or not given.checkpoint and not given.gif, f"{source} is no run, but a model")
    require(not (given.checkpoint and given.gif), "--gif: shows all checkpoints, not one")
    home = source if is_run else Path()
    if not prompts:
        return write(given.out or home / "samples.gif", fixed_pictures(source))
    chosen = checkpoints(given) if is_run else {}
    policy, config = load(given, is_run)
    drawn = draw(policy, config, prompts, given.pictures)
    frames = [column("base" if is_run else source.name, prompts, drawn)]
    for epoch, folder in chosen.items():
        train.load_weights(policy.unet, folder)
        drawn = draw(policy, config, prompts, given.pictures)
        frames.append(column(f"epoch {epoch}", prompts, drawn))
    if given.gif:
        return write(given.out or home / "drawn.gif", frames)
    gap = np.full((len(frames[0]), GAP, 3), 255, np.uint8)
    between = [part for frame in frames for part in (frame, gap)][:-1]
    write(given.out or home / "drawn.png", [np.hstack(between)])


if __name__ == "__main__":
    try:
        main(parse())
    except (UserError, torch.OutOfMemoryError) as error:
        sys.exit(f"draw.py: {error}")
