"""LoRA, mixed precision, devices: what lets the same code train the real Stable Diffusion.

LoRA against diffusers and peft, autocast against its own definition by hand, devices by `meta` as
the accelerator. (Several processes and resume: test_processes.py; memory at full size: memory.py.)
"""

import copy
import dataclasses
import json
import shutil
import subprocess
import sys
from contextlib import nullcontext

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ddpo
import memory
import train
import unet
from scheduler import NoiseSchedule, Sampler, named_noise
from test_train import equal, metrics, refusal, resolve, resume, run, settings_of, small_model
from test_unet import (
    UNETS,
    assert_gradients_equal,
    backward,
    gradients,
    randomise,
    relative_error,
    unet_inputs,
)

CPU, META = torch.device("cpu"), torch.device("meta")
DEEP = UNETS["4 levels, 2 layers, as in SD"]
LORA = "pytorch_lora_weights.safetensors"
PARTS = ("latents", "log_probs", "timesteps", "prompt_embeds")


def awaken(net, scale, seed=7):
    """B of a LoRA away from 0, so that it does something."""
    generator = torch.Generator().manual_seed(seed)
    for name, w in unet.lora_weights(net).items():
        if "lora_B" in name:
            w.copy_(scale * torch.randn(w.shape, generator=generator))
    return net


def lora_unet(rank=3, seed=0):
    return awaken(unet.add_lora(randomise(unet.UNet(DEEP)), rank, seed), 0.2)


def config(**changes):
    """The zoo's settings."""
    return dataclasses.replace(resolve({"model": "zoo"}, train.ZOO), **changes)


def lora_b(weights):
    return [w for name, w in weights.items() if "lora_B" in name]


# LoRA


def test_a_new_lora_changes_nothing_and_only_the_lora_is_trained():
    plain = randomise(unet.UNet(DEEP))
    net = unet.add_lora(copy.deepcopy(plain), 3)
    with torch.no_grad():
        assert torch.equal(net(*unet_inputs()), plain(*unet_inputs()))
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    modules = plain.named_modules()
    attentions = [name for name, module in modules if isinstance(module, unet.Attention)]
    # two in each transformer: three levels down, three up, the middle
    assert len(attentions) == 2 * (2 * 3 + 3 * 3 + 1)
    expected = set()
    for name in attentions:
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            expected |= {f"{name}.{part}.lora_{matrix}.weight" for matrix in "AB"}
    assert trained == expected


def test_a_lora_is_the_low_rank_change_of_the_weights_by_hand():
    net, plain, base = lora_unet(), randomise(unet.UNet(DEEP)), randomise(unet.UNet(DEEP))
    pairs = unet.lora_weights(net)
    for name, p in plain.named_parameters():
        layer = f"unet.{name.removesuffix('.weight')}"
        if f"{layer}.lora_A.weight" in pairs:
            p.data += pairs[f"{layer}.lora_B.weight"] @ pairs[f"{layer}.lora_A.weight"]
    inputs = unet_inputs(torch.float64)
    with torch.no_grad():
        changed, by_hand, before = (n.double()(*inputs) for n in (net, plain, base))
    assert relative_error(changed, by_hand) < 1e-6
    assert relative_error(changed, before) > 1e-3


def test_all_processes_start_with_the_same_lora_and_another_seed_with_another():
    one, same, other = (
        unet.lora_weights(unet.add_lora(unet.UNet(DEEP), 3, seed)) for seed in (1, 1, 2)
    )
    assert equal(one, same) and not equal(one, other)
    a = torch.cat([w.flatten() for name, w in one.items() if "lora_A" in name])
    assert a.std().item() == pytest.approx(1 / 3, rel=0.05)
    assert not any(w.any() for w in lora_b(one))


def test_diffusers_loads_a_lora_and_draws_the_same_pictures(tmp_path):
    """The same x_T, eta = 0, a LoRA: our policy against diffusers' pipeline with our file."""
    settings = config(lora_rank=4, eta=0.0, steps=10, guidance=5.0)
    policy = train.load_policy(train.ZOO, CPU, settings)
    awaken(policy.unet, 0.05)
    unet.save_tensors(unet.lora_weights(policy.unet), tmp_path / unet.LORA)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(train.ZOO, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompts, names = ["cat", "a dog on a red background"], [(7, 0), (7, 1)]
    x_T = torch.stack([named_noise((4, 8, 8), 1, *name)[0] for name in names])

    def theirs():
        options = {"num_inference_steps": 10, "guidance_scale": 5.0, "eta": 0.0}
        images = pipeline(prompts, latents=x_T.clone(), output_type="np", **options).images
        return (images * 255).round().astype(np.int64)

    before = theirs()
    pipeline.load_lora_weights(tmp_path)
    [(trajectories, images)] = policy.sample(prompts, names, 2)
    assert torch.equal(trajectories.latents[:, 0], x_T)
    after = theirs()
    assert np.abs(images.astype(np.int64) - after).max() <= 1
    assert np.abs(before - after).mean() > 3  # and the LoRA matters


def test_a_lora_run_writes_a_file_of_its_own_and_nothing_else_of_the_unet(tmp_path):
    folder = run(tmp_path / "run", "--lora-rank", "2", "--epochs", "1")
    checkpoint = folder / "checkpoints" / "000001"
    names = sorted(path.name for path in checkpoint.iterdir())
    assert names == ["optimizer.safetensors", LORA, "state.json"]
    assert any(w.any() for w in lora_b(load_file(checkpoint / LORA)))
    assert settings_of(folder)["lora_rank"] == 2
    other = unet.add_lora(unet.load(unet.UNet, small_model() / "unet"), 3)
    unet.save_tensors(unet.lora_weights(other), checkpoint / unet.LORA)
    line = refusal(resume, folder, "--epochs", "2")
    assert "is no plain LoRA of --lora-rank" in line


def test_the_learning_rate_of_a_lora_is_the_papers_or_the_models_own(tmp_path):
    assert resolve({"lora_rank": 4}, tmp_path).lr == 3e-4
    assert resolve({}, tmp_path).lr == 1e-5
    (tmp_path / "ddpo.json").write_text('{"all": {"lr": 0.1}, "lora": {"lr": 0.2}}')
    assert resolve({}, tmp_path).lr == 0.1
    assert resolve({"lora_rank": 4}, tmp_path).lr == 0.2
    assert resolve({"lora_rank": 4, "lr": 0.3}, tmp_path).lr == 0.3


@pytest.mark.parametrize("lora", [0, 3])
def test_checkpointed_gradients_equal_plain_ones(lora):
    results = []
    for checkpointing in (False, True):
        net = lora_unet(lora) if lora else randomise(unet.UNet(DEEP))
        net.gradient_checkpointing = checkpointing
        backward(net(*unet_inputs()))
        results.append({name: g for name, g in gradients(net).items() if g is not None})
    assert_gradients_equal(*results, 1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_settings_reach_the_policy(checkpointing):
    changes = {"grad_checkpointing": checkpointing, "steps": 7, "eta": 0.3, "guidance": 2.0}
    policy = train.load_policy(small_model(), CPU, config(lora_rank=2, seed=5, **changes))
    assert policy.unet.gradient_checkpointing is checkpointing
    assert (policy.sampler.T, policy.sampler.eta, policy.guidance) == (7, 0.3, 2.0)
    base = unet.load(unet.UNet, small_model() / "unet")
    expected = unet.lora_weights(unet.add_lora(base, 2, 5))
    assert equal(unet.lora_weights(policy.unet), expected)
    others = [*policy.vae.parameters(), *policy.text_encoder.parameters()]
    assert not any(p.requires_grad for p in others)


# Precision


def output_types(policy):
    """-> a list that fills with the types in which the networks give their results."""
    seen = []

    def hook(net, inputs, output):
        output = output if torch.is_tensor(output) else output.last_hidden_state
        seen.append(output.dtype)

    convolution = policy.unet.down_blocks[0].resnets[0].conv1
    for net in (convolution, policy.vae.decoder.conv_out, policy.text_encoder):
        net.register_forward_hook(hook)
    return seen


class Counting(ddpo.DDPO):
    """Keeps what its updates log, in place of metrics."""

    def metrics(self, logged):
        return logged


def update(policy, trajectories, **changes):
    """One update of no size -> what it logged, the trained parameters with their gradients."""
    n = len(trajectories)
    settings = config(batch_size=n, guidance=policy.guidance, **changes)
    algorithm = Counting(settings)
    trained = [p for p in policy.unet.parameters() if p.requires_grad]
    advantages = 1 - 2 * (torch.arange(n, device=policy.device) % 2).float()
    [batch] = algorithm.batches(policy, [trajectories], [], advantages, [0, 0, 1])
    optimizer = torch.optim.SGD(trained, lr=0.0)
    return ddpo.optimizer_step(policy, algorithm, optimizer, batch, n, 1.0), trained


@pytest.mark.parametrize("precision, lora", [("bf16", 0), ("fp16", 0), ("bf16", 4)])
def test_networks_compute_in_half_precision_and_everything_else_in_float32(precision, lora):
    settings = {"lora_rank": lora, "steps": 2}
    dtype, prompts, names = train.PRECISIONS[precision], ["cat", "a bee"], [(0, 0), (0, 1)]
    policy = train.load_policy(train.ZOO, CPU, config(precision=precision, **settings))
    seen = output_types(policy)
    [(trajectories, images)] = policy.sample(prompts, names, 2)
    assert set(seen) == {dtype} and len(seen) >= 4
    for name in ("latents", "log_probs", "prompt_embeds"):
        assert getattr(trajectories, name).dtype == torch.float32, name
    logged, trained = update(policy, trajectories)
    assert logged["log_ratio"].abs().max() == 0
    assert {p.dtype for p in trained} == {p.grad.dtype for p in trained} == {torch.float32}
    everything = [*policy.unet.parameters(), *policy.vae.parameters()]
    assert {p.dtype for p in everything if not p.requires_grad} == {dtype}
    assert {p.dtype for p in policy.text_encoder.parameters()} == {dtype}
    full = train.load_policy(train.ZOO, CPU, config(**settings))
    [(theirs, pictures)] = full.sample(prompts, names, 2)
    near = 16 * torch.finfo(dtype).eps
    assert 0 < relative_error(trajectories.latents, theirs.latents) < near
    assert np.abs(images.astype(int) - pictures).mean() < 6


def test_fp32_is_float32_throughout_and_half_precision_may_use_tf32():
    for precision, allowed in (("fp32", False), ("bf16", True), ("fp32", False)):
        train.load_policy(small_model(), CPU, config(precision=precision))
        assert torch.backends.cuda.matmul.allow_tf32 is allowed
        assert torch.backends.cudnn.allow_tf32 is allowed


class Slope:
    """An algorithm whose loss has the gradient (3, -4) times `factor`."""

    def __init__(self, net, factor):
        self.net, self.factor = net, factor

    def losses(self, policy, rows):
        return self.factor * self.net(rows).flatten(), {}

    def metrics(self, logged):
        return {}


def step(scale, factor=1.0):
    """A step on a loss of two weights, clipped to norm 1 -> weights, norm before, scaler."""
    net = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(net.weight)
    scaler = None
    if scale is not None:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    optimizer, rows = torch.optim.SGD(net.parameters(), lr=1.0), torch.tensor([[3.0, -4.0]] * 4)
    result = ddpo.optimizer_step(None, Slope(net, factor), optimizer, rows, 2, 1.0, scaler)
    return net.weight.detach().flatten().tolist(), result["grad_norm"].item(), scaler


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_the_scaler_of_fp16_changes_neither_the_step_nor_the_norm(scale):
    weights, norm, _ = step(scale)
    assert weights == pytest.approx([-0.6, 0.8]) and norm == pytest.approx(5)


def test_an_update_whose_gradients_overflow_is_skipped_and_shown_as_0():
    weights, norm, scaler = step(2.0**100, factor=1e30)
    assert weights == [0, 0] and norm == 0 and scaler.get_scale() == 2.0**99
    # in fp32 it's an alarm, not a habit
    assert not np.isfinite(step(None, factor=1e39)[1])


def whole_and_cut(folder, *options):
    """Two epochs in one go, and with a stop between them -> the two folders."""
    numbers = "--samples-per-epoch 2 --steps 2 --eval-samples 2 --eval-every 9".split()
    whole = run(folder / "whole", *numbers, *options)
    cut = run(folder / "cut", *numbers, *options, "--epochs", "1")
    resume(cut, "--epochs", "2")
    return whole, cut


@pytest.mark.parametrize("options", [[], ["--lora-rank", "2", "--grad-checkpointing"]])
def test_a_run_in_bf16_goes_its_way_and_resumes_exactly(options, tmp_path):
    whole, cut = whole_and_cut(tmp_path, "--precision", "bf16", *options)
    for line in metrics(whole):
        assert line["warnings"] == []
        assert line["first_ratio_error"] <= 1e-5 and line["grad_norm"] > 0
    files = [file.relative_to(whole) for file in whole.glob("checkpoints/000002/**/*.safetensors")]
    assert len(files) == 2
    for file in files:
        assert equal(load_file(whole / file), load_file(cut / file))


def test_the_scale_of_fp16_is_remembered_and_updates_that_overflow_are_skipped(tmp_path):
    """At the scaler's first scale, 2^16, the first update's gradients overflow, at half not."""
    model = ["--model", "zoo", "--metrics=", "--precision", "fp16", "--lora-rank", "2"]
    whole, cut = whole_and_cut(tmp_path, *model)
    for folder in (whole, cut):
        state = json.loads((folder / "checkpoints/000002/state.json").read_text())
        assert state["scaler"]["scale"] == 2**15
        lines = metrics(folder)
        assert [line["grad_norm"] > 0 for line in lines] == [False, True]
        # how alike a handful of pictures are after one update is not the scaler's affair
        assert all(set(line["warnings"]) <= {"diversity"} for line in lines)
    first, second = (load_file(cut / f"checkpoints/00000{epoch}" / LORA) for epoch in (1, 2))
    assert not any(w.any() for w in lora_b(first))
    assert any(w.any() for w in lora_b(second))


# Devices


def accelerated(**changes):
    """A policy on `meta`, which computes shapes only, and refuses to mix with the CPU's tensors
    as CUDA does; no data can come back from it, so that waiting for the device would raise too.
    """
    changes = {"steps": 2, "grad_checkpointing": True, **changes}
    policy = train.load_policy(small_model(), META, config(**changes))

    def decode(latents):  # pictures go to the host
        return np.zeros(policy.vae.decode(latents).permute(0, 2, 3, 1).shape, np.uint8)

    policy.decode = decode
    policy.autocast = nullcontext  # meta has none
    return policy


def sampled(policy):
    """Three pictures in batches of two -> Trajectories."""
    names = [(0, 0, i) for i in range(3)]
    drawn = list(policy.sample(["cat", "a bee", "cat"], names, 2))
    assert [images.shape for _, images in drawn] == [(2, 32, 32, 3), (1, 32, 32, 3)]
    return ddpo.Trajectories.cat([trajectories for trajectories, _ in drawn])


@pytest.mark.parametrize("lora", [0, 4])
def test_an_epoch_on_an_accelerator_forgets_no_tensor_on_the_cpu_and_waits_for_nothing(lora):
    policy = accelerated(lora_rank=lora)
    trajectories = sampled(policy)
    assert {getattr(trajectories, name).device.type for name in PARTS} == {"meta"}
    logged, trained = update(policy, trajectories, lora_rank=lora)
    assert {"loss", "grad_norm", "log_ratio", "k"} <= set(logged)
    assert {value.device.type for value in logged.values()} == {"meta"}
    assert {p.grad.device.type for p in trained} == {"meta"}


def test_weights_on_the_cpu_reach_the_accelerator():
    """Advantages come from the rewards, which are on the CPU."""
    policy = accelerated()
    algorithm = ddpo.DDPO(config(batch_size=3))
    [batch] = algorithm.batches(policy, [sampled(policy)], [], torch.ones(3), [0, 0, 1])
    assert {batch.i.device, batch.k.device, batch.advantages.device} == {META}


@pytest.mark.parametrize("name", ["rwr", "rwr-sparse"])
def test_a_round_of_regression_on_an_accelerator(name):
    policy = accelerated()
    algorithm = ddpo.ALGORITHMS[name](config(batch_size=2, updates=2))
    optimizer = torch.optim.AdamW(policy.unet.parameters())
    records, prompts = [torch.empty(3, 4, 8, 8, device=META)], ["cat", "bee", "cat"]
    batches = list(algorithm.batches(policy, records, prompts, torch.ones(3), [0, 0, 1]))
    assert len(batches) == 2
    for batch in batches:
        assert {tensor.device for tensor in batch.tensors} == {META}
        result = ddpo.optimizer_step(policy, algorithm, optimizer, batch, 1, 1.0)
        assert {value.device for value in result.values()} == {META}


@pytest.mark.parametrize("forget", ["noise", "timesteps", "schedule", "tokens"])
def test_a_forgotten_to_device_is_seen(forget, monkeypatch):
    policy = accelerated()
    trajectories = sampled(policy)
    if forget == "noise":
        real = ddpo.sample

        def on_cpu(net, sampler, cond, uncond, noise, *rest):
            return real(net, sampler, cond, uncond, torch.zeros(noise.shape), *rest)

        monkeypatch.setattr(ddpo, "sample", on_cpu)
    elif forget == "timesteps":
        trajectories.timesteps = torch.tensor([501, 1])
    elif forget == "schedule":
        schedule = NoiseSchedule.from_folder(small_model() / "scheduler")
        policy.sampler = Sampler(schedule, 2, 1.0)
    else:
        policy.device = CPU
    with pytest.raises((RuntimeError, NotImplementedError)):
        sampled(policy)
        update(policy, trajectories)


# Memory at full size is counted by memory.py, in CI; here is a real step (--slow)


FULL_SIZE_STEP = """
import json, resource, sys
sys.path.insert(0, {root!r})
import train

def weights():
    for part in ("unet", "vae", "text_encoder"):
        for name, p in getattr(run.policy, part).named_parameters():
            yield part + "." + name, p

def digest():
    sums = {{}}
    for name, p in weights():
        x = p.detach().double()
        sums[name] = (x.sum().item(), x.square().sum().item(), p.flatten()[:3].tolist())
    return sums

run = train.prepare(train.parse({arguments}))
before = digest()
train.loop(run)
after = digest()
changed = {{name for name in before if before[name] != after[name]}}
trained = {{name for name, p in weights() if p.requires_grad}}
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([sorted(changed - trained), sorted(trained - changed), len(trained), peak]))
"""


@pytest.fixture(scope="module")
def full_size_folder(tmp_path_factory):
    """Stable Diffusion v1.4 with random weights, for pictures of 256 x 256."""
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = tmp_path_factory.mktemp("sd")
    unet.save(unet.UNet({**memory.SD_UNET, "sample_size": 32}), folder / "unet")
    unet.save(unet.VAE(memory.SD_VAE), folder / "vae")
    encoder = CLIPTextModel(CLIPTextConfig(**memory.SD_TEXT))
    encoder.save_pretrained(folder / "text_encoder")
    for part in ("tokenizer", "scheduler"):
        shutil.copytree(train.ZOO / part, folder / part)
    (folder / "two.txt").write_text("a cat\na bee\n")
    yield folder
    shutil.rmtree(folder)


FULL_SIZE = """
    --device cpu --reward compressibility --metrics= --epochs 1 --steps 2 --samples-per-epoch 2
    --batch-size 2 --sample-batch 1 --micro-batch 1 --eval-samples 2 --grad-checkpointing
""".split()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [["--lora-rank", "4", "--precision", "bf16"], []], ids=["LoRA, bf16", "full, fp32"]
)
def test_a_real_full_size_step_on_a_cpu_fits_in_24_gb_and_changes_the_weights_it_should(
    options, full_size_folder, tmp_path, capsys
):
    """These, and no others."""
    where = ["--model", str(full_size_folder), "--prompts", str(full_size_folder / "two.txt")]
    arguments = [*where, *FULL_SIZE, "--out", str(tmp_path / "run"), *options]
    code = FULL_SIZE_STEP.format(root=str(train.HERE), arguments=arguments)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    (wrong, still), (trained, peak) = found[:2], found[2:]
    shutil.rmtree(tmp_path / "run")
    with capsys.disabled():
        print(f"\nfull size, {options}: {trained} tensors trained, peak {peak / 1e9:.1f} GB")
    assert wrong == [] and trained == (256 if options else 686)
    # the gradient of A is 0 as long as B is; weight decay alone may round to nothing
    assert all(".lora_A." in name for name in still)
    assert peak < 24e9
