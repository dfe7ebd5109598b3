"""rewards.py: JPEG sizes against files on disk, LAION's head by hand, BERTScore against the package
of its authors, servers that fail in five ways, and rewards of one's own, good and bad.
"""

import importlib.util
import os
import pickle
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import rewards
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
        given = rewards.load_head(str(source))(x.float()).double()
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
    said = refused(rewards.load_head, str(path))
    assert f"--aesthetic-head {path} is not LAION's predictor" in said
    assert not target.exists()


def test_the_malicious_pickle_would_have_run_elsewhere(head, tmp_path):
    """So that the test above can fail."""
    path, weights = head
    torch.save({**weights, "evil": Evil(tmp_path / "executed")}, path)
    torch.load(path, weights_only=False)
    assert (tmp_path / "executed").exists()


def test_a_folder_without_a_head_is_refused(tmp_path):
    said = refused(rewards.load_head, str(tmp_path))
    assert said.startswith(f"--aesthetic-head {tmp_path}: holds neither model.safetensors")


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
    head = rewards.load_head(settings.aesthetic_head)
    with torch.no_grad():
        embeds = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
        expected = head(embeds / embeds.norm(dim=1, keepdim=True)).numpy()
    given = rewards.make_reward("aesthetic", settings, "cpu")(images, ["a cat"] * 70)
    assert given == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_a_head_for_another_clip_is_refused(zoo, head):
    path, _ = head
    settings = SimpleNamespace(clip=str(zoo.parent / "clip"), aesthetic_head=str(path))
    said = refused(rewards.make_reward, "aesthetic", settings, "cpu")
    assert f"--aesthetic-head {path} wants embeddings of 768 numbers" in said
    assert f"--clip {zoo.parent / 'clip'} gives " in said


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
    assert "--vlm-question '<image> what is it?': leave <image> out" in said


def test_the_zoos_llava_describes_each_picture_by_itself(zoo):
    """More pictures than one batch, in their order."""
    vlm = rewards.Llava(str(zoo.parent / "llava"), "cpu")
    vlm.batch = 2
    grounds = [(255, 0, 0), (0, 0, 255), (255, 0, 0), (0, 128, 0), (0, 0, 255)]
    images = np.stack([np.full((64, 64, 3), colour, np.uint8) for colour in grounds])
    answers = vlm(images, "what is in this picture?")
    assert len(answers) == 5 and all(answers)
    assert answers[0] == answers[2] != answers[1] == answers[4] != answers[3]
    assert "red" in answers[0] and "blue" in answers[1] and "green" in answers[3]


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
    monkeypatch.setattr(rewards.ChatServer, "served", lambda self: [])
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
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import OfflineModeIsEnabled

    assert os.environ["HF_HUB_OFFLINE"] == "1" and constants.is_offline_mode()
    assert rewards.ChatServer(server.url, "any")(wide(5), "?") == ["5 pixels of JPEG"]
    with pytest.raises(OfflineModeIsEnabled):  # from any other
        get_session().get("http://127.0.0.1:9/")


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
        ("die", "RemoteProtocolError"),
        (404, "HTTP 404.*so it goes"),
        (401, "HTTP 401.*so it goes"),
    ],
)
def test_lasting_trouble_ends_in_one_line(server, trouble, words, monkeypatch):
    monkeypatch.setattr(rewards.ChatServer, "timeout", 0.7 if trouble == "hang" else 10)
    vlm = rewards.ChatServer(server.url, "tiny-vlm")
    server.then = trouble
    with pytest.raises(UserError, match=words) as caught:
        vlm(wide(*range(1, 101)), "?")
    said = str(caught.value)
    assert f"--vlm-url {server.url}" in said and "\n" not in said
    asked = [body["messages"][0]["content"][0]["image_url"]["url"] for body in server.bodies]
    assert len(set(asked)) < 70  # the queue behind a failure is dropped
    final = trouble in (404, 401)
    assert ("in 1 of 5 tries" if final else "in 5 of 5 tries") in said
    assert not final or len(asked) == len(set(asked))  # our own fault: not asked twice


def test_a_request_is_tried_again_after_growing_pauses(server, monkeypatch):
    vlm = rewards.ChatServer(server.url, "tiny-vlm")
    monkeypatch.setattr(rewards.ChatServer, "pause", 0.2)
    server.plan = [500] * 3
    begin = time.time()
    vlm(wide(5), "?")
    assert 1.4 <= time.time() - begin < 2.5  # 0.2 + 0.4 + 0.8


def test_one_failure_wakes_those_who_wait_to_try_again(server, monkeypatch):
    vlm = rewards.ChatServer(server.url, "tiny-vlm")
    monkeypatch.setattr(rewards.ChatServer, "pause", 5.0)
    server.plan = [500] * 8 + [404]
    server.then = 500
    begin = time.time()
    said = refused(vlm, wide(*range(1, 30)), "?")
    assert time.time() - begin < 4
    assert "HTTP 404" in said  # what ended it, not what it ended


def test_after_a_failure_the_server_may_be_asked_again(server):
    vlm = rewards.ChatServer(server.url, "tiny-vlm")
    server.plan = [404]
    refused(vlm, wide(5), "?")
    assert vlm(wide(6), "?") == ["6 pixels of JPEG"]


def test_a_server_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(rewards.ChatServer, "pause", 0.01)
    said = refused(rewards.ChatServer, "http://127.0.0.1:9/v1", "any")
    assert said.startswith("--vlm-url http://127.0.0.1:9/v1: no answer from models in 5 of 5 tries")


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
        ("x = 1", "mine.py:x", "not a function"),
        ("def f(:", "mine.py:f", "SyntaxError: invalid syntax (mine.py, line 1)"),
        ("\nimport nowhere", "mine.py:f", "'nowhere' (line 2 of mine.py)"),
        ("\n\nint('x')", "mine.py:f", "ValueError: invalid literal for int()"),
        ("raise SystemExit", "mine.py:f", "SystemExit: (line 1 of mine.py)"),
        ("def f():\n    1 / 0\nf()", "mine.py:f", "division by zero (line 2 of mine.py)"),
    ],
)
def test_a_file_without_the_function_is_refused_by_name(written, tmp_path, text, name, words):
    if text is not None:
        written("mine.py", text)
    said = refused(rewards.make_reward, f"{tmp_path}/{name}", None, "cpu")
    assert words in said and f"--reward {tmp_path}/{name}" in said
    said = refused(rewards.load_object, f"{tmp_path}/nothing.py:f", "--algorithm")
    assert said.startswith(f"--algorithm {tmp_path}/nothing.py:f: there is no such file")


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
    refused(own, path)
    os.utime(written("mine.py", "f = max"), (1e9, 1e9))  # an age of its own, for the compiled file
    assert own(path) is max


@pytest.mark.parametrize("name", ["json", "tabnanny", "rewards", "train", "torch", "mine", "a.b-c"])
def test_a_files_name_takes_no_other_modules_place(written, tmp_path, name):
    """tabnanny: of Python's own, and not imported so far."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine.py").write_text("def f(images, prompts): return 'elsewhere'")
    assert own(tmp_path / "elsewhere" / "mine.py")(None, None) == "elsewhere"
    before = dict(sys.modules)
    there = importlib.util.find_spec(name) if "." not in name else None
    text = "import json\ndef f(images, prompts): return json.dumps([__name__ in sys.modules])"
    reward = own(written(f"{name}.py", "import sys\n" + text))
    assert reward(None, None) == "[true]"  # the real json, and a module of its own
    assert {key: sys.modules[key] for key in before} == before
    assert not there or importlib.util.find_spec(name).origin == there.origin
    assert own(tmp_path / f"{name}.py") is reward


def test_a_drive_letter_is_part_of_the_file(written, tmp_path, monkeypatch):
    written("C:\\mine.py", "f = len")  # a file of this name, where this isn't Windows
    monkeypatch.chdir(tmp_path)
    assert own("C:\\mine.py") is len


# What a reward gives back


def test_checked_scores_are_float64_and_come_with_what_is_shown():
    shown = {"why": ["x", "y", "z"]}
    scores, given = rewards.checked(lambda images, prompts: ([1, 2.5, 3], shown), pictures(), "abc")
    assert scores.dtype == np.float64 and scores.tolist() == [1, 2.5, 3] and given == shown
    scores, given = rewards.checked(incompressibility, pictures(), ["a"] * 3)
    assert given == {} and (scores == incompressibility(pictures(), ["a"] * 3)).all()


def test_scores_that_are_not_one_finite_number_a_picture_are_refused():
    def short(images, prompts):
        return [1.0, 2.0]

    def infinite(images, prompts):
        return [1.0, 2.0, float("inf")]

    for reward in (short, infinite):
        said = refused(rewards.checked, reward, pictures(), ["a"] * 3)
        assert f"the reward {reward.__name__} must give one finite number for each of 3" in said
