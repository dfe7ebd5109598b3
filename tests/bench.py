"""How fast and how large: our networks, sampling and epochs beside those of diffusers and TRL. A script, not a test; CPU, fp32.

    python tests/bench.py                               # the zoo: networks, pipeline, memory, epoch, skip
    python tests/bench.py --size full networks memory   # SD v1.4's sizes with random weights: 13 GB of memory
    python tests/bench.py --trl /path/to/python trl     # an interpreter with trl 0.23.1 (the last that has DDPOTrainer) and diffusers 0.35.2

What is compared runs in turns, A B B A ..., in one process (TRL: in two, one of which waits), after a warm-up of each, since other work on the machine
comes and goes: read the ratios. A ratio is the median of those of the turns, with the least and the greatest; above 1, ours is faster or smaller.
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

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(ROOT := Path(__file__).parents[1]))
ZOO, COLUMNS = ROOT / "tutorial" / "zoo" / "stable-diffusion", ("ours", "diffusers", "diffusers / ours", "diffusers, channels_last", "that / ours")

import numpy as np                                      # noqa: E402
import torch                                            # noqa: E402        all else is imported where it is needed: TRL's interpreter has not all of it


def row(*cells, title=None):
    """A line of a table; with a title, its head."""
    line = "| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"
    print(f"\n**{title}**\n\n{line}\n{'| --- ' * len(cells)}|" if title else line, flush=True)


def timed(call, *inputs):
    start, result = time.perf_counter(), call(*inputs)
    return time.perf_counter() - start, result


def in_turns(calls, repeats, after=lambda: None):
    """Seconds of each call, in turns, every other turn backwards, after a warm-up of each; `after()` follows every call, off the clock -> float (calls, repeats)."""
    seconds = np.empty((len(calls), repeats + 1))
    for turn in range(repeats + 1):
        for i in range(len(calls))[::1 if turn % 2 else -1]:
            seconds[i, turn] = timed(calls[i])[0]
            after()
    return seconds[:, 1:]


def ratio(ours, theirs):
    ratios = np.divide(theirs, ours)
    return f"**{np.median(ratios):.2f}** ({ratios.min():.2f} to {ratios.max():.2f})"


def compare(what, calls, repeats, after=lambda: None, same=True):
    """A row: ours, the first of the calls, beside the others, which should return the same."""
    results = [(call(), after())[0] for call in calls] if same else []
    if any(not (error := (results[0] - other).abs().max() / other.abs().max()) < 1e-3 for other in results[1:]):
        sys.exit(f"bench.py: {what}: ours and theirs differ by {error:.1e} of the greatest value, so that the timings would mean nothing")
    ours, *others = in_turns(calls, repeats, after)
    row(what, float(np.median(ours)), *[cell for other in others for cell in (float(np.median(other)), ratio(ours, other))])


def load(kind, size, which=("ours", "theirs", "channels_last")):
    """Our network (the VAE in channels_last, as in train.py on a CPU) and diffusers', as it comes and in channels_last, of the same weights. kind: unet or vae -> list."""
    import diffusers
    import unet
    (ours, theirs), nets = {"unet": (unet.UNet, diffusers.UNet2DConditionModel), "vae": (unet.VAE, diffusers.AutoencoderKL)}[kind], []
    if full := size == "full":
        import test_unet                                # beside this file
        config = {"unet": test_unet.SD_UNET, "vae": test_unet.SD_VAE}[kind]
    for name in which:
        if name == "ours":
            nets.append(ours(config) if full else unet.load(ours, ZOO / kind))
        else:
            nets.append((theirs(**config) if full else theirs.from_pretrained(ZOO / kind)).eval())
        nets[-1].load_state_dict(nets[0].state_dict())
        nets[-1].to(memory_format=torch.channels_last if name == "channels_last" or (name, kind) == ("ours", "vae") else torch.preserve_format)         # as train.py
        for key, p in nets[-1].named_parameters():      # tensors of one layout lie in memory once
            p.data = p.data if name == "theirs" and p.ndim == 4 else nets[0].get_parameter(key).data
    return nets


def unet_inputs(size, side):
    """Latents, timesteps and context of a guided pass: 64 pictures of the zoo's, or one of SD's at `side` latents a side; twice each, for guidance."""
    batch, side, *context = (128, 8, 16, 128) if size == "zoo" else (2, side, 77, 768)
    return torch.randn(batch, 4, side, side), torch.randint(1, 1000, (batch,)), torch.randn(batch, *context)


def run_unet(net, inputs, backward):
    with torch.set_grad_enabled(backward):
        output = net(*inputs)
        output = output if torch.is_tensor(output) else output.sample
    if backward:
        output.square().mean().backward()
    return output.detach()


def networks(args):
    for size in args.sizes:
        row("pass, input", *COLUMNS, title=f"Networks, {size}: seconds a pass")
        repeats, nets = 1 if args.quick else 15 if size == "zoo" else 5, load("unet", size)
        for what, side, backward in (("forward", 64, False), ("forward + backward", 32, True)):
            inputs = unet_inputs(size, side)
            compare(f"UNet {what}, {tuple(inputs[0].shape)}", [partial(run_unet, net, inputs, backward) for net in nets], repeats,
                    after=lambda: [net.zero_grad() for net in nets])                            # one set of gradients in memory at a time
        del nets                                        # before the next come
        (ours, *others), z = load("vae", size), torch.randn(*((64, 4, 8, 8) if size == "zoo" else (1, 4, 32, 32)))
        x, scale = torch.rand(len(z), 3, 8 * z.shape[2], 8 * z.shape[3]) * 2 - 1, ours.scaling_factor
        with torch.no_grad():
            compare(f"VAE decode, {tuple(z.shape)}", [lambda: ours.decode(z), *[lambda net=net: net.decode(z / scale).sample for net in others]], repeats)
            compare(f"VAE encode, {tuple(x.shape)}", [lambda: ours.encode(x), *[lambda net=net: net.encode(x).latent_dist.mean * scale for net in others]], repeats)


def prepare(args, **more):
    """train.py's run on the zoo in which nothing is watched but the reward and the diversity; its folder stays empty."""
    import train
    quick = {"samples_per_epoch": 16, "batch_size": 8, "steps": 3} if args.quick else {}
    with contextlib.redirect_stdout(sys.stderr):        # tables alone on stdout
        return train.prepare({"model": "zoo", "device": "cpu", "reward": "compressibility", "metrics": "", "out": str(Path(tempfile.gettempdir()) / "ddpo-bench"), **quick, **more})


def pipeline(args):
    import train
    from diffusers import StableDiffusionPipeline
    run = prepare(args, **{} if args.quick else {"samples_per_epoch": 64})
    c, policy, prompts = run.config, run.policy, train.draw_prompts(run.prompts, run.config.samples_per_epoch, 1, np.random.default_rng(0))
    pipes = [StableDiffusionPipeline.from_pretrained(ZOO, dtype=torch.float32) for _ in range(2)]             # else the encoder of texts comes in half
    [pipe.set_progress_bar_config(disable=True) for pipe in pipes], [net.to(memory_format=torch.channels_last) for net in (pipes[1].unet, pipes[1].vae)]
    theirs = dict(num_inference_steps=c.steps, guidance_scale=c.guidance, eta=c.eta, output_type="np")
    row("pictures", *COLUMNS, title="From prompts to pictures, zoo: seconds; the log-probabilities are ours alone")
    compare(f"{len(prompts)}, {c.steps} steps of DDIM, guidance {c.guidance:g}", [
        lambda: policy.embeds.clear() or policy.sample(prompts, (0, 0), len(prompts)),          # cleared: theirs encode the texts anew, too
        *[partial(pipe, prompts, **theirs) for pipe in pipes]], 1 if args.quick else 7, same=False)


def peak(args):
    """In a process of its own: MB by which memory rises above the loaded network in a first forward and backward pass; printed as JSON.

    By VmHWM and not by getrusage's ru_maxrss: that keeps the peak of loading, and a child's even begins at its parent's. Writing 5 sets VmHWM back.
    """
    mb = lambda field: int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1000           # noqa: E731
    [net], inputs = load("unet", args.size, [args.peak]), unet_inputs(args.size, 32)
    Path("/proc/self/clear_refs").write_text("5")
    before = mb("VmRSS")
    run_unet(net, inputs, backward=True)
    print(json.dumps([mb("VmHWM") - before, sum(p.numel() for p in net.parameters()) * 4e-6]))


def memory(args):
    row("size, input", "gradients", "ours", "diffusers", "diffusers / ours", title="The UNet's forward and backward pass: MB above the loaded network, gradients included")
    for size in args.sizes:
        rises = {"ours": [], "theirs": []}
        for which in [*rises] * (1 if args.quick or size == "full" else 3):
            command = [sys.executable, __file__, "--peak", which, "--size", size, "--threads", str(args.threads)]
            rise, gradients = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            rises[which].append(rise)
        row(f"{size}, {tuple(unet_inputs(size, 32)[0].shape)}", *[f"{np.median(mb):.0f}" for mb in (gradients, *rises.values())], ratio(*rises.values()))


def stopwatch():
    """-> {label: seconds} and watch(label, owner, *names), which adds to it the time spent in these functions, without that in watched ones they call."""
    seconds, inner = defaultdict(float), []

    def call(label, function, *inputs, **options):
        inner.append(0.0)
        took, result = timed(partial(function, *inputs, **options))
        seconds[label + (", training" if torch.is_grad_enabled() else ", sampling") * label.startswith("UNet")] += took - inner.pop()
        inner[-1:] = [inner[-1] + took] if inner else []
        return result
    return seconds, lambda label, owner, *names: [setattr(owner, name, partial(call, label, getattr(owner, name))) for name in names]


def epoch(args):
    """An epoch by train.py's own function beside the bare cost of its network calls, recorded in a first epoch and gone through again as they are."""
    import ddpo
    import train
    run, calls, parts = prepare(args, **{} if args.quick else {"samples_per_epoch": 64}), [], []
    policy, unet, vae, c, (seconds, watch) = run.policy, run.policy.unet, run.policy.vae, run.config, stopwatch()
    hooks = [unet.register_forward_pre_hook(lambda _, inputs: calls.append(partial(run_unet, unet, inputs, torch.is_grad_enabled()))),
             vae.post_quant_conv.register_forward_pre_hook(lambda _, inputs: calls.append(partial(torch.no_grad()(vae.decode), inputs[0] * vae.scaling_factor))),
             run.optimizer.register_step_post_hook(lambda *_: calls.append(unet.zero_grad))]
    train.one_epoch(run, 0)
    [hook.remove() for hook in hooks]
    for label, owner, *names in (
            ("UNet forward", unet, "forward"), ("UNet backward", torch.autograd, "backward"), ("VAE decode", vae, "decode"), ("pictures to bytes", policy, "decode"),
            ("texts", policy, "embed"), ("noise", ddpo, "named_noise"), ("optimizer", run.optimizer, "step", "zero_grad"),
            ("norm of the gradient", torch.nn.utils, "clip_grad_norm_"), ("reward", run, "reward"), ("diversity", run, "clip"), ("diversity", train, "diversity"),
            ("guidance", ddpo, "predict_noise"), ("DDIM, log-probabilities, loss", policy.scheduler, "step", "mean_std"),
            ("DDIM, log-probabilities, loss", ddpo, "gaussian_log_prob", "ppo_loss"), ("prompts, statistics", run.statistics, "update"),
            ("prompts, statistics", train, "draw_prompts")):
        watch(label, owner, *names)

    def ours():
        seconds.clear()
        took, _ = timed(train.one_epoch, run, 1 + len(parts))
        parts.append({**seconds, "the rest": took - sum(seconds.values())})

    bare, whole = in_turns([lambda: [call() for call in calls], ours], 1 if args.quick else 5)
    row("", "seconds", "of the epoch", title=f"An epoch on the zoo, compressibility: {c.samples_per_epoch} pictures, {c.steps} steps, {c.updates} updates")
    row("epoch", float(np.median(whole)), ""), row("its UNet and VAE calls alone", float(np.median(bare)), ""), row("epoch / calls alone", ratio(bare, whole), "")
    medians = {label: float(np.median([part[label] for part in parts[1:]])) for label in parts[-1]}
    [row(label, medians[label], f"{medians[label] / np.median(whole):.2%}") for label in sorted(medians, key=medians.get, reverse=True)]


def our_epochs(args):
    """-> a function of the epoch's number that runs it, and returns its mean reward."""
    import train
    run = prepare(args, guidance=5.0, lr=1e-5, warmup=0, min_count=16, samples_per_prompt=1, samples_per_epoch=args.pictures, steps=args.steps, batch_size=args.batch)
    return lambda number: train.one_epoch(run, number)["reward_mean"]


def trl_epochs(args):
    """The same by TRL, in its best setting: all pictures sampled at once; in training all of an update's pictures in each pass, a timestep a pass."""
    from accelerate import PartialState
    from PIL import Image
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline
    animals, means, rng = "cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear frog".split(), [], np.random.default_rng(0)

    def reward(images, prompts, metadata):
        files = [io.BytesIO() for _ in images]
        for picture, file in zip((images * 255).round().byte().permute(0, 2, 3, 1).numpy(), files):
            Image.fromarray(picture).save(file, "JPEG", quality=95)
        means.append(np.mean(scores := [-file.tell() / 1000 for file in files]))
        return np.array(scores), {}

    config = DDPOConfig(
        sample_num_steps=args.steps, sample_batch_size=args.pictures, sample_num_batches_per_epoch=1, train_batch_size=args.batch, train_gradient_accumulation_steps=1,
        sample_eta=1.0, sample_guidance_scale=5.0, train_cfg=True, train_learning_rate=1e-5, train_clip_range=6.4e-3, train_adv_clip_max=10.0, mixed_precision="no",
        per_prompt_stat_tracking=True, per_prompt_stat_tracking_buffer_size=32, allow_tf32=False, save_freq=10**9, accelerator_kwargs={"cpu": True})
    PartialState(cpu=True)                              # TRL logs before it makes its own
    model = DefaultDDPOStableDiffusionPipeline(pretrained_model_name=str(ZOO), use_lora=False)
    trainer = DDPOTrainer(config, reward, lambda: (f"a {rng.choice(animals)}", {}), model)
    return lambda number: (trainer.step(number, number * (args.pictures // args.batch)), means[-1])[1]


def worker(args):
    """One side of `trl`, in a process of its own: a warm-up epoch, then one for every line that comes in -> [seconds, mean reward] as a line for each."""
    answers, sys.stdout = sys.stdout, sys.stderr        # whatever the libraries say
    run, number = {"ours": our_epochs, "trl": trl_epochs}[args.worker](args), 0
    while number == 0 or sys.stdin.readline():
        seconds, mean = timed(run, number)
        print(json.dumps([seconds, float(mean)]), file=answers, flush=True)
        number += 1


def trl(args):
    workers, seconds, rewards = {}, {"ours": [], "trl": []}, []

    def answer(which):
        if not (line := workers[which].stdout.readline()):
            sys.exit(f"bench.py: the side of {which} has died:\n{(Path(folder) / which).read_text()[-2000:]}")
        return json.loads(line)

    with tempfile.TemporaryDirectory() as folder:
        try:
            for which, python in (("ours", sys.executable), ("trl", args.trl)):                 # one warms up after the other
                command = [python, __file__, "--worker", which, "--threads", str(args.threads), *["--quick"] * args.quick]
                workers[which] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=open(Path(folder) / which, "w"), text=True, cwd=folder)
                rewards.append(answer(which)[1])
            for which in [*seconds] * (1 if args.quick else 5):
                print("go", file=workers[which].stdin, flush=True)
                seconds[which].append(answer(which)[0])
        finally:
            [(process.kill(), process.wait()) for process in workers.values()]
    row("seconds, ours", "TRL", "TRL / ours", "mean reward before training, ours", "TRL",
        title=f"An epoch on the zoo, beside TRL's DDPOTrainer: {args.pictures} pictures, {args.steps} steps, guidance 5, updates of {args.batch} pictures")
    row(*[float(np.median(took)) for took in seconds.values()], ratio(*seconds.values()), *rewards)


def skip(args):
    """How many pairs (picture, timestep) have a gradient of exactly zero, being outside the clip range with nothing to gain, from an epoch's second update on.

    Were they found by a forward pass without a graph first, an update would cost 1 + 3 (1 - f) instead of 3 forward passes: worth it from f = 1/3 on.
    """
    import ddpo
    import train
    row("reward", "f, mean", "epoch by epoch", "update by update", "cost with / without", "worth it (f > 1/3)?",
        title="Share f of pairs whose gradient is zero, each epoch's first update left out")
    loss, update, zero, percent = ddpo.ppo_loss, ddpo.update, [], lambda values: " ".join(f"{value:.0%}" for value in values)

    def watched_loss(log_prob, *others):
        losses, ratios = loss(log_prob, *others)
        zero[-1].append(torch.autograd.grad(losses.sum(), log_prob, retain_graph=True)[0] == 0)
        return losses, ratios

    ddpo.ppo_loss, ddpo.update = watched_loss, lambda *inputs, **settings: zero.append([]) or update(*inputs, **settings)
    for reward, epochs in {"aesthetic": 12, "compressibility": 8}.items():
        zero.clear()
        run, epochs = prepare(args, reward=reward), 2 if args.quick else epochs
        [train.one_epoch(run, number) for number in range(epochs)]
        f = np.array([torch.cat(parts).float().mean() for parts in zero]).reshape(epochs, -1)[:, 1:]
        row(reward, f"{f.mean():.1%}", percent(f.mean(1)), percent(f.mean(0)), f"{(1 + 3 * (1 - f.mean())) / 3:.2f}", "yes" if f.mean() > 1 / 3 else "no")
    ddpo.ppo_loss, ddpo.update = loss, update


def main():
    sections = {section.__name__: section for section in (networks, pipeline, memory, epoch, trl, skip)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"which of {', '.join(sections)}; by default all (trl: with --trl)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", choices=["zoo", "full", "all"], default="zoo", help="of networks and memory; all else is the zoo's")
    parser.add_argument("--quick", action="store_true", help="one turn of everything, small: does it run?")
    parser.add_argument("--trl", metavar="PYTHON", help="an interpreter that has trl 0.23.1")
    parser.add_argument("--peak", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=["ours", "trl"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = args.names or [name for name in sections if name != "trl" or args.trl]
    if not set(names) <= set(sections) or ("trl" in names and not args.trl):
        parser.error(f"sections are {', '.join(sections)}; trl needs --trl PYTHON")
    args.sizes, (args.pictures, args.steps, args.batch) = ["zoo", "full"] if args.size == "all" else [args.size], (8, 3, 2) if args.quick else (32, 20, 8)
    torch.set_num_threads(args.threads), torch.manual_seed(0)
    if args.peak or args.worker:
        return peak(args) if args.peak else worker(args)
    import diffusers
    commit = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    print(f"{cpu[1] if cpu else 'CPU unknown'}, {os.cpu_count()} cores, {args.threads} threads, load {os.getloadavg()[0]:.1f} at the start; commit {commit}; "
          f"torch {torch.__version__}, diffusers {diffusers.__version__}; fp32", flush=True)
    [sections[name](args) for name in names]


if __name__ == "__main__":
    main()
