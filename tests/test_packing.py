"""What is packed together, the row that it becomes, and which leak between texts is found."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

from lora_cli.errors import LoraError
from lora_cli.tasks.examples import IGNORED, Example
from lora_cli.tasks.generation import packing
from lora_cli.tasks.generation.packing import Packed, check_packing, one_row, pack

EPS = torch.finfo(torch.float32).eps


def first_fit(lengths: list[int], capacity: int, order: list[int]) -> list[list[int]]:
    """Pack as the books say: into the first of the last 64 packs begun that are not full."""
    packs: list[list[int]] = []
    open_packs: list[list[int]] = []
    for example in order:
        for members in open_packs:
            if sum(lengths[i] for i in members) + lengths[example] <= capacity:
                break
        else:
            members = []
            packs.append(members)
            open_packs = [*open_packs, members][-64:]
        members.append(example)
        open_packs = [m for m in open_packs if sum(lengths[i] for i in m) < capacity]
    return packs


@pytest.mark.parametrize(("low", "high", "count"), [(1, 16, 60), (9, 17, 400), (1, 17, 300)])
def test_packs_are_those_of_first_fit(low: int, high: int, count: int) -> None:
    lengths = np.random.default_rng(count).integers(low, high, count).tolist()
    order = np.random.default_rng((5, 0x9AC)).permutation(count).tolist()
    found = pack(lengths, 16, 5)
    assert found == first_fit(lengths, 16, order)
    assert sorted(i for members in found for i in members) == list(range(count))


def example(first: int, length: int, row: int) -> Example:
    ids = list(range(first, first + length))
    return {"input_ids": ids, "labels": ids, "row": row}


class Examples(list[Example]):
    def __getitems__(self, indices: list[int]) -> list[Example]:
        return [self[i] for i in indices]


def split(*lengths: int) -> Any:
    examples = Examples(example(10 * i + 1, n, 7 + i) for i, n in enumerate(lengths))
    return SimpleNamespace(examples=examples, lengths=np.array(lengths))


def test_positions_and_labels_restart_with_each_packed_text() -> None:
    row = one_row([example(10, 3, 4), example(20, 2, 9), example(30, 1, 2)])
    assert row["input_ids"].tolist() == [10, 11, 12, 20, 21, 30]
    assert row["labels"].tolist() == [IGNORED, 11, 12, IGNORED, 21, IGNORED]
    assert row["position_ids"].tolist() == [0, 1, 2, 0, 1, 0]
    assert row["row"] == 4


def test_packed_examples_have_the_interface_of_examples() -> None:
    lengths = (5, 3, 8, 2, 6, 4, 1)
    recipe = tiny.recipe_of().with_values({"train.seed": 3})
    packed = Packed(SimpleNamespace(max_length=8, recipe=recipe), split(*lengths))  # type: ignore[arg-type]
    assert packed.packs == pack(lengths, 8, 3)
    assert len(packed) == len(packed.packs) < len(lengths)
    assert packed.lengths.tolist() == [sum(lengths[i] for i in m) for m in packed.packs]
    for i, members in enumerate(packed.packs):
        assert len(packed[i]["input_ids"]) == packed.lengths[i]
        assert packed[i]["row"] == 7 + members[0]


# ------------------------------------------------------------------------------- what is found

SIZE, VOCABULARY, SCALE = 50, 5, 100.0


class Model(nn.Module):
    """Answers a token by itself and its position, and a little by what stands before its text."""

    def __init__(self, leak: float = 0.0, shift: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.leak, self.shift = leak, shift

    def forward(
        self, input_ids: Tensor, use_cache: bool, position_ids: Tensor | None = None
    ) -> Any:
        assert use_cache is False
        assert not self.training
        alone = position_ids is None
        if alone:
            position_ids = torch.arange(input_ids.shape[1])[None]
        answer = (input_ids + 3 * position_ids)[..., None].float().sin()
        answer = answer.expand(-1, -1, VOCABULARY).clone()
        answer[:, -1] = SCALE  # the largest of what is compared
        if not alone:  # the text that is looked at begins with its second position 0
            before = int((position_ids[0] == 0).nonzero()[1])
            answer[:, before] += self.leak * float(input_ids[0, :before].sum() % 2 * 2 - 1)
            answer[:, before] += self.shift
        return SimpleNamespace(logits=answer)


class Task:
    """Puts rows together as a task does, fills them to a multiple, and notes them."""

    def __init__(self, micro_batch: int = 8) -> None:
        self.tokenizer, self.micro_batch, self.seen = range(SIZE), micro_batch, []
        self.recipe, self.max_length = tiny.recipe_of(), 64

    def collate(self, examples: list[Example]) -> Any:
        self.seen.append(examples)
        inputs = {
            key: torch.tensor(np.stack([e[key] for e in examples]))
            for key in ("input_ids", "position_ids")
        }
        return SimpleNamespace(inputs=inputs)

    def logits(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        logits: Tensor = model(**inputs, use_cache=False).logits
        return logits


def check(model: Model, task: Task | None = None, *lengths: int) -> Task:
    task = task or Task()
    check_packing(task, model, split(*(lengths or (3, 4, 5, 4))))  # type: ignore[arg-type]
    return task


@pytest.mark.parametrize("micro_batch", [1, 2, 8])
@pytest.mark.parametrize("training", [True, False])
def test_packing_is_tried_on_the_first_and_the_last_text(micro_batch: int, training: bool) -> None:
    model = Model().train(training)
    task = check(model, Task(micro_batch))
    assert model.training is training
    assert [len(rows) for rows in task.seen] == [min(2, micro_batch)] * 2
    one, other = (rows[0]["input_ids"].tolist() for rows in task.seen)
    assert one == [1, 2, 3, 31, 32, 33, 34]  # of four texts
    assert other[3:] == one[3:]
    assert all(a != b and 0 <= b < SIZE for a, b in zip(one[:3], other[:3], strict=True))


def test_packing_is_tried_on_the_beginning_of_long_texts() -> None:
    task = check(Model(), None, 60, 40, 50)
    assert [len(rows[0]["input_ids"]) for rows in task.seen] == [2 * packing.TRIAL_TOKENS] * 2


@pytest.mark.parametrize(
    ("leak", "shift", "found"),
    [
        (0.0, 0.0, False),
        (4 * EPS * SCALE, 0.0, False),  # twice that lies between the two packs: rounding
        (16 * EPS * SCALE, 0.0, True),  # less than may lie between a pack and the text alone
        (0.0, 64 * EPS * SCALE, False),
        (0.0, 256 * EPS * SCALE, True),  # what stands before changes nothing, and yet: not alone
        (1.0, 0.0, True),
        (0.0, 1.0, True),
    ],
)
def test_a_leak_is_distinguished_from_rounding(leak: float, shift: float, found: bool) -> None:
    model = Model(leak, shift)
    if not found:
        check(model)
        return
    with pytest.raises(LoraError, match="lets packed texts see each other"):
        check(model)
    assert model.training  # as it was


def test_a_model_without_position_ids_cannot_keep_texts_apart() -> None:
    class Plain(Model):
        def forward(self, input_ids: Tensor, use_cache: bool) -> Any:  # type: ignore[override]
            return super().forward(input_ids, use_cache)

    with pytest.raises(LoraError, match="lets packed texts see each other"):
        check(Plain())
