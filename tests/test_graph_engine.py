"""The gradients that recorded steps write to; recording itself is in tests/gpu/test_graphs.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from lora_cli.errors import LoraError
from lora_cli.tasks.examples import Batch
from lora_cli.training import graph_engine
from lora_cli.training.compiled_layers import CompiledLayers, repeated_layers
from lora_cli.training.fused_modules import FusedModules, ReplacedForward
from lora_cli.training.graph_engine import GraphEngine, shape_of
from lora_cli.training.step import train_step


class SometimesBoth(nn.Module):
    """Uses its second layer only where the input asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 1), nn.Linear(2, 1)

    def forward(self, x: torch.Tensor, both: bool) -> torch.Tensor:
        return self.first(x) + (self.second(x) if both else 0.0)


class Recipe:
    def at(self, key: str) -> str:
        return key


class Task:
    loss_weights = train_loss_weights = {"loss": 1.0}
    recipe = Recipe()

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        return model(batch.inputs["x"], len(batch.rows) > 1)

    output = forward  # nothing is frozen
    couples_examples = False

    def losses(self, model: nn.Module, output: torch.Tensor, batch: Batch) -> Any:
        return {"loss": output.square().sum(-1)}


def batch(rows: int) -> Batch:
    x = torch.arange(2.0 * rows).view(rows, 2) + 1
    return Batch({"x": x}, {}, {"loss": torch.ones(rows)}, rows, list(range(rows)))


def engine(kind: Any, architecture: Any = SometimesBoth) -> Any:
    torch.manual_seed(0)
    model = architecture()
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare_optimizer(torch.optim.AdamW(model.parameters(), lr=0.1))
    return kind(model, Task(), optimizer, accelerator, 1.0)


def test_a_parameter_that_is_used_later_is_trained_as_by_plain_autograd(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lora_cli.training.engine import Engine

    monkeypatch.setattr(torch.cuda, "Stream", lambda *_: None)  # nothing is recorded on a CPU
    monkeypatch.setattr(GraphEngine, "_may_record", lambda *_: False)
    plain, flat = engine(Engine), engine(GraphEngine)
    for rows in (1, 2, 1, 2, 2, 1):
        results = [train_step(each, [batch(rows)]) for each in (plain, flat)]
        assert results[0].idle == results[1].idle
        assert torch.equal(results[0].grad_norm, results[1].grad_norm)
        for name, parameter in plain.parameters.items():
            assert torch.equal(parameter, flat.parameters[name]), name


def test_gradients_take_no_memory_between_steps_where_no_graph_writes_to_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_the_cpu(monkeypatch)
    recording, other = engine(GraphEngine), engine(GraphEngine)
    other.records = False
    for rows in (1, 2):
        for each in (recording, other):
            train_step(each, [batch(rows), batch(rows)])
    for name, parameter in recording.parameters.items():
        assert torch.equal(parameter, other.parameters[name]), name
    assert other.gradients is None
    assert all(parameter.grad is None for parameter in other.parameters.values())


def test_modules_whose_kernels_fail_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("Failed to find C compiler")

    from lora_cli.training.engine import Engine

    on_the_cpu(monkeypatch)
    plain, other = engine(Engine, Stack), engine(GraphEngine, Stack)
    other.layers = FusedModules(other.model, autocast=False)
    other.layers.groups = [ReplacedForward(other.model.layers, Failing)]
    other.layers.kind, other.records = "2 gated MLPs by one kernel each", False
    assert other.kind == "plain autograd with 2 gated MLPs by one kernel each"
    for each in (plain, other):
        torch.manual_seed(1)
        train_step(each, [batch(2), batch(3)])
    assert other.kind.startswith(
        "plain autograd; the kernels of gated MLPs and norms cannot be used"
    )
    assert "Failed to find C compiler" in other.kind
    for name, parameter in plain.parameters.items():
        assert torch.equal(parameter, other.parameters[name]), name


def test_gradients_that_are_added_at_once_are_those_added_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_the_cpu(monkeypatch)
    plain, at_once = engine(GraphEngine), engine(GraphEngine)
    weights = {"loss": torch.tensor(0.5)}
    for made, add in (
        (plain, plain.add_gradients),
        (at_once, at_once._add_all_at_once),
    ):
        for parameter in made.parameters.values():
            parameter.grad = torch.full_like(parameter, 3.0)  # of the micro-batches before
        kept = {name: p.grad for name, p in made.parameters.items()}
        add(batch(2), weights)
        assert all(made.parameters[name].grad is grad for name, grad in kept.items())
    for name, parameter in plain.parameters.items():
        assert (parameter.grad != 3).all()
        torch.testing.assert_close(at_once.parameters[name].grad, parameter.grad)


def test_micro_batches_of_each_shape_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    on_the_cpu(monkeypatch)
    made = engine(GraphEngine)
    for rows in (2, 1, 2, 2):
        train_step(made, [batch(rows)])
    assert made.n_plain_steps == {shape_of(batch(1)): 1, shape_of(batch(2)): 3}


@pytest.mark.parametrize("rarely", [True, False])
def test_the_update_is_recorded_where_every_parameter_always_has_a_gradient(
    rarely: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_the_cpu(monkeypatch)
    update = SimpleNamespace(replay=lambda loss: ("recorded", loss))
    monkeypatch.setattr(graph_engine, "can_be_recorded", lambda _: True)
    monkeypatch.setattr(graph_engine, "RecordedUpdate", lambda *_: update)
    made = engine(GraphEngine)
    result = train_step(made, [batch(1 if rarely else 2)])
    assert bool(made.rarely_used) == rarely
    assert made.update is None  # nothing has been recorded yet
    made.graphs["a shape"] = "its graph"
    result = made.finish_step(result.loss)
    assert made.update is (None if rarely else update)
    assert (result[0] == "recorded") == (not rarely)


def test_batches_of_one_shape_have_one_graph() -> None:
    assert shape_of(batch(2)) == shape_of(batch(2))
    assert shape_of(batch(2)) != shape_of(batch(3))


def test_the_layers_that_are_alike_are_found() -> None:
    layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))
    model = nn.Sequential(nn.Linear(9, 9), nn.ModuleDict({"encoder": layers}))
    assert repeated_layers(model) == list(layers)
    assert repeated_layers(nn.Linear(2, 2)) == []
    outer = nn.ModuleList(nn.Sequential(nn.Linear(1, 1), layers) for _ in range(2))
    both = nn.ModuleDict({"encoder": model, "decoder": outer})
    assert repeated_layers(both) == [*layers, *outer], "none of those within a layer"


class Stack(nn.Module):
    """Layers that use dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.Dropout()) for _ in "ab")

    def forward(self, x: torch.Tensor, both: bool) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_: None)
    monkeypatch.setattr(GraphEngine, "_may_record", lambda *_: False)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: torch.get_rng_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, *_: torch.set_rng_state(state))


def test_layers_that_cannot_be_compiled_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_cli.training.engine import Engine

    def compiled(forward: Any, **_: Any) -> Any:
        def fail(*inputs: Any) -> Any:
            forward(*inputs)  # which draws random numbers
            raise ValueError("no such operation")

        return fail

    on_the_cpu(monkeypatch)
    monkeypatch.setattr(torch, "compile", compiled)
    plain, other = engine(Engine, Stack), engine(GraphEngine, Stack)
    other.layers = CompiledLayers(other.model, few_shapes=True)
    for each in (plain, other):
        torch.manual_seed(1)
        for rows in (3, 2):
            train_step(each, [batch(rows), batch(rows + 1)])
    assert "cannot be compiled: ValueError: no such operation" in other.kind
    for name, parameter in plain.parameters.items():
        assert torch.equal(parameter, other.parameters[name]), name


def test_named_kernels_that_cannot_be_compiled_are_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_the_cpu(monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda forward, **_: None)
    other = engine(GraphEngine, Stack)
    other.layers, other.required = CompiledLayers(other.model, few_shapes=True), True
    with pytest.raises(LoraError, match="layers cannot be compiled"):
        train_step(other, [batch(2)])
    assert other.model(batch(2).inputs["x"], False).shape == (2, 2), "its own forward is back"
