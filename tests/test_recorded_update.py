"""The recorded end of a step, with what stands for CUDA on a CPU; see tests/gpu/test_graphs.py."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lora_cli.training.learning_rate import set_learning_rate
from lora_cli.training.recorded_update import RecordedUpdate, can_be_recorded
from lora_cli.training.seeds import random_state_restored, seed_everything


class Calls:
    """Stands for a CUDA graph: it repeats what was noted while it was recorded."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def replay(self) -> None:
        for call in self.calls:
            call()


@contextmanager
def record(graph: Calls, pool: Any, stream: Any, mode: str) -> Iterator[None]:
    assert (pool, stream, mode) == (None, "stream", "thread_local")
    yield


def test_a_replay_reads_the_loss_and_the_learning_rates_of_its_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Calls)
    monkeypatch.setattr(torch.cuda, "graph", record)
    weights = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    groups = [{"params": [weights[0]], "lr": 0.5}, {"params": [weights[1]], "lr": 0.25}]
    optimizer = torch.optim.AdamW(groups, fused=True)
    calls: list[Any] = []

    def finish(loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Note what a device would compute: nothing is computed while it is recorded."""
        rates = [group["lr"] for group in optimizer.param_groups]
        assert all(isinstance(rate, Tensor) for rate in rates)
        assert all(group["capturable"] for group in optimizer.param_groups)
        norm, bad, skipped = torch.zeros(()), torch.tensor(False), torch.tensor(False)

        def compute() -> None:
            norm.copy_(loss + 10 * rates[0] + 100 * rates[1])
            bad.copy_(loss > 1)
            skipped.copy_(loss > 2)

        calls.append(compute)
        return norm, bad, skipped

    recorded: Any
    recorded = RecordedUpdate(finish, optimizer, torch.tensor(7.0), "stream")  # type: ignore[arg-type]
    recorded.graph.calls = calls
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
    assert not any(group["capturable"] for group in optimizer.param_groups)
    first = recorded.replay(torch.tensor(0.5))
    optimizer.param_groups[1]["lr"] = 0.75
    second = recorded.replay(torch.tensor(1.5))
    assert [float(value) for value in first] == [0.5 + 5 + 25, 0, 0]  # the next step leaves it
    assert [float(value) for value in second] == [1.5 + 5 + 75, 1, 0]


def test_a_failed_recording_leaves_the_learning_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Calls)
    monkeypatch.setattr(torch.cuda, "graph", record)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))], lr=0.5, fused=True)

    def finish(loss: Tensor) -> Any:
        raise RuntimeError("not permitted")

    with pytest.raises(RuntimeError, match="not permitted"):
        RecordedUpdate(finish, optimizer, torch.tensor(7.0), "stream")  # type: ignore[arg-type]
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert not optimizer.param_groups[0]["capturable"]


def test_only_optimizers_that_decide_on_the_device_are_recorded() -> None:
    parameters = [nn.Parameter(torch.zeros(2))]
    assert can_be_recorded(torch.optim.AdamW(parameters, fused=True))
    assert not can_be_recorded(torch.optim.AdamW(parameters))
    assert not can_be_recorded(torch.optim.SGD(parameters, lr=0.1, fused=True))
    assert not can_be_recorded(torch.optim.Adafactor(parameters))


@pytest.mark.parametrize("fused", [True, None])
def test_a_rate_that_a_kernel_reads_has_the_digits_of_float32(fused: bool | None) -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))], lr=0.1, fused=fused)
    optimizer.param_groups[0]["initial_lr"] = 0.1
    rate = set_learning_rate(optimizer, 1 / 3)
    assert rate == optimizer.param_groups[0]["lr"]
    assert rate == (torch.tensor(0.1 / 3, dtype=torch.float32).item() if fused else 0.1 / 3)


def drawn() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def test_all_generators_are_seeded_and_restored() -> None:
    seed_everything(3, 4)
    wanted = drawn() + drawn()
    assert len(set(wanted)) == 6
    seed_everything(3, 4)
    found = drawn()
    with random_state_restored(torch.device("cpu")):
        drawn()
    assert found + drawn() == wanted
    with suppress(KeyError), random_state_restored(torch.device("cpu")):
        raise KeyError(drawn())
    after = drawn()
    seed_everything(3, 4)
    assert [drawn(), drawn(), drawn()][2] == after
    seed_everything(4, 3)
    assert drawn() != wanted[:3]


def test_a_seed_is_that_of_numpy_s_sequence_on_every_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seeds: list[int] = []
    device = SimpleNamespace(manual_seed=None, manual_seed_all=seeds.append)
    without_all = SimpleNamespace(manual_seed=seeds.append)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: "device")
    for module in (device, without_all):
        monkeypatch.setattr(torch, "get_device_module", {"device": module}.__getitem__)
        seed_everything(3, 4)
    wanted = int(np.random.SeedSequence((3, 4)).generate_state(1, np.uint64)[0]) // 2
    assert [torch.initial_seed(), *seeds] == [wanted] * 3
    found = drawn()
    np.random.seed(wanted % 2**32)
    random.seed(wanted)
    torch.default_generator.manual_seed(wanted)
    assert drawn() == found
