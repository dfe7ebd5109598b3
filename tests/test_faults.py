"""Faults that were found by reading and by trying, each with the line that it ends in."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_train import refusal, resume, run, small_model, tiny

import ddpo
import train
from scheduler import UserError


def metrics(folder):
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("algorithm", ["ddpo-is", "ddpo-sf"])
def test_ddpo_without_cfg_training_is_refused(algorithm, tmp_path):
    """Its ratio was off 1 by 1.0, and all of its pairs clipped."""
    options = tiny("--algorithm", algorithm, "--no-cfg-training", "--out", str(tmp_path / "run"))
    assert "--no-cfg-training is for rwr" in refusal(train.main, options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("algorithm, lr", [("ddpo-is", 0.025), ("ddpo-sf", 0.025), ("rwr", 1e-5)])
def test_an_algorithms_own_learning_rate_is_not_lost_with_lora(algorithm, lr):
    """The zoo's LoRA section overrode its RWR section: 0.025 for RWR, 2,500 times too much."""
    given = {"algorithm": algorithm, "lora_rank": 4}
    assert train.merge(given, train.ZOO, ddpo.ALGORITHMS[algorithm]).lr == lr
