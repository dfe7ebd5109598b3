"""What train.py chooses for a card, against the counts of memory.py, which memory.json keeps.

No GPU: `train.card` is patched, so that the run of a CPU takes itself for one on a card.
"""

import itertools
import json

import pytest
import torch

import ddpo
import memory
import train
import unet
from memory import GIB, KEPT, case
from scheduler import UserError
from test_train import refusal, resume, settings_of, small_model

COUNTS = json.loads(KEPT.read_text())
GRID = [*itertools.product((0, 4), ("fp32", "bf16"), (True, False), (1, 2, 4, 8))]
CARDS = [6, 8, 12, 16, 20, 24, 40, 80]
# GB -> precision, checkpointing, pictures at a time; by hand, from memory.json
FULL = {
    20: ("fp32", True, 1),
    24: ("fp32", True, 4),
    40: ("fp32", False, 4),
    80: ("fp32", False, 8),
}
LORA = {
    6: ("bf16", True, 1),
    8: ("bf16", True, 2),
    12: ("fp32", True, 4),
    16: ("fp32", True, 8),
    20: ("fp32", True, 8),
    24: ("fp32", True, 8),
    40: ("fp32", False, 4),
    80: ("fp32", False, 8),
}


def chosen(c):
    return tuple(getattr(c, name) for name in train.FITTED)


def room(gigabytes, half="bf16"):
    return gigabytes * 1e9, half


def counted(lora, precision, checkpointing, micro_batch):
    """Bytes."""
    return COUNTS[case(lora, precision, checkpointing, micro_batch)] * GIB


def on_a_card(monkeypatch, gigabytes, half="bf16"):
    """Let every device take itself for such a card."""

    def card(device):
        return room(gigabytes, half)

    monkeypatch.setattr(train, "card", card)


def config(lora, precision, checkpointing, micro_batch, **more):
    way = dict(zip(train.FITTED, (precision, checkpointing, micro_batch, micro_batch)))
    return train.Config(lora_rank=lora, **way, **more)


def test_every_case_is_counted():
    assert set(COUNTS) == {case(*way) for way in GRID}


@pytest.mark.parametrize("way", GRID, ids=[case(*way) for way in GRID])
def test_what_is_reckoned_is_never_less_than_what_is_counted_nor_much_more(way):
    ratio = train.memory_needed(config(*way), {}) / counted(*way)
    assert 1 <= ratio < (1.15 if way[0] else 1.06)


@pytest.mark.parametrize("gigabytes", CARDS)
@pytest.mark.parametrize("lora", [0, 4], ids=["full", "LoRA"])
def test_the_choice_leaves_a_tenth_of_a_card_by_the_counts(lora, gigabytes):
    expected = (LORA if lora else FULL).get(gigabytes)
    if expected is None:
        line = f"the card's {gigabytes} GB are too few: try --lora-rank 4"
        with pytest.raises(UserError, match=line):
            train.fitted({}, room(gigabytes), {})
        least = min(counted(*way) for way in GRID if way[0] == lora)
        assert least > 0.9 * gigabytes * 1e9
        return
    c = train.fitted({"lora_rank": lora}, room(gigabytes), {})
    precision, checkpointing, batch = expected
    assert chosen(c) == (precision, checkpointing, batch, batch)
    assert counted(lora, *expected) <= 0.9 * gigabytes * 1e9


def test_half_precision_is_that_of_the_card_and_fp32_goes_before_it():
    """A T4 has 15.8e9 bytes and no bf16; half precision is for cards that hold LoRA no otherwise"""
    for gigabytes, precision in ((6, "fp16"), (8, "fp16"), (9, "fp32"), (15.8, "fp32")):
        c = train.fitted({"lora_rank": 4}, room(gigabytes, "fp16"), {})
        assert c.precision == precision and (c.grad_checkpointing or precision == "fp32")


@pytest.mark.parametrize("lora", [0, 4])
def test_what_is_given_stays_and_batches_stay_equal(lora):
    """For each flag by itself, and some together."""
    values = {"precision": "fp16", "grad_checkpointing": True, "micro_batch": 2, "sample_batch": 1}
    for names in itertools.chain(*(itertools.combinations(values, n) for n in (1, 2, 3))):
        given = {name: values[name] for name in names}
        c = train.fitted({**given, "lora_rank": lora}, room(24), {})
        assert {name: getattr(c, name) for name in names} == given
        if not {"micro_batch", "sample_batch"} <= set(names):
            assert c.micro_batch == c.sample_batch
    too_much = {"precision": "fp32", "grad_checkpointing": False, "micro_batch": 64}
    whole = {**too_much, "sample_batch": 64, "lora_rank": lora}
    assert chosen(train.fitted(whole, room(6), {})) == ("fp32", False, 64, 64)
    with pytest.raises(UserError, match="the card's 6 GB are too few: try "):
        train.fitted({**too_much, "lora_rank": lora}, room(6), {})


def needed(width=1, side=64, **settings):
    config = {"block_out_channels": [int(1280 * width)], "sample_size": side}
    return train.memory_needed(train.Config(**settings), config)


def test_trajectories_resolutions_and_models_count(monkeypatch):
    """By hand. RWR keeps x_0 alone; a process its share; LLaVA is where it is."""
    picture = 4 * (51 * 4 * 64 * 64 + 77 * 768)
    assert needed(samples_per_epoch=1256) - needed() == pytest.approx(1000 * picture)
    rwr = needed(algorithm="rwr", samples_per_epoch=1256) - needed(algorithm="rwr")
    assert rwr == pytest.approx(1000 * 4 * (4 * 64 * 64 + 77 * 768))
    high, low = (needed(side=side, samples_per_epoch=1) for side in (128, 64))
    activations = 8 * 3.85e9
    assert high - low == pytest.approx(3 * activations, rel=0.01)
    assert needed(width=0.5) < needed() / 2
    vlm = {"reward": "alignment"}
    assert needed(**vlm) - needed() == pytest.approx(22e9)
    for elsewhere in ({"vlm_url": "http://x"}, {"reward_device": "cuda:1"}, {"vlm": "small"}):
        assert needed(**vlm, **elsewhere) == needed()

    def four():
        return 0, 4

    whole = needed(samples_per_epoch=1024)
    monkeypatch.setattr(ddpo, "processes", four)
    assert whole - needed(samples_per_epoch=1024) == pytest.approx(768 * picture)


def test_the_width_and_the_side_are_those_of_the_folder(tmp_path):
    """Twice the side, four times the activations: the card that holds 8 pictures holds 2."""
    given = {"lora_rank": 4, "precision": "fp32", "grad_checkpointing": True}
    (tmp_path / "unet").mkdir()
    for side, batch in ((64, 8), (128, 1)):
        config = {**memory.SD_UNET, "sample_size": side}
        (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
        assert train.merge(given, tmp_path, room(16)).micro_batch == batch
    before = train.merge(given, tmp_path / "nowhere", room(16))
    assert before.micro_batch == 8


def test_what_cannot_fit_is_refused_before_it_is_fetched(monkeypatch, tmp_path, capsys):
    """A 16 GB card, as `python train.py --reward aesthetic` finds it; the command named works."""

    def locate(model, *others):
        raise UserError(f"fetching {model}")

    def cuda(name, option="--device"):
        return torch.device("cuda")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(unet, "locate", locate)
    monkeypatch.setattr(train, "choose_device", cuda)
    on_a_card(monkeypatch, 16)
    line = refusal(train.main, ["--reward", "aesthetic"])
    assert line.endswith("the card's 16 GB are too few: try --lora-rank 4")
    fetching = "train.py: fetching CompVis/stable-diffusion-v1-4"
    assert refusal(train.main, ["--reward", "aesthetic", "--lora-rank", "4"]) == fetching
    assert refusal(train.main, ["--reward", "alignment", "--lora-rank", "4"]).endswith(
        "are too few: try --vlm-url or --model zoo"
    )
    url = ["--vlm-url", "http://localhost/v1"]
    assert refusal(train.main, ["--reward", "alignment", "--lora-rank", "4", *url]) == fetching
    assert "try --lora-rank 4" in refusal(train.main, ["--model", "some/one"])
    assert refusal(train.main, ["--reward", "alignment"]).endswith("try --vlm-url or --model zoo")
    on_a_card(monkeypatch, 5)  # where no LoRA fits it is not advised, nor is what has no part in it
    for lora in ([], ["--lora-rank", "4"]):
        line = refusal(train.main, ["--reward", "aesthetic", *lora])
        assert line.endswith("the card's 5 GB are too few: try --model zoo")
    on_a_card(monkeypatch, 24)
    assert refusal(train.main, ["--reward", "aesthetic"]) == fetching


PLAIN = "--epochs 1 --eval-samples 2 --samples-per-epoch 2 --batch-size 2 --steps 2".split()


def test_the_choice_is_said_once_and_kept_and_the_run_goes_on_with_it(
    monkeypatch, tmp_path, capsys
):
    """A model 0.025 times as wide as SD, whose other networks are taken to be SD's: 2 GB."""
    options = ["--model", str(small_model()), "--reward", "compressibility", "--metrics=", *PLAIN]
    on_a_card(monkeypatch, 2)
    train.main([*options, "--out", str(tmp_path / "run"), "--prompts", "common-animals"])
    expected = ("bf16", False, 8, 8)
    line = "for 2 GB: precision bf16, grad_checkpointing False, micro_batch 8, sample_batch 8"
    assert capsys.readouterr().out.count(f"{line} (other than fp32, numbers change)") == 1
    settings = settings_of(tmp_path / "run")
    assert tuple(settings[name] for name in train.FITTED) == expected
    on_a_card(monkeypatch, 0.5)
    resume(tmp_path / "run", "--epochs", "2")
    assert settings_of(tmp_path / "run") == {**settings, "epochs": 2, "resume": True}


def test_without_a_card_nothing_changes(tmp_path):
    assert train.card(torch.device("cpu")) is None
    c = train.merge({}, tmp_path, train.card(torch.device("cpu")))
    assert chosen(c) == ("fp32", False, 8, 8)
    assert chosen(train.merge({"micro_batch": 2}, tmp_path)) == ("fp32", False, 2, 8)


def test_the_zoos_own_settings_stay_on_any_card():
    for gigabytes in CARDS:
        c = train.merge({"model": "zoo"}, train.ZOO, room(gigabytes))
        assert chosen(c) == ("fp32", False, 64, 64)


@pytest.mark.parametrize("supported, half", [(True, "bf16"), (False, "fp16")])
def test_a_card_is_asked_for_all_its_memory(supported, half, monkeypatch):
    class Properties:
        total_memory = 25_000_000_000

    def properties(device):
        assert device == torch.device("cuda:1")
        return Properties

    def bf16(including_emulation):
        return supported and not including_emulation

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", bf16)
    assert train.card(torch.device("cuda:1")) == (25_000_000_000, half)


def test_the_tables_of_real_sd_are_those_of_the_counts(capsys):
    text = (train.HERE / "tutorial" / "real_sd.md").read_text(encoding="utf-8")
    memory.cards(COUNTS)
    lines = capsys.readouterr().out.splitlines()
    shown = [line for line in text.splitlines() if line.startswith("| ") and " GB | " in line]
    assert len(shown) == 8 and shown == [line for line in lines if line in shown]
    for lora, precision, checkpointing in itertools.product((0, 4), ("fp32", "bf16"), (1, 0)):
        trained, saving = "LoRA" if lora else "full UNet", "yes" if checkpointing else "no"
        name = precision if precision == "fp32" else "bf16, fp16"
        sizes = [COUNTS[case(lora, precision, checkpointing, m)] for m in (1, 2, 4, 8)]
        cells = " | ".join(f"{size:.1f}{' GiB' * (i == 0)}" for i, size in enumerate(sizes))
        assert f"| {trained} | {name} | {saving} | {cells} |" in text
