"""Tests that an optimizer's state is saved by name, checked, and restored exactly."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_cli.training.optimizer_state import (
    described,
    load_optimizer,
    optimizer_problems,
    optimizer_state,
)
from lora_cli.training.train_state import TrainState

FILE = Path("optimizer.safetensors")
OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1),
    "fused": lambda groups: torch.optim.AdamW(groups, lr=0.1, fused=True),
    "amsgrad": lambda groups: torch.optim.AdamW(groups, lr=0.1, amsgrad=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.1),
}


def built(kind: str) -> torch.optim.Optimizer:
    """Return an optimizer with two groups of named parameters."""
    torch.manual_seed(0)
    shapes = {"a": (3, 2), "b": (2, 2), "c": (4,)}
    named = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    groups = [
        {"params": [named[name] for name in names], "names": names} for names in (["a", "b"], ["c"])
    ]
    return OPTIMIZERS[kind](groups)


def steps(optimizer: torch.optim.Optimizer, numbers: range) -> list[Tensor]:
    """Make steps with different gradients, and return the parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number in numbers:
        torch.manual_seed(number)
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return parameters


def saved(kind: str = "adamw") -> tuple[torch.optim.Optimizer, dict[str, Tensor], TrainState]:
    """Return an optimizer after two steps, its tensors, and the matching state."""
    optimizer = built(kind)
    steps(optimizer, range(2))
    tensors, rest = optimizer_state(optimizer)
    written = {name: described(tensor) for name, tensor in tensors.items()}
    return optimizer, tensors, TrainState(step=2, optimizer=rest, optimizer_tensors=written)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_steps_after_restoring_are_the_same(kind: str) -> None:
    whole = steps(built(kind), range(4))
    optimizer, tensors, state = saved(kind)
    again = built(kind)
    with torch.no_grad():
        for new, old in zip(steps(again, range(0)), steps(optimizer, range(0)), strict=True):
            new.copy_(old)
    assert optimizer_problems(again, tensors, state, FILE) == []
    load_optimizer(again, tensors, state.optimizer)
    for found, wanted in zip(steps(again, range(2, 4)), whole, strict=True):
        assert torch.equal(found, wanted)


def test_tensors_are_named_copies_separate_from_other_values() -> None:
    optimizer, tensors, _ = saved()
    assert sorted(tensors) == sorted(
        f"{name}/{key}" for name in "abc" for key in ("step", "exp_avg", "exp_avg_sq")
    )
    moment = optimizer.state[optimizer.param_groups[0]["params"][1]]["exp_avg"]
    assert torch.equal(tensors["b/exp_avg"], moment)
    before = tensors["b/exp_avg"].clone()
    moment.add_(1.0)
    assert torch.equal(tensors["b/exp_avg"], before)
    parameter = optimizer.param_groups[1]["params"][0]
    optimizer.state[parameter]["name"] = "value"
    assert optimizer_state(optimizer)[1] == {"c/name": "value"}


def test_a_value_that_is_not_a_tensor_is_not_reported_as_missing() -> None:
    optimizer, tensors, state = saved()
    state.optimizer = {"a/kind": 3}
    assert optimizer_problems(optimizer, tensors, state, FILE) == []


def test_a_dtype_and_a_shape_are_described() -> None:
    assert described(torch.zeros(4, 2, dtype=torch.bfloat16)) == "bfloat16 [4, 2]"
    assert described(torch.tensor(1.0)) == "float32 []"


def problems(change: dict[str, Tensor | None], rewritten: bool = True) -> list[str]:
    """Return the problems of changed tensors; `rewritten` updates their descriptions too."""
    optimizer, tensors, state = saved()
    for name, tensor in change.items():
        if tensor is None:
            del tensors[name]
            continue
        tensors[name] = tensor
        if rewritten:
            state.optimizer_tensors[name] = described(tensor)
    found = optimizer_problems(optimizer, tensors, state, FILE)
    assert all(problem.at == str(FILE) for problem in found)
    return [problem.what for problem in found]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"a/exp_avg": torch.zeros(2, 3)}, "is float32 [2, 3], for a parameter of shape [3, 2]"),
        ({"c/exp_avg": torch.tensor([1.0, torch.inf, 0.0, 0.0])}, "contains NaN or infinity"),
        ({"c/exp_avg": torch.tensor([1.0, 2.0, 0.0, torch.nan])}, "contains NaN or infinity"),
        ({"b/exp_avg_sq": torch.tensor([[0.0, 1.0], [-1.0, 1.0]])}, "has negative entries"),
        ({"c/step": torch.tensor(3.0)}, "counts 3 as the number of steps, and the run has made 2"),
        ({"c/step": torch.tensor(-1.0)}, "counts -1 as the number of steps"),
        ({"x/exp_avg": torch.zeros(1)}, "is of a parameter that is not trained"),
        ({"a/exp_avg": None}, "is missing"),
    ],
)
def test_impossible_values_are_reported(change: dict[str, Tensor | None], said: str) -> None:
    (name,) = change
    (found,) = problems(change)
    assert found.startswith(f"`{name}` ")
    assert said in found


@pytest.mark.parametrize(
    "change",
    [
        {"c/step": torch.tensor(0.0)},
        {"c/step": torch.tensor(2.0)},
        {"b/exp_avg": torch.full((2, 2), -1.0)},
        {"b/exp_avg_sq": torch.zeros(2, 2)},
        {"a/other": torch.zeros(7)},  # a key whose tensor need not have the parameter's shape
        {"a/other": torch.tensor([7])},  # and is not floating point
    ],
)
def test_possible_values_are_accepted(change: dict[str, Tensor | None]) -> None:
    assert problems(change) == []


def test_a_tensor_that_differs_from_its_description_is_reported() -> None:
    assert problems({"a/exp_avg": torch.zeros(1, 2)}, rewritten=False) == [
        "`a/exp_avg` is float32 [1, 2], and float32 [3, 2] was written"
    ]
    assert problems({"a/other": torch.zeros(1)}, rewritten=False) == [
        "`a/other` is float32 [1], and it was not written"
    ]


@pytest.mark.parametrize(("n_missing", "n_more"), [(5, 0), (6, 1), (9, 4)])
def test_five_problems_are_named_and_the_others_counted(n_missing: int, n_more: int) -> None:
    names = sorted(saved()[1])[:n_missing]
    found = problems(dict.fromkeys(names))
    more = [f"{n_more} more tensors are wrong"] if n_more else []
    assert found == [f"`{name}` is missing" for name in names[:5]] + more


@pytest.mark.parametrize(
    ("options", "counts_on_device"),
    [
        ({}, False),
        ({"fused": None, "capturable": False}, False),
        ({"fused": True}, True),
        ({"capturable": True}, True),
        ({"fused": True, "capturable": True}, True),
    ],
)
def test_tensors_move_to_their_parameter_and_step_counts_stay_on_the_host(
    options: dict[str, Any], counts_on_device: bool
) -> None:
    parameter = nn.Parameter(torch.zeros(2, device="meta"))  # any device other than the host
    group = {"params": [parameter], "names": ["layer.weight"], **options}
    optimizer: Any = SimpleNamespace(param_groups=[group], state=defaultdict(dict))
    tensors = {"layer.weight/exp_avg": torch.ones(2), "layer.weight/step": torch.tensor(3.0)}
    load_optimizer(optimizer, tensors, {"layer.weight/kind": "a", "other/kind": "b"})
    found = optimizer.state[parameter]
    assert found["exp_avg"].device.type == "meta"
    assert found["step"].device.type == ("meta" if counts_on_device else "cpu")
    assert found["kind"] == "a"
    assert len(found) == 3
    assert list(optimizer.state) == [parameter]
