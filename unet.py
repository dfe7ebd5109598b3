"""The networks of Stable Diffusion v1.x, the UNet eps_theta(x_t, c, t) and the VAE; their files.

The paper fine-tunes the UNet of Stable Diffusion v1.4 (Sec. 6.1, App. D), and all else is frozen.
Nothing here knows about RL, schedules or settings. In reading order: the layers up to `Block`, the
UNet, the VAE; what a config must say; `load` and `save`; the hub and transformers; LoRA.

Every attribute has the name that diffusers gives it, so the keys of `state_dict()` are those of the
published safetensors files. Sizes come from the `config.json` beside the weights: the miniature
(tutorial/zoo) and the real one are the same code.

Deviations from diffusers: what SD v1.x does not use is not here (dropout, linear projections, class
conditioning, tiling, the safety checker), and a config that asks for it is refused; `VAE.encode`
gives the mean of q(z | image), not a sample of it; a gradient checkpoint spans a ResNet and the
attention after it. Results are equal to float precision.
"""

import json
import math
import os
import re
import reprlib
from functools import partial
from pathlib import Path

import huggingface_hub
import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from scheduler import UserError, number, read_json, refusing, require, with_fields

WEIGHTS = "diffusion_pytorch_model.safetensors"
LORA = "pytorch_lora_weights.safetensors"

# What is fetched of a model on the hub.
STABLE_DIFFUSION = ["*/config.json", f"*/{WEIGHTS}", "text_encoder/model.safetensors"]
STABLE_DIFFUSION += ["tokenizer/*", "scheduler/*", "ddpo.json"]

# The command by which diffusers makes a folder of what is not read here, from a pipeline P.
REWRITING = "from diffusers import StableDiffusionPipeline as P; {}.save_pretrained('FOLDER')"
REWRITING = f'`python -c "{REWRITING}"`, then --model FOLDER'

# The attention's projections in VAE files of 2022, SD v1.4's among them, and their names of today.
RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

# What a config may ask for though its weights don't show it: 0, false, null or absent in SD v1.x,
UNUSED_FIELDS = """addition_embed_type center_input_sample dropout freq_shift latents_mean
latents_std num_attention_heads shift_factor resnet_skip_time_act time_embedding_act_fn
timestep_post_act use_linear_projection upcast_attention""".split()
KNOWN_FIELDS = dict.fromkeys(UNUSED_FIELDS)
KNOWN_FIELDS |= {"act_fn": "silu", "flip_sin_to_cos": True, "downsample_padding": 1}  # or this
KNOWN_FIELDS |= {"mid_block_scale_factor": 1, "resnet_out_scale_factor": 1}

MOST = 2**14  # of channels, heads or groups: more are a mistake


def timestep_embedding(timesteps, dim):
    """Sinusoidal embedding of the timestep, cosines first (`flip_sin_to_cos`).

        [cos(t f_0) ... cos(t f_{n-1}), sin(t f_0) ... sin(t f_{n-1})],   f_i = 10000^(-i/n)

    n = dim / 2. timesteps (B,) of any number type -> float32 (B, dim).
    """
    half = dim // 2
    i = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(-math.log(10000.0) * i / half)
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ResnetBlock(nn.Module):
    """shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))) + proj(silu(time))))).

    x (B, c_in, h, w), time (B, time_dim), or None in the VAE -> (B, c_out, h, w).
    """

    def __init__(self, c_in, c_out, groups, eps, time_dim=None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        if time_dim is not None:
            self.time_emb_proj = nn.Linear(time_dim, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, time=None):
        h = self.conv1(F.silu(self.norm1(x)))
        if time is not None:
            h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class Attention(nn.Module):
    """Multi-head attention softmax(q k^T / sqrt(d)) v, d = dim / heads.

    x (B, n, dim) to context (B, m, context_dim), by default to itself -> (B, n, dim).
    """

    def __init__(self, dim, context_dim, heads, bias=False):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(context_dim, dim, bias=bias)
        self.to_v = nn.Linear(context_dim, dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        h = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](h.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """GEGLU: half of a wide layer, gated by the gelu of the other half. (B, n, dim) -> the same."""

    def __init__(self, dim):
        super().__init__()
        proj = nn.ModuleDict({"proj": nn.Linear(dim, 8 * dim)})
        # Identity: the place of a dropout; the last layer is net.2 in the files
        self.net = nn.ModuleList([proj, nn.Identity(), nn.Linear(4 * dim, dim)])

    def forward(self, x):
        x, gate = self.net[0]["proj"](x).chunk(2, dim=-1)
        return self.net[2](x * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to context (B, m, context_dim), feed-forward. (B, n, dim)."""

    def __init__(self, dim, context_dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, context_dim, heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x, context):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A TransformerBlock over the pixels. (B, dim, h, w), (B, m, context_dim) -> (B, dim, h, w)."""

    def __init__(self, dim, context_dim, heads, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, dim, 1e-6)
        self.proj_in = nn.Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(dim, context_dim, heads)])
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x, context):
        h = self.proj_in(self.norm(x))
        # contiguous: laid out once here, not once in each of the block's norms
        tokens = h.flatten(2).transpose(1, 2).contiguous()
        tokens = self.transformer_blocks[0](tokens, context)
        return x + self.proj_out(tokens.transpose(1, 2).reshape(h.shape))


class VAEAttention(Attention):
    """Single-head self-attention over a picture's pixels. (B, dim, h, w) -> the same."""

    def __init__(self, dim, groups):
        super().__init__(dim, dim, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, dim, 1e-6)

    def forward(self, x, context=None):
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)
        return x + super().forward(tokens).transpose(1, 2).reshape(x.shape)


class Downsample(nn.Sequential):
    """A convolution of stride 2, padded all around by 1, or by 0 as the VAE's: right and below."""

    def __init__(self, dim, padding=1):
        super().__init__()
        self.pad = nn.Identity() if padding else nn.ZeroPad2d((0, 1, 0, 1))
        self.conv = nn.Conv2d(dim, dim, 3, stride=2, padding=padding)


class Upsample(nn.Sequential):
    """Nearest neighbours, then a convolution. (B, dim, h, w) -> (B, dim, 2h, 2w)."""

    def __init__(self, dim):
        super().__init__()
        self.upsample = nn.Upsample(scale_factor=2.0, mode="nearest")
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)


class Block(nn.Module):
    """One resolution: ResNets, each with attention after it or not, and a change of resolution."""

    def __init__(self, resnets, attentions=(), resamplers=()):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList(x for x in resamplers if isinstance(x, Downsample))
        self.upsamplers = nn.ModuleList(x for x in resamplers if isinstance(x, Upsample))

    def layer(self, i, x, time=None, context=None):
        """ResNet i, and its attention if there is one. (B, c_in, h, w) -> (B, c, h, w)."""
        x = self.resnets[i](x, time)
        if i < len(self.attentions):
            x = self.attentions[i](x, context)
        return x

    def forward(self, x):
        """All of it, as the VAE needs it: no time, no context, no skip connections."""
        for i in range(len(self.resnets)):
            x = self.layer(i, x)
        for resampler in [*self.downsamplers, *self.upsamplers]:
            x = resampler(x)
        return x


def chained(channels, layers):
    """What each level's ResNets take in, where each takes what the one before gives."""
    return [[a] + [c] * (layers - 1) for a, c in zip([channels[0], *channels], channels)]


def levels(c_ins, channels, resnet, resampler, attention=None, attends=()):
    """A Block a level, in order of computation; `c_ins`: the channels that its ResNets take in."""
    blocks = nn.Sequential()
    for i, (ins, c) in enumerate(zip(c_ins, channels)):
        resnets = [resnet(c_in, c) for c_in in ins]
        attentions = [attention(c) for _ in ins if i in attends]
        blocks.append(Block(resnets, attentions, [resampler(c)] if i < len(c_ins) - 1 else []))
    return blocks


class UNet(nn.Module):
    """eps_theta(x_t, c, t): the noise in x_t.

    latents (B, 4, h, w), timesteps (B,), context (B, m, cross_attention_dim) -> (B, 4, h, w).
    Every sample has a timestep of its own: training takes (sample, timestep) pairs in any order.
    `gradient_checkpointing`: the backward pass computes each layer's activations again instead of
    keeping them, memory against about a third more time. Raises UserError for another's config.
    """

    def __init__(self, config):
        super().__init__()
        channels, layers, groups = sizes(config)
        lowest = len(channels) - 1  # has no attention
        down = [*["CrossAttnDownBlock2D"] * lowest, "DownBlock2D"]
        up = ["UpBlock2D", *["CrossAttnUpBlock2D"] * lowest]
        known = {**KNOWN_FIELDS, "down_block_types": down, "up_block_types": up}
        self.config = with_fields(config, known, in_channels=4, out_channels=4)
        self.gradient_checkpointing = False
        context_dim = number(config, "cross_attention_dim", 1, MOST)
        heads = number(config, "attention_head_dim", 1, MOST)  # so the files call it
        fits = math.gcd(*channels) % heads == 0
        require(fits, f"attention_head_dim = {heads} must divide each of {channels}")
        side, multiple = number(config, "sample_size", 1, 512), 2**lowest
        require(side % multiple == 0, f"sample_size = {side} must be a multiple of {multiple}")
        eps = number(config, "norm_eps", 1e-12, 1.0, default=1e-5)
        first, last, time_dim = channels[0], channels[-1], 4 * channels[0]
        resnet = partial(ResnetBlock, groups=groups, eps=eps, time_dim=time_dim)
        attention = partial(SpatialTransformer, context_dim=context_dim, heads=heads, groups=groups)

        self.conv_in = nn.Conv2d(4, first, 3, padding=1)
        linear_1, linear_2 = nn.Linear(first, time_dim), nn.Linear(time_dim, time_dim)
        self.time_embedding = nn.ModuleDict({"linear_1": linear_1, "linear_2": linear_2})
        c_ins = chained(channels, layers)
        self.down_blocks = levels(c_ins, channels, resnet, Downsample, attention, range(lowest))
        self.mid_block = Block([resnet(last, last), resnet(last, last)], [attention(last)])
        # on the way up each layer takes a skip connection too, the last that of the level above
        channels = channels[::-1]
        neighbours = zip([last, *channels], channels, [*channels[1:], first])
        c_ins = [[a + c] + [c + c] * (layers - 1) + [c + b] for a, c, b in neighbours]
        self.up_blocks = levels(c_ins, channels, resnet, Upsample, attention, range(1, lowest + 1))
        self.conv_norm_out = nn.GroupNorm(groups, first, eps)
        self.conv_out = nn.Conv2d(first, 4, 3, padding=1)

    def forward(self, latents, timesteps, context):
        embedding = timestep_embedding(timesteps, self.conv_in.out_channels).to(latents.dtype)
        time = self.time_embedding["linear_1"](embedding)
        time = self.time_embedding["linear_2"](F.silu(time))
        x = self.conv_in(latents)
        skips = [x]
        for block in self.down_blocks:
            for i in range(len(block.resnets)):
                x = self._layer(block, i, x, time, context)
                skips.append(x)
            for downsampler in block.downsamplers:
                x = downsampler(x)
                skips.append(x)
        for i in range(len(self.mid_block.resnets)):
            x = self._layer(self.mid_block, i, x, time, context)
        for block in self.up_blocks:
            for i in range(len(block.resnets)):
                x = self._layer(block, i, torch.cat([x, skips.pop()], dim=1), time, context)
            for upsampler in block.upsamplers:
                x = upsampler(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def _layer(self, block, i, *inputs):
        """Layer i of a block, its activations kept, or computed again in the backward pass."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block.layer, i, *inputs, use_reentrant=False)
        return block.layer(i, *inputs)


class Encoder(nn.Sequential):
    """Pictures (B, 3, H, W) -> (B, 8, H/8, W/8) with four levels, by these parts in order."""

    def __init__(self, channels, layers, groups):
        super().__init__()
        c, resnet = channels[-1], partial(ResnetBlock, groups=groups, eps=1e-6)
        downsample = partial(Downsample, padding=0)
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down_blocks = levels(chained(channels, layers), channels, resnet, downsample)
        self.mid_block = Block([resnet(c, c), resnet(c, c)], [VAEAttention(c, groups)])
        self.conv_norm_out = nn.GroupNorm(groups, c, 1e-6)
        self.act = nn.SiLU()
        self.conv_out = nn.Conv2d(c, 8, 3, padding=1)


class Decoder(nn.Sequential):
    """Latents (B, 4, h, w) -> (B, 3, 8h, 8w) with four levels, lowest resolution first."""

    def __init__(self, channels, layers, groups):
        super().__init__()
        c, resnet = channels[0], partial(ResnetBlock, groups=groups, eps=1e-6)
        self.conv_in = nn.Conv2d(4, c, 3, padding=1)
        self.mid_block = Block([resnet(c, c), resnet(c, c)], [VAEAttention(c, groups)])
        self.up_blocks = levels(chained(channels, layers), channels, resnet, Upsample)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], 1e-6)
        self.act = nn.SiLU()
        self.conv_out = nn.Conv2d(channels[-1], 3, 3, padding=1)


class VAE(nn.Module):
    """The autoencoder between pictures and latents, 8 times smaller a side with four levels.

    Latents are *scaled* here, to a variance of about 1. Raises UserError for another's config.
    """

    def __init__(self, config):
        super().__init__()
        channels = {"in_channels": 3, "out_channels": 3, "latent_channels": 4}
        self.config = with_fields(config, KNOWN_FIELDS, **channels)
        # absent from v1.4's file
        self.scaling_factor = number(config, "scaling_factor", 1e-6, 1e6, default=0.18215)
        channels, layers, groups = sizes(config)
        self.encoder = Encoder(channels, layers, groups)
        self.decoder = Decoder(channels[::-1], layers + 1, groups)
        self.quant_conv = nn.Conv2d(8, 8, 1)
        self.post_quant_conv = nn.Conv2d(4, 4, 1)

    def posterior(self, images):
        """Images (B, 3, H, W) in [-1, 1] -> mean, log variance of q(z | image) (B, 4, H/8, W/8)."""
        mean, log_var = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, log_var.clamp(-30.0, 20.0)

    def encode(self, images):
        """Images (B, 3, H, W) in [-1, 1] -> the posterior's mean, scaled (B, 4, H/8, W/8)."""
        return self.posterior(images)[0] * self.scaling_factor

    def decode(self, latents):
        """Scaled latents (B, 4, h, w) -> images (B, 3, 8h, 8w), about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(latents / self.scaling_factor))


def sizes(config):
    """Channels of each level, highest resolution first, layers of a level, groups of a norm."""
    layers = number(config, "layers_per_block", 1, 16)
    groups = number(config, "norm_num_groups", 1, MOST, default=32)
    channels, step = config.get("block_out_channels"), math.lcm(2, groups)
    fits = type(channels) is list and 1 <= len(channels) <= 8
    fits = fits and all(type(c) is int and c in range(step, MOST + 1, step) for c in channels)
    needed = f"1 to 8 multiples of 2 and of norm_num_groups = {groups}, at most {MOST}"
    require(fits, f"block_out_channels = {reprlib.repr(channels)}; needed: {needed}")
    return channels, layers, groups


def load(cls, folder, dtype=torch.float32):
    """A `UNet` or `VAE` of `dtype` from a diffusers folder; None: no weights. Raises UserError."""
    config_path = Path(folder) / "config.json"
    what = f"the config of a {cls.__name__} of Stable Diffusion v1.x"
    # on meta: no memory before the weights are seen to fit
    with refusing(f"{config_path} is not {what}", UserError), torch.device("meta"):
        net = cls(read_json(config_path))
    if dtype is None:  # the config was in question
        return net
    files = weight_files(Path(folder))
    weights = {name: w for file in files for name, w in read_tensors(file, dtype).items()}
    for old, new in RENAMED.items():
        weights = {name.replace(f".{old}.", f".{new}."): w for name, w in weights.items()}
    with refusing(f"{files[-1]} does not fit {config_path}", RuntimeError):
        net.load_state_dict(weights, assign=True)
    return net


def weight_files(folder):
    """A network's file, or its shards; of float16 where there is no other. Raises UserError."""
    for ending in ("", "-*-of-*", ".fp16", ".fp16-*-of-*"):
        files = sorted(folder.glob(f"{Path(WEIGHTS).stem}{ending}.safetensors"))
        if files:
            return files
    way = REWRITING.format("P.from_pretrained('MODEL')")
    raise UserError(f"{folder} holds no {WEIGHTS}; of .bin files diffusers makes it: {way}")


def read_tensors(path, dtype):
    """The finite numbers of a safetensors file as `dtype` -> {name: tensor}. Raises UserError."""
    with refusing(f"{path} cannot be read as safetensors", OSError, SafetensorError):
        open(path, "rb").close()  # safetensors says "No such file" of any that it cannot open
        tensors = load_file(path)
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(dtype, copy=True)
        require_finite(f"{path}: {name}", tensors[name])
    return tensors


def require_finite(name, tensor):
    """Raise UserError if there is a NaN or an infinity in a tensor."""
    # the sum, for isfinite of each number takes memory; in float32, which sums can't overflow
    finite = tensor.sum(dtype=torch.float32).isfinite()
    require(finite, f"{name} holds NaN or infinity (as {tensor.dtype})")


def save(net, folder, dtype=None):
    """Write config.json and the weights as diffusers and `load` read them; `dtype`: the file's."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kind = {UNet: "UNet2DConditionModel", VAE: "AutoencoderKL"}[type(net)]
    config = json.dumps({"_class_name": kind, **net.config}, indent=2)
    (folder / "config.json").write_text(config + "\n", encoding="utf-8")
    save_tensors(net.state_dict(), folder / WEIGHTS, dtype)


def save_tensors(tensors, path, dtype=None):
    """Write {name: tensor}, on any device and in any layout, as safetensors, by default as is."""
    cpu = {n: t.detach().to("cpu", dtype or t.dtype).contiguous() for n, t in tensors.items()}
    Path(path).touch()
    mode = os.stat(path).st_mode
    save_file(cpu, path, metadata={"format": "pt"})
    os.chmod(path, mode)  # safetensors 0.8.0 lets the owner alone read, whatever the umask


def locate(model, flag="--model", files=STABLE_DIFFUSION):
    """The folder of a model: one on disk as it is, or `files` of a hub id. Raises UserError."""
    if os.path.isdir(model):
        return Path(model)
    way = REWRITING.format(f"P.from_single_file('{model}')")
    require(not os.path.isfile(model), f"{flag} {model}: a file; diffusers makes a folder: {way}")
    if files is STABLE_DIFFUSION:  # the small files first: some models are refused by them
        for cls, part in ((UNet, "unet"), (VAE, "vae")):
            load(cls, locate(model, flag, [f"{part}/config.json"]) / part, None)
    fetch = partial(huggingface_hub.snapshot_download, model, etag_timeout=5)
    way = f"where there is a network: `hf download {model} --local-dir FOLDER`, then {flag} FOLDER"
    gone = f"{flag} {model}: neither a folder nor to be had from the hub; {way}"
    with refusing(gone, Exception):  # no network, no such model, no access: many types, one meaning
        folder = Path(fetch(allow_patterns=files))
        if files is STABLE_DIFFUSION and len([*folder.glob(f"*/{WEIGHTS}")]) < 2:
            fetch(allow_patterns="[uvt]*/*.safetensors")  # of other names
        return folder


def loading(flag, name, cls, folder, **options):
    """transformers' `cls` from a folder, quietly; networks need a `dtype`. Raises UserError.

    Weights or words that are missing are an error, where transformers makes up random ones or none.
    """
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    options = {"local_files_only": True, "trust_remote_code": False, **options}
    options |= {"output_loading_info": True} if "dtype" in options else {}
    halves = {".fp16" in path.name for path in Path(folder).glob("model*.safetensors")}
    options |= {"variant": "fp16"} if halves == {True} else {}
    refusal = f"{flag} {name}: no {cls.__name__} in it"
    with refusing(refusal, Exception):
        loaded = cls.from_pretrained(folder, **options)
    if "dtype" not in options:
        require(getattr(loaded, "vocab_size", math.inf) > 9, f"{refusal}: its vocabulary is empty")
        return loaded
    # a pooler is not used here, and many files have none
    lost = [key for key in loaded[1]["missing_keys"] if "pooler" not in key]
    require(not lost, f"{refusal}: its weights lack {', '.join(lost[:3])}")
    for key, tensor in loaded[0].named_parameters():
        require_finite(f"{flag} {name}: {key}", tensor)
    return loaded[0].eval()


class LoRALinear(nn.Linear):
    """W x + b + B A x, W and b frozen (Hu et al. 2021, arXiv 2106.09685; alpha / rank = 1).

    B is 0 at first and A ~ N(0, 1 / rank^2), as in the diffusers of the authors' PyTorch code.
    """

    def __init__(self, linear, rank, generator):
        # on meta, without memory: the weights are those of the given layer
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Linear(self.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False)
        nn.init.normal_(self.lora_A.weight, std=1 / rank, generator=generator)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        return super().forward(x) + self.lora_B(self.lora_A(x))


def add_lora(net, rank, seed=0):
    """Freeze a network, and give each attention's q, k, v and output projection a LoRA to train."""
    net.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for attention in [module for module in net.modules() if isinstance(module, Attention)]:
        for name in ("to_q", "to_k", "to_v"):
            setattr(attention, name, LoRALinear(getattr(attention, name), rank, generator))
        attention.to_out[0] = LoRALinear(attention.to_out[0], rank, generator)
    return net


def lora_weights(net):
    """The trained matrices, no copies, by the names that diffusers' `load_lora_weights` reads."""
    return {f"unet.{name}": p.detach() for name, p in net.named_parameters() if "lora_" in name}


def load_lora(net, folder):
    """A LoRA's file, diffusers' or peft's, into a network with a LoRA of its rank."""
    path, own, weights = Path(folder) / LORA, lora_weights(net), {}
    for name, w in read_tensors(path, torch.float32).items():
        name = name.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B.")
        weights["unet." + name.removeprefix("unet.")] = w
    notes = str(safe_open(path, "pt").metadata())
    scales = re.findall(r'"(?:unet\.)?(?:r|lora_alpha)": (\d+\.?\d*)', notes)
    given, needed = ({name: w.shape for name, w in x.items()} for x in (weights, own))
    fits = given == needed and len({*map(float, scales)}) < 2
    require(fits, f"{path} is no plain LoRA of --lora-rank: see tutorial/real_sd.md")
    for name, w in own.items():
        w.copy_(weights[name])
