"""Gradient checkpointing whose layers' inputs wait in the memory of the host.

With gradient checkpointing, the inputs of all layers are most of what a long row keeps on the GPU.
Here each of them is copied to the host while the GPU computes the layer, and back while it computes
the gradients of the layer above. The numbers stay the same.
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
class _OnHost:
    """A layer's input on the host, and its copy on the GPU once the backward pass needs it."""

    host: Tensor
    below: weakref.ref[_OnHost] | None
    """The input of the layer below, whose gradients are computed next."""
    device: Tensor | None = None
    arrived: torch.cuda.Event | None = None


class OffloadedInputs:
    """Keeps inputs of layers on the host between the forward and the backward pass."""

    def __init__(self) -> None:
        self.stream: Any = None  # that of the copies
        self.last: weakref.ref[_OnHost] | None = None

    def wrap(self, function: Function, position: int = 0) -> Function:
        """Return the function with one of its inputs saved on the host, if autograd saves it.

        Args:
            function: It computes a layer.
            position: That of the input among its arguments.
        """

        def call(*arguments: Any, **named: Any) -> Any:
            with self.saved_on_host(arguments[position] if len(arguments) > position else None):
                return function(*arguments, **named)

        return call

    def saved_on_host(self, x: Any) -> AbstractContextManager[Any]:
        """Return a context in which autograd saves a tensor on the host, if it saves it."""
        if not isinstance(x, Tensor) or not x.is_cuda:
            return nullcontext()

        # not x itself, which autograd would keep on the GPU together with the function
        wanted = _place(x)

        def pack(saved: Tensor) -> Tensor | _OnHost:
            return self._to_host(saved) if _place(saved) == wanted else saved

        def unpack(saved: Tensor | _OnHost) -> Tensor:
            return saved if isinstance(saved, Tensor) else self._to_device(saved)

        return saved_tensors_hooks(pack, unpack)

    def _to_host(self, x: Tensor) -> _OnHost:
        if self.stream is None:
            self.stream = torch.cuda.Stream(x.device)  # type: ignore[no-untyped-call]
        host = torch.empty_like(x, device="cpu", pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self.stream):
            host.copy_(x, non_blocking=True)
        x.record_stream(self.stream)  # its memory is used again only when it has been copied
        kept = _OnHost(host, self.last)
        self.last = weakref.ref(kept)
        return kept

    def _to_device(self, kept: _OnHost) -> Tensor:
        self.last = None  # the backward pass has begun: what is kept from now on is of another step
        self._fetch(kept)
        below = kept.below() if kept.below else None
        if below is not None:
            self._fetch(below)
        assert kept.device is not None
        assert kept.arrived is not None
        torch.cuda.current_stream(kept.device.device).wait_event(kept.arrived)
        found, kept.device = kept.device, None
        return found

    def _fetch(self, kept: _OnHost) -> None:
        """Begin to copy an input back, unless that has begun."""
        if kept.device is not None:
            return
        kept.device = torch.empty_like(kept.host, device=self.stream.device, pin_memory=False)
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            kept.device.copy_(kept.host, non_blocking=True)
        kept.device.record_stream(self.stream)
        kept.arrived = self.stream.record_event()


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Return the address, shape, strides and dtype of a tensor, which tell it from others."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


class OffloadingCheckpoint:
    """Computes a layer as torch's checkpointing function does, with its input on the host."""

    def __init__(self, checkpoint: Function) -> None:
        self.inputs = OffloadedInputs()
        self.call = self.inputs.wrap(checkpoint, position=1)

    def __call__(self, layer: Function, *arguments: Any, **named: Any) -> Any:
        """Return what the layer computes; it is called again in the backward pass."""
        return self.call(layer, *arguments, **named)


def offload_inputs(model: nn.Module) -> None:
    """Let the layers of a model with gradient checkpointing keep their inputs on the host."""
    name = "_gradient_checkpointing_func"  # transformers' and diffusers' name for it
    found: dict[Function, OffloadingCheckpoint] = {}
    for module in model.modules():
        checkpoint: Function | None = getattr(module, name, None)
        if checkpoint is not None and not isinstance(checkpoint, OffloadingCheckpoint):
            found.setdefault(checkpoint, OffloadingCheckpoint(checkpoint))
            setattr(module, name, found[checkpoint])
