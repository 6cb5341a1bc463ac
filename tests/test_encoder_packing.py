"""Texts that share a row are answered, and trained, as each is alone; by plain transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AlbertConfig,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    FNetConfig,
    ModernBertConfig,
    PreTrainedModel,
    RobertaConfig,
)
from transformers.modeling_outputs import BaseModelOutput

from lora_cli.errors import LoraError
from lora_cli.recipe import load_recipe
from lora_cli.tasks import build_task
from lora_cli.tasks.texts.encoder_packing import (
    TEXT_OF_TOKEN,
    TOKENS,
    attention_mask,
    logits_of_shared_rows,
    place,
    row_width,
    share_rows,
)
from tests import tiny

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 400,
    "max_position_embeddings": 80,
    "pad_token_id": tiny.PAD,
}
DISTIL = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "vocab_size": 400}
CONFIGS: dict[str, Callable[[], Any]] = {
    "bert": lambda: BertConfig(**SMALL),
    "roberta": lambda: RobertaConfig(**SMALL),
    "distilbert": lambda: DistilBertConfig(**DISTIL, max_position_embeddings=80),
    "electra": lambda: ElectraConfig(**SMALL, embedding_size=16),
    "albert": lambda: AlbertConfig(**SMALL, embedding_size=16),
}
TASKS: dict[str, dict[str, Any]] = {
    "sequence_classification": {"labels": ["a", "b", "c"]},
    "token_classification": {"labels": ["O", "B-x", "I-x"]},
}
LENGTHS = [5, 17, 3, 30, 9, 24, 2]


@pytest.mark.parametrize(
    ("lengths", "most", "width"),
    [([3, 4], None, 8), ([100, 20, 90], None, 128), ([100] * 9, None, 128), ([130, 9], 512, 144)],
)
def test_rows_are_no_wider_than_needed(lengths: list[int], most: int | None, width: int) -> None:
    assert row_width(lengths, most, 8) == width


def test_rows_are_no_wider_than_the_model_has_positions() -> None:
    assert row_width([60] * 9, 80, 8) == 80


def test_every_text_stands_whole_in_one_row_and_none_in_another_s_place() -> None:
    random = torch.Generator().manual_seed(0)
    for _ in range(50):
        lengths = torch.randint(1, 33, (20,), generator=random).tolist()
        starts, n_rows = place(lengths, 32)
        taken = torch.zeros(n_rows * 32, dtype=torch.long)
        for start, length in zip(starts, lengths, strict=True):
            assert start // 32 == (start + length - 1) // 32
            taken[start : start + length] += 1
        assert taken.max() == 1
        assert taken.sum() == sum(lengths)
        assert taken.view(n_rows, 32).any(1).all()


@pytest.mark.parametrize(
    ("lengths", "width", "starts", "n_rows"),
    [
        ([4], 4, [0], 1),
        ([1, 3, 2, 2], 4, [3, 0, 4, 6], 2),  # filled to the last token
        ([2, 5, 3, 4, 1], 8, [8 + 4, 0, 5, 8, 8 + 6], 2),
        ([3, 3, 3], 5, [0, 5, 10], 3),
    ],
)
def test_the_longest_texts_are_placed_first_each_into_the_first_row_with_room(
    lengths: list[int], width: int, starts: list[int], n_rows: int
) -> None:
    found, rows = place(lengths, width)
    assert (found.tolist(), rows) == (starts, n_rows)


def test_what_is_not_filled_belongs_to_no_text() -> None:
    texts = {"input_ids": [[7, 8], [9, 10, 11]], "token_type_ids": [[0, 1], [1, 1, 0]]}
    fill_with = {"input_ids": 1, "token_type_ids": 0}
    found = share_rows(texts, fill_with, 6, 2, None)
    assert found["input_ids"].tolist() == [[9, 10, 11, 7, 8, 1]]
    assert found["token_type_ids"].tolist() == [[1, 1, 0, 0, 1, 0]]
    assert found["position_ids"].tolist() == [[2, 3, 4, 2, 3, 2]]
    assert found[TEXT_OF_TOKEN].tolist() == [[1, 1, 1, 0, 0, -1]]
    assert found[TOKENS].tolist() == [3, 0]
    every = share_rows(texts, fill_with, 6, 0, 4)
    assert every[TOKENS].tolist() == [[3, 4, 4, 4], [0, 1, 2, 2]]  # the last is repeated
    assert every["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0]]


def test_a_token_sees_those_of_its_own_text() -> None:
    mask = attention_mask(torch.tensor([[0, 0, 1, -1], [2, -1, -1, -1]]), torch.float16)
    least = torch.finfo(torch.float16).min
    seen = [[[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
            [[1, 0, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]]]  # fmt: skip
    assert mask.shape == (2, 1, 4, 4)
    assert mask.dtype == torch.float16
    assert torch.equal(mask[:, 0], torch.tensor(seen).sub(1).to(torch.float16) * -least)


class Layers(torch.nn.Module):
    """Layers that return hidden states as a tensor, in a tuple, or by name."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, hidden: torch.Tensor) -> Any:
        if self.kind == "tensor":
            return hidden
        return (hidden, "more") if self.kind == "tuple" else BaseModelOutput(hidden)


class Body(torch.nn.Module):
    """Layers, and behind them a pooler or nothing."""

    def __init__(self, kind: str, pooler: bool) -> None:
        super().__init__()
        self.encoder = Layers(kind)
        self.pooler = torch.nn.Identity() if pooler else None

    def forward(self, hidden: torch.Tensor) -> Any:
        output = self.encoder(hidden)
        if self.pooler is None:
            return output
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        return (hidden[:, 0], self.pooler(hidden[:, 0]))


class Pooling(torch.nn.Module):
    """A model whose head reads the first token of a row."""

    dtype = torch.float32

    def __init__(self, kind: str, pooler: bool) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.base_model = Body(kind, pooler)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        output = self.base_model(input_ids.float()[..., None] * self.scale)
        if self.base_model.pooler is not None:
            return SimpleNamespace(logits=output[1])
        assert not isinstance(output, tuple) or output[1] == "more"
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        if not isinstance(output, torch.Tensor | tuple):
            assert output.last_hidden_state is hidden
        return SimpleNamespace(logits=hidden[:, 0])


@pytest.mark.parametrize("pooler", [True, False])
@pytest.mark.parametrize("kind", ["tuple", "tensor", "named"])
def test_the_head_reads_the_first_token_of_each_text(kind: str, pooler: bool) -> None:
    inputs = share_rows({"input_ids": [[7, 8], [9, 10, 11], [5]]}, {"input_ids": 1}, 4, 0, None)
    model = Pooling(kind, pooler)
    found = logits_of_shared_rows(model, inputs, {})
    assert found.flatten().tolist() == [7.0, 9.0, 5.0]
    assert TOKENS in inputs  # the batch stays as it was
    hooked = [m for m in model.modules() if m._forward_hooks]
    assert not hooked


def _task(tmp_path: Path, kind: str, config: Any, **train: Any) -> tuple[Any, PreTrainedModel]:
    torch.manual_seed(0)
    base = tiny.save_encoder(tmp_path / "base")
    config.vocab_size = max(config.vocab_size, 400)
    from transformers import AutoModel

    AutoModel.from_config(config).save_pretrained(base)
    columns = {"tokens_column": "text", "tags_column": "label"}
    if kind == "sequence_classification":
        columns = {"text_column": "text", "label_column": "label"}
    task = {"type": kind, **columns, **TASKS[kind], "max_length": 40}
    path = tiny.recipe(
        base, tmp_path, task=task, train={"max_steps": 1, "kernels": "fused", **train}
    )
    built = build_task(load_recipe(path))
    built.load_processor()
    built.learn_from({})
    model, _ = built.load_model(torch.device("cpu"))
    return built, model.double()  # type: ignore[return-value]


def _examples(kind: str) -> list[dict[str, Any]]:
    random = torch.Generator().manual_seed(1)
    examples = []
    for row, length in enumerate(LENGTHS):
        ids = torch.randint(4, 300, (length,), generator=random).tolist()
        example: dict[str, Any] = {"input_ids": ids, "row": row, "labels": row % 3}
        if kind == "token_classification":
            labels = torch.randint(0, 3, (length,), generator=random).tolist()
            example |= {"labels": labels, "words": list(range(length)), "n_words": length}
        examples.append(example)
    return examples


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.slow_after(4)
def test_texts_that_share_rows_are_answered_as_each_is_alone(
    name: str, kind: str, tmp_path: Path
) -> None:
    task, model = _task(tmp_path, kind, CONFIGS[name]())
    task.fit_to_model(model)
    assert task.first_position == (tiny.PAD + 1 if name == "roberta" else 0)
    model.eval()
    examples = _examples(kind)
    batch = task.collate(examples)
    assert batch.inputs[TEXT_OF_TOKEN].shape[0] < len(examples)
    with torch.no_grad():
        found = task.forward(model, batch)
        for example, logits in zip(examples, found, strict=True):
            ids = torch.tensor([example["input_ids"]])
            alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
            logits = logits[: len(alone)] if kind == "token_classification" else logits
            torch.testing.assert_close(logits, alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", TASKS)
def test_texts_that_share_rows_give_the_gradients_of_each_alone(kind: str, tmp_path: Path) -> None:
    task, model = _task(tmp_path, kind, CONFIGS["roberta"]())
    task.fit_to_model(model)
    assert task.first_position is not None
    model.eval()
    examples = _examples(kind)
    loss = task.loss(model, task.collate(examples))
    loss.backward()
    shared = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    task.first_position = None
    singly = torch.stack([task.loss(model, task.collate([example])) for example in examples]).sum()
    singly.backward()
    torch.testing.assert_close(loss, singly)
    # the loss itself is in float32
    atol = 1e-6 * max(float(gradient.abs().max()) for gradient in shared.values())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(shared[name], parameter.grad, rtol=1e-5, atol=atol)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(lambda: FNetConfig(**SMALL), id="no-mask"),
        pytest.param(lambda: ModernBertConfig(**SMALL, local_attention=8), id="window"),
    ],
)
def test_a_model_that_would_answer_otherwise_keeps_its_rows(
    config: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "lora_cli.tasks.texts.padding_check._worth_sharing", lambda *_: True
    )  # a GPU
    task, model = _task(tmp_path, "sequence_classification", config(), kernels="auto")
    task.fit_to_model(model.float())
    assert task.first_position is None
    assert "attention_mask" in task.collate(_examples("sequence_classification")).inputs


def test_texts_longer_than_the_trial_keep_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # attention to 24 tokens on either side, which a trial of 20 tokens does not show
    config = ModernBertConfig(**SMALL, local_attention=48)
    task, model = _task(tmp_path, "sequence_classification", config, kernels="fused")
    monkeypatch.setattr("lora_cli.tasks.texts.padding_check.LONGEST", 20)
    task.fit_to_model(model.float(), 20)
    assert task.first_position == 0
    with pytest.raises(LoraError, match="texts of more than 20 tokens do not share rows"):
        task.fit_to_model(model)  # texts of up to `max_length`, which is 40


def test_fused_says_why_a_model_cannot_be_computed_so(tmp_path: Path) -> None:
    config = FNetConfig(**SMALL)
    task, model = _task(tmp_path, "sequence_classification", config, kernels="fused")
    with pytest.raises(LoraError, match=r"changes by .* when others share its row") as raised:
        task.fit_to_model(model.float())
    assert raised.value.problems[0].at.startswith("train.kernels")


def test_reference_pads(tmp_path: Path) -> None:
    task, model = _task(tmp_path, "sequence_classification", CONFIGS["bert"](), kernels="reference")
    task.fit_to_model(model)
    inputs = task.collate(_examples("sequence_classification")).inputs
    assert inputs["input_ids"].shape == (len(LENGTHS), max(LENGTHS))
    assert TOKENS not in inputs
