"""Several texts in one row, none of which sees another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lora_cli.data.plan import pack
from lora_cli.errors import LoraError
from lora_cli.tasks.base import IGNORED, Encoded, Example
from lora_cli.tasks.causal_lm import CausalLM

PROBE_TOKENS = 32  # of each text that is packed on trial


class Packed:
    """Several examples in one row; looks like the data set that it is made from.

    Args:
        task: Says how many tokens a row takes, and by its recipe's seed what comes together.
        split: The examples.
    """

    def __init__(self, task: CausalLM, split: Encoded) -> None:
        self.split = split
        self.packs = pack(split.lengths.tolist(), task.max_length, task.recipe.train.seed)
        self.lengths = np.array([split.lengths[members].sum() for members in self.packs])

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> Example:
        return one_row(self.split.examples.__getitems__(self.packs[index]))


def one_row(examples: Sequence[Example]) -> Example:
    """Return several examples as one; the first token of each is not predicted."""
    return {
        "input_ids": [token for e in examples for token in e["input_ids"]],
        "labels": [label for e in examples for label in [IGNORED, *e["labels"][1:]]],
        "position_ids": [i for e in examples for i in range(len(e["input_ids"]))],
        "row": examples[0]["row"],
    }


@torch.no_grad()
def check_packing(task: CausalLM, model: nn.Module, split: Encoded) -> None:
    """Check on packs of real examples that the model keeps packed texts apart.

    What a model makes of position ids is its own affair: one that ignores them, or whose attention
    kernel does, would read one text as the other's beginning.

    Args:
        task: It puts examples into batches.
        model: The model that will be trained; it is put into eval mode, and back.
        split: The train rows.

    Raises:
        LoraError: If packed logits are not those of the same texts alone.
    """
    examples = [split.examples[i] for i in (0, -1)]
    short = [
        {**e, **{key: e[key][:PROBE_TOKENS] for key in ("input_ids", "labels")}} for e in examples
    ]
    n_rows = min(2, task.recipe.train.micro_batch)  # some kernels unpack one row only
    packed = task.collate([one_row(short)] * n_rows).inputs
    was_training = model.training
    model.eval()
    try:
        together = _logits(model, packed)
        as_one = _logits(model, {"input_ids": packed["input_ids"]})
        alone = [torch.tensor([example["input_ids"]]) for example in short]
        apart = torch.cat([_logits(model, {"input_ids": ids}) for ids in alone], dim=1)
    except TypeError:  # its forward takes no position ids
        leaks = True
    else:
        rounding = 4 * torch.finfo(apart.dtype).eps * apart.abs().max()
        leak, most = (together - apart).abs().max(), (as_one - apart).abs().max()
        leaks = bool(leak > torch.maximum(0.1 * most, rounding))
    finally:
        model.train(was_training)
    if leaks:
        raise LoraError(
            "this model lets packed texts see each other",
            task.recipe.at("train.packing"),
            "set `train.packing: false`",
        )


def _logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    device = next(model.parameters()).device
    moved = {key: value.to(device) for key, value in inputs.items()}
    logits: Tensor = model(**moved, use_cache=False).logits
    return logits
