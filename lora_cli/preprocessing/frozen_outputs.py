"""What the frozen parts of a model make of each example: computed once, and kept on the disk.

An autoencoder's latents, a prompt's embeddings, a teacher's answers are the same in every epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import xxhash
from accelerate import Accelerator
from torch import nn

from lora_cli.data.dataset_cache import cached_dataset
from lora_cli.preprocessing.encode import cache_key
from lora_cli.preprocessing.encoded_table import EncodedTable
from lora_cli.tasks.contract import Task, prepared_for_evaluation
from lora_cli.tasks.examples import Encoded
from lora_cli.tasks.kept_tensors import FEATURE, kept


def with_frozen_outputs(
    task: Task, model: nn.Module, split: Encoded, accelerator: Accelerator
) -> Encoded:
    """Return a split whose examples hold what the task's frozen parts make of them, if it has such.

    Args:
        task: Says which parts are frozen, and what is kept of them.
        model: The model, on its device.
        split: The encoded rows.
        accelerator: Precision and device.
    """
    parts = task.frozen_parts(model)
    if not parts:
        return split
    import datasets

    names = _names(task, model, split, accelerator)
    size = task.recipe.evaluate.micro_batch_size or 2 * task.micro_batch
    key = [
        "frozen outputs",
        *cache_key(task, split.rows),
        *(f"{name} {_hash(part)}" for name, part in parts.items()),
        f"{accelerator.mixed_precision} {accelerator.device.type} {size} {task.recipe.train.seed}",
        *names,
    ]

    def outputs() -> Iterator[dict[str, Any]]:
        for start in range(0, len(split), size):
            positions = list(range(start, min(start + size, len(split))))
            found = _computed(task, model, split, positions, accelerator)
            for i in range(len(positions)):
                yield {name: kept(tensor[i]) for name, tensor in found.items()}

    def feature(text: Any) -> Any:
        one = text[0] if isinstance(text, list) else text
        return datasets.List(datasets.Value(one)) if isinstance(text, list) else datasets.Value(one)

    types = {part: feature(text) for part, text in FEATURE.items()}
    added = cached_dataset(outputs, key, datasets.Features(dict.fromkeys(names, types)))
    both = datasets.concatenate_datasets([split.examples.dataset, added], axis=1)
    return replace(split, examples=EncodedTable(both))


def _names(task: Task, model: nn.Module, split: Encoded, accelerator: Accelerator) -> list[str]:
    """Return what is kept, by what is computed of the first example."""
    return list(_computed(task, model, split, [0], accelerator))


@torch.no_grad()
def _computed(
    task: Task, model: nn.Module, split: Encoded, positions: list[int], accelerator: Accelerator
) -> Mapping[str, torch.Tensor]:
    """Return the outputs of the frozen parts for some examples."""
    was_training = model.training
    model.eval()
    examples = [
        prepared_for_evaluation(task, one) for one in split.examples.__getitems__(positions)
    ]
    batch = task.collate(examples).to(accelerator.device)
    with accelerator.autocast():
        found = task.frozen_outputs(model, batch)
    model.train(was_training)
    return found


def _hash(part: nn.Module) -> str:
    """Return a hash (xxh3, 128 bits) of all tensors of a frozen part.

    They are read as they are in memory: a part that was loaded in another dtype answers otherwise.
    """
    state = xxhash.xxh3_128()
    for name, tensor in part.state_dict().items():
        state.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        state.update(kept(tensor)["data"])
    return state.hexdigest()
