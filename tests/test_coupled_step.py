"""Tests of steps that compare their examples, for any split into micro-batches and processes."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lora_cli.tasks.examples import Batch
from lora_cli.training import coupled_step
from lora_cli.training.coupled_step import add_coupled_gradients
from lora_cli.training.engine import Engine

# the rows of each process's micro-batches
SHARES: list[list[list[int]]] = [[[0, 1, 2], [3]], [], [[4, 5]], [[6], [7, 8], [9]]]
WEIGHTS = {"near": torch.tensor(0.25), "far": torch.tensor(-3.0)}


class CoupledTask:
    """A task whose outputs are vectors, and whose losses compare every vector with all others."""

    def output(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return a vector for each example (B, 3)."""
        found: Tensor = model(batch.inputs["x"])
        return found

    def losses(self, model: nn.Module, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return two losses for each example (B,)."""
        wanted = batch.targets["y"]
        products = output @ output.T
        return {
            "near": nn.functional.cross_entropy(products, wanted, reduction="none"),
            "far": (products * wanted[:, None]).tanh().sum(1),
        }


def examples() -> tuple[nn.Module, Tensor, Tensor]:
    """Return a model, its inputs (10, 4), and the index of another example for each (10,)."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return model, torch.randn(10, 4), torch.randperm(10)


def batches_of(parts: list[list[int]], x: Tensor, y: Tensor) -> list[Batch]:
    """Return batches of the given rows."""
    return [
        Batch({"x": x[part]}, {"y": y[part]}, {"near": torch.ones(len(part))}, 0, part)
        for part in parts
    ]


def at_once(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the loss of a step as one large batch, and its gradients."""
    batch = Batch({}, {"y": y}, {}, 0, [])
    sums = CoupledTask().losses(model, model(x), batch)
    loss = 0.25 * sums["near"].sum() - 3.0 * sums["far"].sum()
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


def process(index: int, count: int) -> Any:
    """Return a stand-in for the accelerator of a process."""
    return SimpleNamespace(
        num_processes=count,
        process_index=index,
        device=torch.device("cpu"),
        autocast=contextlib.nullcontext,
        backward=lambda loss: loss.backward(),
    )


def assert_like(found: list[Tensor], wanted: list[Tensor]) -> None:
    """Compare gradients, relative to the largest."""
    scale = max(float(tensor.abs().max()) for tensor in wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert float((ours - theirs).abs().max()) <= 1e-5 * scale


@pytest.mark.parametrize("size", [1, 2, 3, 10])
def test_any_split_gives_the_gradients_of_one_large_batch(size: int) -> None:
    model, x, y = examples()
    loss, wanted = at_once(model, x, y)
    parts = [list(range(start, min(start + size, 10))) for start in range(0, 10, size)]
    engine: Any = Engine(model, CoupledTask(), None, Accelerator())  # type: ignore[arg-type]
    share = add_coupled_gradients(engine, batches_of(parts, x, y), WEIGHTS)
    assert float(share.sum()) == pytest.approx(float(loss), rel=1e-5)
    assert_like([p.grad for p in model.parameters() if p.grad is not None], wanted)


def test_the_shares_of_processes_add_up_to_the_whole_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = examples()
    loss, wanted = at_once(model, x, y)
    with torch.no_grad():
        of_all = [[(model(x[part]), {"y": y[part]}) for part in parts] for parts in SHARES]
    shares, gradients = [], [torch.zeros_like(p) for p in model.parameters()]
    for index, parts in enumerate(SHARES):

        def gathered(own: list[Any], index: int = index) -> list[Any]:
            (sent,) = own
            for (output, targets), (other, others) in zip(sent, of_all[index], strict=True):
                assert torch.equal(output, other)
                assert torch.equal(targets["y"], others["y"])
                assert not output.requires_grad
            return of_all

        monkeypatch.setattr(coupled_step, "gather_object", gathered)
        model.zero_grad()
        engine: Any = SimpleNamespace(
            accelerator=process(index, len(SHARES)), task=CoupledTask(), model=model
        )
        shares.append(float(add_coupled_gradients(engine, batches_of(parts, x, y), WEIGHTS)))
        for total, parameter in zip(gradients, model.parameters(), strict=True):
            if parts:
                assert parameter.grad is not None
                total += parameter.grad
            else:
                assert parameter.grad is None
    assert_like(gradients, wanted)
    assert shares == pytest.approx([float(loss) / len(SHARES)] * len(SHARES), rel=1e-5)


def test_a_single_process_does_not_communicate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coupled_step, "gather_object", lambda _: pytest.fail("nothing to gather"))
    model, x, y = examples()
    engine: Any = SimpleNamespace(accelerator=process(0, 1), task=CoupledTask(), model=model)
    share = add_coupled_gradients(engine, batches_of([[0, 1], [2]], x, y % 3), WEIGHTS)
    assert share.ndim == 0


def test_one_batch_of_several_processes_is_compared_with_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x, y = examples()
    asked: list[int] = []

    def gathered(own: list[Any]) -> list[Any]:
        asked.append(len(own[0]))
        with torch.no_grad():
            return [own[0], [(model(x[5:]), {"y": y[5:]})]]

    monkeypatch.setattr(coupled_step, "gather_object", gathered)
    engine: Any = SimpleNamespace(
        accelerator=process(0, 2),
        task=CoupledTask(),
        model=model,
        add_gradients=lambda *_: pytest.fail("the batch is not the step"),
    )
    share = add_coupled_gradients(engine, batches_of([[0, 1, 2, 3, 4]], x, y), WEIGHTS)
    assert asked == [1]
    assert float(share) == pytest.approx(float(at_once(model, x, y)[0]) / 2, rel=1e-5)


def test_the_random_generator_continues_as_after_one_pass() -> None:
    _, x, y = examples()
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    batches = batches_of([[0, 1, 2], [3, 4]], x, y % 5)
    torch.manual_seed(9)
    for batch in batches:
        model(batch.inputs["x"])
    wanted = torch.rand(3)
    torch.manual_seed(9)
    engine: Any = Engine(model, CoupledTask(), None, Accelerator())  # type: ignore[arg-type]
    add_coupled_gradients(engine, batches, WEIGHTS)
    assert torch.equal(torch.rand(3), wanted)


def test_on_a_gpu_its_generator_is_restored_too(monkeypatch: pytest.MonkeyPatch) -> None:
    device, put = torch.device("cuda"), []
    on_gpu = torch.tensor([5, 6, 7])
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda at: on_gpu if at == device else None)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, at: put.append((state, at)))
    state = coupled_step._random_state(device)
    assert len(coupled_step._random_state(torch.device("cpu"))) == 1
    wanted = torch.rand(2)
    coupled_step._set_random_state(device, state)
    assert torch.equal(torch.rand(2), wanted)
    assert put == [(on_gpu, device)]
    coupled_step._set_random_state(torch.device("cpu"), state)
    assert len(put) == 1
