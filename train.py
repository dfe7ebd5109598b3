"""Fine-tune Stable Diffusion by reinforcement learning: `python train.py --reward aesthetic`.

The paper's loop (Sec. 4, App. D): draw prompts, sample pictures with the present policy, reward
them, weigh them prompt by prompt, take some optimizer steps. `one_epoch` is that loop, and what it
calls follows; then settings, evaluation, checkpoints and pictures. The mathematics is in ddpo.py.

`torchrun --nproc-per-node 8 train.py ...` runs this program once a GPU: each process has its share
of the samples, the first one writes.

Settings: the command line, else the `ddpo.json` in the model's folder, else the paper's App. D.5.

Deviations from the paper, in the zoo's settings and off by default: with --samples-per-prompt
prompts repeat within an epoch, so that per-prompt statistics mean something at once; with --warmup
lr rises over the first updates, for Adam's first steps move every weight by all of it.
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
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

import ddpo
from ddpo import ALGORITHMS, gather, share
from rewards import REWARDS, checked, clip_embedder, diversity, load_object, make_reward
from scheduler import NoiseSchedule, Sampler, UserError, require
from unet import (
    VAE,
    UNet,
    add_lora,
    load,
    load_lora,
    loading,
    locate,
    save,
    save_lora,
    save_tensors,
)

HERE = Path(__file__).parent
ZOO = HERE / "tutorial" / "zoo" / "stable-diffusion"
PROMPT_SETS = HERE / "tutorial" / "prompts"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EVALUATION = 2**31  # stands for the epoch in the names of the fixed evaluation noises


def one_epoch(run, epoch):
    """Sample, reward, weigh, update: one round of the paper's loop -> metrics."""
    clock = [time.time()]
    prompts = prompts_of_epoch(run, epoch)
    records, images = roll_out(run, prompts, epoch)
    clock.append(time.time())

    rewards = score(run, images, prompts, epoch)
    observed = observe(run, rewards, images, prompts)
    del images  # 7.9 GB in a round of RWR on SD v1.4
    clock.append(time.time())

    weights = run.algorithm.weights(prompts, torch.from_numpy(rewards))
    learned = train_epoch(run, records, prompts, weights, epoch)
    clock.append(time.time())

    parts = ("seconds_sampling", "seconds_reward", "seconds_training")
    return {**observed, **learned, **dict(zip(parts, np.diff(clock).round(3).tolist()))}


def prompts_of_epoch(run, epoch):
    """The prompts of all processes' samples, drawn by the name of the epoch -> list of str."""
    c = run.config
    rng = np.random.default_rng([c.seed, epoch])
    return draw_prompts(run.prompts, c.samples_per_epoch, c.samples_per_prompt, rng)


def roll_out(run, prompts, epoch):
    """Sample this process's share of the pictures -> records for training, images."""
    records, images = [], []
    for trajectories, drawn in draw(run, prompts, epoch, f"epoch {epoch}: sampling"):
        records.append(run.algorithm.record(trajectories))
        images.append(drawn)
    return records, np.concatenate(images)


def draw(run, prompts, epoch, description):
    """This process's share of the pictures -> yields Trajectories, images uint8 (b, H, W, 3)."""
    c = run.config
    run.optimizer.zero_grad()  # the last update's gradients make room: 3.4 GB of SD v1.4
    names = [(c.seed, epoch, i) for i in share(range(len(prompts)))]
    batches = math.ceil(len(names) / c.sample_batch)
    with progress(description, "step", batches * c.steps) as bar:
        yield from run.policy.sample(share(prompts), names, c.sample_batch, bar.update)


def score(run, images, prompts, epoch):
    """The rewards of all processes' pictures, float64 (N,).

    What the reward shows of this process's own, of eight an epoch, goes to descriptions.jsonl.
    """
    mine = share(prompts)
    scores, shown = checked(run.reward, images, mine)
    if shown and ddpo.processes()[0] == 0:
        lines = read_lines(run.out / "descriptions.jsonl")
        for i in range(0, len(mine), math.ceil(len(mine) / 8)):
            more = {name: values[i] for name, values in shown.items()}
            lines.append({"epoch": epoch, "prompt": mine[i], "score": scores[i], **more})
        write_json(run.out / "descriptions.jsonl", lines)
    return gathered(scores)


def gathered(values):
    """`ddpo.gather` of a numpy array or a tensor -> numpy array."""
    return gather(torch.as_tensor(values)).numpy()


def observe(run, rewards, images, prompts):
    """What is to be seen of an epoch's pictures and rewards -> metrics."""
    spread = diversity(gathered(run.clip(images)), prompts) if run.clip else None
    return {"reward_mean": rewards.mean(), "reward_std": rewards.std(), "diversity": spread}


def train_epoch(run, records, prompts, weights, epoch):
    """The optimizer steps of an epoch -> their metrics, averaged; None: there are no ratios."""
    c, policy, algorithm, optimizer = run.config, run.policy, run.algorithm, run.optimizer
    name, updates = [c.seed, epoch, 1], []
    if algorithm.fresh_optimizer:
        optimizer.state.clear()
    with progress(f"epoch {epoch}: training", "update", c.updates) as bar:
        for batch in algorithm.batches(policy, records, prompts, weights, name):
            number = epoch * c.updates + len(updates) + 1
            optimizer.param_groups[0]["lr"] = c.lr * min(1, number / (c.warmup + 1))
            limits = (c.micro_batch, c.max_grad_norm, run.scaler)
            updates.append(ddpo.optimizer_step(policy, algorithm, optimizer, batch, *limits))
            bar.update()
    ratios = ("approx_kl", "clip_fraction", "clip_fraction_by_step", "first_ratio_error")
    return {**dict.fromkeys(ratios), **ddpo.averaged(updates)}


def setting(default, help, rules="", least=None):
    """A field of `Config` with its rules, which are words.

    free: it may differ after --resume. user: a model's ddpo.json may not set it.
    least: the smallest number it may be; by default any above 0.
    """
    return dataclasses.field(
        default=default, metadata={"help": help, "rules": rules, "least": least}
    )


@dataclasses.dataclass
class Config:
    """Every setting, flat. Defaults are the paper's (App. D.5, DDPO_IS) where it has one."""

    reward: str = setting("aesthetic", f"{', '.join(REWARDS)}, or file.py:function", "user")
    algorithm: str = setting("ddpo-is", f"{', '.join(ALGORITHMS)}, or file.py:Class", "user")
    set: list = setting(
        None, "name=value: a setting of the algorithm's own; may be repeated", "user"
    )
    model: str = setting(
        "auto", "auto, zoo, a hub id, or a folder in diffusers' layout", "user free"
    )
    prompts: str = setting("imagenet-animals", "a named set, or a text file, one prompt a line")

    epochs: int = setting(50, "rounds of sampling and training", "free")
    samples_per_epoch: int = setting(256, "pictures an epoch (paper: 256; RWR 10,000)")
    samples_per_prompt: int = setting(1, "pictures of each prompt in an epoch (paper: 1)")
    steps: int = setting(50, "denoising steps T (paper: 50)")
    eta: float = setting(1.0, "DDIM's noise: 1 as DDPM; 0 has no policy gradient", least=0)
    guidance: float = setting(5.0, "guidance weight w (paper: 5.0)", least=0)
    lr: float = setting(1e-5, "AdamW's learning rate (paper: 1e-5; LoRA 3e-4)", "free")
    warmup: int = setting(0, "updates over which lr rises to its value (paper: 0)", least=0)
    weight_decay: float = setting(1e-4, "AdamW's weight decay (paper: 1e-4)", least=0)
    max_grad_norm: float = setting(1.0, "gradient clipping (paper: 1.0)")
    clip_range: float = setting(1e-4, "DDPO_IS: how far a ratio may leave 1 (paper: 1e-4)")
    batch_size: int = setting(None, "pictures an update (paper: 64; DDPO_SF 256; RWR 128)")
    updates: int = setting(None, "RWR: updates an epoch (paper: 400); DDPO: each picture once")
    beta: float = setting(0.2, "RWR: inverse temperature, per unit of reward (paper: 0.2)")
    percentile: float = setting(0.9, "RWR-sparse: keep a prompt's rewards from it on", least=0)
    no_cfg_training: bool = setting(False, "RWR: train the unguided prediction (App. E.1)")
    history_size: int = setting(32, "rewards of a prompt to normalise by (code: 32)")
    min_count: int = setting(16, "rewards of a prompt before they are used for it (code: 16)")

    lora_rank: int = setting(0, "train a LoRA of this rank, not the UNet (App. C)", "user", least=0)
    precision: str = setting("fp32", "of the networks' arithmetic: fp32, bf16, fp16", "user")
    grad_checkpointing: bool = setting(False, "less memory, a third more time", "free")
    micro_batch: int = setting(8, "pairs a pass; best like --sample-batch (ratios)", "free")
    sample_batch: int = setting(8, "pictures sampled at a time", "free")

    eval_every: int = setting(5, "epochs between evaluations")
    eval_samples: int = setting(64, "fixed evaluation pictures, of fixed noises", least=2)
    checkpoint_every: int = setting(10, "epochs between checkpoints; the last two are kept")
    metrics: str = setting("compressibility", "other rewards to watch, separated by commas")

    clip: str = setting("openai/clip-vit-large-patch14", "CLIP: aesthetic, diversity", "free")
    aesthetic_head: str = setting("trl-lib/ddpo-aesthetic-predictor", "LAION's predictor", "free")
    vlm: str = setting("llava-hf/llava-1.5-7b-hf", "LLaVA, for the alignment reward", "free")
    vlm_url: str = setting(None, "or a chat-completions server: http://HOST:PORT/v1", "user free")
    vlm_question: str = setting("Answer concisely: what is going on in this image?", "its question")
    bert: str = setting("microsoft/deberta-xlarge-mnli", "BERTScore's encoder", "free")
    bert_layer: int = setting(40, "its layer (bert-score: 40)")
    reward_device: str = setting(None, "for reward models, beside the sampling", "user free")

    seed: int = setting(0, "of everything random", "user", least=0)
    device: str = setting("auto", "cuda, cpu, mps ...; auto: cuda where there is one", "user free")
    out: str = setting(None, "the run's folder; by default a new one in runs/", "user free")
    resume: bool = setting(False, "go on from the newest checkpoint in --out", "user free")
    debug: bool = setting(False, "tracebacks instead of one line", "user free")


HEADINGS = {  # of --help, and the first setting below each
    "reward": "what to learn",
    "epochs": "the paper's numbers",
    "lora_rank": "memory and speed",
    "eval_every": "evaluation and checkpoints",
    "clip": "reward models: a folder or a hub id each",
    "seed": "the run",
}
FIELDS = {f.name: f for f in dataclasses.fields(Config)}
PATHS = ("prompts", "metrics", "clip", "aesthetic_head", "vlm", "bert")  # "../" in a ddpo.json
PROMPTS_OF_REWARD = {  # Sec. 6
    "aesthetic": {"prompts": "common-animals"},
    "alignment": {"prompts": "animal-activities"},
}


def flag(name):
    """samples_per_epoch -> --samples-per-epoch."""
    return "--" + name.replace("_", "-")


def parse(argv):
    """Command line -> the options given there, as {name: value}."""
    parser = argparse.ArgumentParser(
        description="Fine-tune Stable Diffusion by reinforcement learning (DDPO).",
        argument_default=argparse.SUPPRESS,
    )
    kinds = {bool: {"action": "store_true"}, list: {"action": "append"}}
    for name, f in FIELDS.items():
        if name in HEADINGS:
            group = parser.add_argument_group(HEADINGS[name])
        options = kinds.get(f.type, {"type": f.type, "metavar": f.type.__name__})
        default = f" [{f.default}]" if f.default not in (None, False) else ""
        group.add_argument(flag(name), help=f.metadata["help"] + default, **options)
    return vars(parser.parse_args(argv))


def model_settings(folder, given):
    """The model's own ddpo.json: {"all": {...}, and by reward, algorithm or "lora"}.

    {} where there is none. What `given` overrides is not looked at. Raises UserError.
    """
    path, known = folder / "ddpo.json", ["all", *REWARDS, *ALGORITHMS, "lora"]
    own = read_json(path) if path.is_file() else {}
    require(
        isinstance(own, dict) and set(own) <= set(known) and {*map(type, own.values())} <= {dict},
        f'{path}: needed is JSON such as {{"all": {{"steps": 20}}}}, of {", ".join(known)}',
    )
    settings = [item for part in own.values() for item in part.items() if item[0] not in given]
    for name, value in settings:
        f = FIELDS.get(name)
        kinds = (int, float) if f and f.type is float else (f and f.type,)
        require(
            type(value) in kinds and "user" not in f.metadata["rules"],
            f"{path} sets {name} = {value!r}: no setting of a model, or not of its type",
        )
        require(
            ".py:" not in str(value) or folder.resolve() == ZOO.resolve(),
            f"{path} sets {name} = {value!r}: a model's settings may run no code; "
            f"give {flag(name)} yourself",
        )
    return own


def merge(given, folder, algorithm):
    """The command line over the model's ddpo.json over the paper's numbers -> Config."""
    own = model_settings(folder, given)
    reward, name = given.get("reward", Config.reward), given.get("algorithm", Config.algorithm)
    paper = {**algorithm.defaults, **PROMPTS_OF_REWARD.get(reward, {})}
    parts = ["all", reward, "lora", name]  # the later one wins
    if given.get("lora_rank"):
        paper["lr"] = 3e-4  # App. C
    else:
        parts.remove("lora")
    layers = [paper, *[own.get(part, {}) for part in parts], given]
    return Config(**{key: value for layer in layers for key, value in layer.items()})


def check(config, given, algorithm):
    """Fill in what the algorithm decides, and refuse what cannot be. Raises UserError."""
    c, world = config, ddpo.processes()[1]
    for name, f in FIELDS.items():
        value, least = getattr(c, name), f.metadata["least"]
        if f.type in (int, float) and value is not None:
            bound = "above 0" if least is None else f"at least {least}"
            fits = math.isfinite(value) and (value > 0 if least is None else value >= least)
            require(fits, f"{flag(name)} {value}: must be finite and {bound}")
    algorithm.settle(c, given)
    n, per_prompt = c.samples_per_epoch, c.samples_per_prompt
    pictures = c.eval_samples // 2 * 2
    require(c.precision in PRECISIONS, f"--precision {c.precision}: fp32, bf16 or fp16")
    require(c.eta <= 1, f"--eta {c.eta:g}: at most 1")
    require(c.percentile <= 1, f"--percentile {c.percentile:g}: from 0 (keep all) to 1 (the best)")
    require(
        c.min_count <= c.history_size,
        f"--min-count {c.min_count} is more than --history-size {c.history_size}: "
        "no prompt would ever have enough",
    )
    require(
        n % per_prompt == 0,
        f"--samples-per-epoch {n} must be a multiple of --samples-per-prompt ({per_prompt})",
    )
    require(
        n % world == c.batch_size % world == pictures % world == 0,
        f"--samples-per-epoch {n}, --batch-size {c.batch_size} and --eval-samples {pictures} "
        f"must be multiples of the number of processes, {world}",
    )


def placed(config, folder):
    """The settings with paths that a ddpo.json gives relative to its folder made whole."""
    whole = {}
    for name in PATHS:
        items = getattr(config, name).split(",")
        items = [str((folder / i).resolve()) if i.startswith("../") else i for i in items]
        whole[name] = ",".join(items)
    return dataclasses.replace(config, **whole)


def resumed(given):
    """With --resume, the settings of the run in --out, under those given now. Raises UserError."""
    out, resume = given.get("out"), given.get("resume", False)
    stored = Path(out or os.devnull) / "config.json"
    require(
        resume or not stored.is_file(),
        f"--out {out} holds a run already: add --resume to go on with it, or choose another folder",
    )
    if not resume:
        return given
    require(
        stored.is_file(),
        f"--resume needs --out FOLDER, that of the run to go on with; {out} holds no config.json",
    )
    before = read_json(stored)
    require(
        isinstance(before, dict) and set(before) <= set(FIELDS),
        f"{stored} was written by another version of train.py, or by another program",
    )
    for name in given:
        same = before.get(name) == given[name]
        if ".py:" in str(given[name]):  # the file may have moved
            same = str(before.get(name)).rpartition(":")[2] == given[name].rpartition(":")[2]
        require(
            same or "free" in FIELDS[name].metadata["rules"],
            f"--resume goes on with the settings of {stored}: leave out {flag(name)}",
        )
    return {**before, **given}


def choose_device(name, option="--device"):
    """auto: a CUDA GPU (under torchrun each process has its own), else the CPU. -> torch.device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"{option} {name}: {str(error).splitlines()[0]}") from None


def load_prompts(name):
    """The prompts of a named set, or of a text file, one a line -> list of str, each once."""
    named = sorted(path.stem for path in PROMPT_SETS.glob("*.txt"))
    path = PROMPT_SETS / f"{name}.txt" if name in named else Path(name)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    except OSError:
        raise UserError(
            f"--prompts {name}: neither a file that can be read nor one of {', '.join(named)}"
        ) from None
    require("\0" not in text, f"--prompts {name}: not a text file in UTF-8")
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    require(prompts, f"--prompts {name}: no prompt in it; one prompt a line")
    return list(dict.fromkeys(prompts))


def draw_prompts(prompts, samples, repeats, rng):
    """The prompts of an epoch's samples. The paper draws each independently: repeats = 1.

    With more, samples / repeats prompts are drawn, without repetition while there are enough, and
    taken `repeats` times each, shuffled. rng: a numpy Generator -> list of `samples` str.
    """
    count = samples // repeats
    distinct = repeats > 1 and count <= len(prompts)
    drawn = rng.choice(len(prompts), size=count, replace=not distinct)
    return [prompts[i] for i in rng.permutation(np.repeat(drawn, repeats))]


def spread_prompts(prompts, count):
    """`count` prompts to evaluate on, spread over the whole set, or going round it."""
    if len(prompts) > count:
        return [prompts[i * len(prompts) // count] for i in range(count)]
    return [prompts[i % len(prompts)] for i in range(count)]


def load_policy(folder, device, config):
    """A Stable Diffusion folder -> ddpo.Policy.

    Trained weights are float32, frozen ones of the precision asked for.
    """
    from transformers import CLIPTextModel, CLIPTokenizer

    dtype, rank = PRECISIONS[config.precision], config.lora_rank
    # fp32 is float32; else what stays float32 may use TF32
    torch.backends.cuda.matmul.allow_tf32 = dtype != torch.float32
    torch.backends.cudnn.allow_tf32 = dtype != torch.float32
    unet = load(UNet, folder / "unet", dtype if rank else torch.float32)
    if rank:
        unet = add_lora(unet, rank, config.seed)
    unet.gradient_checkpointing = config.grad_checkpointing
    # on a CPU channels_last makes the full-size backward pass a tenth slower
    on_gpu = torch.channels_last if device.type == "cuda" else None
    vae = load(VAE, folder / "vae", dtype).requires_grad_(False)
    schedule = NoiseSchedule.from_folder(folder / "scheduler").to(device)
    encoder = loading("--model", folder, CLIPTextModel, folder / "text_encoder", dtype=dtype)
    tokenizer = loading("--model", folder, CLIPTokenizer, folder / "tokenizer")
    limit = encoder.config.max_position_embeddings
    tokenizer.model_max_length = min(tokenizer.model_max_length, limit)  # absent: 1e30
    return ddpo.Policy(
        unet=unet.to(device, memory_format=on_gpu),
        vae=vae.to(device, memory_format=torch.channels_last),
        sampler=Sampler(schedule, config.steps, config.eta),
        tokenizer=tokenizer,
        text_encoder=encoder.to(device).requires_grad_(False),
        device=device,
        guidance=config.guidance,
        dtype=dtype,
    )


@dataclasses.dataclass
class Run:
    """All that a run holds."""

    config: Config  # as used: paths are whole
    stored: dict  # as written to config.json
    out: Path
    policy: ddpo.Policy
    algorithm: ddpo.Algorithm
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    prompts: list  # of str
    reward: object  # a function (images, prompts) -> scores
    watched: dict  # {name: another such function}
    clip: object  # rewards.ClipEmbedder, or None

    def checkpoints(self):
        """The folders of the whole checkpoints, oldest first."""
        return sorted((self.out / "checkpoints").glob("[0-9]" * 6))


def choose_model(given, device):
    """The model to load -> its name, its folder."""
    model = given.get("model", Config.model)
    if model == "auto":
        model, why = "zoo", "no"
        if device.type == "cuda":
            model, why = "CompVis/stable-diffusion-v1-4", "a"
        print(f"model: {model}, since there is {why} CUDA GPU (others: --model)")
    return model, ZOO if model == "zoo" else locate(model)


def choose_algorithm(name):
    """One of ALGORITHMS, or a class from a user's file. Raises UserError."""
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    known = ", ".join(ALGORITHMS)
    require(".py:" in name, f"--algorithm {name}: neither one of {known} nor a file.py:Class")
    algorithm = load_object(name, "--algorithm")
    require(
        isinstance(algorithm, type) and issubclass(algorithm, ddpo.Algorithm),
        f"--algorithm {name}: must be a class derived from ddpo.Algorithm, or one of its children",
    )
    return algorithm


def set_own(algorithm, texts):
    """--set name=value for the numbers and words among the algorithm's class attributes."""
    cls = type(algorithm)
    names = [name for name in dir(cls) if name[0] != "_"]
    kinds = {name: type(getattr(cls, name)) for name in names}
    known = [name for name, kind in kinds.items() if kind in (int, float, str)]
    for text in texts or []:
        name, _, value = text.partition("=")
        require(name in known, f"--set {text}: {cls.__name__} knows {', '.join(known) or 'none'}")
        try:
            setattr(algorithm, name, kinds[name](value))
        except ValueError:
            raise UserError(f"--set {text}: must be of type {kinds[name].__name__}") from None


def prepare(given):
    """Everything loaded; what can be refused is refused before the run's folder is made -> Run."""
    given = resumed(given)
    device = choose_device(given.get("device", Config.device))
    ddpo.join(device)
    if ddpo.processes()[0]:
        sys.stdout = open(os.devnull, "w")  # one voice is enough
    model, folder = choose_model(given, device)
    algorithm = choose_algorithm(given.get("algorithm", Config.algorithm))
    stored = merge({**given, "model": model}, folder, algorithm)
    check(stored, given, algorithm)
    name = f"{stored.reward.rpartition(':')[2]}-{stored.algorithm.rpartition(':')[2]}"
    stored.out = stored.out or str(Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")

    config = placed(stored, folder)
    if given.get("resume"):
        prompts = read_json(Path(stored.out) / "prompts.json")["prompts"]
    else:
        prompts = load_prompts(config.prompts)
    policy = load_policy(folder, device, config)
    warn_of_twins(prompts, policy.tokenizer)
    algorithm = algorithm(config)
    set_own(algorithm, config.set)
    algorithm.setup(policy)
    trained = [p for p in policy.unet.parameters() if p.requires_grad]
    options = {"weight_decay": config.weight_decay, "fused": device.type == "cuda"}
    optimizer = torch.optim.AdamW(trained, config.lr, **options)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    rewards = load_rewards(config, device)
    stored, out = dataclasses.asdict(stored), Path(stored.out)
    return Run(config, stored, out, policy, algorithm, optimizer, scaler, prompts, *rewards)


def warn_of_twins(prompts, tokenizer):
    """Say where prompts differ only beyond what the text encoder reads."""
    seen = {}
    for prompt in prompts:
        twin = seen.setdefault(tuple(tokenizer(prompt, truncation=True).input_ids), prompt)
        if twin != prompt:
            limit = tokenizer.model_max_length
            print(f"warning: alike in the {limit} tokens that are read: {twin!r}, {prompt!r}")


def load_rewards(config, device):
    """The reward, those to watch beside it {name: function}, and CLIP, or None."""
    device = choose_device(config.reward_device or str(device), "--reward-device")
    reward = make_reward(config.reward, config, device)
    names = [name.strip() for name in config.metrics.split(",")]
    names = [name for name in names if name not in ("", config.reward)]
    watched = {name.rpartition(":")[2]: make_reward(name, config, device) for name in names}
    taken = {"reward", "rewards", "prompts", "epoch"}
    require(
        len(watched) == len(names) and not taken & set(watched),
        f"--metrics {config.metrics}: names must differ, also from {', '.join(sorted(taken))}",
    )
    try:
        return reward, watched, clip_embedder(config.clip, device)
    except UserError as error:
        print(f"diversity is not measured: {error}")
        return reward, watched, None


def loop(run):
    """The epochs, from the newest checkpoint on."""
    c, out, writes = run.config, run.out, ddpo.processes()[0] == 0
    start = read_checkpoint(run) if c.resume else 0
    require(
        start < c.epochs, f"--epochs {c.epochs}: the run in {out} has {start} behind it already"
    )
    if writes:
        with writing(out):
            (out / "samples").mkdir(parents=True, exist_ok=True)
        write_json(out / "config.json", run.stored)
        write_json(out / "prompts.json", {"prompts": run.prompts})
        for name in ("metrics.jsonl", "descriptions.jsonl"):
            write_json(out / name, read_lines(out / name, before=start))
    size = f"{c.epochs} epochs of {c.samples_per_epoch} pictures"
    print(f"{c.algorithm} on {c.reward}: {size}, into {out}", flush=True)
    for epoch in range(start, c.epochs):
        done = epoch + 1
        last = done == c.epochs
        base = evaluate(run, 0) if epoch == 0 else {}
        metrics = {"epoch": epoch, "reward_queries": done * c.samples_per_epoch, **base}
        metrics.update(one_epoch(run, epoch))
        evaluation = evaluate(run, done) if last or done % c.eval_every == 0 else {}
        if writes:
            write_metrics(run, metrics, evaluation)
            draw_curve(out, c)
            if last or done % c.checkpoint_every == 0:
                write_checkpoint(run, done)


def progress(text, unit, total):
    """A progress bar, of the first process, on a terminal."""
    quiet = True if ddpo.processes()[0] else None
    return tqdm(desc=text, unit=unit, total=total, leave=False, disable=quiet)


def evaluate(run, epoch):
    """Reward the fixed prompts and noises; write the pictures and their rewards -> metrics."""
    # two pictures of each prompt, for the diversity
    prompts = 2 * spread_prompts(run.prompts, run.config.eval_samples // 2)
    drawn = [images for _, images in draw(run, prompts, EVALUATION, "evaluating")]
    images = np.concatenate(drawn)
    scores = {}
    for name, reward in {"reward": run.reward, **run.watched}.items():
        scores[name] = gathered(checked(reward, images, share(prompts))[0])
    embeds = gathered(run.clip(images)) if run.clip else None
    images = gathered(images)
    if ddpo.processes()[0]:
        return {}
    path = run.out / "samples" / f"epoch_{epoch:04d}.png"
    with writing(path):
        grid(images).save(path)
    lists = {name: values.tolist() for name, values in scores.items()}
    lists = {"epoch": epoch, "prompts": prompts, "rewards": lists.pop("reward"), **lists}
    write_json(path.with_suffix(".json"), lists)
    base = np.array(read_json(path.with_name("epoch_0000.json"))["rewards"])
    metrics = {
        "eval_queries": epoch * run.config.samples_per_epoch,
        "eval_diversity": diversity(embeds, prompts) if run.clip else None,
        **gain_metrics(scores["reward"], base),
    }
    for name, values in scores.items():
        metrics[f"eval_{name}_mean"] = values.mean()
        metrics[f"eval_{name}_std"] = values.std()
    return metrics


def gain_metrics(rewards, base):
    """The gain on the base model's rewards: in their deviations, and as a paired t value."""
    gain = (rewards - base).mean()
    error = (rewards - base).std(ddof=1) / len(base) ** 0.5
    return {
        "eval_gain_sd": gain / max(base.std(), 1e-12),
        "eval_gain_t": gain / max(error, 1e-12),
    }


def grid(images):
    """Pictures (B, H, W, 3) in rows, each at most 256 pixels wide -> PIL image."""
    side, tile = math.ceil(len(images) ** 0.5), min(images.shape[1], 256)
    whole = Image.new("RGB", (side * tile, math.ceil(len(images) / side) * tile))
    for i, image in enumerate(images):
        place = (i % side * tile, i // side * tile)
        whole.paste(Image.fromarray(image).resize((tile, tile)), place)
    return whole


def write_checkpoint(run, epoch):
    """checkpoints/000012: the UNet or its LoRA, the optimizer, the rest as JSON.

    Written aside, renamed when whole; the last two are kept.
    """
    aside = run.out / "checkpoints" / f"{epoch:06d}.tmp"
    moments = run.optimizer.state_dict()["state"]
    state = {"epoch": epoch, "algorithm": run.algorithm.state_dict()}
    with writing(aside):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        if run.config.lora_rank:
            save_lora(run.policy.unet, aside)
        else:
            save(run.policy.unet, aside / "unet")
        tensors = {f"{i}.{name}": x for i, m in moments.items() for name, x in m.items()}
        save_tensors(tensors, aside / "optimizer.safetensors")
        write_json(aside / "state.json", {**state, "scaler": run.scaler.state_dict()})
        os.replace(aside, aside.with_suffix(""))
        for old in run.checkpoints()[:-2]:
            shutil.rmtree(old)


def read_checkpoint(run):
    """Everything back from the newest whole checkpoint -> the epochs behind it; 0: none yet."""
    if not run.checkpoints():
        return 0
    folder, unet = run.checkpoints()[-1], run.policy.unet
    try:
        if run.config.lora_rank:
            load_lora(unet, folder)
        else:
            unet.load_state_dict(load(UNet, folder / "unet").state_dict())
        read_moments(run.optimizer, folder / "optimizer.safetensors")
        state = read_json(folder / "state.json")
        run.algorithm.load_state_dict(state["algorithm"])
        run.scaler.load_state_dict(state["scaler"])
    except Exception as error:  # whatever a broken file raises
        raise UserError(
            f"{folder} cannot be read ({error}); if it is broken, delete it to go on from the "
            "checkpoint before"
        ) from error
    print(f"resuming from {folder}")
    return state["epoch"]


def read_moments(optimizer, path):
    """The optimizer's state, each moment laid out in memory as its parameter is."""
    parameters, state = optimizer.param_groups[0]["params"], {}
    with safe_open(path, "pt") as file:
        for key in file.keys():
            i, name = key.split(".")
            value = file.get_tensor(key)
            if value.ndim:  # `step` is a scalar
                value = torch.empty_like(parameters[int(i)]).copy_(value)
            state.setdefault(int(i), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


@contextmanager
def writing(path):
    """What the disk refuses in here ends in one line that names the file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {error}") from None


def write_json(path, value):
    """A list as lines, anything else as one document. Aside, then renamed: never half a file."""
    text = json.dumps(value, indent=1) + "\n"
    if isinstance(value, list):
        text = "".join(json.dumps(line, default=str) + "\n" for line in value)
    aside = path.with_name(path.name + ".tmp")
    with writing(path):
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)


def read_json(path):
    """A JSON file's value. Raises UserError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None


def read_lines(path, before=math.inf):
    """The whole lines of a .jsonl file, up to an epoch -> list of dicts."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    lines = [json.loads(line) for line in text.split("\n") if line.endswith("}")]
    return [line for line in lines if line["epoch"] < before]


def write_metrics(run, metrics, evaluation):
    """Add the epoch's line, with the alarms it sets off, to metrics.jsonl; print what is new."""
    before = read_lines(run.out / "metrics.jsonl")
    line = {**evaluation, **metrics}  # the first line keeps the base model's evaluation
    found = ddpo.alarms([*before, line], run.config.updates)
    numbers = {n: v for n, v in line.items() if not isinstance(v, float) or math.isfinite(v)}
    clean = {**dict.fromkeys(line), **numbers}  # JSON has no NaN: null in its place
    write_json(run.out / "metrics.jsonl", [*before, {**clean, "warnings": list(found)}])
    print(summary(line, evaluation), flush=True)
    known = before[-1].get("warnings", []) if before else []
    for name in found:
        if name not in known:
            print(f"warning ({name}), epoch {line['epoch']}: {found[name]}", flush=True)
    if "not finite" in found:
        whole = run.checkpoints()
        advice = f"--resume from {whole[-1]}" if whole else "another --out: there is no checkpoint"
        raise UserError(f"epoch {line['epoch']}: {found['not finite']}, with {advice}")


def summary(line, evaluation):
    """An epoch's metrics as text."""
    text = "epoch {epoch:3d}  queries {reward_queries:6d}  reward {reward_mean:8.3f}"
    text += " +- {reward_std:.3f}  "
    if line["approx_kl"] is not None:
        text += "kl {approx_kl:.1e}  clipped {clip_fraction:4.0%}  "
    text += "grad {grad_norm:.2g}  {seconds:.0f} s"
    if evaluation:
        text += "\n    fixed pictures: {eval_reward_mean:.3f} +- {eval_reward_std:.3f}, a gain of "
        text += "{eval_gain_sd:.2f} standard deviations of the base model's rewards = "
        text += "{eval_gain_t:.1f} paired standard errors"
    seconds = sum(value for name, value in line.items() if name.startswith("seconds"))
    return text.format(**{**line, **evaluation, "seconds": seconds})


def draw_curve(out, config):
    """reward.png: the reward against queries; and all that is watched, in the base's deviations."""
    lines = read_lines(out / "metrics.jsonl")
    evaluated = [line for line in lines if "eval_queries" in line]
    base, at = evaluated[0], [line["eval_queries"] for line in evaluated]
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    # an epoch's pictures are sampled before its updates
    queries = [line["reward_queries"] - config.samples_per_epoch for line in lines]
    means, stds = ([line[f"reward_{kind}"] for line in lines] for kind in ("mean", "std"))
    left.errorbar(queries, means, stds, alpha=0.5, label="training samples (mean, std)")
    left.plot(at, [line["eval_reward_mean"] for line in evaluated], "o-", label="fixed pictures")
    for name in [key[5:-5] for key in base if key.startswith("eval_") and key.endswith("_mean")]:
        means = np.array([line[f"eval_{name}_mean"] for line in evaluated])
        right.plot(at, (means - means[0]) / (base[f"eval_{name}_std"] or 1), "o-", label=name)
    left.set(xlabel="reward queries", ylabel=config.reward)
    right.set(xlabel="reward queries", ylabel="gain in the base model's deviations")
    left.set_title(f"{config.algorithm} on {config.reward}")
    right.set_title("fixed pictures")
    left.legend()
    right.legend()
    with writing(out / "reward.png"):
        figure.savefig(out / "reward.png")


def main(argv=None):
    """The program. Only what the user can mend ends in one line; the rest keeps its traceback."""
    given = parse(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # not all terminals can print all prompts
    # SIGTERM is torchrun's, when another process has died, or a job queue's: end as by Ctrl-C
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        loop(prepare(given))
        ddpo.leave()
    except UserError as error:
        stop(error, given)
    except torch.OutOfMemoryError as error:
        hint = "--precision bf16, --grad-checkpointing, --lora-rank 4, a smaller --micro-batch"
        stop(f"{error}; try {hint} or --sample-batch", given)
    except KeyboardInterrupt:
        sys.exit(
            "train.py: stopped; where a checkpoint was written, --out and the run's folder with "
            "--resume go on from it"
        )


def stop(error, given):
    """End with one line, or, with --debug, with the traceback."""
    rank, world = ddpo.processes()
    # so that torchrun does not end this process before its line comes through
    signal.signal(signal.SIGTERM, signal.SIG_IGN if world > 1 else signal.SIG_DFL)
    if given.get("debug"):
        raise
    who = f"process {rank} of {world}: " if world > 1 else ""
    sys.exit(f"train.py: {who}{' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
