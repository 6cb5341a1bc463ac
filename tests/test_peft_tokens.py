"""Trained rows of tokens in a file: which fit a model, and which are shared."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import tiny
import torch
from closeness import assert_close
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lora_cli.adapters.peft_format.peft_token_rules import computes_as_peft
from lora_cli.adapters.peft_format.peft_tokens import SavedRows, _joined, _misfit
from lora_cli.errors import LoraError
from lora_cli.export.merge import merge_adapter


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
def test_rows_must_belong_to_tokens_of_the_model(
    ids: list[int], shape: tuple[int, ...], said: str
) -> None:
    for module in (nn.Embedding(4, 2), nn.Linear(2, 4, bias=False)):
        assert misfit(module, ids, shape) == said


class Doubling(nn.Embedding):
    """An embedding that computes something of its own."""

    def forward(self, ids: Tensor) -> Tensor:
        return 2 * super().forward(ids)


def test_rows_must_belong_to_a_layer_that_peft_computes_equally() -> None:
    row = ([1], (1, 2))
    assert "has a bias, which PEFT leaves out" in misfit(nn.Linear(2, 4), *row)
    assert "which PEFT computes as a plain embedding" in misfit(Doubling(4, 2), *row)
    for module in (nn.Linear(2, 4), Doubling(4, 2)):
        assert misfit(module, *row, verified=True) == ""  # this tool trained it, and computes it
    for module in (nn.LayerNorm(2), nn.Identity(), nn.Bilinear(2, 2, 4)):
        said = misfit(module, *row, verified=True)
        assert said == "`embed` has trained rows, and is no embedding and no output layer"


def test_equal_rows_of_modules_that_share_a_weight_are_joined() -> None:
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


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_new_tokens_that_peft_saved_with_the_whole_embedding(
    tied: bool, tmp_path: Path
) -> None:
    # PEFT writes all of an embedding that was made larger, besides the rows that are trained
    base = tiny.save_llama(tmp_path / "base", tied)
    tokenizer, new = tiny.tokenizer("llama"), ["<|x|>", "<|y|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": new})
    ids = tokenizer.convert_tokens_to_ids(new)
    model = LlamaForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["q_proj"],
        trainable_token_indices={"embed_tokens": ids},
    )  # fmt: skip
    theirs = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the embedding is written because it is larger
        theirs.eval().save_pretrained(tmp_path / "adapter")
    whole = "base_model.model.model.embed_tokens.token_adapter.base_layer.weight"
    assert whole in load_file(tmp_path / "adapter/adapter_model.safetensors")
    recipe = tiny.recipe(base, tmp_path, model={"add_tokens": new})
    merge_adapter(None, tmp_path / "adapter", tmp_path / "merged", recipe)
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    read = torch.tensor([[0, 9, *ids, 7]])
    with torch.no_grad():
        assert_close(merged(read).logits, theirs(read).logits)
    # without the new tokens the model has no rows for them
    with pytest.raises(LoraError) as caught:
        merge_adapter(str(base), tmp_path / "adapter", tmp_path / "other")
    assert "`model.add_tokens` of a recipe" in str(caught.value)


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
