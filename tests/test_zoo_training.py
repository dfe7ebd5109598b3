"""What the zoo's networks learn from: the decoder's critic, the judge's half-formed animals; and
the eye's verdict on the judge.
"""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import blind
import data
import ddpo
import judge as judge_module
import train_judge
import train_unet
import train_vae
import train_word
from scheduler import add_noise


def gradients(net, loss):
    """d loss / d parameter of a network, zeros where there is none."""
    grads = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(net.parameters(), grads)]


def test_decoder_and_critic_learn_from_their_own_part_of_the_loss(policy, monkeypatch):
    """The decoder's gradient is that of its difference and of the critic's opinion, frozen."""
    torch.manual_seed(0)
    vae = train_vae.freeze_encoder(copy.deepcopy(policy.vae))
    critic = train_vae.Critic(8)
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    z = vae.encode(x).detach()
    monkeypatch.setattr(train_vae, "with_errors", lambda vae, x: z)
    pair = nn.ModuleDict({"vae": vae, "critic": critic})
    loss = train_vae.sharper_loss(lambda rng: x, 0.02, pair, None)
    y = vae.decode(z)
    for_decoder = train_vae.difference(y, x) - 0.02 * critic(y).mean()
    real, fake = critic(x), critic(y.detach())
    for_critic = (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()
    assert loss.item() == pytest.approx((for_decoder + for_critic).item(), rel=1e-6)
    for net, part in ((vae.decoder, for_decoder), (critic, for_critic)):
        for ours, expected in zip(gradients(net, loss), gradients(net, part)):
            assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-7)
    assert all(not g.any() for g in gradients(vae.decoder, for_critic))


def test_what_the_policy_sees_in_noise_is_its_own_prediction(policy):
    """Eq. 1 solved for x_0; with the true noise in the network's place it is x_0 itself."""
    torch.manual_seed(1)
    z = torch.randn(3, 4, 8, 8)
    true = {}

    class Known(nn.Module):
        config = policy.unet.config

        def forward(self, x_t, timesteps, context):
            alpha_bar = policy.sampler.schedule.alphas_bar[timesteps].reshape(-1, 1, 1, 1)
            true["x_t"] = x_t
            return (x_t - alpha_bar.sqrt() * z) / (1 - alpha_bar).sqrt()

    knowing = copy.copy(policy)
    knowing.unet = Known()
    seen = train_judge.seen_in_noise(knowing, z, ["cat", "dog", "ant"], np.array([10, 500, 900]))
    assert torch.allclose(seen, z, atol=2e-3)
    noise = torch.randn(3, 4, 8, 8)
    assert not torch.allclose(true["x_t"], add_noise(z, noise, torch.full((3,), 0.5)))


def test_a_whole_thing_may_be_the_policys_own_sample(policy, monkeypatch):
    """As Policy.sample draws it from the same noise; a mixture is asked for both."""
    animals, T = ["cat", "fox"], policy.sampler.T
    names = [(0, i) for i in range(2)]
    noise = torch.stack([ddpo.named_noise((4, 8, 8), T + 1, *name) for name in names])
    [(_, expected)] = policy.sample(animals, names, 2)
    monkeypatch.setattr(torch, "randn", lambda *_: noise)
    chosen = SimpleNamespace(integers=lambda n: n - 1)  # the last kind
    z = train_judge.whole_latents(chosen, policy, torch.zeros(2, 4, 8, 8), animals)
    assert np.array_equal(policy.decode(z), expected)
    latents, others = torch.zeros(2, 2, 4, 8, 8), [animals, ["ant", "fox"]]
    mixed = train_judge.half_formed_latents(chosen, policy, latents, others)
    assert torch.equal(mixed[1], z[1]) and not torch.allclose(mixed[0], z[0], atol=0.1)


def test_half_formed_things_are_nothing_and_whole_ones_keep_their_names(
    policy, art, tmp_path, monkeypatch
):
    """And each kind of half-formed thing is drawn."""
    monkeypatch.setattr(train_judge, "load", lambda cls, folder: getattr(policy, folder.name))
    monkeypatch.setattr(train_judge.train_unet, "load_policy", lambda *_: copy.copy(policy))
    kinds, asked, two_each = [], [], train_judge.two_each

    def of_words(rng, art, n, device, words):
        asked.append(words)
        return two_each(rng, art, n, device, words)

    monkeypatch.setattr(train_judge, "two_each", of_words)
    for name in ("whole_latents", "half_formed_latents"):
        real = getattr(train_judge, name)

        def watched(rng, policy, z, names, real=real, name=name):
            kinds.append((name, names))
            return real(rng, policy, z, names)

        monkeypatch.setattr(train_judge, name, watched)
    (tmp_path / ".data").mkdir()
    pixels, labels = train_judge.drawn_by_networks(tmp_path, art, torch.device("cpu"), 16)
    assert pixels.shape == (16, 64, 64, 3) and pixels.dtype == np.uint8
    assert [name for name, _ in kinds] == ["whole_latents", "half_formed_latents"] * 2
    assert labels[4:8].tolist() == labels[12:].tolist() == [train_judge.NOTHING] * 4
    assert [data.NAMES[i] for i in labels[:4]] == kinds[0][1]
    assert asked == [data.ANIMALS, data.NAMES, data.NAMES, data.NAMES]
    again, _ = train_judge.drawn_by_networks(tmp_path, None, torch.device("cpu"), 16)
    assert np.array_equal(again, pixels)  # from the file


def test_nothing_that_can_still_be_seen_counts_as_half_formed(policy, monkeypatch):
    """In the noise of t < 900 a person sees a sheep, a cat, a fish; whole is what t < 400 hides."""
    times = []

    def integers(low, high=None, size=None):
        return (2 if low == 4 else 1) if high is None else np.array([low, high])

    monkeypatch.setattr(train_judge, "seen_in_noise", lambda *arguments: times.append(arguments[3]))
    rng, z = SimpleNamespace(integers=integers), torch.zeros(2, 2, 4, 8, 8)
    train_judge.half_formed_latents(rng, policy, z, [["cat"] * 2] * 2)
    train_judge.whole_latents(rng, policy, z[0], ["cat"] * 2)
    assert np.array_equal(times, [[900, 990], [50, 400]])


def test_a_word_taught_anew_moves_its_own_row_alone(zoo):
    """The shipped text encoder is CLIP's, but for what the word snake means."""
    ours = load_file(zoo / "text_encoder" / "model.safetensors")
    clips = load_file(zoo.parent / "clip" / "model.safetensors")
    moved = {key for key, tensor in ours.items() if not torch.equal(tensor, clips[key])}
    assert moved == {train_word.TABLE}
    rows = (ours[train_word.TABLE] != clips[train_word.TABLE]).any(1).nonzero().flatten()
    vocabulary = json.loads((zoo / "tokenizer" / "vocab.json").read_text())
    assert rows.tolist() == [vocabulary["snake</w>"]]


def test_a_word_learns_from_the_other_vendors_pictures_and_their_own_captions(
    policy, tmp_path, monkeypatch
):
    """Each row of a batch has its own picture's latents and caption."""
    asked = []

    def example(rng, art, name, vendor):
        asked.append((name, vendor))
        picture = SimpleNamespace(pixels=np.full((64, 64, 3), len(asked), np.uint8))
        return picture, f"caption {len(asked)}"

    monkeypatch.setattr(data, "load_art", lambda zoo: None)
    monkeypatch.setattr(data, "policy_example", example)
    latents, captions = train_word.examples(policy, tmp_path, 5)
    assert set(asked) == {("snake", "twitter")} and captions == [
        f"caption {i}" for i in range(1, 6)
    ]
    pixels = torch.stack([torch.full((3, 64, 64), i / 127.5 - 1) for i in range(1, 6)])
    assert torch.allclose(latents, policy.vae.encode(pixels), atol=1e-5)
    seen = {}
    monkeypatch.setattr(
        train_unet, "denoising_loss", lambda *arguments: seen.update(x=arguments[2], e=arguments[4])
    )
    word = SimpleNamespace(encode=lambda policy, captions: captions)
    rng = np.random.default_rng(0)
    train_word.make_loss(policy, latents, captions, 8)(word, rng)
    places = [int(caption.split()[1]) - 1 for caption in seen["e"]]
    assert torch.equal(seen["x"], latents[places]) and len(set(places)) > 1


def test_the_denoising_loss_has_min_snr_weights():
    """By hand, of a network that predicts no noise: the mean of min(SNR, 5) / SNR |noise|^2."""
    x_0, alphas_bar = torch.zeros(2, 4, 8, 8), torch.tensor([0.5, 0.99])  # SNR 1 and 99
    torch.manual_seed(0)
    each = (torch.randn(x_0.shape) ** 2).mean((1, 2, 3))
    torch.manual_seed(0)
    loss = train_unet.denoising_loss(
        lambda x, t, embeds: torch.zeros_like(x), alphas_bar, x_0, torch.tensor([0, 1]), None
    )
    assert loss.item() == pytest.approx((each[0] + 5 / 99 * each[1]).item() / 2, rel=1e-5)


def test_a_words_gradient_is_that_of_its_row(policy):
    """Against finite differences of the encoder with the row written into its table."""
    torch.manual_seed(0)
    learner, captions = copy.copy(policy), ["a snake", "a fox", "a snake on a red background"]
    learner.text_encoder = copy.deepcopy(policy.text_encoder).requires_grad_(False)
    word, push = train_word.Word(learner, "snake"), torch.randn(3, 16, 128)

    def value(row):
        changed = copy.copy(learner)
        changed.text_encoder = copy.deepcopy(learner.text_encoder)
        changed.text_encoder.get_input_embeddings().weight[word.token] = row
        changed.__post_init__()  # it remembers no prompts
        return (changed.embed(captions) * push).double().sum().item()

    assert torch.equal(word.encode(learner, captions), policy.embed(captions))  # as it begins
    word.embed.data += 0.1 * torch.randn(128)
    encoded, row = word.encode(learner, captions), word.embed.detach()
    assert (encoded * push).double().sum().item() == pytest.approx(value(row), abs=1e-3)
    (gradient,) = torch.autograd.grad((encoded * push).sum(), word.embed)
    for _ in range(3):
        direction = torch.randn(128)
        slope = (value(row + 1e-3 * direction) - value(row - 1e-3 * direction)) / 2e-3
        assert slope == pytest.approx((gradient @ direction).item(), rel=1e-2, abs=0.1)
    assert torch.equal(encoded[1], policy.embed(["a fox"])[0])  # no other prompt moves


@pytest.mark.parametrize(
    "words, verdict",
    [
        (["cat", "cat", "dog"], "cat"),
        (["cat", "none", "none"], "none"),
        (["cat", "dog", "ant"], "none"),
        (["cat"], "cat"),
        (["cat", "dog"], "none"),
    ],
)
def test_the_eye_is_the_majority(words, verdict):
    assert blind.majority([{7: word} for word in words], 7) == verdict


def test_a_picture_that_no_reader_names_is_none():
    assert blind.majority([{1: "cat"}, {1: "cat"}, {}], 2) == "none"


def test_the_figures_count_what_they_say():
    """Two samples, a weak animal, four further pictures of which the eye rejects three."""
    kinds = ["sample", "sample", "weak", "other", "other", "malformed", "malformed"]
    asked = ["cat", "dog", "ant", "fox", "pig", "bee", "cow"]
    eye = ["cat", "fox", "ant", "fox", "rat", "none", "goat"]
    judged = ["cat", "dog", "bee", "none", "pig", "bat", "cow"]
    with np.errstate(invalid="ignore"), pytest.warns(RuntimeWarning, match="empty slice"):
        found = blind.figures(kinds, asked, eye, judged)
    assert found["eye names samples"] == 0.5 and found["judge names samples"] == 1
    assert found["eye names ant"] == 1 and np.isnan(found["eye names whale"])
    assert found["judge rejects what the eye rejects"] == pytest.approx(1 / 3, abs=1e-4)
    assert found["judge agrees on the rest"] == 0
    assert found["share that the eye rejects"] == 0.75


def test_the_score_is_that_of_the_majority_and_of_these_weights(tmp_path, monkeypatch):
    kinds, animals = ["sample", "weak", "other"], data.ANIMALS[:3]
    (tmp_path / "key").mkdir()
    (tmp_path / "key" / "key.json").write_text(json.dumps({"kinds": kinds, "asked": animals}))
    np.save(tmp_path / "key" / "images.npy", np.zeros((3, 64, 64, 3), np.uint8))
    for i, third in enumerate(["none", animals[2], animals[2]]):
        lines = [f"{n} {word}" for n, word in enumerate([*animals[:2], third])]
        (tmp_path / f"reader{i}.txt").write_text("\n".join([*lines, ""]))
    seen = {}
    monkeypatch.setattr(judge_module, "load_judge", lambda zoo: None)
    monkeypatch.setattr(judge_module, "name", lambda *_: [judge_module.NONE, "tree", animals[2]])
    monkeypatch.setattr(blind, "figures", lambda *lists: seen.update(lists=lists) or {})
    blind.score(tmp_path, [tmp_path / f"reader{i}.txt" for i in range(3)], tmp_path)
    assert seen["lists"] == (kinds, animals, animals, ["none", "none", animals[2]])
    found = json.loads((tmp_path / "blind.json").read_text())
    assert found["each reader agrees with the majority"] == [0.6667, 1, 1]
    assert found["weights"] == blind.fingerprint(tmp_path) != blind.fingerprint()
    assert Image.open(tmp_path / "blind.jpg").size == (15 * 72, 86)
