"""The layers of a model below the first that is trained: found by running it, and passed over.

Where nothing below a layer is trained (a head alone, adapters in upper layers, frozen lower ones),
what enters that layer is the same for an example in every epoch, if the modules below it draw no
dropout. So they run in evaluation mode, and a batch may bring these hidden states along: then the
layers below are not computed.

    layers = find_frozen_layers(model, run)
    with layers.recording() as states:   # the hidden states, as the frozen layers compute them
        model(**inputs)
    with layers.entering(states):        # the same outputs, without computing the frozen layers
        model(**inputs)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name for it
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

Name = str


@dataclass(frozen=True)
class FrozenLayers:
    """What lies below the first trained layer of a model.

    Args:
        model: The model.
        frozen: Names of the layers below it.
        below: Names of the modules that run in evaluation mode.
        passed: Names of the layers that need not be computed, each with the form of its output:
            None for a tensor, or how many values a tuple has.
        last: Of each stack of layers, the last one that is frozen: its output is kept. None of a
            stack whose layers hand each other more than hidden states.
        first: The module that is trained first, if it comes behind all layers: what enters it is
            kept instead, which for a pooled text is one vector.
    """

    model: nn.Module
    frozen: tuple[Name, ...]
    below: tuple[Name, ...]
    passed: Mapping[Name, int | None]
    last: tuple[Name, ...]
    first: Name | None = None

    @property
    def kept(self) -> tuple[Name, ...]:
        """The modules whose output, or for `first` whose input, is kept."""
        return self.last if self.first is None else (self.first,)

    def without_first(self) -> FrozenLayers:
        """Return the same, keeping what the last layers compute."""
        return replace(self, first=None)

    def evaluate(self) -> None:
        """Put the modules below into evaluation mode, so that they draw no dropout."""
        for name in self.below:
            self.model.get_submodule(name).training = False

    @contextmanager
    def recording(self) -> Iterator[dict[Name, Tensor]]:
        """Collect the hidden states of the forward passes within the context.

        Of several passes those of the last are left.
        """
        found: dict[Name, Tensor] = {}

        def keep_input(_module: nn.Module, args: Any, kwargs: Any) -> None:
            found[self.kept[0]] = _first_tensor(args, kwargs).detach()

        def keep_output(name: Name) -> Callable[..., None]:
            def keep(_module: nn.Module, _args: Any, output: Any) -> None:
                found[name] = _first_tensor((output,), {}).detach()

            return keep

        with ExitStack() as hooks:
            for name in self.kept:
                module = self.model.get_submodule(name)
                if self.first is None:
                    handle = module.register_forward_hook(keep_output(name))
                else:
                    handle = module.register_forward_pre_hook(keep_input, with_kwargs=True)
                hooks.callback(handle.remove)
            yield found

    @contextmanager
    def entering(self, states: Mapping[Name, Tensor]) -> Iterator[None]:
        """Let hidden states take the place of what the frozen layers would compute.

        Args:
            states: Of each of `kept`, or of `last`. Where the rows of the batch are wider, they are
                filled with zeros: that is padding, which nothing reads.
        """

        def enter(_module: nn.Module, args: Any, kwargs: Any) -> Any:
            (state,) = states.values()  # the one that enters `first`
            if args:
                return (_filled(state, args[0]), *args[1:]), kwargs
            name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
            return args, {**kwargs, name: _filled(state, kwargs[name])}

        with ExitStack() as undo:
            for name, form in self.passed.items():
                layer = self.model.get_submodule(name)
                undo.callback(_put_back, layer, layer.__dict__.get("forward"))
                layer.forward = _passing(states.get(name), form)
            if self.first is not None and self.first in states:
                module = self.model.get_submodule(self.first)
                handle = module.register_forward_pre_hook(enter, with_kwargs=True)
                undo.callback(handle.remove)
            yield


def _passing(state: Tensor | None, form: int | None) -> Callable[..., Any]:
    """Return a layer's forward that returns a state, or its own input, in the layer's form."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = _first_tensor(args, kwargs)
        output = hidden if state is None else _filled(state, hidden)
        return output if form is None else (output, *[None] * (form - 1))

    return forward


def _put_back(layer: nn.Module, own: Any) -> None:
    """Give a layer back the forward that it had."""
    del layer.forward
    if own is not None:
        layer.forward = own


def _filled(state: Tensor, like: Tensor) -> Tensor:
    """Return states (B, T, …) filled with zeros to as many tokens as others have."""
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


# -------------------------------------------------------------------------------------- found


@dataclass
class _Trace:
    """What modules did in one forward pass, in order."""

    began: dict[Name, list[int]] = field(default_factory=dict)
    ended: dict[Name, list[int]] = field(default_factory=dict)
    inputs: dict[Name, Any] = field(default_factory=dict)
    outputs: dict[Name, Any] = field(default_factory=dict)
    time: int = 0

    def ran_once_before(self, name: Name, time: int) -> bool:
        ended = self.ended.get(name, [])
        return len(ended) == 1 and ended[0] < time


def find_frozen_layers(model: nn.Module, run: Callable[[], Any]) -> FrozenLayers | None:
    """Return what lies below the first trained layer of a model, if a whole layer does.

    Args:
        model: The model, with its adapter attached.
        run: Computes a batch. The order in which modules run is that of this forward pass.

    Returns:
        None where a layer that is trained comes first, as with adapters in all layers.
    """
    stacks = _stacks(model)
    owners = {n for n, m in model.named_modules() if _trains_itself(m)}
    trained = {name for layers in stacks.values() for name in layers if _holds_any(name, owners)}
    if all(layers[0] in trained for layers in stacks.values()):
        return None
    trace = _traced(model, run)
    start = _start_of_training(owners, trace)
    leading = {stack: _leading(layers, trained, trace, start) for stack, layers in stacks.items()}
    leading = {stack: layers for stack, layers in leading.items() if layers}
    if not leading:
        return None
    passed: dict[Name, int | None] = {}
    last = []
    for stack, layers in leading.items():
        forms = {name: _form(trace.outputs[name], layers == stacks[stack]) for name in layers}
        if -1 not in forms.values():
            passed |= forms
            last.append(layers[-1])
    frozen = [name for layers in leading.values() for name in layers]
    around = _around(model, list(leading))
    inside = [n for n, _ in model.named_modules() if any(n.startswith(f"{top}.") for top in frozen)]
    done = [
        name
        for name, ends in trace.ended.items()
        # one that runs again later is T5's dropout, before and behind its layers
        if name
        and min(ends) < start
        and not _holds_any(name, owners)
        and not any(name == top or name.startswith(f"{top}.") for top in trained)
    ]
    below = tuple(dict.fromkeys([*around, *done, *inside]))
    first = _behind_all(trace, start, stacks) if last else None
    return FrozenLayers(model, tuple(frozen), below, passed, tuple(last), first)


def _stacks(model: nn.Module) -> dict[Name, list[Name]]:
    """Return the outermost lists of layers, each with the names of its layers."""
    found: dict[Name, list[Name]] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{other}.") for other in found):
            continue
        layers = dict(module.named_children())
        alike = len({type(layer) for layer in layers.values()}) == 1
        if isinstance(module, nn.ModuleList) or (isinstance(module, nn.Sequential) and alike):
            with_weights = [n for n, m in layers.items() if next(m.parameters(), None) is not None]
            if len(with_weights) == len(layers) > 0:
                found[name] = [f"{name}.{n}" if name else n for n in layers]
    return found


def _trains_itself(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def _holds_any(name: Name, owners: set[Name]) -> bool:
    return any(owner == name or owner.startswith(f"{name}.") for owner in owners)


def _traced(model: nn.Module, run: Callable[[], Any]) -> _Trace:
    """Run a model once in evaluation mode, and note what its modules do."""
    trace = _Trace()

    def begin(name: Name) -> Callable[..., None]:
        def note(_module: nn.Module, args: Any, kwargs: Any) -> None:
            trace.time += 1
            trace.began.setdefault(name, []).append(trace.time)
            trace.inputs[name] = (args, kwargs)

        return note

    def end(name: Name) -> Callable[..., None]:
        def note(_module: nn.Module, _args: Any, output: Any) -> None:
            trace.time += 1
            trace.ended.setdefault(name, []).append(trace.time)
            trace.outputs[name] = output

        return note

    modes = {module: module.training for module in model.modules()}
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            pre = module.register_forward_pre_hook(begin(name), with_kwargs=True)
            hooks.callback(pre.remove)
            hooks.callback(module.register_forward_hook(end(name)).remove)
        model.eval()
        try:
            with torch.no_grad():
                run()
        finally:
            for module, mode in modes.items():
                module.training = mode
    return trace


def _start_of_training(owners: set[Name], trace: _Trace) -> int:
    """Return when the first module begins that reads a trained parameter.

    A parameter may be read without a call of the module that has it: then it is read by a module
    around that, at the earliest when this begins.
    """
    starts = []
    for name in owners:
        while name not in trace.began and name:
            name = name.rpartition(".")[0]
        starts.append(min(trace.began.get(name, [0])))
    return min(starts, default=0)


def _leading(layers: list[Name], trained: set[Name], trace: _Trace, start: int) -> list[Name]:
    """Return the first layers of a stack that run in order, once each, before what is trained."""
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
    """Return the form of a layer's output, or -1 if it cannot be made from hidden states alone.

    Args:
        output: A tensor, or a tuple whose first value is one.
        is_last: Whether no other layer of the stack follows, that would read the other values (as
            T5's first layer hands its bias of positions to those above it).
    """
    if isinstance(output, Tensor):
        return None
    if not isinstance(output, tuple) or not output or not isinstance(output[0], Tensor):
        return -1
    others = [value for value in output[1:] if value is not None]
    return -1 if others and not is_last else len(output)


def _around(model: nn.Module, stacks: list[Name]) -> list[Name]:
    """Return the modules around stacks of layers: some draw dropout on what enters the first.

    One that computes its layers' activations again in the backward pass (as older architectures
    do it themselves) does so in training mode alone, and stays in that.
    """
    found = []
    for stack in stacks:
        layers = model.get_submodule(stack).children()
        own = not all(isinstance(layer, GradientCheckpointingLayer) for layer in layers)
        name = stack
        while name:
            checkpoints = getattr(model.get_submodule(name), "gradient_checkpointing", False)
            if not (own and checkpoints):
                found.append(name)
            name = name.rpartition(".")[0]
    return found


def _behind_all(trace: _Trace, start: int, stacks: Mapping[Name, list[Name]]) -> Name | None:
    """Return the module that is trained first, if no layer runs after it and it is called once."""
    layers = [name for names in stacks.values() for name in names]
    if any(end >= start for name in layers for end in trace.ended.get(name, [])):
        return None
    name = next(name for name, begins in trace.began.items() if start in begins)
    args, kwargs = trace.inputs[name]
    has_tensor = any(isinstance(value, Tensor) for value in [*args[:1], *kwargs.values()])
    return name if name and has_tensor and len(trace.began[name]) == 1 else None
