"""How fast and how large: our networks, sampling and epochs beside those of diffusers and TRL.

A script, not a test; CPU, fp32.

    python tests/bench.py                               # the zoo: all sections but trl
    python tests/bench.py --size full networks memory   # SD v1.4's sizes, random weights: 13 GB
    python tests/bench.py --trl /path/to/python trl     # an interpreter with trl 0.23.1, the last
                                                        # with DDPOTrainer, and diffusers 0.35.2

What is compared runs in turns, A B B A ..., in one process (TRL: in two, one of which waits), after
a warm-up of each, since other work on the machine comes and goes: read the ratios. A ratio is the
median of those of the turns, with the least and the greatest; above 1, ours is faster or smaller.
"""

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

# all else is imported where it is needed: TRL's interpreter has not all of it
import numpy as np
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
ZOO = ROOT / "tutorial" / "zoo" / "stable-diffusion"
OTHERS = ("diffusers / ours", "diffusers, channels_last", "that / ours")
COLUMNS = ("ours", "diffusers", *OTHERS)
LAST = torch.channels_last
ANIMALS = """
    cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear frog
""".split()


def row(*cells, title=None):
    """A line of a table; with a title, its head."""
    texts = [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells]
    line = f"| {' | '.join(texts)} |"
    if title:
        line = f"\n**{title}**\n\n{line}\n{'| --- ' * len(cells)}|"
    print(line, flush=True)


def timed(call, *inputs):
    """-> seconds, result."""
    start = time.perf_counter()
    result = call(*inputs)
    return time.perf_counter() - start, result


def nothing():
    """In place of what follows a call."""


def in_turns(calls, repeats, after=nothing):
    """Seconds of each call, in turns, every other turn backwards, after a warm-up of each.

    `after()` follows every call, off the clock -> float (calls, repeats).
    """
    seconds = np.empty((len(calls), repeats + 1))
    for turn in range(repeats + 1):
        order = range(len(calls))
        for i in order if turn % 2 else reversed(order):
            seconds[i, turn], _ = timed(calls[i])
            after()
    return seconds[:, 1:]


def ratio(ours, theirs):
    ratios = np.divide(theirs, ours)
    return f"**{np.median(ratios):.2f}** ({ratios.min():.2f} to {ratios.max():.2f})"


def agree(what, calls, after):
    """End the program where the calls do not return the same: timings would mean nothing."""
    ours = None
    for call in calls:
        result = call()
        after()
        ours = result if ours is None else ours
        error = (ours - result).abs().max() / result.abs().max()
        if not error < 1e-3:
            sys.exit(f"bench.py: {what}: ours and theirs differ by {error:.1e} of the greatest")


def compare(what, calls, repeats, after=nothing, same=True):
    """A row: ours, the first of the calls, beside the others, which should return the same."""
    if same:
        agree(what, calls, after)
    ours, *others = in_turns(calls, repeats, after)
    cells = [float(np.median(ours))]
    for other in others:
        cells += [float(np.median(other)), ratio(ours, other)]
    row(what, *cells)


def load(kind, size, which=("ours", "theirs", "channels_last")):
    """Networks of the same weights: ours; diffusers' as it comes, and in channels_last -> list.

    kind: unet or vae. Our VAE is in channels_last, as in train.py on a CPU. Tensors of one layout
    lie in memory once.
    """
    import diffusers

    import test_unet  # beside this file
    import unet

    ours, theirs = unet.UNet, diffusers.UNet2DConditionModel
    config = test_unet.SD_UNET
    if kind == "vae":
        ours, theirs, config = unet.VAE, diffusers.AutoencoderKL, test_unet.SD_VAE
    nets = []
    for name in which:
        if size == "full":
            net = ours(config) if name == "ours" else theirs(**config)
        else:
            net = (
                unet.load(ours, ZOO / kind)
                if name == "ours"
                else theirs.from_pretrained(ZOO / kind)
            )
        nets.append(net.eval())
        net.load_state_dict(nets[0].state_dict())
        is_last = name == "channels_last" or (name, kind) == ("ours", "vae")
        net.to(memory_format=LAST if is_last else torch.preserve_format)
        for key, p in net.named_parameters():
            if name != "theirs" or p.ndim != 4:
                p.data = nets[0].get_parameter(key).data
    return nets


def unet_inputs(size, side):
    """Latents, timesteps and context of a guided pass, which has every picture twice.

    64 pictures of the zoo's, or one of SD's at `side` latents a side.
    """
    batch, side, *context = (128, 8, 16, 128) if size == "zoo" else (2, side, 77, 768)
    latents, t = torch.randn(batch, 4, side, side), torch.randint(1, 1000, (batch,))
    return latents, t, torch.randn(batch, *context)


def run_unet(net, inputs, backward):
    """A forward pass, of ours or of diffusers', and with `backward` a backward pass."""
    with torch.set_grad_enabled(backward):
        output = net(*inputs)
        output = output if torch.is_tensor(output) else output.sample
    if backward:
        output.square().mean().backward()
    return output.detach()


def decoded(net, z, scale):
    return net.decode(z / scale).sample


def encoded(net, x, scale):
    return net.encode(x).latent_dist.mean * scale


def unet_rows(size, repeats):
    nets = load("unet", size)

    def forget():  # one set of gradients in memory at a time
        for net in nets:
            net.zero_grad()

    for what, side, backward in (("forward", 64, False), ("forward + backward", 32, True)):
        inputs = unet_inputs(size, side)
        calls = [partial(run_unet, net, inputs, backward) for net in nets]
        compare(f"UNet {what}, {tuple(inputs[0].shape)}", calls, repeats, forget)


@torch.no_grad()
def vae_rows(size, repeats):
    ours, *others = load("vae", size)
    scale = ours.scaling_factor
    z = torch.randn(*((64, 4, 8, 8) if size == "zoo" else (1, 4, 32, 32)))
    x = torch.rand(len(z), 3, 8 * z.shape[2], 8 * z.shape[3]) * 2 - 1
    calls = [partial(ours.decode, z), *[partial(decoded, net, z, scale) for net in others]]
    compare(f"VAE decode, {tuple(z.shape)}", calls, repeats)
    calls = [partial(ours.encode, x), *[partial(encoded, net, x, scale) for net in others]]
    compare(f"VAE encode, {tuple(x.shape)}", calls, repeats)


def networks(args):
    for size in args.sizes:
        row("pass, input", *COLUMNS, title=f"Networks, {size}: seconds a pass")
        repeats = 15 if size == "zoo" else 5
        repeats = 1 if args.quick else repeats
        unet_rows(size, repeats)
        vae_rows(size, repeats)


def prepare(quick, **given):
    """train.py's run on the zoo that watches its reward and the diversity alone.

    Its folder stays empty. `given`: settings; quick: small, whatever they say.
    """
    import train

    common = {"model": "zoo", "device": "cpu", "reward": "compressibility", "metrics": ""}
    common["algorithm"] = "ddpo-is"  # what TRL and the paper have
    out = str(Path(tempfile.gettempdir()) / "ddpo-bench")
    small = {"samples_per_epoch": 16, "batch_size": 8, "steps": 3} if quick else {}
    with contextlib.redirect_stdout(sys.stderr):  # tables alone on stdout
        return train.prepare({**common, "out": out, **given, **small})


def pipeline(args):
    from diffusers import StableDiffusionPipeline

    import train

    run = prepare(args.quick, samples_per_epoch=64)
    c, policy = run.config, run.policy
    prompts = train.draw_prompts(run.prompts, c.samples_per_epoch, 1, np.random.default_rng(0))
    names = [(0, 0, i) for i in range(len(prompts))]
    # without a dtype the encoder of texts comes in half
    pipes = [StableDiffusionPipeline.from_pretrained(ZOO, dtype=torch.float32) for _ in range(2)]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    for net in (pipes[1].unet, pipes[1].vae):
        net.to(memory_format=LAST)

    def ours():
        policy.encoded.cache_clear()  # theirs encode the texts anew, too
        return list(policy.sample(prompts, names, len(prompts)))

    options = {"num_inference_steps": c.steps, "guidance_scale": c.guidance, "eta": c.eta}
    theirs = [partial(pipe, prompts, **options, output_type="np") for pipe in pipes]
    title = "From prompts to pictures, zoo: seconds; the log-probabilities are ours alone"
    row("pictures", *COLUMNS, title=title)
    what = f"{len(prompts)}, {c.steps} steps of DDIM, guidance {c.guidance:g}"
    compare(what, [ours, *theirs], 1 if args.quick else 7, same=False)


def megabytes(field):
    """A line of this process's status."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+)", status)[1]) / 1000


def peak(args):
    """In a process of its own: MB by which a first forward and backward pass raises the memory.

    Printed as JSON, with the gradients' MB. By VmHWM and not by getrusage's ru_maxrss: that keeps
    the peak of loading, and a child's even begins at its parent's. Writing 5 sets VmHWM back.
    """
    [net], inputs = load("unet", args.size, [args.peak]), unet_inputs(args.size, 32)
    Path("/proc/self/clear_refs").write_text("5")
    before = megabytes("VmRSS")
    run_unet(net, inputs, backward=True)
    gradients = sum(p.numel() for p in net.parameters()) * 4e-6
    print(json.dumps([megabytes("VmHWM") - before, gradients]))


def memory(args):
    title = "The UNet's forward and backward pass: MB above the loaded network, gradients included"
    row("size, input", "gradients", "ours", "diffusers", "diffusers / ours", title=title)
    for size in args.sizes:
        rises = {"ours": [], "theirs": []}
        for which in [*rises] * (1 if args.quick or size == "full" else 3):
            command = [sys.executable, __file__, "--peak", which, "--size", size]
            command += ["--threads", str(args.threads)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            rise, gradients = json.loads(done.stdout)
            rises[which].append(rise)
        medians = [f"{np.median(values):.0f}" for values in (gradients, *rises.values())]
        row(f"{size}, {tuple(unet_inputs(size, 32)[0].shape)}", *medians, ratio(*rises.values()))


class Stopwatch:
    """Seconds spent in watched functions, {label: seconds}, without watched ones they call."""

    def __init__(self):
        self.seconds, self.inner = defaultdict(float), []

    def watch(self, label, owner, *names):
        for name in names:
            setattr(owner, name, partial(self.call, label, getattr(owner, name)))

    def call(self, label, function, *inputs, **options):
        self.inner.append(0.0)
        took, result = timed(partial(function, *inputs, **options))
        if label.startswith("UNet"):
            label += ", training" if torch.is_grad_enabled() else ", sampling"
        self.seconds[label] += took - self.inner.pop()
        if self.inner:
            self.inner[-1] += took
        return result


def watched(run):
    """-> a Stopwatch on the parts of a run's epoch."""
    import ddpo
    import train

    policy, watch = run.policy, Stopwatch()
    math = "DDIM, log-probabilities, loss"
    watch.watch("UNet forward", policy.unet, "forward")
    watch.watch("UNet backward", torch.autograd, "backward")
    watch.watch("VAE decode", policy.vae, "decode")
    watch.watch("pictures to bytes", policy, "decode")
    watch.watch("texts", policy, "embed")
    watch.watch("noise", ddpo, "named_noise")
    watch.watch("optimizer", run.optimizer, "step", "zero_grad")
    watch.watch("norm of the gradient", torch.nn.utils, "clip_grad_norm_")
    watch.watch("reward", run, "reward")
    watch.watch("diversity", run, "clip")
    watch.watch("diversity", train, "diversity")
    watch.watch("guidance", ddpo, "predict_noise")
    watch.watch(math, policy.sampler, "step", "mean_std")
    watch.watch(math, ddpo, "gaussian_log_prob", "ppo_loss")
    watch.watch("prompts, statistics", run.algorithm, "weights")
    watch.watch("prompts, statistics", train, "draw_prompts")
    return watch


def recorded(run):
    """An epoch's calls of the networks and of the optimizer, to be gone through again -> list."""
    import train

    unet, vae, calls = run.policy.unet, run.policy.vae, []

    def unet_called(_, inputs):
        calls.append(partial(run_unet, unet, inputs, torch.is_grad_enabled()))

    def vae_called(_, inputs):
        decode = torch.no_grad()(vae.decode)
        calls.append(partial(decode, inputs[0] * vae.scaling_factor))

    def stepped(*_):
        calls.append(unet.zero_grad)

    hooks = [
        unet.register_forward_pre_hook(unet_called),
        vae.post_quant_conv.register_forward_pre_hook(vae_called),
        run.optimizer.register_step_post_hook(stepped),
    ]
    train.one_epoch(run, 0)
    for hook in hooks:
        hook.remove()
    return calls


def epoch(args):
    """An epoch by train.py's own function beside the bare cost of its network calls."""
    import train

    run, parts = prepare(args.quick, samples_per_epoch=64), []
    c, calls = run.config, recorded(run)
    watch = watched(run)

    def ours():
        watch.seconds.clear()
        took, _ = timed(train.one_epoch, run, 1 + len(parts))
        parts.append({**watch.seconds, "the rest": took - sum(watch.seconds.values())})

    def networks_alone():
        for call in calls:
            call()

    bare, whole = in_turns([networks_alone, ours], 1 if args.quick else 5)
    sizes = f"{c.samples_per_epoch} pictures, {c.steps} steps, {c.updates} updates"
    title = f"An epoch on the zoo, compressibility: {sizes}"
    row("", "seconds", "of the epoch", title=title)
    row("epoch", float(np.median(whole)), "")
    row("its UNet and VAE calls alone", float(np.median(bare)), "")
    row("epoch / calls alone", ratio(bare, whole), "")
    medians = {label: np.median([part[label] for part in parts[1:]]) for label in parts[-1]}
    for label in sorted(medians, key=medians.get, reverse=True):
        row(label, float(medians[label]), f"{medians[label] / np.median(whole):.2%}")


def our_epochs(args):
    """-> a function of the epoch's number that runs it, and returns its mean reward."""
    import train

    sizes = {"samples_per_epoch": args.pictures, "steps": args.steps, "batch_size": args.batch}
    numbers = {"guidance": 5.0, "lr": 1e-5, "warmup": 0, "min_count": 16, "samples_per_prompt": 1}
    run = prepare(False, **sizes, **numbers)

    def one(number):
        return train.one_epoch(run, number)["reward_mean"]

    return one


def trl_config(args, **more):
    """TRL's in its best setting; `more`: other settings of its own.

    All pictures are sampled at once; in training all of an update's pictures are in each pass, a
    timestep a pass.
    """
    from trl import DDPOConfig

    settings = dict(
        sample_num_steps=args.steps,
        sample_batch_size=args.pictures,
        sample_num_batches_per_epoch=1,
        train_batch_size=args.batch,
        train_gradient_accumulation_steps=1,
        sample_eta=1.0,
        sample_guidance_scale=5.0,
        train_cfg=True,
        train_learning_rate=1e-5,
        train_clip_range=6.4e-3,
        train_adv_clip_max=10.0,
        mixed_precision="no",
        per_prompt_stat_tracking=True,
        per_prompt_stat_tracking_buffer_size=32,
        allow_tf32=False,
        save_freq=10**9,
        accelerator_kwargs={"cpu": True},
    )
    return DDPOConfig(**{**settings, **more})


def trl_epochs(args):
    """The same by TRL."""
    from accelerate import PartialState
    from PIL import Image
    from trl import DDPOTrainer, DefaultDDPOStableDiffusionPipeline

    means, rng = [], np.random.default_rng(0)

    def reward(images, prompts, metadata):
        scores = []
        for picture in (images * 255).round().byte().permute(0, 2, 3, 1).numpy():
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "JPEG", quality=95)
            scores.append(-file.tell() / 1000)
        means.append(np.mean(scores))
        return np.array(scores), {}

    def prompt():
        return f"a {rng.choice(ANIMALS)}", {}

    PartialState(cpu=True)  # TRL logs before it makes its own
    model = DefaultDDPOStableDiffusionPipeline(pretrained_model_name=str(ZOO), use_lora=False)
    trainer = DDPOTrainer(trl_config(args), reward, prompt, model)

    def one(number):
        trainer.step(number, number * (args.pictures // args.batch))
        return means[-1]

    return one


def worker(args):
    """One side of `trl`, in a process of its own: a warm-up epoch, then one for every line.

    -> [seconds, mean reward] as a line for each.
    """
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever the libraries say
    run, number = {"ours": our_epochs, "trl": trl_epochs}[args.worker](args), 0
    while number == 0 or sys.stdin.readline():
        seconds, mean = timed(run, number)
        print(json.dumps([seconds, float(mean)]), file=answers, flush=True)
        number += 1


class Workers:
    """The two sides of `trl`, {which: process}, and what they say on stderr, in files."""

    def __init__(self, folder):
        self.folder, self.processes = Path(folder), {}

    def start(self, which, python, args):
        command = [python, __file__, "--worker", which, "--threads", str(args.threads)]
        command += ["--quick"] * args.quick
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with open(self.folder / which, "w") as errors:
            self.processes[which] = subprocess.Popen(
                command, stderr=errors, cwd=self.folder, **pipes
            )

    def answer(self, which):
        """-> seconds, mean reward."""
        line = self.processes[which].stdout.readline()
        if not line:
            said = (self.folder / which).read_text()[-2000:]
            sys.exit(f"bench.py: the side of {which} has died:\n{said}")
        return json.loads(line)

    def go(self, which):
        print("go", file=self.processes[which].stdin, flush=True)
        return self.answer(which)[0]

    def end(self):
        for process in self.processes.values():
            process.kill()
            process.wait()


def trl(args):
    seconds, rewards = {"ours": [], "trl": []}, []
    with tempfile.TemporaryDirectory() as folder:
        workers = Workers(folder)
        try:
            for which, python in (("ours", sys.executable), ("trl", args.trl)):
                workers.start(which, python, args)
                rewards.append(workers.answer(which)[1])  # one warms up after the other
            for which in [*seconds] * (1 if args.quick else 5):
                seconds[which].append(workers.go(which))
        finally:
            workers.end()
    sizes = f"{args.pictures} pictures, {args.steps} steps, guidance 5, updates of {args.batch}"
    columns = ("TRL", "TRL / ours", "mean reward before training, ours", "TRL")
    title = f"An epoch on the zoo, beside TRL's DDPOTrainer: {sizes} pictures"
    row("seconds, ours", *columns, title=title)
    medians = [float(np.median(took)) for took in seconds.values()]
    row(*medians, ratio(*seconds.values()), *rewards)


class ZeroGradients:
    """Counts, update by update, the pairs without a gradient, while this lasts."""

    def __enter__(self):
        import ddpo

        self.real, self.updates = (ddpo.ppo_loss, ddpo.optimizer_step), []
        ddpo.ppo_loss, ddpo.optimizer_step = self.loss, self.step
        return self

    def __exit__(self, *_):
        import ddpo

        ddpo.ppo_loss, ddpo.optimizer_step = self.real

    def loss(self, log_prob, *others):
        losses, ratios = self.real[0](log_prob, *others)
        [gradient] = torch.autograd.grad(losses.sum(), log_prob, retain_graph=True)
        self.updates[-1].append(gradient == 0)
        return losses, ratios

    def step(self, *inputs, **settings):
        self.updates.append([])
        return self.real[1](*inputs, **settings)

    def share(self, epochs):
        """(epochs, updates an epoch)"""
        shares = [torch.cat(parts).float().mean() for parts in self.updates]
        return np.array(shares).reshape(epochs, -1)


def percent(values):
    return " ".join(f"{value:.0%}" for value in values)


def skip(args):
    """How many pairs (picture, timestep) have a gradient of exactly zero, and what that is worth.

    They are outside the clip range with nothing to gain, from an epoch's second update on. Were
    they found by a forward pass without a graph first, an update would cost 1 + 3 (1 - f) instead
    of 3 forward passes: worth it from f = 1/3 on.
    """
    import train

    columns = ("f, mean", "epoch by epoch", "update by update", "cost with / without")
    title = "Share f of pairs whose gradient is zero, each epoch's first update left out"
    row("reward", *columns, "worth it (f > 1/3)?", title=title)
    for reward, epochs in {"aesthetic": 12, "compressibility": 8}.items():
        epochs = 2 if args.quick else epochs
        run = prepare(args.quick, reward=reward)
        with ZeroGradients() as zero:
            for number in range(epochs):
                train.one_epoch(run, number)
        f = zero.share(epochs)[:, 1:]
        worth, cost = "yes" if f.mean() > 1 / 3 else "no", (1 + 3 * (1 - f.mean())) / 3
        shares = (f"{f.mean():.1%}", percent(f.mean(1)), percent(f.mean(0)))
        row(reward, *shares, f"{cost:.2f}", worth)


SECTIONS = {section.__name__: section for section in (networks, pipeline, memory, epoch, trl, skip)}


def parse():
    """-> the command line, with what follows from it."""
    names = ", ".join(SECTIONS)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"of {names}; by default all (trl: with --trl)")
    parser.add_argument("--threads", type=int, default=2)
    sizes = {"choices": ["zoo", "full", "all"], "default": "zoo"}
    parser.add_argument("--size", help="of networks and memory; all else is the zoo's", **sizes)
    parser.add_argument("--quick", action="store_true", help="one small turn: does it run?")
    parser.add_argument("--trl", metavar="PYTHON", help="an interpreter that has trl 0.23.1")
    parser.add_argument("--peak", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=["ours", "trl"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.names = args.names or [name for name in SECTIONS if name != "trl" or args.trl]
    if not set(args.names) <= set(SECTIONS) or ("trl" in args.names and not args.trl):
        parser.error(f"sections are {names}; trl needs --trl PYTHON")
    args.sizes = ["zoo", "full"] if args.size == "all" else [args.size]
    args.pictures, args.steps, args.batch = (8, 3, 2) if args.quick else (32, 20, 8)
    return args


def conditions(args):
    """What the figures depend on, as a line."""
    import diffusers

    command = ["git", "-C", ROOT, "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    machine = f"{cpu[1] if cpu else 'CPU unknown'}, {os.cpu_count()} cores, {args.threads} threads"
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}; fp32"
    load = os.getloadavg()[0]
    return f"{machine}, load {load:.1f} at the start; commit {commit}; {versions}"


def main():
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.peak:
        peak(args)
    elif args.worker:
        worker(args)
    else:
        print(conditions(args), flush=True)
        for name in args.names:
            SECTIONS[name](args)


if __name__ == "__main__":
    main()
