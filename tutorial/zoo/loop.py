"""The loop that trains every network of the zoo: AdamW, warm-up and cosine decay, an average of the weights, checkpoints, a progress bar.

Kill it at any time; the same command goes on from the last checkpoint (tutorial/zoo/.data/<name>/).
"""
import copy
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

CHECKPOINTS = Path(__file__).parent / ".data"


def train(name, net, loss_function, steps, lr, ema_decay=0.999, every=200, look=None, weight_decay=1e-2, min_lr=0.02):
    """Minimise `loss_function(net, rng) -> scalar` for `steps` steps of AdamW; return the exponential average of the weights, as a net.

    rng is a numpy Generator seeded by (name, step): a resumed training sees the same batches. `look(averaged_net, step)` is called at
    every checkpoint, to draw pictures or print figures.
    """
    averaged = copy.deepcopy(net).requires_grad_(False).eval()
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)
    folder = CHECKPOINTS / name
    first = restore(folder, net, averaged, optimizer)
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=name, mininterval=10, maxinterval=30)
    smooth, begin = None, time.time()
    for step in bar:
        rng = np.random.default_rng([*name.encode(), step])
        torch.manual_seed(int(rng.integers(2**31)))
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * (min_lr + (1 - min_lr) * (1 + math.cos(math.pi * step / steps)) / 2)
        loss = loss_function(net, rng)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            decay = min(ema_decay, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(averaged.parameters()), list(net.parameters()), 1 - decay)
            for mine, theirs in zip(averaged.buffers(), net.buffers()):
                mine.copy_(theirs)
        smooth = loss.item() if smooth is None else 0.99 * smooth + 0.01 * loss.item()
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if (step + 1) % every == 0 or step + 1 == steps:
            keep(folder, net, averaged, optimizer, step + 1)
            print(f"\n{name} step {step + 1}: loss {smooth:.4f}, {(time.time() - begin) / 60:.1f} minutes", flush=True)
            if look:
                look(averaged, step + 1)
    return averaged


def keep(folder, net, averaged, optimizer, step):
    """Write the checkpoint aside, then rename it."""
    tensors = {f"net.{k}": v for k, v in net.state_dict().items()}
    tensors |= {f"averaged.{k}": v for k, v in averaged.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, folder / "checkpoint.tmp", metadata={"step": json.dumps(step)})
    os.replace(folder / "checkpoint.tmp", folder / "checkpoint.safetensors")


def restore(folder, net, averaged, optimizer):
    """Load the checkpoint of `folder` into all three, if there is one -> the step to go on from."""
    if not (folder / "checkpoint.safetensors").is_file():
        return 0
    from safetensors import safe_open
    with safe_open(folder / "checkpoint.safetensors", "pt") as file:
        step = json.loads(file.metadata()["step"])
    tensors = load_file(folder / "checkpoint.safetensors")
    part = lambda prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    net.load_state_dict(part("net."))
    averaged.load_state_dict(part("averaged."))
    state = {}
    for key, value in part("optimizer.").items():
        i, k = key.split(".")
        state.setdefault(int(i), {})[k] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    print(f"resuming {folder.name} at step {step}")
    return step
