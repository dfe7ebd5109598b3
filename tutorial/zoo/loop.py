"""The loop that trains every network of the zoo: Muon, warm-up and cosine decay, averaged weights.

Muon (Jordan et al. 2024: momentum, made orthogonal, as the step of a matrix) learns these small
networks three or more times faster than AdamW: the VAE's loss after 120 steps is 0.22 against 0.31.
torch.optim.Muon takes no convolutions, hence the few lines here.

Kill it at any time; the same command goes on from the last checkpoint, `cache`/<name>/.
"""

import copy
import json
import math
import os
import time
from functools import cache as remembered

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

WARMUP = 50  # steps
CHECKPOINT = "checkpoint.safetensors"


@remembered
def rough_dtype(device):
    """What `orthogonalize` computes in: bfloat16 where the hardware multiplies it, else float32.

    Natively it takes half of float32's time, emulated on an AVX2 CPU four times as much.
    """
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        cpu = torch.cpu.get_capabilities()
        native = any(cpu.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32


def orthogonalize(g):
    """The nearest orthogonal matrix to g, roughly, by five Newton-Schulz steps.

    A convolution's kernel counts as (c_out, everything else). The result is rough by design, hence
    bfloat16 where it is fast. (c_out, ...) -> the same.
    """
    x = g.flatten(1).to(rough_dtype(g.device))
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (2.0315 * a @ a - 4.7750 * a) @ x
    x = x if wide else x.T
    return x.to(g.dtype).reshape(g.shape)


class Muon(torch.optim.Optimizer):
    """w <- w - lr sqrt(max(1, rows / columns)) orthogonalize(the gradient's Nesterov momentum)."""

    def __init__(self, parameters, lr, momentum=0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(p.grad)
                update = orthogonalize(p.grad.add(buffer, alpha=group["momentum"]))
                p.add_(update, alpha=-group["lr"] * max(1, p.shape[0] / p[0].numel()) ** 0.5)


def initialize(net):
    """Gain 1 everywhere and residual branches that begin at zero -> the network itself.

    One that begins nearly linear learns faster.
    """
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            torch.nn.init.zeros_(module.bias)
    for module in net.modules():
        if hasattr(module, "conv2"):
            torch.nn.init.zeros_(module.conv2.weight)
    return net.to(memory_format=torch.channels_last)


def make_optimizers(net, lr, adam_lr):
    """Adam, and Muon for the hidden matrices and kernels. Each keeps its rate as "peak"."""
    outer = ("embed", "conv_in", "conv_out", "quant", "head")  # and all vectors
    hidden, rest = [], []
    for key, p in net.named_parameters():
        if p.requires_grad:
            inside = p.ndim >= 2 and not any(part in key for part in outer)
            (hidden if inside else rest).append(p)
    optimizers = [torch.optim.Adam(rest, lr=adam_lr, betas=(0.9, 0.95))]
    if hidden:
        optimizers.append(Muon(hidden, lr=lr))
    for optimizer, peak in zip(optimizers, (adam_lr, lr)):
        optimizer.param_groups[0]["peak"] = peak
    return optimizers


def set_rates(optimizers, step, steps, min_lr):
    """Linear warm-up to the peak, then half a cosine down to its share `min_lr`."""
    warmup = min(1, (step + 1) / WARMUP)
    decay = min_lr + (1 - min_lr) * (1 + math.cos(math.pi * step / steps)) / 2
    for optimizer in optimizers:
        group = optimizer.param_groups[0]
        group["lr"] = group["peak"] * warmup * decay


@torch.no_grad()
def average(averaged, net, decay):
    """averaged <- decay averaged + (1 - decay) net, for the weights; buffers are copied."""
    torch._foreach_lerp_(list(averaged.parameters()), list(net.parameters()), 1 - decay)
    for mine, theirs in zip(averaged.buffers(), net.buffers()):
        mine.copy_(theirs)


def train(
    name,
    net,
    loss_function,
    steps,
    cache,
    lr=0.02,
    adam_lr=2e-3,
    min_lr=0.02,
    ema_decay=0.999,
    every=200,
    look=None,
):
    """Minimise `loss_function(net, rng) -> scalar` -> the exponential average of the weights.

    rng is a numpy Generator seeded by (name, step), torch's own by it: a resumed training sees the
    same batches. `look(averaged_net, step)` is called at every checkpoint, one in `every` steps, to
    draw pictures or print figures. Muon's learning rate is `lr`, Adam's `adam_lr`.
    """
    averaged = copy.deepcopy(net).requires_grad_(False).eval()
    optimizers, folder = make_optimizers(net, lr, adam_lr), cache / name
    first = restore(folder, net, averaged, optimizers)
    steps_left = range(first, steps)
    bar = tqdm(steps_left, initial=first, total=steps, desc=name, mininterval=10, maxinterval=30)
    smooth, begin = None, time.time()
    for step in bar:
        rng = np.random.default_rng([*name.encode(), step])
        torch.manual_seed(int(rng.integers(2**31)))
        set_rates(optimizers, step, steps, min_lr)
        loss = loss_function(net, rng)
        net.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        average(averaged, net, min(ema_decay, (step + 1) / (step + 10)))
        smooth = loss.item() if smooth is None else 0.99 * smooth + 0.01 * loss.item()
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if (step + 1) % every == 0 or step + 1 == steps:
            keep(folder, net, averaged, optimizers, step + 1)
            minutes = (time.time() - begin) / 60
            print(f"\n{name} step {step + 1}: loss {smooth:.4f}, {minutes:.1f} minutes", flush=True)
            if look:
                look(averaged, step + 1)
    return averaged


def keep(folder, net, averaged, optimizers, step):
    """Write the checkpoint aside, then rename it."""
    tensors = {f"net.{key}": value for key, value in net.state_dict().items()}
    for key, value in averaged.state_dict().items():
        tensors[f"averaged.{key}"] = value
    for n, optimizer in enumerate(optimizers):
        for i, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"optimizer{n}.{i}.{key}"] = value
    # clone: safetensors refuses tensors that share memory
    tensors = {key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "checkpoint.tmp", metadata={"step": json.dumps(step)})
    os.replace(folder / "checkpoint.tmp", folder / CHECKPOINT)


def restore(folder, net, averaged, optimizers):
    """Load the checkpoint of `folder` into them, if there is one -> the step to go on from."""
    path = folder / CHECKPOINT
    if not path.is_file():
        return 0
    with safe_open(path, "pt") as file:
        step = json.loads(file.metadata()["step"])
    tensors = load_file(path)

    def part(prefix):
        return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}

    net.load_state_dict(part("net."))
    averaged.load_state_dict(part("averaged."))
    for n, optimizer in enumerate(optimizers):
        state = {}
        for key, value in part(f"optimizer{n}.").items():
            i, name = key.split(".")
            state.setdefault(int(i), {})[name] = value
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    print(f"resuming {folder.name} at step {step}")
    return step
