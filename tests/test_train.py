"""train.py from outside: run folders, resume, refusals, plug-ins.

Most runs are of a Stable Diffusion that is too small to draw anything, and take half a second; one
is of the zoo.
"""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import tempfile
import traceback
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

import ddpo
import train
import unet
from helpers import HEARD
from rewards import compressibility, make_reward
from scheduler import UserError, named_noise

FOLDER = tempfile.TemporaryDirectory()  # goes with the process
# Two epochs of two updates. Three prompts come again and again: their statistics matter.
TINY = """
    --reward compressibility --metrics= --device cpu --epochs 2 --samples-per-epoch 4
    --samples-per-prompt 2 --batch-size 2 --steps 3 --eval-samples 4 --eval-every 1
    --checkpoint-every 1 --micro-batch 4 --sample-batch 4 --min-count 2 --warmup 0
""".split()
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
CURVE = train.draw_curve  # the tests of this file go without it, but where they ask for it


@cache
def small_model():
    """The zoo's words and schedule, networks without training or size -> folder."""
    levels = ["DownBlock2D", "UpBlock2D"]
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 128,
        "attention_head_dim": 2,
        "down_block_types": ["CrossAttnDownBlock2D", levels[0]],
        "up_block_types": [levels[1], "CrossAttnUpBlock2D"],
    }
    vae_config = {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": [8, 8, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "scaling_factor": 1.0,
    }
    folder = Path(FOLDER.name) / "small"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = unet.VAE(vae_config)
        vae.decoder.conv_out.weight.data.mul_(3)  # pictures of many colours, 32 x 32
        unet.save(unet.UNet(config), folder / "unet")
        unet.save(vae, folder / "vae")
    for part in ("text_encoder", "tokenizer", "scheduler"):
        shutil.copytree(train.ZOO / part, folder / part)
    zoo = train.ZOO.parent
    own = {"lr": 4e-4, "clip_range": 6.4e-3, "guidance": 4, "bert_layer": 2}
    models = {"clip": "clip", "aesthetic_head": "aesthetic", "vlm": "llava", "bert": "bert"}
    own.update({name: str(zoo / part) for name, part in models.items()})
    (folder / "ddpo.json").write_text(json.dumps({"all": own}))
    (folder / "three.txt").write_text("a cat\na bee\na lion\n")
    return folder


def tiny(*options):
    """The command line of a tiny run of the small model; the last option of a kind wins."""
    prompts = str(small_model() / "three.txt")
    return ["--model", str(small_model()), "--prompts", prompts, *TINY, *options]


def run(folder, *options):
    """A tiny run into a folder -> the folder."""
    train.main(tiny("--out", str(folder), *options))
    return folder


def resume(folder, *options):
    """Go on with a run."""
    train.main(["--out", str(folder), "--resume", *options])


def refusal(call, *arguments):
    """The one line in which it ends."""
    with pytest.raises(SystemExit) as end:
        call(*arguments)
    line = str(end.value)
    assert line.startswith("train.py: ") and "\n" not in line
    HEARD.append(line)
    return line


def resolve(given, folder):
    """The settings as train.py works them out, without loading anything."""
    config = train.merge(given, folder)
    train.check(config, given)
    return config


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_seconds(lines):
    return [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines]


def weights(folder, epoch):
    return load_file(folder / "checkpoints" / f"{epoch:06d}" / WEIGHTS)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def moved(folder):
    """Do the first two checkpoints differ?"""
    return not equal(weights(folder, 1), weights(folder, 2))


def sampled(folder, epoch):
    """The record of an evaluation."""
    return json.loads((folder / "samples" / f"epoch_{epoch:04d}.json").read_text())


def pictures(folder, epoch):
    return np.asarray(Image.open(folder / "samples" / f"epoch_{epoch:04d}.png"))


def settings_of(folder):
    return json.loads((folder / "config.json").read_text())


def no_curve(out, config):
    """In place of draw_curve, which takes most of so small a run's time."""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(train, "draw_curve", no_curve)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def zoo_run(tmp_path_factory):
    """With the zoo's own settings but for the sizes, and all that it watches."""
    folder = tmp_path_factory.mktemp("runs") / "zoo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_curve", CURVE)
        options = [option for option in TINY if option != "--metrics="]
        prompts = str(small_model() / "three.txt")
        train.main(["--model", "zoo", "--prompts", prompts, *options, "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Never changed: who goes on with it copies it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_curve", no_curve)
        return run(tmp_path_factory.mktemp("runs") / "whole")


# What a run leaves


def test_a_run_leaves_what_the_readme_promises(zoo_run):
    lines = metrics(zoo_run)
    assert [line["epoch"] for line in lines] == [0, 1]
    assert [line["reward_queries"] for line in lines] == [4, 8]
    assert [line["eval_queries"] for line in lines] == [0, 8]
    numbers = "reward_mean reward_std loss approx_kl clip_fraction grad_norm"
    for name in (*numbers.split(), "seconds_sampling", "seconds_reward", "seconds_training"):
        assert all(np.isfinite(line[name]) for line in lines), name
    assert pictures(zoo_run, 0).shape == (128, 128, 3)
    assert (zoo_run / "reward.png").stat().st_size > 5000
    assert settings_of(zoo_run)["micro_batch"] == 4
    names = sorted(path.name for path in zoo_run.iterdir())
    files = ["config.json", "lock", "metrics.jsonl", "prompts.jsonl", "reward.png"]
    assert names == sorted([*files, "checkpoints", "samples"])
    assert sorted(path.name for path in (zoo_run / "checkpoints").iterdir()) == ["000001", "000002"]


def test_the_gain_is_that_on_the_base_models_pictures(zoo_run):
    base, after = (np.array(sampled(zoo_run, epoch)["rewards"]) for epoch in (0, 2))
    first, last = metrics(zoo_run)
    gain = after - base
    assert first["eval_gain_sd"] == first["eval_gain_t"] == 0
    assert last["eval_gain_sd"] == pytest.approx(gain.mean() / base.std())
    assert last["eval_gain_t"] == pytest.approx(gain.mean() / (gain.std(ddof=1) / 2))


def test_the_ratio_is_one_at_the_first_update_of_each_epoch(zoo_run):
    errors = [line["first_ratio_error"] for line in metrics(zoo_run)]
    assert errors == pytest.approx([0, 0], abs=1e-5)


def test_a_healthy_run_is_silent(zoo_run):
    assert [line["warnings"] for line in metrics(zoo_run)] == [[], []]


def test_recorded_rewards_are_those_of_the_recorded_pictures(zoo_run):
    record, grid = sampled(zoo_run, 0), pictures(zoo_run, 0)
    tiles = [grid[y : y + 64, x : x + 64] for y in (0, 64) for x in (0, 64)]
    expected = compressibility(np.stack(tiles), record["prompts"])
    assert record["rewards"] == pytest.approx(expected.tolist())
    first = metrics(zoo_run)[0]
    assert first["eval_reward_mean"] == pytest.approx(np.mean(record["rewards"]))
    assert first["eval_reward_std"] == pytest.approx(np.std(record["rewards"]))


def test_pictures_are_shown_at_most_256_pixels_wide_in_rows():
    images = np.zeros((5, 512, 512, 3), np.uint8)
    images[4, :, :, 1] = 200
    grid = np.asarray(train.grid(images))
    assert grid.shape == (512, 768, 3)
    assert (grid[256:, 256:512] == [0, 200, 0]).all()
    assert grid.sum() == images[4].sum() // 4


def test_the_curve_shows_the_rewards_against_the_queries(zoo_run, tmp_path, monkeypatch):
    """Training pictures where they were sampled, before their updates; gains from 0."""
    figures = []

    def keep(figure, path):
        figures.append(figure)

    monkeypatch.setattr(train.Figure, "savefig", keep)
    CURVE(zoo_run, train.Config(samples_per_epoch=4))
    left, right = figures[0].axes
    lines = metrics(zoo_run)
    training, fixed = left.lines[:2]
    assert list(fixed.get_xdata()) == [0, 8]
    assert list(fixed.get_ydata()) == [line["eval_reward_mean"] for line in lines]
    assert list(training.get_xdata()) == [0, 4]
    assert list(training.get_ydata()) == [line["reward_mean"] for line in lines]
    gains = {curve.get_label(): list(curve.get_ydata()) for curve in right.lines}
    assert set(gains) == {"reward", "aesthetic", "truth", "judged_right"}
    for name, gain in gains.items():
        first, last = (line[f"eval_{name}_mean"] for line in lines)
        deviation = lines[0][f"eval_{name}_std"] or 1
        assert gain == pytest.approx([0, (last - first) / deviation])


def test_every_run_watches_the_other_rewards_and_the_diversity(zoo_run):
    line, record = metrics(zoo_run)[0], sampled(zoo_run, 0)
    for name in ("truth", "judged_right"):
        assert len(record[name]) == 4
        assert line[f"eval_{name}_mean"] == pytest.approx(np.mean(record[name]))
    assert 0 < line["diversity"] < 1 and 0 < line["eval_diversity"] < 1
    assert record["prompts"] == ["a cat", "a bee"] * 2
    embeds = train.clip_embedder(str(train.ZOO.parent / "clip"), torch.device("cpu"))
    grid = pictures(zoo_run, 0)
    tiles = np.stack([grid[y : y + 64, x : x + 64] for y in (0, 64) for x in (0, 64)])
    first, second = embeds(tiles).chunk(2)
    expected = 1 - (first * second).sum(1).mean().item()
    assert line["eval_diversity"] == pytest.approx(expected, abs=1e-5)


def test_training_moves_the_unet_and_checkpoints_load(zoo_run):
    assert moved(zoo_run)
    loaded = unet.load(unet.UNet, zoo_run / "checkpoints" / "000002" / "unet")
    assert equal(loaded.state_dict(), weights(zoo_run, 2))


def test_a_checkpoints_state_is_the_epoch_the_algorithms_and_the_scalers(whole_run):
    state = json.loads((whole_run / "checkpoints" / "000002" / "state.json").read_text())
    assert set(state) == {"epoch", "algorithm", "scaler"}
    assert state["epoch"] == 2
    history = state["algorithm"]["statistics"]
    assert set(history) <= {"a cat", "a bee", "a lion"}
    assert sum(map(len, history.values())) == 8


def test_the_last_two_checkpoints_are_kept_the_last_epochs_among_them(tmp_path):
    options = ["--epochs", "5", "--checkpoint-every", "2", "--eval-every", "3"]
    folder = run(tmp_path / "run", *options)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["000004", "000005"]
    evaluated = [0, 3, 5]
    samples = sorted(path.name for path in (folder / "samples").glob("*.png"))
    assert samples == [f"epoch_{epoch:04d}.png" for epoch in evaluated]
    queries = [line["eval_queries"] for line in metrics(folder) if "eval_queries" in line]
    assert queries == [4 * epoch for epoch in evaluated]


@pytest.mark.parametrize("keep, kept", [(1, [4]), (3, [2, 3, 4]), (0, [1, 2, 3, 4])])
def test_as_many_checkpoints_are_kept_as_was_asked_for(keep, kept, whole_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    resume(folder, "--epochs", "4", "--keep-checkpoints", str(keep))
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == [f"{epoch:06d}" for epoch in kept]


def test_lines_and_bars_say_how_long_the_run_will_take(tmp_path, monkeypatch, capsys):
    """An epoch that took 100 s lets the next two take 200; the bars of the first know nothing."""
    texts, real = [], train.one_epoch

    class Bar(train.tqdm):
        def __init__(self, batches, text, *others, **options):
            texts.append(text)
            super().__init__(batches, text, *others, **options)

    def slow(run, epoch):
        seconds = {"seconds_sampling": 60.0, "seconds_reward": 30.0, "seconds_training": 10.0}
        return {**real(run, epoch), **seconds}

    monkeypatch.setattr(train, "one_epoch", slow)
    monkeypatch.setattr(train, "tqdm", Bar)
    run(tmp_path / "run", "--epochs", "3", "--eval-every", "9")
    out = capsys.readouterr().out
    for left in ("100 s, 03:20 left", "100 s, 01:40 left", "100 s, 00:00 left"):
        assert out.count(left) == 1
    known = [", 03:20 left", ", 01:40 left"]
    expected = ["sampling", "sampling", "training"]
    for left in known:
        expected += [f"sampling{left}", f"training{left}"]
    assert texts == [*expected, f"sampling{known[1]}"]  # the last evaluation


def test_after_the_first_batch_it_says_how_long_the_run_will_sample(tmp_path, monkeypatch, capsys):
    """Ten seconds between any two looks at the clock; two batches an epoch, three epochs."""
    clock = SimpleNamespace(time=itertools.count(0, 10).__next__)
    monkeypatch.setattr(train, "time", clock)
    run(tmp_path / "run", "--epochs", "3", "--sample-batch", "2")
    out = capsys.readouterr().out
    assert out.count("the run samples for about 01:00, and DDPO trains for three times that\n") == 1
    assert out.count("the run samples") == 1


def test_a_run_is_named_by_reward_and_algorithm_where_no_folder_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(tiny("--epochs", "1"))
    [folder] = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("compressibility-ddpo-is-20")
    assert settings_of(folder)["out"] == f"runs/{folder.name}"


def test_the_evaluation_pictures_are_fixed_and_the_training_samples_are_not(tmp_path):
    """With a learning rate of nothing the pictures of the last epoch are those of the first."""
    folder = run(tmp_path / "still", "--lr", "1e-11")
    before, after = (pictures(folder, epoch).astype(int) for epoch in (0, 2))
    assert np.abs(before - after).max() <= 1
    first, second = metrics(folder)
    assert first["eval_reward_mean"] == pytest.approx(second["eval_reward_mean"], abs=0.002)
    assert abs(first["reward_mean"] - second["reward_mean"]) > 0.004


def test_the_first_line_keeps_the_base_models_evaluation(tmp_path, capsys):
    folder = run(tmp_path / "one", "--epochs", "1")
    assert "fixed pictures: " in capsys.readouterr().out
    [line] = metrics(folder)
    assert line["eval_queries"] == 0
    assert line["eval_reward_mean"] == pytest.approx(np.mean(sampled(folder, 0)["rewards"]))
    assert sampled(folder, 1)["rewards"] != sampled(folder, 0)["rewards"]


def test_without_clip_the_run_goes_on_without_its_diversity(tmp_path, capsys):
    folder = run(tmp_path / "run", "--clip", str(tmp_path), "--epochs", "1")
    said = capsys.readouterr().out
    HEARD.append(said)
    assert "diversity is not measured: --clip" in said
    assert metrics(folder)[0]["diversity"] is metrics(folder)[0]["eval_diversity"] is None


def test_another_seed_is_another_run(whole_run, tmp_path):
    other = run(tmp_path / "other", "--seed", "1", "--epochs", "1")
    assert metrics(other)[0]["reward_mean"] != metrics(whole_run)[0]["reward_mean"]
    assert not np.array_equal(pictures(other, 0), pictures(whole_run, 0))


# What reaches the update


class Spy:
    """In place of ddpo.optimizer_step: keeps what it is called with."""

    def __init__(self, monkeypatch):
        self.calls, self.real = [], ddpo.optimizer_step
        monkeypatch.setattr(ddpo, "optimizer_step", self)

    def __call__(self, policy, algorithm, optimizer, batch, micro_batch, max_grad_norm, scaler):
        [group] = optimizer.param_groups
        sizes = (policy.sampler.T, policy.sampler.eta, policy.guidance, micro_batch, max_grad_norm)
        clean = all(p.grad is None for p in group["params"])
        self.calls.append((algorithm, batch, group["lr"], sizes, group["weight_decay"], clean))
        limits = (micro_batch, max_grad_norm, scaler)
        return self.real(policy, algorithm, optimizer, batch, *limits)


def test_settings_reach_the_update(tmp_path, monkeypatch):
    spy = Spy(monkeypatch)
    numbers = "--eta 0.5 --guidance 2 --lr 0.001 --clip-range 0.3 --max-grad-norm 0.7 --warmup 3"
    run(tmp_path, *numbers.split(), "--seed", "5", "--weight-decay", "0.5")
    assert [sizes for _, _, _, sizes, _, _ in spy.calls] == 4 * [(3, 0.5, 2.0, 4, 0.7)]
    rates = [lr for _, _, lr, _, _, _ in spy.calls]
    assert rates == pytest.approx([0.00025, 0.0005, 0.00075, 0.001])
    assert {decay for *_, decay, _ in spy.calls} == {0.5}
    # an epoch's sampling has the memory of the last update's gradients
    assert [clean for *_, clean in spy.calls] == [True, False, True, False]
    algorithm = spy.calls[0][0]
    assert type(algorithm) is ddpo.DDPO
    used = algorithm.settings
    assert (used.clip_range, used.guidance, used.batch_size) == (0.3, 2.0, 2)
    assert [len(batch) for _, batch, *_ in spy.calls] == [6] * 4


def test_noises_are_named_by_seed_epoch_and_sample(tmp_path, monkeypatch):
    spy, sizes, real = Spy(monkeypatch), [], ddpo.sample

    def watched(network, sampler, cond, *rest):
        sizes.append(len(cond))
        return real(network, sampler, cond, *rest)

    monkeypatch.setattr(ddpo, "sample", watched)
    run(tmp_path, "--seed", "5", "--sample-batch", "3")
    assert sizes == [3, 1] * 5  # in two epochs, and three times the fixed pictures
    for epoch in (0, 1):
        x_T = spy.calls[2 * epoch][1].trajectories.latents[:, 0]
        names = [(5, epoch, i) for i in range(4)]
        expected = torch.stack([named_noise((4, 8, 8), 1, *name)[0] for name in names])
        assert torch.equal(x_T, expected)


NUMBERS = """
def number(images, prompts):
    with open(__file__ + ".txt", "a") as file:
        print(*prompts, sep=",", file=file)
    return list(range(len(prompts)))

def large(images, prompts):
    return [1e9 + x for x in number(images, prompts)]
"""


def asked(folder):
    """The prompts of every call of NUMBERS' rewards: before training, then epoch by epoch."""
    return [line.split(",") for line in (folder / "mine.py.txt").read_text().splitlines()]


@pytest.mark.parametrize("reward, least", [("number", 0), ("large", 1e9)])
def test_rewards_reach_the_update_normalised_prompt_by_prompt(reward, least, tmp_path, monkeypatch):
    """Two pictures of each prompt: by their own mean and deviation they are +1 and -1."""
    spy = Spy(monkeypatch)
    (tmp_path / "mine.py").write_text(NUMBERS)
    folder = run(tmp_path / "run", "--reward", f"{tmp_path}/mine.py:{reward}", "--epochs", "1")
    prompts = asked(tmp_path)[1]
    assert len(prompts) == 4 and len(set(prompts)) == 2
    expected = [-1 if prompt in prompts[i + 1 :] else 1 for i, prompt in enumerate(prompts)]
    found, order = {}, []
    for _, batch, *_ in spy.calls:
        found.update(zip(batch.i.tolist(), batch.advantages.tolist()))
        order.append(set(batch.i.tolist()))
    assert [found[i] for i in range(4)] == pytest.approx(expected, abs=1e-3)
    assert order == [{0, 1}, {2, 3}]  # in the order of sampling, which is random already
    line = metrics(folder)[0]
    assert line["reward_mean"] - least == 1.5
    assert line["reward_std"] == pytest.approx(1.25**0.5)


def test_prompts_are_drawn_by_the_name_of_seed_and_epoch(tmp_path):
    (tmp_path / "mine.py").write_text(NUMBERS)
    options = ["--reward", f"{tmp_path}/mine.py:number", "--seed", "5"]
    run(tmp_path / "run", *options, "--prompts", "common-animals", "--eval-every", "2")
    animals, prompts = list(train.load_prompts("common-animals")), asked(tmp_path)
    assert len(prompts) == 4  # the fixed ones, before and after
    for epoch in (0, 1):
        rng = np.random.default_rng([5, epoch])
        assert prompts[1 + epoch] == train.draw_prompts(animals, 4, 2, rng)


def test_an_updates_pictures_are_of_several_prompts():
    animals = list(train.load_prompts("common-animals"))
    drawn = train.draw_prompts(animals, 64, 8, np.random.default_rng(0))
    assert all(len(set(drawn[start : start + 16])) > 4 for start in range(0, 64, 16))


def test_results_do_not_depend_on_how_the_work_is_cut(tmp_path):
    """One update, so that Adam's first steps cannot amplify rounding.

    The reward is smooth: a pixel that rounds the other way moves a JPEG by some bytes.
    """
    (tmp_path / "mine.py").write_text(BRIGHTNESS)
    once = ["--reward", f"{tmp_path}/mine.py:brightness", "--epochs", "1", "--batch-size", "4"]
    run(tmp_path / "whole", *once)
    run(tmp_path / "cut", *once, "--micro-batch", "5", "--sample-batch", "3")
    whole, cut = metrics(tmp_path / "whole")[0], metrics(tmp_path / "cut")[0]
    for name in ("reward_mean", "reward_std", "grad_norm", "diversity", "eval_reward_mean"):
        assert cut[name] == pytest.approx(whole[name], rel=2e-3), name


BRIGHTNESS = """
def brightness(images, prompts):
    return images.mean((1, 2, 3)) + images[:, 0].mean((1, 2)) / 3
"""
REGRESSION = {"rwr": ["--beta", "3"], "rwr-sparse": ["--percentile", "0.5"]}


@pytest.mark.parametrize("algorithm", REGRESSION)
def test_regression_runs_in_the_same_loop_and_resumes_exactly(algorithm, tmp_path):
    own = [*REGRESSION[algorithm], "--updates", "3", "--batch-size", "5", "--lr", "1e-3"]
    options = ["--algorithm", algorithm, *own]
    whole = run(tmp_path / "whole", *options)
    for line in metrics(whole):
        assert line["clip_fraction"] is line["approx_kl"] is line["first_ratio_error"] is None
        assert 0.1 < line["loss"] < 5 and line["grad_norm"] > 0 and line["warnings"] == []
    assert moved(whole)
    cut = run(tmp_path / "cut", *options, "--epochs", "1")
    resume(cut, "--epochs", "2")
    assert equal(weights(cut, 2), weights(whole, 2))
    assert without_seconds(metrics(cut)) == without_seconds(metrics(whole))


def test_each_epochs_regression_has_a_name_of_its_own(tmp_path, monkeypatch):
    """From which its noises and timesteps are drawn; the prompts' is another."""
    names, real = [], ddpo.RWR.batches

    def watched(self, policy, records, prompts, weights, name):
        names.append(name)
        return real(self, policy, records, prompts, weights, name)

    monkeypatch.setattr(ddpo.RWR, "batches", watched)
    run(tmp_path, "--algorithm", "rwr", "--updates", "1", "--seed", "5")
    assert names == [[5, 0, 1], [5, 1, 1]]


def regression(spy, folder, *options):
    """An epoch of regression -> the algorithm, its three batches, its three learning rates."""
    spy.calls.clear()
    numbers = "--epochs 1 --updates 3 --batch-size 5 --warmup 1 --guidance 2 --lr 0.01"
    run(folder, *numbers.split(), "--max-grad-norm", "0.7", *options)
    batches = [batch for _, batch, *_ in spy.calls]
    assert {len(batch) for batch in batches} == {5}
    assert {sizes[3:] for _, _, _, sizes, *_ in spy.calls} == {(4, 0.7)}
    assert [lr for _, _, lr, *_ in spy.calls] == pytest.approx([0.005, 0.01, 0.01])
    return spy.calls[0][0], batches


def test_the_settings_of_regression_reach_it(tmp_path, monkeypatch):
    spy, asked = Spy(monkeypatch), []
    real = ddpo.rwr_weights

    def watched(prompts, rewards, beta):
        asked.append((prompts, rewards, beta, real(prompts, rewards, beta)))
        return asked[-1][-1]

    monkeypatch.setattr(ddpo, "rwr_weights", watched)
    rwr = ["--algorithm", "rwr"]
    algorithm, batches = regression(spy, tmp_path / "rwr", *rwr, "--beta", "3")
    [(prompts, rewards, beta, expected)] = asked
    i, j = [k for k, prompt in enumerate(prompts) if prompt == prompts[0]]
    ratio = (expected[i] / expected[j]).log().item()
    assert ratio == pytest.approx(3 * (rewards[i] - rewards[j]).item(), rel=1e-4) and beta == 3
    used = torch.cat([batch.tensors[4] for batch in batches])
    assert set(used.tolist()) <= set(expected.tolist())
    assert algorithm.settings.guidance == 2.0 and not algorithm.settings.no_cfg_training
    plain, _ = regression(spy, tmp_path / "plain", *rwr, "--no-cfg-training")
    assert plain.settings.no_cfg_training
    sparse = ["--algorithm", "rwr-sparse"]
    best, batches = regression(spy, tmp_path / "best", *sparse, "--percentile", "1")
    kept = sorted(best.weights(prompts, rewards).tolist())
    assert kept == [0, 0, 1, 1]
    assert all(batch.tensors[4].tolist() == [1] * 5 for batch in batches)
    everything, _ = regression(spy, tmp_path / "all", *sparse, "--percentile", "0")
    assert everything.weights(prompts, rewards).tolist() == [1] * 4


def test_the_score_function_takes_one_update_an_epoch(tmp_path, monkeypatch):
    spy = Spy(monkeypatch)
    arguments = tiny("--algorithm", "ddpo-sf", "--out", str(tmp_path / "run"))
    at = arguments.index("--batch-size")
    train.main(arguments[:at] + arguments[at + 2 :])
    assert [len(batch) for _, batch, *_ in spy.calls] == [12, 12]
    assert settings_of(tmp_path / "run")["batch_size"] == 4
    assert [line["warnings"] for line in metrics(tmp_path / "run")] == [[], []]


# Alarms


def test_a_wild_learning_rate_is_seen_by_the_gradient_or_the_clipping(tmp_path):
    seldom = ["--eval-every", "9", "--checkpoint-every", "9"]
    wild = run(tmp_path / "wild", *seldom, "--lr", "0.03", "--epochs", "4")
    assert {"gradient", "clipping"} & {name for line in metrics(wild) for name in line["warnings"]}
    timid = run(tmp_path / "timid", *seldom, "--lr", "1e-9", "--epochs", "3")
    assert metrics(timid)[-1]["warnings"] == ["clipping"]


def spoil(monkeypatch):
    """Advantages that are no numbers."""

    def broken(rewards, mean, std, limit):
        return rewards * float("nan")

    monkeypatch.setattr(ddpo, "normalize_advantages", broken)


def test_what_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    whole_run, tmp_path, monkeypatch
):
    folder = shutil.copytree(whole_run, tmp_path / "nan")
    spoil(monkeypatch)
    line = refusal(resume, folder, "--epochs", "3")
    assert "epoch 2: not all metrics are finite" in line
    assert "--resume from " in line and line.endswith("000002")
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["000001", "000002"]
    assert metrics(folder)[-1]["warnings"] == ["not finite"]
    assert metrics(folder)[-1]["grad_norm"] is None
    assert "NaN" not in (folder / "metrics.jsonl").read_text()
    monkeypatch.undo()
    resume(folder, "--epochs", "3", "--lr", "1e-5")  # as the line says
    assert [line["warnings"] for line in metrics(folder)] == [[], [], []]


def test_what_is_not_finite_before_the_first_checkpoint(tmp_path, monkeypatch):
    spoil(monkeypatch)
    line = refusal(run, tmp_path)
    assert "another --out: there is no checkpoint" in line


# Resume


def test_a_resumed_run_equals_an_uninterrupted_one(whole_run, tmp_path, monkeypatch):
    folder, real = tmp_path / "cut", train.one_epoch

    def cut(run, epoch):
        if epoch == 1:
            raise KeyboardInterrupt
        return real(run, epoch)

    monkeypatch.setattr(train, "one_epoch", cut)
    with pytest.raises(SystemExit, match="130"):
        run(folder)
    monkeypatch.setattr(train, "one_epoch", real)
    with open(folder / "metrics.jsonl", "a") as file:  # killed in the middle of a line,
        file.write('{"epoch": 1, "reward_que')
    (folder / "checkpoints" / "000002.tmp").mkdir()  # and of a checkpoint
    resume(folder)
    assert without_seconds(metrics(folder)) == without_seconds(metrics(whole_run))
    assert equal(weights(folder, 2), weights(whole_run, 2))
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["000001", "000002"]


def test_lines_after_the_checkpoint_are_dropped(whole_run, tmp_path):
    """A run that was killed between its line and its checkpoint."""
    folder = shutil.copytree(whole_run, tmp_path / "late")
    shutil.rmtree(folder / "checkpoints" / "000002")
    resume(folder)
    assert without_seconds(metrics(folder)) == without_seconds(metrics(whole_run))
    assert equal(weights(folder, 2), weights(whole_run, 2))


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(whole_run):
    before = (whole_run / "metrics.jsonl").read_bytes()
    assert "holds a run already: add --resume" in refusal(run, whole_run)
    assert (whole_run / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_is_left_as_it_is(whole_run):
    before = (whole_run / "metrics.jsonl").read_bytes()
    line = f"train.py: --epochs 2: {whole_run} has 2 behind it; give more epochs"
    assert refusal(resume, whole_run) == line
    assert (whole_run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("what", ["optimizer.safetensors", WEIGHTS, "state.json"])
def test_a_broken_checkpoint_is_named(what, whole_run, tmp_path):
    folder = shutil.copytree(whole_run, tmp_path / "broken")
    path = folder / "checkpoints" / "000002" / what
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    line = refusal(resume, folder, "--epochs", "3")
    assert "000002 cannot be read (" in line and "delete it" in line
    shutil.rmtree(folder / "checkpoints" / "000002")
    resume(folder)  # as the line says
    assert without_seconds(metrics(folder)) == without_seconds(metrics(whole_run))


def test_a_checkpoint_of_another_version_is_named(whole_run, tmp_path):
    folder = shutil.copytree(whole_run, tmp_path / "old")
    path = folder / "checkpoints" / "000002" / "state.json"
    path.write_text('{"epoch": 2, "statistics": {}, "scaler": {}}')
    assert "000002 cannot be read" in refusal(resume, folder, "--epochs", "3")


def test_a_run_from_before_there_were_some_settings_goes_on(whole_run, tmp_path):
    folder = shutil.copytree(whole_run, tmp_path / "old")
    settings, new = settings_of(folder), ("precision", "grad_checkpointing", "lora_rank", "set")
    older = {name: value for name, value in settings.items() if name not in new}
    (folder / "config.json").write_text(json.dumps(older))
    resume(folder, "--epochs", "3")
    assert len(metrics(folder)) == 3
    assert settings_of(folder) == {**settings, "epochs": 3, "resume": True, "out": str(folder)}


NO_CONFIGS = ['{"epochs": 2, "w": 1}', "[]", "{", "\xff", '{"reward": ["x"]}', '{"epochs": "2"}']


@pytest.mark.parametrize("text", NO_CONFIGS)
def test_what_is_no_config_of_a_run_is_named(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    assert f"{tmp_path}/config.json" in refusal(resume, tmp_path)


DAMAGE = {
    "metrics.jsonl": ['{"epoch": 0}\n{"epoch": 1, ?}\n', '{"epoch": "1"}', "{}", '{"\xff"}'],
    "prompts.jsonl": ["", "a cat", '{"text": "a cat"}', "\xff"],
}
DAMAGES = [(name, text) for name, texts in DAMAGE.items() for text in texts]


@pytest.mark.parametrize("name, text", DAMAGES)
def test_what_is_damaged_in_a_runs_folder_is_named_before_it_goes_on(
    name, text, whole_run, tmp_path
):
    folder = shutil.copytree(whole_run, tmp_path / "damaged")
    (folder / name).write_bytes(text.encode("latin-1"))
    assert f"{folder}/{name}" in refusal(resume, folder, "--epochs", "3")
    assert (folder / name).read_bytes() == text.encode("latin-1")
    assert not (folder / "checkpoints" / "000003").exists()


def test_resume_needs_a_run(tmp_path):
    assert "holds no config.json" in refusal(resume, tmp_path)


def test_resume_may_save_memory(whole_run, tmp_path):
    folder = shutil.copytree(whole_run, tmp_path / "saving")
    less = ["--micro-batch", "1", "--sample-batch", "2", "--grad-checkpointing"]
    resume(folder, "--epochs", "3", *less)
    assert len(metrics(folder)) == 3
    assert settings_of(folder)["grad_checkpointing"]


@pytest.mark.parametrize(
    "options",
    [
        ["--lora-rank", "2"],
        ["--precision", "bf16"],
        ["--guidance", "0.5"],
        ["--algorithm", "ddpo-sf"],
        ["--reward", "incompressibility"],
        ["--seed", "1"],
        ["--set", "x=1"],
    ],
    ids=" ".join,
)
def test_resume_refuses_to_train_something_else(options, whole_run):
    line = refusal(resume, whole_run, "--epochs", "3", *options)
    assert line.endswith(f"leave out {options[0]}")


def test_resume_takes_the_same_settings_again(whole_run, tmp_path):
    folder = shutil.copytree(whole_run, tmp_path / "again")
    resume(folder, *tiny("--epochs", "3"))
    assert len(metrics(folder)) == 3


# Refusals


BAD = [
    ("--eta 0", "--eta 0: a step without noise has no policy gradient"),
    ("--eta 1.5", "--eta = 1.5; needed: a number from 0.0 to 1"),
    ("--epochs 0", "--epochs = 0; needed: a number from 1 to 1000000"),
    ("--batch-size 3", "--updates 1 of --batch-size 3 do not take each of 4 pictures once"),
    ("--batch-size 400", "--batch-size 400"),
    ("--samples-per-prompt 3", "multiple of --samples-per-prompt (3)"),
    ("--algorithm ddpo-sf", "ddpo-sf takes one update an epoch: leave out --batch-size"),
    ("--algorithm ppo", "--algorithm ppo: neither ddpo-is"),
    ("--guidance nan", "--guidance = nan; needed: a number from 0.0"),
    ("--lr inf", "--lr = inf; needed"),
    ("--updates 5", "--updates 5 of --batch-size 2 do not take each of 4 pictures once"),
    ("--algorithm rwr --updates 0", "--updates = 0"),
    ("--algorithm rwr-sparse --percentile 1.5", "--percentile = 1.5"),
    ("--seed -1", "--seed = -1; needed: a number from 0"),
    ("--max-grad-norm 0", "--max-grad-norm = 0.0; needed: a number from 1e-09 to 1000000"),
    ("--eval-samples 1", "--eval-samples = 1; needed: a number from 2"),
    ("--min-count 40", "--min-count 40 is more than --history-size 32"),
    ("--prompts nowhere.txt", "--prompts nowhere.txt"),
    ("--model nowhere/nothing", "--model nowhere/nothing"),
    ("--device tpu9", "--device tpu9"),
    ("--precision fp8", "--precision fp8: fp32, bf16 or fp16"),
    ("--steps 2000", "--steps 2000: between 1 and 1000"),
    ("--resume", "--resume needs --out"),
    ("--metrics compressibility,nowhere.py:f", "nowhere.py:f"),
    ("--metrics incompressibility,incompressibility", "the name incompressibility is taken"),
    ("--set x", "--set x: the algorithm has no such setting"),
    ("--set limit=3", "--set limit=3: the algorithm has no such setting"),
    ("--set advantage_limit=high", "--set advantage_limit=high: could not convert string to float"),
    ("--set defaults=3", "--set defaults=3: the algorithm has no such setting"),
    ("--algorithm nowhere.py:X", "--algorithm nowhere.py:X"),
    ("--device hpu", "--device hpu: No module named"),
    (
        "--samples-per-epoch 9223372036854775808",
        "--samples-per-epoch = 9223372036854775808; needed",
    ),
    ("--lr 1e300", "--lr = 1e+300; needed: a number from 0.0 to 1000000"),
    ("--lora-rank 100000000", "--lora-rank = 100000000; needed: a number from 0 to 1024"),
    ("--seed 99999999999999999999", "needed: a number from 0 to 9223372036854775807"),
]


@pytest.mark.parametrize("options, words", BAD, ids=[options for options, _ in BAD])
def test_bad_input_ends_in_one_line_that_names_it(options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in refusal(train.main, tiny(*options.split()))
    assert not list(tmp_path.iterdir())


HUB = [
    ("--model CompVis/stable-diffusion-v1-4", "hf download CompVis/stable-diffusion-v1-4"),
    ("--clip openai/clip-vit-large-patch14", "hf download openai/clip-vit-large-patch14"),
    ("--aesthetic-head trl-lib/ddpo-aesthetic-predictor", "hf download trl-lib/ddpo-aesthetic"),
    ("--reward alignment --vlm llava-hf/llava-1.5-7b-hf", "hf download llava-hf/llava-1.5-7b-hf"),
    ("--reward alignment --bert microsoft/deberta-xlarge-mnli", "hf download microsoft/deberta"),
    ("--reward aestetic", "--reward aestetic: neither"),
    ("--reward-device tpu9", "--reward-device tpu9"),
]


@pytest.mark.parametrize("options, words", HUB, ids=[options for options, _ in HUB])
def test_what_is_missing_offline_is_named_with_the_way_to_get_it(
    options, words, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    line = refusal(train.main, tiny("--reward", "aesthetic", *options.split()))
    assert words in line and options.split()[-2] in line
    assert not list(tmp_path.iterdir())


def test_what_several_processes_cannot_share_is_refused(tmp_path, monkeypatch):
    def three():
        return 0, 3

    monkeypatch.setattr(ddpo, "processes", three)
    settings = {"samples_per_epoch": 9, "batch_size": 3, "eval_samples": 6}
    assert resolve(settings, tmp_path).updates == 3
    rwr = {**settings, "algorithm": "rwr", "updates": 2}
    assert resolve(rwr, tmp_path).updates == 2
    # two pictures a prompt: of 9 only 8 are drawn
    for changes in ({"samples_per_epoch": 8}, {"batch_size": 4}, {"eval_samples": 9}):
        with pytest.raises(UserError, match="multiples of the number of processes, 3"):
            resolve({**rwr, **changes}, tmp_path)


def test_a_batch_size_that_nobody_gave_shrinks_to_fit(tmp_path, monkeypatch):
    """The largest divisor of the samples that is not above the default, 64."""
    for samples, size in ((256, 64), (16, 16), (100, 50), (96, 48), (251, 1)):
        c = resolve({"samples_per_epoch": samples}, tmp_path)
        assert (c.batch_size, c.updates) == (size, samples // size)
    for given in ({}, {"algorithm": "ddpo-sf"}):
        assert resolve({"samples_per_epoch": 16, **given}, train.ZOO).batch_size == 16
    assert resolve({"samples_per_epoch": 8}, train.ZOO).batch_size == 8
    assert resolve({"samples_per_epoch": 16, "algorithm": "rwr"}, tmp_path).batch_size == 128
    with pytest.raises(UserError, match="of --batch-size 32 do not take each of 16 pictures once"):
        resolve({"samples_per_epoch": 16, "batch_size": 32}, tmp_path)

    def three():
        return 0, 3

    monkeypatch.setattr(ddpo, "processes", three)
    for samples, size in ((192, 48), (36, 36), (189, 63), (183, 3)):
        c = resolve({"samples_per_epoch": samples, "eval_samples": 6}, tmp_path)
        assert c.batch_size == size


def test_few_samples_alone_just_work(tmp_path, capsys):
    options = "--model zoo --metrics= --reward compressibility --epochs 1 --eval-samples 2".split()
    train.main([*options, "--samples-per-epoch", "8", "--steps", "2", "--out", str(tmp_path / "a")])
    assert settings_of(tmp_path / "a")["batch_size"] == 8
    assert "1 epochs of 8 pictures in updates of 8, into" in capsys.readouterr().out
    assert metrics(tmp_path / "a")[0]["grad_norm"] > 0


def test_a_reward_without_a_number_for_each_picture_ends_in_one_line(tmp_path):
    (tmp_path / "mine.py").write_text("def bad(images, prompts):\n    return [float('nan')] * 4\n")
    line = refusal(run, tmp_path / "run", "--reward", f"{tmp_path}/mine.py:bad")
    assert "reward bad must give one finite number for each of 4 pictures" in line


@pytest.mark.parametrize("name", ["reward", "rewards", "prompts", "epoch", "shown"])
def test_what_is_watched_may_not_have_a_name_that_is_taken(name, tmp_path):
    (tmp_path / "mine.py").write_text(BRIGHTNESS.replace("brightness", name))
    line = refusal(run, tmp_path / "run", "--metrics", f"{tmp_path}/mine.py:{name}")
    assert f"the name {name} is taken" in line and not (tmp_path / "run").exists()


def failing_epoch(monkeypatch, error):
    """Let the first epoch fail."""

    def fail(run, epoch):
        raise error

    monkeypatch.setattr(train, "one_epoch", fail)


def test_out_of_memory_is_one_line_that_says_what_to_try(tmp_path, monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
    failing_epoch(monkeypatch, error)
    line = refusal(run, tmp_path)
    assert line.startswith("train.py: CUDA out of memory. Tried to allocate 2 GiB; try --precision")
    for option in ("--grad-checkpointing", "--lora-rank", "--micro-batch", "--sample-batch"):
        assert option in line


def test_an_error_that_speaks_of_allocating_stays_what_it_is(tmp_path, monkeypatch):
    failing_epoch(monkeypatch, RuntimeError("could not allocate a worker"))
    with pytest.raises(RuntimeError, match="^could not allocate a worker$"):
        run(tmp_path)


@pytest.mark.parametrize("code", [0, None])
def test_a_rewards_own_sys_exit_is_no_success(code, tmp_path, monkeypatch, capsys):
    failing_epoch(monkeypatch, SystemExit(code))
    with pytest.raises(SystemExit, match="130"):
        run(tmp_path)
    said = capsys.readouterr().err
    HEARD.append(said)
    assert said.startswith("train.py: stopped; no checkpoint yet; to begin again: ")


def test_a_job_queues_signal_is_as_ctrl_c(tmp_path, monkeypatch, capsys):
    def terminated(run, epoch):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train, "one_epoch", terminated)
    with pytest.raises(SystemExit, match="143"):
        run(tmp_path)
    said = capsys.readouterr().err
    HEARD.append(said)
    assert said.startswith("train.py: stopped; no checkpoint yet; to begin again: ")
    assert said.endswith(f"--out {tmp_path} --resume\n")
    monkeypatch.undo()
    monkeypatch.setattr(train, "draw_curve", no_curve)
    resume(tmp_path)
    assert f", into {tmp_path}, from the beginning\n" in capsys.readouterr().out


def test_a_run_that_is_stopped_after_a_checkpoint_goes_on(tmp_path, monkeypatch, capsys):
    real = train.one_epoch

    def interrupted(run, epoch):
        if epoch == 1:
            raise KeyboardInterrupt
        return real(run, epoch)

    monkeypatch.setattr(train, "one_epoch", interrupted)
    with pytest.raises(SystemExit, match="130"):
        run(tmp_path, "--checkpoint-every", "1")
    assert capsys.readouterr().err.startswith("train.py: stopped; to go on: ")
    monkeypatch.setattr(train, "one_epoch", real)
    resume(tmp_path)
    assert f", into {tmp_path}\n" in capsys.readouterr().out


@pytest.mark.parametrize("rank, lines", [(0, 1), (1, 0)])
def test_of_several_processes_one_says_how_to_go_on(rank, lines, tmp_path, monkeypatch, capsys):
    def processes():
        return rank, 2

    def interrupted(run):
        (run.out / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(ddpo, "processes", processes)
    monkeypatch.setattr(train, "loop", interrupted)
    with pytest.raises(SystemExit, match="130"):
        run(tmp_path, "--debug")
    said = capsys.readouterr().err
    HEARD.append(said)
    assert said.count("to begin again: torchrun --nproc-per-node 2 ") == lines == said.count("\n")


@pytest.mark.parametrize("world, then", [(1, signal.SIG_DFL), (2, signal.SIG_IGN)])
def test_torchrun_does_not_end_a_process_before_its_line_comes_through(world, then, monkeypatch):
    """It sends SIGTERM to all as soon as one has ended."""

    def processes():
        return 0, world

    monkeypatch.setattr(ddpo, "processes", processes)
    line = refusal(train.main, tiny("--eta", "1.5"))
    assert line.startswith("train.py: process 0 of 2: --eta" if world == 2 else "train.py: --eta")
    assert signal.getsignal(signal.SIGTERM) == then


def test_debug_shows_where_a_refusal_comes_from(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--eta = 1.5"):
        run(tmp_path, "--eta", "1.5", "--debug")
    failing_epoch(monkeypatch, torch.OutOfMemoryError("too much"))
    with pytest.raises(torch.OutOfMemoryError):
        run(tmp_path, "--debug")


@pytest.mark.parametrize("error", [NotImplementedError, ValueError, OSError, RuntimeError])
def test_a_users_own_mistake_keeps_its_traceback(error, tmp_path):
    """Only what train.py itself refuses is one line; this names the file and the line at fault."""
    file = tmp_path / "mine.py"
    file.write_text(f"def mine(images, prompts):\n    raise {error.__name__}('soon')\n")
    with pytest.raises(error, match="soon") as caught:
        run(tmp_path / "run", "--reward", f"{file}:mine")
    last = traceback.extract_tb(caught.tb)[-1]
    assert (last.filename, last.name) == (str(file), "mine")
    assert last.line == f"raise {error.__name__}('soon')"


def full_disk(monkeypatch, owner, method, name, error=OSError):
    """Writing the file called so fails, as on a full disk."""
    real = getattr(owner, method)

    def fail(*arguments, **options):
        paths = [argument for argument in arguments if isinstance(argument, (str, Path))]
        if any(Path(path).name.startswith(name) for path in paths):
            raise error("No space left on device")
        return real(*arguments, **options)

    monkeypatch.setattr(owner, method, fail)


PLACES = [
    (Path, "write_text", "config.json"),
    (Path, "write_text", "metrics.jsonl"),
    (Path, "write_text", "state.json"),
    (Path, "mkdir", "samples"),
    (Path, "mkdir", "000001"),
    (Image.Image, "save", "epoch_0000.png"),
    (unet, "save_file", "optimizer.safetensors", SafetensorError),
    (os, "replace", "000001.tmp"),
]


@pytest.mark.parametrize("place", PLACES, ids=[place[2] for place in PLACES])
def test_a_full_disk_ends_in_one_line(place, tmp_path, monkeypatch):
    full_disk(monkeypatch, *place)
    line = refusal(run, tmp_path / "run")
    assert f"{tmp_path}/run" in line and "cannot be written: No space left" in line


def test_an_algorithms_state_is_not_written_as_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(ddpo.DDPO, "state_dict", lambda self: {"mean": torch.ones(1)})
    with pytest.raises(TypeError, match="Tensor is not JSON serializable") as caught:
        run(tmp_path / "run")
    HEARD.append(f"TypeError: {caught.value}")
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]" * 6))


def test_a_curve_that_cannot_be_written_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "draw_curve", CURVE)
    full_disk(monkeypatch, train.Figure, "savefig", "reward.png")
    line = refusal(run, tmp_path / "run", "--epochs", "1")
    assert f"{tmp_path}/run/reward.png cannot be written: " in line


def test_a_folder_that_cannot_be_made_ends_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    assert f"{tmp_path}/file/run cannot be written" in refusal(run, tmp_path / "file" / "run")


# Settings


def test_settings_come_from_the_command_line_then_the_model_then_the_paper(tmp_path):
    rewards = {"incompressibility": {"lr": 0.3}}
    own = {"all": {"steps": 20, "lr": 0.1}, "rwr": {"lr": 0.4}, **rewards}
    (tmp_path / "ddpo.json").write_text(json.dumps(own))
    nowhere = tmp_path / "elsewhere"
    assert resolve({}, nowhere).lr == 1e-5
    assert resolve({}, nowhere).batch_size == 64
    assert resolve({"algorithm": "ddpo-sf"}, nowhere).batch_size == 256
    assert (resolve({}, tmp_path).steps, resolve({}, tmp_path).lr) == (20, 0.1)
    given = {"reward": "incompressibility"}
    assert resolve(given, tmp_path).lr == 0.3
    given["algorithm"] = "rwr"
    assert resolve(given, tmp_path).lr == 0.4
    given["lr"] = 0.5
    assert resolve(given, tmp_path).lr == 0.5


def test_a_model_may_name_an_algorithm_for_a_reward(tmp_path):
    own = {"all": {"algorithm": "ddpo-sf"}, "compressibility": {"algorithm": "rwr"}}
    own["rwr"] = {"lr": 0.4}
    (tmp_path / "ddpo.json").write_text(json.dumps(own))
    assert resolve({}, tmp_path).algorithm == "ddpo-sf"
    c = resolve({"reward": "compressibility"}, tmp_path)
    assert (c.algorithm, c.lr, c.updates) == ("rwr", 0.4, 400)  # with all that belongs to it
    given = {"reward": "compressibility", "algorithm": "ddpo-is"}
    assert resolve(given, tmp_path).algorithm == "ddpo-is"
    assert resolve({}, tmp_path / "elsewhere").algorithm == "ddpo-is"
    (tmp_path / "ddpo.json").write_text('{"all": {"algorithm": "ddpo"}}')
    with pytest.raises(UserError, match="--algorithm ddpo: neither ddpo-is, "):
        resolve({}, tmp_path)


BROKEN = [
    "{",
    "[]",
    '{"all": 3}',
    '{"al": {}}',
    '{"all": {"stepz": 20}}',
    '{"all": {"steps": "20"}}',
    '{"all": {"steps": true}}',
    '{"all": {"epochs": 2.5}}',
    '{"all": {"algorithm": 3}}',
    '{"all": {"algorithm": "evil.py:Class"}}',
    '{"all": {"precision": "fp8"}}',
    '{"all": {"lora_rank": 4}}',
    '{"all": {"batch_size": null}}',
    '{"all": {"out": "/"}}',
    '{"all": {"set": ["advantage_limit=3"]}}',
    '{"rwr": {"lr": "fast"}}',
]


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_ddpo_json_is_named(text, tmp_path):
    (tmp_path / "ddpo.json").write_text(text)
    with pytest.raises(UserError, match="ddpo.json") as caught:
        resolve({}, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_setting_that_was_typed_wins_over_a_bad_one(tmp_path):
    """A user who sees the line can go on at once."""
    (tmp_path / "ddpo.json").write_text('{"all": {"steps": "20", "clip": "evil.py:f"}}')
    with pytest.raises(UserError, match="ddpo.json sets steps = '20'"):
        resolve({}, tmp_path)
    assert resolve({"steps": 5, "clip": "mine"}, tmp_path).steps == 5


def test_a_models_settings_may_run_no_code_of_their_own(tmp_path):
    for spec in ("../evil.py:f", "evil.py:g", "/tmp/evil.py:h", "a,../../evil.py:i,b"):
        (tmp_path / "ddpo.json").write_text(json.dumps({"all": {"metrics": spec}}))
        with pytest.raises(UserError, match="may run no code"):
            resolve({}, tmp_path)
        assert resolve({"metrics": ""}, tmp_path).metrics == ""


def test_the_zoo_has_settings_of_its_own_for_every_algorithm():
    given = {"model": "zoo", "reward": "compressibility"}
    settings = {name: resolve({**given, "algorithm": name}, train.ZOO) for name in ddpo.ALGORITHMS}
    for name, c in settings.items():
        assert c.steps == 12 and c.samples_per_epoch <= 128, name
        assert c.warmup < c.updates * c.epochs <= 120, name
    assert settings["rwr"].beta == 5 and settings["ddpo-sf"].updates == 1


PAPER = {  # App. D.5: samples an epoch, batch size, updates an epoch
    "ddpo-is": (256, 64, 4),
    "ddpo-sf": (256, 256, 1),
    "rwr": (10_000, 128, 400),
    "rwr-sparse": (10_000, 128, 400),
}


def test_paper_defaults_are_those_of_app_d5():
    nowhere = Path("nowhere")
    for name, expected in PAPER.items():
        c = resolve({"algorithm": name}, nowhere)
        assert (c.samples_per_epoch, c.batch_size, c.updates) == expected
    c = resolve({}, nowhere)
    assert (c.beta, c.percentile, c.no_cfg_training) == (0.2, 0.9, False)
    assert (c.steps, c.guidance, c.eta) == (50, 5.0, 1.0)
    assert (c.lr, c.weight_decay, c.max_grad_norm, c.clip_range) == (1e-5, 1e-4, 1.0, 1e-4)
    assert (c.warmup, c.samples_per_prompt) == (0, 1)
    sets = {"aesthetic": "common-animals", "alignment": "animal-activities"}
    sets.update(dict.fromkeys(["compressibility", "incompressibility"], "imagenet-animals"))
    for reward, prompts in sets.items():
        assert resolve({"reward": reward}, nowhere).prompts == prompts


def test_paths_in_a_models_settings_are_relative_to_its_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "ddpo.json").write_text('{"all": {"prompts": "../p.txt", "clip": "../clip"}}')
    config = train.placed(resolve({}, folder), folder)
    assert config.prompts == str(tmp_path / "p.txt") and config.clip == str(tmp_path / "clip")
    zoo = train.placed(resolve({"model": "zoo"}, train.ZOO), train.ZOO)
    truth = str(train.ZOO.parent / "raters.py:truth")
    assert zoo.metrics.split(",")[:3] == ["compressibility", "aesthetic", truth]


def test_paths_on_the_command_line_are_relative_to_where_it_is_typed(tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("a dog\n")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = run(tmp_path / "run", "--prompts", "../mine.txt", "--epochs", "1")
    assert set(sampled(folder, 0)["prompts"]) == {"a dog"}
    resume(folder, "--epochs", "2")
    assert set(sampled(folder, 2)["prompts"]) == {"a dog"}


def test_every_option_has_one_line_of_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(train.Config):
        assert field.metadata["help"], field.name
        assert f"--{field.name.replace('_', '-')}" in text
    for heading in train.HEADINGS.values():
        assert f"{heading}:" in text


def test_each_process_of_torchrun_has_a_gpu_of_its_own(monkeypatch):
    class Zeros:
        def __init__(self, *shape, device):
            self.device = torch.device(device)

    def yes():
        return True

    def no():
        return False

    monkeypatch.setattr(torch.cuda, "is_available", no)
    assert train.choose_device("auto") == train.choose_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch, "zeros", Zeros)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert train.choose_device("cuda") == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert train.choose_device("cuda") == torch.device("cuda:3")
    assert train.choose_device("cuda:1") == torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", yes)
    assert train.choose_device("auto") == torch.device("cuda:3")


def test_auto_is_the_zoo_without_a_gpu_and_says_so(capsys):
    assert train.choose_model({}, torch.device("cpu")) == ("zoo", train.ZOO)
    assert "model: zoo, since the device is cpu" in capsys.readouterr().out
    assert train.choose_model({"model": "zoo"}, torch.device("cpu")) == ("zoo", train.ZOO)
    assert capsys.readouterr().out == ""


# The user's own code


def test_a_users_own_function_is_trained_on(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def redness(images, prompts):\n"
        "    return images[..., 0].mean((1, 2)) - images[..., 1:].mean((1, 2, 3))\n"
    )
    options = ["--reward", f"{tmp_path}/mine.py:redness", "--epochs", "1"]
    folder = run(tmp_path / "run", *options, "--metrics", "compressibility")
    grid = pictures(folder, 0).reshape(2, 32, 2, 32, 3).swapaxes(1, 2).reshape(4, 32, 32, 3)
    expected = grid[..., 0].mean((1, 2)) - grid[..., 1:].mean((1, 2, 3))
    assert sampled(folder, 0)["rewards"] == pytest.approx(expected.tolist())
    assert metrics(folder)[0]["eval_reward_mean"] == pytest.approx(expected.mean())


AIMED = """
def aimed(images, prompts, metadata):
    assert prompts == [data["prompt"] for data in metadata]
    scores = [data.get("aim", 0) + image.mean() / 2550 for image, data in zip(images, metadata)]
    for data in metadata:  # its own copy
        data["aim"] = data.pop("prompt")
        assert data.get("tags", []) == []
        data.get("tags", []).append("seen")
    return scores, {"kind": prompts}

def strict(images, prompts, threshold=7.0):
    return [threshold] * len(images)
"""


def test_a_reward_with_a_third_parameter_gets_what_its_prompts_lines_say(tmp_path):
    """In training, in evaluation, beside another reward, and after --resume without the file."""
    (tmp_path / "mine.py").write_text(AIMED)
    aims, file = {"a cat": 10, "a bee": 20, "a lion": 40}, tmp_path / "three.jsonl"
    lines = [{"prompt": prompt, "aim": aim, "tags": []} for prompt, aim in aims.items()]
    file.write_text("\n".join(map(json.dumps, lines)))
    mine = f"{tmp_path}/mine.py:"
    options = ["--reward", f"{mine}aimed", "--prompts", str(file), "--sample-batch", "1"]
    cut = run(tmp_path / "cut", *options, "--metrics", f"{mine}strict", "--epochs", "1")
    file.unlink()
    resume(cut, "--epochs", "2")
    for epoch in (0, 1, 2):
        record = sampled(cut, epoch)
        assert np.floor(record["rewards"]).tolist() == [aims[p] for p in record["prompts"]]
        assert record["shown"]["reward"]["kind"] == record["prompts"]
        assert record["strict"] == [7.0] * 4
    for epoch, line in enumerate(metrics(cut)):  # two prompts an epoch
        drawn = train.draw_prompts(list(aims), 4, 2, np.random.default_rng([0, epoch]))
        assert line["reward_mean"] == pytest.approx(np.mean([aims[p] for p in drawn]), abs=0.1)


def test_of_a_text_file_a_third_parameter_gets_the_prompts(tmp_path):
    (tmp_path / "mine.py").write_text(AIMED)
    folder = run(tmp_path / "run", "--reward", f"{tmp_path}/mine.py:aimed", "--epochs", "1")
    assert all(0 < reward < 0.1 for reward in sampled(folder, 0)["rewards"])


ALGORITHM = """
import dataclasses
import itertools
import torch
from ddpo import DDPO

class Mine(DDPO):
    \"\"\"All advantages times `strength`; counts its epochs; keeps a copy of the base.\"\"\"

    strength = 2.0
    times = 1
    label = "x"
    defaults = {"batch_size": 4, "lr": 0.125}

    def setup(self, policy):
        self.base = {name: p.clone() for name, p in policy.unet.state_dict().items()}
        self.epochs = 0

    def weights(self, prompts, rewards):
        self.epochs += 1
        return self.strength * super().weights(prompts, rewards)

    def metrics(self, logged):
        return {**super().metrics(logged), "epochs": torch.tensor(float(self.epochs))}

    def state_dict(self):
        return {**super().state_dict(), "epochs": self.epochs}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.epochs = state["epochs"]

class Unguided(DDPO):
    def __init__(self, settings):
        super().__init__(dataclasses.replace(settings, guidance=1.0))

class Tall(DDPO):
    @classmethod
    def settle(cls, settings, given):
        super().settle(settings, given)
        settings.updates = 7

class Nothing:
    defaults = {}
    weights = None

def function(settings):
    pass
"""


@pytest.fixture
def mine(tmp_path):
    file = tmp_path / "plugin.py"
    file.write_text(ALGORITHM)
    return f"{file}:"


def test_an_algorithm_may_come_from_a_file(mine, tmp_path, monkeypatch):
    spy = Spy(monkeypatch)
    own = ["--set", "strength=0.5", "--set", "times=3", "--set", "label=a=b"]
    options = ["--algorithm", f"{mine}Mine", *own]
    whole = run(tmp_path / "whole", *options)
    algorithm = spy.calls[0][0]
    assert (algorithm.strength, algorithm.times, algorithm.label) == (0.5, 3, "a=b")
    assert type(algorithm).strength == 2.0
    before = unet.load(unet.UNet, small_model() / "unet").state_dict()
    assert equal(algorithm.base, before)
    found = torch.cat([batch.advantages for _, batch, *_ in spy.calls]).abs()
    assert found.max() < 1.2  # by the history, twice that would be the least of the greatest
    assert [line["epochs"] for line in metrics(whole)] == [1, 2]
    settings = settings_of(whole)
    assert settings["algorithm"] == f"{mine}Mine" and settings["set"] == own[1::2]
    cut = run(tmp_path / "cut", *options, "--epochs", "1")
    resume(cut, "--epochs", "2")
    assert without_seconds(metrics(cut)) == without_seconds(metrics(whole))
    assert equal(weights(cut, 2), weights(whole, 2))
    state = json.loads((cut / "checkpoints/000002/state.json").read_text())
    assert state["algorithm"]["epochs"] == 2
    assert "leave out --set" in refusal(resume, cut, "--epochs", "3", "--set", "strength=1")


def test_an_algorithm_has_defaults_of_its_own_and_a_say_in_the_settings(mine, tmp_path):
    c = resolve({"algorithm": f"{mine}Mine", "samples_per_epoch": 8}, tmp_path)
    assert (c.batch_size, c.lr, c.updates) == (4, 0.125, 2)
    c = resolve({"algorithm": f"{mine}Tall", "samples_per_epoch": 8, "batch_size": 8}, tmp_path)
    assert c.updates == 7


@pytest.mark.parametrize("name", ["Nothing", "function", "missing", "torch"])
def test_what_is_no_algorithm_is_refused_in_one_line(name, mine):
    assert f"--algorithm {mine}{name}: " in refusal(train.main, tiny("--algorithm", mine + name))


def test_training_with_other_guidance_than_sampling_is_seen_by_the_ratio(mine, tmp_path, capsys):
    folder = run(tmp_path / "run", "--algorithm", f"{mine}Unguided")
    assert [line["warnings"] for line in metrics(folder)] == [["ratio"], ["ratio"]]
    out = capsys.readouterr().out
    HEARD.append(out)
    assert out.count("warning (ratio)") == 1  # once, when it begins
    assert out.count("warning (ratio), epoch 0: the ratio is off 1") == 1


# A chat server


def alignment(server, minilm):
    server_options = ["--reward", "alignment", "--vlm-url", server.url]
    return [*server_options, "--bert", minilm, "--bert-layer", "5"]


def test_the_descriptions_of_a_server_are_scored_and_shown(server, minilm, tmp_path):
    options = ["--sample-batch", "2", "--prompts", "common-animals"]
    folder = run(tmp_path / "run", *alignment(server, minilm), *options)
    settings = train.Config(vlm_url=server.url, bert=minilm, bert_layer=5)
    score = make_reward("alignment", settings, "cpu")
    for epoch in (0, 1, 2):
        record = sampled(folder, epoch)
        prompts = record["prompts"]
        assert record["shown"]["reward"] == {"description": ["32 pixels of JPEG"] * len(prompts)}
        expected = score(np.zeros((len(prompts), 32, 32, 3), np.uint8), prompts)[0]
        assert record["rewards"] == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_server_that_stays_away_stops_the_run_and_leaves_the_checkpoint(
    server, minilm, tmp_path, monkeypatch
):
    """It dies between the second epoch's update and its evaluation."""
    real = train.train_epoch

    def dying(run, records, prompts, weights, epoch):
        server.then = 500 if epoch == 1 else "well"
        return real(run, records, prompts, weights, epoch)

    monkeypatch.setattr(train, "train_epoch", dying)
    folder = tmp_path / "run"
    assert "HTTP 500" in refusal(run, folder, *alignment(server, minilm))
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["000001"]
    server.then = "well"
    monkeypatch.setattr(train, "train_epoch", real)
    resume(folder)
    assert [line["epoch"] for line in metrics(folder)] == [0, 1]
