"""Find the frozen layers below the first trained one by tracing the model, and skip them.

If nothing below a layer is trained (only a head, or adapters in upper layers, or frozen lower
layers), an example's input to that layer is the same in every epoch, as long as the modules below
apply no dropout. So these run in evaluation mode, and a batch may carry the hidden states with it:
then the layers below are not computed.

    layers = find_frozen_layers(model, run_batch)
    with layers.recording() as states:   # the hidden states that the frozen layers compute
        model(**inputs)
    with layers.skipping(states):        # the same outputs, without computing the frozen layers
        model(**inputs)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name for it
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

Name = str


@dataclass(frozen=True)
class FrozenLayers:
    """The frozen layers and modules below the first trained layer of a model.

    Args:
        model: The model.
        frozen: Names of the layers below the first trained one.
        below: Names of the modules that run in evaluation mode.
        skipped: Names of the layers that need not be computed, each with the form of its output:
            None for a tensor, or the length of a tuple.
        last: The last frozen layer of each stack, whose output is recorded. Stacks whose layers
            pass more than hidden states to each other have none.
        first: The first trained module, if it comes after all layers: its input is recorded
            instead, which for a pooled text is a single vector.
    """

    model: nn.Module
    frozen: tuple[Name, ...]
    below: tuple[Name, ...]
    skipped: Mapping[Name, int | None]
    last: tuple[Name, ...]
    first: Name | None = None

    @property
    def recorded(self) -> tuple[Name, ...]:
        """The modules whose output, or for `first` whose input, is recorded."""
        return self.last if self.first is None else (self.first,)

    def recording_last(self) -> FrozenLayers:
        """Return a copy that records the outputs of the last frozen layers instead of one input."""
        return replace(self, first=None)

    def evaluate(self) -> None:
        """Put the modules below into evaluation mode, so that they apply no dropout."""
        for name in self.below:
            self.model.get_submodule(name).training = False

    @contextmanager
    def recording(self) -> Iterator[dict[Name, Tensor]]:
        """Record the hidden states of the last forward pass within the context, by module name."""
        states: dict[Name, Tensor] = {}

        def record_input(_module: nn.Module, args: Any, kwargs: Any) -> None:
            states[self.recorded[0]] = _first_tensor(args, kwargs).detach()

        def record_output(name: Name) -> Callable[..., None]:
            def record(_module: nn.Module, _args: Any, output: Any) -> None:
                states[name] = _first_tensor((output,), {}).detach()

            return record

        with ExitStack() as hooks:
            for name in self.recorded:
                module = self.model.get_submodule(name)
                if self.first is None:
                    handle = module.register_forward_hook(record_output(name))
                else:
                    handle = module.register_forward_pre_hook(record_input, with_kwargs=True)
                hooks.callback(handle.remove)
            yield states

    @contextmanager
    def skipping(self, states: Mapping[Name, Tensor]) -> Iterator[None]:
        """Use the given hidden states instead of computing the frozen layers.

        Args:
            states: The hidden states of each module of `recorded`, or of `last`. They are padded
                with zeros to the width of the batch, since nothing reads padding.
        """

        def enter(_module: nn.Module, args: Any, kwargs: Any) -> Any:
            (state,) = states.values()  # the input of `first`
            if args:
                return (_padded(state, args[0]), *args[1:]), kwargs
            name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
            return args, {**kwargs, name: _padded(state, kwargs[name])}

        with ExitStack() as undo:
            for name, form in self.skipped.items():
                layer = self.model.get_submodule(name)
                undo.callback(_restore_forward, layer, layer.__dict__.get("forward"))
                layer.forward = _skipping(states.get(name), form)
            if self.first is not None and self.first in states:
                module = self.model.get_submodule(self.first)
                handle = module.register_forward_pre_hook(enter, with_kwargs=True)
                undo.callback(handle.remove)
            yield


def _skipping(state: Tensor | None, form: int | None) -> Callable[..., Any]:
    """Return a forward that returns a state, or its input, in the form of the layer's output."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = _first_tensor(args, kwargs)
        output = hidden if state is None else _padded(state, hidden)
        return output if form is None else (output, *[None] * (form - 1))

    return forward


def _restore_forward(layer: nn.Module, instance_forward: Any) -> None:
    """Restore the forward that a layer had."""
    del layer.forward
    if instance_forward is not None:
        layer.forward = instance_forward


def _padded(state: Tensor, like: Tensor) -> Tensor:
    """Pad states (B, T, …) with zeros to the number of tokens of `like`."""
    missing = like.shape[1] - state.shape[1] if state.ndim == 3 and like.ndim == 3 else 0
    return F.pad(state, (0, 0, 0, missing)) if missing > 0 else state


def _first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the first tensor among arguments, or the first of a tuple of outputs."""
    values = [*args, *kwargs.values()]
    first = next((v for v in values if isinstance(v, Tensor)), None)
    if first is None and values and isinstance(values[0], tuple):
        first = values[0][0]
    assert first is not None, "a layer without a tensor was found to be none"
    return first


# ------------------------------------------------------------------ finding the frozen layers


@dataclass
class _Trace:
    """When each module began and ended in one forward pass, and its inputs and outputs."""

    began: dict[Name, list[int]] = field(default_factory=dict)
    ended: dict[Name, list[int]] = field(default_factory=dict)
    inputs: dict[Name, Any] = field(default_factory=dict)
    outputs: dict[Name, Any] = field(default_factory=dict)
    time: int = 0

    def ran_once_before(self, name: Name, time: int) -> bool:
        ended = self.ended.get(name, [])
        return len(ended) == 1 and ended[0] < time


def find_frozen_layers(model: nn.Module, run_batch: Callable[[], Any]) -> FrozenLayers | None:
    """Return the frozen layers below the first trained layer of a model.

    Args:
        model: The model, with its adapter attached.
        run_batch: Runs the model on a batch; this forward pass shows the order of the modules.

    Returns:
        None if the first layer is trained, as with adapters in all layers.
    """
    stacks = _stacks(model)
    owners = {n for n, m in model.named_modules() if _owns_trained(m)}
    trained = {name for layers in stacks.values() for name in layers if _holds_any(name, owners)}
    if all(layers[0] in trained for layers in stacks.values()):
        return None
    trace = _run_traced(model, run_batch)
    start = _start_of_training(owners, trace)
    leading = {stack: _leading(layers, trained, trace, start) for stack, layers in stacks.items()}
    leading = {stack: layers for stack, layers in leading.items() if layers}
    if not leading:
        return None
    skipped: dict[Name, int | None] = {}
    last = []
    for stack, layers in leading.items():
        forms = {name: _form(trace.outputs[name], layers == stacks[stack]) for name in layers}
        if -1 not in forms.values():
            skipped |= forms
            last.append(layers[-1])
    frozen = [name for layers in leading.values() for name in layers]
    around = _around(model, list(leading))
    within_frozen = [
        n for n, _ in model.named_modules() if any(n.startswith(f"{top}.") for top in frozen)
    ]
    finished = [
        name
        for name, ends in trace.ended.items()
        # a module may run again later: T5 calls one dropout before and after its layers
        if name
        and min(ends) < start
        and not _holds_any(name, owners)
        and not any(name == top or name.startswith(f"{top}.") for top in trained)
    ]
    below = tuple(dict.fromkeys([*around, *finished, *within_frozen]))
    first = _first_after_layers(trace, start, stacks) if last else None
    return FrozenLayers(model, tuple(frozen), below, skipped, tuple(last), first)


def _stacks(model: nn.Module) -> dict[Name, list[Name]]:
    """Return the names of the layers in each of the outermost stacks of layers."""
    stacks: dict[Name, list[Name]] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{other}.") for other in stacks):
            continue
        layers = dict(module.named_children())
        same_type = len({type(layer) for layer in layers.values()}) == 1
        if isinstance(module, nn.ModuleList) or (isinstance(module, nn.Sequential) and same_type):
            with_weights = [n for n, m in layers.items() if next(m.parameters(), None) is not None]
            if len(with_weights) == len(layers) > 0:
                stacks[name] = [f"{name}.{n}" if name else n for n in layers]
    return stacks


def _owns_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def _holds_any(name: Name, owners: set[Name]) -> bool:
    return any(owner == name or owner.startswith(f"{name}.") for owner in owners)


def _run_traced(model: nn.Module, run_batch: Callable[[], Any]) -> _Trace:
    """Run a model once in evaluation mode, and record when its modules run."""
    trace = _Trace()

    def begin(name: Name) -> Callable[..., None]:
        def record(_module: nn.Module, args: Any, kwargs: Any) -> None:
            trace.time += 1
            trace.began.setdefault(name, []).append(trace.time)
            trace.inputs[name] = (args, kwargs)

        return record

    def end(name: Name) -> Callable[..., None]:
        def record(_module: nn.Module, _args: Any, output: Any) -> None:
            trace.time += 1
            trace.ended.setdefault(name, []).append(trace.time)
            trace.outputs[name] = output

        return record

    modes = {module: module.training for module in model.modules()}
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            pre = module.register_forward_pre_hook(begin(name), with_kwargs=True)
            hooks.callback(pre.remove)
            hooks.callback(module.register_forward_hook(end(name)).remove)
        model.eval()
        try:
            with torch.no_grad():
                run_batch()
        finally:
            for module, mode in modes.items():
                module.training = mode
    return trace


def _start_of_training(owners: set[Name], trace: _Trace) -> int:
    """Return the time at which the first module that reads a trained parameter begins.

    A parameter may be read without a call of the module that owns it. Then a module around the
    owner reads it, at the earliest when that module begins.
    """
    starts = []
    for name in owners:
        while name not in trace.began and name:
            name = name.rpartition(".")[0]
        starts.append(min(trace.began.get(name, [0])))
    return min(starts, default=0)


def _leading(layers: list[Name], trained: set[Name], trace: _Trace, start: int) -> list[Name]:
    """Return the leading layers of a stack that run once each, in order, before `start`."""
    frozen: list[Name] = []
    for name in layers:
        before = trace.ended[frozen[-1]][0] if frozen else 0
        if name in trained or not trace.ran_once_before(name, start):
            break
        if trace.began[name][0] < before or _form(trace.outputs[name], True) == -1:
            break
        frozen.append(name)
    return frozen


def _form(output: Any, is_last: bool) -> int | None:
    """Return the form of a layer's output, or -1 if hidden states alone cannot replace it.

    Args:
        output: A tensor, or a tuple whose first value is a tensor.
        is_last: Whether no further layer of the stack follows that could read the other values (as
            T5's first layer passes its position bias to the layers above it).
    """
    if isinstance(output, Tensor):
        return None
    if not isinstance(output, tuple) or not output or not isinstance(output[0], Tensor):
        return -1
    further_values = [value for value in output[1:] if value is not None]
    return -1 if further_values and not is_last else len(output)


def _around(model: nn.Module, stacks: list[Name]) -> list[Name]:
    """Return the modules around stacks of layers: some apply dropout to the first layer's input.

    Modules that implement gradient checkpointing themselves, as in older architectures, are left
    out: they checkpoint only in training mode.
    """
    modules = []
    for stack in stacks:
        layers = model.get_submodule(stack).children()
        checkpoints_itself = not all(
            isinstance(layer, GradientCheckpointingLayer) for layer in layers
        )
        name = stack
        while name:
            checkpointing = getattr(model.get_submodule(name), "gradient_checkpointing", False)
            if not (checkpoints_itself and checkpointing):
                modules.append(name)
            name = name.rpartition(".")[0]
    return modules


def _first_after_layers(
    trace: _Trace, start: int, stacks: Mapping[Name, list[Name]]
) -> Name | None:
    """Return the first trained module, if it is called once and no layer runs after it begins."""
    layers = [name for names in stacks.values() for name in names]
    if any(end >= start for name in layers for end in trace.ended.get(name, [])):
        return None
    name = next(name for name, begins in trace.began.items() if start in begins)
    args, kwargs = trace.inputs[name]
    has_tensor = any(isinstance(value, Tensor) for value in [*args[:1], *kwargs.values()])
    return name if name and has_tensor and len(trace.began[name]) == 1 else None
