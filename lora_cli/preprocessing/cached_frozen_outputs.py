"""What the frozen parts of a model make of each example: computed once, and kept on the disk.

An autoencoder's latents, a prompt's embeddings, a teacher's answers are the same in every epoch.
They are kept as they are, in the dtype in which they were computed, in the cache of encoded rows,
under a hash of the examples and of all tensors of the frozen parts. The outputs of a split are not
kept if they take more than `data.cache_limit`, or if training draws their inputs anew in every
epoch: its batches come without them, and `Task.forward` computes them in every step.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lora_cli.data.dataset_cache import cached_dataset
from lora_cli.errors import counted, warn
from lora_cli.preprocessing.encode import cache_key
from lora_cli.preprocessing.encoded_table import EncodedTable
from lora_cli.tasks.cached_tensors import FEATURE, hash_of, kept, restored
from lora_cli.tasks.contract import Task, prepared_for_evaluation
from lora_cli.tasks.examples import Batch, Encoded, Example

DRAWS = 4  # of each of some examples, to find out whether training draws what frozen parts read
Tensors = Tensor | Sequence[Tensor]  # of a batch: a row, or one, for each example
UNITS = ("B", "kB", "MB", "GB", "TB")


class _TooLargeError(Exception):
    """The outputs of a split take more bytes than may be kept: about so many."""

    def __init__(self, n_bytes: float) -> None:
        super().__init__(n_bytes)
        self.n_bytes = n_bytes


def with_cached_frozen_outputs(
    task: Task, model: nn.Module, splits: dict[str, Encoded], accelerator: Accelerator
) -> dict[str, Encoded]:
    """Return splits whose examples hold what the task's frozen parts make of them, if it has such.

    Args:
        task: Says which parts are frozen, and what is kept of them.
        model: The model, on its device.
        splits: The encoded rows, by the name of the split. `data.cache_limit` is for all together,
            in their order.
        accelerator: Precision and device.

    Returns:
        The same, where nothing can be kept; why is printed.
    """
    parts = task.frozen_parts(model)
    left = task.recipe.data.cache_bytes
    if not parts or not left:
        return splits
    outputs = _Outputs(task, model, parts, accelerator)
    found, is_kept = {}, not task.recipe.data.streaming
    for name, split in splits.items():
        found[name], why = split, ""
        if name not in task.frozen_splits:
            continue
        if name == "train" and outputs.are_drawn(split):
            why = "`train` draws their inputs anew in every epoch"
        else:
            try:
                found[name], n_bytes = outputs.added_to(name, split, left)
                left -= n_bytes
            except _TooLargeError as error:
                why = f"{counted(len(split), 'example')} of `{name}` take about "
                why += f"{in_words(error.n_bytes)}, and {in_words(left)} are left of "
                why += f"`data.cache_limit` ({task.recipe.data.cache_limit})"
        if why and accelerator.is_main_process:
            which = " and ".join(f"`{part}`" for part in parts)
            verb = "computes" if len(parts) == 1 else "compute"
            warn(f"what the frozen {which} {verb} is not kept, but computed in every step: {why}")
        is_kept &= not why
    if is_kept:
        task.release_frozen()
    return found


def in_words(n_bytes: float) -> str:
    """Return a number of bytes in units of 1000: `3.2 GB`."""
    power = 0
    while n_bytes >= 1000 and power < len(UNITS) - 1:
        n_bytes, power = n_bytes / 1000, power + 1
    return f"{n_bytes:.1f} {UNITS[power]}" if power else f"{n_bytes:.0f} B"


@dataclass
class _Outputs:
    """Computes and keeps the outputs of the frozen parts of a model."""

    task: Task
    model: nn.Module
    parts: Mapping[str, nn.Module]
    accelerator: Accelerator

    @property
    def batch_size(self) -> int:
        """Examples that are computed at once."""
        return self.task.recipe.evaluate.micro_batch_size or 2 * self.task.micro_batch

    def added_to(self, name: str, split: Encoded, limit: int) -> tuple[Encoded, int]:
        """Return a split with the outputs in its examples, and how many bytes they take.

        Raises:
            _TooLargeError: If they take more than the limit.
        """
        import datasets

        names = list(self._of(self._prepared(split, [0])))
        task, accelerator = self.task, self.accelerator
        seed, precision = task.recipe.train.seed, accelerator.mixed_precision
        key = [
            "frozen outputs",
            *cache_key(task, split.rows, name == "train"),
            *(f"{name} {hash_of(part)}" for name, part in self.parts.items()),
            f"{precision} {accelerator.device.type} {self.batch_size} {seed}",
            *names,
        ]

        def feature(text: Any) -> Any:
            one = datasets.Value(text[0] if isinstance(text, list) else text)
            return datasets.List(one) if isinstance(text, list) else one

        types = {part: feature(text) for part, text in FEATURE.items()}
        features = datasets.Features(dict.fromkeys(names, types))
        added = cached_dataset(lambda: self._rows(name, split, limit), key, features)
        columns = (pc.struct_field(added.data.column(name), "data") for name in names)
        n_bytes = sum(pc.sum(pc.binary_length(column)).as_py() for column in columns)
        if n_bytes > limit:  # kept when the limit was another
            raise _TooLargeError(n_bytes)
        both = datasets.concatenate_datasets([split.examples.dataset, added], axis=1)
        return replace(split, examples=EncodedTable(both)), n_bytes

    def _rows(self, split_name: str, split: Encoded, limit: int) -> Iterator[dict[str, Any]]:
        """Yield what is kept of each example.

        Raises:
            _TooLargeError: As soon as it is more than the limit, or will clearly be.
        """
        n_bytes = 0
        for start in range(0, len(split), self.batch_size):
            stop = min(start + self.batch_size, len(split))
            found = self._of(self._prepared(split, list(range(start, stop))))
            n_bytes += sum(_size(tensors) for tensors in found.values())
            # the first examples may be long or short ones
            expected = n_bytes * int(split.lengths.sum()) / int(split.lengths[:stop].sum())
            if n_bytes > limit or expected > 2 * limit:
                raise _TooLargeError(expected)
            if not start and self.accelerator.is_main_process:
                self._announce(split_name, split, expected)
            for i in range(stop - start):
                yield {name: kept(tensor[i]) for name, tensor in found.items()}

    def _announce(self, name: str, split: Encoded, n_bytes: float) -> None:
        which = " and ".join(f"`{part}`" for part in self.parts)
        verb = "makes" if len(self.parts) == 1 else "make"
        sys.stderr.write(
            f"computing once what the frozen {which} {verb} of {counted(len(split), 'example')} of "
            f"{name}: about {in_words(n_bytes)} on the disk\n"
        )

    def are_drawn(self, split: Encoded) -> bool:
        """Return whether training draws what the frozen parts read, as augmentation does.

        A task says so; where it does not, some examples are prepared as in training several times,
        and the outputs compared with those that would be kept. Of equal inputs they are equal.
        """
        if self.task.augments:
            return True
        if type(self.task).prepare is Task.prepare:
            return False
        positions = list(range(min(self.batch_size, len(split))))
        examples = [restored(one) for one in split.examples.__getitems__(positions)]
        prepared = self._prepared(split, positions)
        plain, expected = self.task.collate(prepared), None
        for draw in range(DRAWS):
            rng = np.random.default_rng((self.task.recipe.train.seed, draw))
            drawn = [self.task.prepare(dict(one), rng, training=True) for one in examples]
            if _are_equal_batches(self.task.collate(drawn), plain):
                continue
            expected = self._of(prepared) if expected is None else expected
            found = self._of(drawn)
            if any(not _are_equal(found[name], of_name) for name, of_name in expected.items()):
                return True
        return False

    def _prepared(self, split: Encoded, positions: list[int]) -> list[Example]:
        found = split.examples.__getitems__(positions)
        return [prepared_for_evaluation(self.task, example) for example in found]

    @torch.no_grad()
    def _of(self, examples: list[Example]) -> Mapping[str, Tensors]:
        """Return the outputs of the frozen parts for some prepared examples."""
        was_training = self.model.training
        self.model.eval()
        batch = self.task.collate(examples).to(self.accelerator.device)
        with self.accelerator.autocast():
            found = self.task.frozen_outputs(self.model, batch)
        self.model.train(was_training)
        return found


def _are_equal_batches(one: Batch, other: Batch) -> bool:
    """Return whether two batches hold the same, bit for bit."""
    for a, b in ((one.inputs, other.inputs), (one.targets, other.targets)):
        if a.keys() != b.keys() or not all(torch.equal(a[name], b[name]) for name in a):
            return False
    return True


def _size(tensors: Tensors) -> int:
    """Return the bytes of a batch of outputs."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _are_equal(some: Tensors, others: Tensors) -> bool:
    return all(_is_equal(one, other) for one, other in zip(some, others, strict=True))


def _is_equal(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors differ by no more than rounding, which kernels may not repeat."""
    if one.shape != other.shape:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    largest = float(other.abs().nan_to_num(0.0, 0.0).max()) if other.numel() else 0.0
    tolerance = 16 * torch.finfo(one.dtype).eps * largest
    return bool(torch.allclose(one, other, rtol=0.0, atol=tolerance, equal_nan=True))
