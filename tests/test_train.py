"""train.py from outside: run folders, resume, refusals. The model is the zoo, with settings so small that a run takes seconds."""
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train
from rewards import compressibility

PROMPTS = Path(tempfile.mkdtemp()) / "three.txt"             # so few that they come again: their statistics matter
PROMPTS.write_text("a cat\na bee\na lion\n")
TINY = ["--prompts", str(PROMPTS), "--reward", "compressibility", "--model", "zoo", "--device", "cpu", "--epochs", "2", "--samples-per-epoch", "4", "--samples-per-prompt", "2",
        "--batch-size", "2", "--steps", "3", "--eval-samples", "4", "--eval-every", "1", "--checkpoint-every", "1", "--micro-batch", "4",
        "--sample-batch", "4", "--min-count", "2", "--warmup", "0"]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_seconds(lines):
    return [{name: value for name, value in line.items() if not name.startswith("seconds")} for line in lines]


def weights(folder, epoch):
    return load_file(folder / "checkpoints" / f"{epoch:06d}" / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train.main([*TINY, "--out", str(folder)])
    return folder


def test_a_run_leaves_what_the_readme_promises(whole_run):
    lines = metrics(whole_run)
    assert [line["epoch"] for line in lines] == [0, 1]
    assert [line["reward_queries"] for line in lines] == [4, 8]
    assert [line["eval_queries"] for line in lines] == [0, 8]
    record = [json.loads((whole_run / "samples" / f"epoch_000{epoch}.json").read_text())["rewards"] for epoch in (0, 2)]
    gain = np.subtract(*record[::-1])
    assert lines[0]["eval_gain_sd"] == 0 and lines[1]["eval_gain_sd"] == pytest.approx(gain.mean() / np.std(record[0]))
    assert lines[1]["eval_gain_se"] == pytest.approx(gain.mean() / (np.std(gain, ddof=1) / 2))
    for name in ("reward_mean", "reward_std", "loss", "approx_kl", "clip_fraction", "grad_norm", "seconds_sampling", "seconds_reward",
                 "seconds_training"):
        assert all(np.isfinite(line[name]) for line in lines), name
    assert len(lines[0]["clip_fraction_by_step"]) == 3
    assert Image.open(whole_run / "samples" / "epoch_0000.png").size == (128, 128)
    assert (whole_run / "reward.png").stat().st_size > 5000
    assert json.loads((whole_run / "config.json").read_text())["micro_batch"] == 4
    assert sorted(p.name for p in (whole_run / "checkpoints").iterdir()) == ["000001", "000002"]


def test_the_ratio_is_one_at_the_first_update_of_each_epoch(whole_run):
    assert [line["first_ratio_error"] for line in metrics(whole_run)] == pytest.approx([0, 0], abs=1e-5)


def test_recorded_rewards_are_those_of_the_recorded_pictures(whole_run):
    record = json.loads((whole_run / "samples" / "epoch_0000.json").read_text())
    grid = np.asarray(Image.open(whole_run / "samples" / "epoch_0000.png"))
    tiles = [grid[y:y + 64, x:x + 64] for y in (0, 64) for x in (0, 64)]
    assert record["rewards"] == pytest.approx(compressibility(np.stack(tiles), record["prompts"]).tolist())
    assert metrics(whole_run)[0]["eval_reward_mean"] == pytest.approx(np.mean(record["rewards"]))


def test_training_moves_the_unet_and_checkpoints_load(whole_run):
    first, second = weights(whole_run, 1), weights(whole_run, 2)
    assert any(not torch.equal(first[key], second[key]) for key in first)
    train.load(train.UNet, whole_run / "checkpoints" / "000002" / "unet")


def test_a_resumed_run_equals_an_uninterrupted_one(whole_run, tmp_path, monkeypatch):
    folder, real = tmp_path / "cut", train.one_epoch

    def cut(*arguments):
        if arguments[-1] == 1:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(train, "one_epoch", cut)
    with pytest.raises(SystemExit):
        train.main([*TINY, "--out", str(folder)])
    monkeypatch.undo()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 1, "reward_que')              # killed in the middle of a line, and of a checkpoint
    (folder / "checkpoints" / "000002.tmp").mkdir()
    train.main(["--out", str(folder), "--resume"])
    assert without_seconds(metrics(folder)) == without_seconds(metrics(whole_run))
    one, other = weights(folder, 2), weights(whole_run, 2)
    assert all(torch.equal(one[key], other[key]) for key in other)


def test_the_evaluation_pictures_are_fixed_and_the_first_line_keeps_the_bases(tmp_path, capsys):
    """With a learning rate of nothing the pictures of the last epoch are those of the first; the training samples are others."""
    train.main([*TINY, "--lr", "1e-11", "--out", str(tmp_path / "still")])
    before, after = (np.asarray(Image.open(tmp_path / "still" / "samples" / f"epoch_000{epoch}.png")).astype(int) for epoch in (0, 2))
    assert np.abs(before - after).max() <= 1
    first, second = metrics(tmp_path / "still")
    assert first["eval_reward_mean"] == pytest.approx(second["eval_reward_mean"], abs=0.01) and abs(first["reward_mean"] - second["reward_mean"]) > 0.02
    train.main([*TINY, "--epochs", "1", "--out", str(tmp_path / "one")])
    assert "fixed pictures: " in capsys.readouterr().out
    assert metrics(tmp_path / "one")[0]["eval_queries"] == 0 and (tmp_path / "one" / "samples" / "epoch_0001.png").is_file()


def test_settings_reach_the_update(tmp_path, monkeypatch):
    seen, real = [], train.ddpo.improve

    def spy(policy, optimizer, trajectories, batch_size, name, lrs, **settings):
        seen.append((policy.T, policy.eta, policy.w, batch_size, name, lrs, settings["clip_range"], settings["micro_batch"], settings["max_grad_norm"],
                     settings["algorithm"], trajectories.advantages, trajectories.latents[:, 0]))
        return real(policy, optimizer, trajectories, batch_size, name, lrs, **settings)

    monkeypatch.setattr(train.ddpo, "improve", spy)
    train.main([*TINY, "--out", str(tmp_path), "--eta", "0.5", "--guidance", "2", "--lr", "0.001", "--clip-range", "0.3", "--max-grad-norm", "0.7",
                "--warmup", "3", "--seed", "5"])
    assert [call[:5] for call in seen] == [(3, 0.5, 2.0, 2, [5, 0, 1]), (3, 0.5, 2.0, 2, [5, 1, 1])]
    assert [call[5] for call in seen] == [pytest.approx([0.00025, 0.0005]), pytest.approx([0.00075, 0.001])]
    assert seen[0][6:10] == (0.3, 4, 0.7, "ddpo-is")
    for epoch, call in enumerate(seen):                     # the noises are named by (seed, epoch, sample)
        assert all(torch.equal(x_T, train.ddpo.named_noise((4, 8, 8), 1, 5, epoch, i)[0]) for i, x_T in enumerate(call[11]))
    first = seen[0][10].tolist()                            # two pictures of each prompt: normalised by their own mean and deviation
    assert sorted(map(abs, first)) == pytest.approx([1] * 4, abs=1e-3) and first[0] == pytest.approx(-first[1], abs=1e-3)


def test_results_do_not_depend_on_how_the_work_is_cut(tmp_path):
    """One update, so that Adam's first steps cannot amplify rounding; a pixel that rounds the other way still moves a JPEG by some bytes."""
    one_update = [*TINY, "--epochs", "1", "--batch-size", "4"]
    train.main([*one_update, "--out", str(tmp_path / "whole")])
    train.main([*one_update, "--out", str(tmp_path / "cut"), "--micro-batch", "1", "--sample-batch", "3"])
    whole, cut = metrics(tmp_path / "whole")[0], metrics(tmp_path / "cut")[0]
    for name in ("reward_mean", "reward_std", "grad_norm"):
        assert cut[name] == pytest.approx(whole[name], rel=2e-2), name


@pytest.mark.parametrize("algorithm, options", [("rwr", ["--beta", "3"]), ("rwr-sparse", ["--percentile", "0.5"])])
def test_reward_weighted_regression_runs_in_the_same_loop_and_resumes_exactly(algorithm, options, tmp_path, monkeypatch):
    arguments = [*TINY, "--algorithm", algorithm, *options, "--updates", "3", "--batch-size", "5"]
    train.main([*arguments, "--out", str(tmp_path / "whole")])
    for line in metrics(tmp_path / "whole"):
        assert line["clip_fraction"] is None and line["approx_kl"] is None and 0.1 < line["loss"] < 5 and line["grad_norm"] > 0
    assert any(not torch.equal(a, b) for a, b in zip(weights(tmp_path / "whole", 1).values(), weights(tmp_path / "whole", 2).values()))
    train.main([*arguments, "--epochs", "1", "--out", str(tmp_path / "cut")])
    train.main(["--out", str(tmp_path / "cut"), "--resume", "--epochs", "2"])
    assert all(torch.equal(a, b) for a, b in zip(weights(tmp_path / "whole", 2).values(), weights(tmp_path / "cut", 2).values()))


def test_the_settings_of_regression_reach_it(tmp_path, monkeypatch):
    seen = []

    def spy(policy, optimizer, x_0, prompts, weights, batch_size, name, lrs, w, **settings):
        seen.append((x_0.shape, weights, prompts, batch_size, name, lrs, w, settings["micro_batch"], settings["max_grad_norm"]))
        return {"loss": 1.0, "grad_norm": 1.0}

    monkeypatch.setattr(train.ddpo, "regress", spy)
    rwr_weights, asked = train.ddpo.rwr_weights, []
    monkeypatch.setattr(train.ddpo, "rwr_weights", lambda prompts, rewards, beta: asked.append((beta, rewards)) or rwr_weights(prompts, rewards, beta))
    common = [*TINY, "--epochs", "1", "--updates", "3", "--batch-size", "5", "--warmup", "1", "--guidance", "2"]
    for algorithm, more in (("rwr", ["--beta", "3"]), ("rwr-sparse", ["--percentile", "1", "--no-cfg-training"]), ("rwr-sparse", ["--percentile", "0"])):
        train.main([*common, "--algorithm", algorithm, *more, "--max-grad-norm", "0.7", "--lr", "0.01", "--out", str(tmp_path / "".join(more))])
    (shape, weights, prompts, *rest), (_, sparse, _, *others), (_, all_kept, *_) = seen
    assert shape == (4, 4, 8, 8) and prompts[0] == prompts[1] and prompts[2] == prompts[3]
    assert rest == [5, [0, 0, 1], pytest.approx([0.005, 0.01, 0.01]), 2.0, 4, 0.7] and others[3] == 1.0
    beta, rewards = asked[0]
    assert beta == 3 and (weights[0] / weights[1]).log().item() == pytest.approx(3 * (rewards[0] - rewards[1]).item(), rel=1e-4)
    assert [int(pair.argmax()) for pair in sparse.reshape(2, 2)] == [int(pair.argmax()) for pair in rewards.reshape(2, 2)]
    assert sorted(sparse.tolist()) == [0, 0, 1, 1] and all_kept.tolist() == [1] * 4


def test_training_without_guidance_is_seen_by_the_ratio_and_healthy_runs_are_silent(whole_run, tmp_path, capsys):
    assert [line["warnings"] for line in metrics(whole_run)] == [[], []]
    train.main([*TINY, "--no-cfg-training", "--out", str(tmp_path)])
    assert [line["warnings"] for line in metrics(tmp_path)] == [["ratio"], ["ratio"]]
    out = capsys.readouterr().out
    assert out.count("warning (ratio)") == out.count("warning (ratio), epoch 0: the ratio is off 1") == 1                # once, when it begins


def test_a_wild_learning_rate_is_seen_by_the_gradient_or_the_clipping(tmp_path):
    train.main([*TINY, "--lr", "0.03", "--epochs", "4", "--eval-every", "9", "--checkpoint-every", "9", "--out", str(tmp_path / "wild")])
    assert {"gradient", "clipping"} & {name for line in metrics(tmp_path / "wild") for name in line["warnings"]}
    train.main([*TINY, "--lr", "1e-9", "--epochs", "3", "--eval-every", "9", "--checkpoint-every", "9", "--out", str(tmp_path / "timid")])
    assert metrics(tmp_path / "timid")[-1]["warnings"] == ["clipping"]


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(whole_run, capsys):
    before = (whole_run / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit) as end:
        train.main([*TINY, "--out", str(whole_run)])
    assert "holds a run already" in str(end.value) and "\n" not in str(end.value)
    assert (whole_run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("arguments, words", [
    (["--eta", "0"], "--eta 0: at most 1, and for DDPO above 0"),
    (["--epochs", "0"], "--epochs 0"),
    (["--batch-size", "3"], "multiple"),
    (["--batch-size", "400"], "--batch-size (400)"),
    (["--algorithm", "ddpo-sf"], "one update an epoch"),
    (["--guidance", "nan"], "--guidance nan"),
    (["--updates", "5"], "--updates 5: ddpo-is takes each picture once"),
    (["--algorithm", "rwr", "--updates", "0"], "--updates 0"),
    (["--algorithm", "rwr-sparse", "--percentile", "1.5"], "--percentile 1.5"),
    (["--seed", "-1"], "--seed -1"),
    (["--min-count", "40"], "--min-count 40"),
    (["--prompts", "nowhere.txt"], "nowhere.txt"),
    (["--model", "nowhere/nothing"], "nowhere/nothing"),
    (["--device", "tpu9"], "--device tpu9"),
    (["--steps", "2000"], "steps = 2000"),
    (["--resume"], "--resume needs --out"),
])
def test_bad_input_ends_in_one_line_that_names_it(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        train.main([*TINY, *arguments])
    assert words in str(end.value) and "\n" not in str(end.value)


def test_a_finished_run_is_left_as_it_is(whole_run):
    before = (whole_run / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit, match="2 epochs behind it already"):
        train.main(["--out", str(whole_run), "--resume"])
    assert (whole_run / "metrics.jsonl").read_bytes() == before


def test_a_broken_checkpoint_is_named(whole_run, tmp_path):
    folder = shutil.copytree(whole_run, tmp_path / "broken")
    path = folder / "checkpoints" / "000002" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(SystemExit, match="000002 cannot be read .* delete it"):
        train.main(["--out", str(folder), "--resume", "--epochs", "3"])


def test_a_gradient_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(whole_run, tmp_path, monkeypatch):
    folder = shutil.copytree(whole_run, tmp_path / "nan")
    monkeypatch.setattr(train.ddpo, "normalize_advantages", lambda rewards, mean, std: rewards * float("nan"))
    with pytest.raises(SystemExit, match="epoch 2: not all metrics are finite .* --resume from .*000002"):
        train.main(["--out", str(folder), "--resume", "--epochs", "3"])
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["000001", "000002"]
    assert metrics(folder)[-1]["warnings"] == ["not finite"] and metrics(folder)[-1]["grad_norm"] is None
    assert "NaN" not in (folder / "metrics.jsonl").read_text()
    monkeypatch.undo()
    train.main(["--out", str(folder), "--resume", "--epochs", "3", "--lr", "1e-5"])                # as the line says
    assert [line["warnings"] for line in metrics(folder)] == [[], [], []]


def test_a_reward_must_give_a_number_for_each_picture():
    def broken(images, prompts):
        return [float("nan")] * len(prompts)
    with pytest.raises(ValueError, match="reward broken must give one finite number"):
        train.checked(broken, None, ["a", "b"])
    with pytest.raises(ValueError, match="for each of 2 pictures"):
        train.checked(lambda images, prompts: [1.0], None, ["a", "b"])


def test_resume_may_save_memory(whole_run, tmp_path):
    folder = shutil.copytree(whole_run, tmp_path / "saving")
    train.main(["--out", str(folder), "--resume", "--epochs", "3", "--micro-batch", "1", "--sample-batch", "2", "--grad-checkpointing"])
    assert len(metrics(folder)) == 3 and json.loads((folder / "config.json").read_text())["grad_checkpointing"]


@pytest.mark.parametrize("options", [["--lora-rank", "2"], ["--precision", "bf16"]])
def test_resume_refuses_to_train_something_else(whole_run, options):
    with pytest.raises(SystemExit, match=f"leave out {options[0]}"):
        train.main(["--out", str(whole_run), "--resume", "--epochs", "3", *options])


def test_a_run_from_before_there_was_a_scaler_goes_on(whole_run, tmp_path):
    folder = shutil.copytree(whole_run, tmp_path / "old")
    for path, new in ((folder / "config.json", ("precision", "grad_checkpointing", "lora_rank")), (folder / "checkpoints" / "000002" / "state.json", ("scaler",))):
        path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name not in new}))
    train.main(["--out", str(folder), "--resume", "--epochs", "3"])
    assert len(metrics(folder)) == 3


def test_what_several_processes_cannot_share_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(train.ddpo, "processes", lambda: (0, 3))
    settings = {"samples_per_epoch": 9, "batch_size": 3, "eval_samples": 6}
    assert train.resolve(settings, tmp_path).updates == 3
    for name, value in (("samples_per_epoch", 8), ("batch_size", 4), ("eval_samples", 9)):           # two pictures a prompt: of 9 only 8 are drawn
        with pytest.raises(ValueError, match="multiples of the number of processes, 3"):
            train.resolve({**settings, name: value}, tmp_path)


def test_out_of_memory_is_one_line_that_says_what_to_try(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
    monkeypatch.setattr(train, "one_epoch", full)
    with pytest.raises(SystemExit, match="train.py: CUDA out of memory. Tried to allocate 2 GiB; try --precision bf16, --grad-checkpointing") as end:
        train.main([*TINY, "--out", str(tmp_path)])
    assert "\n" not in str(end.value)


def test_resume_refuses_other_settings(whole_run):
    with pytest.raises(SystemExit) as end:
        train.main(["--out", str(whole_run), "--resume", "--guidance", "0.5"])
    assert "leave out --guidance" in str(end.value)


def test_settings_come_from_the_command_line_then_the_model_then_the_paper(tmp_path):
    (tmp_path / "ddpo.json").write_text(json.dumps({"all": {"steps": 20, "lr": 0.1}, "rwr": {"lr": 0.4}, "incompressibility": {"lr": 0.3}}))
    assert train.resolve({}, tmp_path / "elsewhere").lr == 1e-5
    assert train.resolve({}, tmp_path / "elsewhere").batch_size == 64
    assert train.resolve({"algorithm": "ddpo-sf"}, tmp_path / "elsewhere").batch_size == 256
    assert (train.resolve({}, tmp_path).steps, train.resolve({}, tmp_path).lr) == (20, 0.1)
    assert train.resolve({"reward": "incompressibility"}, tmp_path).lr == 0.3
    assert train.resolve({"reward": "incompressibility", "algorithm": "rwr"}, tmp_path).lr == 0.4
    assert train.resolve({"reward": "incompressibility", "algorithm": "rwr", "lr": 0.5}, tmp_path).lr == 0.5


@pytest.mark.parametrize("text", ['{', '[]', '{"all": 3}', '{"al": {}}', '{"all": {"stepz": 20}}', '{"all": {"steps": "20"}}', '{"all": {"epochs": 2.5}}',
                                  '{"all": {"algorithm": "ddpo-sf"}}', '{"all": {"precision": "fp8"}}', '{"all": {"lora_rank": 4}}', '{"all": {"batch_size": null}}', '{"all": {"out": "/"}}'])
def test_a_broken_ddpo_json_is_named(text, tmp_path):
    (tmp_path / "ddpo.json").write_text(text)
    with pytest.raises(ValueError, match="ddpo.json") as caught:
        train.resolve({}, tmp_path)
    assert "\n" not in str(caught.value)


def test_the_zoo_has_settings_of_its_own_for_every_algorithm():
    settings = {name: train.resolve({"model": "zoo", "reward": "compressibility", "algorithm": name}, train.ZOO) for name in train.ALGORITHMS}
    for name, c in settings.items():
        assert c.steps == 12 and c.samples_per_epoch <= 128 and c.warmup < c.updates * c.epochs and c.updates * c.epochs <= 120, name
    assert settings["rwr"].beta == 5 and settings["ddpo-sf"].updates == 1


def test_paper_defaults_are_table_d5():
    for algorithm, samples, batch, updates in (("ddpo-is", 256, 64, 4), ("ddpo-sf", 256, 256, 1), ("rwr", 10_000, 128, 400), ("rwr-sparse", 10_000, 128, 400)):
        config = train.resolve({"algorithm": algorithm}, train.Path("nowhere"))
        assert (config.samples_per_epoch, config.batch_size, config.updates) == (samples, batch, updates)
    assert (config.beta, config.percentile, config.no_cfg_training) == (0.2, 0.9, False)
    config = train.resolve({}, train.Path("nowhere"))
    assert (config.steps, config.guidance, config.eta, config.samples_per_epoch, config.batch_size) == (50, 5.0, 1.0, 256, 64)
    assert (config.lr, config.weight_decay, config.max_grad_norm, config.clip_range) == (1e-5, 1e-4, 1.0, 1e-4)


def test_the_reward_of_a_server_is_taken_beside_sampling_and_shown(server, minilm, tmp_path):
    """With --vlm-url each batch goes to the server as soon as it is drawn; scores and descriptions keep the pictures' order."""
    arguments = [*TINY, "--reward", "alignment", "--vlm-url", server.url, "--bert", minilm, "--bert-layer", "5", "--sample-batch", "2", "--prompts", "common-animals"]
    train.main([*arguments, "--out", str(tmp_path / "run")])
    lines = [json.loads(line) for line in (tmp_path / "run" / "descriptions.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0] * 4 + [1] * 4
    assert {line["description"] for line in lines} == {"64 pixels of JPEG"}
    score = train.make_reward("alignment", train.Config(vlm_url=server.url, bert=minilm, bert_layer=5), "cpu")
    expected = score(np.zeros((4, 64, 64, 3), np.uint8), [line["prompt"] for line in lines[:4]])[0]
    assert [line["score"] for line in lines[:4]] == pytest.approx(expected.tolist(), abs=1e-5)
    assert metrics(tmp_path / "run")[0]["reward_mean"] == pytest.approx(expected.mean(), abs=1e-5)


def test_a_server_that_stays_away_stops_the_run_and_leaves_the_checkpoint(server, minilm, tmp_path, monkeypatch):
    arguments = [*TINY, "--reward", "alignment", "--vlm-url", server.url, "--bert", minilm, "--bert-layer", "5", "--out", str(tmp_path)]
    real = train.ddpo.learn

    def dying(*arguments, name, **settings):
        server.then = 500 if name[1] == 1 else "well"
        return real(*arguments, name=name, **settings)

    monkeypatch.setattr(train.ddpo, "learn", dying)            # the server dies between the second epoch's update and its evaluation
    with pytest.raises(SystemExit, match="HTTP 500"):
        train.main(arguments)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000001"]
    server.then = "well"
    monkeypatch.undo()
    train.main(["--out", str(tmp_path), "--resume"])
    assert [line["epoch"] for line in metrics(tmp_path)] == [0, 1]
    assert len((tmp_path / "descriptions.jsonl").read_text().splitlines()) == 8


def test_every_run_watches_the_other_rewards_and_the_diversity(whole_run):
    line = metrics(whole_run)[0]
    record = json.loads((whole_run / "samples" / "epoch_0000.json").read_text())
    for name in ("truth", "judged_right"):
        assert line[f"eval_{name}_mean"] == pytest.approx(np.mean(record[name])) and len(record[name]) == 4
    assert 0 < line["diversity"] < 1 and 0 < line["eval_diversity"] < 1
    assert record["prompts"][:2] == record["prompts"][2:]


def test_a_users_own_function_is_trained_on(tmp_path):
    (tmp_path / "mine.py").write_text("def redness(images, prompts):\n    return images[..., 0].mean((1, 2)) - images[..., 1:].mean((1, 2, 3))\n")
    train.main([*TINY, "--reward", f"{tmp_path}/mine.py:redness", "--epochs", "1", "--out", str(tmp_path / "run")])
    assert np.isfinite(metrics(tmp_path / "run")[0]["eval_reward_mean"])


@pytest.mark.parametrize("arguments, words", [
    (["--model", "CompVis/stable-diffusion-v1-4"], "--model CompVis/stable-diffusion-v1-4.*hf download CompVis"),
    (["--clip", "openai/clip-vit-large-patch14"], "--clip openai/clip.*hf download openai"),
    (["--aesthetic-head", "trl-lib/ddpo-aesthetic-predictor"], "--aesthetic-head trl-lib.*hf download trl-lib"),
    (["--reward", "alignment", "--vlm", "llava-hf/llava-1.5-7b-hf"], "--vlm llava-hf.*hf download llava-hf"),
    (["--reward", "alignment", "--bert", "microsoft/deberta-xlarge-mnli"], "--bert microsoft.*hf download microsoft"),
    (["--reward", "aestetic"], "--reward aestetic: neither one of compressibility"),
    (["--metrics", "compressibility,nowhere.py:f"], "nowhere.py:f"),
    (["--reward-device", "tpu9"], "--reward-device tpu9"),
])
def test_what_is_missing_offline_is_named_with_the_way_to_get_it(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=words) as end:
        train.main([*TINY, "--reward", "aesthetic", *arguments])
    assert "\n" not in str(end.value) and not list(tmp_path.iterdir())


def test_a_models_settings_may_run_no_code_of_their_own(tmp_path):
    for spec in ("../evil.py:f", "evil.py:f", "/tmp/evil.py:f", "compressibility,../../evil.py:f"):
        (tmp_path / "ddpo.json").write_text(json.dumps({"all": {"metrics": spec}}))
        with pytest.raises(ValueError, match="may run no code"):
            train.resolve({}, tmp_path)
