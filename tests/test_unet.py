"""unet.py against diffusers: the same names, numbers and files; one clear line for a broken file.

Formulas are compared in float64, where the two codes may differ by 1e-9 at most: in float32 a group
norm with a wrong epsilon hides in the rounding. The weights are randomised beyond diffusers'
initialisation, whose norms are all ones and zeros and would hide a swapped pair.
"""

import copy
import json
import math
import os
import resource
import shutil
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from huggingface_hub.utils import filter_repo_objects
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPImageProcessorPil,
    CLIPTextModel,
    CLIPTokenizer,
)

import unet
from scheduler import UserError

CONTEXT = 12


def unet_config(channels, layers, **more):
    """In diffusers' words, with attention at all levels but the lowest, as in SD v1.x."""
    attending = len(channels) - 1
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": layers,
        "block_out_channels": channels,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
        "cross_attention_dim": CONTEXT,
        "down_block_types": [*["CrossAttnDownBlock2D"] * attending, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * attending],
    }
    return config | more


def vae_config(channels, layers, **more):
    config = {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "layers_per_block": layers,
        "block_out_channels": channels,
        "norm_num_groups": 4,
        "sample_size": 32,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
    }
    return config | more


UNETS = {
    "1 level": unet_config([8], 1),
    "2 levels, 1 layer": unet_config([8, 16], 1),
    "2 levels, 2 layers": unet_config([8, 16], 2),
    "3 levels, 1 layer, more heads": unet_config([8, 8, 16], 1, attention_head_dim=4),
    "4 levels, 2 layers, as in SD": unet_config([8, 16, 24, 24], 2),
    "4 levels, 1 layer, other eps and sizes": unet_config(
        [16, 16, 8, 24], 1, norm_eps=1e-4, norm_num_groups=8
    ),
}
VAES = {
    "2 levels, 1 layer": vae_config([8, 16], 1),
    "4 levels, 2 layers, as in SD": vae_config([8, 16, 24, 24], 2, scaling_factor=0.5),
}
SD_UNET = unet_config(
    [320, 640, 1280, 1280],
    2,
    sample_size=64,
    attention_head_dim=8,
    norm_num_groups=32,
    cross_attention_dim=768,
)
SD_VAE = vae_config([128, 256, 512, 512], 2, norm_num_groups=32, sample_size=512)


def randomise(net, seed=0):
    """Every tensor its own numbers, and small convolutions: activations well below 1 are where the
    norms' epsilons show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1:
                p.copy_(("norm" in name and name.endswith("weight")) + 0.1 * noise)
            else:
                p.copy_((0.3 if p.ndim == 4 else 1.0) * noise / p[0].numel() ** 0.5)
    return net


def write(cls, config, folder, seed=0):
    """A diffusers model with random weights, and its folder as save_pretrained writes it."""
    net = randomise(cls(**config), seed).eval()
    net.save_pretrained(folder)
    return net


def unet_inputs(dtype=torch.float32, batch=3, h=8, w=16, context=CONTEXT):
    """Latents that are not square, and a timestep of its own for every sample, 0 and 999 too."""
    g = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 4, h, w, generator=g)
    prompts = torch.randn(batch, 7, context, generator=g)
    return latents.to(dtype), torch.tensor([0, 999, 481, 21])[:batch], prompts.to(dtype)


def relative_error(ours, theirs, floor=0.0):
    """The largest difference, beside the largest number (or `floor`)."""
    error = ((ours - theirs).abs().max() / max(theirs.abs().max().item(), floor)).item()
    return math.inf if math.isnan(error) else error  # max() over tensors would pass over a NaN


def assert_gradients_equal(ours, theirs, tolerance):
    """Tensor by tensor. What is zero on paper (the gradient of a key's bias, under softmax) is
    noise, and is judged beside the largest gradient."""
    assert ours.keys() == theirs.keys()
    floor = 1e-4 * max(g.abs().max().item() for g in theirs.values())
    worst = max((relative_error(ours[name], theirs[name], floor), name) for name in theirs)
    assert worst[0] < tolerance, worst


def gradients(net, **inputs):
    """Of a network's parameters and of named inputs -> {name: tensor}."""
    return {name: x.grad for name, x in [*net.named_parameters(), *inputs.items()]}


def backward(output, target_seed=2):
    """A loss that weighs every output element differently: no gradient is lost by symmetry."""
    generator = torch.Generator().manual_seed(target_seed)
    target = torch.randn(output.shape, generator=generator)
    (output - target.to(output.dtype)).square().mean().backward()


# --- names


def shapes(net):
    return {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}


@pytest.mark.parametrize("config", UNETS.values(), ids=UNETS)
def test_unet_keys_and_shapes_are_those_of_diffusers(config):
    with torch.device("meta"):
        assert shapes(unet.UNet(config)) == shapes(UNet2DConditionModel(**config))


@pytest.mark.parametrize("config", VAES.values(), ids=VAES)
def test_vae_keys_and_shapes_are_those_of_diffusers(config):
    with torch.device("meta"):
        assert shapes(unet.VAE(config)) == shapes(AutoencoderKL(**config))


def test_full_size_unet_has_the_686_tensors_and_859520964_parameters_of_sd_v1_4():
    with torch.device("meta"):
        ours, theirs = unet.UNet(SD_UNET), UNet2DConditionModel(**SD_UNET)
    assert shapes(ours) == shapes(theirs)
    assert len(ours.state_dict()) == 686
    assert sum(p.numel() for p in ours.parameters()) == 859_520_964


def test_full_size_vae_has_the_248_tensors_of_sd_v1_4():
    with torch.device("meta"):
        ours, theirs = unet.VAE(SD_VAE), AutoencoderKL(**SD_VAE)
    assert shapes(ours) == shapes(theirs)
    assert len(ours.state_dict()) == 248


# --- numbers


@pytest.mark.parametrize("config", UNETS.values(), ids=UNETS)
def test_unet_output_and_gradients_equal_diffusers_with_mixed_timesteps(config, tmp_path):
    theirs = write(UNet2DConditionModel, config, tmp_path).double()
    ours = unet.load(unet.UNet, tmp_path, torch.float64)
    results = []
    for net, call in (
        (ours, lambda x, t, c: ours(x, t, c)),
        (theirs, lambda x, t, c: theirs(x, t, c).sample),
    ):
        latents, timesteps, context = unet_inputs(torch.float64)
        latents.requires_grad_()
        context.requires_grad_()
        output = call(latents, timesteps, context)
        backward(output)
        results.append((output.detach(), gradients(net, latents=latents, context=context)))
    (output, grads), (their_output, their_grads) = results
    assert output.dtype == torch.float64
    assert relative_error(output, their_output) < 1e-9
    assert_gradients_equal(grads, their_grads, 1e-7)


@pytest.mark.parametrize("config", UNETS.values(), ids=UNETS)
def test_unet_output_equals_diffusers_in_float32(config, tmp_path):
    theirs, ours = write(UNet2DConditionModel, config, tmp_path), unet.load(unet.UNet, tmp_path)
    inputs = unet_inputs()
    with torch.no_grad():
        assert relative_error(ours(*inputs), theirs(*inputs).sample) < 1e-5


def test_norm_fields_absent_from_a_unet_config_have_diffusers_defaults():
    """A file that diffusers saves names every field; one from the hub or by hand need not."""
    config = unet_config([32, 64], 1)
    del config["norm_num_groups"]
    ours, theirs = (
        randomise(unet.UNet(config)).double(),
        UNet2DConditionModel(**config).double().eval(),
    )
    theirs.load_state_dict(ours.state_dict())
    inputs = unet_inputs(torch.float64)
    with torch.no_grad():
        assert relative_error(ours(*inputs), theirs(*inputs).sample) < 1e-9


def test_a_sample_does_not_see_the_timesteps_or_prompts_of_its_neighbours():
    net = randomise(unet.UNet(UNETS["2 levels, 1 layer"])).double()
    latents, timesteps, context = unet_inputs(torch.float64)
    with torch.no_grad():
        together = net(latents, timesteps, context)
        alone = torch.cat(
            [
                net(latents[i : i + 1], timesteps[i : i + 1], context[i : i + 1])
                for i in range(len(latents))
            ]
        )
    assert relative_error(together, alone) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_unet_in_half_precision_stays_near_float32(dtype, tmp_path):
    write(UNet2DConditionModel, UNETS["2 levels, 1 layer"], tmp_path)
    half, full = unet.load(unet.UNet, tmp_path, dtype), unet.load(unet.UNet, tmp_path)
    with torch.no_grad():
        output = half(*unet_inputs(dtype))
        assert output.dtype == dtype
        assert relative_error(output.float(), full(*unet_inputs())) < 16 * torch.finfo(dtype).eps


def vae_pictures(dtype=torch.float32):
    return torch.rand(2, 3, 16, 32, generator=torch.Generator().manual_seed(3)).to(dtype) * 2 - 1


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("config", VAES.values(), ids=VAES)
def test_vae_posterior_encode_and_decode_equal_diffusers(config, dtype, tolerance, tmp_path):
    theirs = write(AutoencoderKL, config, tmp_path).to(dtype)
    ours = unet.load(unet.VAE, tmp_path, dtype)
    pictures = vae_pictures(dtype)
    with torch.no_grad():
        posterior = theirs.encode(pictures).latent_dist
        mean, log_var = ours.posterior(pictures)
        assert relative_error(mean, posterior.mean) < tolerance
        assert relative_error(log_var, posterior.logvar) < tolerance
        latents = posterior.mean * theirs.config.scaling_factor
        encoded = ours.encode(pictures)
        assert encoded.shape == latents.shape  # not merely one that broadcasts to it
        assert relative_error(encoded, latents) < tolerance
        decoded = theirs.decode(latents / theirs.config.scaling_factor).sample
        assert relative_error(ours.decode(latents), decoded) < tolerance


@pytest.mark.parametrize("config", VAES.values(), ids=VAES)
def test_vae_gradients_equal_diffusers(config, tmp_path):
    theirs = write(AutoencoderKL, config, tmp_path).double()
    ours = unet.load(unet.VAE, tmp_path, torch.float64)
    grads = []
    for net in (ours, theirs):
        pictures = vae_pictures(torch.float64).requires_grad_()
        if net is ours:
            mean, log_var = net.posterior(pictures)
            decoded = net.decode(mean * net.scaling_factor)
        else:
            posterior = net.encode(pictures).latent_dist
            mean, log_var, decoded = (
                posterior.mean,
                posterior.logvar,
                net.decode(posterior.mean).sample,
            )
        backward(torch.cat([mean.flatten(), log_var.flatten(), decoded.flatten()]))
        grads.append(gradients(net, pictures=pictures))
    assert_gradients_equal(*grads, 1e-7)


def test_vae_clamps_the_log_variance_as_diffusers_does(tmp_path):
    theirs = randomise(AutoencoderKL(**VAES["2 levels, 1 layer"])).eval()
    with torch.no_grad():
        theirs.quant_conv.bias[4:] = torch.tensor([-100.0, 100.0, -29.9, 19.9])
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        log_var = unet.load(unet.VAE, tmp_path).posterior(vae_pictures())[1]
        assert torch.allclose(log_var, theirs.encode(vae_pictures()).latent_dist.logvar, atol=1e-5)
    assert (log_var.min(), log_var.max()) == (-30, 20)


def test_vae_without_a_scaling_factor_in_its_config_has_that_of_sd_v1():
    assert unet.VAE(VAES["2 levels, 1 layer"]).scaling_factor == 0.18215


def test_gradient_checkpointing_computes_twice_and_changes_nothing():
    results = []
    for checkpointing in (False, True):
        net = randomise(unet.UNet(UNETS["4 levels, 2 layers, as in SD"]))
        net.gradient_checkpointing = checkpointing
        calls = []
        for block in (net.down_blocks[0], net.mid_block, net.up_blocks[-1]):
            block.resnets[0].register_forward_hook(lambda *_: calls.append(1))
        latents, timesteps, context = unet_inputs()
        latents.requires_grad_()
        output = net(latents, timesteps, context)
        backward(output)
        results.append((output.detach(), gradients(net, latents=latents)))
        assert len(calls) == (6 if checkpointing else 3)
    assert relative_error(results[1][0], results[0][0]) < 1e-6
    assert_gradients_equal(results[1][1], results[0][1], 1e-6)


@pytest.mark.parametrize("dim", [8, 320])
def test_timestep_embedding_equals_diffusers(dim):
    timesteps = torch.tensor([0, 1, 21, 500, 981, 999])
    theirs = get_timestep_embedding(timesteps, dim, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.allclose(unet.timestep_embedding(timesteps, dim), theirs, atol=1e-7, rtol=0)


def test_timestep_embedding_by_hand_has_cosines_first():
    # dim 4: frequencies 10000^0 = 1 and 10000^(-1/2) = 0.01: t = 100 turns by 100 and 1 radian
    expected = torch.tensor([[math.cos(100), 0.5403023, math.sin(100), 0.8414710]])
    assert torch.allclose(unet.timestep_embedding(torch.tensor([100]), 4), expected, atol=1e-6)


# --- files


def test_vae_file_with_the_old_attention_names_loads_to_the_same_output(tmp_path):
    theirs = write(AutoencoderKL, VAES["2 levels, 1 layer"], tmp_path)
    weights, old = load_file(tmp_path / unet.WEIGHTS), {}
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for key, tensor in weights.items():
        for new_name, old_name in names.items():
            if f".{new_name}." in key:
                key = key.replace(f".{new_name}.", f".{old_name}.")
        old[key] = tensor
    assert len(set(old) - set(weights)) == 16  # 4 projections with biases, in encoder and decoder
    save_file(old, tmp_path / unet.WEIGHTS)
    ours = unet.load(unet.VAE, tmp_path)
    with torch.no_grad():
        mean = theirs.encode(vae_pictures()).latent_dist.mean
        assert relative_error(ours.posterior(vae_pictures())[0], mean) < 1e-5
        decoded = ours.decode(mean * ours.scaling_factor)
        assert relative_error(decoded, theirs.decode(mean).sample) < 1e-5


def test_diffusers_reads_what_save_writes_for_a_unet(tmp_path):
    ours = randomise(unet.UNet(UNETS["4 levels, 1 layer, other eps and sizes"]))
    unet.save(ours, tmp_path / "a" / "unet")
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "a" / "unet").eval()
    with torch.no_grad():
        assert relative_error(ours(*unet_inputs()), theirs(*unet_inputs()).sample) < 1e-5


def test_diffusers_reads_what_save_writes_for_a_vae(tmp_path):
    ours = randomise(unet.VAE(VAES["4 levels, 2 layers, as in SD"]))
    unet.save(ours, tmp_path)
    theirs = AutoencoderKL.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        mean = theirs.encode(vae_pictures()).latent_dist.mean
        latents = mean * theirs.config.scaling_factor
        assert relative_error(ours.encode(vae_pictures()), latents) < 1e-5
        decoded = ours.decode(mean * ours.scaling_factor)
        assert relative_error(decoded, theirs.decode(mean).sample) < 1e-5


def test_a_loaded_network_is_saved_with_its_whole_config_and_the_same_bits(tmp_path):
    write(UNet2DConditionModel, UNETS["2 levels, 1 layer"], tmp_path / "theirs")
    unet.save(unet.load(unet.UNet, tmp_path / "theirs"), tmp_path / "ours")
    before, after = (load_file(tmp_path / name / unet.WEIGHTS) for name in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    before, after = ((tmp_path / name / "config.json").read_text() for name in ("theirs", "ours"))
    assert json.loads(before) == json.loads(after)


@pytest.mark.parametrize("cls, configs", [(unet.UNet, UNETS), (unet.VAE, VAES)])
def test_float16_save_halves_the_file_and_loads_as_float32(cls, configs, tmp_path):
    net = randomise(cls(configs["2 levels, 1 layer"]))
    unet.save(net, tmp_path, torch.float16)
    weights = load_file(tmp_path / unet.WEIGHTS)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert next(net.parameters()).dtype == torch.float32  # saving leaves the network alone
    for key, tensor in unet.load(cls, tmp_path).state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, net.state_dict()[key].half().float())


@pytest.mark.parametrize("device_dtype", [torch.float32, torch.bfloat16])
def test_save_tensors_writes_any_layout_as_it_is(device_dtype, tmp_path):
    x = torch.arange(24.0).reshape(2, 3, 2, 2).to(device_dtype)
    tensors = {
        "transposed": x[0, :, 0].T,
        "channels last": x.to(memory_format=torch.channels_last),
        "part": x[:, 1:2],
        "trained": x.clone().requires_grad_(),
        "scalar": torch.tensor(3),
    }
    unet.save_tensors(tensors, tmp_path / "x.safetensors")
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses a file without


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_weights_can_be_read_by_whom_the_umask_lets(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        unet.save(unet.VAE(VAES["2 levels, 1 layer"]), tmp_path / "vae")
        net, _ = lora_pair()
        unet.save_tensors(unet.lora_weights(net), tmp_path / unet.LORA)
        unet.save_tensors({"x": torch.ones(2)}, tmp_path / "x.safetensors")
        unet.save_tensors({"x": torch.ones(3)}, tmp_path / "x.safetensors")
    finally:
        os.umask(before)
    files = [tmp_path / unet.LORA, tmp_path / "x.safetensors", *(tmp_path / "vae").iterdir()]
    assert {path.name: path.stat().st_mode & 0o777 for path in files} == {
        path.name: mode for path in files
    }
    assert len(files) == 4 and len(load_file(tmp_path / "x.safetensors")["x"]) == 3


# --- LoRA (more of it in test_scale.py)


def lora_pair(rank=3):
    """A network with a LoRA that does something, and the same without."""
    plain = randomise(unet.UNet(UNETS["2 levels, 1 layer"]))
    net = unet.add_lora(copy.deepcopy(plain), rank)
    generator = torch.Generator().manual_seed(7)
    for name, w in unet.lora_weights(net).items():
        if "lora_B" in name:
            w.copy_(0.2 * torch.randn(w.shape, generator=generator))
    return net, plain


def test_a_lora_file_gives_back_the_same_numbers_and_nothing_else(tmp_path):
    net, _ = lora_pair()
    unet.save_tensors(unet.lora_weights(net), tmp_path / unet.LORA)
    other = unet.add_lora(randomise(unet.UNet(UNETS["2 levels, 1 layer"])), 3, seed=1)
    unet.load_lora(other, tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))
    assert [p.requires_grad for p in net.parameters()] == [
        p.requires_grad for p in other.parameters()
    ]
    assert load_file(tmp_path / unet.LORA).keys() == unet.lora_weights(net).keys()


@pytest.mark.parametrize("rank", [2, 4])
def test_a_lora_of_another_rank_is_refused_and_nothing_is_changed(rank, tmp_path):
    unet.save_tensors(unet.lora_weights(lora_pair(rank)[0]), tmp_path / unet.LORA)
    net, _ = lora_pair(3)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(UserError, match=f"{unet.LORA} is no plain LoRA of --lora-rank"):
        unet.load_lora(net, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


# --- faults


def edit_config(**changes):
    def fault(folder):
        path = folder / "config.json"
        config = json.loads(path.read_text()) | changes
        given = {name: value for name, value in config.items() if value != "absent"}
        path.write_text(json.dumps(given))

    return fault


def edit_weights(change):
    def fault(folder):
        weights = load_file(folder / unet.WEIGHTS)
        change(weights)
        save_file(weights, folder / unet.WEIGHTS)

    return fault


def put(name, content):
    def fault(folder):
        (folder / name).write_bytes(content)

    return fault


def remove(name):
    def fault(folder):
        (folder / name).unlink()

    return fault


def folder_for(name):
    def fault(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return fault


def truncate(length):
    def fault(folder):
        path = folder / unet.WEIGHTS
        path.write_bytes(path.read_bytes()[:length])

    return fault


def more(folder):
    with (folder / unet.WEIGHTS).open("ab") as file:
        file.write(b"\0" * 64)


CONFIG, WEIGHTS = "config.json", unet.WEIGHTS
NO_CONFIG = f"{CONFIG} is not the config of a UNet of Stable Diffusion v1.x"
NO_WEIGHTS = f"{WEIGHTS} cannot be read as safetensors"
NOT_A_CONFIG = f"{CONFIG} is not the config of a UNet"
FAULTS = {  # what is done to the folder, and what the message must say, the file above all
    "no folder": (shutil.rmtree, f"{NO_CONFIG}: .*No such file"),
    "no config": (remove(CONFIG), f"{NO_CONFIG}: .*No such file"),
    "no weights": (remove(WEIGHTS), f"holds no {WEIGHTS}; of .bin files diffusers makes it"),
    "a folder for a config": (folder_for(CONFIG), f"{NO_CONFIG}: .*Is a directory"),
    "a folder for weights": (folder_for(WEIGHTS), f"{NO_WEIGHTS}: .*Is a directory"),
    "config is not JSON": (put(CONFIG, b"{not json"), NO_CONFIG),
    "config is empty": (put(CONFIG, b""), NO_CONFIG),
    "config is not text": (put(CONFIG, b"\xff\xfe\x00"), NO_CONFIG),
    "config is nested too deeply": (put(CONFIG, b"[" * 10**5), NO_CONFIG),
    "config is a list": (put(CONFIG, b"[]"), f"{NOT_A_CONFIG}.*not a JSON object"),
    "config of another size": (
        edit_config(block_out_channels=[8, 32]),
        f"{WEIGHTS} does not fit .*{CONFIG}.*mismatch",
    ),
    "missing tensor": (
        edit_weights(lambda weights: weights.pop("conv_out.bias")),
        f"{WEIGHTS} does not fit .*conv_out.bias",
    ),
    "extra tensor": (
        edit_weights(lambda weights: weights.update(extra=torch.zeros(1))),
        f"{WEIGHTS} does not fit .*extra",
    ),
    "wrong shape": (
        edit_weights(lambda weights: weights.update({"conv_out.bias": torch.zeros(5)})),
        f"{WEIGHTS} does not fit .*conv_out.bias",
    ),
    "weights cut short": (truncate(-100), NO_WEIGHTS),
    "weights cut in the header": (truncate(1000), NO_WEIGHTS),
    "weights with more behind them": (more, NO_WEIGHTS),
    "empty weights": (put(WEIGHTS, b""), NO_WEIGHTS),
    "weights in another format": (put(WEIGHTS, b"PK\x03\x04" * 1000), NO_WEIGHTS),
    "a pointer to a large file": (put(WEIGHTS, b"version https://git-lfs.git"), NO_WEIGHTS),
    "a page of errors": (put(WEIGHTS, b"<html>" + b"\n" * 9000), NO_WEIGHTS),
    "no tensors": (put(WEIGHTS, b"\x02" + b"\0" * 7 + b"{}"), f"{WEIGHTS} does not fit .*Missing"),
}


def assert_refused(words, call, *arguments):
    """One line of our own error type, nothing hidden behind it, that says `words` (a regex)."""
    with pytest.raises(UserError, match=words) as caught:
        call(*arguments)
    assert type(caught.value) is UserError
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize("fault, words", FAULTS.values(), ids=FAULTS)
def test_a_broken_folder_is_refused_in_one_line_that_names_the_file(fault, words, tmp_path):
    folder = tmp_path / "unet"
    write(UNet2DConditionModel, UNETS["2 levels, 1 layer"], folder)
    fault(folder)
    assert_refused(words, unet.load, unet.UNet, folder)


@contextmanager
def nobody():
    """As a user whom the permissions of files bind, which root is not."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "."])
def test_a_file_that_may_not_be_read_is_refused_as_such(name):
    with tempfile.TemporaryDirectory() as home:
        os.chmod(home, 0o755)  # unlike pytest's tmp_path
        folder = Path(home, "vae")
        unet.save(unet.VAE(VAES["2 levels, 1 layer"]), folder)
        (folder / name).chmod(0)
        file = WEIGHTS if name == WEIGHTS else CONFIG
        words = f"{file} (cannot be read|is not the config of a VAE) .*Permission denied"
        with nobody():
            assert_refused(words, unet.load, unet.VAE, folder)
        folder.chmod(0o755)


NUMBERS = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cls, configs", [(unet.UNet, UNETS), (unet.VAE, VAES)])
def test_a_weight_that_is_no_number_is_refused_by_its_name(cls, configs, dtype, number, tmp_path):
    net = cls(configs["2 levels, 1 layer"])
    name = "conv_out.weight" if cls is unet.UNet else "decoder.conv_out.weight"
    weight = net.state_dict()[name]
    weight[1, 2, 0, 1] = number
    unet.save(net, tmp_path, dtype)
    words = rf"{WEIGHTS}: {name} holds NaN or infinity"
    assert_refused(words, unet.load, cls, tmp_path)
    weight[1, 2, 0, 1] = 6e4  # near the end of float16, whose sums would pass it
    weight[1, 2, 0, 2] = 6e4
    unet.save(net, tmp_path, dtype)
    loaded = unet.load(cls, tmp_path, dtype).state_dict()[name]
    assert torch.equal(loaded, weight.to(dtype))


def test_weights_too_large_for_the_type_that_is_asked_for_are_refused(tmp_path):
    net = unet.VAE(VAES["2 levels, 1 layer"])
    net.quant_conv.bias.data[3] = 7e4
    unet.save(net, tmp_path)
    words = rf"{WEIGHTS}: quant_conv.bias holds NaN or infinity \(as torch.float16\)"
    assert_refused(words, unet.load, unet.VAE, tmp_path, torch.float16)
    assert unet.load(unet.VAE, tmp_path, torch.bfloat16).quant_conv.bias[3].item() > 6e4


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04" * 99])
def test_a_lora_file_that_cannot_be_read_is_refused(content, tmp_path):
    if content is not None:
        (tmp_path / unet.LORA).write_bytes(content)
    net, _ = lora_pair()
    assert_refused(f"{unet.LORA} cannot be read as safetensors", unet.load_lora, net, tmp_path)


def test_a_lora_with_a_nan_is_refused_and_nothing_is_changed(tmp_path):
    net, _ = lora_pair()
    before = copy.deepcopy(net.state_dict())
    name, weight = list(unet.lora_weights(net).items())[-1]
    weight[0, 0] = math.nan
    unet.save_tensors(unet.lora_weights(net), tmp_path / unet.LORA)
    net.load_state_dict(before)
    assert_refused(f"{unet.LORA}: {name} holds NaN or infinity", unet.load_lora, net, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


GONE = object()  # a field that the config lacks
NO_UNET = [  # a field of a UNet's config, what it may not be, and what the message must say of it
    *[("sample_size", value, "sample_size = ") for value in (GONE, None, [8, 8], True, 0, -8)],
    *[("sample_size", value, "sample_size = ") for value in (8.0, "8", math.nan, 10**9, 513)],
    ("sample_size", 9, "sample_size = 9 must be a multiple of 2"),
    ("in_channels", 9, r"in_channels = 9; needed: 4: this is an inpainting model, which"),
    *[("in_channels", value, "in_channels = .*needed: 4") for value in (None, 3, [4], "4", 10**9)],
    *[("out_channels", value, "out_channels = .*needed: 4") for value in (None, 8, 10**9)],
    *[("layers_per_block", value, "layers_per_block = ") for value in (GONE, None, [1, 1], 1.0)],
    *[("layers_per_block", value, "layers_per_block = ") for value in (True, "1", 0, -1, 10**9)],
    *[("block_out_channels", value, "block_out_channels = ") for value in (GONE, None, 8, "8")],
    *[("block_out_channels", value, "block_out_channels = ") for value in ([], [8] * 9, [8, None])],
    *[("block_out_channels", value, "block_out_channels = ") for value in ([8, 16.0], [True, 8])],
    *[("block_out_channels", value, "block_out_channels = ") for value in ([8, 0], [-8, 8])],
    *[("block_out_channels", value, "block_out_channels = ") for value in ([8, 10], [8, 10**9])],
    ("block_out_channels", [8], r"down_block_types = .*needed: \['DownBlock2D'\]"),
    (
        "block_out_channels",
        [8] * 3,
        r"down_block_types = .*(.CrossAttnDownBlock2D., ){2}.DownBlock",
    ),
    *[("down_block_types", value, "down_block_types = ") for value in (None, [], [None] * 2, "ab")],
    *[("down_block_types", [kind] * 2, "down_block_types = ") for kind in ("DownBlock2D", "Attn")],
    *[("up_block_types", value, "up_block_types = ") for value in ({}, ["UpBlock2D"])],
    ("up_block_types", ["DownBlock2D"] * 2, "DownBlock2D.*needed: .'UpBlock2D', 'CrossAttnUpBlo"),
    ("norm_num_groups", 3, "norm_num_groups = 3"),
    *[("norm_num_groups", value, "norm_num_groups = ") for value in (None, 0, 10**9, "4", 4.0)],
    *[("norm_eps", value, "norm_eps = ") for value in (None, 0, -1e-5, "1e-5", math.nan, True)],
    *[("norm_eps", value, "norm_eps = ") for value in (math.inf, 10**400, [1e-5])],
    ("attention_head_dim", 3, "attention_head_dim = 3 must divide"),
    *[("attention_head_dim", value, "attention_head_dim = ") for value in (GONE, None, [2, 2], 0)],
    *[("attention_head_dim", value, "attention_head_dim = ") for value in (2.0, "2", True, -2)],
    *[("cross_attention_dim", value, "cross_attention_dim = ") for value in (GONE, None, 0, "12")],
    *[("cross_attention_dim", value, "cross_attention_dim = ") for value in ([12], 12.0, 10**9)],
    ("timestep_post_act", "silu", "timestep_post_act = 'silu'; needed: false or null"),
    ("time_embedding_act_fn", "silu", "time_embedding_act_fn = 'silu'; needed: false or null"),
    ("num_attention_heads", 2, "num_attention_heads = 2; needed: false or null"),
    ("dropout", 0.1, "dropout = 0.1; needed: false or null"),
    ("resnet_skip_time_act", True, "resnet_skip_time_act = True; needed: false or null"),
    ("use_linear_projection", True, "use_linear_projection = True; needed: false or null"),
    ("act_fn", "gelu", "act_fn = 'gelu'; needed: silu"),
    ("flip_sin_to_cos", False, "flip_sin_to_cos = False; needed: True"),
    ("resnet_out_scale_factor", 2.0, "resnet_out_scale_factor = 2.0; needed: 1"),
    ("act_fn", "x" * 10**6, "act_fn = 'x.*; needed: silu"),
]
NO_VAE = [
    ("latent_channels", 16, "latent_channels = 16; needed: 4"),
    *[("latent_channels", value, "latent_channels = .*needed: 4") for value in (None, [4], 10**9)],
    *[("in_channels", value, "in_channels = .*needed: 3") for value in (None, 1, 4)],
    *[("out_channels", value, "out_channels = .*needed: 3") for value in (None, 1, 4)],
    *[("block_out_channels", value, "block_out_channels = ") for value in (GONE, None, 8, [])],
    *[("block_out_channels", value, "block_out_channels = ") for value in ([8, 10], [8, 10**9])],
    *[("layers_per_block", value, "layers_per_block = ") for value in (GONE, None, 0, 1.0, 10**9)],
    *[("norm_num_groups", value, "norm_num_groups = ") for value in (None, 0, [4], 3)],
    *[("scaling_factor", value, "scaling_factor = ") for value in (None, 0, -1.0, True, "0.18215")],
    *[("scaling_factor", value, "scaling_factor = ") for value in (math.nan, math.inf, 10**400)],
    ("shift_factor", 0.1, "shift_factor = 0.1; needed: false or null"),
    ("latents_mean", [0.1], r"latents_mean = \[0.1\]; needed: false or null"),
]


def with_field(config, name, value):
    changed = {**config, name: value}
    return {name: value for name, value in changed.items() if value is not GONE}


@pytest.fixture(scope="module", params=["UNet", "VAE"])
def small(request, tmp_path_factory):
    """The class of a small network, its config, and its folder."""
    cls = getattr(unet, request.param)
    config = {unet.UNet: UNETS, unet.VAE: VAES}[cls]["2 levels, 1 layer"]
    folder = tmp_path_factory.mktemp(request.param)
    unet.save(cls(config), folder)
    return cls, config, folder


def test_a_config_is_checked_for_everything_that_is_used_later(small):
    cls, config, folder = small
    for name, value, words in {unet.UNet: NO_UNET, unet.VAE: NO_VAE}[cls]:
        (folder / CONFIG).write_text(json.dumps(with_field(config, name, value)))
        words = (
            f"{CONFIG} is not the config of a {cls.__name__} of Stable Diffusion v1.x: .*{words}"
        )
        assert_refused(words, unet.load, cls, folder)


def test_odd_channels_are_refused_for_half_a_timestep_embedding_is_cosines(small):
    cls, config, folder = small
    odd = {"block_out_channels": [5, 10], "norm_num_groups": 5, "attention_head_dim": 1}
    (folder / CONFIG).write_text(json.dumps({**config, **odd}))
    assert_refused(r"block_out_channels = \[5, 10\].*multiples of 2", unet.load, cls, folder)


def test_fields_that_say_the_same_as_sd_v1_or_nothing_are_taken(small):
    """As newer versions of diffusers write them, or none at all."""
    cls, config, folder = small
    theirs = {unet.UNet: UNet2DConditionModel, unet.VAE: AutoencoderKL}[cls](**config).config
    loads = [json.loads(json.dumps(theirs)), {**theirs, "_name_or_path": "x", "decay": 0.999}]
    for name in ("in_channels", "out_channels", "latent_channels", "scaling_factor", "act_fn"):
        loads.append(with_field(config, name, GONE))
    for accepted in loads:
        (folder / CONFIG).write_text(json.dumps(accepted))
        net = unet.load(cls, folder)
        assert net.config["in_channels"] == config["in_channels"]
        works(net)


@pytest.mark.parametrize(
    "field, value", [("use_quant_conv", False), ("use_post_quant_conv", False)]
)
def test_what_a_vae_has_not_shows_in_its_weights(field, value, tmp_path):
    write(AutoencoderKL, vae_config([8, 16], 1, **{field: value}), tmp_path)
    assert_refused(f"{WEIGHTS} does not fit .*quant_conv", unet.load, unet.VAE, tmp_path)


def works(net):
    """It takes what its config says that it takes, and gives numbers."""
    device = next(net.parameters()).device
    with torch.no_grad():
        if isinstance(net, unet.UNet):
            side, context = net.config["sample_size"], net.config["cross_attention_dim"]
            x = torch.ones(2, net.config["in_channels"], side, side, device=device)
            context = torch.ones(2, 3, context, device=device)
            output = net(x, torch.tensor([1, 500], device=device), context)
            assert output.shape == x.shape
        else:
            side = 2 ** len(net.config["block_out_channels"])
            x = torch.ones(1, 3, side, side, device=device)
            output = net.decode(net.encode(x))
            assert output.shape == x.shape
    if device.type == "cpu":
        assert output.isfinite().all()


def parts(value):
    return [value, *value] if isinstance(value, list) else [value]


def fields(config):
    """Configs like this one but for one to three fields: dropped, or of any value in JSON."""
    numbers = st.integers(-1, 20) | st.sampled_from([32, 64, 10**4, 10**6, 2**31, 10**18, 10**400])
    floats = st.floats(allow_nan=True, allow_infinity=True)
    simple = st.none() | st.booleans() | numbers | floats | st.text(max_size=3)
    known = st.sampled_from([part for value in config.values() for part in parts(value)])
    lists = st.lists(simple | known, max_size=5) | st.lists(st.sampled_from([4, 8, 12, 16]))
    value = st.just(GONE) | simple | known | lists | st.dictionaries(st.text(max_size=3), simple)
    names = [*config, *unet.KNOWN_FIELDS, "norm_eps", "scaling_factor"]
    changes = st.dictionaries(st.sampled_from(names), value, min_size=1, max_size=3)
    return changes.map(lambda new: {**config, **new})


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_config_is_refused_in_one_line_or_makes_a_network_that_works(small, data):
    cls, config, folder = small
    changed = data.draw(fields(config))
    changed = {name: value for name, value in changed.items() if value is not GONE}
    (folder / CONFIG).write_text(json.dumps(changed))
    try:
        net = unet.load(cls, folder)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 700
        assert str(folder / CONFIG) in str(error)
    else:
        works(net)
    try:
        with torch.device("meta"):  # whatever weights there might be
            net = cls(json.loads(json.dumps(changed)))
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 400
    else:
        works(net)


def test_sizes_that_the_weights_do_not_have_take_neither_memory_nor_time(small):
    """Within the bounds that a config has, but 100 GB of weights, were they made."""
    cls, config, folder = small
    channels = [2**14] * len(config["block_out_channels"])
    huge = {**config, "block_out_channels": channels, "layers_per_block": 16}
    (folder / CONFIG).write_text(json.dumps(huge))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + 2**31  # 2 GB more, not all that the machine has
    resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
    try:
        assert_refused(f"{WEIGHTS} does not fit", unet.load, cls, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert time.monotonic() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100e3  # kB


# --- what transformers reads, and the hub


def test_loading_gives_a_network_for_inference_and_a_tokenizer(zoo):
    folder = zoo / "text_encoder"
    net = unet.loading("--model", zoo, CLIPTextModel, folder, dtype=torch.bfloat16)
    assert not net.training and {p.dtype for p in net.parameters()} == {torch.bfloat16}
    tokenizer = unet.loading("--model", zoo, CLIPTokenizer, zoo / "tokenizer")
    assert isinstance(tokenizer, CLIPTokenizer)


def test_loading_refuses_weights_that_lack_a_tensor_but_for_a_pooler(zoo, tmp_path):
    folder = shutil.copytree(zoo / "text_encoder", tmp_path / "text_encoder")
    path = folder / "model.safetensors"
    weights = load_file(path)
    lost = next(name for name in weights if "mlp.fc1.weight" in name)
    del weights[lost]
    save_file(weights, path, metadata={"format": "pt"})

    def call():
        unet.loading("--model", "mine", CLIPTextModel, folder, dtype=torch.float32)

    assert_refused(rf"^--model mine: no CLIPTextModel in it: its weights lack .*{lost[-20:]}", call)


def test_loading_runs_no_code_of_the_model_and_asks_no_hub(tmp_path):
    asked = []

    class Processor:
        @classmethod
        def from_pretrained(cls, folder, **options):
            asked.append((folder, options))
            return "a processor"

    assert unet.loading("--clip", "mine", Processor, tmp_path) == "a processor"
    assert asked == [(tmp_path, {"local_files_only": True, "trust_remote_code": False})]


def test_loading_wants_no_pooler(tmp_path):
    config = BertConfig(
        vocab_size=8,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
    )
    weights = BertModel(config).state_dict()
    kept = {name: tensor for name, tensor in weights.items() if "pooler" not in name}
    assert len(kept) == len(weights) - 2
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(tmp_path)
    net = unet.loading("--bert", "mine", BertModel, tmp_path, dtype=torch.float32)
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in kept.items())


@pytest.mark.parametrize("content", [None, b"", b"{}", b"no model"])
def test_loading_makes_any_failure_one_line(content, tmp_path):
    for name in ("config.json", "model.safetensors"):
        if content is not None:
            (tmp_path / name).write_bytes(content)

    def call():
        unet.loading("--clip", "mine", CLIPTextModel, tmp_path, dtype=torch.float32)

    assert_refused(r"^--clip mine: no CLIPTextModel in it: \w+", call)


@pytest.mark.parametrize("cls", [CLIPTokenizer, AutoTokenizer, CLIPImageProcessorPil])
@pytest.mark.parametrize("folder", [".", "none"])
def test_a_folder_without_a_tokenizer_is_no_tokenizer_without_words(cls, folder, tmp_path):
    """transformers makes one of CLIP's that takes every word for <|endoftext|>."""

    def call():
        unet.loading("--model", "mine", cls, tmp_path / folder)

    assert_refused(f"^--model mine: no {cls.__name__} in it", call)


@pytest.mark.parametrize("number", NUMBERS)
def test_what_transformers_reads_must_be_numbers(number, zoo, tmp_path):
    folder = shutil.copytree(zoo / "text_encoder", tmp_path / "text_encoder")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "mlp.fc1.weight" in name)
    weights[name][2, 3] = number
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    def call():
        unet.loading("--model", "mine", CLIPTextModel, folder, dtype=torch.float32)

    assert_refused(rf"^--model mine: .*{name[-20:]} holds NaN or infinity", call)


HUB = """
unet/config.json unet/diffusion_pytorch_model.bin unet/diffusion_pytorch_model.fp16.safetensors
vae/config.json vae/diffusion_pytorch_model.fp16.safetensors text_encoder/config.json
text_encoder/model.safetensors text_encoder/pytorch_model.bin tokenizer/vocab.json
tokenizer/merges.txt scheduler/scheduler_config.json safety_checker/model.safetensors
safety_checker/model.fp16.safetensors sd-v1-4.ckpt ddpo.json
""".split()
WHOLE = [f"{part}/{unet.WEIGHTS}" for part in ("unet", "vae")]
LEFT = {path for path in HUB if "safety" in path or path.endswith((".bin", ".ckpt"))}


def fake_hub(monkeypatch, cache, files, unet_config=SD_UNET):
    """What of `files` is asked for comes into the cache: configs as they are, the rest empty."""
    texts = {"unet/config.json": unet_config, "vae/config.json": SD_VAE}

    def snapshot_download(model, allow_patterns, etag_timeout):
        assert model == "owner/name" and etag_timeout <= 10
        for name in filter_repo_objects(files, allow_patterns=allow_patterns):
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            (cache / name).write_text(json.dumps(texts[name]) if name in texts else "")
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


OTHER_MODELS = {
    "SD 2.x": {"cross_attention_dim": 1024, "use_linear_projection": True},
    "SDXL": {"cross_attention_dim": 2048, "addition_embed_type": "text_time"},
    "an inpainting model": {"in_channels": 9},
}


@pytest.mark.parametrize("kind", OTHER_MODELS)
def test_a_model_of_another_kind_is_refused_before_its_weights_are_fetched(
    kind, tmp_path, monkeypatch
):
    fake_hub(monkeypatch, tmp_path, HUB + WHOLE, {**SD_UNET, **OTHER_MODELS[kind]})
    with pytest.raises(UserError, match=f"unet/config.json .*: this is {kind}"):
        unet.locate("owner/name")
    assert {path.name for path in tmp_path.glob("**/*") if path.is_file()} == {"config.json"}


def test_a_model_without_a_unet_is_refused_before_its_weights_are_fetched(tmp_path, monkeypatch):
    """SD 3 and FLUX have a transformer."""
    fake_hub(monkeypatch, tmp_path, ["transformer/config.json", f"transformer/{unet.WEIGHTS}"])
    with pytest.raises(UserError, match="unet/config.json is not .*No such file"):
        unet.locate("owner/name")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("whole", [True, False])
def test_locate_takes_a_folder_as_it_is_and_asks_the_hub_for_what_a_model_needs(
    whole, tmp_path, monkeypatch
):
    """Half precision too where there is nothing else; the text encoder's is there then."""
    assert unet.locate(str(tmp_path)) == tmp_path
    cache, left = tmp_path / "cache", LEFT
    fake_hub(monkeypatch, cache, HUB + (WHOLE if whole else []))
    assert unet.locate("owner/name") == cache
    taken = {path.relative_to(cache).as_posix() for path in cache.glob("**/*") if path.is_file()}
    if whole:
        left = left | {path for path in HUB if ".fp16." in path}
    assert {*HUB, *(WHOLE if whole else [])} - taken == left


@pytest.mark.parametrize("model", ["owner/name", "no such folder", "", "a" * 5000, "nul\0"])
def test_what_neither_disk_nor_hub_has_is_refused_with_the_way_to_get_it(model):
    words = rf"^--clip {model}: neither a folder .*`hf download {model} --local-dir FOLDER`"
    with pytest.raises(UserError, match=words) as caught:
        unet.locate(model, "--clip", ["*.json"])
    assert "\n" not in str(caught.value)


# --- full size (pytest --slow)
# One model in memory at a time, the reference gradients on disk: the UNet's weights and gradients
# are 6.9 GB, the peak about 12.


@pytest.mark.slow
def test_full_size_unet_equals_diffusers(tmp_path, capsys):
    torch.manual_seed(0)
    folder, reference = tmp_path / "unet", tmp_path / "gradients.safetensors"
    x, t, c = unet_inputs(batch=2, h=64, w=64, context=768)
    theirs = UNet2DConditionModel(**SD_UNET).eval()
    theirs.save_pretrained(folder, max_shard_size="10GB")
    with torch.no_grad():
        their_output = theirs(x, t, c).sample
    backward(theirs(x[..., :32, :32], t, c).sample)
    save_file({name: p.grad for name, p in theirs.named_parameters()}, reference)
    del theirs

    ours = unet.load(unet.UNet, folder)
    shutil.rmtree(folder)  # pytest keeps the last three tmp_paths: not 3.4 GB each
    with torch.no_grad():
        output_error = relative_error(ours(x, t, c), their_output)
    backward(ours(x[..., :32, :32], t, c))
    with safe_open(reference, "pt") as file:
        floor = 1e-4 * max(file.get_tensor(name).abs().max().item() for name in file.keys())
        errors = {}
        for name, p in ours.named_parameters():
            errors[name] = relative_error(p.grad, file.get_tensor(name), floor)
    reference.unlink()
    worst = max(errors, key=errors.get)
    with capsys.disabled():
        print(f"\nfull-size UNet, errors of the maximum: output {output_error:.1e}")
        print(f"gradients {errors[worst]:.1e} ({worst})")
    assert output_error < 1e-4
    assert errors[worst] < 1e-3, worst


@pytest.mark.slow
def test_full_size_vae_equals_diffusers_at_512_pixels(tmp_path, capsys):
    torch.manual_seed(0)
    pictures = torch.rand(1, 3, 512, 512) * 2 - 1
    theirs = AutoencoderKL(**SD_VAE).eval()
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        latents = theirs.encode(pictures).latent_dist.mean * 0.18215
        decoded = theirs.decode(latents / 0.18215).sample
    del theirs
    ours = unet.load(unet.VAE, tmp_path)
    (tmp_path / unet.WEIGHTS).unlink()
    with torch.no_grad():
        encode_error = relative_error(ours.encode(pictures), latents)
        decode_error = relative_error(ours.decode(latents), decoded)
    with capsys.disabled():
        print("\nfull-size VAE at 512 pixels, errors of the maximum:")
        print(f"encode {encode_error:.1e}, decode {decode_error:.1e}")
    assert encode_error < 1e-4
    assert decode_error < 1e-4
