"""unet.py against diffusers: the same names, the same numbers, the same files; and a clear line where a file is broken.

Formulas are compared in float64, where the two codes may differ by 1e-9 at most: in float32 a group norm with a wrong epsilon hides in the
rounding. The weights are randomised beyond diffusers' initialisation, whose norms are all ones and zeros and would hide a swapped pair.
"""
import json
import math
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import unet

CONTEXT = 12


def unet_config(channels, layers, attention, **more):
    """A config in diffusers' words; `attention` says for each level, highest resolution first, whether it has cross-attention."""
    return dict(sample_size=8, in_channels=4, out_channels=4, layers_per_block=layers, block_out_channels=channels, attention_head_dim=2,
                norm_num_groups=4, cross_attention_dim=CONTEXT,
                down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention],
                up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)]) | more


def vae_config(channels, layers, **more):
    return dict(in_channels=3, out_channels=3, latent_channels=4, layers_per_block=layers, block_out_channels=channels, norm_num_groups=4,
                sample_size=32, down_block_types=["DownEncoderBlock2D"] * len(channels),
                up_block_types=["UpDecoderBlock2D"] * len(channels)) | more


UNETS = {
    "2 levels, 1 layer": unet_config([8, 16], 1, [True, False]),
    "2 levels, 2 layers, no attention on top": unet_config([8, 16], 2, [False, True]),
    "3 levels, 1 layer, attention throughout": unet_config([8, 8, 16], 1, [True, True, True], attention_head_dim=4),
    "4 levels, 2 layers, as in SD": unet_config([8, 16, 24, 24], 2, [True, True, True, False]),
    "4 levels, 1 layer, other eps and sizes": unet_config([16, 16, 8, 24], 1, [False, True, False, True], norm_eps=1e-4, norm_num_groups=8),
}
VAES = {
    "2 levels, 1 layer": vae_config([8, 16], 1),
    "4 levels, 2 layers, as in SD": vae_config([8, 16, 24, 24], 2, scaling_factor=0.5),
}
SD_UNET = unet_config([320, 640, 1280, 1280], 2, [True, True, True, False],
                      sample_size=64, attention_head_dim=8, norm_num_groups=32, cross_attention_dim=768)
SD_VAE = vae_config([128, 256, 512, 512], 2, norm_num_groups=32, sample_size=512)


def randomise(net, seed=0):
    """Every tensor its own numbers, and small convolutions: activations well below 1 are where the norms' epsilons show."""
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
    """Latents that are not square, and another timestep for every sample, first and last included."""
    g = torch.Generator().manual_seed(1)
    latents, prompts = torch.randn(batch, 4, h, w, generator=g), torch.randn(batch, 7, context, generator=g)
    return latents.to(dtype), torch.tensor([0, 999, 481, 21])[:batch], prompts.to(dtype)


def relative_error(ours, theirs, floor=0.0):
    error = ((ours - theirs).abs().max() / max(theirs.abs().max().item(), floor)).item()
    return math.inf if math.isnan(error) else error                  # max() over tensors would pass over a NaN


def assert_gradients_equal(ours, theirs, tolerance):
    """Tensor by tensor. A gradient that is zero on paper (a key's bias, under softmax) is noise, and is judged beside the largest one."""
    assert ours.keys() == theirs.keys()
    floor = 1e-4 * max(g.abs().max().item() for g in theirs.values())
    worst = max((relative_error(ours[name], theirs[name], floor), name) for name in theirs)
    assert worst[0] < tolerance, worst


def gradients(net, **inputs):
    return {name: p.grad for name, p in net.named_parameters()} | {name: x.grad for name, x in inputs.items()}


def backward(output, target_seed=2):
    """A loss that weighs every output element differently, so that no gradient is lost by symmetry."""
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(target_seed)).to(output.dtype)
    (output - target).square().mean().backward()


# --- names -----------------------------------------------------------------------------------------------------------------------------

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


# --- numbers ---------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("config", UNETS.values(), ids=UNETS)
def test_unet_output_and_gradients_equal_diffusers_with_mixed_timesteps(config, tmp_path):
    theirs = write(UNet2DConditionModel, config, tmp_path).double()
    ours = unet.load(unet.UNet, tmp_path, torch.float64)
    results = []
    for net, call in ((ours, lambda x, t, c: ours(x, t, c)), (theirs, lambda x, t, c: theirs(x, t, c).sample)):
        latents, timesteps, context = unet_inputs(torch.float64)
        latents.requires_grad_(), context.requires_grad_()
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
    config = unet_config([32, 64], 1, [True, False])
    del config["norm_num_groups"]
    ours, theirs = randomise(unet.UNet(config)).double(), UNet2DConditionModel(**config).double().eval()
    theirs.load_state_dict(ours.state_dict())
    inputs = unet_inputs(torch.float64)
    with torch.no_grad():
        assert relative_error(ours(*inputs), theirs(*inputs).sample) < 1e-9


def test_a_sample_does_not_see_the_timesteps_or_prompts_of_its_neighbours():
    net = randomise(unet.UNet(UNETS["2 levels, 1 layer"])).double()
    latents, timesteps, context = unet_inputs(torch.float64)
    with torch.no_grad():
        together = net(latents, timesteps, context)
        alone = torch.cat([net(latents[i:i + 1], timesteps[i:i + 1], context[i:i + 1]) for i in range(len(latents))])
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
        assert encoded.shape == latents.shape                        # not merely one that broadcasts to it
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
            mean, log_var, decoded = posterior.mean, posterior.logvar, net.decode(posterior.mean).sample
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
    # dim 4: frequencies 10000^0 = 1 and 10000^(-1/2) = 0.01, so t = 100 turns by 100 and by 1 radian
    expected = torch.tensor([[math.cos(100), 0.5403023, math.sin(100), 0.8414710]])
    assert torch.allclose(unet.timestep_embedding(torch.tensor([100]), 4), expected, atol=1e-6)


# --- files -----------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("as_convolutions", [False, True])
def test_vae_file_with_the_old_attention_names_loads_to_the_same_output(as_convolutions, tmp_path):
    theirs = write(AutoencoderKL, VAES["2 levels, 1 layer"], tmp_path)
    weights, old = load_file(tmp_path / unet.WEIGHTS), {}
    for key, tensor in weights.items():
        for new_name, old_name in ((".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn.")):
            if new_name in key:
                key, tensor = key.replace(new_name, old_name), tensor[:, :, None, None] if as_convolutions and tensor.ndim == 2 else tensor
        old[key] = tensor.contiguous()
    assert len(set(old) - set(weights)) == 16                        # 4 projections with biases, in encoder and decoder
    save_file(old, tmp_path / unet.WEIGHTS)
    ours = unet.load(unet.VAE, tmp_path)
    with torch.no_grad():
        mean = theirs.encode(vae_pictures()).latent_dist.mean
        assert relative_error(ours.posterior(vae_pictures())[0], mean) < 1e-5
        assert relative_error(ours.decode(mean * ours.scaling_factor), theirs.decode(mean).sample) < 1e-5


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
        assert relative_error(ours.encode(vae_pictures()), mean * theirs.config.scaling_factor) < 1e-5
        assert relative_error(ours.decode(mean * ours.scaling_factor), theirs.decode(mean).sample) < 1e-5


def test_a_loaded_network_is_saved_with_its_whole_config_and_the_same_bits(tmp_path):
    write(UNet2DConditionModel, UNETS["2 levels, 1 layer"], tmp_path / "theirs")
    unet.save(unet.load(unet.UNet, tmp_path / "theirs"), tmp_path / "ours")
    before, after = (load_file(tmp_path / name / unet.WEIGHTS) for name in ("theirs", "ours"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "ours"))
    assert before == after


@pytest.mark.parametrize("cls, config", [(unet.UNet, UNETS["2 levels, 1 layer"]), (unet.VAE, VAES["2 levels, 1 layer"])])
def test_float16_save_halves_the_file_and_loads_as_float32(cls, config, tmp_path):
    net = randomise(cls(config))
    unet.save(net, tmp_path, torch.float16)
    assert {tensor.dtype for tensor in load_file(tmp_path / unet.WEIGHTS).values()} == {torch.float16}
    assert next(net.parameters()).dtype == torch.float32             # saving leaves the network alone
    for key, tensor in unet.load(cls, tmp_path).state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, net.state_dict()[key].half().float())


# --- faults ----------------------------------------------------------------------------------------------------------------------------

def edit_config(**changes):
    def fault(folder):
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))
    return fault


def edit_weights(change):
    def fault(folder):
        weights = load_file(folder / unet.WEIGHTS)
        change(weights)
        save_file(weights, folder / unet.WEIGHTS)
    return fault


def truncate(folder):
    path = folder / unet.WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


FAULTS = {   # what is done to the folder, the exception, the file it must name, a word it must say
    "no folder": (shutil.rmtree, FileNotFoundError, "config.json", "missing"),
    "no config": (lambda f: (f / "config.json").unlink(), FileNotFoundError, "config.json", "missing"),
    "no weights": (lambda f: (f / unet.WEIGHTS).unlink(), FileNotFoundError, unet.WEIGHTS, "missing"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{not json"), ValueError, "config.json", "is not the config of a UNet"),
    "config is empty": (lambda f: (f / "config.json").write_text(""), ValueError, "config.json", "is not the config of a UNet"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), ValueError, "config.json", "is not the config of a UNet"),
    "config is not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), ValueError, "config.json", "is not the config of a UNet"),
    "config of wrong types": (edit_config(block_out_channels="8"), ValueError, "config.json", "is not the config of a UNet"),
    "heads that do not divide": (edit_config(attention_head_dim=3), ValueError, "config.json", "attention_head_dim"),
    "another activation": (edit_config(timestep_post_act="silu"), ValueError, "config.json", "timestep_post_act"),
    "config lacks a field": (edit_config(block_out_channels="absent"), ValueError, "config.json", "block_out_channels"),
    "config of SD 2": (edit_config(use_linear_projection=True), ValueError, "config.json", "use_linear_projection"),
    "block of another model": (edit_config(down_block_types=["AttnDownBlock2D"] * 2), ValueError, "config.json", "AttnDownBlock2D"),
    "config of another size": (edit_config(block_out_channels=[8, 32]), ValueError, unet.WEIGHTS, "mismatch"),
    "missing tensor": (edit_weights(lambda w: w.pop("conv_out.bias")), ValueError, unet.WEIGHTS, "conv_out.bias"),
    "extra tensor": (edit_weights(lambda w: w.update(extra=torch.zeros(1))), ValueError, unet.WEIGHTS, "extra"),
    "wrong shape": (edit_weights(lambda w: w.update({"conv_out.bias": torch.zeros(5)})), ValueError, unet.WEIGHTS, "conv_out.bias"),
    "truncated weights": (truncate, ValueError, unet.WEIGHTS, ""),
    "empty weights": (lambda f: (f / unet.WEIGHTS).write_bytes(b""), ValueError, unet.WEIGHTS, ""),
}


@pytest.mark.parametrize("fault, error, file, word", FAULTS.values(), ids=FAULTS)
def test_a_broken_folder_is_refused_in_one_line_that_names_the_file(fault, error, file, word, tmp_path):
    folder = tmp_path / "unet"
    write(UNet2DConditionModel, UNETS["2 levels, 1 layer"], folder)
    fault(folder)
    with pytest.raises(error) as caught:
        unet.load(unet.UNet, folder)
    message = str(caught.value)
    assert file in message and word in message and "\n" not in message, message
    assert type(caught.value) is error                               # not a subclass with a message of its own


def test_a_vae_that_is_not_of_sd_v1_is_refused(tmp_path):
    write(AutoencoderKL, vae_config([8, 16], 1, use_quant_conv=False), tmp_path)
    with pytest.raises(ValueError, match="config.json is not the config of a VAE .* use_quant_conv = False") as caught:
        unet.load(unet.VAE, tmp_path)
    assert "\n" not in str(caught.value)


# --- full size (pytest --slow) -----------------------------------------------------------------------------------------------------------
# One model in memory at a time, the reference gradients on disk: the UNet's weights and gradients are 6.9 GB, the peak about 12.

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
    shutil.rmtree(folder)                                            # pytest keeps the last three tmp_paths: not 3.4 GB each
    with torch.no_grad():
        output_error = relative_error(ours(x, t, c), their_output)
    backward(ours(x[..., :32, :32], t, c))
    with safe_open(reference, "pt") as file:
        floor = 1e-4 * max(file.get_tensor(name).abs().max().item() for name in file.keys())
        gradient_error = max((relative_error(p.grad, file.get_tensor(name), floor), name) for name, p in ours.named_parameters())
    reference.unlink()
    with capsys.disabled():
        print(f"\nfull-size UNet: output off by {output_error:.1e} of its maximum, gradients by {gradient_error[0]:.1e}")
    assert output_error < 1e-4
    assert gradient_error[0] < 1e-3, gradient_error


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
        encode_error, decode_error = relative_error(ours.encode(pictures), latents), relative_error(ours.decode(latents), decoded)
    with capsys.disabled():
        print(f"\nfull-size VAE at 512 pixels: encode off by {encode_error:.1e} of its maximum, decode by {decode_error:.1e}")
    assert encode_error < 1e-4
    assert decode_error < 1e-4
