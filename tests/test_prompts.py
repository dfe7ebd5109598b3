"""Prompts: the named sets against the paper's lists, files good and bad, how prompts are drawn."""

from pathlib import Path

import numpy as np
import pytest

from train import draw_prompts, load_prompts, spread_prompts

FOLDER = Path(__file__).parents[1] / "tutorial" / "prompts"
SETS = ["animal-activities", "common-animals", "imagenet-animals"]
PUBLISHED = Path("/work/shared/imagenet_animals.txt")

# App. D.6, row by row, typed in again.
ANIMALS = """
    cat dog horse monkey rabbit zebra spider bird sheep
    deer cow goat lion tiger bear raccoon fox wolf
    lizard beetle ant butterfly fish shark whale dolphin squirrel
    mouse rat snake turtle frog chicken duck goose bee
    pig turkey fly llama camel bat gorilla hedgehog kangaroo
""".split()


def test_common_animals_are_the_45_of_the_paper():
    assert len(ANIMALS) == len(set(ANIMALS)) == 45
    assert list(load_prompts("common-animals")) == ANIMALS


def test_imagenet_animals_are_the_first_398_classes():
    prompts = list(load_prompts("imagenet-animals"))
    assert len(prompts) == len(set(prompts)) == 398
    assert prompts[:2] == ["tench, Tinca tinca", "goldfish, Carassius auratus"]
    assert prompts[207] == "golden retriever"
    assert prompts[-1] == "puffer, pufferfish, blowfish, globefish"
    for prompt in prompts:
        assert prompt == " ".join(prompt.split())
        assert not prompt.endswith(",") and ";" not in prompt


@pytest.mark.skipif(not PUBLISHED.is_file(), reason=f"{PUBLISHED} isn't here")
def test_imagenet_animals_equal_the_published_list_line_by_line():
    assert list(load_prompts("imagenet-animals")) == PUBLISHED.read_text().splitlines()


def test_activities_are_every_animal_doing_each_of_three_things():
    expected = []
    for animal in ANIMALS:
        article = "an" if animal == "ant" else "a"  # the only vowel among the 45
        for activity in ("washing dishes", "riding a bike", "playing chess"):
            expected.append(f"{article} {animal} {activity}")
    assert list(load_prompts("animal-activities")) == expected
    assert len(expected) == len(set(expected)) == 135


def test_the_named_sets_are_text_files_that_a_student_can_open():
    assert sorted(path.stem for path in FOLDER.glob("*.txt")) == SETS
    for name in SETS:
        text = (FOLDER / f"{name}.txt").read_bytes().decode("ascii")
        assert text == "".join(prompt + "\n" for prompt in load_prompts(name))


def test_what_a_caller_does_to_a_set_does_not_change_it():
    load_prompts("common-animals").clear()
    assert len(load_prompts("common-animals")) == 45


def test_a_file_is_one_prompt_a_line_without_blank_lines_spaces_and_duplicates(tmp_path):
    path = tmp_path / "prompts.txt"
    text = "  a cat\r\n\n \t\na dog, running \na cat\nein Bär; une fête\na dog, running"
    path.write_bytes(text.encode())
    assert list(load_prompts(str(path))) == ["a cat", "a dog, running", "ein Bär; une fête"]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, f"neither a file that can be read nor one of {', '.join(SETS)}"),
        (b"", "no prompt in it"),
        (b" \n\n\t\n", "no prompt in it"),
        (bytes(range(256)), "not a text file"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "not a text file"),
        ("a caf\xe9".encode("latin-1"), "UTF-8"),
        (b"a cat\0", "not a text file"),
    ],
    ids=["no such file", "empty", "blank", "binary", "png", "latin-1", "nul"],
)
def test_a_bad_prompt_file_is_refused_in_one_line_that_names_it(tmp_path, content, message):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_prompts(str(path))
    said = str(caught.value)
    assert message in said and f"--prompts {path}" in said and "\n" not in said
    # no second traceback below it
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize("name", ["a folder", "x" * 300, ""])
def test_what_is_no_file_is_refused(tmp_path, name):
    path = str(tmp_path) if name == "a folder" else name
    with pytest.raises(ValueError, match="--prompts .*neither a file"):
        load_prompts(path)


def test_prompt_files_of_other_systems_are_read(tmp_path):
    (tmp_path / "bom.txt").write_bytes("\ufeffa cat\r\na dog\r\n".encode())
    assert list(load_prompts(str(tmp_path / "bom.txt"))) == ["a cat", "a dog"]


def test_a_file_is_cut_at_newlines_only(tmp_path):
    odd = "a cat\u2028on\u2029a\x0cred\x0bback\x1cground\x85here"
    (tmp_path / "odd.txt").write_bytes(f"{odd}\na dog\ra cow\r\n".encode())
    assert list(load_prompts(str(tmp_path / "odd.txt"))) == [odd, "a dog", "a cow"]


def test_a_line_of_a_jsonl_file_is_a_prompt_and_whatever_else_it_says(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": " two cats ", "count": 2, "tags": ["a"]}\n\n{"prompt": "ein B\\u00e4r"}\n'
        '{"prompt": "ein B\\u00e4r"}\n'
    )
    entries = [{"prompt": "two cats", "count": 2, "tags": ["a"]}, {"prompt": "ein Bär"}]
    assert list(load_prompts(str(path)).values()) == entries


@pytest.mark.parametrize(
    "line",
    [
        "a cat",
        '{"prompt": "a cat"',
        "3",
        "null",
        '["prompt"]',
        "{}",
        '{"prompt": 3}',
        '{"prompt": " "}',
        '{"prompt": "\\ud800"}',
        "[" * 9999,
        '{"prompt": "a dog", "count": 3}',
    ],
)
def test_a_bad_line_of_a_jsonl_file_is_named(line, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "a dog"}}\n{line}\n')
    with pytest.raises(ValueError) as caught:
        load_prompts(str(path))
    said = str(caught.value)
    needed = f'--prompts {path}: needed is {{"prompt": "a cat", ...}}, not {line[:80]}: '
    assert said.startswith(needed) and "\n" not in said


def test_an_epochs_prompts_repeat_as_asked_and_differ_between_epochs():
    first, again, other = (
        draw_prompts(ANIMALS, 64, 8, np.random.default_rng(seed)) for seed in (0, 0, 1)
    )
    assert first == again != other
    assert len(set(first)) == 8
    assert all(first.count(prompt) == 8 for prompt in first)


def test_more_prompts_than_there_are_come_with_repetition():
    drawn = draw_prompts(["a", "b"], 12, 2, np.random.default_rng(0))
    assert len(drawn) == 12 and set(drawn) == {"a", "b"}


def test_the_papers_prompts_are_drawn_independently_and_uniformly():
    drawn = draw_prompts(ANIMALS, 45_000, 1, np.random.default_rng(0))
    counts = [drawn.count(animal) for animal in ANIMALS]
    assert sum(counts) == 45_000
    assert 850 < min(counts) < 990 and 1010 < max(counts) < 1150  # 1000 each, sd 31
    assert len(set(draw_prompts(ANIMALS, 45, 1, np.random.default_rng(0)))) < 40


def test_evaluation_prompts_are_spread_over_the_whole_set():
    assert len(set(spread_prompts(ANIMALS, 64))) == 45
    imagenet = list(load_prompts("imagenet-animals"))
    spread = spread_prompts(imagenet, 64)
    assert len(set(spread)) == 64
    assert spread[0] == imagenet[0] and spread[-1] in imagenet[390:]
    assert spread == sorted(spread, key=imagenet.index)
