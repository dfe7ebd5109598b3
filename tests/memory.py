"""How much memory an epoch of DDPO takes on full-size SD v1.4, *counted* without a GPU.

    python tests/memory.py              # a table, of a quarter of an hour; kept in memory.json
    python tests/memory.py --limits     # the two that must fit: 24 GB, with LoRA 10 GB
    python tests/memory.py --cards      # what train.py chooses for cards of 6 to 80 GB; at once

train.py's choice for a card (`train.fitted`) is tested against memory.json.

Every tensor is fake (FakeTensorMode: shapes and types, no data), so that the real code runs through
the real sizes on any machine: sampling with guidance, the VAE's decoding, CLIP L/14 as the reward,
the updates. MemTracker adds up what is alive at each moment. What is not counted: the CUDA context
(about 0.5 GiB), cuDNN's workspaces, and what the allocator loses to fragmentation.

The norms are made to compute in float32, as CUDA's autocast has them; the CPU's, which is used
here, does not. What a run repeats is cut short, for memory does not depend on it: two updates, the
second of two passes, so that Adam's moments and gradients are there; then one batch of the next
pictures, one step each. The trajectories of a whole epoch, 256 pictures of T = 50, are there too.
"""

import argparse
import copy
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

sys.path.insert(0, str(Path(__file__).parents[1]))

import ddpo
from scheduler import NoiseSchedule, Sampler, UserError
from train import PRECISIONS, Config, fitted
from unet import VAE, UNet, add_lora

SD_UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": [320, 640, 1280, 1280],
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "cross_attention_dim": 768,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}
SD_VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": [128, 256, 512, 512],
    "norm_num_groups": 32,
}
SD_SCHEDULE = NoiseSchedule.from_config(
    {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "set_alpha_to_one": False,
    }
)
SD_TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
CLIP_L_14 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
SAMPLES, T, GIB = 256, 50, 2**30
KEPT = Path(__file__).with_suffix(".json")  # {case: GiB}


def ignore(*_):
    """In place of a hook."""


class Tracker(MemTracker):
    """The sum over all tensors alive, and its peak.

    Without the bookkeeping of modules, which allows no frozen weights and no second pass.
    """

    _pre_fw_hook = _post_fw_hook = _pre_bw_hook = _post_bw_hook = ignore


class Norms:
    """GroupNorm and LayerNorm in float32 while this lasts."""

    def __enter__(self):
        self.real = F.group_norm, F.layer_norm
        F.group_norm, F.layer_norm = map(self.in_float32, self.real)

    def in_float32(self, norm):
        def wrapped(x, sizes, weight, bias, eps):
            return norm(x.float(), sizes, weight.float(), bias.float(), eps)

        return wrapped

    def __exit__(self, *_):
        F.group_norm, F.layer_norm = self.real


class Unmeasured(ddpo.DDPO):
    """DDPO but for the metrics, which need numbers."""

    def metrics(self, logged):
        return {}


class Tokenizer:
    """One text's worth of zeros."""

    model_max_length = 77

    def __call__(self, prompt, **options):
        return SimpleNamespace(input_ids=torch.zeros(1, 77, dtype=torch.int64))


def frozen(net, dtype):
    """Without gradients, in another type: `.to()` needs real tensors."""
    for module in net.modules():
        for name, p in [*module._parameters.items()]:
            if p is not None:
                zeros = torch.zeros(p.shape, dtype=dtype, device=p.device)
                module._parameters[name] = torch.nn.Parameter(zeros, requires_grad=False)
    return net.eval()


def make_policy(lora, checkpointing, dtype, device):
    """A full-size Stable Diffusion of random weights or none, as train.load_policy has it.

    -> Policy, CLIP.
    """
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    with device:
        unet, vae = UNet(SD_UNET), frozen(VAE(SD_VAE), dtype)
        encoder = frozen(CLIPTextModel(CLIPTextConfig(**SD_TEXT)), dtype)
        clip = frozen(CLIPVisionModelWithProjection(CLIPVisionConfig(**CLIP_L_14)), torch.float32)
    if lora:
        unet = add_lora(frozen(unet, dtype), lora)  # whose matrices are drawn on the CPU
    unet.gradient_checkpointing = checkpointing
    schedule = copy.copy(SD_SCHEDULE)
    schedule.alphas_bar = schedule.alphas_bar.to(device)
    policy = ddpo.Policy(
        unet=unet,
        vae=vae,
        sampler=Sampler(schedule, 1, 1.0),
        tokenizer=Tokenizer(),
        text_encoder=encoder,
        device=device,
        guidance=5.0,
        dtype=dtype,
    )
    return policy, clip


def rewarded(policy, clip):
    """Let the policy's pictures be rewarded by CLIP and stay where they are: they hold no data."""

    @torch.no_grad()
    def decode(latents):
        with policy.autocast():
            decoded = policy.vae.decode(latents)
        images = (decoded.float() / 2 + 0.5).clamp(0, 1)
        return clip(pixel_values=F.interpolate(images, (224, 224))).image_embeds

    policy.decode = decode


def whole(embeds):
    """Trajectories of T steps, all zero, whatever was drawn; prompt_embeds (B, 77, 768)."""
    B, side = len(embeds), SD_UNET["sample_size"]
    latents, log_probs = embeds.new_zeros(B, T + 1, 4, side, side), embeds.new_zeros(B, T)
    timesteps = torch.zeros(T, dtype=torch.int64, device=embeds.device)
    return ddpo.Trajectories(latents, log_probs, timesteps, embeds)


def epoch(policy, micro_batch, scaler):
    """Two updates, then the next epoch's sampling: of an epoch all but what needs numbers."""
    trained = [p for p in policy.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    algorithm = Unmeasured(Config(batch_size=micro_batch))
    records = [whole(torch.zeros(SAMPLES, 77, 768, device=policy.device))]
    batches = algorithm.batches(policy, records, [], torch.ones(SAMPLES), [0, 0, 1])
    for passes, batch in zip((1, 2), batches):
        some = batch[: passes * micro_batch]
        ddpo.optimizer_step(policy, algorithm, optimizer, some, micro_batch, 1.0, scaler)
    del batch, batches, some, records
    optimizer.zero_grad()
    records = [whole(torch.zeros(SAMPLES - micro_batch, 77, 768, device=policy.device))]
    names = [(0, 0, i) for i in range(micro_batch)]
    for drawn, _ in policy.sample(["a cat"] * micro_batch, names, micro_batch):
        records.append(algorithm.record(whole(drawn.prompt_embeds)))


def peak(lora, checkpointing, micro_batch, dtype):
    """The peak of an epoch, in GiB, counted."""
    cpu = torch.device("cpu")
    with FakeTensorMode(allow_non_fake_inputs=True), Norms():
        policy, clip = make_policy(lora, checkpointing, dtype, cpu)
        rewarded(policy, clip)
        tracker = Tracker()
        tracker.track_external(policy.unet, policy.vae, policy.text_encoder, clip)
        with tracker:
            scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
            epoch(policy, micro_batch, scaler)
        return tracker.get_tracker_snapshot("peak")[cpu]["Total"] / GIB


def kept_by_hand():
    """What an epoch of LoRA in bf16 keeps, in GiB: less than its peak, and nearly all of it.

    859.5 M frozen weights of 2 bytes; the VAE's 83.7 M, the text encoder's 123.1 M likewise,
    CLIP's 303.5 M of 4. An epoch's trajectories are there, and may be there twice.
    """
    frozen = 2 * (859_520_964 + 83_653_863 + 123_060_480) + 4 * 303_507_456
    trajectories = 4 * 256 * (51 * 4 * 64 * 64 + 77 * 768)
    return (frozen + trajectories) / GIB


def case(lora, precision, checkpointing, micro_batch):
    """The name of a count in memory.json."""
    trained, saving = "LoRA" if lora else "full", "checkpointing" if checkpointing else "plain"
    return f"{trained}, {precision}, {saving}, {micro_batch}"


def cards(kept):
    """A table: what train.py makes of a card's 10^9 bytes, and what that takes by the counts."""
    print(
        "| card | trained | --precision | --grad-checkpointing | pictures at a time | GB, counted |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for gigabytes, lora in itertools.product((6, 8, 12, 16, 20, 24, 40, 80), (0, 4)):
        trained = f"LoRA, `--lora-rank {lora}`" if lora else "full UNet"
        try:
            c = fitted({"lora_rank": lora}, (gigabytes * 1e9, "bf16"), {})
        except UserError:
            print(f"| {gigabytes} GB | {trained} | does not fit: a line says so | | | |")
            continue
        way = (lora, c.precision, c.grad_checkpointing, c.micro_batch)
        cells = (f"{gigabytes} GB", trained, c.precision, "yes" if way[2] else "no", way[3])
        print(f"| {' | '.join(map(str, cells))} | {kept[case(*way)] * GIB / 1e9:.1f} |")


def main():
    parser = argparse.ArgumentParser(description="Counts the memory of full-size DDPO.")
    parser.add_argument(
        "--limits",
        action="store_true",
        help="only bf16, micro-batch 1 with checkpointing: full under 24 GB, LoRA under 10 GB, and"
        " both as in memory.json, or fail",
    )
    parser.add_argument("--cards", action="store_true", help="what train.py chooses for a card")
    given, kept = parser.parse_args(), json.loads(KEPT.read_text())
    if given.cards:
        return cards(kept)
    print("| trained | --precision | --grad-checkpointing | --micro-batch | GiB, counted |")
    print("| --- | --- | --- | --- | --- |")
    ways = itertools.product((0, 4), ("fp32", "bf16"), (True, False), (1, 2, 4, 8))
    if given.limits:
        ways = [(0, "bf16", True, 1), (4, "bf16", True, 1)]
    for lora, precision, checkpointing, micro_batch in ways:
        size = peak(lora, checkpointing, micro_batch, PRECISIONS[precision])
        trained, saving = "LoRA, rank 4" if lora else "full UNet", "yes" if checkpointing else "no"
        print(f"| {trained} | {precision} | {saving} | {micro_batch} | {size:.1f} |", flush=True)
        before = kept.get(case(lora, precision, checkpointing, micro_batch), 0.0)
        kept[case(lora, precision, checkpointing, micro_batch)] = round(size, 4)
        if given.limits and (size * GIB >= (10e9 if lora else 24e9) or abs(size - before) > 0.05):
            raise SystemExit(f"over the limit, or not the {before} GiB of memory.json")
        if given.limits and lora and not kept_by_hand() < size < kept_by_hand() + 1.5:
            raise SystemExit(f"more is kept than {kept_by_hand():.1f} GiB, counted by hand")
    if not given.limits:
        KEPT.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
