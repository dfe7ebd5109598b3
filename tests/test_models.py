"""The models that people have: half precision, shards, other formats, other versions; --unet.

Files are written by diffusers, peft and transformers themselves.
"""

import json
import re
import shutil

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

import train
import unet
from conftest import ROOT
from helpers import CPU, SD
from scheduler import NoiseSchedule, Sampler
from test_scale import config
from test_train import (
    equal,
    metrics,
    no_curve,
    refusal,
    resume,
    run,
    small_model,
    without_seconds,
)

PARTS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}


@pytest.fixture(scope="module", autouse=True)
def without_curves():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_curve", no_curve)
        yield


def policy_of(folder, **changes):
    return train.load_policy(folder, CPU, config(**changes))


def networks(policy):
    """{part: state_dict}"""
    nets = (policy.unet, policy.vae, policy.text_encoder)
    return {part: net.state_dict() for part, net in zip(PARTS, nets, strict=True)}


# Files


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_networks_in_half_precision_and_in_shards_are_read(variant, shards, tmp_path):
    """As diffusers and transformers write them: the same numbers, rounded once where float16."""
    model = shutil.copytree(small_model(), tmp_path / "model")
    dtype = torch.float16 if variant else torch.float32
    for part, cls in PARTS.items():
        net = cls.from_pretrained(model / part, torch_dtype=dtype)
        for file in (model / part).glob("*.safetensors"):
            file.unlink()
        size = {"unet": "100KB", "vae": "9KB", "text_encoder": "600KB"}[part]
        net.save_pretrained(model / part, variant=variant, max_shard_size=size if shards else "1GB")
        names = sorted(path.name for path in (model / part).glob("*.safetensors"))
        assert all(("fp16" in name) == bool(variant) for name in names)
        assert len(names) > 1 if shards else len(names) == 1
    whole, read = networks(policy_of(small_model())), networks(policy_of(model))
    for part in PARTS:
        expected = {name: tensor.to(dtype).float() for name, tensor in whole[part].items()}
        assert equal(read[part], expected)
    run(tmp_path / "run", "--model", str(model), "--epochs", "1")


def test_full_precision_is_preferred_and_another_variant_is_never_taken(tmp_path):
    model = shutil.copytree(small_model(), tmp_path / "model")
    for part, cls in PARTS.items():
        cls.from_pretrained(model / part, torch_dtype=torch.float16).save_pretrained(
            model / part, variant="fp16"
        )
    assert len([*model.glob("*/*.fp16.safetensors")]) == 3
    whole, read = networks(policy_of(small_model())), networks(policy_of(model))
    assert all(equal(whole[part], read[part]) for part in PARTS)
    path = model / "unet" / unet.WEIGHTS
    path.rename(path.with_name("diffusion_pytorch_model.non_ema.safetensors"))
    (model / "unet" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    assert "holds no diffusion_pytorch_model.safetensors" in refusal(
        run, tmp_path, "--model", str(model)
    )


def test_a_shard_that_is_missing_is_seen(tmp_path):
    net = UNet2DConditionModel.from_pretrained(small_model() / "unet")
    net.save_pretrained(tmp_path, max_shard_size="60KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    shards[1].unlink()
    last = f"-of-{len(shards):05d}.safetensors"
    with pytest.raises(unet.UserError, match=rf"{last} does not fit .*Missing"):
        unet.load(unet.UNet, tmp_path)


def command(line):
    """The Python code of the command that a line advises."""
    return re.search(r'`python -c "(.*?)"`, then --model FOLDER', line)[1]


@pytest.mark.parametrize("variant", ["", ".fp16"], ids=["bin", "fp16.bin"])
def test_bin_files_are_named_with_the_command_that_rewrites_them(variant, tmp_path):
    """The command does; of .fp16.bin alone with the variant, as the page says."""
    model = shutil.copytree(small_model(), tmp_path / "model")
    shutil.copy(train.ZOO / "model_index.json", model)
    for part in PARTS:
        [old] = (model / part).glob("*.safetensors")
        name = "pytorch_model" if part == "text_encoder" else "diffusion_pytorch_model"
        torch.save(load_file(old), old.with_name(f"{name}{variant}.bin"))
        old.unlink()
    line = refusal(run, tmp_path / "run", "--model", str(model))
    assert f"{model / 'unet'} holds no {unet.WEIGHTS}; of .bin files diffusers makes it" in line
    given = repr(str(model)) + (", variant='fp16'" if variant else "")
    code = command(line).replace("'MODEL'", given)
    exec(code.replace("'FOLDER'", repr(str(tmp_path / "new"))), {})
    whole, read = networks(policy_of(small_model())), networks(policy_of(tmp_path / "new"))
    assert all(equal(whole[part], read[part]) for part in PARTS)


@pytest.mark.parametrize("name", ["v1-5-pruned.ckpt", "deliberate.safetensors"])
def test_a_single_file_is_named_with_the_command_that_rewrites_it(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"weights")
    line = refusal(run, tmp_path / "run", "--model", str(path))
    assert f"--model {path}: a file" in line
    assert f"P.from_single_file('{path}').save_pretrained('FOLDER')" in command(line)


SD2 = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20]}
SD2 |= {"upcast_attention": True}  # SD 2.1's
SDXL = {
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
}
STRANGERS = {
    "SD 2.x": ("unet/config.json", {**SD2, "use_linear_projection": True}),
    "SDXL": ("unet/config.json", {**SDXL, "use_linear_projection": True}),
    "an inpainting model": ("unet/config.json", {"in_channels": 9}),
    "a model of v-prediction": (
        "scheduler/scheduler_config.json",
        {"prediction_type": "v_prediction"},
    ),
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_models_of_other_kinds_are_called_what_they_are(kind, tmp_path):
    model = shutil.copytree(small_model(), tmp_path / "model")
    file, changes = STRANGERS[kind]
    (model / file).write_text(json.dumps({**json.loads((model / file).read_text()), **changes}))
    line = refusal(run, tmp_path / "run", "--model", str(model))
    assert f"{model / file}" in line
    assert f": this is {kind}, which cannot be converted" in line


def test_a_model_without_a_unet_is_told_where_it_was_looked_for(tmp_path):
    model = shutil.copytree(small_model(), tmp_path / "model")
    shutil.rmtree(model / "unet")
    line = refusal(train.main, ["--model", str(model), "--out", str(tmp_path / "run")])
    assert line.startswith(f"train.py: {model}/unet/config.json is not the config of a UNet")


# Schedules. SD v1.4's file names PNDM; the others are made of it as people do: in diffusers.

CLASSES = """
PNDM DDIM DDPM EulerDiscrete UniPCMultistep DPMSolverMultistep DEISMultistep
""".split()


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", CLASSES)
def test_schedulers_of_other_samplers_give_the_papers_timesteps_and_noise_levels(
    name, spacing, tmp_path
):
    hub = {**SD, "skip_prk_steps": True}
    cls, pndm = (
        getattr(diffusers, f"{name}Scheduler"),
        diffusers.PNDMScheduler(**{k: v for k, v in hub.items() if k != "clip_sample"}),
    )
    cls.from_config(pndm.config, timestep_spacing=spacing, clip_sample=False).save_pretrained(
        tmp_path
    )
    ours = NoiseSchedule.from_folder(tmp_path)
    ddim = diffusers.DDIMScheduler(**SD)
    ddim.set_timesteps(50)
    assert torch.equal(ours.alphas_bar, ddim.alphas_cumprod)
    assert ours.final_alpha_bar == ddim.final_alpha_cumprod
    assert torch.equal(Sampler(ours, 50, 1.0).timesteps, ddim.timesteps)


@pytest.mark.parametrize(
    "field, value, right",
    [
        ("clip_sample", True, "false or null"),
        ("thresholding", True, "false or null"),
        ("prediction_type", "sample", "epsilon"),
    ],
)
def test_a_schedule_that_cannot_be_used_says_which_field_and_what_to_write(
    field, value, right, tmp_path
):
    (tmp_path / "scheduler_config.json").write_text(json.dumps({**SD, field: value}))
    with pytest.raises(
        unet.UserError, match=f"scheduler_config.json: {field} = {value!r}; needed: {right}"
    ):
        NoiseSchedule.from_folder(tmp_path)


# --unet


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two epochs each of a tiny run, full and LoRA -> folder."""
    folder = tmp_path_factory.mktemp("trained")
    run(folder / "full")
    run(folder / "lora", "--lora-rank", "2", "--lr", "0.02")
    return folder


def checkpoint(trained, kind):
    return trained / kind / "checkpoints" / "000002"


def pictures(folder, epoch):
    """The fixed pictures after some epochs."""
    return np.asarray(Image.open(folder / "samples" / f"epoch_{epoch:04d}.png")).astype(int)


STARTS = {  # what is trained further, what of it is given, how
    "a checkpoint": ("full", ".", []),
    "a UNet": ("full", "unet", []),
    "a UNet, with a LoRA on it": ("full", "unet", ["--lora-rank", "3"]),
    "a LoRA": ("lora", ".", ["--lora-rank", "2"]),
}


@pytest.mark.parametrize("start", STARTS)
def test_a_run_starts_from_what_another_has_trained(start, trained, tmp_path):
    """Its first fixed pictures are the other's last, to the bit."""
    kind, part, options = STARTS[start]
    given = ["--unet", str(checkpoint(trained, kind) / part), *options]
    folder = run(tmp_path / "run", *given, "--epochs", "1")
    first, last = pictures(folder, 0), pictures(trained / kind, 2)
    assert np.array_equal(first, last)
    assert np.abs(first - pictures(trained / kind, 0)).max() > 8
    assert metrics(folder)[0]["first_ratio_error"] == 0
    assert not np.array_equal(pictures(folder, 1), first)


def test_a_run_that_started_so_resumes_to_the_bit(trained, tmp_path):
    """A LoRA on a tuned UNet: the checkpoint holds the LoRA alone."""
    options = ["--unet", str(checkpoint(trained, "full")), "--lora-rank", "2", "--lr", "0.02"]
    whole = run(tmp_path / "whole", *options)
    run(tmp_path / "run", *options, "--epochs", "1")
    resume(tmp_path / "run", "--epochs", "2")
    assert without_seconds(metrics(tmp_path / "run")) == without_seconds(metrics(whole))
    assert np.array_equal(pictures(tmp_path / "run", 2), pictures(whole, 2))


def peft_unet(layers=("to_q", "to_k", "to_v", "to_out.0"), rank=3, alpha=3):
    """diffusers' UNet of the small model with a LoRA of peft's that does something."""
    net = UNet2DConditionModel.from_pretrained(small_model() / "unet").eval()
    net.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(layers)))
    generator = torch.Generator().manual_seed(1)
    for name, p in net.named_parameters():
        if "lora_" in name:
            p.data = 0.2 * torch.randn(p.shape, generator=generator)
    return net


def save_as_scripts_do(net, folder):
    """Keys such as unet.mid_block. ... .to_q.lora.down.weight"""
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(net))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)


def save_with_notes(net, folder):
    """unet.mid_block. ... .to_q.lora_A.weight, and peft's settings in the header"""
    layers, notes = get_peft_model_state_dict(net), net.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=layers, unet_lora_adapter_metadata=notes
    )


def save_adapter(net, folder):
    """mid_block. ... .to_q.lora_A.weight, and the settings"""
    net.save_lora_adapter(folder)


def outputs(net):
    generator = torch.Generator().manual_seed(2)
    x, c = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 128, generator=generator)
    with torch.no_grad():
        y = net(x, torch.tensor([981, 21]), c)
    return y if isinstance(y, torch.Tensor) else y.sample


def close(one, other):
    return (one - other).abs().max() < 1e-5 * other.abs().max()


@pytest.mark.parametrize("save", [save_as_scripts_do, save_with_notes, save_adapter])
def test_a_lora_of_diffusers_and_peft_is_taken(save, tmp_path):
    theirs = peft_unet()
    save(theirs, tmp_path)
    ours = policy_of(small_model(), unet=str(tmp_path), lora_rank=3).unet
    assert close(outputs(ours), outputs(theirs))
    assert not close(outputs(ours), outputs(policy_of(small_model()).unet))
    names = {name for name, p in ours.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in names)


OTHER_LORA = "is no plain LoRA of --lora-rank: see tutorial/real_sd.md"


def without_rank(folder):
    save_adapter(peft_unet(), folder)
    return [], OTHER_LORA


def other_rank(folder):
    save_adapter(peft_unet(), folder)
    return ["--lora-rank", "2"], OTHER_LORA


def other_layers(folder):
    save_as_scripts_do(peft_unet(["to_k", "proj_in", "conv1", "conv_shortcut"]), folder)
    return ["--lora-rank", "3"], OTHER_LORA


def other_alpha(folder):
    save_with_notes(peft_unet(alpha=6), folder)
    return ["--lora-rank", "3"], OTHER_LORA


def kohya(folder):
    layers = {f"unet.{name}": w for name, w in get_peft_model_state_dict(peft_unet()).items()}
    save_file(convert_state_dict_to_kohya(layers), folder / unet.LORA)
    return ["--lora-rank", "3"], OTHER_LORA


def text_encoder_too(folder):
    net = peft_unet()
    layers = get_peft_model_state_dict(net)
    name = "text_model.encoder.layers.0.self_attn.q_proj"
    words = {f"{name}.lora_{x}.weight": torch.ones(3, 3) for x in "AB"}
    save = StableDiffusionPipeline.save_lora_weights
    save(folder, unet_lora_layers=layers, text_encoder_lora_layers=words)
    return ["--lora-rank", "3"], OTHER_LORA


def half_a_pair(folder):
    layers = get_peft_model_state_dict(peft_unet())
    name = next(name for name in layers if "lora_B" in name)
    del layers[name]
    save_file(layers, folder / unet.LORA)
    return ["--lora-rank", "3"], OTHER_LORA


def other_widths(folder):
    layers = get_peft_model_state_dict(peft_unet())
    save_file({name: w[:, :1].contiguous() for name, w in layers.items()}, folder / unet.LORA)
    return ["--lora-rank", "3"], OTHER_LORA


def no_lora(folder):
    (folder / unet.LORA).write_bytes(b"<html>")
    return [], "cannot be read as safetensors"


def nothing(folder):
    return [], "config.json is not the config of a UNet"


def a_run(folder):
    (folder / "checkpoints").mkdir()
    (folder / "config.json").write_text('{"epochs": 30}')
    return [], f"--unet {folder}: a run, or a file; give a checkpoint"


def another_models(folder):
    config = {**json.loads((small_model() / "unet" / "config.json").read_text())}
    unet.save(unet.UNet({**config, "cross_attention_dim": 64}), folder)
    return [], f"its UNet is made for another text encoder than {small_model()}'s"


NO_STARTS = [without_rank, other_rank, other_layers, other_alpha, kohya, text_encoder_too]
NO_STARTS += [half_a_pair, other_widths]
NO_STARTS += [no_lora, nothing, a_run, another_models]


@pytest.mark.parametrize("make", NO_STARTS)
def test_what_no_run_can_start_from_is_refused_in_one_line(make, tmp_path):
    options, words = make(tmp_path)
    line = refusal(run, tmp_path / "run", "--unet", str(tmp_path), *options)
    assert words in line and str(tmp_path) in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("start", ["none", "a" * 5000, "nul\0"])
def test_a_start_that_is_no_folder_is_refused(start, tmp_path):
    line = refusal(run, tmp_path / "run", "--unet", start)
    assert f"{start}/config.json is not the config of a UNet" in line


def test_a_file_is_no_folder_to_start_from(tmp_path):
    """A LoRA or a UNet's weights: the file's folder is asked for."""
    save_adapter(peft_unet(), tmp_path)
    for file in (tmp_path / unet.LORA, small_model() / "unet" / unet.WEIGHTS):
        line = refusal(run, tmp_path / "run", "--unet", str(file), "--lora-rank", "3")
        assert f"--unet {file}: a run, or a file; give a checkpoint, or the file's folder" in line


@pytest.mark.parametrize("make", [other_alpha, kohya])
def test_other_loras_are_merged_by_the_snippet_of_the_page(make, tmp_path):
    """The snippet is run, and its model drawn from."""
    make(tmp_path)
    model = shutil.copytree(small_model(), tmp_path / "model")
    shutil.copy(train.ZOO / "model_index.json", model)
    page = (ROOT / "tutorial" / "real_sd.md").read_text()
    [code] = re.findall(r"```python\n([^`]*fuse_lora[^`]*)```", page)
    for name, place in {"MODEL": model, "LORA": tmp_path, "FOLDER": tmp_path / "new"}.items():
        code = code.replace(f'"{name}"', repr(str(place)))
    exec(code, {})
    theirs = peft_unet(alpha=6 if make == other_alpha else 3)
    assert close(outputs(policy_of(tmp_path / "new").unet), outputs(theirs))
