"""LoRA, mixed precision, and devices: what lets the same code train the real Stable Diffusion. LoRA against diffusers and peft, autocast against its own
definition by hand, devices by `meta` as the accelerator. (Several processes and resume: test_processes.py; memory at full size: memory.py.)"""
import copy
import dataclasses
import json
import shutil
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ddpo
import memory
import train
import unet
from test_train import TINY, metrics
from test_unet import UNETS, assert_gradients_equal, backward, gradients, randomise, relative_error, unet_inputs

CPU = torch.device("cpu")
DEEP = UNETS["4 levels, 2 layers, as in SD"]


def lora_unet(rank=3, seed=0, b=0.2):
    """A network with a LoRA that does something: B away from 0."""
    net = unet.add_lora(randomise(unet.UNet(DEEP)), rank, seed)
    generator = torch.Generator().manual_seed(7)
    for name, w in unet.lora_weights(net).items():
        if "lora_B" in name:
            w.copy_(b * torch.randn(w.shape, generator=generator))
    return net


def config(**changes):
    return dataclasses.replace(train.resolve({"model": "zoo"}, train.ZOO), **changes)


# --- LoRA ------------------------------------------------------------------------------------------------------------------------------

def test_a_new_lora_changes_nothing_and_only_the_lora_is_trained():
    plain = randomise(unet.UNet(DEEP))
    net = unet.add_lora(copy.deepcopy(plain), 3)
    with torch.no_grad():
        assert torch.equal(net(*unet_inputs()), plain(*unet_inputs()))
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    attentions = [name for name, module in plain.named_modules() if isinstance(module, unet.Attention)]
    assert trained == {f"{name}.{part}.lora_{m}.weight" for name in attentions for part in ("to_q", "to_k", "to_v", "to_out.0") for m in "AB"}
    assert len(attentions) == 2 * (2 * 3 + 3 * 3 + 1)                # two in each transformer: three levels down, three up, the middle


def test_a_lora_is_the_low_rank_change_of_the_weights_by_hand():
    net, plain = lora_unet(), randomise(unet.UNet(DEEP))
    pairs = unet.lora_weights(net)
    for name, p in plain.named_parameters():
        if (a := pairs.get(f"unet.{name.removesuffix('.weight')}.lora_A.weight")) is not None:
            p.data += pairs[f"unet.{name.removesuffix('.weight')}.lora_B.weight"] @ a
    with torch.no_grad():
        changed, by_hand = net.double()(*unet_inputs(torch.float64)), plain.double()(*unet_inputs(torch.float64))
    assert relative_error(changed, by_hand) < 1e-6
    assert relative_error(changed, randomise(unet.UNet(DEEP)).double()(*unet_inputs(torch.float64)).detach()) > 1e-3


def test_all_processes_start_with_the_same_lora_and_another_seed_with_another():
    one, same, other = (unet.lora_weights(unet.add_lora(unet.UNet(DEEP), 3, seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one) and any(not torch.equal(one[name], other[name]) for name in one)
    a = torch.cat([w.flatten() for name, w in one.items() if "lora_A" in name])
    assert a.std().item() == pytest.approx(1 / 3, rel=0.05) and all(not w.any() for name, w in one.items() if "lora_B" in name)


def test_diffusers_loads_a_lora_and_draws_the_same_pictures(tmp_path):
    """The same x_T, eta = 0: our policy with a LoRA against diffusers' pipeline with load_lora_weights of the file that we write."""
    policy = train.load_policy(train.ZOO, CPU, config(lora_rank=4))
    generator = torch.Generator().manual_seed(7)
    for name, w in unet.lora_weights(policy.unet).items():
        if "lora_B" in name:
            w.copy_(0.05 * torch.randn(w.shape, generator=generator))
    unet.save_lora(policy.unet, tmp_path)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(train.ZOO, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompts, noise = ["cat", "a dog on a red background"], torch.zeros(2, 11, 4, 8, 8)
    noise[:, 0] = x_T = torch.stack([ddpo.named_noise((4, 8, 8), 1, 7, i)[0] for i in range(2)])

    def theirs():
        images = pipeline(prompts, latents=x_T.clone(), num_inference_steps=10, guidance_scale=5.0, eta=0.0, output_type="np").images
        return (images * 255).round().astype(np.int64)

    before = theirs()
    pipeline.load_lora_weights(tmp_path)
    ours = ddpo.sample(policy.unet, policy.scheduler, policy.embed(prompts), policy.embed([""]), noise, 10, 0.0, 5.0)
    ours = policy.decode(ours.latents[:, -1]).astype(np.int64)
    assert np.abs(ours - theirs()).max() <= 1
    assert np.abs(before - theirs()).mean() > 3                     # and the LoRA matters


def test_a_lora_run_writes_a_file_of_its_own_and_nothing_else_of_the_unet(tmp_path):
    train.main([*TINY, "--lora-rank", "2", "--epochs", "1", "--out", str(tmp_path / "run")])
    assert sorted(path.name for path in (tmp_path / "run/checkpoints/000001").iterdir()) == ["optimizer.safetensors", "pytorch_lora_weights.safetensors", "state.json"]
    assert json.loads((tmp_path / "run/config.json").read_text())["lr"] == train.resolve({"model": "zoo", "lora_rank": 2}, train.ZOO).lr
    weights = load_file(tmp_path / "run/checkpoints/000001/pytorch_lora_weights.safetensors")
    assert any(w.any() for name, w in weights.items() if "lora_B" in name)
    broken = shutil.copytree(tmp_path / "run", tmp_path / "broken")
    unet.save_lora(unet.add_lora(unet.load(unet.UNet, train.ZOO / "unet"), 3), broken / "checkpoints/000001")
    with pytest.raises(SystemExit, match="holds a LoRA of another network or rank"):
        train.main(["--out", str(broken), "--resume", "--epochs", "2"])


def test_the_learning_rate_of_a_lora_is_the_papers_or_the_models_own(tmp_path):
    assert train.resolve({"lora_rank": 4}, tmp_path).lr == 3e-4 and train.resolve({}, tmp_path).lr == 1e-5
    (tmp_path / "ddpo.json").write_text('{"all": {"lr": 0.1}, "lora": {"lr": 0.2}}')
    assert (train.resolve({}, tmp_path).lr, train.resolve({"lora_rank": 4}, tmp_path).lr, train.resolve({"lora_rank": 4, "lr": 0.3}, tmp_path).lr) == (0.1, 0.2, 0.3)


@pytest.mark.parametrize("lora", [0, 3])
def test_checkpointed_gradients_equal_plain_ones(lora):
    results = []
    for checkpointing in (False, True):
        net = lora_unet(lora) if lora else randomise(unet.UNet(DEEP))
        net.gradient_checkpointing = checkpointing
        backward(net(*unet_inputs()))
        results.append({name: g for name, g in gradients(net).items() if g is not None})
    assert_gradients_equal(*results, 1e-5)


# --- precision -------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("precision, lora", [("bf16", 0), ("fp16", 0), ("bf16", 4)])
def test_networks_compute_in_half_precision_and_everything_else_in_float32(precision, lora):
    policy, seen, dtype = train.load_policy(train.ZOO, CPU, config(precision=precision, lora_rank=lora, steps=2)), [], train.PRECISIONS[precision]
    for net in (policy.unet.down_blocks[0].resnets[0].conv1, policy.vae.decoder.conv_out, policy.text_encoder):
        net.register_forward_hook(lambda net, inputs, output: seen.append((output if isinstance(output, torch.Tensor) else output.last_hidden_state).dtype))
    trajectories, images = policy.sample(["cat", "a bee"], (0, 0), 2, whole=True)
    assert set(seen) == {dtype} and len(seen) >= 4
    for name in ("latents", "log_probs", "prompt_embeds"):
        assert getattr(trajectories, name).dtype == torch.float32, name
    trained = [p for p in policy.unet.parameters() if p.requires_grad]
    frozen = [p for p in [*policy.unet.parameters(), *policy.vae.parameters()] if not p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32} and {p.dtype for p in frozen} == {dtype}
    trajectories.advantages = torch.tensor([1.0, -1.0])
    result = ddpo.update(policy.unet, torch.optim.SGD(trained, lr=0.0), policy.scheduler, trajectories, torch.arange(2), policy.embed([""]), algorithm="ddpo-is",
                         eta=1.0, w=4.0, clip_range=0.1, micro_batch=2, max_grad_norm=1.0)
    assert result["ratio_error"].item() == 0 and {p.grad.dtype for p in trained} == {torch.float32}
    full = train.load_policy(train.ZOO, CPU, config(lora_rank=lora, steps=2))
    theirs, pictures = full.sample(["cat", "a bee"], (0, 0), 2, whole=True)
    assert relative_error(trajectories.latents, theirs.latents) < 16 * torch.finfo(dtype).eps
    assert np.abs(images.astype(int) - pictures).mean() < 6


def test_fp32_is_float32_throughout_and_half_precision_may_use_tf32():
    train.load_policy(train.ZOO, CPU, config())
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    train.load_policy(train.ZOO, CPU, config(precision="bf16"))
    assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32


def step(scale, factor=1.0, **more):
    """A step on a loss of two weights, its gradient (3, -4) times `factor`, clipped to norm 1 -> weights, norm, scaler."""
    net = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(net.weight)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale is not None) if scale is not None else None
    _, norm = ddpo.step(net, torch.optim.SGD(net.parameters(), lr=1.0), lambda i: (factor * net(torch.tensor([[3.0, -4.0]])).flatten().expand(len(i)), {}),
                        4, 2, 1.0, scaler=scaler)
    return net.weight.detach().flatten().tolist(), norm.item(), scaler


def test_the_scaler_of_fp16_changes_neither_the_step_nor_the_norm():
    for weights, norm, _ in (step(None), step(1024.0)):
        assert weights == pytest.approx([-0.6, 0.8]) and norm == pytest.approx(5)


def test_an_update_whose_gradients_overflow_is_skipped_and_shown_as_0():
    weights, norm, scaler = step(2.0**100, factor=1e30)
    assert weights == [0, 0] and norm == 0 and scaler.get_scale() == 2.0**99
    assert np.isinf(step(None, factor=1e39)[1]) or np.isnan(step(None, factor=1e39)[1])          # in fp32 it's an alarm, not a habit


def whole_and_cut(folder, *options):
    """Two epochs in one go, and with a stop between them -> the two folders."""
    settings = [*TINY, *options, "--samples-per-epoch", "2", "--steps", "2", "--eval-samples", "2", "--metrics", "", "--eval-every", "9"]
    train.main([*settings, "--out", str(folder / "whole")])
    train.main([*settings, "--epochs", "1", "--out", str(folder / "cut")])
    train.main(["--out", str(folder / "cut"), "--resume", "--epochs", "2"])
    return folder / "whole", folder / "cut"


@pytest.mark.parametrize("options", [[], ["--lora-rank", "2", "--grad-checkpointing"]])
def test_a_run_in_bf16_goes_its_way_and_resumes_exactly(options, tmp_path):
    whole, cut = whole_and_cut(tmp_path, "--precision", "bf16", *options)
    for line in metrics(whole):
        assert line["warnings"] == [] and line["first_ratio_error"] <= 1e-5 and line["grad_norm"] > 0
    files = [file.relative_to(whole) for file in whole.glob("checkpoints/000002/**/*.safetensors")]
    assert len(files) == 2
    for one, other in ((load_file(whole / file), load_file(cut / file)) for file in files):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_scale_of_fp16_is_remembered_and_updates_that_overflow_are_skipped(tmp_path):
    """So few pairs in an update overflow at the scaler's first scale, 2^16, but not at half of it: the first is skipped, the second isn't."""
    whole, cut = whole_and_cut(tmp_path, "--precision", "fp16", "--lora-rank", "2")
    for folder in (whole, cut):
        assert json.loads((folder / "checkpoints/000002/state.json").read_text())["scaler"]["scale"] == 2**15
        assert [line["grad_norm"] > 0 for line in metrics(folder)] == [False, True] and all(line["warnings"] == [] for line in metrics(folder))
    first, second = (load_file(cut / f"checkpoints/00000{epoch}/pytorch_lora_weights.safetensors") for epoch in (1, 2))
    assert not any(w.any() for name, w in first.items() if "lora_B" in name) and any(w.any() for name, w in second.items() if "lora_B" in name)


# --- devices ---------------------------------------------------------------------------------------------------------------------------

class Accelerated:
    """The zoo's policy on `meta`, which computes shapes only, and refuses to mix with the CPU's tensors as CUDA does; no data can come back from it,
    so that waiting for the device would raise too."""

    def __init__(self, **changes):
        self.policy = train.load_policy(train.ZOO, torch.device("meta"), config(steps=2, grad_checkpointing=True, **changes))
        self.policy.decode = lambda latents: np.zeros((*self.policy.vae.decode(latents).permute(0, 2, 3, 1).shape,), np.uint8)           # pictures go to the host

    def sample(self):
        trajectories, images = self.policy.sample(["cat", "a bee", "cat"], (0, 0), 2, whole=True)
        assert {getattr(trajectories, name).device.type for name in ("latents", "log_probs", "timesteps", "prompt_embeds")} == {"meta"}
        assert images.shape == (3, 64, 64, 3)
        return trajectories

    def update(self, trajectories, **more):
        trajectories.advantages = torch.ones(3, device="meta")
        trained = [p for p in self.policy.unet.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        result = ddpo.update(self.policy.unet, optimizer, self.policy.scheduler, trajectories, torch.arange(3, device="meta"), self.policy.embed([""]),
                             algorithm="ddpo-is", eta=1.0, w=4.0, clip_range=0.1, micro_batch=4, max_grad_norm=1.0, **more)
        assert {value.device.type for value in result.values()} == {"meta"}
        return result


@pytest.mark.parametrize("lora", [0, 4])
def test_an_epoch_on_an_accelerator_forgets_no_tensor_on_the_cpu_and_waits_for_nothing(lora):
    run = Accelerated(lora_rank=lora)
    run.update(run.sample())


def test_a_round_of_regression_on_an_accelerator(monkeypatch):
    run = Accelerated()
    monkeypatch.setattr(ddpo, "averaged", lambda metrics: metrics)
    monkeypatch.setattr(np, "flatnonzero", lambda weights: np.arange(3))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: tensor)
    rows = ddpo.regress(run.policy, torch.optim.AdamW(run.policy.unet.parameters()), torch.empty(3, 4, 8, 8, device="meta"), ["cat", "bee", "cat"],
                        torch.ones(3, device="meta"), 2, [0, 0, 1], [1e-3, 1e-3], 4.0, micro_batch=1, max_grad_norm=1.0)
    assert {value.device.type for row in rows for value in row.values()} == {"meta"}


@pytest.mark.parametrize("forget", ["noise", "timesteps", "schedule", "tokens"])
def test_a_forgotten_to_device_is_seen(forget, monkeypatch):
    run = Accelerated()
    if forget == "noise":
        real = ddpo.sample
        monkeypatch.setattr(ddpo, "sample", lambda net, scheduler, cond, uncond, noise, *rest: real(net, scheduler, cond, uncond, torch.zeros(noise.shape), *rest))
    elif forget == "timesteps":
        trajectories = run.sample()
        trajectories.timesteps = torch.tensor([501, 1])
        run.sample = lambda: trajectories
    elif forget == "schedule":
        run.policy.scheduler = run.policy.scheduler.from_folder(train.ZOO / "scheduler")
    else:
        run.policy.device = CPU
    with pytest.raises((RuntimeError, NotImplementedError)):
        run.update(run.sample())


# --- memory at full size, a small part of what memory.py counts; the rest in a real step of ten minutes (--slow) ---------------------------------

def test_counted_memory_of_a_full_size_step_is_at_least_what_it_keeps(monkeypatch):
    """LoRA of the full-size UNet in bf16, by hand: 859.5 M frozen weights of 2 bytes; the VAE's 83.7 M, the text encoder's 123.1 M likewise, CLIP's 303.5 M of 4."""
    kept = (2 * (859_520_964 + 83_653_863 + 123_060_480) + 4 * 303_507_456 + 4 * (255 * 51 * 4 * 64 * 64 + 256 * 77 * 768)) / memory.GIB
    counted = memory.peak(4, True, 1, torch.bfloat16)
    assert kept < counted < kept + 1.5
    assert counted * memory.GIB < 10e9


FULL_SIZE_STEP = """
import json, resource, sys
sys.path[:0] = {paths}
import torch
import train
run = train.prepare(train.parse({arguments}))
named = lambda: {{f"{{part}}.{{name}}": p for part in ("unet", "vae", "text_encoder") for name, p in getattr(run.policy, part).named_parameters()}}
digest = lambda: {{name: (p.detach().double().sum().item(), p.detach().double().square().sum().item(), p.flatten()[:3].tolist()) for name, p in named().items()}}
before = digest()
train.loop(run)
after = digest()
changed = {{name for name in before if before[name] != after[name]}}
trained = {{name for name, p in named().items() if p.requires_grad}}
print(json.dumps([sorted(changed - trained), sorted(trained - changed), len(trained), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
"""


@pytest.fixture(scope="module")
def full_size_folder(tmp_path_factory):
    """Stable Diffusion v1.4 with random weights, for pictures of 256 x 256."""
    from transformers import CLIPTextConfig, CLIPTextModel
    folder = tmp_path_factory.mktemp("sd")
    unet.save(unet.UNet({**memory.SD_UNET, "sample_size": 32}), folder / "unet")
    unet.save(unet.VAE(memory.SD_VAE), folder / "vae")
    CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)).save_pretrained(folder / "text_encoder")
    for part in ("tokenizer", "scheduler"):
        shutil.copytree(train.ZOO / part, folder / part)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--lora-rank", "4", "--precision", "bf16"], []], ids=["LoRA, bf16", "full, fp32"])
def test_a_real_full_size_step_on_cpu_fits_in_24_gb_and_changes_the_weights_it_should_and_no_others(options, full_size_folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a cat\na bee\n")
    arguments = ["--model", str(full_size_folder), "--device", "cpu", "--reward", "compressibility", "--metrics", "", "--prompts", str(tmp_path / "prompts.txt"), "--epochs", "1",
                 "--steps", "2", "--samples-per-epoch", "2", "--batch-size", "2", "--sample-batch", "1", "--micro-batch", "1", "--eval-samples", "2", "--grad-checkpointing",
                 "--out", str(tmp_path / "run"), *options]
    code = FULL_SIZE_STEP.format(paths=[str(train.ZOO.parents[2])], arguments=arguments)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    wrong, still, trained, peak = json.loads(done.stdout.splitlines()[-1])
    shutil.rmtree(tmp_path / "run")
    with capsys.disabled():
        print(f"\nfull size, {options}: {trained} tensors trained, peak {peak / 1e9:.1f} GB")
    assert wrong == [] and trained == (256 if options else 686)
    assert all(".lora_A." in name for name in still)        # the gradient of A is 0 as long as B is; weight decay alone may round to nothing
    assert peak < 24e9
