"""Packs several examples into one row, which must not attend to each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lora_cli.errors import LoraError
from lora_cli.models.full_precision import full_precision
from lora_cli.tasks.examples import IGNORED, Encoded, Example
from lora_cli.tasks.texts.padding import longest_with_equal_positions, tolerance
from lora_cli.tasks.texts.text_task import TextTask

TRIAL_TOKENS = 32  # of each of the two texts that are packed in `check_packing`
LEAK_TOLERANCE = 16  # times eps and the largest logit: the routing of experts changes the rounding


def pack(lengths: Sequence[int], capacity: int, seed: int) -> list[list[int]]:
    """Combine examples into packs of at most `capacity` tokens.

    The examples are shuffled, and each is put into the first of the last 64 packs that has room for
    it. So neighbouring rows are spread over the packs, and little room is left.

    Args:
        lengths: The tokens of each example, at most `capacity`.
        capacity: The maximum number of tokens of a pack.
        seed: The seed of the order.

    Returns:
        For each pack, the positions of its examples.
    """
    assert max(lengths, default=0) <= capacity
    packs: list[list[int]] = []
    room: list[int] = []
    open_packs: list[int] = []
    for example in np.random.default_rng((seed, 0x9AC)).permutation(len(lengths)).tolist():
        length = lengths[example]
        place = next((p for p in open_packs if room[p] >= length), None)
        if place is None:
            place = len(packs)
            packs.append([])
            room.append(capacity)
            open_packs = [*open_packs[-63:], place]
        packs[place].append(example)
        room[place] -= length
        if room[place] == 0:
            open_packs.remove(place)
    return packs


class Packed:
    """The packs of a split, with the interface of a data set: each item is one row of examples.

    Args:
        task: The task. Its `max_length` limits a pack, and the seed of its recipe decides the
            order.
        split: The examples.
    """

    def __init__(self, task: TextTask, split: Encoded) -> None:
        self.split = split
        seed, mix = task.recipe.train.seed, task.recipe.data.mix.values()
        # data sets with weights are sampled by pack, so a pack must not mix them
        sets = (
            split.sets
            if any(source.weight for source in mix)
            else np.zeros(len(split.lengths), np.int64)
        )
        self.packs, sets_of_packs = [], []
        for number in np.unique(sets).tolist():
            members = np.flatnonzero(sets == number)
            packs = pack(split.lengths[members].tolist(), task.max_length, seed)
            self.packs += [members[chosen].tolist() for chosen in packs]
            sets_of_packs += [number] * len(packs)
        self.sets = np.array(sets_of_packs)
        self.lengths = np.array([split.lengths[members].sum() for members in self.packs])

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> Example:
        return one_row(self.split.examples.__getitems__(self.packs[index]))

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        """Return several packs."""
        return [self[index] for index in indices]


def one_row(examples: Sequence[Example]) -> Example:
    """Return several examples concatenated into one; the first token of each is not predicted."""
    return {
        "input_ids": np.concatenate([e["input_ids"] for e in examples]),
        "labels": np.concatenate([np.append(IGNORED, e["labels"][1:]) for e in examples]),
        "position_ids": np.concatenate([np.arange(len(e["input_ids"])) for e in examples]),
        "row": examples[0]["row"],
    }


@torch.no_grad()
def check_packing(task: TextTask, model: nn.Module, split: Encoded) -> None:
    """Check on packs of real examples that the model keeps packed texts apart.

    What a model does with position ids depends on its architecture. A model that ignores them, or
    whose attention kernel does, or that passes a state along the row (Mamba, RWKV), would read one
    text as the beginning of the next. Two things must hold except for rounding: the logits of a
    text do not depend on the text before it in its row, and they equal those of the text alone.

    Args:
        task: The task, which collates examples into batches.
        model: The model that will be trained. It is set to eval mode and back.
        split: The encoded train split.

    Raises:
        LoraError: If the logits of packed texts differ from those of the same texts alone.
    """
    if task.max_length > (limit := longest_with_equal_positions(model)):
        what = f"this model reads all texts of a batch differently if one has more than {limit:,} "
        hint = f"set `train.packing: false`, or `task.max_length: {limit}`"
        raise LoraError(f"{what}tokens", task.recipe.at("train.packing"), hint)
    examples = [split.examples[i] for i in (0, -1)]
    first, second = (
        {**e, **{key: e[key][:TRIAL_TOKENS] for key in ("input_ids", "labels")}} for e in examples
    )
    size = len(task.tokenizer)
    altered_first = {**first, "input_ids": [(token + 1) % size for token in first["input_ids"]]}
    n_rows = min(2, task.micro_batch)  # some kernels handle packs only in batches of one row
    offset = len(first["input_ids"])
    was_training = model.training
    model.eval()
    try:
        with full_precision(model):
            packed, altered_packed = (
                _logits(task, model, task.collate([one_row([start_text, second])] * n_rows).inputs)
                for start_text in (first, altered_first)
            )
            alone = _logits(task, model, {"input_ids": torch.tensor([second["input_ids"]])})
        end = offset + alone.shape[1]
        packed, altered_packed = (logits[:, offset:end] for logits in (packed, altered_packed))
    except TypeError:  # its forward takes no position ids
        leaks = True
    else:
        leak = float((packed - altered_packed).abs().max())
        error = float((packed - alone).abs().max())
        # both packs have the same shape, and so the same kernels, which leaves little rounding
        allowed = LEAK_TOLERANCE * torch.finfo(alone.dtype).eps * float(alone.abs().max())
        leaks = not (leak <= allowed and error <= tolerance(alone, 0.0, alone.dtype))
    finally:
        model.train(was_training)
    if leaks:
        raise LoraError(
            "this model lets packed texts see each other",
            task.recipe.at("train.packing"),
            "set `train.packing: false`",
        )


def _logits(task: TextTask, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return the model's logits, computed with the same options as in training."""
    device = next(model.parameters()).device
    return task.logits(model, {key: value.to(device) for key, value in inputs.items()})
