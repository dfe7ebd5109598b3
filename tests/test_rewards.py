"""rewards.py: JPEG sizes against files on disk, LAION's head by hand, BERTScore against the package
of its authors, servers that fail in five ways, and rewards of one's own, good and bad.
"""

import fractions
import functools
import json
import os
import pickle
import sys
import time
import types
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import rewards
from helpers import HEARD
from rewards import compressibility, incompressibility
from scheduler import UserError


def pictures():
    """Noise, a smooth ramp, flat grey. uint8 (3, 64, 64, 3)."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    ramp = np.broadcast_to((np.arange(64, dtype=np.uint8) * 4)[None, :, None], (64, 64, 3))
    return np.stack([noise, ramp, np.full((64, 64, 3), 128, np.uint8)])


def refused(call, *arguments):
    """What UserError says when `call` is refused: one line, and no second traceback above it."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# JPEG


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
    scores = compressibility(pictures(), ["a"] * 3)
    assert (scores == -incompressibility(pictures(), ["a"] * 3)).all() and (scores < 0).all()


def test_noise_is_less_compressible_than_a_ramp_and_a_ramp_than_a_flat_picture():
    noise, ramp, flat = incompressibility(pictures(), ["a"] * 3)
    assert noise > 3 * ramp and ramp > flat > 0


def test_jpeg_rewards_depend_on_the_picture_only_and_leave_it_alone():
    images = pictures()
    forward = incompressibility(images, ["a", "b", "c"])
    assert (forward[::-1] == incompressibility(images[::-1], ["x"] * 3)).all()
    assert (images == pictures()).all()


# The aesthetic head: LAION's layout, and nothing else


@pytest.fixture
def head(tmp_path):
    """A file in the layout of LAION's sac+logos+ava1-l14-linearMSE, random numbers in it."""
    sizes = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    weights = {}
    for i, shape in sizes.items():
        weights[f"layers.{i}.weight"] = torch.randn(shape) / shape[1] ** 0.5
        weights[f"layers.{i}.bias"] = torch.randn(shape[0])
    torch.save(weights, tmp_path / "aesthetic-model.pth")
    return tmp_path / "aesthetic-model.pth", weights


def test_the_head_is_five_affine_maps_in_a_row(head):
    path, weights = head
    x = torch.randn(6, 768, dtype=torch.float64)
    expected = x
    for i in (0, 2, 4, 6, 7):
        weight = weights[f"layers.{i}.weight"].double()
        bias = weights[f"layers.{i}.bias"].double()
        expected = torch.einsum("bd,od->bo", expected, weight) + bias
    for source in (path, path.parent):  # the file itself, or the folder that holds it
        given = rewards.load_head(str(source), 768)(x.float()).double()
        assert torch.allclose(given, expected[:, 0], rtol=1e-5, atol=1e-5)


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


@pytest.mark.parametrize(
    "content", ["malicious", "short", "other keys", "other shapes", "a list", "text"]
)
def test_a_head_that_is_something_else_is_refused_in_one_line_and_not_run(head, tmp_path, content):
    path, weights = head
    target = tmp_path / "executed"
    if content == "malicious":
        torch.save({**weights, "evil": Evil(target)}, path)
    elif content == "short":
        path.write_bytes(path.read_bytes()[:5000])
    elif content == "other keys":
        torch.save({**weights, "layers.8.weight": torch.zeros(1)}, path)
    elif content == "other shapes":
        torch.save({**weights, "layers.4.weight": torch.zeros(65, 128)}, path)
    elif content == "a list":
        torch.save([1, 2], path)
    else:
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
    said = refused(rewards.load_head, str(path), 768)
    assert f"--aesthetic-head {path} is not LAION's predictor" in said
    assert not target.exists()


def test_the_malicious_pickle_would_have_run_elsewhere(head, tmp_path):
    """So that the test above can fail."""
    path, weights = head
    torch.save({**weights, "evil": Evil(tmp_path / "executed")}, path)
    torch.load(path, weights_only=False)
    assert (tmp_path / "executed").exists()


def test_a_folder_without_a_head_is_refused(tmp_path):
    said = refused(rewards.load_head, str(tmp_path), 768)
    assert said.startswith(f"--aesthetic-head {tmp_path}/aesthetic-model.pth is not LAION's")


def aesthetic_settings(zoo):
    return SimpleNamespace(
        clip=str(zoo.parent / "clip"), aesthetic_head=str(zoo.parent / "aesthetic")
    )


def test_the_aesthetic_reward_is_the_head_on_clips_embedding_of_length_one(zoo):
    from transformers import CLIPModel

    settings = aesthetic_settings(zoo)
    # more than one batch
    images = np.random.default_rng(0).integers(0, 256, (70, 64, 64, 3), dtype=np.uint8)
    clip = CLIPModel.from_pretrained(settings.clip, dtype=torch.float32)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    head = rewards.load_head(settings.aesthetic_head, 128)
    with torch.no_grad():
        embeds = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
        expected = head(embeds / embeds.norm(dim=1, keepdim=True)).numpy()
    given = rewards.make_reward("aesthetic", settings, "cpu")(images, ["a cat"] * 70)
    assert given == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_a_head_for_another_clip_is_refused(zoo, head):
    path, _ = head
    settings = SimpleNamespace(clip=str(zoo.parent / "clip"), aesthetic_head=str(path))
    said = refused(rewards.make_reward, "aesthetic", settings, "cpu")
    assert f"--aesthetic-head {path} is not LAION's predictor" in said
    assert "on embeddings of 128 numbers: " in said


def test_the_aesthetic_score_is_its_models_applied_in_turn():
    """Its models are arguments: any two functions do."""
    double = rewards.aesthetic("pictures", None, clip=lambda x: torch.ones(2), head=lambda e: 2 * e)
    assert double.tolist() == [2, 2]


def test_diversity_is_the_mean_distance_of_pairs_that_share_a_prompt():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.6, 0.8])
    embeds = torch.stack([a, b, -a, b, a])
    given = rewards.diversity(embeds, ["x", "x", "y", "y", "z"])
    assert given == pytest.approx((0.4 + 1.6) / 2)
    assert rewards.diversity(embeds[:3].numpy(), ["x"] * 3) == pytest.approx((0.4 + 2.0 + 1.6) / 3)
    assert rewards.diversity(embeds[:2], ["x", "y"]) is None


# BERTScore against its authors' package

PAIRS = [
    ("a cat", "a cat on a red background"),
    ("", "a cat"),
    ("cat", ""),
    ("A dog runs fast over the lawn.", "The dog is running quickly across the grass."),
    ("  padded  ", "padded"),
    ("x", "a cat"),
    ("a cat on a red background", "a cat on a blue background"),
    ("the the the", "the"),
    ("unbelievable!", "incredible"),
    ("hello, world!", "world"),
    ("", ""),
    ("playing chess", "a cat playing chess"),
    ("a dolphin riding a bike on the moon", "a dolphin riding a bike"),
    ("It is raining.", "The sun shines."),
    ("one two three four five six seven eight nine", "nine eight seven"),
    ("ÅNGSTRÖM café", "angstrom cafe"),
    ("no", "yes"),
    ("yes", "yes"),
    ("a picture of a monkey that washes dishes in the sink", "a monkey washing dishes"),
    ("?", "a question"),
    ("red", "blue"),
    ("blue cat", "cat blue"),
    ("a", "an"),
    ("the end", "the beginning of the end, or so they say"),
]


@pytest.mark.parametrize("layer", [1, 5, 6])
def test_bert_score_equals_its_authors_package(minilm, layer, monkeypatch):
    import bert_score
    import transformers

    def with_special_tokens(self, ids):  # which transformers 5 has dropped
        return [self.cls_token_id, *ids, self.sep_token_id]

    name = "build_inputs_with_special_tokens"
    monkeypatch.setattr(transformers.BertTokenizer, name, with_special_tokens, raising=False)
    candidates, references = map(list, zip(*PAIRS))
    theirs = bert_score.score(
        candidates, references, model_type=minilm, num_layers=layer, device="cpu", batch_size=5
    )
    ours = rewards.BertScore(minilm, layer, "cpu")(candidates, references)
    for mine, its in zip(ours, theirs):
        assert mine == pytest.approx(its.numpy(), abs=1e-5)
    assert ours[1][1] == ours[1][2] == 0 and ours[1][6] > 0.8


def test_bert_scores_do_not_depend_on_their_neighbours(minilm):
    """More sentences than one batch, of all lengths."""
    score = rewards.BertScore(minilm, 5, "cpu")
    candidates, references = map(list, zip(*PAIRS * 3))
    together = score(candidates, references)
    assert together.shape == (3, len(PAIRS) * 3)
    for i in (0, 3, 18, 70):
        alone = score(candidates[i : i + 1], references[i : i + 1])
        assert alone[:, 0] == pytest.approx(together[:, i], abs=1e-5)


def test_sentences_are_stripped_as_its_authors_do(minilm):
    """A byte-pair tokenizer, as DeBERTa's, would make another token of "  cat"."""
    score, seen = rewards.BertScore(minilm, 5, "cpu"), []
    tokenizer = score.tokenizer

    def spy(texts, **options):
        seen.extend(texts)
        return tokenizer(texts, **options)

    spy.model_max_length = tokenizer.model_max_length
    score.tokenizer = spy
    score(["  a cat\n"], ["\tcat "])
    assert seen == ["a cat", "cat"]


def test_bert_score_by_hand():
    """Two tokens against two; a special token may be matched, but doesn't count; what the mask
    hides isn't even matched."""
    e = torch.eye(4)
    x = torch.stack([e[0], e[1], e[2]])[None]
    y = torch.stack([0.6 * e[0] + 0.8 * e[3], e[2], e[1]])[None]
    weights, mask = torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[True, True, True]])
    P, R, F = rewards.bert_score((x, weights, mask), (y, weights, mask))
    assert (P.item(), R.item()) == pytest.approx(((0.6 + 1) / 2, (0.6 + 1) / 2))
    P, R, F = rewards.bert_score((x, weights, mask), (y, weights, mask & (weights > 0)))
    assert (P.item(), R.item()) == pytest.approx((0.3, 0.8))
    assert F.item() == pytest.approx(2 * 0.24 / 1.1)


@pytest.mark.parametrize("layer", [0, 7, -1])
def test_a_layer_that_is_not_there_is_refused(minilm, layer):
    said = refused(rewards.BertScore, minilm, layer, "cpu")
    assert said == f"--bert-layer {layer}: {minilm} has layers 1 to 6"


# Alignment: its models are arguments


def test_alignment_is_the_recall_of_the_prompt_in_the_description(minilm):
    def describe(images, question):
        return [f"{question} {image}" for image in images]

    score = rewards.BertScore(minilm, 5, "cpu")
    prompts = ["a cat", "a dog on the moon"]
    given, shown = rewards.alignment(["a cat", "a dog"], prompts, describe, score, "this:")
    assert shown == {"description": ["this: a cat", "this: a dog"]}
    _, recall, _ = score(["this: a cat", "this: a dog"], prompts)
    assert given.tolist() == recall.tolist() and given[0] > given[1]


def test_a_question_with_a_placeholder_for_the_picture_is_refused():
    settings = SimpleNamespace(vlm_question="<image> what is it?")
    said = refused(rewards.make_reward, "alignment", settings, "cpu")
    assert "--vlm-question: leave <image> out" in said


def test_the_zoos_llava_describes_each_picture_by_itself(zoo, monkeypatch):
    """More pictures than one batch, in their order."""
    vlm = rewards.Llava(str(zoo.parent / "llava"), "cpu", batch=2)
    grounds = [(255, 0, 0), (0, 0, 255), (255, 0, 0), (0, 128, 0), (0, 0, 255)]
    images = np.stack([np.full((64, 64, 3), colour, np.uint8) for colour in grounds])
    answers = vlm(images, "what is in this picture?")
    assert len(answers) == 5 and all(answers)
    assert answers[0] == answers[2] != answers[1] == answers[4] != answers[3]
    assert "red" in answers[0] and "blue" in answers[1] and "green" in answers[3]
    monkeypatch.setattr(vlm.processor, "batch_decode", lambda new, **_: [" a cat\n"] * len(new))
    assert vlm(images, "what is in this picture?") == ["a cat"] * 5


# A server that describes pictures, and its ways to fail


def wide(*widths):
    return [np.zeros((8, width, 3), np.uint8) for width in widths]


def test_a_server_is_asked_in_openais_words_and_answers_keep_their_order(server):
    vlm = rewards.ChatServer(server.url + "/", "llava-hf/llava-1.5-7b-hf")
    assert vlm.model == "tiny-vlm"
    answers = vlm(wide(*range(10, 50)), "what is it?")
    assert answers == [f"{width} pixels of JPEG" for width in range(10, 50)]
    assert 1 < server.most <= vlm.concurrency
    body = server.bodies[0]
    assert body["model"] == "tiny-vlm"
    assert body["temperature"] == 0 and body["max_tokens"] == 64
    picture, question = body["messages"][0]["content"]
    assert picture["type"] == "image_url"
    assert question == {"type": "text", "text": "what is it?"}


def test_a_model_that_the_server_lists_is_asked_for_by_name(server, monkeypatch):
    for name, asked in (("tiny-vlm", "tiny-vlm"), ("another", "tiny-vlm")):
        assert rewards.ChatServer(server.url, name).model == asked
    monkeypatch.setattr(rewards.ChatServer, "ask", lambda *_: [])
    assert rewards.ChatServer(server.url, "another").model == "another"


@pytest.mark.parametrize("key, sent", [(None, "none"), ("", "none"), (" \n", "none"), (" k ", "k")])
def test_the_hubs_token_is_sent_to_no_server(server, monkeypatch, tmp_path, key, sent):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_secret")
    monkeypatch.delenv("VLM_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("VLM_API_KEY", key)
    rewards.ChatServer(server.url, "any")(wide(5), "?")
    assert len(server.headers) == 2  # of a GET and a POST
    for headers in server.headers:
        assert f"authorization: Bearer {sent}\n" in headers.replace(
            "Authorization", "authorization"
        )
        assert "hf_secret" not in headers


def test_hf_hub_offline_keeps_no_one_from_their_own_server(server):
    from huggingface_hub import constants

    assert os.environ["HF_HUB_OFFLINE"] == "1" and constants.is_offline_mode()
    assert rewards.ChatServer(server.url, "any")(wide(5), "?") == ["5 pixels of JPEG"]


@pytest.mark.parametrize("trouble", ["hang", 500, 429, 408, "garbage", "nonsense", "die"])
def test_passing_trouble_is_survived(server, trouble, monkeypatch):
    monkeypatch.setattr(rewards.ChatServer, "timeout", 0.7 if trouble == "hang" else 10)
    vlm = rewards.ChatServer(server.url, "tiny-vlm")
    server.plan = [trouble] * 3
    assert vlm(wide(5, 6), "?") == ["5 pixels of JPEG", "6 pixels of JPEG"]


@pytest.mark.parametrize(
    "trouble, words",
    [
        ("hang", "timed out"),
        (500, "HTTP 500.*so it goes"),
        ("garbage", "JSON"),
        ("nonsense", "IndexError"),
        ("die", "IncompleteRead"),
        (404, "HTTP 404.*so it goes"),
        (401, "HTTP 401.*so it goes"),
    ],
)
def test_lasting_trouble_ends_in_one_line(server, trouble, words, monkeypatch):
    monkeypatch.setattr(rewards.ChatServer, "timeout", 0.7 if trouble == "hang" else 10)
    vlm = rewards.ChatServer(server.url, "tiny-vlm")
    server.then = trouble
    with pytest.raises(UserError, match=words) as caught:
        vlm(wide(*range(1, 401)), "?")
    said = str(caught.value)
    assert f"--vlm-url {server.url}" in said and "\n" not in said
    asked = [body["messages"][0]["content"][0]["image_url"]["url"] for body in server.bodies]
    assert len(set(asked)) < 280  # the queue behind a failure is dropped
    assert "5 tries of chat/completions failed" in said


def test_a_request_is_tried_again_after_growing_pauses(server, monkeypatch):
    vlm = rewards.ChatServer(server.url, "tiny-vlm")
    monkeypatch.setattr(rewards.ChatServer, "pause", 0.2)
    server.plan = [500] * 3
    begin = time.time()
    vlm(wide(5), "?")
    assert 1.4 <= time.time() - begin < 2.5  # 0.2 + 0.4 + 0.8


def test_after_a_failure_the_server_may_be_asked_again(server):
    vlm = rewards.ChatServer(server.url, "tiny-vlm")
    server.plan = [404] * 5
    refused(vlm, wide(5), "?")
    assert vlm(wide(6), "?") == ["6 pixels of JPEG"]


def test_a_server_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(rewards.ChatServer, "pause", 0.01)
    said = refused(rewards.ChatServer, "http://127.0.0.1:9/v1", "any")
    assert said.startswith("--vlm-url http://127.0.0.1:9/v1: 5 tries of models failed: ")


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://localhost", "", "http://a:b/v1"])
def test_an_address_that_is_none_is_refused(url, monkeypatch):
    monkeypatch.setattr(rewards.ChatServer, "pause", 0.01)
    assert f"--vlm-url {url}: " in refused(rewards.ChatServer, url, "any")


@pytest.mark.parametrize("how", ["empty", "null"])
def test_an_empty_answer_is_scored_zero(server, minilm, how):
    settings = SimpleNamespace(
        bert=minilm, bert_layer=5, vlm_url=server.url, vlm="any", vlm_question="?"
    )
    alignment = rewards.make_reward("alignment", settings, "cpu")
    server.plan = [how]
    scores, shown = alignment(wide(5), ["a cat"])
    assert scores.tolist() == [0] and shown == {"description": [""]}
    scores, shown = alignment(wide(5), ["5 pixels of JPEG"])
    assert scores == pytest.approx([1], abs=1e-5)
    assert shown == {"description": ["5 pixels of JPEG"]}


@pytest.mark.parametrize("how", ["empty", "null"])
def test_a_server_that_says_nothing_of_any_picture_is_named_once(server, how):
    vlm = rewards.ChatServer(server.url, "any")
    server.plan = [how]
    with warnings.catch_warnings(record=True, action="default") as said:
        assert sorted(vlm(wide(5, 6), "?"))[0] == ""  # one of two
        assert said == []
        server.then = how
        for count in (2, 2, 3):
            assert vlm(wide(5, 6, 7)[:count], "?") == [""] * count
        assert vlm([], "?") == []
    (warning,) = [str(one.message) for one in said]
    assert f"--vlm-url {server.url}: tiny-vlm says nothing about any picture" in warning


def test_a_batch_of_no_pictures_is_no_silence(server):
    vlm = rewards.ChatServer(server.url, "any")
    with warnings.catch_warnings(action="error"):
        assert vlm([], "?") == []


# A reward of one's own


@pytest.fixture
def written(tmp_path, monkeypatch):
    """written(name, text, ...): files in a folder of their own -> the first one's path."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)

    def write(name, text, **others):
        for stem, more in others.items():
            (tmp_path / f"{stem}.py").write_text(more)
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    yield write
    for name in set(sys.modules) - before:  # so that each test may have a helper.py
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


def own(path, name="f"):
    return rewards.make_reward(f"{path}:{name}", None, "cpu")


THREE = {
    "def f(images, prompts, metadata): return len(metadata)": True,
    "def f(images, prompts, known, /, more=0): return len(known)": True,
    "class F:\n    def __call__(self, images, prompts, data): return len(data)\nf = F()": True,
    "def f(images, prompts, threshold=2): return threshold": False,
    "def f(images, prompts, *more, **others): return 2 + len(more) + len(others)": False,
    "def f(images, prompts, *, judge=2): return judge": False,
    "from operator import countOf as f": False,
}


@pytest.mark.parametrize("text, three", THREE.items(), ids=range(len(THREE)))
def test_a_third_parameter_without_a_default_gets_a_dict_for_each_prompt(written, text, three):
    """The number of pictures, 3, where it does."""
    given = rewards.make_reward(f"{written('mine.py', text)}:f", None, "cpu", metadata={"a": {}})
    if "countOf" in text:
        assert given(["a", "a", "b"], "a") == 2
    else:
        assert given(pictures(), ["a"] * 3) == (3 if three else 2)


def test_a_function_in_a_file_is_a_reward(written):
    text = "def redness(images, prompts):\n    return images[..., 0].mean((1, 2))\n"
    reward = own(written("mine.py", text), "redness")
    assert reward(pictures(), ["a"] * 3) == pytest.approx(pictures()[..., 0].mean((1, 2)))


@pytest.mark.parametrize(
    "text, name, words",
    [
        (None, "mine.py:f", "there is no such file"),
        (None, "mine:f", "neither compressibility, incompressibility, aesthetic, alignment"),
        ("x = 1", "mine.py", "neither compressibility, incompressibility, aesthetic, alignment"),
        ("x = 1", "mine.py:", "mine.py defines no ''"),
        ("x = 1", "mine.py:f", "mine.py defines no 'f'"),
        ("x = 1", "mine.py:x", "1 is not a callable object"),
        ("x = max", "mine.py:x", "mine.py:x: no signature found for builtin"),
    ],
)
def test_a_file_without_the_function_is_refused_by_name(written, tmp_path, text, name, words):
    if text is not None:
        written("mine.py", text)
    said = refused(rewards.make_reward, f"{tmp_path}/{name}", None, "cpu")
    assert words in said and f"--reward {tmp_path}/{name}" in said
    said = refused(rewards.load_object, f"{tmp_path}/nothing.py:f", "--algorithm", ())
    assert said.startswith(f"--algorithm {tmp_path}/nothing.py:f: there is no such file")


@pytest.mark.parametrize("text", ["def f(:", "import nowhere", "int('x')", "raise SystemExit"])
def test_an_error_of_the_file_itself_stays_what_it_is_and_where_it_is(written, text):
    with pytest.raises((SyntaxError, ImportError, ValueError, SystemExit)) as caught:
        own(written("mine.py", text))
    HEARD.append(f"{caught.type.__name__}: {caught.value}")
    assert not isinstance(caught.value, UserError)
    assert isinstance(caught.value, SyntaxError) or "mine.py" in str(caught.traceback[-1].path)


def test_a_file_imports_what_lies_beside_it_when_it_is_imported_and_later(written):
    text = "from helper import one\ndef f(images, prompts):\n    import later\n    return later.two"
    reward = own(written("mine.py", text + " + one", helper="one = 1", later="two = 2"))
    assert reward(pictures(), ["a"] * 3) == 3


def test_a_file_may_hold_dataclasses_under_postponed_annotations(written):
    text = """
from __future__ import annotations
from dataclasses import dataclass, field

@dataclass
class Weights:
    red: float = 2.0
    seen: list = field(default_factory=list)

def f(images, prompts):
    return Weights().red * images[..., 0].mean((1, 2))
"""
    reward = own(written("mine.py", text))
    assert reward(pictures(), ["a"] * 3) == pytest.approx(2 * pictures()[..., 0].mean((1, 2)))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_file_may_score_in_processes_of_its_own(written, method):
    text = f"""
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

def size(i):
    return float(i)

def f(images, prompts):
    with ProcessPoolExecutor(1, mp_context=get_context({method!r})) as pool:
        return list(pool.map(size, range(len(images))))
"""
    reward = own(written("pooled.py", text))
    assert rewards.checked(reward, pictures(), ["a"] * 3)[0].tolist() == [0, 1, 2]
    assert pickle.loads(pickle.dumps(reward)) is reward


def test_a_file_is_run_once_however_often_it_is_mentioned(written, tmp_path, monkeypatch):
    log = tmp_path / "log"
    text = f"with open({str(log)!r}, 'a') as log:\n    log.write('run')\nf = g = len"
    path = written("mine.py", text, other="from mine import f")
    assert own(path) is own(path, "g")
    monkeypatch.chdir(tmp_path)
    assert own("mine.py") is own("./mine.py") is own(tmp_path / "other.py")
    assert log.read_text() == "run"


def test_a_file_that_failed_is_tried_again_when_it_is_mended(written):
    path = written("mine.py", "f = len\nraise ValueError")
    with pytest.raises(ValueError):
        own(path)
    os.utime(written("mine.py", "f = sum"), (1e9, 1e9))  # an age of its own, for the compiled file
    assert own(path) is sum


@pytest.mark.parametrize("name", ["json", "tabnanny", "rewards", "train", "mine", "specless"])
def test_a_file_that_is_named_like_another_module_is_refused(written, tmp_path, monkeypatch, name):
    """tabnanny: of Python's own, and not imported so far. specless: made by hand."""
    monkeypatch.setitem(sys.modules, "specless", types.ModuleType("specless"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine.py").write_text("def f(images, prompts): return 'elsewhere'")
    assert own(tmp_path / "elsewhere" / "mine.py")(None, None) == "elsewhere"
    before = dict(sys.modules)
    path = written(f"{name}.py", "raise ValueError")
    assert f"--reward {path}:f: rename it, {name} is another module's name" in refused(own, path)
    assert {key: sys.modules[key] for key in before} == before
    assert getattr(sys.modules[name], "__file__", None) != path


def test_a_files_name_may_hold_a_dash(written):
    assert own(written("my-reward.py", "f = len")) is len


def test_a_drive_letter_is_part_of_the_file(written, tmp_path, monkeypatch):
    written("C:\\mine.py", "f = len")  # a file of this name, where this isn't Windows
    monkeypatch.chdir(tmp_path)
    assert own("C:\\mine.py") is len


# What a reward gives back


def giving(given):
    def reward(images, prompts):
        return given() if callable(given) else given

    return reward


def scored(given, count=3):
    return rewards.checked(giving(given), pictures()[:count], ["a"] * count)


THREE = [0.5, -1.0, 2.0]
GOOD = {
    "list": THREE,
    "tuple": tuple(THREE),
    "generator": lambda: (score for score in THREE),
    "dict's values": dict(enumerate(THREE)).values(),
    "float64": np.array(THREE),
    "float32": np.float32(THREE),
    "float16": np.float16(THREE),
    "longdouble": np.longdouble(THREE),
    "objects": np.array(THREE, dtype=object),
    "numpy scalars": [np.float32(0.5), np.float16(-1), np.int8(2)],
    "0-d arrays": [np.array(score) for score in THREE],
    "fractions": [fractions.Fraction(1, 2), -1, 2],
    "tensor": torch.tensor(THREE),
    "bfloat16": torch.tensor(THREE, dtype=torch.bfloat16),
    "float8": torch.tensor(THREE).to(torch.float8_e5m2),
    "gradient": torch.tensor(THREE, requires_grad=True),
    "0-d tensors": [torch.tensor(score) for score in THREE],
    "parameters": [torch.nn.Parameter(torch.tensor(score)) for score in THREE],
    "tensor's generator": lambda: (torch.tensor(score).bfloat16() for score in THREE),
    "tuple of arrays": (np.float32(0.5), torch.tensor(-1.0), 2),
    "with an empty show": (torch.tensor(THREE), {}),
}


@pytest.mark.parametrize("given", GOOD.values(), ids=GOOD)
def test_scores_of_every_kind_become_float64(given):
    scores, shown = scored(given)
    assert isinstance(scores, np.ndarray) and scores.dtype == np.float64
    assert scores.tolist() == THREE and shown == {}


@pytest.mark.parametrize(
    "given",
    [np.array([1, 0, 2], np.uint8), torch.tensor([1, 0, 2]), [True, False, 2], range(1, -2, -1)],
    ids=["uint8", "int64", "bool and int", "range"],
)
def test_whole_numbers_are_numbers(given):
    assert scored(given)[0].tolist() == [1, 0, given[2]]


def test_the_values_of_a_tensor_do_not_change():
    values = torch.randn(3).tolist()
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        tensor = torch.tensor(values, dtype=dtype)
        assert scored(tensor)[0].tolist() == tensor.double().tolist()
    assert scored([2**53 + 1, 0, 0])[0][0] == 2**53


def test_two_scores_in_a_tuple_are_scores():
    assert scored((0.5, 0.25), count=2)[0].tolist() == [0.5, 0.25]
    with pytest.raises(UserError):
        scored((0.5, None), count=2)


class Odd:
    def __repr__(self):
        return "an\nodd thing" * 100


BAD = {
    "None": None,
    "a number": 0.5,
    "a 0-d tensor": torch.tensor(0.5),
    "a text": "abc",
    "bytes": b"abc",
    "a dict": {0: 0.5, 1: 1.0, 2: 2.0},
    "a set": {0.5, 1.0, 2.0},
    "too few": [0.5, 1.0],
    "too many": [0.5] * 4,
    "none": [],
    "a column": torch.zeros(3, 1),
    "columns in a list": [torch.zeros(1)] * 3,
    "rows": np.zeros((3, 2)),
    "lists": [[0.5], [1.0], [2.0]],
    "NaN": [0.5, float("nan"), 1.0],
    "infinity": torch.tensor([0.5, 1.0, -float("inf")]),
    "too large": [0.5, 1.0, 10**400],
    "complex": np.array([1j, 0, 0]),
    "a complex tensor": torch.zeros(3, dtype=torch.complex64),
    "texts": ["0.5", "1", "2"],
    "an array of texts": np.array(["0.5", "1", "2"]),
    "dates": np.array(["2020-01-01"] * 3, dtype="datetime64[D]"),
    "records": np.zeros(3, dtype=[("score", float)]),
    "masked": np.ma.array([0.5, 1.0, 2.0], mask=[0, 1, 0]),
    "objects": [Odd(), Odd(), Odd()],
    "Nones": [None] * 3,
    "a class": lambda: Odd,
    "scores for a text": (THREE, "abc"),
    "scores for a list": (THREE, [1, 2, 3]),
    "scores for nothing": (THREE, None),
    "three things": (THREE, {}, {}),
    "in an array of objects": np.array([0.5, None, "x"], dtype=object),
}


@pytest.mark.parametrize("given", BAD.values(), ids=BAD)
@pytest.mark.filterwarnings("error")
def test_what_is_no_score_is_refused_in_one_line_that_names_the_reward(given):
    said = refused(scored, given)
    assert "the reward reward must give one finite number for each of 3 pictures; it gave" in said
    assert len(said) < 400


def test_what_a_generator_gave_is_shown_and_not_the_generator():
    said = refused(scored, (float("nan") for _ in range(3)))
    assert said.endswith("it gave [nan, nan, nan]")


def test_extras_of_every_kind_become_lists():
    shown = {
        "list": ["x", "y", "z"],
        "tuple": ("x", None, 2),
        "generator": (c for c in "xyz"),
        "tensor": torch.tensor(THREE, requires_grad=True),
        "bfloat16": torch.tensor(THREE).bfloat16(),
        "tensors": [torch.tensor(score) for score in THREE],
        "texts": np.array(["x", "y", "z"]),
        "vectors": torch.eye(3),
    }
    scores, given = scored((THREE, shown))
    assert scores.tolist() == THREE and list(given) == list(shown)
    assert given["list"] == given["generator"] == given["texts"] == ["x", "y", "z"]
    assert given["tuple"] == ["x", None, 2]
    assert given["tensor"] == given["bfloat16"] == given["tensors"] == THREE
    assert given["vectors"] == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    json.dumps(given)


@pytest.mark.parametrize(
    "extra",
    [0.5, None, "abc", torch.tensor(1), {0: 1, 1: 1, 2: 1}, ["x", "y"], [], {1, 2, 3}],
    ids=str,
)
def test_an_extra_that_is_not_one_thing_a_picture_is_refused(extra):
    said = refused(scored, (THREE, {"good": THREE, "odd": extra}))
    assert "the reward reward must show one thing for each of 3 pictures" in said
    assert "'odd'" in said and "'good'" not in said


def test_a_reward_is_named_whatever_it_is():
    class Reward:
        def __call__(self, images, prompts):
            return None

    for reward in (Reward(), functools.partial(Reward())):
        said = refused(rewards.checked, reward, pictures(), "abc")
        assert "Reward" in said.partition(" must give one finite number ")[0]


def test_an_error_inside_a_reward_stays_what_it_is_and_where_it_is(written):
    """Not a UserError, of which only one line is printed: the user must see their own line."""
    kinds = [
        "NotImplementedError",
        "ValueError",
        "TypeError",
        "RuntimeError",
        "OSError",
        "KeyError",
    ]
    text = "".join(f"def {kind}_(i, p):\n    raise {kind}('mine')\n" for kind in kinds)
    text += "def lazy(i, p):\n    yield 0.5\n    yield [][0]\n"
    path = written("mine.py", text)
    for name in [*kinds, "lazy"]:
        with pytest.raises(Exception) as caught:
            rewards.checked(own(path, name if name == "lazy" else f"{name}_"), pictures(), "abc")
        assert caught.type.__name__ == (name if name != "lazy" else "IndexError")
        assert not isinstance(caught.value, UserError)
        assert str(caught.traceback[-1].path) == path


# What a reward does


def test_a_reward_that_edits_what_it_is_given_edits_its_own_copy():
    images, prompts = pictures(), ["a", "b", "c"]

    def vandal(images, prompts):
        torch.from_numpy(images)[:] = 0
        images[:] = 255
        prompts[0] = "x"
        prompts.clear()
        return [1, 2, 3]

    with warnings.catch_warnings(action="error"):
        scores, _ = rewards.checked(vandal, images, prompts)
    assert scores.tolist() == [1, 2, 3]  # three, though the list is empty now
    assert (images == pictures()).all() and prompts == ["a", "b", "c"]


def switches():
    """What a reward could flip for the whole process, as text."""
    return {
        "gradients": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "device": str(torch.get_default_device()),
        "threads": torch.get_num_threads(),
        "matmul": torch.get_float32_matmul_precision(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "numpy": np.geterr(),
        "folder": os.getcwd(),
    }


FLIP = """
import os
import numpy as np
import torch

def flip():
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.backends.cuda.matmul.allow_tf32 = True
    np.seterr(all="raise")
    os.chdir("/")
"""


@pytest.fixture
def flipped_back():
    """Whatever a test flips, for the tests after it."""
    before = switches()
    yield
    torch.set_default_device(None)
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(before["threads"])
    torch.set_float32_matmul_precision("highest")
    np.seterr(**before["numpy"])
    os.chdir(before["folder"])


def test_the_flips_flip_every_switch(flipped_back):
    """So that the test below can fail."""
    before, module = switches(), {}
    exec(FLIP, module)
    module["flip"]()
    torch_device = torch.get_default_device()
    torch.set_default_device(None)
    after = {**switches(), "device": str(torch_device)}
    assert [name for name in before if after[name] == before[name]] == []


@pytest.mark.parametrize("where", ["import", "call", "failing call", "failing import", "generator"])
def test_switches_that_a_reward_flips_are_flipped_back(written, where, flipped_back):
    before = switches()
    text = {
        "import": "flip()\ndef f(i, p):\n    return [1, 2, 3]",
        "call": "def f(i, p):\n    flip()\n    return [1, 2, 3]",
        "failing call": "def f(i, p):\n    flip()\n    raise KeyError",
        "failing import": "flip()\n[][0]",
        "generator": "def f(i, p):\n    flip()\n    yield from [1, 2, 3]",
    }[where]
    path = written("flip.py", FLIP + text)
    try:
        rewards.checked(own(path), pictures(), ["a"] * 3)
        assert not where.startswith("failing")
    except LookupError:
        assert where.startswith("failing")
    after = switches()
    assert [name for name in before if after[name] != before[name]] == []
    assert torch.utils._device.CURRENT_DEVICE is None  # no mode that makes every call slower


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_is_flipped_back_as_train_py_has_it(allowed, flipped_back):
    """Samples drawn in float32 and trained on in TF32 have ratios that leave the clip range."""
    matmul = torch.backends.cuda.matmul

    def reward(images, prompts):
        matmul.allow_tf32 = not allowed
        return [1, 2, 3]

    torch.set_float32_matmul_precision("high" if allowed else "highest")
    rewards.checked(reward, pictures(), "abc")
    assert matmul.allow_tf32 == allowed


def test_a_reward_that_seeds_itself_repeats_itself():
    def seeded(images, prompts):
        torch.manual_seed(3)
        return torch.rand(3)

    expected = torch.rand(3, generator=torch.Generator().manual_seed(3)).double().tolist()
    for _ in range(2):
        assert rewards.checked(seeded, pictures(), "abc")[0].tolist() == expected
