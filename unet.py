"""The networks of Stable Diffusion v1.x, the UNet eps_theta(x_t, c, t) and the VAE; their files.

The paper fine-tunes the UNet of Stable Diffusion v1.4 (Sec. 5) and keeps everything else frozen.
Nothing here knows about RL, schedules or settings: tensors in, tensors out. In reading order:

    the layers, from `timestep_embedding` to `Block`, which is one resolution of either network
    UNet; Encoder, Decoder and VAE
    load, save, and what a config must say; locate, loading: models on the hub, and transformers'
    add_lora, lora_off, save_lora, load_lora: low-rank training

Every attribute has the name that diffusers gives it, so the keys of `state_dict()` are those of the
published safetensors files and nothing has to be renamed. Sizes come from the `config.json` beside
the weights: the miniature (tutorial/zoo) and the real one are the same code.

Deviations from diffusers; results are equal to float precision:

    what                               why                    effect
    no dropout, linear projections,    SD v1.x has none       a config that asks for one is refused
    class conditioning, tiling         of them                by its name
    no safety checker                  no part of p(x_0 | c)  a reward sees what the policy drew
    `encode` gives the mean of         less noise, where the  none on DDPO and RWR, which train on
    q(z | image), not a sample of it   zoo's UNet is trained  the latents that they have sampled
    a gradient checkpoint spans a      one rule for the       equal gradients, other memory
    ResNet and the attention after it  whole network
"""

import json
import math
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from scheduler import UserError, require

WEIGHTS = "diffusion_pytorch_model.safetensors"
LORA = "pytorch_lora_weights.safetensors"

# What is fetched of a model on the hub.
STABLE_DIFFUSION = ["*/config.json", f"*/{WEIGHTS}", "text_encoder/model.safetensors"]
STABLE_DIFFUSION += ["tokenizer/*", "scheduler/*", "ddpo.json"]

# The attention's projections in VAE files of 2022, SD v1.4's among them, and their names of today.
RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

# Fields that are false, null or absent in the configs of SD v1.x,
UNUSED_FIELDS = """
addition_embed_type center_input_sample class_embed_type dual_cross_attention latents_mean
latents_std num_class_embeds only_cross_attention shift_factor timestep_post_act upcast_attention
use_linear_projection
""".split()

# and fields that are absent or have this value.
FIXED_FIELDS = {
    "act_fn": "silu",
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_add_attention": True,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "transformer_layers_per_block": 1,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}


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
    """Self-attention over the pixels, cross-attention to the prompt, feed-forward; all residual.

    x (B, n, dim), context (B, m, context_dim) -> (B, n, dim).
    """

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
    """A TransformerBlock over the h w pixels of a picture.

    x (B, dim, h, w), context (B, m, context_dim) -> (B, dim, h, w).
    """

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


class Downsample(nn.Module):
    """A convolution of stride 2. (B, dim, h, w) -> (B, dim, h/2, w/2).

    padding: 1 all around in the UNet; 0 in the VAE, which adds zeros right and below instead.
    """

    def __init__(self, dim, padding):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=2, padding=padding)

    def forward(self, x):
        if self.conv.padding == (0, 0):
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest neighbours, then a convolution. (B, dim, h, w) -> (B, dim, 2h, 2w)."""

    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Block(nn.Module):
    """One resolution: layers, each a ResNet and the attention after it where there is one.

    Whoever builds it adds a `Downsample` or an `Upsample` to `downsamplers` or `upsamplers`.
    """

    def __init__(self, resnets, attentions=()):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()

    def layer(self, i, x, time=None, context=None):
        """Layer i. (B, c_in, h, w), (B, time_dim), (B, m, context_dim) -> (B, c, h, w)."""
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


def unet_block(kind, c_ins, c, resnet, attention):
    """A ResNet to c channels from each of `c_ins`, and attention where `kind` has it -> Block."""
    kinds = ("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D")
    require(kind in kinds, f"block type {kind!r} is not implemented")
    resnets = [resnet(c_in, c) for c_in in c_ins]
    return Block(resnets, [attention(c) for _ in c_ins] if kind.startswith("CrossAttn") else [])


def unet_down_blocks(kinds, channels, layers, resnet, attention):
    """Highest resolution first -> Blocks, and the channels of the skip connections, in order."""
    blocks, skips, c_in = nn.ModuleList(), [channels[0]], channels[0]
    for level, (kind, c) in enumerate(zip(kinds, channels)):
        block = unet_block(kind, [c_in] + [c] * (layers - 1), c, resnet, attention)
        skips += [c] * layers
        if level < len(channels) - 1:
            block.downsamplers.append(Downsample(c, padding=1))
            skips.append(c)
        blocks.append(block)
        c_in = c
    return blocks, skips


def unet_up_blocks(kinds, channels, layers, skips, resnet, attention):
    """Lowest resolution first -> Blocks; each layer takes the last of the skip connections left."""
    blocks, c_in = nn.ModuleList(), channels[0]
    for level, (kind, c) in enumerate(zip(kinds, channels)):
        c_ins = [before + skips.pop() for before in [c_in] + [c] * (layers - 1)]
        block = unet_block(kind, c_ins, c, resnet, attention)
        if level < len(channels) - 1:
            block.upsamplers.append(Upsample(c))
        blocks.append(block)
        c_in = c
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
        check_config(config)
        self.config = config
        self.gradient_checkpointing = False
        channels, layers = config["block_out_channels"], config["layers_per_block"]
        groups, eps = config.get("norm_num_groups", 32), config.get("norm_eps", 1e-5)
        heads = config["attention_head_dim"]  # so the files call the number of heads
        require(
            isinstance(heads, int) and not any(c % heads for c in channels),
            f"attention_head_dim = {heads!r} must divide each of block_out_channels = {channels}",
        )
        first, last, time_dim = channels[0], channels[-1], 4 * channels[0]
        resnet = partial(ResnetBlock, groups=groups, eps=eps, time_dim=time_dim)
        context_dim = config["cross_attention_dim"]
        attention = partial(SpatialTransformer, context_dim=context_dim, heads=heads, groups=groups)
        self.conv_in = nn.Conv2d(config["in_channels"], first, 3, padding=1)
        linear_1, linear_2 = nn.Linear(first, time_dim), nn.Linear(time_dim, time_dim)
        self.time_embedding = nn.ModuleDict({"linear_1": linear_1, "linear_2": linear_2})
        self.down_blocks, skips = unet_down_blocks(
            config["down_block_types"], channels, layers, resnet, attention
        )
        self.mid_block = Block([resnet(last, last), resnet(last, last)], [attention(last)])
        self.up_blocks = unet_up_blocks(
            config["up_block_types"], channels[::-1], layers + 1, skips, resnet, attention
        )
        self.conv_norm_out = nn.GroupNorm(groups, first, eps)
        self.conv_out = nn.Conv2d(first, config["out_channels"], 3, padding=1)

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
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block.layer, i, *inputs, use_reentrant=False)
        return block.layer(i, *inputs)


def vae_resnets(c_in, c, count, groups):
    """`count` ResNets without time, the first from c_in to c channels -> list."""
    return [ResnetBlock(c_in if i == 0 else c, c, groups, 1e-6) for i in range(count)]


class Encoder(nn.Module):
    """Pictures (B, c_in, H, W) -> (B, c_out, H/8, W/8) with four levels."""

    def __init__(self, c_in, c_out, channels, layers, groups):
        super().__init__()
        # initialised before conv_in as the zoo's VAE was, and registered after it
        blocks = nn.ModuleList()
        for level, c in enumerate(channels):
            resamplers = [Downsample(c, padding=0)] if level < len(channels) - 1 else []
            block = Block(vae_resnets(channels[max(level - 1, 0)], c, layers, groups))
            block.downsamplers.extend(resamplers)
            blocks.append(block)
        c = channels[-1]
        self.conv_in = nn.Conv2d(c_in, channels[0], 3, padding=1)
        self.down_blocks = blocks
        self.mid_block = Block(vae_resnets(c, c, 2, groups), [VAEAttention(c, groups)])
        self.conv_norm_out = nn.GroupNorm(groups, c, 1e-6)
        self.conv_out = nn.Conv2d(c, c_out, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for block in [*self.down_blocks, self.mid_block]:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Latents (B, c_in, h, w) -> (B, c_out, 8h, 8w) with four levels; lowest resolution first."""

    def __init__(self, c_in, c_out, channels, layers, groups):
        super().__init__()
        blocks = nn.ModuleList()
        for level, c in enumerate(channels):
            resamplers = [Upsample(c)] if level < len(channels) - 1 else []
            block = Block(vae_resnets(channels[max(level - 1, 0)], c, layers, groups))
            block.upsamplers.extend(resamplers)
            blocks.append(block)
        c = channels[0]
        self.conv_in = nn.Conv2d(c_in, c, 3, padding=1)
        self.up_blocks = blocks
        self.mid_block = Block(vae_resnets(c, c, 2, groups), [VAEAttention(c, groups)])
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], 1e-6)
        self.conv_out = nn.Conv2d(channels[-1], c_out, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for block in [self.mid_block, *self.up_blocks]:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """The autoencoder between pictures and latents, 8 times smaller a side with four levels.

    Latents are *scaled* here, to a variance of about 1, as the UNet has them. Raises UserError for
    another model's config.
    """

    def __init__(self, config):
        super().__init__()
        check_config(config)
        self.config = config
        # absent from v1.4's file
        self.scaling_factor = config.get("scaling_factor", 0.18215)
        channels, layers = config["block_out_channels"], config["layers_per_block"]
        groups, c = config.get("norm_num_groups", 32), config["latent_channels"]
        self.encoder = Encoder(config["in_channels"], 2 * c, channels, layers, groups)
        self.decoder = Decoder(c, config["out_channels"], channels[::-1], layers + 1, groups)
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1)
        self.post_quant_conv = nn.Conv2d(c, c, 1)

    def posterior(self, images):
        """Mean and log variance of q(z | image), unscaled.

        images (B, 3, H, W) in [-1, 1] -> two (B, 4, H/8, W/8).
        """
        mean, log_var = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, log_var.clamp(-30.0, 20.0)

    def encode(self, images):
        """The posterior's mean, scaled. images (B, 3, H, W) in [-1, 1] -> (B, 4, H/8, W/8)."""
        return self.posterior(images)[0] * self.scaling_factor

    def decode(self, latents):
        """Scaled latents (B, 4, h, w) -> images (B, 3, 8h, 8w), about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(latents / self.scaling_factor))


def check_config(config):
    """Raise UserError unless a config, a UNet's or a VAE's, is one of Stable Diffusion v1.x."""
    for name in UNUSED_FIELDS:
        require(not config.get(name), f"{name} = {config.get(name)!r}; SD v1.x has none")
    for name, value in FIXED_FIELDS.items():
        given = config.get(name, value)
        require(given == value, f"{name} = {given!r}; only {value!r} (SD v1.x) is implemented")


def load(cls, folder, dtype=torch.float32):
    """A `UNet` or `VAE` from a folder in the diffusers layout, its weights as `dtype`.

    They are safetensors of any float type, and must be all and no more. Raises UserError.
    """
    config_path, path = Path(folder) / "config.json", Path(folder) / WEIGHTS
    for file in (config_path, path):
        require(
            file.is_file(),
            f"{file} is missing: not the folder of a {cls.__name__} in the diffusers layout "
            "(safetensors)",
        )
    try:
        net = cls(json.loads(config_path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        lacks = "lacks the field " if isinstance(error, KeyError) else ""
        raise UserError(
            f"{config_path} is not the config of a {cls.__name__} of Stable Diffusion v1.x: "
            f"{lacks}{error}"
        ) from None
    try:
        net.load_state_dict(renamed(load_file(path), net.state_dict()))
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{path} does not fit {config_path}: {one_line(error)}") from None
    return net.to(dtype)


def renamed(weights, own):
    """An old VAE file's weights by today's names; 1x1 convolutions become linear as in `own`."""
    new = {}
    for name, tensor in weights.items():
        for old_part, part in RENAMED.items():
            name = name.replace(f".{old_part}.", f".{part}.")
        if name in own and tensor.shape == (*own[name].shape, 1, 1):
            tensor = tensor[:, :, 0, 0]
        new[name] = tensor
    return new


def one_line(error):
    """What an error says, in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]


def save(net, folder, dtype=None):
    """Write config.json and the weights as diffusers and `load` read them; `dtype`: the file's."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kind = {UNet: "UNet2DConditionModel", VAE: "AutoencoderKL"}[type(net)]
    config = json.dumps({"_class_name": kind, **net.config}, indent=2)
    (folder / "config.json").write_text(config + "\n", encoding="utf-8")
    save_tensors(net.state_dict(), folder / WEIGHTS, dtype)


def save_tensors(tensors, path, dtype=None):
    """Write {name: tensor}, on any device and in any layout, as safetensors of their own dtype."""
    on_cpu = {name: t.detach().to("cpu", dtype or t.dtype) for name, t in tensors.items()}
    contiguous = {name: tensor.contiguous() for name, tensor in on_cpu.items()}
    save_file(contiguous, path, metadata={"format": "pt"})


def locate(model, flag="--model", files=STABLE_DIFFUSION):
    """The folder of a model: a local one as it is, or `files` of a hub id (owner/name) -> Path.

    Raises UserError that names `flag`.
    """
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=files, etag_timeout=5))
    except Exception as error:  # no network, no such model, no access: many types, one meaning
        raise UserError(
            f"{flag} {model}: neither a folder nor to be had from the hub "
            f"({type(error).__name__}). Where there is a network: "
            f"`hf download {model} --local-dir FOLDER`, then {flag} FOLDER"
        ) from None


def loading(flag, name, cls, folder, **options):
    """What transformers' `cls` reads from a folder, quietly; a network needs a `dtype`.

    Raises UserError for whatever goes wrong, missing weights too: transformers would put random
    numbers in their place.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    options = {"local_files_only": True, "trust_remote_code": False, **options}
    refusal = f"{flag} {name}: no {cls.__name__} in it"
    try:
        if "dtype" not in options:
            return cls.from_pretrained(folder, **options)
        net, found = cls.from_pretrained(folder, output_loading_info=True, **options)
    except Exception as error:
        kind, text = type(error).__name__, one_line(error)[:160]
        raise UserError(f"{refusal} ({kind}: {text})") from None
    # a pooler is not used here, and many files have none
    lost = [key for key in found["missing_keys"] if "pooler" not in key]
    if lost:
        raise UserError(f"{refusal}: its weights lack {len(lost)} tensors, such as {lost[0]}")
    return net.eval()


class LoRALinear(nn.Linear):
    """W x + b + B A x: W and b are frozen (Hu et al. 2021, arXiv 2106.09685; alpha / rank = 1).

    B is 0 at first and A ~ N(0, 1 / rank^2), as in diffusers when the authors used it. The wrapped
    layer's own parameters are kept under their names. (..., in) -> (..., out).
    """

    def __init__(self, linear, rank, generator):
        bias = linear.bias is not None
        # meta takes no memory: the weights are those of the given layer
        super().__init__(linear.in_features, linear.out_features, bias=bias, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Linear(self.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False)
        nn.init.normal_(self.lora_A.weight, std=1 / rank, generator=generator)
        nn.init.zeros_(self.lora_B.weight)
        self.enabled = True

    def forward(self, x):
        h = super().forward(x)
        if self.enabled:
            h = h + self.lora_B(self.lora_A(x))
        return h


def add_lora(net, rank, seed=0):
    """Freeze a network; train a LoRA of every attention's q, k, v and output projection instead.

    Equal seeds give equal matrices, so that all processes start alike -> the network itself.
    """
    net.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for attention in [module for module in net.modules() if isinstance(module, Attention)]:
        attention.to_q = LoRALinear(attention.to_q, rank, generator)
        attention.to_k = LoRALinear(attention.to_k, rank, generator)
        attention.to_v = LoRALinear(attention.to_v, rank, generator)
        attention.to_out[0] = LoRALinear(attention.to_out[0], rank, generator)
    return net


@contextmanager
def lora_off(net):
    """Inside `with lora_off(net):` its LoRA, if it has one, adds nothing: it is the base model."""
    adapters = [module for module in net.modules() if isinstance(module, LoRALinear)]
    before = [adapter.enabled for adapter in adapters]
    for adapter in adapters:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter, enabled in zip(adapters, before):
            adapter.enabled = enabled


def lora_weights(net):
    """The trained matrices, no copies, by the names that diffusers' `load_lora_weights` reads."""
    return {f"unet.{name}": p.detach() for name, p in net.named_parameters() if "lora_" in name}


def save_lora(net, folder):
    """Write the LoRA alone: `folder`/pytorch_lora_weights.safetensors."""
    save_tensors(lora_weights(net), Path(folder) / LORA)


def load_lora(net, folder):
    """What `save_lora` wrote, into a network with a LoRA of the same rank. Raises UserError."""
    path = Path(folder) / LORA
    weights, own = load_file(path), lora_weights(net)
    require(
        {name: w.shape for name, w in weights.items()}
        == {name: w.shape for name, w in own.items()},
        f"{path} holds a LoRA of another network or rank",
    )
    for name, w in own.items():
        w.copy_(weights[name])
