"""Fine-tune Stable Diffusion by reinforcement learning: `python train.py --reward aesthetic`.

The paper's loop (Sec. 4, App. D): draw prompts, sample pictures with the present policy, reward
them, weigh them prompt by prompt, take some optimizer steps. `one_epoch` is that loop; settings,
evaluation and checkpoints follow. The mathematics is in ddpo.py. Behind `torchrun` this program
runs once a GPU: each process has its share of the samples, the first one writes.

Settings: the command line, else the model's `ddpo.json`, else the paper's App. D.5, in brackets in
--help; algorithms bring others. Not the paper's, off by default: --samples-per-prompt, statistics
by prompt from the first epoch on; --warmup, for Adam's first steps move every weight by all of lr.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

import ddpo
import unet
from ddpo import ALGORITHMS, gather, share
from rewards import REWARDS, checked, clip_embedder, diversity, load_object, make_reward
from scheduler import NoiseSchedule, Sampler, UserError, number, read_json, refusing, require

HERE = Path(__file__).parent
ZOO = HERE / "tutorial" / "zoo" / "stable-diffusion"
PROMPT_SETS = HERE / "tutorial" / "prompts"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NEEDED = ("epoch", "reward_queries", "reward_mean", "reward_std", "grad_norm", "clip_fraction")
FITTED = ("precision", "grad_checkpointing", "micro_batch", "sample_batch")  # to memory:
WAYS = ((False, 8), (False, 4), (True, 8), (True, 4), (True, 2), (True, 1))  # fast ones first
EVALUATION = 2**31  # stands for the epoch in the names of the fixed evaluation noises


def one_epoch(run, epoch):
    """Sample, reward, weigh, update: one round of the paper's loop -> metrics."""
    c, clock = run.config, [time.time()]
    rng = np.random.default_rng([c.seed, epoch])  # so that all processes draw the same
    prompts = draw_prompts(run.prompts, c.samples_per_epoch, c.samples_per_prompt, rng)  # c ~ p(c)
    records, images = roll_out(run, prompts, epoch, run.algorithm.record)  # x_T ... x_0 ~ p_theta
    clock.append(time.time())

    rewards, _ = score(run.rewards["reward"], images, prompts)  # r(x_0, c), of all samples
    observed = {"reward_mean": rewards.mean(), "reward_std": rewards.std()}
    observed["diversity"] = spread(run, images, prompts)
    del images  # 7.9 GB in a round of RWR on SD v1.4
    clock.append(time.time())

    weights = run.algorithm.weights(prompts, torch.from_numpy(rewards))  # DDPO: A; RWR: w
    learned = train_epoch(run, records, prompts, weights, epoch)  # theta
    clock.append(time.time())

    parts = ("seconds_sampling", "seconds_reward", "seconds_training")
    return {**observed, **learned, **dict(zip(parts, np.diff(clock).round(3).tolist()))}


def roll_out(run, prompts, epoch, record):
    """Sample this process's share of the pictures -> their records, images uint8 (n, H, W, 3)."""
    c, records, images = run.config, [], []
    names, begin = [(c.seed, epoch, i) for i in share(range(len(prompts)))], time.time()
    batches = run.policy.sample(share(prompts), names, c.sample_batch)
    count = math.ceil(len(names) / c.sample_batch)
    for trajectories, drawn in progress(batches, f"sampling{run.left}", count):
        records.append(record(trajectories))
        images.append(drawn)
        if epoch == 0 and len(images) == 1:
            all_of_it = tqdm.format_interval(c.epochs * count * (time.time() - begin))
            print(f"the run samples for about {all_of_it}, and DDPO trains for three times that")
    return records, np.concatenate(images)


def score(reward, images, prompts):
    """The rewards (N,) of all processes' pictures, and what the reward shows of this one's."""
    scores, shown = checked(reward, images, share(prompts))
    return gather(scores).numpy(), shown


def spread(run, images, prompts):
    """The diversity of all processes' pictures; None without CLIP."""
    return diversity(gather(run.clip(images)).numpy(), prompts) if run.clip else None


def train_epoch(run, records, prompts, weights, epoch):
    """The optimizer steps of an epoch -> metrics, averaged over them; null those of no ratio."""
    c, algorithm, optimizer = run.config, run.algorithm, run.optimizer
    name, before, updates = [c.seed, epoch, 1], epoch * c.updates, []  # 1: not the prompts' name
    limits = (c.micro_batch, c.max_grad_norm, run.scaler)
    if algorithm.fresh_optimizer:
        optimizer.state.clear()
        before = 0  # Adam's first steps again
    batches = algorithm.batches(run.policy, records, prompts, weights, name)
    for n, batch in enumerate(progress(batches, f"training{run.left}", c.updates), before + 1):
        optimizer.param_groups[0]["lr"] = c.lr * min(1, n / (c.warmup + 1))
        updates.append(ddpo.optimizer_step(run.policy, algorithm, optimizer, batch, *limits))
    optimizer.zero_grad()  # room for sampling: 3.4 GB of SD v1.4
    ratios = ("approx_kl", "clip_fraction", "first_ratio_error")
    return {**dict.fromkeys(ratios), **ddpo.averaged(updates)}


def setting(default, help, rules="", least=1, most=10**6):
    """A field of `Config`. least, most: the bounds of a number."""
    # rules: "free", it may differ after --resume; "user", a model's ddpo.json may not set it
    metadata = {"help": help, "rules": rules, "least": least, "most": most}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Config:
    """Every setting, flat. Defaults are the paper's (App. D.5, DDPO_IS) where it has one."""

    reward: str = setting("aesthetic", f"{', '.join(REWARDS)}, or file.py:function", "user")
    algorithm: str = setting("ddpo-is", f"{', '.join(ALGORITHMS)}, or file.py:Class")
    set: list = setting(None, "name=value, of the algorithm's own; may be repeated", "user")
    model: str = setting("auto", "auto, zoo, a hub id, or a diffusers folder", "user free")
    unet: str = setting(None, "a folder's UNet to start from, or LoRA of --lora-rank", "user free")
    prompts: str = setting("imagenet-animals", "a named set, or a text or .jsonl file, a line each")

    epochs: int = setting(50, "rounds of sampling and training", "free")
    samples_per_epoch: int = setting(256, "pictures an epoch (paper: 256; RWR 10,000)")
    samples_per_prompt: int = setting(1, "pictures of each prompt in an epoch (paper: 1)")
    steps: int = setting(50, "denoising steps T (paper: 50)")
    eta: float = setting(1.0, "DDIM's noise: 1 as DDPM; 0 has no policy gradient", least=0, most=1)
    guidance: float = setting(5.0, "guidance weight w (paper: 5.0)", least=0)
    lr: float = setting(1e-5, "AdamW's learning rate (paper: 1e-5; LoRA 3e-4)", "free", least=0)
    warmup: int = setting(0, "updates over which lr rises to its value (paper: 0)", least=0)
    weight_decay: float = setting(1e-4, "AdamW's weight decay (paper: 1e-4)", least=0)
    max_grad_norm: float = setting(1.0, "gradient clipping (paper: 1.0)", least=1e-9)
    clip_range: float = setting(1e-4, "DDPO_IS: how far a ratio may leave 1 (paper: 1e-4)", least=0)
    batch_size: int = setting(None, "pictures an update (paper: 64; DDPO_SF 256; RWR 128)")
    updates: int = setting(None, "RWR: updates an epoch (paper: 400); DDPO: each picture once")
    beta: float = setting(0.2, "RWR: inverse temperature, per unit of reward (paper: 0.2)", least=0)
    percentile: float = setting(0.9, "RWR-sparse: keep rewards from it on", least=0, most=1)
    no_cfg_training: bool = setting(False, "RWR: train the unguided prediction (App. E.1)")
    history_size: int = setting(32, "rewards of a prompt to normalise by (code: 32)")
    min_count: int = setting(16, "rewards of a prompt before they are used for it (code: 16)")

    lora_rank: int = setting(0, "train a LoRA of this rank (App. C)", "user", least=0, most=1024)
    precision: str = setting("fp32", "of the networks' arithmetic: fp32, bf16, fp16", "user")
    grad_checkpointing: bool = setting(False, "less memory, a third more time", "free")
    micro_batch: int = setting(8, "pairs a pass; best like --sample-batch (ratios)", "free")
    sample_batch: int = setting(8, "pictures sampled at a time", "free")

    eval_every: int = setting(5, "epochs between evaluations")
    eval_samples: int = setting(64, "fixed evaluation pictures, of fixed noises", least=2)
    checkpoint_every: int = setting(10, "epochs between checkpoints")
    keep_checkpoints: int = setting(2, "how many of the last are kept; 0: all", "free", least=0)
    metrics: str = setting("compressibility", "other rewards to watch, separated by commas")

    clip: str = setting("openai/clip-vit-large-patch14", "CLIP: aesthetic, diversity", "free")
    aesthetic_head: str = setting("trl-lib/ddpo-aesthetic-predictor", "LAION's predictor", "free")
    vlm: str = setting("llava-hf/llava-1.5-7b-hf", "LLaVA, for the alignment reward", "free")
    vlm_url: str = setting(None, "or a chat-completions server: http://HOST:PORT/v1", "user free")
    vlm_question: str = setting("Answer concisely: what is going on in this image?", "its question")
    bert: str = setting("microsoft/deberta-xlarge-mnli", "BERTScore's encoder", "free")
    bert_layer: int = setting(40, "its layer (bert-score: 40)")
    reward_device: str = setting(None, "where reward models run; else --device", "user free")

    seed: int = setting(0, "of everything random", "user", least=0, most=2**63 - 1)
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
KINDS = {name: (f.type, int) if f.type is float else (f.type,) for name, f in FIELDS.items()}
PROMPTS = {"aesthetic": "common-animals", "alignment": "animal-activities"}  # Sec. 6


def flag(name):
    """samples_per_epoch -> --samples-per-epoch."""
    return "--" + name.replace("_", "-")


def parse(argv):
    """Command line -> the options given there, as {name: value}."""
    parser = argparse.ArgumentParser(description=__doc__, argument_default=argparse.SUPPRESS)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = "python train.py [options]"
    kinds = {bool: {"action": "store_true"}, list: {"action": "append"}}
    for name, f in FIELDS.items():
        if name in HEADINGS:
            group = parser.add_argument_group(HEADINGS[name])
        options = kinds.get(f.type, {"type": f.type, "metavar": f.type.__name__})
        default = "" if f.default is None or f.type is bool else f" [{f.default}]"
        group.add_argument(flag(name), help=f.metadata["help"] + default, **options)
    return vars(placed(parser.parse_args(argv), Path()))


def model_settings(folder, given):
    """The model's ddpo.json, {"all": {...}, by reward, algorithm or "lora": {...}}, or {}."""
    path, known = folder / "ddpo.json", ["all", *REWARDS, *ALGORITHMS, "lora"]
    own = read_json(path) if path.is_file() else {}
    fits = set(own) <= set(known) and {*map(type, own.values())} <= {dict}
    require(fits, f'{path}: needed is JSON such as {{"all": {{"lr": 0.1}}}}, of {", ".join(known)}')
    kinds = {name: KINDS[name] for name, f in FIELDS.items() if "user" not in f.metadata["rules"]}
    settings = [item for part in own.values() for item in part.items() if item[0] not in given]
    for name, value in settings:
        line, fits = f"{path} sets {name} = {value!r:.80}", type(value) in kinds.get(name, ())
        require(fits, f"{line}: no setting of a model, or not of its type")
        ours = ".py:" not in str(value) or folder.resolve() == ZOO.resolve()
        require(ours, f"{line}: a model's settings may run no code; give {flag(name)} yourself")
    return own


def merge(given, folder, room=None):
    """The command line over ddpo.json over the paper's numbers, fitted to a card -> Config."""
    own, reward = model_settings(folder, given), given.get("reward", Config.reward)
    lora = {"lr": 3e-4} if given.get("lora_rank") else {}  # App. C
    common = {**own.get("all", {}), **own.get(reward, {})}
    name = {**common, **given}.get("algorithm", Config.algorithm)
    settings = {"prompts": PROMPTS.get(reward, Config.prompts), **choose_algorithm(name).defaults}
    for part in (lora, common, own.get("lora", {}) if lora else {}, own.get(name, {}), given):
        settings.update(part)  # the later one wins
    settings["algorithm"] = name
    path = folder / "unet" / "config.json"
    config = read_json(path) if room and path.is_file() else {}  # not fetched yet: SD v1.x
    with refusing(path, TypeError, LookupError, ArithmeticError):  # of what is no UNet's
        return fitted(settings, room, config) if room else Config(**settings)


def memory_needed(c, unet_config):
    """Bytes at an epoch's peak, as tests/memory.py counts them for SD v1.x."""
    width = unet_config.get("block_out_channels", [1280])[-1] / 1280
    size, side = 4 if c.precision == "fp32" else 2, unet_config.get("sample_size", 64)
    parameters, pixels = 860e6 * width**2, (side / 64) ** 2
    here = c.reward == "alignment" and c.vlm == Config.vlm and not (c.vlm_url or c.reward_device)
    networks = parameters * (size if c.lora_rank else 20 - size)
    networks += 207e6 * size + 304e6 * 4 + 22e9 * here  # VAE and text encoder; CLIP; LLaVA
    states = 1 if issubclass(choose_algorithm(c.algorithm), ddpo.RWR) else c.steps + 1
    kept = 4 * c.samples_per_epoch * (states * 4 * side**2 + 77 * 768) / ddpo.processes()[1]
    pair = 0.18e9 * size if c.grad_checkpointing else 1.25e9 + 0.65e9 * size
    training = c.micro_batch * pair * width * pixels
    sampling = (0.3e9 + c.sample_batch * (0.5e9 + 0.08e9 * size)) * pixels
    return networks + kept + max(training, sampling - (0 if c.lora_rank else 4 * parameters))


def fitted(fixed, room, unet_config):
    """The settings `fixed`, and others that leave a tenth of the room free -> Config."""
    for precision, (saving, batch) in itertools.product(("fp32", room[1]), WAYS):
        batch = fixed.get("micro_batch", fixed.get("sample_batch", batch))
        c = Config(**{**dict(zip(FITTED, (precision, saving, batch, batch))), **fixed})
        if set(FITTED) <= set(fixed) or memory_needed(c, unet_config) < 0.9 * room[0]:
            return c
    lora = not c.lora_rank and fitted({**fixed, "lora_rank": 4}, room, unet_config)  # or raises
    less = "--lora-rank 4" if lora else "--vlm-url or " * (c.reward == "alignment") + "--model zoo"
    raise UserError(f"the card's {room[0] / 1e9:.0f} GB are too few: try {less}")


def card(device):
    """A CUDA card's bytes of memory, and its half precision; None of other devices."""
    if device.type == "cuda":
        half = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        return torch.cuda.get_device_properties(device).total_memory, half


def check(config, given):
    """Fill in what the algorithm decides, and refuse what cannot be. Raises UserError."""
    c, world = config, ddpo.processes()[1]
    for name, f in FIELDS.items():
        if f.type in (int, float) and getattr(c, name) is not None:
            least, most = f.type(f.metadata["least"]), f.metadata["most"]
            number({flag(name): getattr(c, name)}, flag(name), least, most)
    choose_algorithm(c.algorithm).settle(c, given)
    n, each, fixed = c.samples_per_epoch, c.samples_per_prompt, c.eval_samples // 2 * 2
    require(c.precision in PRECISIONS, f"--precision {c.precision}: fp32, bf16 or fp16")
    few = f"--min-count {c.min_count} is more than --history-size {c.history_size}"
    require(c.min_count <= c.history_size, few)
    require(n % each == 0, f"--samples-per-epoch {n}: no multiple of --samples-per-prompt ({each})")
    sizes = f"--samples-per-epoch {n}, --batch-size {c.batch_size} and --eval-samples {fixed}"
    fits = n % world == c.batch_size % world == fixed % world == 0
    require(fits, f"{sizes} must be multiples of the number of processes, {world}")


def placed(settings, folder):
    """A copy of the settings; what begins with ../ is a path, made whole, seen from the folder."""
    whole, above = dict(vars(settings)), folder.resolve().parent
    for name, text in whole.items():
        if isinstance(text, str):  # --metrics has several, separated by commas
            whole[name] = f",{text}".replace(",../", f",{above}/")[1:]
    return type(settings)(**whole)


def resumed(given):
    """With --resume, the settings of the run in --out, under those given now. Raises UserError."""
    out = given.get("out")
    stored = Path(out or os.devnull) / "config.json"
    if not given.get("resume"):
        require(not stored.is_file(), f"--out {out} holds a run already: add --resume to go on")
        return given
    require(stored.is_file(), f"--resume needs --out, the run's folder; {out} holds no config.json")
    before = {name: value for name, value in read_json(stored).items() if value is not None}
    odd = [name for name, value in before.items() if type(value) not in KINDS.get(name, ())]
    require(not odd, f"{stored} is not of this version of train.py: {', '.join(odd)}")
    for name, value in given.items():
        was, now = before.get(name), value
        if ".py:" in str(now):  # the file may have moved, to another folder
            was, now = ([Path(x).name for x in str(specs).split(",")] for specs in (was, now))
        fits = was == now or "free" in FIELDS[name].metadata["rules"]
        require(fits, f"--resume goes on with the settings of {stored}: leave out {flag(name)}")
    return {**before, **given}


def choose_device(name, option="--device"):
    """auto: a CUDA GPU (under torchrun each process has its own), else the CPU. -> torch.device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    with refusing(f"{option} {name}", RuntimeError, AssertionError, ImportError):
        return torch.zeros(1, device=name).device


def load_prompts(name):
    """The lines of a named set or a file, each once -> {prompt: its line, as a dict}."""
    named = {path.stem: path for path in sorted(PROMPT_SETS.glob("*.txt"))}
    neither = f"neither a file that can be read nor one of {', '.join(named)}"
    with refusing(f"--prompts {name}: {neither}", OSError, ValueError):
        text = named.get(name, Path(name)).read_text(encoding="utf-8-sig", errors="replace")
    require(not {"\0", "\ufffd"} & {*text}, f"--prompts {name}: not a text file in UTF-8")
    lines = list(dict.fromkeys(line.strip() for line in text.split("\n") if line.strip()))
    require(lines, f"--prompts {name}: no prompt in it; one prompt a line")
    if not name.endswith(".jsonl"):
        return {line: {"prompt": line} for line in lines}
    entries = {}
    for line in lines:
        needed = f'--prompts {name}: needed is {{"prompt": "a cat", ...}}, not {line[:80]}'
        with refusing(needed, Exception):  # json raises many kinds
            entry = json.loads(line)
            prompt = entry["prompt"].strip()
            prompt.encode()
        require(prompt and prompt not in entries, f"{needed}: blank, or there already")
        entries[prompt] = {**entry, "prompt": prompt}
    return entries


def draw_prompts(prompts, samples, repeats, rng):
    """An epoch's prompts, shuffled: samples // repeats draws, `repeats` times each -> list."""
    count = samples // repeats
    distinct = repeats > 1 and count <= len(prompts)  # the paper's, 1 each, are independent
    drawn = rng.choice(len(prompts), size=count, replace=not distinct)
    return [prompts[i] for i in rng.permutation(np.repeat(drawn, repeats))]


def spread_prompts(prompts, count):
    """`count` prompts to evaluate on, spread over the whole set, or going round it."""
    return [prompts[i * max(count, len(prompts)) // count % len(prompts)] for i in range(count)]


def load_policy(folder, device, config):
    """A Stable Diffusion folder -> ddpo.Policy. Frozen weights have the precision asked for."""
    dtype, rank = PRECISIONS[config.precision], config.lora_rank
    if dtype != torch.float32:
        with refusing(f"--precision {config.precision}", RuntimeError):
            torch.autocast(device.type, dtype)
    # fp32 is float32; else what stays float32 may use TF32
    torch.set_float32_matmul_precision("highest" if dtype == torch.float32 else "high")
    torch.backends.cudnn.allow_tf32 = dtype != torch.float32
    start = Path(config.unet or folder)
    odd = os.path.isdir(start / "checkpoints") or os.path.isfile(start)
    require(not odd, f"--unet {start}: a run, or a file; give a checkpoint, or the file's folder")
    lora = os.path.isfile(start / unet.LORA)
    part = (folder if lora else start) / "unet"
    part = part if os.path.isdir(part) or not config.unet else start  # a checkpoint or a UNet's own
    net = unet.load(unet.UNet, part, dtype if rank else torch.float32)
    net = unet.add_lora(net, rank, config.seed) if rank else net
    if lora:
        unet.load_lora(net, start)
    net.gradient_checkpointing = config.grad_checkpointing
    # on a CPU channels_last makes the full-size backward pass a tenth slower
    net = net.to(device, memory_format=torch.channels_last if device.type == "cuda" else None)
    vae = unet.load(unet.VAE, folder / "vae", dtype).requires_grad_(False)
    vae = vae.to(device, memory_format=torch.channels_last)
    schedule = NoiseSchedule.from_folder(folder / "scheduler")
    schedule.alphas_bar = schedule.alphas_bar.to(device)
    sampler = Sampler(schedule, config.steps, config.eta)
    encoder = unet.loading("--model", folder, CLIPTextModel, folder / "text_encoder", dtype=dtype)
    encoder = encoder.to(device).requires_grad_(False)
    fits = net.config["cross_attention_dim"] == encoder.config.hidden_size
    require(fits, f"{part}: its UNet is made for another text encoder than {folder}'s")
    tokenizer = unet.loading("--model", folder, CLIPTokenizer, folder / "tokenizer")
    limit = encoder.config.max_position_embeddings
    tokenizer.model_max_length = min(tokenizer.model_max_length, limit)  # absent: 1e30
    return ddpo.Policy(net, vae, sampler, tokenizer, encoder, device, config.guidance, dtype)


@dataclasses.dataclass
class Run:
    """All that a run holds."""

    config: Config
    out: Path
    policy: ddpo.Policy
    algorithm: ddpo.Algorithm
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    prompts: list  # of str
    metadata: dict  # {prompt: its line of a .jsonl file}
    rewards: dict  # {"reward", and what is watched: functions (images, prompts) -> scores}
    clip: object  # rewards.ClipEmbedder, or None
    left: str = ""  # of the run's time, for the progress bars

    def checkpoints(self):
        """The folders of the whole checkpoints, oldest first."""
        return sorted((self.out / "checkpoints").glob("[0-9]" * 6))


def choose_model(given, device):
    """The model to load -> its name, its folder."""
    model = given.get("model", Config.model)
    if model == "auto":
        model = "CompVis/stable-diffusion-v1-4" if device.type == "cuda" else "zoo"
        print(f"model: {model}, since the device is {device} (others: --model)")
    return model, ZOO if model == "zoo" else unet.locate(model)


def choose_algorithm(name):
    """One of ALGORITHMS, or a class from a user's file. Raises UserError."""
    algorithm = ALGORITHMS.get(name) or load_object(name, "--algorithm", ALGORITHMS)
    fits = isinstance(algorithm, type) and issubclass(algorithm, ddpo.Algorithm)
    require(fits, f"--algorithm {name}: must be a class derived from ddpo.Algorithm")
    return algorithm


def set_own(algorithm, texts):
    """--set name=value for the numbers and words among the algorithm's class attributes."""
    for text in texts or []:
        name, _, value = str(text).partition("=")
        kind = type(getattr(algorithm, name, None))
        require(kind in (int, float, str), f"--set {text}: the algorithm has no such setting")
        with refusing(f"--set {text}", ValueError):
            setattr(algorithm, name, kind(value))


def prepare(given):
    """Everything loaded; what can be refused is refused before the run's folder is made -> Run."""
    given = resumed(given)
    device = choose_device(given.get("device", Config.device))
    ddpo.join(device)
    if ddpo.processes()[0]:
        sys.stdout = open(os.devnull, "w")  # one voice is enough
    room, wanted = card(device), given.get("model", Config.model)
    if wanted != "zoo" and not os.path.isdir(wanted):
        merge(given, Path(wanted), room)  # is refused before gigabytes are fetched
    model, folder = choose_model(given, device)
    c = merge({**given, "model": model}, folder, room)
    if room:
        chosen = ", ".join(f"{name} {getattr(c, name)}" for name in FITTED)
        print(f"for {room[0] / 1e9:.0f} GB: {chosen} (other than fp32, numbers change)")
    check(c, given)
    name = f"{c.reward.rpartition(':')[2]}-{c.algorithm.rpartition(':')[2]}"
    c.out = c.out or str(Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    out, used = Path(c.out), placed(c, folder)
    metadata = load_prompts(str(out / "prompts.jsonl") if c.resume else used.prompts)

    policy = load_policy(folder, device, c)
    limit = policy.tokenizer.model_max_length
    long = [prompt for prompt in metadata if len(policy.tokenizer(prompt).input_ids) > limit]
    if long:
        print(f"warning: {len(long)} prompts are read up to token {limit} only, as {long[0]!r}")
    algorithm = choose_algorithm(c.algorithm)(used)
    set_own(algorithm, c.set)
    algorithm.setup(policy)
    trained = [p for p in policy.unet.parameters() if p.requires_grad]
    options = {"weight_decay": c.weight_decay, "fused": device.type == "cuda"}
    optimizer = torch.optim.AdamW(trained, c.lr, **options)
    scaler = torch.amp.GradScaler(device.type, enabled=c.precision == "fp16")
    rewards = load_rewards(used, device, metadata)
    return Run(c, out, policy, algorithm, optimizer, scaler, list(metadata), metadata, *rewards)


def load_rewards(config, device, metadata):
    """{"reward": the one to learn, and those to watch by their names}, and CLIP, or None."""
    device = choose_device(config.reward_device or str(device), "--reward-device")
    rewards = {"reward": make_reward(config.reward, config, device, metadata=metadata)}
    specs = [spec.strip() for spec in config.metrics.split(",")]
    for spec in [spec for spec in specs if spec not in ("", config.reward)]:
        name = spec.rpartition(":")[2]
        taken = (*rewards, "epoch", "prompts", "rewards", "shown")
        require(name not in taken, f"--metrics {config.metrics}: the name {name} is taken")
        rewards[name] = make_reward(spec, config, device, "--metrics", metadata)
    try:
        return rewards, clip_embedder(config.clip, device)
    except UserError as error:
        print(f"diversity is not measured: {error}")
        return rewards, None


def loop(run):
    """The epochs, from the newest checkpoint on."""
    c, out, writes = run.config, run.out, ddpo.processes()[0] == 0
    if writes:
        with writing(out), refusing(f"{out}: another run is at work in it", Timeout):
            (out / "samples").mkdir(parents=True, exist_ok=True)
            lock = FileLock(out / "lock", timeout=0, is_singleton=True)
            lock.acquire()  # any end of the process ends it
    start = read_checkpoint(run) if c.resume and run.checkpoints() else 0
    require(start < c.epochs, f"--epochs {c.epochs}: {out} has {start} behind it; give more epochs")
    if writes:
        write_json(out / "prompts.jsonl", list(run.metadata.values()))
        write_json(out / "config.json", dataclasses.asdict(c))  # last: with it --resume is possible
        write_json(out / "metrics.jsonl", read_lines(out / "metrics.jsonl", start, NEEDED))
    sizes = f"of {c.samples_per_epoch} pictures in updates of {c.batch_size}"
    anew = ", from the beginning" if c.resume and not start else ""
    print(f"{c.algorithm} on {c.reward}, {c.epochs} epochs {sizes}, into {out}{anew}", flush=True)
    for epoch in range(start, c.epochs):
        done, last = epoch + 1, epoch + 1 == c.epochs
        base = evaluate(run, 0) if epoch == 0 else {}
        metrics = {"epoch": epoch, "reward_queries": done * c.samples_per_epoch, **base}
        metrics.update(one_epoch(run, epoch))
        evaluation = evaluate(run, done) if last or done % c.eval_every == 0 else {}
        if writes:
            write_metrics(run, metrics, evaluation)
            draw_curve(out, c)
            if last or done % c.checkpoint_every == 0:
                write_checkpoint(run, done)


def progress(batches, text, total):
    """The batches, with a progress bar of the first process on a terminal."""
    return tqdm(batches, text, total, leave=False, disable=ddpo.processes()[0] > 0 or None)


def evaluate(run, epoch):
    """Reward the fixed prompts and noises; write the pictures and their rewards -> metrics."""
    prompts = 2 * spread_prompts(run.prompts, run.config.eval_samples // 2)  # for the diversity
    _, images = roll_out(run, prompts, EVALUATION, record=len)  # no need of the trajectories
    diverse, scores, shown = spread(run, images, prompts), {}, {}
    for name, reward in run.rewards.items():
        scores[name], shown[name] = score(reward, images, prompts)
    images = gather(images).numpy()
    if ddpo.processes()[0]:
        return {}
    path = run.out / "samples" / f"epoch_{epoch:04d}.png"
    with writing(path):
        grid(images).save(path)
    lists = {name: values.tolist() for name, values in scores.items()}
    fixed = {"epoch": epoch, "prompts": prompts, "rewards": lists.pop("reward"), "shown": shown}
    write_json(path.with_suffix(".json"), {**lists, **fixed})
    base = np.array(read_json(path.with_name("epoch_0000.json"))["rewards"])
    gain = scores["reward"] - base
    metrics = {"eval_queries": epoch * run.config.samples_per_epoch, "eval_diversity": diverse}
    # in the base's deviations; in standard errors, for the pictures are paired
    metrics["eval_gain_sd"] = gain.mean() / max(base.std(), 1e-12)
    metrics["eval_gain_t"] = gain.mean() / max(gain.std(ddof=1) / len(gain) ** 0.5, 1e-12)
    for name, values in scores.items():
        metrics |= {f"eval_{name}_mean": values.mean(), f"eval_{name}_std": values.std()}
    return metrics


def grid(images):
    """Pictures (B, H, W, 3) in rows, each at most 256 pixels wide -> PIL image."""
    side, tile = math.ceil(len(images) ** 0.5), min(images.shape[1], 256)
    sheet = Image.new("RGB", (side * tile, math.ceil(len(images) / side) * tile))
    for i, image in enumerate(images):
        row, column = divmod(i, side)
        sheet.paste(Image.fromarray(image).resize((tile, tile)), (column * tile, row * tile))
    return sheet


def write_checkpoint(run, epoch):
    """checkpoints/000012, written aside and renamed when whole; the last few are kept."""
    aside = run.out / "checkpoints" / f"{epoch:06d}.tmp"
    moments, scaler = run.optimizer.state_dict()["state"], run.scaler.state_dict()
    state = {"epoch": epoch, "algorithm": run.algorithm.state_dict(), "scaler": scaler}
    with writing(aside):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        if run.config.lora_rank:
            unet.save_tensors(unet.lora_weights(run.policy.unet), aside / unet.LORA)
        else:
            unet.save(run.policy.unet, aside / "unet")
        tensors = {f"{i}.{name}": x for i, m in moments.items() for name, x in m.items()}
        unet.save_tensors(tensors, aside / "optimizer.safetensors")
        (aside / "state.json").write_text(json.dumps(state, indent=1) + "\n")
        os.replace(aside, aside.with_suffix(""))
        for old in run.checkpoints()[: -run.config.keep_checkpoints]:
            shutil.rmtree(old)


def load_weights(net, folder):
    """The UNet or the LoRA of a checkpoint into the network that it was trained from."""
    if unet.lora_weights(net):
        unet.load_lora(net, folder)
    else:
        net.load_state_dict(unet.load(unet.UNet, folder / "unet").state_dict())


def read_checkpoint(run):
    """Everything back from the newest whole checkpoint -> the epochs behind it."""
    folder, moments = run.checkpoints()[-1], {}
    parameters = run.optimizer.param_groups[0]["params"]
    with refusing(f"{folder} cannot be read (if broken, delete it)", Exception):  # of any kind
        load_weights(run.policy.unet, folder)
        for key, value in load_file(folder / "optimizer.safetensors").items():
            i, name = key.split(".")
            if value.ndim:  # not `step`: laid out in memory as the parameter is
                value = torch.empty_like(parameters[int(i)]).copy_(value)
            moments.setdefault(int(i), {})[name] = value
        run.optimizer.load_state_dict({**run.optimizer.state_dict(), "state": moments})
        state = read_json(folder / "state.json")
        run.algorithm.load_state_dict(state["algorithm"])
        run.scaler.load_state_dict(state["scaler"])
    print(f"resuming from {folder}")
    return int(folder.name)


def writing(path):
    """What the disk refuses in here ends in one line that names the file."""
    return refusing(f"{path} cannot be written", OSError, SafetensorError)


def write_json(path, value):
    """A list as lines, anything else as one document. Aside, then renamed: never half a file."""
    parts, indent = (value, None) if isinstance(value, list) else ([value], 1)
    text = "".join(json.dumps(part, indent=indent, default=str) + "\n" for part in parts)
    aside = path.with_name(path.name + ".tmp")
    with writing(path):
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)


def read_lines(path, before=math.inf, needed=("epoch",)):
    """The whole lines of a .jsonl file, up to an epoch, with what is needed -> list of dicts."""
    with refusing(f"{path} is damaged", OSError, ValueError, RecursionError, KeyError, TypeError):
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        lines = [json.loads(line) for line in text.split("\n") if line.endswith("}")]
        return [line for line in lines if [line[name] for name in needed][0] < before]


def write_metrics(run, metrics, evaluation):
    """Add the epoch's line, with the alarms it sets off, to metrics.jsonl; print what is new."""
    before = read_lines(run.out / "metrics.jsonl")
    line = {**evaluation, **metrics}  # the first line keeps the base model's evaluation
    found = ddpo.alarms([*before, line], run.config.updates)
    odd = [name for name, x in line.items() if isinstance(x, float) and not math.isfinite(x)]
    clean = {**line, **dict.fromkeys(odd), "warnings": list(found)}  # JSON has no NaN: null
    write_json(run.out / "metrics.jsonl", [*before, clean])
    text = "epoch {epoch:3d}  queries {reward_queries:6d}  reward {reward_mean:.3f} +- "
    text += "{reward_std:.3f}  grad {grad_norm:.2g}  {seconds:.0f} s{left}"
    if line["approx_kl"] is not None:
        text += "  kl {approx_kl:.1e}  clipped {clip_fraction:.0%}"
    if evaluation:
        text += "\n    fixed pictures: {eval_reward_mean:.3f} +- {eval_reward_std:.3f}"
        text += ", gain {eval_gain_sd:.2f} sd of the base, t {eval_gain_t:.1f}"
    seconds = sum(value for name, value in line.items() if name.startswith("seconds"))
    run.left = f", {tqdm.format_interval(seconds * (run.config.epochs - 1 - line['epoch']))} left"
    print(text.format(**{**line, **evaluation}, seconds=seconds, left=run.left), flush=True)
    known = before[-1].get("warnings", []) if before else []
    for name in [name for name in found if name not in known]:
        print(f"warning ({name}), epoch {line['epoch']}: {found[name]}", flush=True)
    if "not finite" in found:
        whole = run.checkpoints()
        advice = f"--resume from {whole[-1]}" if whole else "another --out: there is no checkpoint"
        raise UserError(f"epoch {line['epoch']}: {found['not finite']}, with {advice}")


def draw_curve(out, config):
    """reward.png: the reward against queries; and all that is watched, in the base's deviations."""
    lines = read_lines(out / "metrics.jsonl")
    evaluated = [line for line in lines if "eval_queries" in line]
    base, at = evaluated[0], [line["eval_queries"] for line in evaluated]
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    queries = [line["reward_queries"] - config.samples_per_epoch for line in lines]  # when sampled
    means, stds = ([line[f"reward_{kind}"] for line in lines] for kind in ("mean", "std"))
    left.errorbar(queries, means, stds, alpha=0.5, label="training samples (mean, std)")
    left.plot(at, [line["eval_reward_mean"] for line in evaluated], "o-", label="fixed pictures")
    for name in [key[5:-5] for key in base if key.startswith("eval_") and key.endswith("_mean")]:
        means = np.array([line[f"eval_{name}_mean"] for line in evaluated])
        right.plot(at, (means - means[0]) / (base[f"eval_{name}_std"] or 1), "o-", label=name)
    left.set(title=config.algorithm, xlabel="reward queries", ylabel=config.reward)
    right.set(title="fixed pictures", xlabel="reward queries", ylabel="gain / base's deviation")
    left.legend(loc="upper left")
    right.legend(loc="upper left")
    with writing(out / "reward.png"):
        figure.savefig(out / "reward.png")


def main(argv=None):
    """The program. Only what the user can mend ends in one line; the rest keeps its traceback."""
    given, run = parse(argv), None
    if hasattr(sys.stdout, "reconfigure"):  # not all terminals can print all prompts
        sys.stdout.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # torchrun's, or a job queue's
    try:
        run = prepare(given)
        loop(run)
        gather(np.zeros(1))  # none ends before the first has written the last checkpoint
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except (UserError, MemoryError, RuntimeError) as error:
        text, signs = str(error), ("MemoryError", "out of memory", "allocate memory", "bad_alloc")
        full = any(sign in repr(error) for sign in signs)
        rank, world = ddpo.processes()
        # so that torchrun does not end this process before its line comes through
        signal.signal(signal.SIGTERM, signal.SIG_IGN if world > 1 else signal.SIG_DFL)
        if given.get("debug") or not (full or isinstance(error, UserError)):
            raise
        if full:
            less = "--grad-checkpointing, --micro-batch 1, --sample-batch 1, --lora-rank 4"
            text = f"{text or 'out of memory'}; try --precision bf16, {less}"
        text = f"process {rank} of {world}: {text}" if world > 1 else text
        sys.exit(f"train.py: {' '.join(text.split())}")
    except (KeyboardInterrupt, SystemExit) as stopped:
        rank, world = ddpo.processes()
        start = ["torchrun", "--nproc-per-node", str(world)] if world > 1 else ["python"]
        command = shlex.join([*start, sys.argv[0], "--out", str(run and run.out), "--resume"])
        way = "to go on" if run and run.checkpoints() else "no checkpoint yet; to begin again"
        line = f"{way}: {command}" if run else "it had not begun"
        if rank == 0:
            print(f"train.py: stopped; {line}", file=sys.stderr)
        sys.exit(getattr(stopped, "code", 130) or 130)  # of a user's sys.exit(0) too


if __name__ == "__main__":
    main()
