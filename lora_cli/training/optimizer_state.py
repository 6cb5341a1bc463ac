"""What an optimizer keeps of each parameter, as it is saved, checked and put back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_cli.errors import Problem
from lora_cli.training.train_state import TrainState

LIKE_PARAMETER = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
MOST = 5  # problems that are named


def described(tensor: Tensor) -> str:
    """Return dtype and shape of a tensor: `float32 [4, 32]`."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def optimizer_problems(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], state: TrainState, file: Path
) -> list[Problem]:
    """Return what is wrong with saved tensors: names, dtypes, shapes, counts, values.

    A manifest that was rewritten says that the file is complete; it does not say that it is right.

    Args:
        optimizer: The optimizer that they are for.
        tensors: The tensors by `parameter name/key`.
        state: Says which tensors were written, and after how many steps.
        file: Where they stand.
    """
    parameters: dict[str, Tensor] = {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }
    found = []
    for path in sorted(tensors.keys() | state.optimizer_tensors.keys() | state.optimizer.keys()):
        name, _, key = path.rpartition("/")
        written, tensor = state.optimizer_tensors.get(path), tensors.get(path)
        if name not in parameters:
            found.append(f"`{path}` is of a parameter that is not trained")
        elif tensor is None and written is not None:
            found.append(f"`{path}` is missing")
        elif tensor is None:
            continue  # a value that is no tensor
        elif described(tensor) != written:
            was = "it was not written" if written is None else f"{written} was written"
            found.append(f"`{path}` is {described(tensor)}, and {was}")
        elif key in LIKE_PARAMETER and tensor.shape != parameters[name].shape:
            shape = list(parameters[name].shape)
            found.append(f"`{path}` is {described(tensor)}, for a parameter of shape {shape}")
        elif wrong := _wrong_values(key, tensor, state.step):
            found.append(f"`{path}` {wrong}")
    more = len(found) - MOST
    shown = found[:MOST] + ([f"{more} more tensors are wrong"] if more > 0 else [])
    return [Problem(what, str(file)) for what in shown]


def _wrong_values(key: str, tensor: Tensor, step: int) -> str:
    """Return what no optimizer can have written, or nothing."""
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        return "contains NaN or infinity"
    if key == "step" and not 0 <= float(tensor.max()) <= step:
        return f"counts {float(tensor.max()):g} as the number of steps, and the run has made {step}"
    if key == "exp_avg_sq" and bool((tensor < 0).any()):
        return "is a mean of squares, and has negative entries"
    return ""


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the optimizer's tensors by `parameter name/key`, and its other values likewise."""
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{name}/{key}"] = value.detach().cpu().contiguous().clone()
                else:
                    rest[f"{name}/{key}"] = value
    return tensors, rest


def load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], rest: dict[str, Any]
) -> None:
    """Put saved tensors, and other values, into an optimizer; `optimizer_problems` comes first."""
    values: dict[str, dict[str, Any]] = {}
    for path, value in (*tensors.items(), *rest.items()):
        name, _, key = path.rpartition("/")
        values.setdefault(name, {})[key] = value
    for group in optimizer.param_groups:
        steps_on_gpu = group.get("fused") or group.get("capturable")
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in values.get(name, {}).items():
                if isinstance(value, Tensor) and (key != "step" or steps_on_gpu):
                    value = value.to(parameter.device)
                optimizer.state[parameter][key] = value
