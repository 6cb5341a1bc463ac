"""Trained rows of tokens as a file has them: which fit a model, and which are the same rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_cli.adapters.peft_format.peft_token_rules import computes_as_peft
from lora_cli.adapters.peft_format.peft_tokens import SavedRows, _joined, _misfit


def misfit(
    module: nn.Module, ids: list[int], shape: tuple[int, ...], verified: bool = False
) -> str:
    adapter: Any = SimpleNamespace(verified=verified)
    problem = _misfit("embed", module, ids, torch.ones(shape), adapter)
    return "" if problem is None else problem.what


@pytest.mark.parametrize(
    ("ids", "shape", "said"),
    [
        ([0, 3], (2, 2), ""),
        ([], (0, 2), ""),
        ([0, 4], (2, 2), "the adapter has the row of the token 4, and `embed` has rows 0 to 3"),
        ([0, 3], (1, 2), "the trained rows of `embed` are (1, 2), the model needs (2, 2)"),
        ([0, 3], (2, 3), "the trained rows of `embed` are (2, 3), the model needs (2, 2)"),
        ([0, 3], (2, 2, 1), "the trained rows of `embed` are (2, 2, 1), the model needs (2, 2)"),
    ],
)
def test_rows_are_of_tokens_that_the_model_has(
    ids: list[int], shape: tuple[int, ...], said: str
) -> None:
    for module in (nn.Embedding(4, 2), nn.Linear(2, 4, bias=False)):
        assert misfit(module, ids, shape) == said


class Doubling(nn.Embedding):
    """An embedding that computes something of its own."""

    def forward(self, ids: Tensor) -> Tensor:
        return 2 * super().forward(ids)


def test_rows_are_of_a_layer_that_peft_computes_as_it_is() -> None:
    row = ([1], (1, 2))
    assert "has a bias, which PEFT leaves out" in misfit(nn.Linear(2, 4), *row)
    assert "which PEFT computes as a plain embedding" in misfit(Doubling(4, 2), *row)
    for module in (nn.Linear(2, 4), Doubling(4, 2)):
        assert misfit(module, *row, verified=True) == ""  # this tool trained it, and computes it
    for module in (nn.LayerNorm(2), nn.Identity(), nn.Bilinear(2, 2, 4)):
        said = misfit(module, *row, verified=True)
        assert said == "`embed` has trained rows, and is no embedding and no output layer"


def test_equal_rows_of_modules_that_share_a_weight_are_the_same_rows() -> None:
    model = nn.ModuleDict({name: nn.Embedding(4, 2) for name in ("a", "b", "c")})
    model["b"].weight = model["a"].weight

    def rows(name: str, ids: tuple[int, ...] = (1, 3), value: float = 1.0) -> SavedRows:
        return SavedRows(name, list(ids), torch.full((len(ids), 2), value), [f"{name}.more"])

    (joined,) = _joined(model, [rows("a"), rows("b")])
    assert (joined.name, joined.others) == ("a", ["a.more", "b", "b.more"])
    for other in (rows("b", value=2.0), rows("b", (1, 2)), rows("c")):
        found = _joined(model, [rows("a"), other])
        assert [one.name for one in found] == ["a", other.name]
        assert [one.others for one in found] == [["a.more"], [f"{other.name}.more"]]


def test_what_computes_as_peft_s_embedding_of_trained_rows() -> None:
    class Scaled(nn.Embedding):
        """Multiplies by `embed_scale`, as PEFT does with a number of this name."""

        def __init__(self, scale: Any, by: float) -> None:
            super().__init__(4, 2)
            self.embed_scale, self.by = scale, by

        def forward(self, ids: Tensor) -> Tensor:
            return self.by * super().forward(ids)

    class Squared(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) ** 2

    plain = nn.Embedding(4, 2)
    for scale, same in ((None, True), (1.0, True), (torch.tensor(1.0), True), (2.0, False)):
        plain.embed_scale = scale
        assert computes_as_peft(plain) is same  # PEFT would multiply, and the base does not
    assert computes_as_peft(nn.Linear(2, 4))
    assert not computes_as_peft(Squared(2, 4))
    assert not computes_as_peft(nn.LayerNorm(2))
    for scale, by, same in (
        (2.0, 2.0, True), (torch.tensor(2.0), 2.0, True), (2.0, 3.0, False), (None, 2.0, False),
        (None, 1.0, True), (torch.tensor([2.0, 2.0]), 2.0, False),
    ):  # fmt: skip
        assert computes_as_peft(Scaled(scale, by)) is same
    # without weights nothing can be computed: a scale is taken for what it is called
    assert computes_as_peft(Scaled(2.0, 2.0).to("meta"))
    assert not computes_as_peft(Scaled(None, 1.0).to("meta"))
