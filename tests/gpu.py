"""A GPU in ten minutes: does all of it work on this card, how exactly, how fast, how large?

    python tests/gpu.py                     # all parts on a CUDA card, each with a limit of time
    python tests/gpu.py ratio speed         # some of them
    python tests/gpu.py --tiny              # on a CPU, tiny networks: does this script still run?

    zoo       pictures, log-probabilities, rewards, an update: the card's beside the CPU's
    ratio     how far ratios are off 1 before the first update, in each precision, batches equal
              and not; the worst step
    resume    a run that is stopped and goes on, beside one that is not: to the bit?
    speed     seconds a picture at SD v1.4's size (random weights, T = 50), as train.py would run on
              this card; channels_last on and off; diffusers' UNet where it is installed; the share
              of what matrix products reach here; a query beside the authors' 4.5 A100-seconds
    memory    an epoch's peak, measured, beside memory.py's count and train.py's reckoning
    compile   speed again, with torch.compile

Rows are printed as they come, a Markdown table each part at the end; with $OUT set, what there is
also goes to $OUT/gpu.json after every row, so that a run that is cut off leaves something.
"""

import argparse
import contextlib
import gc
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))

import ddpo
import memory
import train
from scheduler import UserError
from unet import VAE, UNet, add_lora

T = 50
ANCHOR = 4.5  # A100-seconds a query: the authors' 25,600 queries with LoRA in 32 A100-hours
SMALL = {"block_out_channels": [32] * 4}


class OutOfTime(BaseException):
    """A part has had its seconds. Not to be caught by whoever catches every Exception."""


def zoo_run(device, folder="gpu", **settings):
    """train.py's run on the zoo -> train.Run. What it prints goes to stderr."""
    common = {"model": "zoo", "reward": "compressibility", "algorithm": "ddpo-is", "metrics": ""}
    out = str(Path(tempfile.gettempdir()) / folder)
    with contextlib.redirect_stdout(sys.stderr):
        place = {"device": str(device), "out": out, "eval_samples": 2}
        return train.prepare({**common, **place, **settings})


def sampled(run, count):
    """Pictures of the first epoch -> prompts, records, images."""
    prompts = (run.prompts * count)[:count]
    return prompts, *train.roll_out(run, prompts, 0, run.algorithm.record)


def relative(x, y):
    """||x - y|| / ||y||"""
    x, y = x.detach().double().cpu(), y.detach().double().cpu()
    return ((x - y).norm() / y.norm().clamp(min=1e-300)).item()


def flat(net):
    """All weights as one vector, float64 on the CPU."""
    return torch.cat([p.detach().double().cpu().flatten() for p in net.parameters()])


def first_epoch(device, count, steps):
    """One epoch of one update -> {quantity: tensor}."""
    numbers = {"samples_per_epoch": count, "batch_size": count, "samples_per_prompt": 1}
    run = zoo_run(device, steps=steps, **numbers)
    before = flat(run.policy.unet)
    prompts, records, images = sampled(run, count)
    trajectories = ddpo.Trajectories.cat(records)
    rewards, _ = train.score(run.rewards["reward"], images, prompts)
    weights = run.algorithm.weights(prompts, torch.from_numpy(rewards))
    learned = train.train_epoch(run, records, prompts, weights, 0)
    return {
        "x_T": trajectories.latents[:, 0],
        "x_0": trajectories.latents[:, -1],
        "log p": trajectories.log_probs,
        "pixels, of 255": torch.from_numpy(images),
        "rewards": torch.from_numpy(rewards),
        "loss": torch.tensor(learned["loss"]),
        "norm of the gradient": torch.tensor(learned["grad_norm"]),
        "update of the weights": flat(run.policy.unet) - before,
    }


def zoo(given):
    """-> rows."""
    count, steps = (2, 2) if given.tiny else (16, 12)
    mine, theirs = (first_epoch(device, count, steps) for device in (given.device, "cpu"))
    for name, value in theirs.items():
        difference = (mine[name].cpu().double() - value.cpu().double()).abs().max().item()
        yield {
            "quantity": name,
            "mean, CPU": f"{value.double().mean().item():.6g}",
            "mean, card": f"{mine[name].double().mean().item():.6g}",
            "largest difference": f"{difference:.1e}",
            "relative": f"{relative(mine[name], value):.1e}",
        }


def first_ratios(run, records, prompts):
    """Of the first update, by passes with gradients as in training -> |ratio - 1|, k, (n,) each."""
    c, algorithm = run.config, run.algorithm
    off, steps = [], []
    weights = torch.ones(len(prompts))
    [pairs] = algorithm.batches(run.policy, [*records], prompts, weights, [0, 0, 1])
    for start in range(0, len(pairs), c.micro_batch):
        _, logged = algorithm.losses(run.policy, pairs[start : start + c.micro_batch])
        off.append((logged["log_ratio"].exp() - 1).abs())
        steps.append(logged["k"])
    return torch.cat(off), torch.cat(steps)


def ratio(given):
    """-> rows."""
    count, steps = (2, 2) if given.tiny else (16, 12)
    for precision in train.PRECISIONS:
        numbers = {"samples_per_epoch": count, "batch_size": count, "samples_per_prompt": 1}
        run = zoo_run(given.device, precision=precision, steps=steps, **numbers)
        for sample_batch, micro_batch in ((count, count), (count, count // 2), (1, count)):
            run.config.sample_batch, run.config.micro_batch = sample_batch, micro_batch
            prompts, records, _ = sampled(run, count)
            off, k = first_ratios(run, records, prompts)
            worst = k[off.argmax()].item()
            timestep = run.policy.sampler.timesteps[worst].item()
            outside = (off > run.config.clip_range).float().mean().item()
            yield {
                "precision": precision,
                "sampled at a time": sample_batch,
                "pairs a pass": micro_batch,
                "largest ratio off 1": f"{off.max().item():.1e}",
                "at step": f"{worst + 1} of {steps}, t = {timestep}" if off.max() > 0 else "",
                "outside the clip range": f"{outside:.1%}",
            }


def trained(device, folder, epochs, tiny, go_on=False):
    """A run's weights, moments and metrics, two epochs by default -> {name: tensor}, lines."""
    pictures = 2 if tiny else 16
    numbers = {"samples_per_epoch": pictures, "batch_size": pictures // 2, "epochs": epochs}
    settings = {**numbers, "samples_per_prompt": 1, "steps": 2 if tiny else 12, "warmup": 0}
    if go_on:
        settings = {"resume": True, "epochs": epochs, "device": str(device)}
        with contextlib.redirect_stdout(sys.stderr):
            run = train.prepare({**settings, "out": str(folder)})
    else:
        run = zoo_run(device, folder, **settings, checkpoint_every=1)
    with contextlib.redirect_stdout(sys.stderr):
        train.loop(run)
    newest, tensors = run.checkpoints()[-1], {}
    for path in sorted(newest.rglob("*.safetensors")):
        tensors |= {f"{path.stem} {name}": x for name, x in load_file(path).items()}
    lines = train.read_lines(run.out / "metrics.jsonl")
    return tensors, [{k: v for k, v in line.items() if "seconds" not in k} for line in lines]


def resume(given):
    """-> rows."""
    with tempfile.TemporaryDirectory() as folder:
        whole, lines = trained(given.device, f"{folder}/whole", 2, given.tiny)
        again = trained(given.device, f"{folder}/again", 2, given.tiny)
        yield compared("the same run twice", whole, lines, *again)
        trained(given.device, f"{folder}/cut", 1, given.tiny)
        cut = trained(given.device, f"{folder}/cut", 2, given.tiny, go_on=True)
        yield compared("stopped after an epoch, and resumed", whole, lines, *cut)


def compared(what, tensors, lines, others, other_lines):
    """A row: are two runs equal to the bit, and if not, in what?"""
    differ = [name for name in tensors if not torch.equal(tensors[name], others[name])]
    first = [i for i, pair in enumerate(zip(lines, other_lines)) if pair[0] != pair[1]]
    largest = max([relative(others[name], tensors[name]) for name in differ], default=0.0)
    return {
        "runs": what,
        "to the bit": "no" if differ or first else "yes",
        "tensors that differ": f"{len(differ)} of {len(tensors)}",
        "largest relative difference": f"{largest:.1e}",
        "metrics differ from epoch": first[0] if first else "",
    }


def configs(given):
    """The UNet's and the VAE's."""
    if given.tiny:
        return {**memory.SD_UNET, **SMALL, "sample_size": 8}, {**memory.SD_VAE, **SMALL}
    return memory.SD_UNET, memory.SD_VAE


def passes(given, net, dtype, m):
    """A guided forward pass of m pictures, and one with a backward pass -> two functions."""
    config, device = configs(given)[0], given.device
    side, depth = config["sample_size"], config["cross_attention_dim"]
    x, cond = torch.randn(m, 4, side, side), torch.randn(m, 77, depth)
    t = torch.full((m,), 501)
    x, t, cond = x.to(device), t.to(device), cond.to(device)

    def network(*inputs):
        half = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        with half:
            out = net(*inputs)
        return out if torch.is_tensor(out) else out.sample

    def forward():
        with torch.no_grad():
            ddpo.predict_noise(network, x, t, cond, cond[:1], 5.0)

    def both():
        ddpo.predict_noise(network, x, t, cond, cond[:1], 5.0).square().mean().backward()
        net.zero_grad()

    return forward, both


def seconds(given, call):
    """The median of some calls, after two to warm up."""
    took = []
    for _ in range(3 if given.tiny else 6):
        start = time.perf_counter()
        call()
        if given.device.type == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - start)
    return statistics.median(took[2:])


def flops(given):
    """FLOP of a guided forward pass of one picture."""
    config, count = configs(given)[0], FlopCounterMode(display=False)
    with torch.device("meta"):
        net, side = UNet(config), config["sample_size"]
        x, t = torch.empty(2, 4, side, side), torch.zeros(2)
        context = torch.empty(2, 77, config["cross_attention_dim"])
    with count, torch.no_grad():
        net(x, t, context)
    return count.get_total_flops()


def matrix_peak(given, dtype):
    """FLOP a second of a large matrix product, as train.py has the switches."""
    n = 512 if given.tiny else 8192
    a, b = torch.randn(2, n, n, device=given.device).to(dtype)
    return 2 * n**3 / seconds(given, lambda: a @ b)


def network(given, c, last, theirs=False):
    """A UNet of random weights on the card, as load_policy has it, or diffusers'."""
    config, dtype = configs(given)[0], train.PRECISIONS[c.precision]
    torch.set_float32_matmul_precision("highest" if dtype == torch.float32 else "high")
    torch.backends.cudnn.allow_tf32 = dtype != torch.float32
    if theirs:
        from diffusers import UNet2DConditionModel

        with given.device:
            net = UNet2DConditionModel(**config)
        if c.grad_checkpointing:
            net.enable_gradient_checkpointing()
        net.train()  # theirs checkpoints only then; it has no dropout
    else:
        with given.device:
            net = UNet(config)
        if c.lora_rank:
            net = add_lora(net.to(dtype), c.lora_rank)
        net.gradient_checkpointing = c.grad_checkpointing
    return net.to(given.device, memory_format=torch.channels_last if last else None)


def decoding(given, dtype):
    """Seconds to decode a picture."""
    side = configs(given)[0]["sample_size"]
    with given.device:
        vae = VAE(configs(given)[1]).to(dtype, memory_format=torch.channels_last)
        z = torch.randn(2, 4, side, side)

    @torch.no_grad()
    def decode():
        with torch.autocast(given.device.type, dtype, enabled=dtype != torch.float32):
            vae.decode(z)

    return seconds(given, decode) / 2


def choice(given, precision):
    """train.py's settings for this card in a precision; with LoRA where the whole does not fit."""
    if given.tiny:
        return train.Config(precision=precision, micro_batch=2, sample_batch=2)
    room = train.card(given.device)
    for lora in (0, 4):
        with contextlib.suppress(UserError):
            fixed = {"precision": precision, "lora_rank": lora}
            return train.fitted(fixed, room, {})
    raise UserError("not even LoRA fits this card")


def timing(given, c, peak, *, last=True, theirs=False, compiled=False):
    """A row of `speed`: seconds a picture."""
    forget(given)
    dtype, m, work = train.PRECISIONS[c.precision], c.micro_batch, flops(given)
    net = network(given, c, last, theirs)
    if compiled:
        net = torch.compile(net, backend="eager" if given.tiny else "inductor")
    start = time.perf_counter()
    calls = passes(given, net, dtype, m)
    sampling, training = (T * seconds(given, call) / m for call in calls)
    warm = time.perf_counter() - start
    query = sampling + training + decoding(given, dtype)
    return {
        "UNet": "diffusers" if theirs else "ours",
        "precision": c.precision,
        "trained": f"LoRA {c.lora_rank}" if c.lora_rank and not theirs else "full",
        "checkpointing": "yes" if c.grad_checkpointing else "no",
        "pictures a pass": m,
        "channels_last": "yes" if last else "no",
        "compiled": f"yes ({warm:.0f} s first)" if compiled else "no",
        "sampling": f"{sampling:.3g}",
        "training": f"{training:.3g}",
        "a query": f"{query:.3g}",
        f"{ANCHOR} s / a query": f"{ANCHOR / query:.2f}",
        "share of peak": f"{T * work / sampling / peak:.0%}, {3 * T * work / training / peak:.0%}",
    }


def speed(given):
    """-> rows. The peak's share in training is of 3 forward passes' FLOP, checkpointing or not."""
    peaks, ways = {}, [(p, True, False) for p in train.PRECISIONS]
    ways += [(p, False, False) for p in train.PRECISIONS]
    with contextlib.suppress(ImportError):
        import diffusers

        assert diffusers
        ways += [(p, last, True) for p in train.PRECISIONS for last in (True, False)]
    for precision, last, theirs in ways[:: 3 if given.tiny else 1]:
        c = choice(given, precision)
        if theirs and c.lora_rank:
            continue  # it would train all of it
        if precision not in peaks:
            network(given, c, last)  # the switches
            peaks[precision] = matrix_peak(given, train.PRECISIONS[precision])
        yield timing(given, c, peaks[precision], last=last, theirs=theirs)
    for precision, peak in peaks.items():
        yield {"UNet": "a matrix product", "precision": precision, "a query": f"{peak:.2e} FLOP/s"}


def compiling(given):
    """-> rows. Half precision first, as it has most to gain."""
    for precision in ("fp32",) if given.tiny else ("bf16", "fp32"):
        c = choice(given, precision)
        peak = matrix_peak(given, train.PRECISIONS[precision])
        yield timing(given, c, peak)
        yield timing(given, c, peak, compiled=True)


def measured(given, lora, precision, checkpointing, micro_batch):
    """GiB at the peak of memory.py's epoch on the card: of tensors, and taken from it."""
    forget(given)
    dtype = train.PRECISIONS[precision]
    policy, clip = memory.make_policy(lora, checkpointing, dtype, given.device)
    policy.unet.to(given.device, memory_format=torch.channels_last)
    memory.rewarded(policy, clip)
    scaler = torch.amp.GradScaler(given.device.type, enabled=dtype == torch.float16)
    if given.device.type != "cuda":
        memory.epoch(policy, micro_batch, scaler)
        return None, None
    torch.cuda.reset_peak_memory_stats()
    memory.epoch(policy, micro_batch, scaler)
    numbers = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return [f"{number / memory.GIB:.2f}" for number in numbers]


@contextlib.contextmanager
def tiny_memory():
    """memory.py of a tiny UNet and a few pictures, while this lasts."""
    names = ("SD_UNET", "SD_VAE", "SD_TEXT", "CLIP_L_14", "SAMPLES")
    before = [getattr(memory, name) for name in names]
    memory.SD_UNET = {**memory.SD_UNET, **SMALL, "sample_size": 8}
    memory.SD_VAE, memory.SAMPLES = {**memory.SD_VAE, **SMALL}, 2
    memory.SD_TEXT = {**memory.SD_TEXT, "num_hidden_layers": 1}
    memory.CLIP_L_14 = {**memory.CLIP_L_14, "num_hidden_layers": 1}
    try:
        yield
    finally:
        for name, value in zip(names, before):
            setattr(memory, name, value)


def memory_rows(given, ways):
    """A row of each way that should fit."""
    room = train.card(given.device) or (float("inf"), "bf16")
    for lora, precision, checkpointing, m in ways:
        settings = {"precision": precision, "grad_checkpointing": checkpointing}
        c = train.Config(lora_rank=lora, micro_batch=m, sample_batch=m, **settings)
        reckoned = train.memory_needed(c, {})
        if reckoned < 0.97 * room[0] and (precision != "bf16" or room[1] == "bf16"):
            way = (lora, precision, bool(checkpointing), m)
            tensors, taken = measured(given, *way)
            yield {
                "trained": f"LoRA, rank {lora}" if lora else "full UNet",
                "precision": precision,
                "checkpointing": "yes" if checkpointing else "no",
                "pictures a pass": m,
                "GiB, counted": f"{json.loads(memory.KEPT.read_text())[memory.case(*way)]:.2f}",
                "reckoned": f"{reckoned / memory.GIB:.2f}",
                "measured, of tensors": tensors,
                "taken from the card": taken,
            }


def memory_part(given):
    """-> rows."""
    grid = [
        (lora, p, c, m) for lora in (0, 4) for p in ("fp32", "bf16") for c, m in ((1, 1), (1, 8))
    ]
    grid += [(lora, p, 0, m) for lora in (0, 4) for p in ("fp32", "bf16") for m in (1, 8)]
    if not given.tiny:
        yield from memory_rows(given, grid)
        return
    with tiny_memory():
        yield from memory_rows(given, [(4, "fp32", True, 1)])


PARTS = {  # name: rows, seconds at most
    "zoo": (zoo, 40),
    "ratio": (ratio, 60),
    "resume": (resume, 60),
    "speed": (speed, 110),
    "memory": (memory_part, 100),
    "compile": (compiling, 190),
}


def forget(given):
    """Give back the memory of what is no longer used: policies and compiled networks are cycles."""
    torch.compiler.reset()
    gc.collect()
    if given.device.type == "cuda":
        torch.cuda.empty_cache()


def out_of_time(*_):
    raise OutOfTime


def go_through(part, given, limit, seen):
    """Hand on the rows of a part, and one of how it failed or ran out of time, if it did."""
    ends, alarm = time.monotonic() + limit, getattr(signal, "alarm", None)
    try:
        if alarm:  # Windows has none: there a row is always finished
            signal.signal(signal.SIGALRM, out_of_time)
            alarm(limit)
        for row in part(given):
            seen(row)
            if time.monotonic() > ends:
                raise OutOfTime
    except OutOfTime:
        seen({"cut off": f"after its {limit} s"})
    except Exception as error:  # of a kernel, for want of memory, ...: the next part may do
        seen({"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
    finally:
        if alarm:
            alarm(0)
        forget(given)


def table(rows):
    """Rows of one kind as Markdown; others, of how a part ended, below it."""
    names = list(rows[0]) if rows else []
    lines = [f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]
    for row in rows:
        cells = ["" if row.get(name) is None else str(row[name]) for name in names]
        if set(row) <= set(names):
            lines.append(f"| {' | '.join(cells)} |".replace("  ", " "))
        else:
            lines.append(f"\n{', '.join(f'{name} {value}' for name, value in row.items())}\n")
    return "\n".join(lines)


def conditions(given):
    """What the figures depend on."""
    name = torch.cuda.get_device_name(given.device) if given.device.type == "cuda" else "CPU"
    room = train.card(given.device)
    return {
        "device": name,
        "GB": round(room[0] / 1e9, 2) if room else None,
        "half precision": room[1] if room else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "tiny": given.tiny,
    }


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("parts", nargs="*", help="of those above; by default all")
    parser.add_argument("--tiny", action="store_true", help="tiny networks; on a CPU by default")
    parser.add_argument("--device", help="cuda by default")
    given = parser.parse_args(argv)
    given.parts = given.parts or [*PARTS]
    if not set(given.parts) <= set(PARTS):
        parser.error(f"parts are {', '.join(PARTS)}")
    given.device = torch.device(given.device or ("cpu" if given.tiny else "cuda"))
    if given.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA card; --tiny runs on a CPU")
    return given


def main(argv=None):
    """-> exit status: 1 if a part failed."""
    given = parse(argv)
    out = Path(os.environ["OUT"]) if "OUT" in os.environ else None
    if out:
        out.mkdir(parents=True, exist_ok=True)
    found = {"conditions": conditions(given), "parts": {}, "seconds": {}}
    print(json.dumps(found["conditions"]), flush=True)
    for name in given.parts:
        part, limit = PARTS[name]
        limit *= 10 if given.tiny else 1  # a busy machine of two cores
        rows, start = found["parts"].setdefault(name, []), time.monotonic()

        def seen(row):
            rows.append(row)
            found["seconds"][name] = round(time.monotonic() - start, 1)
            print(name, json.dumps(row), flush=True)
            if out:
                train.write_json(out / "gpu.json", found)

        go_through(part, given, limit, seen)
    for name, rows in found["parts"].items():
        print(f"\n**{name}**, {found['seconds'].get(name, 0):.0f} s\n\n{table(rows)}")
    return int(any("failed" in row for rows in found["parts"].values() for row in rows))


if __name__ == "__main__":
    sys.exit(main())
