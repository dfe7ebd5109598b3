"""rewards.py: JPEG sizes against files on disk, prompt sets against the paper's lists, prompt files good and bad."""
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rewards  # noqa: E402
from rewards import ACTIVITIES, PROMPT_SETS, REWARDS, compressibility, incompressibility, load_prompts, with_article  # noqa: E402

# Table D.6, typed in again.
ANIMALS = ("cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard beetle ant butterfly "
           "fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey fly llama camel bat gorilla "
           "hedgehog kangaroo").split()
IMAGENET = Path("/work/shared/imagenet_animals.txt")


def pictures():
    """Noise, a smooth ramp, flat grey. uint8 (3, 64, 64, 3)."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    ramp = np.broadcast_to((np.arange(64, dtype=np.uint8) * 4)[None, :, None], (64, 64, 3))
    return np.stack([noise, ramp, np.full((64, 64, 3), 128, np.uint8)])


def test_incompressibility_is_the_size_of_the_file_on_disk_at_quality_95_in_kilobytes(tmp_path):
    sizes = []
    for i, picture in enumerate(pictures()):
        Image.fromarray(picture).save(tmp_path / f"{i}.jpg", quality=95)
        sizes.append((tmp_path / f"{i}.jpg").stat().st_size / 1000)
    scores = incompressibility(pictures(), ["a"] * 3)
    assert scores.shape == (3,) and scores.tolist() == sizes
    Image.fromarray(pictures()[0]).save(tmp_path / "75.jpg", quality=75)
    assert scores[0] > (tmp_path / "75.jpg").stat().st_size / 1000 + 1


def test_compressibility_is_the_negative_of_incompressibility():
    assert (compressibility(pictures(), ["a"] * 3) == -incompressibility(pictures(), ["a"] * 3)).all()
    assert (compressibility(pictures(), ["a"] * 3) < 0).all()


def test_noise_is_less_compressible_than_a_ramp_and_a_ramp_than_a_flat_picture():
    noise, ramp, flat = incompressibility(pictures(), ["a"] * 3)
    assert noise > 3 * ramp and ramp > flat > 0


def test_rewards_depend_on_the_picture_only_and_leave_it_alone():
    images = pictures()
    assert (incompressibility(images, ["a", "b", "c"])[::-1] == incompressibility(images[::-1], ["x"] * 3)).all()
    assert (images == pictures()).all()


def test_rewards_are_found_by_the_names_of_the_command_line():
    assert REWARDS["compressibility"] is compressibility and REWARDS["incompressibility"] is incompressibility


def test_common_animals_are_the_45_of_the_paper():
    assert len(ANIMALS) == len(set(ANIMALS)) == 45
    assert load_prompts("common-animals") == ANIMALS


def test_imagenet_animals_are_the_first_398_classes():
    prompts = load_prompts("imagenet-animals")
    assert len(prompts) == len(set(prompts)) == 398
    assert prompts[0] == "tench, Tinca tinca" and prompts[1] == "goldfish, Carassius auratus" and prompts[207] == "golden retriever"
    assert prompts[-1] == "puffer, pufferfish, blowfish, globefish"
    assert all(p == " ".join(p.split()) and not p.endswith(",") and ";" not in p for p in prompts)


@pytest.mark.skipif(not IMAGENET.is_file(), reason=f"{IMAGENET} isn't here")
def test_imagenet_animals_equal_the_published_list_line_by_line():
    assert load_prompts("imagenet-animals") == IMAGENET.read_text().splitlines()


def test_activities_are_every_animal_doing_each_of_three_things():
    prompts = load_prompts("animal-activities")
    assert ACTIVITIES == ["washing dishes", "riding a bike", "playing chess"]
    assert len(prompts) == len(set(prompts)) == 135
    assert {"an ant washing dishes", "a dolphin riding a bike", "a kangaroo playing chess", "a cat washing dishes"} <= set(prompts)
    assert {p.split()[1] for p in prompts} == set(ANIMALS)
    assert [p for p in prompts if p.startswith("an ")] == [f"an ant {a}" for a in ACTIVITIES]        # the only vowel among the 45


def test_articles():
    assert [with_article(n) for n in ("cat", "ant", "Eskimo dog", "otter")] == ["a cat", "an ant", "an Eskimo dog", "an otter"]


def test_a_file_is_one_prompt_a_line_without_blank_lines_spaces_and_duplicates(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("  a cat\r\n\n \t\na dog, running \na cat\nein Bär; une fête\na dog, running".encode())
    assert load_prompts(str(file)) == ["a cat", "a dog, running", "ein Bär; une fête"]


@pytest.mark.parametrize("content, message", [
    (None, "neither a file that can be read nor one of common-animals, imagenet-animals, animal-activities"),
    (b"", "no prompt in it"), (b" \n\n\t\n", "no prompt in it"), (bytes(range(256)), "not a text file"),
    (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "not a text file"), ("a caf\xe9".encode("latin-1"), "UTF-8")],
    ids=["no such file", "empty", "blank", "binary", "png", "latin-1"])
def test_a_bad_prompt_file_is_refused_in_one_line_that_names_it(tmp_path, content, message):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_prompts(str(file))
    assert message in str(caught.value) and str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None        # no second traceback below it


def test_a_folder_is_not_a_prompt_file(tmp_path):
    with pytest.raises(ValueError, match="neither a file"):
        load_prompts(str(tmp_path))


def test_prompt_sets_have_the_names_of_the_command_line():
    assert list(PROMPT_SETS) == ["common-animals", "imagenet-animals", "animal-activities"]


def test_an_epochs_prompts_repeat_as_asked_and_differ_between_epochs():
    animals = rewards.load_prompts("common-animals")
    first, again, other = (rewards.draw_prompts(animals, 64, 8, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert len(set(first)) == 8 and all(first.count(prompt) == 8 for prompt in first)
    assert len(rewards.draw_prompts(["a", "b"], 12, 2, np.random.default_rng(0))) == 12        # more draws than prompts: with repetition


def test_evaluation_prompts_are_spread_over_the_whole_set():
    assert len(set(rewards.spread_prompts(rewards.COMMON_ANIMALS, 64))) == 45
    spread = rewards.spread_prompts(rewards.IMAGENET_ANIMALS, 64)
    assert len(set(spread)) == 64 and spread[0] == "tench, Tinca tinca" and spread[-1] in rewards.IMAGENET_ANIMALS[390:]


def test_prompt_files_of_other_systems_are_read_or_refused(tmp_path):
    (tmp_path / "bom.txt").write_bytes("\ufeffa cat\r\na dog\r\n".encode())
    assert rewards.load_prompts(str(tmp_path / "bom.txt")) == ["a cat", "a dog"]
    (tmp_path / "nul.txt").write_bytes(b"a cat\0")
    for name in (str(tmp_path / "nul.txt"), str(tmp_path), "x" * 300):
        with pytest.raises(ValueError, match="--prompts"):
            rewards.load_prompts(name)
    rewards.load_prompts("common-animals").clear()
    assert len(rewards.load_prompts("common-animals")) == 45
