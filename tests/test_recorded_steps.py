"""Which engine is chosen, and how steps are recorded, with what stands for CUDA on a CPU.

Real recording is in tests/gpu/test_graphs.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_graph_engine import SometimesBoth, Task, engine
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_cli.errors import LoraError
from lora_cli.models.offloaded_inputs import OffloadedInputs, OffloadingCheckpoint
from lora_cli.recipe import Learned
from lora_cli.tasks.examples import Batch
from lora_cli.training import choose_engine as choose_engine_module
from lora_cli.training import compiled_layers, graph_engine
from lora_cli.training.choose_engine import (
    WORK_WORTH_COMPILING,
    WORK_WORTH_COMPILING_FUSED_MODULES,
    choose_engine,
)
from lora_cli.training.compiled_layers import (
    CHECKPOINTING_BUDGET,
    GATED_BUDGET,
    MAX_SHAPES,
    MEMORY_BUDGET,
    CompiledLayers,
    repeated_layers,
)
from lora_cli.training.engine import Engine
from lora_cli.training.graph_engine import FREE_MEMORY, Graph, GraphEngine, shape_of
from lora_cli.training.step import train_step


@dataclass
class CallsGraph:
    """Stands for a CUDA graph: it notes the calls that are recorded, and repeats them."""

    calls: list[Any] = field(default_factory=list)

    def replay(self) -> None:
        for call in self.calls:
            call()

    def pool(self) -> str:
        return "pool"


class Cuda:
    """Stands for the device: its memory, its random numbers, and the graph being recorded."""

    recording: CallsGraph | None = None
    total, allocated, peak, reserved = 1000, 100, 100, 0

    @contextmanager
    def graph(self, graph: CallsGraph, *_: Any) -> Iterator[None]:
        self.recording = graph
        yield
        self.recording = None


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    device = Cuda()
    real = Engine.add_gradients

    def add_gradients(self: Engine, batch: Batch, weights: dict[str, Tensor]) -> Tensor:
        if (graph := device.recording) is None:
            return real(self, batch, weights)
        shares = torch.zeros(1)  # a recorded call is not computed
        graph.calls.append(lambda: shares.copy_(real(self, batch, weights)))
        return shares

    monkeypatch.setattr(Engine, "add_gradients", add_gradients)
    stream = SimpleNamespace(wait_stream=lambda _: None)
    generator = SimpleNamespace(clone_state=lambda: None, graphsafe_set_state=lambda _: None)
    fakes = {
        "get_sync_debug_mode": lambda: 0, "set_sync_debug_mode": lambda _: None,
        "current_device": lambda: 0, "default_generators": [generator],
        "Stream": lambda *_: stream, "current_stream": lambda *_: stream,
        "stream": lambda _: nullcontext(), "graph": device.graph, "CUDAGraph": CallsGraph,
        "get_rng_state": lambda _: torch.get_rng_state(),
        "set_rng_state": lambda state, _: torch.set_rng_state(state),
        "mem_get_info": lambda _: (device.total - device.reserved, device.total),
        "memory_reserved": lambda _: device.reserved,
        "memory_allocated": lambda _: device.allocated,
        "max_memory_allocated": lambda _: device.peak,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return device


def numbers(rows: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, rows, 2, generator=generator)
    return Batch({"x": x}, {"y": y}, {"loss": torch.ones(rows)}, rows, list(range(rows)))


class WithTargets(Task):
    """Its loss reads the targets, and draws random numbers as dropout does."""

    def losses(self, model: nn.Module, output: Tensor, batch: Batch) -> Any:
        kept = torch.rand_like(output) > 0.3
        return {"loss": (output * kept - batch.targets["y"].sum(-1, keepdim=True)).square().sum(-1)}


def test_recorded_steps_are_those_of_plain_autograd(cuda: Cuda) -> None:
    plain, recorded = engine(Engine), engine(GraphEngine)
    plain.task = recorded.task = WithTargets()
    random = torch.get_rng_state()
    for number in range(9):
        # steps of several micro-batches: their weights differ, and their gradients add up
        batches = [numbers(2, 10 * number + i) for i in range(1 + number % 3)]
        results = []
        for each in (plain, recorded):
            torch.set_rng_state(random)
            results.append(train_step(each, batches))
        random = torch.get_rng_state()
        assert torch.equal(results[0].loss, results[1].loss)
        assert torch.equal(results[0].grad_norm, results[1].grad_norm)
        for name, parameter in plain.parameters.items():
            assert torch.equal(parameter, recorded.parameters[name]), name
        # at the third micro-batch of the shape, as the first step has shown the gradients
        assert len(recorded.graphs) == (number > 0)
    assert recorded.pool == "pool"
    assert recorded.kind == "1 CUDA graph"


def test_a_replay_reads_another_batch_and_its_weights(cuda: Cuda) -> None:
    own, new = numbers(3, 0), numbers(3, 1)
    graph = Graph(CallsGraph(), own, {"loss": torch.tensor(1.0)}, torch.tensor(7.0))  # type: ignore[arg-type]
    assert graph.replay(new, {"loss": torch.tensor(0.5)}) == 7.0
    assert torch.equal(own.inputs["x"], new.inputs["x"])
    assert torch.equal(own.targets["y"], new.targets["y"])
    assert graph.weights == {"loss": 0.5}


def recording(cuda: Cuda, task: Task, **options: Any) -> Any:
    """Return an engine after as many steps as it needs to try a recording."""
    found = engine(GraphEngine)
    found.task = task
    for name, value in options.items():
        setattr(found, name, value)
    for number in range(4):
        train_step(found, [numbers(2, number)])
    return found


class Forgetful(Task):
    """Computes something else each time, as layers that Python skips at random do."""

    count, change = 0, 1.0

    def losses(self, model: nn.Module, output: Tensor, batch: Batch) -> Any:
        self.count += 1
        return {"loss": output.square().sum(-1) * (1 + self.change * self.count)}


def test_a_step_that_does_not_repeat_is_not_recorded(cuda: Cuda) -> None:
    found = recording(cuda, Forgetful())
    assert not found.graphs
    assert found.kind == (
        "plain autograd; a step cannot be recorded: it computes something else when it is replayed"
    )
    with pytest.raises(LoraError, match="a step cannot be recorded: it computes something else"):
        recording(cuda, Forgetful(), required=True)


def test_sums_without_a_fixed_order_may_round_otherwise(cuda: Cuda) -> None:
    task = Forgetful()
    task.change = 1e-4
    assert recording(cuda, task).graphs
    task = Forgetful()
    task.change = 1e-2
    assert not recording(cuda, task).graphs


class Overflowing(Task):
    def losses(self, model: nn.Module, output: Tensor, batch: Batch) -> Any:
        return {"loss": output.square().sum(-1) * torch.inf}


def test_after_an_overflow_a_later_step_is_tried(cuda: Cuda) -> None:
    found = recording(cuda, Overflowing(), required=True)
    assert not found.graphs
    assert not found.why_not
    found.task = Task()
    train_step(found, [numbers(2, 0)])
    assert found.graphs


def test_what_cannot_be_recorded_is_computed_as_it_is(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def refuse(*_: Any, **__: Any) -> Iterator[None]:
        raise error
        yield

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    error: RuntimeError = RuntimeError("operation not permitted when stream is capturing")
    found = recording(cuda, Task())
    assert "not permitted" in found.why_not
    plain = engine(Engine)
    for number in range(4):
        train_step(plain, [numbers(2, number)])
    for name, parameter in plain.parameters.items():
        assert torch.equal(parameter, found.parameters[name]), name
    error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        recording(cuda, Task())


def test_steps_with_other_parameters_are_not_recorded(cuda: Cuda) -> None:
    found = engine(GraphEngine)
    for rows in (1, 2, 2, 2):  # the second layer has no gradient in the first step
        train_step(found, [numbers(rows, rows)])
    assert found.why_not == "not every step has gradients for the same parameters"


def test_graphs_are_recorded_while_there_is_room(cuda: Cuda) -> None:
    found = engine(GraphEngine)
    shape = shape_of(numbers(2, 0))
    found.gradients = torch.zeros(3)
    found.n_plain_steps[shape] = 3
    cuda.allocated, cuda.peak, cuda.reserved = 200, 250, 300
    cuda.total = int(200 + FREE_MEMORY * 50 + 1)
    assert found._may_record(shape)
    cuda.total -= 1
    assert not found._may_record(shape)
    cuda.total += 1
    found.graphs = dict.fromkeys(range(graph_engine.MAX_GRAPHS - 1))
    assert found._may_record(shape)
    found.graphs[-1] = None
    assert not found._may_record(shape)
    found.graphs = {}
    for name, value in (("gradients", None), ("why_not", "it is rejected")):
        kept = getattr(found, name)
        setattr(found, name, value)
        assert not found._may_record(shape)
        setattr(found, name, kept)
    found.records = False
    assert not found._may_record(shape)
    found.records = True
    found.n_plain_steps[shape] = 2
    assert not found._may_record(shape)


def test_gradients_are_summed_over_processes_in_place(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = engine(GraphEngine)
    train_step(found, [numbers(1, 0)])
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(2))
    reduce = lambda tensor, how: tensor * 2  # noqa: E731 - two processes with the same batches
    device = torch.device("cpu")
    found.accelerator = SimpleNamespace(num_processes=2, reduce=reduce, device=device)
    found.gradients.fill_(3.0)
    late = found.rarely_used[0]
    late.grad = torch.ones_like(late)
    assert found.sum_over_processes(torch.tensor(5.0)) == 10.0
    assert (found.gradients == 6.0).all()
    assert (late.grad == 2.0).all()
    found.accelerator.num_processes = 1
    assert found.sum_over_processes(torch.tensor(5.0)) == 5.0
    assert (found.gradients == 6.0).all()


class Layered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))

    def forward(self, x: Tensor, both: bool) -> Tensor:
        return self.layers[1](self.layers[0](x))  # type: ignore[no-any-return]


def test_layers_are_compiled_within_a_step_alone(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Any] = []
    budget = lambda: torch._functorch.config.activation_memory_budget  # noqa: E731

    def compile_(forward: Any, dynamic: bool | None, **_: Any) -> Any:
        def compiled(x: Tensor) -> Tensor:
            ran.append((torch._dynamo.config.recompile_limit, budget(), dynamic))
            return forward(x)  # type: ignore[no-any-return]

        return compiled

    monkeypatch.setattr(torch, "compile", compile_)
    limits = torch._dynamo.config.recompile_limit, budget()
    found = engine(GraphEngine, Layered)
    found.layers = CompiledLayers(found.model, few_shapes=True)
    first, second = found.model.layers
    second.forward = own = second.forward  # as a wrapper leaves it
    assert found.kind == "plain autograd with compiled layers"
    train_step(found, [numbers(2, 0)])
    assert (
        ran == [(MAX_SHAPES, 1.0, False)] * 2
    )  # few shapes: short texts, which need little memory
    assert "forward" not in first.__dict__
    assert second.__dict__["forward"] == own
    assert (torch._dynamo.config.recompile_limit, budget()) == limits
    found.model(torch.ones(1, 2), False)
    assert len(ran) == 2
    for number in range(4):
        train_step(found, [numbers(2, number)])
    assert found.kind == "1 CUDA graph with compiled layers"
    with CompiledLayers(found.model, few_shapes=False).in_use():
        found.model(torch.ones(1, 2), False)
    assert ran[-1] == (MAX_SHAPES, MEMORY_BUDGET, None)  # any length after the second


@pytest.mark.parametrize("few_shapes", [True, False])
def test_the_compiler_computes_a_layer_again_that_transformers_would(
    few_shapes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, float]] = []

    def compile_(forward: Any, **_: Any) -> Any:
        def compiled(x: Tensor) -> Tensor:
            budget = torch._functorch.config.activation_memory_budget
            seen.append((forward.__self__.gradient_checkpointing, budget))
            return forward(x)  # type: ignore[no-any-return]

        return compiled

    monkeypatch.setattr(torch, "compile", compile_)
    model = Layered()
    for layer in model.layers:
        layer.gradient_checkpointing = True  # type: ignore[assignment]
    with CompiledLayers(model, few_shapes).in_use():
        model(torch.ones(1, 2), False)
    assert seen == [(False, CHECKPOINTING_BUDGET)] * 2
    assert all(layer.gradient_checkpointing for layer in model.layers)


def test_a_compiled_layer_s_input_waits_on_the_host_if_it_would(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept: list[Tensor] = []
    monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)
    monkeypatch.setattr(
        OffloadedInputs, "saved_on_host", lambda self, x: (kept.append(x.clone()), nullcontext())[1]
    )
    model, x = Layered(), torch.ones(1, 2)
    first, second = model.layers
    first._gradient_checkpointing_func = OffloadingCheckpoint(checkpoint)
    second._gradient_checkpointing_func = checkpoint
    wanted = model(x, False)
    with CompiledLayers(model, few_shapes=False).in_use():
        assert torch.equal(model(x, False), wanted)
    (found,) = kept
    assert torch.equal(found, x)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("mlps", [0, 3])
def test_the_kernel_of_gated_mlps_changes_what_is_kept(
    mlps: int, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class GatedMLPs:
        uses = 0

        def __init__(self, layers: list[nn.Module], compiled: bool) -> None:
            assert (len(layers), compiled) == (2, True)
            self.replaced = [None] * mlps
            self.layers: list[nn.Module] = []

        def __enter__(self) -> None:
            GatedMLPs.uses += 1

        def __exit__(self, *_: object) -> None:
            pass

    # the module itself needs Triton
    name = "lora_cli.training.gated_mlp"
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(GatedMLPs=GatedMLPs))
    monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)
    model = Layered()
    for layer in model.layers:
        layer.gradient_checkpointing = again  # type: ignore[assignment]
    layers = CompiledLayers(model, few_shapes=False)
    layers.on_gpu = True
    layers.choose_products(lambda: model(torch.ones(1, 2), False))
    usual = GATED_BUDGET if mlps else MEMORY_BUDGET
    assert layers.memory_budget == (CHECKPOINTING_BUDGET if again else usual)
    by_kernel = " (3 gated MLPs by a kernel of our own)"
    assert layers.kind == "compiled layers" + (by_kernel if mlps else "")
    with layers.in_use():
        assert GatedMLPs.uses == 1
    on_cpu = CompiledLayers(model, few_shapes=False)
    on_cpu.choose_products(lambda: model(torch.ones(1, 2), False))
    assert on_cpu.products == []


@pytest.mark.parametrize("used", [False, True])
def test_the_report_says_whether_attention_has_a_kernel(
    used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = SimpleNamespace(uses_short_attention=lambda compute: (compute(), used)[1])
    monkeypatch.setitem(sys.modules, "lora_cli.training.short_attention", stub)
    monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)
    model = Layered()
    layers = CompiledLayers(model, few_shapes=True)
    layers.on_gpu = True
    layers.choose_products(lambda: model(torch.ones(1, 2), False))
    by_kernel = " (attention over short rows by a kernel of our own)"
    assert layers.kind == "compiled layers" + (by_kernel if used else "")


def test_layers_that_are_alike_are_those_of_lists_of_at_least_two() -> None:
    few = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
    single, unlike = nn.ModuleList([nn.Linear(9, 9)]), nn.ModuleList([nn.Linear(9, 9), nn.ReLU()])
    assert repeated_layers(nn.Sequential(unlike, few, single)) == list(few)
    assert repeated_layers(nn.Sequential(unlike, single)) == []


# ------------------------------------------------------------------------------- choosing

ALONE, BESIDE = WORK_WORTH_COMPILING, WORK_WORTH_COMPILING_FUSED_MODULES


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"kernels": "auto"}, (False, True, False)),
        ({"kernels": "auto", "steps": 999}, (False, True, False)),
        ({"kernels": "auto", "steps": 1000}, (True, True, False)),
        ({"kernels": "auto", "work": 0.999 * ALONE}, (False, True, False)),
        ({"kernels": "auto", "work": 1.001 * ALONE}, (True, True, False)),
        (
            {"kernels": "auto", "work": 0.999 * BESIDE, "fused": 1},
            ("fused", True, False),
        ),
        ({"kernels": "auto", "work": 1.001 * BESIDE, "fused": 1}, (True, True, False)),
        ({"kernels": "auto", "same": False, "fused": 1}, ("fused", False, False)),
        ({"kernels": "auto", "checkpointing": True, "fused": 1}, ("fused", False, False)),
        ({"kernels": "reference", "fused": 1}, None),
        ({"kernels": "auto", "device": "cpu", "fused": 1}, None),
        ({"kernels": "fused", "fused": 1}, (True, True, True)),
        ({"kernels": "fused"}, (True, True, True)),
        ({"kernels": "reference", "steps": 1000}, None),
        ({"kernels": "auto", "checkpointing": True}, None),
        ({"kernels": "auto", "checkpointing": True, "steps": 1000}, (True, False, False)),
        ({"kernels": "fused", "checkpointing": True}, (True, False, True)),
        ({"kernels": "auto", "checkpointing": "auto", "found": True}, None),
        ({"kernels": "auto", "checkpointing": "auto", "found": False}, (False, True, False)),
        ({"kernels": "auto", "checkpointing": "auto"}, (False, True, False)),
        ({"kernels": "fused", "model": SometimesBoth}, (False, True, True)),
        ({"kernels": "fused", "same": False}, (True, False, True)),
        ({"kernels": "auto", "same": False}, None),
        (
            {"kernels": "auto", "same": False, "work": 1.001 * ALONE},
            (True, False, False),
        ),
        ({"kernels": "fused", "device": "cpu"}, None),
        ({"kernels": "auto", "device": "cpu"}, None),
    ],
    ids=str,
)
def test_the_engine_is_what_the_recipe_asks_for(
    cuda: Cuda,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, Any],
    wanted: tuple[bool | str, bool, bool] | None,
) -> None:
    """`wanted`: compiled or `fused` modules instead, recorded, required; None: a plain engine."""
    found_dynamic: list[Any] = []
    fused = SimpleNamespace(layers=[nn.ReLU()] * given.get("fused", 0))
    monkeypatch.setattr(choose_engine_module, "FusedModules", lambda *_, **__: fused)
    monkeypatch.setattr(torch, "compile", lambda _, dynamic, **__: found_dynamic.append(dynamic))
    train = SimpleNamespace(
        kernels=given["kernels"],
        gradient_checkpointing=given.get("checkpointing", False),
        max_grad_norm=0.5,
        distill=None,
    )
    same = given.get("same", True)
    task: Any = SimpleNamespace(
        recipe=SimpleNamespace(train=train), same_in_any_batch=same, waits_for_device=False,
        learned=Learned(checkpointing=given.get("found")),
    )  # fmt: skip
    device = torch.device(given.get("device", "cuda"))
    accelerator: Any = SimpleNamespace(device=device, mixed_precision="no")
    model, optimizer = given.get("model", Layered)(), object()
    # 12 parameters; 2 operations forward and 4 backward
    cost = given.get("work", 0.0) / (6 * 12)
    batches: Any = SimpleNamespace(total_steps=given.get("steps", 10), total_cost=cost)
    found = choose_engine(model, task, optimizer, accelerator, batches)
    assert found.model is model
    assert found.optimizer is optimizer
    assert found.max_grad_norm == 0.5
    if wanted is None:
        assert type(found) is Engine
    else:
        assert isinstance(found, GraphEngine)
        compiled, *others = wanted
        assert [found.records, found.required] == others
        assert isinstance(found.layers, CompiledLayers) is (compiled is True)
        assert (found.layers is fused) == (compiled == "fused")
        assert found_dynamic == [False if same else None] * (2 if compiled is True else 0)


@pytest.mark.parametrize("few_shapes", [True, False])
@pytest.mark.parametrize("bias", ["none", "frozen", "trained"])
def test_the_number_of_rows_is_left_open_where_no_gradient_is_summed_over_them(
    few_shapes: bool, bias: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked: list[tuple[int, int]] = []
    monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)
    monkeypatch.setattr(
        torch._dynamo, "maybe_mark_dynamic", lambda value, axis: marked.append((value.ndim, axis))
    )
    layers = nn.ModuleList(nn.Linear(2, 2, bias=bias != "none") for _ in range(2))
    for layer in layers:
        if bias == "frozen":
            layer.bias.requires_grad_(False)
    monkeypatch.setattr(compiled_layers, "repeated_layers", lambda model: list(model))
    compiled = CompiledLayers(layers, few_shapes)
    x = torch.ones(3, 4, 2)
    for layer, call in zip(layers, compiled.compiled, strict=True):
        assert torch.equal(call(x), layer(x))
        call(x[0])  # no rows of texts
    assert marked == ([(3, 0)] * 2 if few_shapes and bias != "trained" else [])
