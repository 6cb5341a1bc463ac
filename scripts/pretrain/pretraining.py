"""What the scripts that pretrain small models share: a schedule by the clock, and fast steps.

A GPU computes a step of a small model faster than Python can launch its kernels. `Steps` therefore
records the whole step (forward, backward, clipping, optimizer) as a CUDA graph, once for each shape
of its inputs, and replays it from then on. Without a GPU the same step is computed as it is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SHARD = "15MB"


@dataclass
class Schedule:
    """Decides how far a run is, by its time or its steps, whichever is used up first.

    Args:
        seconds: The time that the run may take, from `start` on.
        steps: The most steps that it may take, or None.
        peak: The highest learning rate.
        warmup: The steps in which the learning rate rises.
        start: The clock when the time begins to count.
    """

    seconds: float
    steps: int | None
    peak: float
    warmup: int = 200
    start: float = field(default_factory=time.monotonic)
    begun: float = field(default_factory=time.monotonic)

    def share(self, step: int) -> float:
        """Return how much of the run is over after some steps: 1 where it ends."""
        now = time.monotonic()
        left = max(1e-9, self.start + self.seconds - self.begun)
        by_time = (now - self.begun) / left
        by_steps = step / self.steps if self.steps else 0.0
        return min(1.0, max(by_time, by_steps))

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0: a rise, then half a cosine."""
        warmup = min(self.warmup, max(1, (self.steps or self.warmup) // 10))
        rise = min(1.0, (step + 1) / warmup)
        return self.peak * rise * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.share(step))))


def make_optimizer(
    parameters: list[nn.Parameter], decay: float, betas: tuple[float, float], record: bool
) -> torch.optim.AdamW:
    """Return AdamW whose learning rate is a tensor, so that a recorded step can follow it."""
    rate = torch.zeros((), device=parameters[0].device)
    if parameters[0].device.type == "cuda":
        return torch.optim.AdamW(
            parameters, lr=rate, betas=betas, weight_decay=decay, fused=True, capturable=record
        )
    return torch.optim.AdamW(parameters, lr=rate, betas=betas, weight_decay=decay, foreach=False)


class Recorded:
    """Calls a function of tensors, which is recorded once for each shape of its inputs.

    The first call of a shape is a rehearsal, in which libraries choose their kernels; the second is
    recorded as a CUDA graph, and that is replayed from then on. What a function returns lies in
    memory that the next call may overwrite. A function that cannot be recorded, since it waits for
    the GPU, is called as it is, which is printed once.

    Args:
        function: Returns a tensor or a tuple of some.
        record: Whether it may be recorded; never is without a GPU.
        prepare: Called before a recording.
    """

    def __init__(
        self, function: Callable[..., Any], record: bool, prepare: Callable[[], None] | None = None
    ) -> None:
        self.function, self.prepare = function, prepare or (lambda: None)
        self.record = record and torch.cuda.is_available()
        self.graphs: dict[Any, tuple[Any, list[Tensor], Any]] = {}
        self.seen: set[Any] = set()
        if self.record:
            self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def __call__(self, *inputs: Tensor) -> Any:
        """Return what the function returns for some inputs."""
        shape = tuple((tuple(tensor.shape), tensor.dtype) for tensor in inputs)
        if self.record and shape not in self.seen:
            self.seen.add(shape)
            return self._rehearse(*inputs)
        if self.record and shape not in self.graphs:
            self._record(shape, *inputs)
        if shape not in self.graphs:
            return self.function(*inputs)
        graph, own, result = self.graphs[shape]
        for mine, given in zip(own, inputs, strict=True):
            mine.copy_(given)
        graph.replay()
        return result

    def _rehearse(self, *inputs: Tensor) -> Any:
        mode = torch.cuda.get_sync_debug_mode()
        self.stream.wait_stream(torch.cuda.current_stream())
        try:
            torch.cuda.set_sync_debug_mode("error")  # a graph cannot hold what waits for the GPU
            with torch.cuda.stream(self.stream):
                result = self.function(*inputs)
        except RuntimeError as error:
            self._give_up(error)
        else:
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.current_stream().wait_stream(self.stream)
        return self.function(*inputs)

    def _record(self, shape: Any, *inputs: Tensor) -> None:
        own = [tensor.clone() for tensor in inputs]
        self.prepare()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                result = self.function(*own)
        except RuntimeError as error:
            self._give_up(error)
            # torch's random numbers still wait for the recording to end, which a copy does not
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())
        else:
            self.graphs[shape] = (graph, own, result)
        self.prepare()

    def _give_up(self, error: RuntimeError) -> None:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise error
        self.record = False
        print(f"steps are not recorded: {str(error).splitlines()[0]}", flush=True)


class Steps:
    """Computes steps of training: `loss = steps(rate, *inputs)`.

    Args:
        loss_of: Returns the loss of some input tensors; it must not wait for the GPU.
        parameters: What is trained.
        decay: The weight decay of AdamW.
        betas: Those of AdamW.
        clip: The largest norm of the gradients.
        record: Whether steps are recorded as CUDA graphs, where there is a GPU.
    """

    def __init__(
        self,
        loss_of: Callable[..., Tensor],
        parameters: list[nn.Parameter],
        *,
        decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.98),
        clip: float = 1.0,
        record: bool = True,
    ) -> None:
        self.loss_of, self.parameters, self.clip = loss_of, parameters, clip
        self.optimizer = make_optimizer(parameters, decay, betas, record)
        self.compute = Recorded(self._compute, record, self.optimizer.zero_grad)

    def __call__(self, rate: float, *inputs: Tensor) -> Tensor:
        """Train one step, and return its loss, which the next step may overwrite."""
        for group in self.optimizer.param_groups:
            group["lr"].fill_(rate)
        loss: Tensor = self.compute(*inputs)
        return loss

    def _compute(self, *inputs: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss_of(*inputs)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        return loss.detach()


def train_on_rows(name: str, steps: Steps, schedule: Schedule, batch: int, *tables: Tensor) -> None:
    """Train on random rows of some tables until the schedule ends, and print the losses.

    Args:
        name: Of what is trained, as it is printed.
        steps: Computes the steps.
        schedule: Says when it ends.
        batch: Rows of a step.
        tables: The inputs of a step, each with all rows (N, ...).
    """
    device = tables[0].device
    total, since, last = torch.zeros((), device=device), 0, 0.0
    for step in range(10**9):
        rows = torch.randint(len(tables[0]), (batch,), device=device)
        total += steps(schedule.rate(step), *(table[rows] for table in tables))
        since += 1
        if step % 10 == 9 and total.is_cuda:
            torch.cuda.synchronize()  # so that the clock measures the GPU
        share = schedule.share(step + 1)
        if share >= last + 0.1 or share == 1.0:
            last, spent = share, time.monotonic() - schedule.start
            loss = f"{float(total) / since:.4f}"
            print(f"{name}: {share:4.0%}  step {step + 1}  loss {loss}  {spent:.0f} s", flush=True)
            total, since = torch.zeros_like(total), 0
        if share == 1.0:
            return


def computing_in(device: str) -> torch.autocast:
    """Return the precision of training: bfloat16 on a GPU, float32 elsewhere.

    CPUs without bfloat16 of their own take minutes for a step of it. Weights that autocast has
    converted are not kept, since a recorded step would find them old.
    """
    return torch.autocast(
        device, dtype=torch.bfloat16, enabled=device == "cuda", cache_enabled=False
    )


def count_parameters(*parts: nn.Module) -> int:
    """Return the number of parameters of some models."""
    return sum(parameter.numel() for part in parts for parameter in part.parameters())


def save(model: Any, folder: Path) -> Any:
    """Write a model in bfloat16, in small files; return it as it was written."""
    model = model.to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=SHARD)
    return model
