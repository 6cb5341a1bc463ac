"""Several texts in one row, none of which sees another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lora_cli.errors import LoraError
from lora_cli.models.full_precision import full_precision
from lora_cli.tasks.examples import IGNORED, Encoded, Example
from lora_cli.tasks.texts.padding import tolerance
from lora_cli.tasks.texts.text_task import TextTask

PROBE_TOKENS = 32  # of each text that is packed on trial
SAME_KERNELS = 16  # times eps and the scale: what the routing of experts may change


def pack(lengths: Sequence[int], capacity: int, seed: int) -> list[list[int]]:
    """Put examples together so that each pack has at most `capacity` tokens.

    First-fit over a shuffled order, within the last packs that have room: packs mix what the data
    set keeps apart, and few tokens are left empty.

    Args:
        lengths: Tokens of each example, each at most `capacity`.
        capacity: Tokens of a pack.
        seed: Decides the order.

    Returns:
        The examples of each pack.
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
    """Several examples in one row; looks like the data set that it is made from.

    Args:
        task: Says how many tokens a row takes, and by its recipe's seed what comes together.
        split: The examples.
    """

    def __init__(self, task: TextTask, split: Encoded) -> None:
        self.split = split
        seed, mix = task.recipe.train.seed, task.recipe.data.mix.values()
        # sets with weights are drawn by pack, so a pack is of one of them
        sets = (
            split.sets if any(one.weight for one in mix) else np.zeros(len(split.lengths), np.int64)
        )
        self.packs, of_packs = [], []
        for number in np.unique(sets).tolist():
            members = np.flatnonzero(sets == number)
            packs = pack(split.lengths[members].tolist(), task.max_length, seed)
            self.packs += [members[chosen].tolist() for chosen in packs]
            of_packs += [number] * len(packs)
        self.sets = np.array(of_packs)
        self.lengths = np.array([split.lengths[members].sum() for members in self.packs])

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> Example:
        return one_row(self.split.examples.__getitems__(self.packs[index]))

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        """Return several packs."""
        return [self[index] for index in indices]


def one_row(examples: Sequence[Example]) -> Example:
    """Return several examples as one; the first token of each is not predicted."""
    return {
        "input_ids": np.concatenate([e["input_ids"] for e in examples]),
        "labels": np.concatenate([np.append(IGNORED, e["labels"][1:]) for e in examples]),
        "position_ids": np.concatenate([np.arange(len(e["input_ids"])) for e in examples]),
        "row": examples[0]["row"],
    }


@torch.no_grad()
def check_packing(task: TextTask, model: nn.Module, split: Encoded) -> None:
    """Check on packs of real examples that the model keeps packed texts apart.

    What a model does with position ids depends on its architecture: one that ignores them, or
    whose attention kernel does, or that carries a state along the row (Mamba, RWKV), would read one
    text as the beginning of the other. Two things must hold near rounding: what stands before a
    text in its row changes nothing in its outputs, and these are the outputs of the text alone.

    Args:
        task: It puts examples into batches.
        model: The model that will be trained; it is put into eval mode, and back.
        split: The train rows.

    Raises:
        LoraError: If packed logits are not those of the same texts alone.
    """
    examples = [split.examples[i] for i in (0, -1)]
    first, second = (
        {**e, **{key: e[key][:PROBE_TOKENS] for key in ("input_ids", "labels")}} for e in examples
    )
    size = len(task.tokenizer)
    other = {**first, "input_ids": [(token + 1) % size for token in first["input_ids"]]}
    n_rows = min(2, task.micro_batch)  # some kernels unpack one row only
    start = len(first["input_ids"])
    was_training = model.training
    model.eval()
    try:
        with full_precision(model):
            packed, other_packed = (
                _logits(task, model, task.collate([one_row([before, second])] * n_rows).inputs)
                for before in (first, other)
            )
            alone = _logits(task, model, {"input_ids": torch.tensor([second["input_ids"]])})
        end = start + alone.shape[1]
        packed, other_packed = (logits[:, start:end] for logits in (packed, other_packed))
    except TypeError:  # its forward takes no position ids
        leaks = True
    else:
        seen = float((packed - other_packed).abs().max())
        apart = float((packed - alone).abs().max())
        # the kernels of both packs are the same, so hardly anything is lost to rounding there
        fine = SAME_KERNELS * torch.finfo(alone.dtype).eps * float(alone.abs().max())
        leaks = not (seen <= fine and apart <= tolerance(alone, 0.0, alone.dtype))
    finally:
        model.train(was_training)
    if leaks:
        raise LoraError(
            "this model lets packed texts see each other",
            task.recipe.at("train.packing"),
            "set `train.packing: false`",
        )


def _logits(task: TextTask, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return the model's scores, with the options that it is trained with."""
    device = next(model.parameters()).device
    return task.logits(model, {key: value.to(device) for key, value in inputs.items()})
