"""What every test shares: no network, one thread, and examples that are the same each time."""

from __future__ import annotations

import functools
import gc
import importlib
import os
import shutil
import signal
import sys
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

# before anything imports huggingface_hub, which reads them at import
# and caches of their own: other tests may run beside these
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="lora-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    import drafting

# `nohup` and a shell's `&` have these ignored, and a run rightly leaves them so
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

ON_THE_DISK = os.fsync


def pytest_configure(config: pytest.Config) -> None:
    """Prepare the processes that run tests; the one that only hands them out needs no torch."""
    os.fsync = lambda descriptor: os.fstat(descriptor) and None
    if config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput"):
        return
    import typer.main
    from datasets import arrow_dataset
    from hypothesis import settings
    from transformers.utils import logging

    from lora_cli import machine_memory
    from lora_cli.training import output_folder

    # A plot is half of a run of a few steps. Its own tests call it from `lora_cli.reporting`; runs
    # that tests start as commands of their own draw it.
    output_folder.plot_learning_curve = lambda folder, report: None
    # whether a model is merged as a whole must not depend on what else runs on the machine
    available = machine_memory.available_bytes
    machine_memory.available_bytes = functools.wraps(available)(lambda: 2**50)
    # Each metric puts its rows into a table, whose contents `datasets` pickles for a fingerprint
    # that nothing reads: a tenth of a run of a few steps.
    arrow_dataset.generate_fingerprint = lambda dataset: uuid.uuid4().hex[:16]
    # the commands are made of their functions' annotations once, not for each of 1,000 calls
    typer.main.get_command = functools.cache(typer.main.get_command)
    # as every command has it: each part of a model that is loaded would set it and set it back,
    # and walk through all loggers each time
    logging.set_verbosity_error()
    settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=40)
    settings.load_profile("repeatable")
    # what is imported by now stays: no collection of garbage needs to walk through it again
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    """Let no collection of garbage walk through the tests themselves, and what they import."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)  # before `-m "not slow"` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the cases of a test as slow that come after those which `slow_after` lets through."""
    cases: Counter[str] = Counter()
    for item in items:
        if (mark := item.get_closest_marker("slow_after")) is not None:
            test = item.nodeid.partition("[")[0]
            cases[test] += 1
            if cases[test] > mark.args[0]:
                item.add_marker(pytest.mark.slow)


@pytest.fixture
def fresh_commands() -> None:
    """Make the commands again: Click keeps the options of `--help` that it was first asked for."""
    import typer.main

    typer.main.get_command.cache_clear()  # type: ignore[attr-defined]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Give each process a half of the tests in their order, and let it take of another's rest."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture
def real_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `os.fsync` wait for the disk, which only a loss of power would tell from its stand-in."""
    monkeypatch.setattr(os, "fsync", ON_THE_DISK)


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    """Start every test from the same seed, on one thread."""
    import torch

    torch.set_num_threads(1)
    # without an accelerator, `torch.manual_seed` prepares to seed a later one: a millisecond
    seed = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed
    seed(0)
    before = list(sys.path)
    yield
    # scripts of metrics are found where they were written, not where another test had its own
    sys.path[:] = before
    if "evaluate_modules" in sys.modules:
        for name in [name for name in sys.modules if name.partition(".")[0] == "evaluate_modules"]:
            del sys.modules[name]
        importlib.invalidate_caches()


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folders of a tiny encoder and a tiny language model."""
    import drafting

    return drafting.save_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture
def init(tmp_path: Path, bases: dict[str, Path]) -> drafting.Init:
    """Return a function that writes a file, infers its recipe, and checks both."""
    import drafting

    return drafting.initialiser(tmp_path, bases)


def pytest_unconfigure() -> None:
    """Remove the caches."""
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
