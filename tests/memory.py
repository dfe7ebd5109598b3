"""How much memory an epoch of DDPO takes on full-size SD v1.4, *counted* without a GPU: `python tests/memory.py`.

Every tensor is fake (FakeTensorMode: shapes and types, no data), so that the real code runs through the real sizes on any machine: sampling with
guidance, the VAE's decoding, CLIP L/14 as the reward, and the updates. MemTracker adds up what is alive at each moment. What is not counted: the CUDA
context (about 0.5 GIB), cuDNN's workspaces, and what the allocator loses to fragmentation.

The norms are made to compute in float32, as CUDA's autocast has them; the CPU's, which is used here, does not. The steps that a run repeats are cut
short (T = 2, one picture a batch), for memory does not depend on them; the trajectories of a whole epoch, 256 pictures of T = 50, are there as ballast.
"""
import argparse
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch                                        # noqa: E402
import torch.nn.functional as F                     # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode            # noqa: E402
from torch.distributed._tools.mem_tracker import MemTracker         # noqa: E402

import ddpo                                         # noqa: E402
from scheduler import Scheduler                     # noqa: E402
from unet import VAE, UNet, add_lora                # noqa: E402

SD_UNET = dict(sample_size=64, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=[320, 640, 1280, 1280], attention_head_dim=8,
               norm_num_groups=32, cross_attention_dim=768, down_block_types=[*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
               up_block_types=["UpBlock2D", *["CrossAttnUpBlock2D"] * 3])
SD_VAE = dict(in_channels=3, out_channels=3, latent_channels=4, layers_per_block=2, block_out_channels=[128, 256, 512, 512], norm_num_groups=32)
SCHEDULER = Scheduler.from_config(dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, set_alpha_to_one=False))
SAMPLES, T, GIB = 256, 50, 2**30


class Tracker(MemTracker):
    """The sum over all tensors alive, and its peak; without the bookkeeping of modules, which allows no frozen weights and no second pass."""
    _pre_fw_hook = _post_fw_hook = _pre_bw_hook = _post_bw_hook = lambda self, *_: None


class Norms:
    """GroupNorm and LayerNorm in float32 while this lasts."""

    def __enter__(self):
        self.real = F.group_norm, F.layer_norm
        group, layer = self.real
        F.group_norm = lambda x, groups, weight, bias, eps: group(x.float(), groups, weight.float(), bias.float(), eps)
        F.layer_norm = lambda x, shape, weight, bias, eps: layer(x.float(), shape, weight.float(), bias.float(), eps)

    def __exit__(self, *_):
        F.group_norm, F.layer_norm = self.real


def fake_policy(lora, checkpointing, dtype, device):
    """A full-size Stable Diffusion without weights on `device`, as train.load_policy would have it -> ddpo.Policy, CLIP."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

    def frozen(net, dtype):
        for module in net.modules():                # .to() needs real tensors
            for name, p in [*module._parameters.items()]:
                if p is not None:
                    module._parameters[name] = torch.nn.Parameter(torch.empty(p.shape, dtype=dtype, device=device), requires_grad=False)
        return net.eval()

    with torch.device(device):
        unet, vae = UNet(SD_UNET), frozen(VAE(SD_VAE), dtype)
        encoder = frozen(CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)), dtype)
        clip = frozen(CLIPVisionModelWithProjection(CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                                                                     patch_size=14, projection_dim=768)), torch.float32)
    if lora:
        unet = add_lora(frozen(unet, dtype), lora)
        unet = unet if device == "cpu" else unet.to(device)             # fake tensors cannot be moved, and need not be
    unet.gradient_checkpointing = checkpointing
    if dtype != torch.float32:
        unet.forward, vae.decode = (torch.autocast("cpu", dtype)(function) for function in (unet.forward, vae.decode))
    tokenizer = lambda prompt, **_: SimpleNamespace(input_ids=torch.zeros(1, 77, dtype=torch.int64))           # noqa: E731
    tokenizer.model_max_length = 77
    return ddpo.Policy(unet, vae, SCHEDULER.to(device), tokenizer, encoder, torch.device(device), 2, 1.0, 5.0), clip


def epoch(policy, clip, micro_batch, scaler):
    """Sampling, decoding, reward, and two updates: everything of an epoch but what needs numbers -> the last update's metrics."""
    trained = [p for p in policy.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=policy.device.type != "meta")
    decode = policy.vae.decode

    def roll_out(start):                            # Policy.sample and Policy.decode, but for the pictures' way to the host
        optimizer.zero_grad()
        noise = torch.stack([ddpo.named_noise((4, 64, 64), policy.T + 1, 0, 0, start + i) for i in range(micro_batch)]).to(policy.device)
        trajectories = ddpo.sample(policy.unet, policy.scheduler, policy.embed(["a cat"] * micro_batch), policy.embed([""]), noise, policy.T, policy.eta, policy.w)
        with torch.no_grad():
            images = (decode(trajectories.latents[:, -1]).float() / 2 + 0.5).clamp(0, 1)
            clip(pixel_values=F.interpolate(images, (224, 224)))
        return trajectories

    trajectories = ddpo.Trajectories.cat([roll_out(start) for start in range(0, 2 * micro_batch, micro_batch)])
    ballast = [torch.empty(SAMPLES - len(trajectories), T + 1, 4, 64, 64, device=policy.device), torch.empty(SAMPLES, 77, 768, device=policy.device)]
    trajectories.advantages = torch.ones(len(trajectories), device=policy.device)
    for minibatch in torch.arange(len(trajectories), device=policy.device).split(micro_batch):
        metrics = ddpo.update(policy.unet, optimizer, policy.scheduler, trajectories, minibatch, policy.embed([""]), algorithm="ddpo-is", eta=policy.eta,
                              w=policy.w, clip_range=1e-4, micro_batch=micro_batch, max_grad_norm=1.0, scaler=scaler)
    roll_out(0)                                     # the end of the next epoch's sampling: the optimizer's moments are there from now on
    del ballast
    return metrics


def peak(lora, checkpointing, micro_batch, dtype):
    """The peak of an epoch, in GiB."""
    with FakeTensorMode(allow_non_fake_inputs=True), Norms():
        policy, clip = fake_policy(lora, checkpointing, dtype, "cpu")
        tracker = Tracker()
        tracker.track_external(policy.unet, policy.vae, policy.text_encoder, clip)
        with tracker:
            epoch(policy, clip, micro_batch, torch.amp.GradScaler("cpu", enabled=dtype == torch.float16))
        return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] / GIB


def main():
    parser = argparse.ArgumentParser(description="Counts the memory of full-size DDPO under fake tensors.")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp16"])
    parser.add_argument("--limits", action="store_true", help="only micro-batch 1 with checkpointing: full under 24 GB, LoRA under 10 GB, or fail")
    given = parser.parse_args()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[given.precision]
    print("| trained | --grad-checkpointing | --micro-batch | GiB, counted |\n| --- | --- | --- | --- |")
    for lora, checkpointing, micro_batch in itertools.product((0, 4), (True, False), (1,) if given.limits else (1, 4, 8)):
        if given.limits and not checkpointing:
            continue
        size = peak(lora, checkpointing, micro_batch, dtype)
        print(f"| {'LoRA, rank 4' if lora else 'full UNet'} | {'yes' if checkpointing else 'no'} | {micro_batch} | {size:.1f} |", flush=True)
        if given.limits and size * GIB >= (10e9 if lora else 24e9):
            raise SystemExit("over the limit")


if __name__ == "__main__":
    main()
