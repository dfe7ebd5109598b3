"""Common to all tests: the repository on the path, no network, and `--slow` for the tests that take gigabytes and minutes."""
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"                  # a test that reaches for the hub should fail at once, everywhere
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tutorial" / "zoo")]

import pytest                                       # noqa: E402
import torch                                        # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the full-size tests too (12 GB of memory, ten minutes)")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: full size, by hand")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs --slow"))


@pytest.fixture(autouse=True)
def same_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def zoo():
    return ROOT / "tutorial" / "zoo" / "stable-diffusion"
