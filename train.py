"""Fine-tune Stable Diffusion by reinforcement learning: `python train.py --reward aesthetic`.

The wiring of the paper's algorithms (Sec. 4, App. D): each epoch draws prompts, samples pictures with the present policy, rewards them, weighs them
prompt by prompt and takes some optimizer steps; all mathematics is in ddpo.py and scheduler.py.
`torchrun --nproc-per-node 8 train.py ...` runs this program once a GPU: each process has a share of the samples, the first one writes.

Settings: the command line, else the `ddpo.json` in the model's folder, else the paper's Table D.5. Deviations from the paper, in the zoo's settings: with
--samples-per-prompt prompts repeat within an epoch; with --warmup lr rises over the first updates, for Adam's first steps move every weight by all of it.
"""
import argparse
import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import ddpo
from rewards import REWARDS, checked, choose_device, clip_embedder, diversity, draw_prompts, load_prompts, loading, locate, make_reward, spread_prompts
from scheduler import Scheduler
from unet import VAE, UNet, add_lora, load, load_lora, save, save_lora

ZOO = Path(__file__).parent / "tutorial" / "zoo" / "stable-diffusion"
ALGORITHMS = {"ddpo-is": {"batch_size": 64}, "ddpo-sf": {"batch_size": 256}, **dict.fromkeys(["rwr", "rwr-sparse"], {       # Table D.5: what depends on the algorithm
    "samples_per_epoch": 10_000, "batch_size": 128, "updates": 400, "eval_every": 1, "checkpoint_every": 1})}
PROMPTS = {"aesthetic": {"prompts": "common-animals"}, "alignment": {"prompts": "animal-activities"}}         # Sec. 6: and on the reward
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EVALUATION = 2**31                                  # stands for the epoch in the names of the fixed evaluation noises
option = lambda default, help, **more: dataclasses.field(default=default, metadata={"help": help, **more})             # noqa: E731
progress = lambda text, unit, total: tqdm(desc=text, unit=unit, total=total, leave=False, disable=True if ddpo.processes()[0] else None)             # noqa: E731


@dataclasses.dataclass
class Config:
    """Every setting, flat. Defaults are the paper's (Table D.5, DDPO_IS) where it has one."""
    reward: str = option("aesthetic", f"what to maximise: {', '.join(REWARDS)}, or file.py:function")
    algorithm: str = option("ddpo-is", "policy gradient (importance sampling, score function) or reward-weighted regression", choices=list(ALGORITHMS))
    model: str = option("auto", "auto, zoo, a hub id or a diffusers folder; auto: SD v1.4 on a CUDA GPU, else the zoo")
    prompts: str = option("imagenet-animals", "a named set (imagenet-animals, common-animals, animal-activities) or a text file, one prompt a line")
    epochs: int = option(50, "rounds of sampling and training")
    samples_per_epoch: int = option(256, "pictures sampled and rewarded an epoch (paper: 256; RWR 10,000)")
    samples_per_prompt: int = option(1, "pictures of each prompt drawn in an epoch (paper: prompts drawn independently, 1)")
    steps: int = option(50, "denoising steps T (paper: 50)")
    eta: float = option(1.0, "DDIM's noise: 1 as DDPM, the paper's; 0 has no policy gradient")
    guidance: float = option(5.0, "guidance weight w (paper: 5.0)")
    lr: float = option(1e-5, "AdamW's learning rate (paper: 1e-5)")
    warmup: int = option(0, "optimizer updates over which lr rises to its value: Adam's first steps are its wildest (paper: 0)")
    weight_decay: float = option(1e-4, "AdamW's weight decay (paper: 1e-4)")
    max_grad_norm: float = option(1.0, "gradient clipping (paper: 1.0)")
    clip_range: float = option(1e-4, "DDPO_IS: how far a ratio may leave 1 (paper: 1e-4, at 512 x 512)")
    batch_size: int = option(None, "pictures an optimizer update (paper: 64; DDPO_SF 256; RWR 128)")
    updates: int = option(None, "RWR: optimizer updates an epoch (paper: 400); DDPO takes each picture once")
    beta: float = option(0.2, "RWR: inverse temperature of the weights, per unit of reward (paper: 0.2)")
    percentile: float = option(0.9, "RWR-sparse: the percentile of a prompt's rewards from which on pictures are kept (paper: 0.9)")
    no_cfg_training: bool = option(False, "train the plain conditional prediction; sampling stays guided (ablation, App. E.1)")
    micro_batch: int = option(8, "(picture, timestep) pairs a forward and backward pass; no effect on results")
    sample_batch: int = option(8, "pictures sampled at a time; no effect on results")
    precision: str = option("fp32", "of the networks' arithmetic; trained weights, log-probs and losses are always fp32 (authors: fp16)", choices=list(PRECISIONS))
    grad_checkpointing: bool = option(False, "compute activations again in the backward pass: far less memory, about a third more time")
    lora_rank: int = option(0, "train a LoRA of this rank on the attention layers instead of the whole UNet; lr is then 3e-4 (App. C)")
    history_size: int = option(32, "rewards remembered of each prompt, to normalise by (paper: 32)")
    min_count: int = option(16, "rewards of a prompt before its own statistics are used (paper: 16)")
    eval_every: int = option(5, "evaluate on the fixed prompts and noises every so many epochs")
    eval_samples: int = option(64, "fixed evaluation pictures")
    checkpoint_every: int = option(10, "write a checkpoint every so many epochs, and at the end; the last two are kept")
    metrics: str = option("compressibility", "rewards to watch beside --reward on the fixed pictures, separated by commas")
    clip: str = option("openai/clip-vit-large-patch14", "CLIP, for the aesthetic reward and for diversity")
    aesthetic_head: str = option("trl-lib/ddpo-aesthetic-predictor", "LAION's predictor on CLIP's embeddings: hub id, folder or file")
    vlm: str = option("llava-hf/llava-1.5-7b-hf", "LLaVA that describes pictures for the alignment reward")
    vlm_url: str = option(None, "a server to describe them instead (OpenAI chat-completions API): http://HOST:PORT/v1")
    vlm_question: str = option("Answer concisely: what is going on in this image?", "what it is asked")
    bert: str = option("microsoft/deberta-xlarge-mnli", "encoder of BERTScore, which compares description and prompt")
    bert_layer: int = option(40, "its layer (bert-score's choice for deberta-xlarge-mnli: 40)")
    reward_device: str = option(None, "where reward models run, beside the sampling of the next batch; default: --device")
    seed: int = option(0, "seed of everything random")
    device: str = option("auto", "cuda, cpu, mps ...; auto: cuda where there is one")
    out: str = option(None, "the run's folder; by default a new one in runs/")
    resume: bool = option(False, "go on from the newest checkpoint in --out")
    debug: bool = option(False, "full tracebacks instead of one line")


def parse(argv):
    """Command line -> the options given there, as {name: value}."""
    parser = argparse.ArgumentParser(description="Fine-tune Stable Diffusion by reinforcement learning (DDPO).", argument_default=argparse.SUPPRESS)
    for f in dataclasses.fields(Config):
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type, "metavar": None if "choices" in f.metadata else f.type.__name__}
        parser.add_argument("--" + f.name.replace("_", "-"), **f.metadata, **kind)
    return vars(parser.parse_args(argv))


def model_settings(folder):
    """The model's own ddpo.json: {"all": {...}, and by reward, algorithm or "lora"}, checked -> dict of dicts; {} where there is none."""
    path, known = folder / "ddpo.json", ["all", *REWARDS, *ALGORITHMS, "lora"]
    fixed = {"reward", "algorithm", "model", "lora_rank", "precision", "vlm_url", "reward_device", "seed", "device", "out", "resume", "debug"}
    types = {f.name: {f.type, int} if f.type is float else {f.type} for f in dataclasses.fields(Config) if f.name not in fixed}
    try:
        own = json.loads(path.read_text()) if path.is_file() else {}
        if not set(own) <= set(known) or not all(isinstance(part, dict) for part in own.values()):
            raise ValueError("unknown sections")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f'{path}: needed is JSON such as {{"all": {{"steps": 20}}}}, of sections {", ".join(known)} ({error})') from None
    for part, name, value in [(part, *item) for part in own.values() for item in part.items()]:
        if type(value) not in types.get(name, ()):
            raise ValueError(f"{path} sets {name} = {value!r}: no setting of a model, or not of its type")
        if type(value) is str:                              # paths are relative to the model's folder
            if ".py:" in value and folder.resolve() != ZOO.resolve():
                raise ValueError(f"{path} sets {name} = {value!r}: a model's settings may run no code; give --{name} yourself")
            part[name] = ",".join(str((folder / item).resolve()) if item.startswith("../") else item for item in value.split(","))
    return own


def resolve(given, folder):
    """The whole Config: the command line over the model's ddpo.json over the paper's table. Raises ValueError, one line."""
    own = model_settings(folder)
    reward, algorithm = given.get("reward", Config.reward), given.get("algorithm", Config.algorithm)
    paper, lora = ({"lr": 3e-4}, own.get("lora", {})) if given.get("lora_rank") else ({}, {})           # App. C
    c = Config(**{**ALGORITHMS[algorithm], **PROMPTS.get(reward, {}), **paper, **own.get("all", {}), **own.get(reward, {}), **own.get(algorithm, {}), **lora, **given})
    c.batch_size = c.samples_per_epoch if algorithm == "ddpo-sf" and "batch_size" not in given else c.batch_size
    ddpo_, n, size, world = algorithm.startswith("ddpo"), c.samples_per_epoch, c.batch_size, ddpo.processes()[1]
    for f in dataclasses.fields(Config):
        value = getattr(c, f.name)
        least = {"seed": 0, "eta": 0, "percentile": 0, "weight_decay": 0, "warmup": 0, "guidance": 0, "lora_rank": 0, "eval_samples": 2}.get(f.name, 1e-12)
        if f.type in (int, float) and not (value is None and ddpo_) and not (math.isfinite(value) and value >= least):
            raise ValueError(f"--{f.name.replace('_', '-')} {value}: must be finite and {f'at least {least}' if least != 1e-12 else 'above 0'}")
    for bad, why in [
            (c.eta > 1 or (ddpo_ and c.eta == 0), f"--eta {c.eta:g}: at most 1, and for DDPO above 0, as a step without noise has no policy gradient"),
            (c.percentile > 1, f"--percentile {c.percentile:g}: between 0 (keep all) and 1 (keep the best)"),
            (c.min_count > c.history_size, f"--min-count {c.min_count} is more than --history-size {c.history_size}: no prompt would ever have enough"),
            (n % c.samples_per_prompt, f"--samples-per-epoch {n} must be a multiple of --samples-per-prompt ({c.samples_per_prompt})"),
            (n % world or size % world or c.eval_samples // 2 * 2 % world,
             f"--samples-per-epoch {n}, --batch-size {size} and --eval-samples {c.eval_samples // 2 * 2} must be multiples of the number of processes, {world}"),
            (algorithm == "ddpo-sf" and size != n, f"--batch-size {size}: ddpo-sf takes one update an epoch, so all its samples ({n})"),
            (ddpo_ and n % size, f"--samples-per-epoch {n} must be a multiple of --batch-size ({size})"),
            (ddpo_ and c.updates not in (None, n // size), f"--updates {c.updates}: {algorithm} takes each picture once, {n // size} updates of --batch-size {size}")]:
        if bad:
            raise ValueError(why)
    return dataclasses.replace(c, updates=c.updates or n // size)


def load_policy(folder, device, config):
    """A Stable Diffusion folder -> ddpo.Policy. Trained weights are float32, frozen ones may be half; autocast is around the networks alone, the rest is float32."""
    from transformers import CLIPTextModel, CLIPTokenizer
    dtype, half = PRECISIONS[config.precision], config.precision != "fp32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = half             # fp32 is fp32; else what stays float32 may use TF32
    unet, vae = load(UNet, folder / "unet", dtype if config.lora_rank else torch.float32), load(VAE, folder / "vae", dtype).requires_grad_(False)
    unet.gradient_checkpointing = config.grad_checkpointing
    unet = add_lora(unet, config.lora_rank, config.seed) if config.lora_rank else unet
    unet, vae = unet.to(device, memory_format=torch.channels_last if device.type == "cuda" else None), vae.to(device, memory_format=torch.channels_last)
    tokenizer = loading("--model", folder, CLIPTokenizer, folder / "tokenizer")
    encoder = loading("--model", folder, CLIPTextModel, folder / "text_encoder", dtype=dtype).to(device).requires_grad_(False)
    if half:
        unet.forward, vae.decode = (torch.autocast(device.type, dtype)(function) for function in (unet.forward, vae.decode))
    return ddpo.Policy(unet, vae, Scheduler.from_folder(folder / "scheduler").to(device), tokenizer, encoder, device, config.steps, config.eta, config.guidance)


def draw(run, prompts, places, epoch, description, each=None, whole=False):
    """Sample this process's pictures, those of `places` among the prompts -> Trajectories, images, a function: `ddpo.everyones` of numpy arrays (n, ...)."""
    run.optimizer.zero_grad()                           # the last update's gradients make room: 3.4 GB of SD v1.4
    with progress(description, "step", -(-len(places) // run.config.sample_batch) * run.config.steps) as bar:
        trajectories, images = run.policy.sample(prompts, (run.config.seed, epoch), run.config.sample_batch, bar.update, each, whole, places)
    return trajectories, images, lambda values: ddpo.everyones(torch.as_tensor(values), trajectories.places).numpy()


def evaluate(run, epoch):
    """Reward the fixed prompts and noises; write the grid of pictures and the figures behind it -> metrics."""
    (rank, world), c, prompts = ddpo.processes(), run.config, 2 * spread_prompts(run.prompts, run.config.eval_samples // 2)           # two of each, for the diversity
    _, images, of_all = draw(run, prompts, range(len(prompts))[rank::world], EVALUATION, "evaluating")
    scores = {name: of_all(checked(reward, images, prompts[rank::world])[0]) for name, reward in {"reward": run.reward, **run.watched}.items()}
    spread, images = diversity(of_all(run.clip(images)), prompts) if run.clip else None, of_all(images)
    if rank:
        return {}
    side, tile = math.ceil(len(images) ** 0.5), min(images.shape[1], 256)
    grid = Image.new("RGB", (side * tile, -(-len(images) // side) * tile))
    [grid.paste(Image.fromarray(image).resize((tile, tile)), (i % side * tile, i // side * tile)) for i, image in enumerate(images)]
    grid.save(run.out / "samples" / f"epoch_{epoch:04d}.png")
    write_json(run.out / "samples" / f"epoch_{epoch:04d}.json", {"epoch": epoch, "prompts": prompts, "rewards": scores["reward"].tolist(),
                                                                 **{name: scores[name].tolist() for name in run.watched}})
    base = np.array(json.loads((run.out / "samples" / "epoch_0000.json").read_text())["rewards"])
    gain, error = (scores["reward"] - base).mean(), (scores["reward"] - base).std(ddof=1) / len(base) ** 0.5
    return {"eval_queries": epoch * c.samples_per_epoch, "eval_diversity": spread, "eval_gain_sd": gain / max(base.std(), 1e-12),
            "eval_gain_se": gain / max(error, 1e-12), **{f"eval_{name}_{kind}": getattr(s, kind)() for name, s in scores.items() for kind in ("mean", "std")}}


def write_checkpoint(run, epoch):
    """checkpoints/000012: a diffusers UNet, or its LoRA alone; the optimizer; the rest as JSON. Written aside, renamed when whole."""
    aside = run.out / "checkpoints" / f"{epoch:06d}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_lora(run.policy.unet, aside) if run.config.lora_rank else save(run.policy.unet, aside / "unet")
    state = run.optimizer.state_dict()["state"]
    save_file({f"{i}.{name}": value.cpu().contiguous() for i, values in state.items() for name, value in values.items()}, aside / "optimizer.safetensors")
    (aside / "state.json").write_text(json.dumps({"epoch": epoch, "statistics": run.statistics.state_dict(), "scaler": run.scaler.state_dict()}))
    os.replace(aside, aside.with_suffix(""))
    for old in run.checkpoints()[:-2]:
        shutil.rmtree(old)


def read_checkpoint(run):
    """Everything back from the newest whole checkpoint -> the epochs behind it; 0 where there is none yet."""
    if not (found := run.checkpoints()):
        return 0
    unet, parameters, state = run.policy.unet, run.optimizer.param_groups[0]["params"], {}
    try:
        load_lora(unet, found[-1]) if run.config.lora_rank else unet.load_state_dict(load(UNet, found[-1] / "unet").state_dict())
        with safe_open(found[-1] / "optimizer.safetensors", "pt") as file:
            for (i, name), value in ((key.split("."), file.get_tensor(key)) for key in file.keys()):             # moments are laid out in memory as their
                state.setdefault(int(i), {})[name] = torch.empty_like(parameters[int(i)]).copy_(value) if value.ndim else value         # parameter is; `step` is a scalar
        run.optimizer.load_state_dict({**run.optimizer.state_dict(), "state": state})
        rest = json.loads((found[-1] / "state.json").read_text())
        run.statistics.load_state_dict(rest["statistics"]), run.scaler.load_state_dict(rest.get("scaler", {}))
        print(f"resuming from {found[-1]}")
        return rest["epoch"]
    except Exception as error:                          # whatever a broken file raises
        raise ValueError(f"{found[-1]} cannot be read ({error}); if it is broken, delete it to go on from the checkpoint before") from None


def write_json(path, value):
    """A list as lines, anything else as one document. Aside, then renamed: readers find the old text or the new, never half of one."""
    text = "".join(json.dumps(line, default=str) + "\n" for line in value) if isinstance(value, list) else json.dumps(value, indent=1) + "\n"
    (aside := path.with_name(path.name + ".tmp")).write_text(text)
    aside.replace(path)


def read_lines(path, before=math.inf):
    """The whole lines of a .jsonl file, up to an epoch -> list of dicts."""
    whole = [text for text in path.read_text().splitlines() if text.endswith("}")] if path.is_file() else []
    return [line for line in map(json.loads, whole) if line["epoch"] < before]


def write_metrics(run, metrics, evaluation):
    """Add the epoch's line to metrics.jsonl with the alarms it sets off; print it, and the new alarms; stop the run at a number that is not finite."""
    before, line = read_lines(path := run.out / "metrics.jsonl"), {**evaluation, **metrics}             # the first line keeps the base model's evaluation
    found = ddpo.alarms([*before, line], run.config.updates - 1 if run.config.algorithm == "ddpo-is" else 0)
    clean = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in line.items()}
    write_json(path, [*before, {**clean, "warnings": list(found)}])
    moved = "kl {approx_kl:.1e}  clipped {clip_fraction:4.0%}  " if line["approx_kl"] is not None else ""
    print(("epoch {epoch:3d}  queries {reward_queries:6d}  reward {reward_mean:8.3f} +- {reward_std:.3f}  " + moved + "grad {grad_norm:.2g}  {seconds:.0f} s").format(
        **line, seconds=sum(line[name] for name in line if name.startswith("seconds"))), flush=True)
    if evaluation:
        print("    fixed pictures: {eval_reward_mean:.3f} +- {eval_reward_std:.3f}, a gain of {eval_gain_sd:.2f} standard deviations of the base model's "
              "rewards = {eval_gain_se:.1f} paired standard errors".format(**evaluation), flush=True)
    for name in set(found) - set(before[-1].get("warnings", []) if before else []):
        print(f"warning ({name}), epoch {line['epoch']}: {found[name]}", flush=True)
    if "not finite" in found:
        raise ValueError(f"epoch {line['epoch']}: {found['not finite']}, " + (
            f"with --resume from {run.checkpoints()[-1]}" if run.checkpoints() else "in another --out: there is no checkpoint yet"))


def draw_curve(out, config):
    """reward.png against reward queries: the reward; and all that is watched on the fixed pictures, in the base model's deviations."""
    lines, (left, right) = read_lines(out / "metrics.jsonl"), (figure := Figure(figsize=(12, 4.5), layout="constrained")).subplots(1, 2)
    mean, std, queries = (np.array([line[k] for line in lines]) for k in ("reward_mean", "reward_std", "reward_queries"))
    queries -= config.samples_per_epoch                 # sampled before the epoch's updates
    left.plot(queries, mean, label="training samples (mean, std)")
    left.fill_between(queries, mean - std, mean + std, alpha=0.15)
    base, *_ = evaluated = [line for line in lines if "eval_queries" in line]
    for name in [key[5:-5] for key in base if key.startswith("eval_") and key.endswith("_mean")]:
        at, means = np.array([(line["eval_queries"], line[f"eval_{name}_mean"]) for line in evaluated]).T
        right.plot(at, (means - means[0]) / (base[f"eval_{name}_std"] or 1), "o-", label=name)
        name == "reward" and left.plot(at, means, "o-", label="fixed pictures")
    left.set(xlabel="reward queries", ylabel=config.reward, title=f"{config.algorithm} on {config.reward}")
    right.set(xlabel="reward queries", ylabel="gain in the base model's deviations", title="fixed pictures")
    left.legend(), right.legend()
    figure.savefig(out / "reward.png")


def resumed(given):
    """With --resume, the settings of the run in --out under those given now, of which only a few may differ; without, --out must hold none."""
    stored = Path(given.get("out", os.devnull)) / "config.json"
    if stored.is_file() != given.get("resume", False):
        raise ValueError(f"--out {given['out']} holds a run already: add --resume to go on with it, or choose another folder" if stored.is_file() else
                         f"--resume needs --out FOLDER, that of the run to go on with; {given.get('out')} holds no config.json")
    before = json.loads(stored.read_text()) if given.get("resume") else {}
    if not isinstance(before, dict) or not set(before) <= {f.name for f in dataclasses.fields(Config)}:
        raise ValueError(f"{stored} was written by another version of train.py, or by another program")
    free = {"out", "resume", "debug", "epochs", "lr", "device", "vlm_url", "reward_device", "micro_batch", "sample_batch", "grad_checkpointing"}
    for name in set(given) - free if before else ():
        if before.get(name) != given[name]:
            raise ValueError(f"--resume goes on with the settings of {stored}: leave out --{name.replace('_', '-')}")
    return {**before, **given}


def prepare(given):
    """Everything loaded, and the run's folder -> all that a run holds. What can be refused is refused before the folder is made."""
    given = resumed(given)
    ddpo.join(device := choose_device(given.get("device", Config.device)))
    sys.stdout = open(os.devnull, "w") if ddpo.processes()[0] else sys.stdout          # one voice is enough
    if (model := given.get("model", Config.model)) == "auto":
        model, why = ("CompVis/stable-diffusion-v1-4", "a") if device.type == "cuda" else ("zoo", "no")
        print(f"model: {model}, since there is {why} CUDA GPU (others: --model)")
    config = resolve({**given, "model": model}, folder := ZOO if model == "zoo" else locate(model))
    prompts, policy = load_prompts(config.prompts), load_policy(folder, device, config)
    policy.scheduler.timesteps(config.steps)            # refuses an impossible T
    reward = make_reward(config.reward, config, reward_device := choose_device(config.reward_device or str(device), "--reward-device"))
    names = [name.strip() for name in config.metrics.split(",") if name.strip() not in ("", config.reward)]
    watched = {name.rpartition(":")[2]: make_reward(name, config, reward_device) for name in names}
    if len(watched) < len(names) or {"reward", "rewards", "prompts", "epoch"} & set(watched):
        raise ValueError(f"--metrics {config.metrics}: the names must differ, also from reward, rewards, prompts and epoch")
    try:
        clip = clip_embedder(config.clip, reward_device)
    except ValueError as error:
        clip = print(f"diversity is not measured: {error}")             # None
    config.out = config.out or str(Path("runs") / f"{config.reward.rpartition(':')[2]}-{config.algorithm}-{time.strftime('%Y%m%d-%H%M%S')}")
    return SimpleNamespace(
        config=config, out=Path(config.out), policy=policy, prompts=prompts, reward=reward, watched=watched, clip=clip,
        checkpoints=lambda: sorted((Path(config.out) / "checkpoints").glob("[0-9]" * 6)),
        optimizer=torch.optim.AdamW((p for p in policy.unet.parameters() if p.requires_grad), config.lr, weight_decay=config.weight_decay, fused=device.type == "cuda"),
        scaler=torch.amp.GradScaler(device.type, enabled=config.precision == "fp16"), statistics=ddpo.PromptStatistics(config.history_size, config.min_count),
        apart=reward_device != device or (config.reward == "alignment" and bool(config.vlm_url)))           # rewarded while the next batch is drawn


def loop(run):
    """The epochs, from the newest checkpoint on."""
    config, out, start = run.config, run.out, read_checkpoint(run) if run.config.resume else 0
    if start >= config.epochs:
        raise ValueError(f"--epochs {config.epochs}: the run in {out} has {start} epochs behind it already")
    if first := ddpo.processes()[0] == 0:
        (out / "samples").mkdir(parents=True, exist_ok=True)
        write_json(out / "config.json", dataclasses.asdict(config))
        for path in (out / "metrics.jsonl", out / "descriptions.jsonl"):
            write_json(path, read_lines(path, before=start))
    print(f"{config.algorithm} on {config.reward}: {config.epochs} epochs of {config.samples_per_epoch} pictures, into {out}", flush=True)
    for epoch, done in enumerate(range(start + 1, config.epochs + 1), start):
        metrics = {"epoch": epoch, "reward_queries": done * config.samples_per_epoch, **(evaluate(run, 0) if epoch == 0 else {}), **one_epoch(run, epoch)}
        evaluation = evaluate(run, done) if done == config.epochs or done % config.eval_every == 0 else {}
        if first:
            write_metrics(run, metrics, evaluation)
            draw_curve(out, config)
            if done == config.epochs or done % config.checkpoint_every == 0:
                write_checkpoint(run, done)


def one_epoch(run, epoch):
    """Sample, reward, normalise, update: one round of the paper's loop -> metrics."""
    c, rewarded, clock, beside, (rank, world), name = run.config, [], [time.time()], ThreadPoolExecutor(1), ddpo.processes(), [run.config.seed, epoch, 1]
    drawn = draw_prompts(run.prompts, c.samples_per_epoch, c.samples_per_prompt, np.random.default_rng([c.seed, epoch]))
    places = sorted(ddpo.training_order(len(drawn), name)[rank::world].tolist())        # of this process

    def each(images, prompts):
        [future.result() for future in rewarded if future.done()]                       # a batch that failed ends the epoch at once
        rewarded.append(beside.submit(checked, run.reward, images, prompts))

    try:
        trajectories, images, of_all = draw(run, drawn, places, epoch, f"epoch {epoch}: sampling", each if run.apart else None, c.algorithm.startswith("ddpo"))
        clock.append(time.time())
        parts = [future.result() for future in rewarded] or [checked(run.reward, images, [drawn[i] for i in places])]
    finally:
        beside.shutdown(cancel_futures=True)
    scores = np.concatenate([part for part, _ in parts])
    if (shown := {name: sum((list(extra[name]) for _, extra in parts), []) for name in parts[0][1]}) and not rank:
        some = [(i, {key: shown[key][i] for key in shown}) for i in range(0, len(places), -(-len(places) // 8))]            # of eight pictures an epoch
        lines = [{"epoch": epoch, "prompt": drawn[places[i]], "score": scores[i], **what} for i, what in some]
        write_json(run.out / "descriptions.jsonl", read_lines(run.out / "descriptions.jsonl") + lines)
    trajectories.rewards, scores = torch.from_numpy(scores).float().to(run.policy.device), of_all(scores)
    metrics = {"reward_mean": scores.mean(), "reward_std": scores.std(), "diversity": diversity(of_all(run.clip(images)), drawn) if run.clip else None}
    del images                                          # 7.9 GB in a round of RWR on SD v1.4
    clock.append(time.time())
    pairs = c.batch_size // world * (1 if c.algorithm.startswith("rwr") else c.steps)               # of this process, in an update
    with progress(f"epoch {epoch}: training", "pass", -(-pairs // c.micro_batch) * c.updates) as bar:
        metrics |= ddpo.learn(run.policy, run.optimizer, trajectories, drawn, run.statistics, algorithm=c.algorithm, batch_size=c.batch_size, name=name,
                              lrs=[c.lr * min(1, (epoch * c.updates + n + 1) / (c.warmup + 1)) for n in range(c.updates)], w=1.0 if c.no_cfg_training else c.guidance, beta=c.beta, percentile=c.percentile, clip_range=c.clip_range, micro_batch=c.micro_batch,
                              max_grad_norm=c.max_grad_norm, scaler=run.scaler, tick=bar.update)
    return metrics | dict(zip(("seconds_sampling", "seconds_reward", "seconds_training"), np.diff([*clock, time.time()]).round(3).tolist()))


def main(argv=None):
    given = parse(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)           # torchrun's, when another process has died, or a job queue's: end as by Ctrl-C
    try:
        loop(prepare(given))
        if dist.is_initialized():
            dist.barrier(), dist.destroy_process_group()               # none leaves before the last checkpoint is written
    except (ValueError, OSError, RuntimeError) as error:
        rank, world = ddpo.processes()
        signal.signal(signal.SIGTERM, signal.SIG_IGN if world > 1 else signal.SIG_DFL)             # so that the line below comes through
        if given.get("debug") or (type(error) is RuntimeError and world == 1):
            raise
        hint = ("; try --precision bf16, --grad-checkpointing, --lora-rank 4, a smaller --micro-batch or --sample-batch" if isinstance(error, torch.OutOfMemoryError) else
                "; where another process has died, its own line says why, and --resume goes on" if isinstance(error, RuntimeError) else "")
        sys.exit(f"train.py: {f'process {rank} of {world}: ' if world > 1 else ''}{' '.join(str(error).split())}{hint}")
    except KeyboardInterrupt:
        sys.exit("train.py: stopped; where a checkpoint was written, --out and the run's folder with --resume go on from it")


if __name__ == "__main__":
    main()
