"""Settings and fixtures of all tests.

    python -m pytest              everything
    python -m pytest -m quick     the quick tier: what needs no training and no other processes

A test is in the quick tier if it, or its file (`pytestmark = pytest.mark.quick`), has the marker.
"""

import gc
import os
import signal
import sys
from pathlib import Path
from unittest import mock

import hypothesis
import pytest
import requests
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import get_tokenizer  # noqa: E402

# No deadline: a busy machine must not fail a test. The same examples every time: a failure can be
# run again.
hypothesis.settings.register_profile(
    "repository",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("repository")
# The models are tiny. More threads would be slower, and tests that run side by side would fight.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# A shell's job in the background ignores Ctrl-C, and under nohup a hang-up, too. So would every
# program that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):  # not on Windows
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

NEEDS_CL100K = "cl100k_base.tiktoken is not here: set FLM_CL100K_FILE to its path (README.md)"


def pytest_configure(config: pytest.Config):
    config.addinivalue_line("markers", "quick: the quick tier, under two minutes on two cores")


def pytest_collection_finish():
    """Leave what was imported out of garbage collections. PyTorch's modules are half a million
    objects, and each training that begins, grows or ends collects garbage."""
    gc.freeze()


@pytest.fixture(scope="session")
def cl100k():
    """The tokenizer cl100k_base: from FLM_CL100K_FILE, or from tiktoken's own cache; else skip."""
    if os.environ.get("FLM_CL100K_FILE"):
        return get_tokenizer("cl100k_base", os.environ["FLM_CL100K_FILE"])
    with mock.patch.object(requests, "get", side_effect=requests.ConnectionError):
        try:
            return get_tokenizer("cl100k_base")
        except ValueError:
            pytest.skip(NEEDS_CL100K)


def pytest_terminal_summary(terminalreporter):
    """Say in one line which tests were left out for want of cl100k's file."""
    skipped = terminalreporter.stats.get("skipped", [])
    left_out = [report for report in skipped if NEEDS_CL100K in str(report.longrepr)]
    if left_out:
        terminalreporter.write_line(f"{len(left_out)} tests were left out: {NEEDS_CL100K}")
