"""Steps on a GPU as CUDA graphs: what a small step waits for is mostly Python.

A step of RoBERTa-large on short sentences is 3,000 kernels, which a GPU computes in 5 ms and Python
launches in 50. The forward and the backward pass of a micro-batch are recorded once for each shape
that recurs, and replayed from then on: the same kernels on the same numbers, so that the result is
the same, bit for bit. In long runs the layers are compiled first, which joins small kernels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_cli.errors import LoraError, counted
from lora_cli.tasks.examples import Batch
from lora_cli.training.engine import Engine, sum_gradients
from lora_cli.training.memory_and_disk import is_out_of_memory
from lora_cli.unexpected_errors import own_words

SEEN = 2  # a shape is recorded when it occurs again after so many times
MOST_GRAPHS = 32
COMPILED_SHAPES = 64  # torch compiles a layer anew for each shape, and by default gives up after 8
ROOM = 8.0  # a graph keeps its activations: so many times as much has to be free. Where they are
# large, so are the kernels, and there is nothing to gain
EQUAL = 1e-3  # of the largest gradient: what a replay may differ by, where sums have no fixed order
Shape = tuple[Any, ...]


@dataclass
class Graph:
    """The recorded forward and backward pass of a micro-batch of one shape."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    weights: dict[str, Tensor]
    loss: Tensor

    def replay(self, batch: Batch, weights: dict[str, Tensor]) -> Tensor:
        """Compute another micro-batch of the same shape, and return its share of the loss."""
        for own, new in ((self.batch.inputs, batch.inputs), (self.batch.targets, batch.targets)):
            for name, tensor in own.items():
                tensor.copy_(new[name], non_blocking=True)
        for term, weight in self.weights.items():
            weight.copy_(weights[term])
        self.graph.replay()
        return self.loss


@dataclass
class GraphEngine(Engine):
    """Computes gradients by recorded graphs, where a shape recurs.

    Args:
        compile_layers: Whether to compile the model's layers, which takes some seconds a shape.
        required: Whether it is an error if steps cannot be recorded.
    """

    compile_layers: bool = False
    required: bool = False
    why_not: str = ""
    """Why no graphs are recorded, if that was found to be impossible."""
    graphs: dict[Shape, Graph] = field(default_factory=dict)
    seen: Counter[Shape] = field(default_factory=Counter)
    gradients: Tensor | None = None
    """The gradients of the parameters that had one in the first step, which are views of it: graphs
    write there."""
    rarely_used: list[nn.Parameter] = field(default_factory=list)
    """The parameters that had none in the first step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.stream = torch.cuda.Stream(self.accelerator.device)  # type: ignore[no-untyped-call]
        self.pool: Any = None
        self.layers = repeated_layers(self.model) if self.compile_layers else []
        self.compiled = [torch.compile(layer.forward, dynamic=False) for layer in self.layers]

    @property
    def kind(self) -> str:
        """How the steps are computed, for the report."""
        compiled = ", with compiled layers" if self.layers else ""
        if self.why_not:
            return f"plain autograd{compiled}; a step cannot be recorded: {self.why_not}"
        return f"{counted(len(self.graphs), 'CUDA graph')}{compiled}"

    def add_gradients(self, batch: Batch, weights: dict[str, Tensor]) -> Tensor:
        """Add the gradients of a micro-batch to those of the step so far."""
        shape = shape_of(batch)
        if (graph := self.graphs.get(shape)) is not None:
            return graph.replay(batch, weights)
        self.seen[shape] += 1
        if self._may_record(shape):
            self._record(shape, batch, weights)
            if (graph := self.graphs.get(shape)) is not None:
                return graph.replay(batch, weights)
            if self.required and self.why_not:
                what = f"a step cannot be recorded: {self.why_not}"
                hint = "`--set train.kernels=auto` computes such steps as they are"
                raise LoraError(what, self.task.recipe.at("train.kernels"), hint)
        with self._compiled_layers():
            return super().add_gradients(batch, weights)

    def _may_record(self, shape: Shape) -> bool:
        again = self.seen[shape] > SEEN and self.gradients is not None
        if not again or self.why_not or len(self.graphs) >= MOST_GRAPHS:
            return False
        device = self.accelerator.device
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        peak, now = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
        return free - now > ROOM * (peak - now)

    def _record(self, shape: Shape, batch: Batch, weights: dict[str, Tensor]) -> None:
        """Record a micro-batch; gradients and random numbers are afterwards as they were."""
        assert self.gradients is not None
        inputs = {name: tensor.clone() for name, tensor in batch.inputs.items()}
        targets = {name: tensor.clone() for name, tensor in batch.targets.items()}
        own = Batch(inputs, targets, batch.items, batch.cost, batch.rows)
        own_weights = {term: weight.clone() for term, weight in weights.items()}
        device = self.accelerator.device
        gradients, random = self.gradients.clone(), torch.cuda.get_rng_state(device)
        graph = torch.cuda.CUDAGraph()
        try:
            with self._compiled_layers():
                self.stream.wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(self.stream):  # libraries choose their kernels once
                    super().add_gradients(own, own_weights)
                torch.cuda.current_stream(device).wait_stream(self.stream)
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                    loss = super().add_gradients(own, own_weights)
            self.pool = graph.pool()
            recorded = Graph(graph, own, own_weights, loss)
            replayed, plain = self._both(recorded, random)
            if any(parameter.grad is not None for parameter in self.rarely_used):
                self.why_not = "not every step has gradients for the same parameters"
            elif not plain.isfinite().all():
                pass  # fp16 has overflowed: nothing can be compared, and a later step is tried
            elif (replayed - plain).abs().max() <= EQUAL * plain.abs().max():
                self.graphs[shape] = recorded
            else:  # such as a layer that Python skips at random, which a graph would skip forever
                self.why_not = "it computes something else when it is replayed"
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self.why_not = own_words(error)
        self.gradients.copy_(gradients)
        torch.cuda.set_rng_state(random, device)

    def _both(self, recorded: Graph, random: Tensor) -> list[Tensor]:
        """Return the gradients of a replay, and those of a plain step."""
        assert self.gradients is not None
        device, found = self.accelerator.device, []
        for compute in (recorded.replay, super().add_gradients):
            self.gradients.zero_()
            torch.cuda.set_rng_state(random, device)
            with self._compiled_layers():
                compute(recorded.batch, recorded.weights)
            found.append(self.gradients.clone())
        return found

    def sum_over_processes(self, loss: Tensor) -> Tensor:
        """Add up the gradients of all processes in each of them, and return their summed loss."""
        if self.gradients is None or self.accelerator.num_processes == 1:
            return super().sum_over_processes(loss)
        torch.distributed.all_reduce(self.gradients)
        if self.rarely_used:
            sum_gradients(self.rarely_used, self.accelerator)
        total: Tensor = self.accelerator.reduce(loss, "sum")
        return total

    def clear_gradients(self) -> None:
        """Set the gradients to zero, in the memory that the graphs write to."""
        if self.gradients is None:  # after the first step it is known who has a gradient
            present = [p for p in self.parameters.values() if p.grad is not None]
            self.rarely_used = [p for p in self.parameters.values() if p.grad is None]
            sizes = [p.numel() for p in present]
            self.gradients = torch.zeros(sum(sizes), device=self.accelerator.device)
            parts = torch.split(self.gradients, sizes)
            for parameter, part in zip(present, parts, strict=True):
                parameter.grad = part.view_as(parameter)
        self.gradients.zero_()
        for parameter in self.rarely_used:
            parameter.grad = None

    @contextmanager
    def _compiled_layers(self) -> Iterator[None]:
        """Let the model's layers run compiled within the context."""
        if not self.layers:
            yield
            return
        kept = [layer.forward for layer in self.layers]
        try:
            with torch._dynamo.config.patch(recompile_limit=COMPILED_SHAPES):
                for layer, compiled in zip(self.layers, self.compiled, strict=True):
                    layer.forward = compiled
                yield
        finally:
            for layer, forward in zip(self.layers, kept, strict=True):
                layer.forward = forward


def shape_of(batch: Batch) -> Shape:
    """Return what two batches have to have in common to be computed by one graph."""
    tensors = [*batch.inputs.items(), *batch.targets.items()]
    return tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors)


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of which a model has many alike: most of its work, and one compilation."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    alike = [layers for layers in lists if len({type(layer) for layer in layers}) == 1]
    return list(max(alike, key=lambda layers: sum(1 for _ in layers.parameters()), default=[]))
