"""What every test shares: no network, one thread, and examples that are the same each time."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator

# before anything imports huggingface_hub, which reads them at import
# and caches of their own: other tests may run beside these
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="lora-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import drafting
import pytest
import torch
from hypothesis import settings

from lora_cli.training import result

# `nohup` and a shell's `&` have these ignored, and a run rightly leaves them so
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# A plot is half of a run of a few steps. Its own tests call it from `lora_cli.reporting`; runs that
# tests start as commands of their own draw it.
result.plot_learning_curve = lambda folder, report: None

settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    """Start every test from the same seed, on one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    before = list(sys.path)
    yield
    # scripts of metrics are found where they were written, not where another test had its own
    sys.path[:] = before
    for name in [name for name in sys.modules if name.partition(".")[0] == "evaluate_modules"]:
        del sys.modules[name]
    importlib.invalidate_caches()


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folders of a tiny encoder and a tiny language model."""
    return drafting.save_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture
def init(tmp_path: Path, bases: dict[str, Path]) -> drafting.Init:
    """Return a function that writes a file, infers its recipe, and checks both."""
    return drafting.initialiser(tmp_path, bases)


def pytest_unconfigure() -> None:
    """Remove the caches."""
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
