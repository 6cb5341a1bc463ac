"""Batches and predictions: what stays on the host, and how several terms make one loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lora_cli.tasks.examples import IGNORED, Batch, Encoded, Prediction


def batch() -> Batch:
    inputs, targets = {"x": torch.ones(2, 3)}, {"labels": torch.zeros(2)}
    items = {"boxes": torch.tensor([2.0, 1.0]), "classes": torch.tensor([1.0, 1.0])}
    return Batch(inputs, targets, items, 6, [7, 3])


def test_only_inputs_and_targets_go_to_the_device() -> None:
    there = batch().to(torch.device("meta"))
    assert there.inputs["x"].device.type == "meta"
    assert there.inputs["x"].shape == (2, 3)
    assert there.targets["labels"].device.type == "meta"
    assert there.targets["labels"].shape == (2,)
    assert all(count.device.type == "cpu" for count in there.items.values())
    assert (there.cost, there.rows) == (6, [7, 3])


def test_inputs_and_targets_are_pinned_each_as_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 5)
    pinned = batch().pin_memory()
    assert torch.equal(pinned.inputs["x"], torch.full((2, 3), 6.0))
    assert torch.equal(pinned.targets["labels"], torch.full((2,), 5.0))
    assert torch.equal(pinned.items["boxes"], torch.tensor([2.0, 1.0]))
    assert (pinned.cost, pinned.rows) == (6, [7, 3])


def test_the_items_of_a_batch_are_those_of_the_first_term() -> None:
    assert batch().n_items == 3.0


def test_the_loss_of_one_term_keeps_its_items() -> None:
    found = Prediction(0, None, None, losses={"loss": (6.0, 4.0)})
    assert found.weighted_loss({"loss": 0.5}) == (3.0, 4.0)


def test_the_loss_of_several_terms_is_the_weighted_sum_of_their_means() -> None:
    losses = {"boxes": (6.0, 4.0), "classes": (5.0, 2.0), "prior": (0.0, 0.0)}
    found = Prediction(0, None, None, losses=losses)
    weights = {"boxes": 2.0, "classes": 0.1, "prior": 9.0}
    loss, items = found.weighted_loss(weights)
    assert loss == pytest.approx(2.0 * 6 / 4 + 0.1 * 5 / 2)
    assert items == 1.0
    nothing = Prediction(0, None, None, losses={"boxes": (0.0, 0.0), "prior": (0.0, 0.0)})
    assert nothing.weighted_loss({"boxes": 1.0, "prior": 1.0}) == (0, 0.0)


def test_every_row_has_an_example_unless_it_is_said() -> None:
    none = np.zeros(0, dtype=np.int64)
    found = Encoded(None, [1, 2, 3], none, none)
    assert (len(found), found.rows_without_example) == (3, 0)


def test_an_ignored_label_is_the_one_that_torch_ignores() -> None:
    logits, labels = torch.randn(2, 3), torch.tensor([1, IGNORED])
    assert torch.equal(F.cross_entropy(logits, labels), F.cross_entropy(logits[:1], labels[:1]))
