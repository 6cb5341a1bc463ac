"""Save, check and restore the state of an optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_cli.errors import Problem
from lora_cli.training.train_state import TrainState

SHAPED_LIKE_PARAMETER = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
MAX_SHOWN = 5  # problems in a message


def described(tensor: Tensor) -> str:
    """Describe the dtype and shape of a tensor: `float32 [4, 32]`."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def optimizer_problems(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], state: TrainState, file: Path
) -> list[Problem]:
    """Return what is wrong with saved tensors: names, dtypes, shapes, step counts, values.

    A manifest only shows that a file is complete, not that its content is right: it may have been
    rewritten.

    Args:
        optimizer: The optimizer to restore.
        tensors: The tensors by `parameter name/key`.
        state: The state of the run, which lists the tensors that were written, and the step.
        file: The file of the tensors.
    """
    parameters: dict[str, Tensor] = {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }
    messages = []
    for path in sorted(tensors.keys() | state.optimizer_tensors.keys() | state.optimizer.keys()):
        name, _, key = path.rpartition("/")
        written, tensor = state.optimizer_tensors.get(path), tensors.get(path)
        if name not in parameters:
            messages.append(f"`{path}` is of a parameter that is not trained")
        elif tensor is None and written is not None:
            messages.append(f"`{path}` is missing")
        elif tensor is None:
            continue  # a value that is not a tensor
        elif described(tensor) != written:
            expectation = "it was not written" if written is None else f"{written} was written"
            messages.append(f"`{path}` is {described(tensor)}, and {expectation}")
        elif key in SHAPED_LIKE_PARAMETER and tensor.shape != parameters[name].shape:
            shape = list(parameters[name].shape)
            messages.append(f"`{path}` is {described(tensor)}, for a parameter of shape {shape}")
        elif wrong := _wrong_values(key, tensor, state.step):
            messages.append(f"`{path}` {wrong}")
    n_hidden = len(messages) - MAX_SHOWN
    shown = messages[:MAX_SHOWN] + ([f"{n_hidden} more tensors are wrong"] if n_hidden > 0 else [])
    return [Problem(what, str(file)) for what in shown]


def _wrong_values(key: str, tensor: Tensor, step: int) -> str:
    """Return why no optimizer can have written these values, or ""."""
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        return "contains NaN or infinity"
    if key == "step" and not 0 <= float(tensor.max()) <= step:
        return f"counts {float(tensor.max()):g} as the number of steps, and the run has made {step}"
    if key == "exp_avg_sq" and bool((tensor < 0).any()):
        return "is a mean of squares, and has negative entries"
    return ""


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the optimizer's tensors and its other values, each by `parameter name/key`."""
    tensors: dict[str, Tensor] = {}
    other_values: dict[str, Any] = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{name}/{key}"] = value.detach().cpu().contiguous().clone()
                else:
                    other_values[f"{name}/{key}"] = value
    return tensors, other_values


def load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], other_values: dict[str, Any]
) -> None:
    """Restore an optimizer's tensors and other values, which `optimizer_problems` has checked."""
    values: dict[str, dict[str, Any]] = {}
    for path, value in (*tensors.items(), *other_values.items()):
        name, _, key = path.rpartition("/")
        values.setdefault(name, {})[key] = value
    for group in optimizer.param_groups:
        steps_on_gpu = group.get("fused") or group.get("capturable")
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in values.get(name, {}).items():
                if isinstance(value, Tensor) and (key != "step" or steps_on_gpu):
                    value = value.to(parameter.device)
                optimizer.state[parameter][key] = value
