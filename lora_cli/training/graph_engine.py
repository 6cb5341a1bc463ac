"""Steps on a GPU as CUDA graphs, since small steps mostly wait for Python.

A step of RoBERTa-large on short sentences has 3,000 kernels, which a GPU computes in 5 ms and
Python launches in 50. The forward and backward pass of a micro-batch are recorded once for each
shape that recurs, and replayed from then on. A replay runs the same kernels on the same values, so
its result is the same, bit for bit. The update of the weights is recorded too
(`recorded_update.py`). In long runs the layers are compiled first, which fuses small kernels. In
short runs, some modules of a language model use fused kernels (`fused_modules.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_cli.errors import LoraError, counted
from lora_cli.tasks.examples import Batch
from lora_cli.training.compiled_layers import CompiledLayers
from lora_cli.training.engine import Engine, sum_gradients
from lora_cli.training.fused_modules import FusedModules
from lora_cli.training.recorded_update import CAPTURE_MODE, RecordedUpdate, can_be_recorded
from lora_cli.training.resource_errors import is_out_of_memory
from lora_cli.training.seeds import random_state_restored
from lora_cli.unexpected_errors import own_words

PLAIN_STEPS = 2  # of a shape, before it is recorded
MAX_GRAPHS = 32
# A graph keeps its activations, so this many times their size has to be free. If they are larger,
# the kernels are long, and a graph would gain nothing.
FREE_MEMORY = 8.0
# how much a replay may differ, as a share of the largest gradient: some sums have no fixed order
TOLERANCE = 1e-3
AS_IT_IS = "`--set train.kernels=auto` computes such steps as they are"
Shape = tuple[Any, ...]


@dataclass
class Graph:
    """The recorded forward and backward pass of a micro-batch of one shape."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    weights: dict[str, Tensor]
    shares: Tensor

    def replay(self, batch: Batch, weights: dict[str, Tensor]) -> Tensor:
        """Compute another micro-batch of the same shape, and return its shares of the loss."""
        for own, new in ((self.batch.inputs, batch.inputs), (self.batch.targets, batch.targets)):
            for name, tensor in own.items():
                tensor.copy_(new[name], non_blocking=True)
        for term, weight in self.weights.items():
            weight.copy_(weights[term])
        self.graph.replay()
        return self.shares


@dataclass
class GraphEngine(Engine):
    """Computes gradients by recorded graphs, where a shape recurs.

    Args:
        layers: The model's layers, if they are to run compiled, or its modules with fused kernels.
        records: Whether steps may be recorded.
        required: Whether it is an error if layers cannot be compiled or steps cannot be recorded.
    """

    layers: CompiledLayers | FusedModules | None = None
    records: bool = True
    required: bool = False
    why_not: str = ""
    """Why no graphs are recorded, if recording failed."""
    why_not_compiled: str = ""
    """Why the layers run by the model's own code, if compiling them or the kernels failed."""
    is_compiled: bool = False
    """Whether the layers have been compiled for the first batch."""
    graphs: dict[Shape, Graph] = field(default_factory=dict)
    n_plain_steps: Counter[Shape] = field(default_factory=Counter)
    gradients: Tensor | None = None
    """The memory to which graphs write gradients; those of the parameters are views of it. It has a
    part for each parameter that had a gradient in the first step. None if no graphs are recorded,
    so that gradients take no memory between steps."""
    rarely_used: list[nn.Parameter] = field(default_factory=list)
    """The parameters that had no gradient in the first step."""
    update: RecordedUpdate | None = None
    """The end of a step, once it is recorded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.stream = torch.cuda.Stream(self.accelerator.device)  # type: ignore[no-untyped-call]
        self.pool: Any = None

    @property
    def kind(self) -> str:
        """How the steps are computed, for the report."""
        parts = [counted(len(self.graphs), "CUDA graph") if self.graphs else "plain autograd"]
        if self.layers:
            parts.append(self.layers.kind)
        kind = " with ".join(parts)
        if self.why_not_compiled:
            kind += f"; {self.why_not_compiled}"
        if self.why_not:
            kind += f"; a step cannot be recorded: {self.why_not}"
        return kind

    def add_gradients(self, batch: Batch, weights: dict[str, Tensor]) -> Tensor:
        """Add the gradients of a micro-batch to those of the step so far."""
        if self.layers and not self.is_compiled:
            return self._compile(batch, weights)
        shape = shape_of(batch)
        if (graph := self.graphs.get(shape)) is not None:
            return graph.replay(batch, weights)
        self.n_plain_steps[shape] += 1
        if self._may_record(shape):
            self._record(shape, batch, weights)
            if (graph := self.graphs.get(shape)) is not None:
                return graph.replay(batch, weights)
            if self.required and self.why_not:
                what = f"a step cannot be recorded: {self.why_not}"
                raise LoraError(what, self.task.recipe.at("train.kernels"), AS_IT_IS)
        with self._layers_in_use():
            return super().add_gradients(batch, weights)

    def _compile(self, batch: Batch, weights: dict[str, Tensor]) -> Tensor:
        """Compute the first micro-batch, for which the layers are compiled, if possible."""
        self.is_compiled, device = True, self.accelerator.device
        random = torch.cuda.get_rng_state(device)
        try:
            self._choose_products(batch)
            with self._layers_in_use():
                return super().add_gradients(batch, weights)
        except Exception as error:  # the compiler raises exceptions of any kind
            if is_out_of_memory(error):
                raise
            assert self.layers is not None
            self.why_not_compiled = f"{self.layers.failure}: {own_words(error)}"
            self.layers = None
            if self.required:
                where = self.task.recipe.at("train.kernels")
                raise LoraError(self.why_not_compiled, where, AS_IT_IS) from error
        for parameter in self.parameters.values():
            parameter.grad = None
        torch.cuda.set_rng_state(random, device)
        return super().add_gradients(batch, weights)

    def _choose_products(self, batch: Batch) -> None:
        """Let the layers choose which products to compute together."""
        assert self.layers is not None
        with random_state_restored(self.accelerator.device), self.accelerator.autocast():
            self.layers.choose_products(lambda: self.task.output(self.model, batch))

    def _may_record(self, shape: Shape) -> bool:
        again = self.n_plain_steps[shape] > PLAIN_STEPS and self.gradients is not None
        if not self.records or not again or self.why_not or len(self.graphs) >= MAX_GRAPHS:
            return False
        device = self.accelerator.device
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        peak, now = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
        return free - now > FREE_MEMORY * (peak - now)

    def _record(self, shape: Shape, batch: Batch, weights: dict[str, Tensor]) -> None:
        """Record a micro-batch, and restore the gradients and the random state afterwards."""
        assert self.gradients is not None
        inputs = {name: tensor.clone() for name, tensor in batch.inputs.items()}
        targets = {name: tensor.clone() for name, tensor in batch.targets.items()}
        own = Batch(inputs, targets, batch.items, batch.cost, batch.rows)
        own_weights = {term: weight.clone() for term, weight in weights.items()}
        device = self.accelerator.device
        gradients, random = self.gradients.clone(), torch.cuda.get_rng_state(device)
        graph = torch.cuda.CUDAGraph()
        try:
            with self._layers_in_use():
                self.stream.wait_stream(torch.cuda.current_stream(device))
                with (
                    torch.cuda.stream(self.stream),
                    _no_synchronisation(),
                ):  # a warm-up, in which libraries choose their kernels
                    super().add_gradients(own, own_weights)
                torch.cuda.current_stream(device).wait_stream(self.stream)
                with torch.cuda.graph(graph, self.pool, self.stream, CAPTURE_MODE):
                    shares = self._add_all_at_once(own, own_weights)
            self.pool = graph.pool()
            recorded = Graph(graph, own, own_weights, shares)
            replayed, plain = self._both(recorded, random)
            if any(parameter.grad is not None for parameter in self.rarely_used):
                self.why_not = "not every step has gradients for the same parameters"
            elif not plain.isfinite().all():
                pass  # fp16 has overflowed: nothing can be compared, and a later step is tried
            elif (replayed - plain).abs().max() <= TOLERANCE * plain.abs().max():
                self.graphs[shape] = recorded
            else:  # such as a layer that Python skips at random, which the graph would always skip
                self.why_not = "it computes something else when it is replayed"
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self.why_not = own_words(error)
            # torch's generator still waits for the recording to end, but a copy of it does not
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())
        self.gradients.copy_(gradients)
        torch.cuda.set_rng_state(random, device)

    def _both(self, recorded: Graph, random: Tensor) -> list[Tensor]:
        """Return the gradients of a replay and of a plain step."""
        assert self.gradients is not None
        device, gradients = self.accelerator.device, []
        for compute in (recorded.replay, super().add_gradients):
            self.gradients.zero_()
            torch.cuda.set_rng_state(random, device)
            with self._layers_in_use():
                compute(recorded.batch, recorded.weights)
            gradients.append(self.gradients.clone())
        return gradients

    def _add_all_at_once(self, batch: Batch, weights: dict[str, Tensor]) -> Tensor:
        """Do the same as plain `add_gradients`, but add up the gradients by few kernels."""
        sums = {p: p.grad for p in self.parameters.values() if p.grad is not None}
        try:
            for parameter in sums:
                parameter.grad = None
            shares = super().add_gradients(batch, weights)
            added = {p: p.grad for p in sums if p.grad is not None}
            if added:
                torch._foreach_add_([sums[p] for p in added], list(added.values()))
        finally:
            for parameter, total in sums.items():
                parameter.grad = total
        return shares

    def finish_step(self, loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Clip the gradients, update the weights, and clear the gradients."""
        if self.update is None and self.graphs and not self.rarely_used:
            optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
            if can_be_recorded(optimizer):
                self.update = RecordedUpdate(super().finish_step, optimizer, loss, self.stream)
        return self.update.replay(loss) if self.update else super().finish_step(loss)

    def sum_over_processes(self, shares: Tensor) -> Tensor:
        """Sum the gradients over all processes, and return the sum of their shares of the loss."""
        if self.gradients is None or self.accelerator.num_processes == 1:
            return super().sum_over_processes(shares)
        torch.distributed.all_reduce(self.gradients)
        if self.rarely_used:
            sum_gradients(self.rarely_used, self.accelerator)
        total: Tensor = self.accelerator.reduce(shares, "sum")
        return total

    def clear_gradients(self) -> None:
        """Set the gradients to zero, in the memory to which the graphs write."""
        if not self.records:
            super().clear_gradients()
            return
        if self.gradients is None:  # after the first step, which shows who has a gradient
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

    def _layers_in_use(self) -> AbstractContextManager[None]:
        return self.layers.in_use() if self.layers else nullcontext()


@contextmanager
def _no_synchronisation() -> Iterator[None]:
    """Raise a RuntimeError if the host waits for the device, for example to read a tensor's values.

    A graph cannot contain that, and a failed recording would leave torch's memory in disorder.
    """
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def shape_of(batch: Batch) -> Shape:
    """Return the shapes and dtypes that two batches must share to be computed by one graph."""
    tensors = [*batch.inputs.items(), *batch.targets.items()]
    return tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors)
