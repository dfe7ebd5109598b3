"""gpu.py, of which CI runs all on a CPU: what it does with its time, and with what fails."""

import json
import signal
import time
from types import SimpleNamespace

import pytest
import torch

import gpu
import memory


@pytest.fixture(autouse=True)
def handler():
    before = signal.getsignal(signal.SIGALRM)
    yield
    signal.signal(signal.SIGALRM, before)


def given(tiny=True):
    return SimpleNamespace(tiny=tiny, device=torch.device("cpu"))


def test_on_a_cpu_the_zoos_numbers_are_the_cpus(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path / "new"))
    assert gpu.main(["--tiny", "zoo"]) == 0
    found = json.loads((tmp_path / "new" / "gpu.json").read_text())
    rows = found["parts"]["zoo"]
    assert {row["largest difference"] for row in rows} == {"0.0e+00"}
    means = {row["quantity"]: float(row["mean, CPU"]) for row in rows}
    assert means["norm of the gradient"] > 0 and means["update of the weights"] != 0
    out = capsys.readouterr().out
    assert "| quantity | mean, CPU | mean, card | largest difference | relative |" in out
    assert found["conditions"]["device"] == "CPU"


def test_memory_is_counted_on_a_cpu_too(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu.main(["--tiny", "memory"]) == 0


def test_a_part_that_fails_or_takes_too_long_leaves_its_rows_and_the_next_ones_run(
    monkeypatch, tmp_path, capsys
):
    def failing(given):
        yield {"n": 1}
        raise RuntimeError("no\nkernel")

    def endless(given):
        yield {"n": 2}
        time.sleep(60)

    def slow(given):
        for n in range(100):
            time.sleep(0.02)
            yield {"n": n}

    parts = {"failing": (failing, 9), "endless": (endless, 1), "late": (slow, 0)}
    monkeypatch.setattr(gpu, "PARTS", {name: (part, s / 10) for name, (part, s) in parts.items()})
    monkeypatch.setattr(gpu.signal, "alarm", lambda s: signal.setitimer(signal.ITIMER_REAL, s))
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu.main(["--tiny"]) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert found["failing"] == [{"n": 1}, {"failed": "RuntimeError: no kernel"}]
    assert found["endless"] == [{"n": 2}, {"cut off": "after its 1.0 s"}]
    assert found["late"] == [{"n": 0}, {"cut off": "after its 0.0 s"}]
    assert "\nfailed RuntimeError: no kernel\n" in capsys.readouterr().out


def test_flop_of_a_guided_pass_are_those_of_two_of_sd():
    """803 GFLOP a forward pass (facts of SD v1.4, from other programs)."""
    assert gpu.flops(given(tiny=False)) == pytest.approx(2 * 803e9, rel=0.01)


def test_the_share_of_the_peak_and_the_anchor_by_hand(monkeypatch):
    """A guided pass of 2 pictures in 0.2 s, one with gradients in 0.6 s, T = 50."""
    took = iter([0.2, 0.6, 1.0])

    def seconds(given, call):
        call()
        return next(took)

    monkeypatch.setattr(gpu, "seconds", seconds)
    c = gpu.choice(given(), "fp32")
    work = gpu.flops(given())
    row = gpu.timing(given(), c, peak=work / 0.2)
    assert (row["sampling"], row["training"], row["a query"]) == ("5", "15", "20.5")
    assert row["4.5 s / a query"] == "0.22"
    assert row["share of peak"] == "200%, 200%"


def test_ratios_that_are_off_are_found_with_their_step():
    """The second of two steps of one of two pictures is changed after the drawing."""
    run = gpu.zoo_run("cpu", steps=2, samples_per_epoch=2, batch_size=2, samples_per_prompt=1)
    prompts, records, _ = gpu.sampled(run, 2)
    off, k = gpu.first_ratios(run, records, prompts)
    assert off.max() < 1e-4 and k.tolist() == [0, 0, 1, 1]
    records[0].log_probs[1, 1] += 0.01
    off, k = gpu.first_ratios(run, records, prompts)
    assert off.max().item() == pytest.approx(0.00995, rel=0.02) and off.argmax() == 3


def test_memory_is_itself_again_after_the_tiny_one():
    before = dict(memory.SD_UNET), memory.SAMPLES
    with gpu.tiny_memory():
        assert memory.SD_UNET["block_out_channels"] == [32] * 4
    assert (memory.SD_UNET, memory.SAMPLES) == before


def test_runs_that_differ_are_told_apart():
    one = {"a": torch.ones(2), "b": torch.zeros(2)}
    other = {"a": torch.tensor([1.0, 1.5]), "b": torch.zeros(2)}
    lines = [{"loss": 1.0}, {"loss": 2.0}]
    row = gpu.compared("x", one, lines, one, lines)
    assert row["to the bit"] == "yes" and row["tensors that differ"] == "0 of 2"
    row = gpu.compared("x", one, lines, other, [{"loss": 1.0}, {"loss": 2.5}])
    assert row["to the bit"] == "no" and row["tensors that differ"] == "1 of 2"
    assert float(row["largest relative difference"]) == pytest.approx(0.5 / 2**0.5, rel=0.1)
    assert row["metrics differ from epoch"] == 1
