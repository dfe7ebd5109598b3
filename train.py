"""Fine-tune Stable Diffusion by DDPO: `python train.py --reward compressibility`.

The wiring of the paper's Algorithm (Sec. 4.3, App. D): each epoch draws prompts, samples pictures with the present policy, rewards
them, normalises the rewards prompt by prompt and takes a few optimizer steps; all mathematics is in ddpo.py and scheduler.py.

Settings: the command line, else the `ddpo.json` in the model's folder, else the paper's Table D.5.
Deviation from the paper: the model that `--model auto` picks without a CUDA GPU is the miniature in tutorial/zoo, with settings of its own.
"""
import argparse
import dataclasses
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import ddpo
from rewards import REWARDS, draw_prompts, load_prompts, spread_prompts
from scheduler import Scheduler
from unet import VAE, UNet, load, locate, save

matplotlib.use("Agg")                               # no window, no display
import matplotlib.pyplot as plt                     # noqa: E402

ZOO = Path(__file__).parent / "tutorial" / "zoo" / "stable-diffusion"
ALGORITHMS = {"ddpo-is": {"batch_size": 64}, "ddpo-sf": {"batch_size": 256}}           # Table D.5: what depends on the algorithm
EVALUATION = 2**31                                  # stands for the epoch in the names of the fixed evaluation noises


def option(default, help, **kwargs):
    return field(default=default, metadata={"help": help, **kwargs})


@dataclass
class Config:
    """Every setting, flat. Defaults are the paper's (Table D.5, DDPO_IS) where it has one."""
    reward: str = option("compressibility", "what to maximise", choices=list(REWARDS))
    algorithm: str = option("ddpo-is", "policy gradient: importance sampling with clipping, or score function", choices=list(ALGORITHMS))
    model: str = option("auto", "auto, zoo, a hub id or a diffusers folder; auto: SD v1.4 on a CUDA GPU, else the zoo")
    prompts: str = option("imagenet-animals", "a named set (imagenet-animals, common-animals, animal-activities) or a text file")
    epochs: int = option(50, "rounds of sampling and training")
    samples_per_epoch: int = option(256, "pictures sampled and rewarded an epoch (paper: 256)")
    samples_per_prompt: int = option(1, "pictures of each prompt drawn in an epoch (paper: prompts drawn independently, 1)")
    steps: int = option(50, "denoising steps T (paper: 50)")
    eta: float = option(1.0, "DDIM's noise: 1 as DDPM, the paper's; 0 has no policy gradient")
    guidance: float = option(5.0, "guidance weight w (paper: 5.0)")
    lr: float = option(1e-5, "AdamW's learning rate (paper: 1e-5)")
    weight_decay: float = option(1e-4, "AdamW's weight decay (paper: 1e-4)")
    max_grad_norm: float = option(1.0, "gradient clipping (paper: 1.0)")
    clip_range: float = option(1e-4, "DDPO_IS: how far a ratio may leave 1 (paper: 1e-4, at 512 x 512)")
    batch_size: int = option(None, "pictures an optimizer update (paper: 64; DDPO_SF 256)")
    micro_batch: int = option(8, "(picture, timestep) pairs a forward and backward pass; no effect on results")
    sample_batch: int = option(8, "pictures sampled at a time; no effect on results")
    history_size: int = option(32, "rewards remembered of each prompt, to normalise by (paper: 32)")
    min_count: int = option(16, "rewards of a prompt before its own statistics are used (paper: 16)")
    eval_every: int = option(5, "evaluate on the fixed prompts and noises every so many epochs")
    eval_samples: int = option(64, "fixed evaluation pictures")
    checkpoint_every: int = option(10, "write a checkpoint every so many epochs, and at the end; the last two are kept")
    seed: int = option(0, "seed of everything random")
    device: str = option("auto", "cuda, cpu, mps ...; auto: cuda where there is one")
    out: str = option(None, "the run's folder; by default a new one in runs/")
    resume: bool = option(False, "go on from the newest checkpoint in --out")
    debug: bool = option(False, "full tracebacks instead of one line")


def parse(argv):
    """Command line -> the options given there, as {name: value}."""
    parser = argparse.ArgumentParser(description="Fine-tune Stable Diffusion by reinforcement learning (DDPO).", argument_default=argparse.SUPPRESS)
    for f in dataclasses.fields(Config):
        kwargs = dict(f.metadata)
        kwargs["help"] = kwargs["help"].replace("%", "%%")
        if f.type is bool or f.type == "bool":
            kwargs["action"] = "store_true"
        else:
            kwargs["type"] = f.type
            if "choices" not in kwargs:
                kwargs["metavar"] = {int: "N", float: "X", str: "S"}[f.type]
        parser.add_argument("--" + f.name.replace("_", "-"), **kwargs)
    return vars(parser.parse_args(argv))


def resolve(given, folder):
    """The whole Config: the command line over the model's ddpo.json over the paper's table."""
    names = {f.name for f in dataclasses.fields(Config)}
    settings, path = {}, folder / "ddpo.json"
    own = json.loads(path.read_text()) if path.is_file() else {}
    reward, algorithm = given.get("reward", Config.reward), given.get("algorithm", Config.algorithm)
    settings |= ALGORITHMS[algorithm]
    for part in (own.get("all", {}), own.get(algorithm, {}), own.get(reward, {})):
        if unknown := set(part) - names:
            raise ValueError(f"{path} sets {', '.join(sorted(unknown))}, which train.py does not know")
        settings |= part
    config = Config(**{**settings, **given})
    for name in ("epochs", "samples_per_epoch", "samples_per_prompt", "batch_size", "micro_batch", "sample_batch", "history_size", "min_count",
                 "eval_every", "eval_samples", "checkpoint_every", "lr", "clip_range", "max_grad_norm"):
        if not getattr(config, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be above 0")
    if not 0 < config.eta <= 1:
        raise ValueError(f"--eta {config.eta:g}: must be above 0, for a step without noise has no policy gradient, and at most 1")
    if config.batch_size > config.samples_per_epoch:
        raise ValueError(f"--batch-size {config.batch_size} is more than the {config.samples_per_epoch} samples of an epoch (--samples-per-epoch)")
    if config.samples_per_epoch % config.batch_size or config.samples_per_epoch % config.samples_per_prompt:
        raise ValueError(f"--samples-per-epoch {config.samples_per_epoch} must be a multiple of --batch-size ({config.batch_size}) "
                         f"and of --samples-per-prompt ({config.samples_per_prompt})")
    if algorithm == "ddpo-sf" and config.batch_size != config.samples_per_epoch:
        raise ValueError(f"--algorithm ddpo-sf is right for one update an epoch only: --batch-size must equal --samples-per-epoch ({config.samples_per_epoch})")
    return config


def choose_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None


def choose_model(name, device):
    """--model -> its folder; prints what `auto` chose and why."""
    if name == "auto":
        name = "CompVis/stable-diffusion-v1-4" if device.type == "cuda" else "zoo"
        why = "a CUDA GPU is there" if device.type == "cuda" else "no CUDA GPU; Stable Diffusion v1.4: --model CompVis/stable-diffusion-v1-4"
        print(f"model: {name} ({why})")
    return ZOO if name == "zoo" else locate(name)


class Policy:
    """The parts of a Stable Diffusion folder on a device: only the UNet is trained."""

    def __init__(self, folder, device, config):
        from transformers import CLIPTextModel, CLIPTokenizer
        self.device, self.config = device, config
        self.unet = load(UNet, folder / "unet").to(device, memory_format=torch.channels_last)
        self.vae = load(VAE, folder / "vae").to(device, memory_format=torch.channels_last).requires_grad_(False)
        self.scheduler = Scheduler.from_folder(folder / "scheduler").to(device)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        self.text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32, local_files_only=True).to(device).eval()
        self.side = self.unet.config["sample_size"]
        self.embeds = {}

    @torch.no_grad()
    def embed(self, prompts):
        """Prompt embeddings, each prompt encoded once: list of B str -> (B, m, d)."""
        for prompt in set(prompts) - set(self.embeds):
            tokens = self.tokenizer(prompt, padding="max_length", truncation=True, max_length=self.tokenizer.model_max_length, return_tensors="pt")
            self.embeds[prompt] = self.text_encoder(tokens.input_ids.to(self.device)).last_hidden_state[0]
        return torch.stack([self.embeds[prompt] for prompt in prompts])

    def sample(self, prompts, epoch, description):
        """One trajectory a prompt, the noises named by (seed, epoch, place in the list) -> Trajectories, images uint8 (B, H, W, 3)."""
        c, parts, images = self.config, [], []
        shape = (self.unet.config["in_channels"], self.side, self.side)
        with tqdm(total=len(prompts) * c.steps, desc=description, unit="step", leave=False, dynamic_ncols=True) as bar:
            for start in range(0, len(prompts), c.sample_batch):
                batch = range(start, min(start + c.sample_batch, len(prompts)))
                noise = torch.stack([ddpo.named_noise(shape, c.steps + 1, c.seed, epoch, i) for i in batch]).to(self.device)
                parts.append(ddpo.sample(self.unet, self.scheduler, self.embed([prompts[i] for i in batch]), self.embed([""]), noise,
                                         c.steps, c.eta, c.guidance, progress=partial(ticking, bar, len(batch))))
                images.append(self.decode(parts[-1].latents[:, -1]))
        return ddpo.Trajectories.cat(parts), np.concatenate(images)

    @torch.no_grad()
    def decode(self, latents):
        """Latents (B, 4, h, w) -> images uint8 (B, H, W, 3)."""
        images = (self.vae.decode(latents) / 2 + 0.5).clamp(0, 1)
        return (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def ticking(bar, amount, iterable):
    """Yield from `iterable`, moving `bar` on by `amount` after each."""
    for item in iterable:
        yield item
        bar.update(amount)


def evaluate(policy, reward, prompts, epoch, out):
    """Reward the fixed prompts and noises; write the grid of pictures and the figures behind it -> rewards (B,)."""
    _, images = policy.sample(prompts, EVALUATION, "evaluating")
    rewards = np.asarray(reward(images, prompts), dtype=np.float64)
    columns, tile = int(np.ceil(len(images) ** 0.5)), min(images.shape[1], 256)
    grid = Image.new("RGB", (columns * tile, -(-len(images) // columns) * tile))
    for i, image in enumerate(images):
        grid.paste(Image.fromarray(image).resize((tile, tile)), (i % columns * tile, i // columns * tile))
    grid.save(out / "samples" / f"epoch_{epoch:04d}.png")
    record = {"epoch": epoch, "prompts": prompts, "rewards": rewards.tolist()}
    (out / "samples" / f"epoch_{epoch:04d}.json").write_text(json.dumps(record, indent=1) + "\n")
    return rewards


def train_epoch(policy, optimizer, trajectories, epoch):
    """The optimizer updates of an epoch -> their metrics, averaged, as floats."""
    c, metrics = policy.config, []
    order = torch.from_numpy(np.random.default_rng([c.seed, epoch, 1]).permutation(len(trajectories))).to(policy.device)
    total = -(-c.batch_size * c.steps // c.micro_batch) * (len(order) // c.batch_size)
    with tqdm(total=total, desc=f"epoch {epoch}: training", unit="pass", leave=False, dynamic_ncols=True) as bar:
        for minibatch in order.split(c.batch_size):
            metrics.append(ddpo.update(policy.unet, optimizer, policy.scheduler, trajectories, minibatch, policy.embed([""]), algorithm=c.algorithm, eta=c.eta,
                                       w=c.guidance, clip_range=c.clip_range, micro_batch=c.micro_batch, max_grad_norm=c.max_grad_norm,
                                       progress=partial(ticking, bar, 1)))
    first = metrics[0].pop("ratio_error")
    mean = {name: torch.stack([m[name] for m in metrics]).mean(0).tolist() for name in metrics[0]}
    return {**mean, "first_ratio_error": first.item()}


def write_checkpoint(out, policy, optimizer, statistics, epoch, queries):
    """checkpoints/000012: the policy as a diffusers UNet, the optimizer, and the rest as JSON. Written aside, renamed when whole."""
    final, aside = out / "checkpoints" / f"{epoch:06d}", out / "checkpoints" / f"{epoch:06d}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    save(policy.unet, aside / "unet")
    state = optimizer.state_dict()["state"]
    save_file({f"{i}.{name}": value.contiguous() for i, values in state.items() for name, value in values.items()}, aside / "optimizer.safetensors")
    (aside / "state.json").write_text(json.dumps({"epoch": epoch, "reward_queries": queries, "statistics": statistics.state_dict()}))
    os.replace(aside, final)
    for old in whole_checkpoints(out)[:-2]:
        shutil.rmtree(old)


def whole_checkpoints(out):
    return sorted(p for p in (out / "checkpoints").glob("*") if p.name.isdigit())


def read_checkpoint(out, policy, optimizer, statistics):
    """Everything back from the newest whole checkpoint -> its epoch and reward queries; (0, 0) where there is none yet."""
    found = whole_checkpoints(out)
    if not found:
        return 0, 0
    policy.unet.load_state_dict(load(UNet, found[-1] / "unet").state_dict())
    state = {}
    for key, value in load_file(found[-1] / "optimizer.safetensors").items():
        i, name = key.split(".")
        state.setdefault(int(i), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    rest = json.loads((found[-1] / "state.json").read_text())
    statistics.load_state_dict(rest["statistics"])
    print(f"resuming from {found[-1]}")
    return rest["epoch"], rest["reward_queries"]


def read_metrics(out, before=None):
    path = out / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.is_file() else []
    return [line for line in lines if before is None or line["epoch"] < before]


def draw_curve(out, config):
    """reward.png: the reward of the training samples and of the fixed evaluation pictures against reward queries."""
    lines = read_metrics(out)
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    trained = [m for m in lines if m["reward_mean"] is not None]
    queries, mean, std = (np.array([m[k] for m in trained]) for k in ("reward_queries", "reward_mean", "reward_std"))
    axes.plot(queries, mean, label="training samples (mean, std)")
    axes.fill_between(queries, mean - std, mean + std, alpha=0.15)
    evaluated = [(m["eval_queries"], m["eval_reward_mean"]) for m in lines if "eval_reward_mean" in m]
    axes.plot(*zip(*evaluated), "o-", label="fixed evaluation pictures")
    axes.set(xlabel="reward queries", ylabel=config.reward, title=f"{config.algorithm} on {config.reward}")
    axes.legend()
    figure.savefig(out / "reward.png", dpi=110)
    plt.close(figure)


def resumed(given):
    """With --resume, the settings of the run in --out under those given now, of which only a few may differ."""
    if not given.get("resume"):
        return given
    if not given.get("out"):
        raise ValueError("--resume needs --out: the folder of the run to go on with")
    stored = Path(given["out"]) / "config.json"
    if not stored.is_file():
        raise ValueError(f"--out {given['out']} --resume: no config.json there, so no run to go on with")
    before = json.loads(stored.read_text())
    changed = [name for name in set(given) - {"out", "resume", "debug", "epochs", "device", "model"} if before.get(name) != given[name]]
    if changed:
        raise ValueError(f"--resume goes on with the settings of {stored}; leave out --{changed[0].replace('_', '-')}")
    return {**before, **given}


def make_folder(config):
    """The run's folder, made; one that holds a run is only touched with --resume -> Path."""
    out = Path(config.out)
    if not config.resume and ((out / "config.json").exists() or (out / "metrics.jsonl").exists()):
        raise ValueError(f"--out {out} holds a run already: add --resume to go on with it, or choose another folder")
    for part in ("samples", "checkpoints"):
        (out / part).mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    return out


def run(given):
    given = resumed(given)
    device = choose_device(given.get("device", Config.device))
    folder = choose_model(given.get("model", Config.model), device)
    config = resolve(given, folder)
    config.out = config.out or str(Path("runs") / f"{config.reward}-{config.algorithm}-{time.strftime('%Y%m%d-%H%M%S')}")
    prompts, reward = load_prompts(config.prompts), REWARDS[config.reward]
    policy = Policy(folder, device, config)
    policy.scheduler.timesteps(config.steps)            # refuses an impossible T before a folder is made
    out = make_folder(config)
    statistics = ddpo.PromptStatistics(config.history_size, config.min_count)
    optimizer = torch.optim.AdamW(policy.unet.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    start, queries = read_checkpoint(out, policy, optimizer, statistics)
    lines = read_metrics(out, before=start)
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    fixed_prompts = spread_prompts(prompts, config.eval_samples)
    print(f"{config.algorithm} on {config.reward}: {config.epochs} epochs of {config.samples_per_epoch} pictures, into {out}", flush=True)

    for epoch in range(start, config.epochs + 1):
        last, metrics = epoch == config.epochs, {}
        if epoch % config.eval_every == 0 or last:
            rewards = evaluate(policy, reward, fixed_prompts, epoch, out)
            metrics = {"eval_reward_mean": rewards.mean(), "eval_reward_std": rewards.std(), "eval_queries": queries}
        if not last:
            metrics = {**one_epoch(policy, reward, prompts, statistics, optimizer, epoch), **metrics}
            queries += config.samples_per_epoch
        else:
            metrics = {**dict.fromkeys(EMPTY), **metrics}
        with open(out / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"epoch": epoch, "reward_queries": queries, **metrics}) + "\n")
        draw_curve(out, config)
        report(epoch, queries, metrics)
        if not last and ((epoch + 1) % config.checkpoint_every == 0 or epoch + 1 == config.epochs):
            write_checkpoint(out, policy, optimizer, statistics, epoch + 1, queries)
    conclude(out, config)


EMPTY = ("reward_mean", "reward_std", "loss", "approx_kl", "clip_fraction", "grad_norm", "seconds_sampling", "seconds_reward", "seconds_training")


def one_epoch(policy, reward, prompts, statistics, optimizer, epoch):
    """Sample, reward, normalise, update: one round of the paper's loop -> metrics."""
    c = policy.config
    drawn = draw_prompts(prompts, c.samples_per_epoch, c.samples_per_prompt, np.random.default_rng([c.seed, epoch]))
    clock = [time.time()]
    trajectories, images = policy.sample(drawn, epoch, f"epoch {epoch}: sampling")
    clock.append(time.time())
    scores = np.asarray(reward(images, drawn), dtype=np.float32)
    if scores.shape != (len(drawn),) or not np.isfinite(scores).all():
        raise ValueError(f"--reward {c.reward} must give one finite number for each of {len(drawn)} pictures; it gave {scores}")
    clock.append(time.time())
    trajectories.rewards = torch.from_numpy(scores).to(policy.device)
    trajectories.advantages = ddpo.normalize_advantages(trajectories.rewards, *statistics.update(drawn, trajectories.rewards))
    metrics = train_epoch(policy, optimizer, trajectories, epoch)
    clock.append(time.time())
    seconds = dict(zip(("seconds_sampling", "seconds_reward", "seconds_training"), np.diff(clock).round(3).tolist()))
    return {"reward_mean": scores.mean().item(), "reward_std": scores.std().item(), **metrics, **seconds}


def report(epoch, queries, metrics):
    """One line an epoch for the eye."""
    words = [f"epoch {epoch:3d}  queries {queries:6d}"]
    if metrics["reward_mean"] is not None:
        seconds = sum(metrics[f"seconds_{part}"] for part in ("sampling", "reward", "training"))
        words.append(f"reward {metrics['reward_mean']:8.3f} +- {metrics['reward_std']:.3f}  kl {metrics['approx_kl']:.2e}  "
                     f"clipped {metrics['clip_fraction']:4.0%}  grad {metrics['grad_norm']:.2g}  {seconds:.0f} s")
    if "eval_reward_mean" in metrics:
        words.append(f"fixed pictures {metrics['eval_reward_mean']:8.3f}")
    print("  ".join(words), flush=True)


def conclude(out, config):
    """How far the fixed pictures have come, in the base model's standard deviations and in paired standard errors."""
    before, after = (np.array(json.loads((out / "samples" / f"epoch_{epoch:04d}.json").read_text())["rewards"]) for epoch in (0, config.epochs))
    gain = after - before
    error = gain.std(ddof=1) / len(gain) ** 0.5 if len(gain) > 1 else float("nan")
    print(f"fixed pictures: {config.reward} {before.mean():.3f} -> {after.mean():.3f}, a gain of {gain.mean():.3f} = {gain.mean() / before.std():.2f} standard "
          f"deviations of the base model's rewards = {gain.mean() / error:.1f} paired standard errors; pictures and curve in {out}")


def main(argv=None):
    given = parse(argv)
    try:
        run(given)
    except (ValueError, OSError) as error:
        if given.get("debug"):
            raise
        sys.exit(f"train.py: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit("train.py: stopped; go on with --out RUN_FOLDER --resume")


if __name__ == "__main__":
    main()
