"""rewards.py: JPEG sizes against files on disk, prompt sets against the paper's lists, prompt files good and bad."""
import importlib.util
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rewards  # noqa: E402
from rewards import ACTIVITIES, PROMPT_SETS, compressibility, incompressibility, load_prompts, with_article  # noqa: E402

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


# --- the aesthetic head: LAION's layout, and nothing else ---------------------------------------------------------------------------------

@pytest.fixture
def head(tmp_path):
    """A file in the layout of LAION's sac+logos+ava1-l14-linearMSE, random numbers in it."""
    sizes = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    weights = {f"layers.{i}.weight": torch.randn(shape) / shape[1] ** 0.5 for i, shape in sizes.items()}
    weights |= {f"layers.{i}.bias": torch.randn(shape[0]) for i, shape in sizes.items()}
    torch.save(weights, tmp_path / "aesthetic-model.pth")
    return tmp_path / "aesthetic-model.pth", weights


def test_the_head_is_five_affine_maps_in_a_row(head):
    path, weights = head
    x = torch.randn(6, 768, dtype=torch.float64)
    expected = x
    for i in (0, 2, 4, 6, 7):
        expected = torch.einsum("bd,od->bo", expected, weights[f"layers.{i}.weight"].double()) + weights[f"layers.{i}.bias"].double()
    for source in (path, path.parent):                      # the file itself, or the folder that holds it
        assert torch.allclose(rewards.load_head(str(source))(x.float()).double(), expected[:, 0], rtol=1e-5, atol=1e-5)


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


@pytest.mark.parametrize("content", ["malicious", "short", "other keys", "other shapes", "a list", "text"])
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
    with pytest.raises(ValueError, match="aesthetic-model.pth is not LAION's predictor") as caught:
        rewards.load_head(str(path))
    assert "\n" not in str(caught.value) and not target.exists()


def test_the_malicious_pickle_would_have_run_elsewhere(head, tmp_path):
    """So that the test above can fail."""
    path, weights = head
    torch.save({**weights, "evil": Evil(tmp_path / "executed")}, path)
    torch.load(path, weights_only=False)
    assert (tmp_path / "executed").exists()


def test_the_aesthetic_reward_is_the_head_on_clips_embedding_of_length_one(zoo):
    from transformers import CLIPModel
    settings = SimpleNamespace(clip=str(zoo.parent / "clip"), aesthetic_head=str(zoo.parent / "aesthetic"))
    images = np.random.default_rng(0).integers(0, 256, (70, 64, 64, 3), dtype=np.uint8)            # more than one batch
    clip = CLIPModel.from_pretrained(settings.clip, dtype=torch.float32)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        embeds = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
        expected = rewards.load_head(settings.aesthetic_head)(embeds / embeds.norm(dim=1, keepdim=True)).numpy()
    given = rewards.make_reward("aesthetic", settings, "cpu")(images, ["a cat"] * 70)
    assert given == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_diversity_is_the_mean_distance_of_pairs_that_share_a_prompt():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.6, 0.8])
    embeds = torch.stack([a, b, -a, b, a])
    assert rewards.diversity(embeds, ["x", "x", "y", "y", "z"]) == pytest.approx((0.4 + 1.6) / 2)
    assert rewards.diversity(embeds[:3], ["x", "x", "x"]) == pytest.approx((0.4 + 2.0 + 1.6) / 3)
    assert rewards.diversity(embeds[:2], ["x", "y"]) is None


# --- BERTScore against its authors' package ----------------------------------------------------------------------------------------------

CANDIDATES = ["a cat", "", "cat", "A dog runs fast over the lawn.", "  padded  ", "x", "a cat on a red background", "the the the", "unbelievable!",
              "hello, world!", "", "playing chess", "a dolphin riding a bike on the moon", "It is raining.", "one two three four five six seven eight nine",
              "ÅNGSTRÖM café", "no", "yes", "a picture of a monkey that washes dishes in the sink", "?", "red", "blue cat", "a", "the end"]
REFERENCES = ["a cat on a red background", "a cat", "", "The dog is running quickly across the grass.", "padded", "a cat", "a cat on a blue background",
              "the", "incredible", "world", "", "a cat playing chess", "a dolphin riding a bike", "The sun shines.", "nine eight seven", "angstrom cafe",
              "yes", "yes", "a monkey washing dishes", "a question", "blue", "cat blue", "an", "the beginning of the end, or so they say"]


@pytest.mark.parametrize("layer", [1, 5, 6])
def test_bert_score_equals_its_authors_package(minilm, layer, monkeypatch):
    import bert_score
    import transformers
    monkeypatch.setattr(transformers.BertTokenizer, "build_inputs_with_special_tokens",            # which transformers 5 has dropped
                        lambda self, ids: [self.cls_token_id, *ids, self.sep_token_id], raising=False)
    theirs = bert_score.score(CANDIDATES, REFERENCES, model_type=minilm, num_layers=layer, device="cpu", batch_size=5)
    ours = rewards.BertScore(minilm, layer, "cpu")(CANDIDATES, REFERENCES)
    for mine, its in zip(ours, theirs):
        assert mine == pytest.approx(its.numpy(), abs=1e-5)
    assert ours[1][1] == ours[1][2] == 0 and ours[1][6] > 0.8


def test_bert_score_by_hand():
    """Two tokens against one; a special token may be matched but doesn't count; what the mask hides doesn't even match."""
    e = torch.eye(4)
    x = torch.stack([e[0], e[1], e[2]])[None]
    y = torch.stack([0.6 * e[0] + 0.8 * e[3], e[2], e[1]])[None]
    weights, mask = torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[True, True, True]])
    P, R, F = rewards.bert_score(x, y, weights, weights, mask, mask)
    assert (P.item(), R.item()) == pytest.approx(((0.6 + 1) / 2, (0.6 + 1) / 2))
    P, R, F = rewards.bert_score(x, y, weights, weights, mask, mask & (weights > 0))
    assert (P.item(), R.item()) == pytest.approx((0.3, 0.8)) and F.item() == pytest.approx(2 * 0.24 / 1.1)


def test_a_layer_that_is_not_there_is_refused(minilm):
    with pytest.raises(ValueError, match="--bert-layer 7: .* has layers 1 to 6"):
        rewards.BertScore(minilm, 7, "cpu")


# --- a server that describes pictures, and its ways to fail ------------------------------------------------------------------------------

def wide(*widths):
    return [np.zeros((8, w, 3), np.uint8) for w in widths]


def test_a_server_is_asked_in_openais_words_and_answers_keep_their_order(server, monkeypatch):
    vlm = rewards.ChatServer(server.url + "/", "llava-hf/llava-1.5-7b-hf")
    assert vlm.model == "tiny-vlm"
    assert vlm(wide(*range(10, 50)), "what is it?") == [f"{w} pixels of JPEG" for w in range(10, 50)]
    assert 1 < server.most <= vlm.concurrency
    body = server.bodies[0]
    assert body["model"] == "tiny-vlm" and body["temperature"] == 0
    assert [part["type"] for part in body["messages"][0]["content"]] == ["image_url", "text"]
    assert body["messages"][0]["content"][1]["text"] == "what is it?"


@pytest.mark.parametrize("trouble", ["hang", 500, 429, "garbage", "nonsense", "die"])
def test_passing_trouble_is_survived(server, trouble, monkeypatch):
    monkeypatch.setattr(rewards.ChatServer, "timeout", 0.7 if trouble == "hang" else 10)
    vlm = rewards.ChatServer(server.url, "tiny-vlm")
    server.plan = [trouble] * 3
    assert vlm(wide(5, 6), "?") == ["5 pixels of JPEG", "6 pixels of JPEG"]


@pytest.mark.parametrize("trouble, words", [("hang", "timed out|TimeoutError"), (500, "HTTP 500"), ("garbage", "JSON"), ("nonsense", "IndexError"),
                                            ("die", "IncompleteRead|RemoteDisconnected|Connection|JSONDecodeError"), (404, "HTTP 404 .*so it goes")])
def test_lasting_trouble_ends_in_one_line(server, trouble, words, monkeypatch):
    monkeypatch.setattr(rewards.ChatServer, "timeout", 0.7 if trouble == "hang" else 10)
    vlm = rewards.ChatServer(server.url, "tiny-vlm")
    server.then = trouble
    with pytest.raises(ConnectionError, match=words) as caught:
        vlm(wide(*range(1, 101)), "?")
    assert server.url in str(caught.value) and "\n" not in str(caught.value)
    asked = [body["messages"][0]["content"][0]["image_url"]["url"] for body in server.bodies]
    assert len(set(asked)) < 70                             # the queue behind a failure is dropped
    assert trouble != 404 or len(asked) == len(set(asked))  # our own fault: not asked twice


def test_one_failure_wakes_those_who_wait_to_try_again(server, monkeypatch):
    vlm = rewards.ChatServer(server.url, "tiny-vlm")
    monkeypatch.setattr(rewards.ChatServer, "pause", 5.0)
    server.plan, server.then, begin = [500] * 8 + [404], 500, time.time()
    with pytest.raises(ConnectionError):
        vlm(wide(*range(1, 30)), "?")
    assert time.time() - begin < 4


def test_a_server_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(rewards.ChatServer, "pause", 0.01)
    with pytest.raises(ConnectionError, match="--vlm-url http://127.0.0.1:9/v1: no answer from models after 5 tries"):
        rewards.ChatServer("http://127.0.0.1:9/v1", "any")


@pytest.mark.parametrize("how", ["empty", "null"])
def test_an_empty_answer_is_scored_zero(server, minilm, how):
    settings = SimpleNamespace(bert=minilm, bert_layer=5, vlm_url=server.url, vlm="any", vlm_question="?")
    alignment = rewards.make_reward("alignment", settings, "cpu")
    server.plan = [how]
    scores, shown = alignment(wide(5), ["a cat"])
    assert scores.tolist() == [0] and shown == {"description": [""]}
    scores, shown = alignment(wide(5), ["5 pixels of JPEG"])
    assert scores == pytest.approx([1], abs=1e-5) and shown == {"description": ["5 pixels of JPEG"]}


# --- a reward of one's own ---------------------------------------------------------------------------------------------------------------

def test_a_function_in_a_file_is_a_reward(tmp_path):
    (tmp_path / "mine.py").write_text("def redness(images, prompts):\n    return images[..., 0].mean((1, 2))\n")
    reward = rewards.make_reward(f"{tmp_path}/mine.py:redness", None, "cpu")
    assert reward(pictures(), ["a"] * 3) == pytest.approx(pictures()[..., 0].mean((1, 2)))


@pytest.mark.parametrize("text, name, words", [
    (None, "mine.py:f", "neither one of compressibility"), ("def f(:", "mine.py:f", "SyntaxError"), ("x = 1", "mine.py:f", "has no attribute 'f'"),
    ("import nowhere_to_be_found", "mine.py:f", "nowhere_to_be_found"), ("x = 1", "mine.py:x", "not a function"), ("x = 1", "mine.py", "neither one of"),
    ("raise SystemExit", "mine.py:f", "SystemExit")])
def test_a_file_without_the_function_is_refused_by_name(tmp_path, text, name, words):
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        rewards.make_reward(f"{tmp_path}/{name}", None, "cpu")
    assert "--reward" in str(caught.value) and name in str(caught.value)
