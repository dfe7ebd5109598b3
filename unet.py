"""The networks of Stable Diffusion v1.x: the UNet eps_theta(x_t, c, t) and the VAE, as plain modules.

The paper (Sec. 3.1, 5) fine-tunes the UNet of Stable Diffusion v1.4 and keeps everything else frozen. Nothing here
knows about RL, schedules or files of settings: tensors in, tensors out. Read it from the bottom of the UNet up:

    time embedding -> ResnetBlock, Attention, TransformerBlock -> Block (one resolution) -> UNet -> VAE -> load, save

Every attribute carries the name that diffusers gives it, so `state_dict()` keys are those of the published safetensors
files and loading is `load_state_dict(strict=True)` without a table of names. The sizes come from the `config.json`
beside the weights, so a miniature (tutorial/zoo) and the real one are the same code.

Deviations from diffusers: what SD v1.x does not use is not here (dropout, linear projections, class conditioning, tiling,
the safety checker), and a config that asks for it is refused by name; the results are equal to float precision.
"""
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

WEIGHTS = "diffusion_pytorch_model.safetensors"


def timestep_embedding(timesteps, dim):
    """Sinusoidal embedding of the timestep: [cos(t f_0) ... cos(t f_n), sin(t f_0) ... sin(t f_n)], f_i = 10000^(-i/n), n = dim/2.

    Cosines come first (`flip_sin_to_cos`). timesteps (B,), any number type -> float32 (B, dim).
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half)
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + time))). (B, c_in, h, w), time embedding (B, time_dim) or None -> (B, c_out, h, w)."""

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
    """Multi-head attention softmax(q k^T / sqrt(d)) v of x (B, n, dim) to context (B, m, context_dim), by default to itself -> (B, n, dim)."""

    def __init__(self, dim, context_dim, heads, bias=False):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(context_dim, dim, bias=bias)
        self.to_v = nn.Linear(context_dim, dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2)            # (B, heads, n or m, dim / heads)
                   for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        h = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](h.transpose(1, 2).flatten(2))                     # (B, n, dim)


class FeedForward(nn.Module):
    """GEGLU: half of a wide layer, gated by the gelu of the other half."""

    def __init__(self, dim):
        super().__init__()
        self.net = nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(dim, 8 * dim)}), nn.Identity(), nn.Linear(4 * dim, dim)])    # Identity: a dropout's place

    def forward(self, x):
        x, gate = self.net[0]["proj"](x).chunk(2, dim=-1)
        return self.net[2](x * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention over the pixels, cross-attention to the prompt, feed-forward: each normalised before and added after."""

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
    """A TransformerBlock over the h*w pixels of a picture. (B, c, h, w), context (B, m, context_dim) -> (B, c, h, w)."""

    def __init__(self, dim, context_dim, heads, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, dim, 1e-6)
        self.proj_in = nn.Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(dim, context_dim, heads)])
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x, context):
        h = self.proj_in(self.norm(x))
        tokens = h.flatten(2).transpose(1, 2)                                   # (B, h*w, c)
        tokens = self.transformer_blocks[0](tokens, context)
        return x + self.proj_out(tokens.transpose(1, 2).reshape(h.shape))       # (B, c, h, w)


class Downsample(nn.Module):
    """Halves height and width by a convolution of stride 2. The VAE's pads right and bottom only, the UNet's all around."""

    def __init__(self, dim, pad_all_around):
        super().__init__()
        self.padding = None if pad_all_around else (0, 1, 0, 1)
        self.conv = nn.Conv2d(dim, dim, 3, stride=2, padding=1 if pad_all_around else 0)

    def forward(self, x):
        return self.conv(x if self.padding is None else F.pad(x, self.padding))


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbours, then a convolution."""

    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Block(nn.Module):
    """One resolution: ResNets, each followed by an attention module where `attentions` holds one, then a change of resolution."""

    def __init__(self, resnets, attentions=(), downsampler=None, upsampler=None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList([downsampler] if downsampler else [])
        self.upsamplers = nn.ModuleList([upsampler] if upsampler else [])

    def layer(self, i, x, time=None, context=None):
        x = self.resnets[i](x, time)
        return self.attentions[i](x, context) if i < len(self.attentions) else x


class UNet(nn.Module):
    """eps_theta(x_t, c, t): the noise in x_t.

    forward: latents (B, 4, h, w), timesteps (B,), context (B, m, cross_attention_dim) -> (B, 4, h, w). Every sample of a batch
    has its own timestep, which training on shuffled (sample, timestep) pairs needs.
    """

    def __init__(self, config):
        super().__init__()
        check_config(config, act_fn="silu", center_input_sample=False, class_embed_type=None, downsample_padding=1,
                     dual_cross_attention=False, flip_sin_to_cos=True, freq_shift=0, mid_block_type="UNetMidBlock2DCrossAttn",
                     num_class_embeds=None, only_cross_attention=False, resnet_time_scale_shift="default", transformer_layers_per_block=1,
                     upcast_attention=False, use_linear_projection=False, time_embedding_type="positional", addition_embed_type=None, timestep_post_act=None, mid_block_scale_factor=1)
        self.config, self.gradient_checkpointing = config, False
        channels, layers = config["block_out_channels"], config["layers_per_block"]
        groups, eps, context_dim = config.get("norm_num_groups", 32), config.get("norm_eps", 1e-5), config["cross_attention_dim"]
        heads = config["attention_head_dim"]              # v1.x files call the number of heads `attention_head_dim`
        if not isinstance(heads, int) or any(c % heads for c in channels):
            raise ValueError(f"attention_head_dim = {heads!r} does not divide each of block_out_channels = {channels}")
        time_dim = 4 * channels[0]

        def resnet(c_in, c_out):
            return ResnetBlock(c_in, c_out, groups, eps, time_dim)

        def attention(c):
            return SpatialTransformer(c, context_dim, heads, groups)

        self.conv_in = nn.Conv2d(config["in_channels"], channels[0], 3, padding=1)
        self.time_embedding = nn.ModuleDict({"linear_1": nn.Linear(channels[0], time_dim), "linear_2": nn.Linear(time_dim, time_dim)})

        self.down_blocks, skip_channels, c_in = nn.ModuleList(), [channels[0]], channels[0]
        for level, (kind, c) in enumerate(zip(config["down_block_types"], channels)):
            last = level == len(channels) - 1
            self.down_blocks.append(Block(
                [resnet(c_in if i == 0 else c, c) for i in range(layers)],
                [attention(c) for _ in range(layers if has_attention(kind) else 0)],
                downsampler=None if last else Downsample(c, pad_all_around=True)))
            skip_channels += [c] * (layers if last else layers + 1)
            c_in = c

        self.mid_block = Block([resnet(c_in, c_in), resnet(c_in, c_in)], [attention(c_in)])

        self.up_blocks = nn.ModuleList()
        for level, (kind, c) in enumerate(zip(config["up_block_types"], reversed(channels))):
            last = level == len(channels) - 1
            self.up_blocks.append(Block(
                [resnet((c_in if i == 0 else c) + skip_channels.pop(), c) for i in range(layers + 1)],
                [attention(c) for _ in range(layers + 1 if has_attention(kind) else 0)],
                upsampler=None if last else Upsample(c)))
            c_in = c

        self.conv_norm_out = nn.GroupNorm(groups, channels[0], eps)
        self.conv_out = nn.Conv2d(channels[0], config["out_channels"], 3, padding=1)

    def forward(self, latents, timesteps, context):
        time = self.time_embedding["linear_1"](timestep_embedding(timesteps, self.conv_in.out_channels).to(latents.dtype))
        time = self.time_embedding["linear_2"](F.silu(time))                    # (B, time_dim)
        x = self.conv_in(latents)
        skips = [x]
        for block in self.down_blocks:
            for i in range(len(block.resnets)):
                x = self._run(block, i, x, time, context)
                skips.append(x)
            for downsampler in block.downsamplers:
                x = downsampler(x)
                skips.append(x)
        for i in range(len(self.mid_block.resnets)):
            x = self._run(self.mid_block, i, x, time, context)
        for block in self.up_blocks:
            for i in range(len(block.resnets)):
                x = self._run(block, i, torch.cat([x, skips.pop()], dim=1), time, context)
            for upsampler in block.upsamplers:
                x = upsampler(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def _run(self, block, i, *inputs):
        """One layer, its activations kept for the backward pass, or computed again there: memory against about a third more time."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block.layer, i, *inputs, use_reentrant=False)
        return block.layer(i, *inputs)


class VAEAttention(Attention):
    """Single-head self-attention with a residual connection, in the middle of the encoder and the decoder."""

    def __init__(self, dim, groups):
        super().__init__(dim, dim, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, dim, 1e-6)

    def forward(self, x, context=None):
        h = self.group_norm(x).flatten(2).transpose(1, 2)                       # (B, h*w, c)
        return x + super().forward(h).transpose(1, 2).reshape(x.shape)          # (B, c, h, w)


class Encoder(nn.Module):
    def __init__(self, c_image, c_out, channels, layers, groups):
        super().__init__()
        self.conv_in = nn.Conv2d(c_image, channels[0], 3, padding=1)
        self.down_blocks, c_in = nn.ModuleList(), channels[0]
        for level, c in enumerate(channels):
            last = level == len(channels) - 1
            self.down_blocks.append(Block([ResnetBlock(c_in if i == 0 else c, c, groups, 1e-6) for i in range(layers)],
                                          downsampler=None if last else Downsample(c, pad_all_around=False)))
            c_in = c
        self.mid_block = Block([ResnetBlock(c_in, c_in, groups, 1e-6) for _ in range(2)], [VAEAttention(c_in, groups)])
        self.conv_norm_out = nn.GroupNorm(groups, c_in, 1e-6)
        self.conv_out = nn.Conv2d(c_in, c_out, 3, padding=1)

    def forward(self, x):
        return run_plain(self, self.conv_in(x), [*self.down_blocks, self.mid_block])


class Decoder(nn.Module):
    def __init__(self, c_latent, c_image, channels, layers, groups):
        super().__init__()
        c_in = channels[-1]
        self.conv_in = nn.Conv2d(c_latent, c_in, 3, padding=1)
        self.mid_block = Block([ResnetBlock(c_in, c_in, groups, 1e-6) for _ in range(2)], [VAEAttention(c_in, groups)])
        self.up_blocks = nn.ModuleList()
        for level, c in enumerate(reversed(channels)):
            last = level == len(channels) - 1
            self.up_blocks.append(Block([ResnetBlock(c_in if i == 0 else c, c, groups, 1e-6) for i in range(layers + 1)],
                                        upsampler=None if last else Upsample(c)))
            c_in = c
        self.conv_norm_out = nn.GroupNorm(groups, c_in, 1e-6)
        self.conv_out = nn.Conv2d(c_in, c_image, 3, padding=1)

    def forward(self, z):
        return run_plain(self, self.conv_in(z), [self.mid_block, *self.up_blocks])


def run_plain(net, x, blocks):
    """Either half of the VAE: blocks one after the other, with neither time nor prompt nor skip connections."""
    for block in blocks:
        for i in range(len(block.resnets)):
            x = block.layer(i, x)
        for resample in [*block.downsamplers, *block.upsamplers]:
            x = resample(x)
    return net.conv_out(F.silu(net.conv_norm_out(x)))


class VAE(nn.Module):
    """The autoencoder between pictures and latents, 8 times smaller a side with four levels. Latents here are *scaled*: of variance about 1."""

    def __init__(self, config):
        super().__init__()
        check_config(config, act_fn="silu", use_quant_conv=True, use_post_quant_conv=True, mid_block_add_attention=True,
                     shift_factor=None, latents_mean=None, latents_std=None)
        self.config = config
        self.scaling_factor = config.get("scaling_factor", 0.18215)              # absent from v1.4's file
        shape, c_latent = (config["block_out_channels"], config["layers_per_block"], config.get("norm_num_groups", 32)), config["latent_channels"]
        self.encoder = Encoder(config["in_channels"], 2 * c_latent, *shape)
        self.decoder = Decoder(c_latent, config["out_channels"], *shape)
        self.quant_conv = nn.Conv2d(2 * c_latent, 2 * c_latent, 1)
        self.post_quant_conv = nn.Conv2d(c_latent, c_latent, 1)

    def posterior(self, images):
        """Images (B, 3, H, W) in [-1, 1] -> mean and log variance of q(z | image), unscaled, each (B, 4, H/8, W/8)."""
        mean, log_var = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, log_var.clamp(-30.0, 20.0)

    def encode(self, images):
        """Images (B, 3, H, W) in [-1, 1] -> the posterior's mean as scaled latents (B, 4, H/8, W/8)."""
        return self.posterior(images)[0] * self.scaling_factor

    def decode(self, latents):
        """Scaled latents (B, 4, h, w) -> images (B, 3, 8h, 8w), about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(latents / self.scaling_factor))


def has_attention(kind):
    if kind not in ("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"):
        raise ValueError(f"block type {kind!r} is not implemented")
    return kind.startswith("CrossAttn")


def check_config(config, **required):
    """Raise ValueError where a config asks for something that Stable Diffusion v1.x does not have; absent fields are fine."""
    for name, value in required.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name} = {config[name]!r}; only {value!r} is implemented")


STABLE_DIFFUSION = [*(f"{part}/{name}" for part in ("unet", "vae") for name in ("config.json", WEIGHTS)),
                    "text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/*", "scheduler/*", "ddpo.json"]


def locate(model, flag="--model", files=STABLE_DIFFUSION):
    """The folder of a model: a local one as it is, a hub id (owner/name) through huggingface_hub, only `files`. Raises ValueError, one line."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(model, allow_patterns=files, etag_timeout=5))
    except Exception as error:                          # no network, no such model, no access: many types, one meaning
        raise ValueError(f"{flag} {model}: neither a folder nor to be had from the hub ({type(error).__name__}). Where there is a network: "
                         f"`hf download {model} --local-dir FOLDER`, then {flag} FOLDER") from None


def load(cls, folder, dtype=torch.float32):
    """A `UNet` or `VAE` from a diffusers-layout folder: config.json and safetensors weights of any float type, strictly.

    Old VAE files name the attention projections query, key, value and proj_attn: they are renamed. Raises FileNotFoundError or
    ValueError, one line that names the file.
    """
    folder = Path(folder)
    for name in ("config.json", WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing: not the folder of a {cls.__name__} in the diffusers layout (safetensors)")
    try:
        net = cls(json.loads((folder / "config.json").read_text()))
    except (ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        lacks = "lacks the field " if isinstance(error, KeyError) else ""
        raise ValueError(f"{folder / 'config.json'} is not the config of a {cls.__name__} of Stable Diffusion v1.x: {lacks}{error}") from None
    try:
        weights = load_file(folder / WEIGHTS)
        for old, new in {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}.items():
            weights = {key.replace(old, new): tensor for key, tensor in weights.items()}
        for key, tensor in net.state_dict().items():      # old files keep the VAE's linear projections as 1x1 convolutions
            if key in weights and weights[key].shape == (*tensor.shape, 1, 1):
                weights[key] = weights[key][:, :, 0, 0]
        net.load_state_dict(weights, strict=True)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{folder / WEIGHTS} does not fit {folder / 'config.json'}: {' '.join(str(error).split())[:300]}") from None
    return net.to(dtype)


def save(net, folder, dtype=None):
    """Write config.json and the weights (float type `dtype`, by default their own) so that diffusers and `load` read them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"_class_name": {UNet: "UNet2DConditionModel", VAE: "AutoencoderKL"}[type(net)], **net.config}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {key: tensor.detach().to("cpu", dtype or tensor.dtype).contiguous() for key, tensor in net.state_dict().items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
