"""Tests that the choice of what fits into memory is right, and leaves the model unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lora_cli.errors import ResourceError
from lora_cli.recipe import Learned
from lora_cli.training import fit_into_memory
from lora_cli.training.fit_into_memory import (
    choose_checkpointing,
    find_micro_batch,
    join_micro_batches,
    largest,
)

GIB = 2**30


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8, 9, 33])
def test_the_largest_that_fits_is_found_with_few_trials(limit: int) -> None:
    for most in range(limit + 3):
        tried: list[int] = []

        def fits(count: int, most: int = most, tried: list[int] = tried) -> bool:
            tried.append(count)
            return count <= most

        assert largest(fits, limit) == min(most, limit)
        assert len(set(tried)) == len(tried)
        assert all(1 <= count <= limit for count in tried)
        # doubling never tries more than twice what fits
        assert max(tried) <= max(2 * most, 1)


class Gpu:
    """A stand-in for torch's functions for the memory of a GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fractions: list[float] = []
        cuda = torch.cuda
        for name in ("empty_cache", "synchronize", "reset_peak_memory_stats"):
            monkeypatch.setattr(cuda, name, lambda *_: None)
        monkeypatch.setattr(cuda, "current_device", lambda: 1)
        free = {0: (8 * GIB, 100 * GIB), 1: (30 * GIB, 40 * GIB)}
        monkeypatch.setattr(cuda, "mem_get_info", free.__getitem__)
        monkeypatch.setattr(cuda, "memory_reserved", {0: 2 * GIB, 1: 4 * GIB}.__getitem__)
        monkeypatch.setattr(
            cuda, "set_per_process_memory_fraction",
            lambda fraction, index: self.fractions.append((index, fraction)),
        )  # fmt: skip


class Model(nn.Module):
    """Counts its forward passes in a buffer, as BatchNorm does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("passes", torch.zeros(()))
        self.modes: list[bool] = []


def setting(
    monkeypatch: pytest.MonkeyPatch, room: int, lengths: list[int], processes: int = 1, **train: Any
) -> tuple[Any, ...]:
    """Return the arguments of a search; `most` examples fit at a time."""
    device: Any = SimpleNamespace(type="cuda", index=0)
    tried: list[list[int]] = []
    recipe = SimpleNamespace(
        train=SimpleNamespace(**{
            "step_size": 6, "micro_batch_size": 2, "kernels": "auto", "seed": 3,
            "gradient_checkpointing": False, "distill": None, **train,
        }),
    )  # fmt: skip

    def fits(model: Any, task: Any, batch: Any, accelerator: Any, optimizer_bytes: int) -> bool:
        assert (optimizer_bytes, model.training) == (77, True)
        model.passes.add_(1)
        tried.append(batch.examples)
        return len(batch.examples) <= room

    def batch(examples: list[int]) -> Any:
        found = SimpleNamespace(examples=examples)
        found.to = lambda to: found if to is device else None
        return found

    monkeypatch.setattr(fit_into_memory, "_fits", fits)
    monkeypatch.setattr(
        fit_into_memory, "prepared_for", lambda task, example, seed, step: (example, seed, step)
    )
    task = SimpleNamespace(recipe=recipe, batch=batch, same_in_any_batch=True, learned=Learned())
    batches = SimpleNamespace(
        lengths=np.array(lengths), examples=[f"e{i}" for i in range(len(lengths))]
    )
    accelerator = SimpleNamespace(device=device, num_processes=processes, mixed_precision="no")
    return (Model().eval(), task, batches, accelerator, 77), tried


def test_the_longest_examples_are_tried_and_the_model_is_unchanged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = Gpu(monkeypatch)
    arguments, tried = setting(monkeypatch, 3, [5, 9, 7, 9, 1, 8, 2])
    assert find_micro_batch(*arguments) == 3
    assert [len(examples) for examples in tried] == [1, 2, 4, 3]
    # sorted by length (ties in order), and prepared as in the first step
    assert tried[2] == [("e1", 3, 0), ("e3", 3, 0), ("e5", 3, 0), ("e2", 3, 0)]
    model = arguments[0]
    assert (float(model.passes), model.training) == (0.0, False)
    # 8 GiB are free, of which 5 % are reserved; torch has 2 GiB already; the limit is lifted later
    index, share = gpu.fractions[0]
    assert (index, share * 100) == (0, pytest.approx(2 + 8 * 0.95))
    assert gpu.fractions[1:] == [(0, 1.0)]


def test_at_most_the_share_of_a_process_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu(monkeypatch)
    arguments, tried = setting(monkeypatch, 99, [1] * 20, step_size=6)
    assert find_micro_batch(*arguments) == 6
    arguments, _ = setting(monkeypatch, 99, [1] * 4, step_size=6)
    assert find_micro_batch(*arguments) == 4
    arguments, _ = setting(monkeypatch, 99, [1] * 20, processes=4, step_size=6)
    monkeypatch.setattr(fit_into_memory, "gather_object", lambda found: [*found, 9])
    assert find_micro_batch(*arguments) == 2
    monkeypatch.setattr(fit_into_memory, "gather_object", lambda found: [*found, 1])
    assert find_micro_batch(*arguments) == 1
    assert max(map(len, tried)) == 6


def test_one_example_has_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu(monkeypatch)
    arguments, _ = setting(monkeypatch, 0, [1, 1])
    monkeypatch.setattr(
        fit_into_memory, "out_of_memory", lambda recipe, count, when: ResourceError(f"of {count}")
    )
    with pytest.raises(ResourceError, match="of 1"):
        find_micro_batch(*arguments)


@pytest.mark.parametrize(("step_size", "wanted"), [(6, 6), (8, 8), (50, 8)])
def test_without_a_gpu_nothing_is_tried(
    step_size: int, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, tried = setting(monkeypatch, 1, [1] * 9, step_size=step_size)
    arguments[3].device = torch.device("cpu")
    assert find_micro_batch(*arguments) == wanted
    assert join_micro_batches(*arguments) is None
    assert tried == []


@pytest.mark.parametrize(
    ("room", "train", "wanted"),
    [
        (6, {}, 6), (5, {}, None), (6, {"kernels": "reference"}, None),
        (6, {"gradient_checkpointing": True}, None), (6, {"micro_batch_size": "auto"}, None),
        (6, {"micro_batch_size": 6}, None), (6, {"micro_batch_size": 5}, 6),
        (9, {"step_size": 30}, 7),
    ],
)  # fmt: skip
def test_a_step_is_one_micro_batch_if_it_easily_fits(
    room: int, train: dict[str, Any], wanted: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu(monkeypatch)
    arguments, tried = setting(monkeypatch, room, [1] * 7, **train)
    assert join_micro_batches(*arguments) == wanted
    if tried:  # once, with 70 % of the free memory reserved
        assert len(tried) == 1
        assert gpu.fractions[0][1] * 100 == pytest.approx(2 + 8 * 0.3)
    arguments[1].same_in_any_batch = False
    assert join_micro_batches(*arguments) is None


def test_a_step_is_one_micro_batch_if_it_fits_for_every_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Gpu(monkeypatch)
    for others, wanted in ((True, 3), (False, None)):
        arguments, _ = setting(monkeypatch, 9, [1] * 7, processes=2)
        monkeypatch.setattr(
            fit_into_memory, "gather_object", lambda found, others=others: [*found, others]
        )
        assert join_micro_batches(*arguments) == wanted


@pytest.mark.parametrize(
    ("train", "rows", "tried_with"),
    [
        ({}, 7, 2), ({"micro_batch_size": 5}, 7, 5), ({"micro_batch_size": 5}, 3, 3),
        ({"micro_batch_size": "auto"}, 7, 1),
    ],
)  # fmt: skip
def test_only_necessary_checkpointing_is_chosen(
    train: dict[str, Any], rows: int, tried_with: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu(monkeypatch)
    train = {"gradient_checkpointing": "auto", **train}
    for room, more, wanted in (
        (tried_with, 0, False), (tried_with - 1, 1, True), (tried_with - 1, 0, "offload"),
    ):  # fmt: skip
        arguments, tried = setting(monkeypatch, room, [*range(rows)], **train)
        enabled = checkpointing_gives(more, arguments[0], monkeypatch)
        assert choose_checkpointing(*arguments) is False  # the architecture does not support it
        assert not tried
        arguments[0].supports_gradient_checkpointing = True
        assert choose_checkpointing(*arguments) == wanted
        assert enabled == ([True] if wanted else [])
        assert [len(examples) for examples in tried] == [tried_with] * (2 if wanted else 1)
        assert tried[0][0] == (f"e{rows - 1}", 3, 0)
        assert gpu.fractions[0][1] * 100 == pytest.approx(2 + 8 * 0.95)
    arguments[3].device = torch.device("cpu")
    assert choose_checkpointing(*arguments) is False
    assert len(tried) == 2


def checkpointing_gives(more: int, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let gradient checkpointing make room for so many examples more; return how it is enabled."""
    enabled: list[Any] = []
    fits = fit_into_memory._fits

    def with_more(model: Any, task: Any, batch: Any, *others: Any) -> bool:
        found = fits(model, task, batch, *others)
        return found or (bool(enabled) and bool(more))

    def enable(enabled_model: nn.Module, recipe: Any, how: Any) -> None:
        assert enabled_model is model
        enabled.append(how)

    monkeypatch.setattr(fit_into_memory, "_fits", with_more)
    monkeypatch.setattr(fit_into_memory, "enable_gradient_checkpointing", enable)
    return enabled


def test_checkpointing_is_chosen_if_one_process_lacks_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Gpu(monkeypatch)
    for others, wanted in (
        ([False], True), ([False, False], "offload"), ([False, True], True), ([True], False),
    ):  # fmt: skip
        arguments, _ = setting(monkeypatch, 9, [1] * 7, gradient_checkpointing="auto", processes=2)
        arguments[0].supports_gradient_checkpointing = True
        checkpointing_gives(0, arguments[0], monkeypatch)
        other = iter([*others, True])
        monkeypatch.setattr(
            fit_into_memory, "gather_object", lambda found, other=other: [*found, next(other)]
        )
        assert choose_checkpointing(*arguments) == wanted


@pytest.mark.parametrize("index", [None, 0])
def test_the_memory_is_that_of_the_device_or_of_the_current_one(
    index: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu(monkeypatch)
    device: Any = SimpleNamespace(index=index)
    with fit_into_memory._headroom(device, 0.5):
        pass
    wanted = (1, (4 + 15) / 40) if index is None else (0, (2 + 4) / 100)
    assert gpu.fractions[0] == pytest.approx(wanted)


def test_two_passes_are_run_and_their_gradients_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu(monkeypatch)
    model, seen = Model(), []

    def loss(model: Any, batch: Any) -> torch.Tensor:
        seen.append(None if model.weight.grad is None else model.weight.grad.tolist())
        if isinstance(batch, Exception):
            raise batch
        return (model.weight * batch).sum()

    task: Any = SimpleNamespace(loss=loss)
    accelerator: Any = SimpleNamespace(device=torch.device("cpu"), autocast=torch.enable_grad)
    assert fit_into_memory._fits(model, task, torch.tensor([2.0, 3.0]), accelerator, 10)
    assert seen == [None, [2.0, 3.0]]
    assert model.weight.grad is None
    error = torch.OutOfMemoryError("CUDA out of memory")
    assert fit_into_memory._fits(model, task, error, accelerator, 10) is False
    with pytest.raises(ValueError, match="another"):
        fit_into_memory._fits(model, task, ValueError("another"), accelerator, 10)


@pytest.mark.parametrize(("kernels", "in_use"), [("auto", True), ("reference", False)])
def test_sizes_are_tried_with_the_kernels_of_the_run(
    kernels: str, in_use: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    Gpu(monkeypatch)
    (model, *others), _ = setting(monkeypatch, 99, [1] * 4, kernels=kernels)
    within, seen = [False], []

    @contextmanager
    def context() -> Iterator[None]:
        within[0] = True
        yield
        within[0] = False

    def fits(*_: Any) -> bool:
        seen.append(within[0])
        return True

    monkeypatch.setattr(
        fit_into_memory, "fused_modules",
        lambda given, accelerator: SimpleNamespace(in_use=context) if given is model else None,
    )  # fmt: skip
    monkeypatch.setattr(fit_into_memory, "_fits", fits)
    assert find_micro_batch(model, *others) == 4
    assert set(seen) == {in_use}
    assert within == [False]
