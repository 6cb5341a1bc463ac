"""Offload the inputs of layers to host memory, for gradient checkpointing.

With gradient checkpointing, the inputs of all layers take most of the GPU memory for long rows.
Here, each input is copied to the host while the GPU computes the layer, and back while it computes
the gradients of the layer above. The values do not change.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

Function = Callable[..., Any]


@dataclass(eq=False)
class _Offloaded:
    """A layer's input in host memory, and its copy on the GPU when the backward pass needs it."""

    host: Tensor
    below: weakref.ref[_Offloaded] | None
    """The input of the layer below, whose gradients are computed next."""
    device: Tensor | None = None
    arrived: torch.cuda.Event | None = None


class OffloadedInputs:
    """Keeps the inputs of layers on the host between the forward and the backward pass."""

    def __init__(self) -> None:
        self.stream: Any = None  # the CUDA stream for copies
        self.last: weakref.ref[_Offloaded] | None = None

    def wrap(self, function: Function, position: int = 0) -> Function:
        """Wrap a function so that one of its inputs is saved on the host, if autograd saves it.

        Args:
            function: Computes a layer.
            position: The position of the input among the arguments.
        """

        def call(*arguments: Any, **named: Any) -> Any:
            with self.saved_on_host(arguments[position] if len(arguments) > position else None):
                return function(*arguments, **named)

        return call

    def saved_on_host(self, x: Any) -> AbstractContextManager[Any]:
        """Return a context in which autograd saves the tensor x on the host, if it saves it."""
        if not isinstance(x, Tensor) or not x.is_cuda:
            return nullcontext()

        # the closure must not refer to x, or autograd would keep it on the GPU
        identity = _identity(x)

        def pack(saved: Tensor) -> Tensor | _Offloaded:
            return self._to_host(saved) if _identity(saved) == identity else saved

        def unpack(saved: Tensor | _Offloaded) -> Tensor:
            return saved if isinstance(saved, Tensor) else self._to_device(saved)

        return saved_tensors_hooks(pack, unpack)

    def _to_host(self, x: Tensor) -> _Offloaded:
        if self.stream is None:
            self.stream = torch.cuda.Stream(x.device)  # type: ignore[no-untyped-call]
        host = torch.empty_like(x, device="cpu", pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self.stream):
            host.copy_(x, non_blocking=True)
        x.record_stream(self.stream)  # its memory is only reused after the copy
        offloaded = _Offloaded(host, self.last)
        self.last = weakref.ref(offloaded)
        return offloaded

    def _to_device(self, offloaded: _Offloaded) -> Tensor:
        self.last = None  # the backward pass has begun: later inputs belong to another step
        self._fetch(offloaded)
        below = offloaded.below() if offloaded.below else None
        if below is not None:
            self._fetch(below)
        assert offloaded.device is not None
        assert offloaded.arrived is not None
        torch.cuda.current_stream(offloaded.device.device).wait_event(offloaded.arrived)
        device_copy, offloaded.device = offloaded.device, None
        return device_copy

    def _fetch(self, offloaded: _Offloaded) -> None:
        """Start to copy an input back to the GPU, unless that was started before."""
        if offloaded.device is not None:
            return
        offloaded.device = torch.empty_like(
            offloaded.host, device=self.stream.device, pin_memory=False
        )
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            offloaded.device.copy_(offloaded.host, non_blocking=True)
        offloaded.device.record_stream(self.stream)
        offloaded.arrived = self.stream.record_event()


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Return the address, shape, strides and dtype of a tensor, which identify it."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


class OffloadingCheckpoint:
    """Computes a layer like torch's checkpointing function, but keeps its input on the host."""

    def __init__(self, checkpoint: Function) -> None:
        self.inputs = OffloadedInputs()
        self.call = self.inputs.wrap(checkpoint, position=1)

    def __call__(self, layer: Function, *arguments: Any, **named: Any) -> Any:
        """Return the output of the layer; it is called again in the backward pass."""
        return self.call(layer, *arguments, **named)


def offload_inputs(model: nn.Module) -> None:
    """Let the layers of a model with gradient checkpointing keep their inputs on the host."""
    name = "_gradient_checkpointing_func"  # the attribute in transformers and diffusers
    wrapped: dict[Function, OffloadingCheckpoint] = {}
    for module in model.modules():
        checkpoint: Function | None = getattr(module, name, None)
        if checkpoint is not None and not isinstance(checkpoint, OffloadingCheckpoint):
            wrapped.setdefault(checkpoint, OffloadingCheckpoint(checkpoint))
            setattr(module, name, wrapped[checkpoint])
