"""Tests of the learning rate of each step, against the schedules of transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from lora_cli.recipe import SchedulerSpec
from lora_cli.training.learning_rate import learning_rate_factor, set_learning_rate

Json = dict[str, Any]


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(
    "warmup", [{}, {"warmup_steps": 7}, {"warmup_ratio": 0.1}, {"warmup_steps": 60}]
)
def test_learning_rates_are_those_of_transformers(kind: str, warmup: Json) -> None:
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.3)
    n_warmup = warmup.get("warmup_steps", math.ceil(53 * warmup.get("warmup_ratio", 0.0)))
    name = "constant_with_warmup" if kind == "constant" else kind
    theirs = get_scheduler(name, optimizer, n_warmup, 53)
    spec = SchedulerSpec(type=kind, **warmup)
    for step in range(1, 54):
        assert 0.3 * learning_rate_factor(spec, step, 53) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_the_factor_scales_each_group_from_its_own_rate_and_the_highest_is_returned() -> None:
    parameters = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    rates = (0.1, 0.4)
    groups = [
        {"params": [p], "lr": rate, "initial_lr": rate}
        for p, rate in zip(parameters, rates, strict=True)
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    for factor in (0.5, 0.25):
        assert set_learning_rate(optimizer, factor) == pytest.approx(0.4 * factor)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx(
            [rate * factor for rate in rates]
        )


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_a_run_that_is_all_warmup_ends_below_the_full_rate(kind: str) -> None:
    spec = SchedulerSpec(type=kind, warmup_steps=4)
    factors = [learning_rate_factor(spec, step, 4) for step in range(1, 5)]
    assert factors == [0.0, 0.25, 0.5, 0.75]
