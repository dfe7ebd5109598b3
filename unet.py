"""The networks of Stable Diffusion v1.x: the UNet eps_theta(x_t, c, t) and the VAE, as plain modules.

The paper (Sec. 3.1, 5) fine-tunes the UNet of Stable Diffusion v1.4 and keeps everything else frozen. Nothing here
knows about RL, schedules or files of settings: tensors in, tensors out. Read it from the bottom of the UNet up:

    time embedding -> ResnetBlock, Attention, TransformerBlock -> Block (one resolution) -> UNet -> VAE -> load, save -> LoRA

Every attribute carries the name that diffusers gives it, so `state_dict()` keys are those of the published safetensors
files and loading is `load_state_dict(strict=True)` without a table of names. The sizes come from the `config.json`
beside the weights, so a miniature (tutorial/zoo) and the real one are the same code.

Deviations from diffusers: what SD v1.x does not use is not here (dropout, linear projections, class conditioning, tiling,
the safety checker), and a config that asks for it is refused by name; the results are equal to float precision.
"""
import json
import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

WEIGHTS, LORA = "diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors"


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
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        h = F.scaled_dot_product_attention(q, k, v)                             # (B, heads, n, dim / heads)
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
        tokens = h.flatten(2).transpose(1, 2).contiguous()                      # (B, h*w, c); once, not in each norm
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
        resnet = partial(ResnetBlock, groups=groups, eps=eps, time_dim=time_dim)
        attention = partial(SpatialTransformer, context_dim=context_dim, heads=heads, groups=groups)

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


class Coder(nn.Module):
    """Either half of the VAE, with neither time nor prompt nor skip connections. `channels`: of each level, in the order of computation."""

    def __init__(self, c_in, c_out, channels, layers, groups, decoder):
        super().__init__()
        levels, inner = nn.ModuleList(), channels[0 if decoder else -1]
        for level, c in enumerate(channels):
            resample = {} if level == len(channels) - 1 else {"upsampler": Upsample(c)} if decoder else {"downsampler": Downsample(c, pad_all_around=False)}
            c_before = channels[max(level - 1, 0)]
            levels.append(Block([ResnetBlock(c_before if i == 0 else c, c, groups, 1e-6) for i in range(layers)], **resample))
        self.conv_in = nn.Conv2d(c_in, channels[0], 3, padding=1)
        self.add_module("up_blocks" if decoder else "down_blocks", levels)
        self.mid_block = Block([ResnetBlock(inner, inner, groups, 1e-6) for _ in range(2)], [VAEAttention(inner, groups)])
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], 1e-6)
        self.conv_out = nn.Conv2d(channels[-1], c_out, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for block in [self.mid_block, *self.up_blocks] if hasattr(self, "up_blocks") else [*self.down_blocks, self.mid_block]:
            for i in range(len(block.resnets)):
                x = block.layer(i, x)
            for resample in [*block.downsamplers, *block.upsamplers]:
                x = resample(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """The autoencoder between pictures and latents, 8 times smaller a side with four levels. Latents here are *scaled*: of variance about 1."""

    def __init__(self, config):
        super().__init__()
        check_config(config, act_fn="silu", use_quant_conv=True, use_post_quant_conv=True, mid_block_add_attention=True,
                     shift_factor=None, latents_mean=None, latents_std=None)
        self.config = config
        self.scaling_factor = config.get("scaling_factor", 0.18215)              # absent from v1.4's file
        channels, layers, groups, c_latent = config["block_out_channels"], config["layers_per_block"], config.get("norm_num_groups", 32), config["latent_channels"]
        self.encoder = Coder(config["in_channels"], 2 * c_latent, channels, layers, groups, decoder=False)
        self.decoder = Coder(c_latent, config["out_channels"], channels[::-1], layers + 1, groups, decoder=True)
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


class LoRALinear(nn.Linear):
    """W x + b + B A x (Hu et al. 2021, scale alpha / rank = 1): W and b frozen, B 0 at first, A ~ N(0, 1 / rank^2) as in the authors' code."""

    def __init__(self, linear, rank, generator):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")            # no memory: the weights are the given layer's
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A, self.lora_B = nn.Linear(self.in_features, rank, bias=False), nn.Linear(rank, self.out_features, bias=False)
        nn.init.normal_(self.lora_A.weight, std=1 / rank, generator=generator)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        return super().forward(x) + self.lora_B(self.lora_A(x))


def add_lora(net, rank, seed=0):
    """Freeze a network, and train a LoRA of each of its attention's projections (q, k, v, out) instead; seeded, so that all processes start alike."""
    net.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for attention in [module for module in net.modules() if isinstance(module, Attention)]:
        for parent, name in ((attention, "to_q"), (attention, "to_k"), (attention, "to_v"), (attention.to_out, "0")):
            setattr(parent, name, LoRALinear(getattr(parent, name), rank, generator))
    return net


def lora_weights(net):
    """The trained matrices of a UNet with LoRA, under the names that diffusers' `load_lora_weights` reads -> {name: tensor}."""
    return {f"unet.{name}": p.detach() for name, p in net.named_parameters() if "lora_" in name}


def save_lora(net, folder):
    """Write the LoRA alone: `folder`/pytorch_lora_weights.safetensors."""
    save_file({name: w.cpu().contiguous() for name, w in lora_weights(net).items()}, Path(folder) / LORA, metadata={"format": "pt"})


def load_lora(net, folder):
    """What `save_lora` wrote, into a network with a LoRA of the same rank. Raises ValueError, one line."""
    weights, own = load_file(path := Path(folder) / LORA), lora_weights(net)
    if {name: w.shape for name, w in weights.items()} != {name: w.shape for name, w in own.items()}:
        raise ValueError(f"{path} holds a LoRA of another network or rank")
    for name, w in own.items():
        w.copy_(weights[name])
