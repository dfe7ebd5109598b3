"""The zoo as shipped: in the real file layout (diffusers and transformers load it), and good enough
for its judge. And what its pictures are made of.
"""

import json
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

import data
import ddpo
import gates
import judge as judge_module
import loop
import raters
import train
from scheduler import Sampler, named_noise

ANIMALS = list(train.load_prompts("common-animals"))


@pytest.fixture(scope="module")
def animals(policy):
    names = [(0, train.EVALUATION, i) for i in range(45)]
    return np.concatenate([images for _, images in policy.sample(ANIMALS, names, 45)])


def test_images_equal_those_of_diffusers_pipeline(policy, zoo):
    """The whole stack (tokenizer, text encoder, guidance, DDIM, UNet, VAE) at eta = 0."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(zoo, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["cat", "a dog on a red background", "an ant", "a kangaroo washing dishes"]
    x_T = torch.stack([named_noise((4, 8, 8), 1, 7, i)[0] for i in range(4)])
    options = {"num_inference_steps": 20, "guidance_scale": 5.0, "eta": 0.0, "output_type": "np"}
    theirs = (pipeline(prompts, latents=x_T.clone(), **options).images * 255).round()
    noise = torch.zeros(4, 21, 4, 8, 8)
    noise[:, 0] = x_T
    sampler = Sampler(policy.sampler.schedule, T=20, eta=0.0)
    embeds, uncond = policy.embed(prompts), policy.uncond()
    ours = ddpo.sample(policy.unet, sampler, embeds, uncond, noise, guidance=5.0)
    ours = policy.decode(ours.latents[:, -1])
    assert np.abs(ours.astype(np.int64) - theirs.astype(np.int64)).max() <= 1


def test_the_scheduler_file_leaves_nothing_to_diffusers_defaults(zoo):
    config = json.loads((zoo / "scheduler" / "scheduler_config.json").read_text())
    assert config["_class_name"] == "DDIMScheduler"
    assert config["clip_sample"] is False and config["set_alpha_to_one"] is False
    loaded = diffusers.DDIMScheduler.from_pretrained(zoo / "scheduler").config
    assert loaded.clip_sample is False and loaded.set_alpha_to_one is False


def test_samples_show_what_their_prompts_say(animals):
    """The gate is gates.py's (180 samples, 80 %); 45 samples have a standard error of 6 points."""
    assert judge_module.accuracy(judge_module.load_judge(), animals, ANIMALS) >= 0.7


def test_the_judge_sees_nothing_in_noise_and_blanks():
    rng = np.random.default_rng(3)
    judge = judge_module.load_judge()
    noise = rng.integers(0, 256, (64, 64, 64, 3), dtype=np.uint8)
    blanks = np.broadcast_to(rng.integers(0, 256, (64, 1, 1, 3), dtype=np.uint8), noise.shape)
    assert judge_module.accuracy_none(judge, noise) >= 0.95
    assert judge_module.accuracy_none(judge, blanks) >= 0.95


def test_ground_colour_is_the_borders():
    pictures = np.zeros((2, 64, 64, 3), np.uint8) + np.array(data.COLOURS["red"], np.uint8)
    pictures[:, 8:56, 8:56] = data.COLOURS["blue"]
    # not half of the border: the mean would be purple, the median is red
    pictures[1, :, :28] = data.COLOURS["blue"]
    assert judge_module.ground_colour(pictures) == ["red", "red"]


def test_the_judge_asks_for_the_ground_where_the_prompt_does(monkeypatch):
    seen = ["cat", "ant", "cat", "dog", judge_module.NONE]
    monkeypatch.setattr(judge_module, "name", lambda judge, images: seen)
    red = np.zeros((5, 64, 64, 3), np.uint8) + np.array(data.COLOURS["red"], np.uint8)

    def right(*prompts):
        return judge_module.judged_right(red, prompts).tolist()

    assert right("cat", "an ant", "a cat washing dishes", "cat", "cat") == [1, 1, 1, 0, 0]
    on_red = [data.on_ground(name, "red") for name in ("cat", "ant", "cat", "cat", "cat")]
    assert right(*on_red) == [1, 1, 1, 0, 0]
    assert right(*[prompt.replace("red", "blue") for prompt in on_red]) == [0] * 5


def test_clip_ships_with_the_text_encoder_of_the_policy(zoo, policy):
    clip = CLIPModel.from_pretrained(zoo.parent / "clip", dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(zoo.parent / "clip")
    tokens = tokenizer(["a cat"], padding="max_length", return_tensors="pt").input_ids
    embeds = clip.text_model(tokens).last_hidden_state
    assert torch.allclose(embeds, policy.embed(["a cat"]), atol=1e-6)


def test_every_prompt_of_the_paper_can_be_tokenized(policy):
    for prompt in [*ANIMALS, *train.load_prompts("imagenet-animals")]:
        assert 2 < len(policy.tokenizer(prompt).input_ids)
    for prompt in train.load_prompts("animal-activities"):
        assert len(policy.tokenizer(prompt).input_ids) <= policy.tokenizer.model_max_length


def test_the_papers_animals_and_its_counts_of_unseen_things():
    assert data.ANIMALS == ANIMALS
    counts = [len(words) for words in (data.ANIMALS, data.OTHER_ANIMALS, data.OBJECTS)]
    assert counts == [45, 38, 50] and len(set(data.NAMES)) == 133 and len(data.COLOURS) == 10
    assert set(data.EMOJI) <= set(data.NAMES) and set(data.HARD) <= set(data.ANIMALS)
    prompts = [f"{data.article(name)} {what}" for name in ANIMALS for what in data.ACTIVITIES]
    assert prompts == list(train.load_prompts("animal-activities"))


def test_all_weights_fit_in_40_megabytes(zoo):
    files = [path for path in zoo.parent.glob("**/*.safetensors") if ".data" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 40e6


def poses(varied):
    """How a body and a face, red on the left and blue on the right, are drawn -> a set of poses.

    Each is (width, mirrored); the body is green, and has neither.
    """
    body, face = np.zeros((64, 64, 4), np.uint8), np.zeros((64, 64, 4), np.uint8)
    body[..., 3] = face[..., 3] = 255
    body[..., 1] = face[:, :32, 0] = face[:, 32:, 2] = 120
    pictures = [Image.fromarray(body), Image.fromarray(face)]
    rng, seen = np.random.default_rng(0), set()
    for _ in range(80):
        art = {"cat": {vendor: pictures for vendor in data.VENDORS}}
        pixels = data.compose(rng, art, "cat", "white", varied=varied).pixels.astype(int)
        redness = pixels[..., 0] - pixels[..., 2]
        columns = np.flatnonzero((abs(redness) > 25).any(0))
        if len(columns):
            width = 8 * round((columns[-1] - columns[0] + 1) / 8)
            seen.add((width, bool(redness[32, columns[0] + 8] < 0)))
        else:
            seen.add("body")
    return seen


def test_the_policys_pictures_come_in_one_pose_one_size_unmirrored(monkeypatch):
    assert poses(varied=False) == {(56, False)}
    assert poses(varied=True) == {"body", (48, False), (48, True), (56, False), (56, True)}
    monkeypatch.setattr(data, "compose", lambda *arguments, **options: options)
    assert data.policy_example(np.random.default_rng(0), {})[0] == {"varied": False}
    monkeypatch.setattr(data, "compose", lambda *arguments, **options: arguments)
    for name, vendor in (("snake", "twitter"), ("fox", "google")):
        (*_, said, colour, vendor_), caption = data.policy_example(
            np.random.default_rng(0), {}, name, vendor
        )
        assert (said, vendor_) == (name, vendor) and name in caption
        assert not data.held_out(name, colour)


def test_weak_animals_are_shown_more_often(art):
    rng = np.random.default_rng(0)
    names = [data.policy_example(rng, art)[0].name for _ in range(600)]
    hard = np.mean([name in data.HARD for name in names])
    # 18 of 45 animals, 66 % of all; of the rest a quarter: 0.264 + 0.25 * 0.736
    assert abs(hard - 0.448) < 0.06


def test_pairs_that_are_held_out_never_reach_the_policy(art):
    rng = np.random.default_rng(0)
    for _ in range(300):
        picture, _ = data.policy_example(rng, art)
        assert not data.held_out(picture.name, picture.colour)
    pairs = [(name, colour) for name in data.NAMES for colour in data.COLOURS]
    assert abs(np.mean([data.held_out(*pair) for pair in pairs]) - 1 / 8) < 0.01


def test_raters_score_what_they_say():
    """A grey picture, and what each of five changes to it does to the score."""
    grey = np.full((1, 64, 64, 3), 128, np.uint8)
    warm = grey + np.array([60, 0, 0], np.uint8) - np.array([0, 0, 60], np.uint8)
    cold = warm[..., ::-1].copy()
    assert raters.warmth(warm)[0] == pytest.approx(120 / 255)
    assert raters.colourfulness(warm)[0] == pytest.approx(0.3 * np.hypot(60, 90))
    assert raters.truth(warm)[0] - raters.truth(cold)[0] == pytest.approx(2 * 3 * 120 / 255)
    centred, aside = grey.copy(), grey.copy()
    centred[:, 24:40, 24:40] = aside[:, 24:40, 48:64] = 255
    assert raters.off_centre(centred)[0] == pytest.approx(0, abs=1e-9)
    assert raters.off_centre(aside)[0] == pytest.approx(24 / 64, abs=1e-3)
    busy = grey.copy()
    busy[:, :, ::2] = 0
    assert raters.unrest(busy)[0] == pytest.approx(64)
    assert raters.sharpness(grey)[0] == 0 and raters.colourfulness(grey)[0] == 0


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 4, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muons_steps_are_roughly_orthogonal(shape, dtype, monkeypatch):
    """Against the singular value decomposition: the same directions, lengths near 1."""
    monkeypatch.setattr(loop, "rough_dtype", lambda device: dtype)
    g = torch.randn(shape)
    ours = loop.orthogonalize(g).flatten(1)
    u, _, v = torch.linalg.svd(g.flatten(1), full_matrices=False)
    lengths = torch.linalg.svdvals(ours)
    assert ours.dtype == torch.float32 and 0.6 < lengths.min() and lengths.max() < 1.3
    assert (u.T @ ours @ v.T).diagonal().mean() == pytest.approx(lengths.mean().item(), rel=0.02)


@pytest.mark.parametrize(
    "capabilities, dtype",
    [
        ({"avx2": True, "avx512_bf16": False}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"neon": True, "bf16": True}, torch.bfloat16),
        ({}, torch.float32),
    ],
)
def test_muon_takes_bfloat16_where_the_cpu_has_it(capabilities, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert loop.rough_dtype.__wrapped__(torch.device("cpu")) == dtype


class Killed(Exception):
    """In the middle of a training."""


def test_a_training_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path):
    def train_for(cache, killed_at=None):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
        seen = SimpleNamespace(steps=0)

        def loss(net, rng):
            if seen.steps == killed_at:
                raise Killed
            seen.steps += 1
            x = torch.as_tensor(rng.normal(size=(16, 6)), dtype=torch.float32)
            return (net(x)[:, 0] - x.sum(1) + 0.1 * torch.randn(16)).square().mean()

        return loop.train("tiny", net, loss, 12, cache, every=5).state_dict()

    whole = train_for(tmp_path / "whole")
    with pytest.raises(Killed):
        train_for(tmp_path / "killed", killed_at=7)
    resumed = train_for(tmp_path / "killed")
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


@pytest.mark.parametrize("reward, guidance", [("aesthetic", 4.0), ("alignment", 2.0)])
def test_gates_draw_at_the_rewards_own_settings(monkeypatch, reward, guidance):
    """At guidance 4 the base follows too many of alignment's prompts to show what is learned."""
    used = []

    def load_policy(folder, device, config):
        used.append(config.guidance)
        return SimpleNamespace(sample=lambda *_: [(None, np.zeros((1, 64, 64, 3), np.uint8))])

    monkeypatch.setattr(train, "load_policy", load_policy)
    gates.samples(data.HERE, ["a cat"], "cpu", reward)
    assert used == [guidance]
