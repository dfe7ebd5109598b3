"""The zoo as shipped: in the real file layout (diffusers and transformers load it), and good enough for its judge."""
import json

import diffusers
import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPTokenizer

import data
import ddpo
import judge as judge_module
import train
from rewards import COMMON_ANIMALS, IMAGENET_ANIMALS


@pytest.fixture(scope="module")
def policy():
    return train.load_policy(train.ZOO, torch.device("cpu"), train.resolve({"model": "zoo"}, train.ZOO))


@pytest.fixture(scope="module")
def animals(policy):
    return policy.sample(COMMON_ANIMALS, (0, train.EVALUATION), 45)[1]


def test_images_equal_those_of_diffusers_pipeline(policy, zoo):
    """eta = 0, the same x_T: the whole stack (tokenizer, text encoder, guidance, DDIM, UNet, VAE) against diffusers' own."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(zoo, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["cat", "a dog on a red background", "an ant", "a kangaroo washing dishes"]
    x_T = torch.stack([ddpo.named_noise((4, 8, 8), 1, 7, i)[0] for i in range(4)])
    theirs = pipeline(prompts, latents=x_T.clone(), num_inference_steps=20, guidance_scale=5.0, eta=0.0, output_type="np").images
    theirs = (theirs * 255).round().astype(np.int64)
    noise = torch.zeros(4, 21, 4, 8, 8)
    noise[:, 0] = x_T
    ours = ddpo.sample(policy.unet, policy.scheduler, policy.embed(prompts), policy.embed([""]), noise, 20, 0.0, 5.0)
    ours = policy.decode(ours.latents[:, -1]).astype(np.int64)
    assert np.abs(ours - theirs).max() <= 1


def test_the_scheduler_file_leaves_nothing_to_diffusers_defaults(zoo):
    config = json.loads((zoo / "scheduler" / "scheduler_config.json").read_text())
    assert config["_class_name"] == "DDIMScheduler" and config["clip_sample"] is False and config["set_alpha_to_one"] is False
    assert diffusers.DDIMScheduler.from_pretrained(zoo / "scheduler").config.clip_sample is False


def test_samples_show_what_their_prompts_say(animals):
    """The full gate (180 samples, 80 %) is gates.py; 45 samples have a standard error of 6 points."""
    assert judge_module.accuracy(judge_module.load_judge(), animals, COMMON_ANIMALS) >= 0.7


def test_the_judge_sees_nothing_in_noise_and_blanks():
    rng = np.random.default_rng(3)
    judge = judge_module.load_judge()
    assert judge_module.accuracy_none(judge, rng.integers(0, 256, (64, 64, 64, 3), dtype=np.uint8)) >= 0.95
    assert judge_module.accuracy_none(judge, np.broadcast_to(rng.integers(0, 256, (64, 1, 1, 3), dtype=np.uint8), (64, 64, 64, 3))) >= 0.95


def test_ground_colour_is_the_borders(animals):
    pictures = np.zeros((2, 64, 64, 3), np.uint8) + np.array(data.COLOURS["red"], np.uint8)
    pictures[:, 8:56, 8:56] = data.COLOURS["blue"]
    pictures[1, :, :28] = data.COLOURS["blue"]              # not half of the border: the mean would be purple, the median is red
    assert judge_module.ground_colour(pictures) == ["red", "red"]


def test_clip_ships_with_the_text_encoder_of_the_policy(zoo, policy):
    clip = CLIPModel.from_pretrained(zoo.parent / "clip", dtype=torch.float32)
    tokens = CLIPTokenizer.from_pretrained(zoo.parent / "clip")(["a cat"], padding="max_length", return_tensors="pt")
    assert torch.allclose(clip.text_model(tokens.input_ids).last_hidden_state, policy.embed(["a cat"]), atol=1e-6)


def test_every_prompt_of_the_paper_can_be_tokenized(policy):
    for prompt in [*COMMON_ANIMALS, *IMAGENET_ANIMALS, "a kangaroo riding a bike"]:
        assert 2 < len(policy.tokenizer(prompt).input_ids)
    assert len(policy.tokenizer("a kangaroo washing dishes").input_ids) <= policy.tokenizer.model_max_length


def test_the_papers_animals_and_its_counts_of_unseen_things():
    assert list(data.ANIMALS) == COMMON_ANIMALS
    assert (len(data.ANIMALS), len(data.OTHER_ANIMALS), len(data.OBJECTS), len(data.COLOURS)) == (45, 38, 50, 10)
    assert len(data.NAMES) == 133


def test_all_weights_fit_in_40_megabytes(zoo):
    files = [path for path in zoo.parent.glob("**/*.safetensors") if ".data" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 40e6
