"""A GPU's memory that ends, and micro-batches that are fitted to what there is."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_precision import decoder, losses, recipe, train
from test_precision import pytestmark as on_a_gpu

from lora_cli.errors import ResourceError
from lora_cli.training import fit_into_memory
from lora_cli.training import run as training_run
from lora_cli.training.checkpoints import load_checkpoint

pytestmark = on_a_gpu


@contextmanager
def little_left(mib: int) -> Iterator[None]:
    """Take the GPU's memory but for so many MiB, as another process would."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(max(free - mib * 2**20, 0), dtype=torch.uint8, device="cuda")
    try:
        yield
    finally:
        del ballast
        torch.cuda.empty_cache()


def many_rows(tmp_path: Path, count: int = 8192) -> str:
    file = tmp_path / "many.jsonl"
    words = ["fine great lovely", "poor awful sad"]
    file.write_text("".join(
        json.dumps({"text": f"{words[i % 2]} " * 6 + str(i), "label": i % 2}) + "\n"
        for i in range(count)
    ))  # fmt: skip
    return f"data.train={file}"


def error_of(*arguments: Any, **named: Any) -> ResourceError | None:
    """Return how a run ends, without the tensors that its traceback would keep alive."""
    try:
        train(*arguments, **named)
    except ResourceError as error:
        return ResourceError([replace(problem) for problem in error.problems])
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    return None


def test_memory_that_ends_in_a_step_is_said_with_flags_that_help(tmp_path: Path) -> None:
    sets = ["train.micro_batch_size=8192", "train.gradient_accumulation_steps=1",
            "train.max_steps=3", "data.check.near_duplicates=false", many_rows(tmp_path, 8192),
            "data.validation=null", "checkpoint.every_steps=1"]  # fmt: skip
    with little_left(1200):
        error, tries = error_of(recipe(tmp_path, *sets)), 0
        while error is not None:  # do as it says until it fits
            assert error.exit_code == 5
            assert "the GPU's memory is full while training" in str(error)
            hint, tries = str(error.problems[0].hint), tries + 1
            flags = hint[hint.index("`") + 1 : hint.index("` (the same")].split("--set ")[1:]
            sets += [flag.strip() for flag in flags]
            error = error_of(recipe(tmp_path, *sets), resume=True)
    assert 1 <= tries <= 8
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["training"]["steps"] == 3
    assert report["training"]["examples_per_step"] == 8192


def test_memory_that_ends_later_leaves_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process takes the memory after the second step; the run goes on when it is gone."""
    sets = ["train.max_steps=6", "checkpoint.every_steps=1", many_rows(tmp_path),
            "data.validation=null", "train.micro_batch_size=4096"]  # fmt: skip
    train(recipe(tmp_path, *sets, output="whole"))
    real, taken = training_run.train_step, []

    def crowded(*arguments: object) -> object:
        if len(taken) == 2:
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info()
            taken.append(torch.empty(free - 32 * 2**20, dtype=torch.uint8, device="cuda"))
        else:
            taken.append(torch.empty(0))
        return real(*arguments)  # type: ignore[arg-type]  # as they were given

    monkeypatch.setattr(training_run, "train_step", crowded)
    error = error_of(recipe(tmp_path, *sets))
    assert "continue from step 2" in str(error)
    taken.clear()
    torch.cuda.empty_cache()
    monkeypatch.setattr(training_run, "train_step", real)
    train(recipe(tmp_path, *sets), resume=True)
    ours, theirs = (tmp_path / name / "adapter_model.safetensors" for name in ("out", "whole"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_the_largest_micro_batch_that_fits_is_found(tmp_path: Path) -> None:
    rows = many_rows(tmp_path)
    sets = [rows, "data.validation=null", "train.max_steps=4", "train.micro_batch_size=auto",
            "train.examples_per_step=4096", "train.gradient_accumulation_steps=1",
            "checkpoint.every_steps=1", "data.check.near_duplicates=false"]  # fmt: skip
    with little_left(700):
        report = train(recipe(tmp_path, *sets))
        found = load_checkpoint(tmp_path / "out")
        assert found is not None
        micro = found[1].memory["micro_batch_size"]
        assert 64 < micro < 4096  # all of a step do not fit
        assert report["training"]["examples_per_step"] == 4096
        too_many = ["train.micro_batch_size=4096", "train.examples_per_step=null"]
        assert error_of(recipe(tmp_path, *sets, *too_many, output="large")) is not None
    # where all fits there is one micro-batch, and the examples of each step are the same
    train(recipe(tmp_path, *sets, output="roomy"))
    roomy = load_checkpoint(tmp_path / "roomy")
    assert roomy is not None
    assert roomy[1].memory["micro_batch_size"] == 4096
    samples = [(tmp_path / name / "samples.jsonl").read_bytes() for name in ("out", "roomy")]
    assert samples[0] == samples[1]


def test_a_resumed_run_keeps_what_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = ["train.micro_batch_size=auto", "train.examples_per_step=48", "train.max_steps=8",
            "train.gradient_accumulation_steps=1", "checkpoint.every_steps=2"]  # fmt: skip
    train(recipe(tmp_path, *sets, output="whole"))
    real, calls = training_run.train_step, iter(range(1, 100))

    def cut(*arguments: object) -> object:
        if next(calls) > 5:
            raise RuntimeError("pulled the plug")
        return real(*arguments)  # type: ignore[arg-type]  # as they were given

    monkeypatch.setattr(training_run, "train_step", cut)
    with pytest.raises(RuntimeError, match="plug"):
        train(recipe(tmp_path, *sets))
    monkeypatch.setattr(training_run, "train_step", real)
    train(recipe(tmp_path, *sets), resume=True)
    ours, theirs = (tmp_path / name / "adapter_model.safetensors" for name in ("out", "whole"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_as_much_is_computed_again_as_is_needed_to_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = [many_rows(tmp_path), "data.validation=null", "train.max_steps=3",
            "train.micro_batch_size=4096", "train.gradient_accumulation_steps=1",
            "train.gradient_checkpointing=auto", "checkpoint.every_steps=1",
            "train.log_every_steps=1", "data.check.near_duplicates=false"]  # fmt: skip
    peaks = []
    for asked in ("false", "true"):
        torch.cuda.reset_peak_memory_stats()
        again = f"train.gradient_checkpointing={asked}"
        train(recipe(tmp_path, *sets, again, output=asked))
        peaks.append(torch.cuda.max_memory_allocated() / 2**20)
    choose = fit_into_memory.choose_checkpointing
    found = {}
    for output, left in (("roomy", None), ("short", sum(peaks) / 2), ("shorter", peaks[1] / 2)):

        def with_little_left(*arguments: Any, left: float | None = left) -> Any:
            with nullcontext() if left is None else little_left(int(left)):
                return choose(*arguments)

        monkeypatch.setattr(fit_into_memory, "choose_checkpointing", with_little_left)
        train(recipe(tmp_path, *sets, output=output))
        checkpoint = load_checkpoint(tmp_path / output)
        assert checkpoint is not None
        found[output] = checkpoint[1].memory["gradient_checkpointing"]
    assert found == {"roomy": False, "short": True, "shorter": "offload"}, peaks
    for output in ("short", "shorter"):
        assert losses(tmp_path / output) == pytest.approx(losses(tmp_path / "roomy"), rel=1e-4)


@pytest.mark.parametrize("kernels", ["reference", "fused"])
def test_inputs_that_wait_on_the_host_change_no_bit_and_leave_memory_free(
    tmp_path: Path, kernels: str
) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 12}
    peaks = {}
    for how in ("true", "offload"):
        sets = [f"train.gradient_checkpointing={how}", f"train.kernels={kernels}"]
        torch.cuda.reset_peak_memory_stats()
        train(decoder(tmp_path, *sets, output=how, **sizes))
        peaks[how] = torch.cuda.max_memory_allocated()
    assert losses(tmp_path / "true") == losses(tmp_path / "offload")
    a, b = ((tmp_path / how / "adapter_model.safetensors").read_bytes() for how in peaks)
    assert a == b
    assert peaks["offload"] < peaks["true"]
