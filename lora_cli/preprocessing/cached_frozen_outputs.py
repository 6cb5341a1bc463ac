"""Compute the outputs of a model's frozen parts once for each example, and cache them on disk.

The latents of an autoencoder, the embeddings of a prompt and the answers of a teacher are the same
in every epoch. They are cached next to the encoded rows, in the dtype in which they were computed,
under a hash of the examples and of all tensors of the frozen parts. The outputs of a split are not
cached if they take more than `data.cache_limit`, or if training augments their inputs at random.
Batches then lack them, and `Task.forward` computes them in every step.
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
from lora_cli.tasks.cached_tensors import FEATURE, hash_of, restored, to_cached
from lora_cli.tasks.contract import Task, prepared_for_evaluation
from lora_cli.tasks.examples import Batch, Encoded, Example

N_DRAWS = 4  # of some examples, to test whether training augments the inputs of frozen parts
Tensors = Tensor | Sequence[Tensor]  # of a batch: a row, or a tensor, for each example
UNITS = ("B", "kB", "MB", "GB", "TB")


class _TooLargeError(Exception):
    """The outputs of a split take more bytes than may be cached: about `n_bytes`."""

    def __init__(self, n_bytes: float) -> None:
        super().__init__(n_bytes)
        self.n_bytes = n_bytes


def with_cached_frozen_outputs(
    task: Task, model: nn.Module, splits: dict[str, Encoded], accelerator: Accelerator
) -> dict[str, Encoded]:
    """Add the cached outputs of the task's frozen parts, if it has any, to the examples of splits.

    Args:
        task: Defines the frozen parts and their outputs.
        model: The model, on its device.
        splits: The encoded rows, by the name of the split. `data.cache_limit` applies to their
            total, in this order.
        accelerator: The precision and the device.

    Returns:
        The splits. Those whose outputs cannot be cached are unchanged; the reason is printed.
    """
    parts = task.frozen_parts(model)
    bytes_left = task.recipe.data.cache_bytes
    if not parts or not bytes_left:
        return splits
    outputs = _Outputs(task, model, parts, accelerator)
    cached, is_cached = {}, not task.recipe.data.streaming
    for name, split in splits.items():
        cached[name], reason = split, ""
        if name not in task.frozen_splits:
            continue
        if name == "train" and outputs.inputs_vary(split):
            reason = "`train` draws their inputs anew in every epoch"
        else:
            try:
                cached[name], n_bytes = outputs.with_outputs(name, split, bytes_left)
                bytes_left -= n_bytes
            except _TooLargeError as error:
                reason = f"{counted(len(split), 'example')} of `{name}` take about "
                reason += f"{in_words(error.n_bytes)}, and {in_words(bytes_left)} are left of "
                reason += f"`data.cache_limit` ({task.recipe.data.cache_limit})"
        if reason and accelerator.is_main_process:
            names = " and ".join(f"`{part}`" for part in parts)
            verb = "computes" if len(parts) == 1 else "compute"
            warn(
                f"what the frozen {names} {verb} is not kept, but computed in every step: {reason}"
            )
        is_cached &= not reason
    if is_cached:
        task.release_frozen()
    return cached


def in_words(n_bytes: float) -> str:
    """Format a number of bytes in units of 1000: `3.2 GB`."""
    power = 0
    while n_bytes >= 1000 and power < len(UNITS) - 1:
        n_bytes, power = n_bytes / 1000, power + 1
    return f"{n_bytes:.1f} {UNITS[power]}" if power else f"{n_bytes:.0f} B"


@dataclass
class _Outputs:
    """Computes and caches the outputs of the frozen parts of a model."""

    task: Task
    model: nn.Module
    parts: Mapping[str, nn.Module]
    accelerator: Accelerator

    @property
    def batch_size(self) -> int:
        """The number of examples in a forward pass."""
        return self.task.recipe.evaluate.micro_batch_size or 2 * self.task.micro_batch

    def with_outputs(self, name: str, split: Encoded, limit: int) -> tuple[Encoded, int]:
        """Return a split with the outputs in its examples, and their size in bytes.

        Raises:
            _TooLargeError: If the size is above the limit.
        """
        import datasets

        names = list(self._compute(self._prepared(split, [0])))
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
            value = datasets.Value(text[0] if isinstance(text, list) else text)
            return datasets.List(value) if isinstance(text, list) else value

        types = {part: feature(text) for part, text in FEATURE.items()}
        features = datasets.Features(dict.fromkeys(names, types))
        added = cached_dataset(lambda: self._rows(name, split, limit), key, features)
        columns = (pc.struct_field(added.data.column(name), "data") for name in names)
        n_bytes = sum(pc.sum(pc.binary_length(column)).as_py() for column in columns)
        if n_bytes > limit:  # cached when the limit was higher
            raise _TooLargeError(n_bytes)
        both = datasets.concatenate_datasets([split.examples.dataset, added], axis=1)
        return replace(split, examples=EncodedTable(both)), n_bytes

    def _rows(self, split_name: str, split: Encoded, limit: int) -> Iterator[dict[str, Any]]:
        """Yield the cached outputs of each example.

        Raises:
            _TooLargeError: As soon as they exceed the limit, or clearly will.
        """
        n_bytes = 0
        for start in range(0, len(split), self.batch_size):
            stop = min(start + self.batch_size, len(split))
            outputs = self._compute(self._prepared(split, list(range(start, stop))))
            n_bytes += sum(_size(tensors) for tensors in outputs.values())
            # scaled by length, as the first examples may be shorter or longer than the others
            expected = n_bytes * int(split.lengths.sum()) / int(split.lengths[:stop].sum())
            if n_bytes > limit or expected > 2 * limit:
                raise _TooLargeError(expected)
            if not start and self.accelerator.is_main_process:
                self._announce(split_name, split, expected)
            for i in range(stop - start):
                yield {name: to_cached(tensor[i]) for name, tensor in outputs.items()}

    def _announce(self, name: str, split: Encoded, n_bytes: float) -> None:
        names = " and ".join(f"`{part}`" for part in self.parts)
        verb = "makes" if len(self.parts) == 1 else "make"
        sys.stderr.write(
            f"computing once what the frozen {names} {verb} of {counted(len(split), 'example')} of "
            f"{name}: about {in_words(n_bytes)} on the disk\n"
        )

    def inputs_vary(self, split: Encoded) -> bool:
        """Return whether the frozen parts' inputs are random in training, due to augmentation.

        A task may declare it. Otherwise, some examples are prepared several times as in training,
        and their outputs compared with the ones to cache. Equal inputs need no comparison.
        """
        if self.task.augments:
            return True
        if type(self.task).prepare is Task.prepare:
            return False
        positions = list(range(min(self.batch_size, len(split))))
        examples = [restored(example) for example in split.examples.__getitems__(positions)]
        prepared = self._prepared(split, positions)
        plain, expected = self.task.collate(prepared), None
        for draw in range(N_DRAWS):
            rng = np.random.default_rng((self.task.recipe.train.seed, draw))
            drawn = [self.task.prepare(dict(example), rng, training=True) for example in examples]
            if _are_equal_batches(self.task.collate(drawn), plain):
                continue
            expected = self._compute(prepared) if expected is None else expected
            outputs = self._compute(drawn)
            if any(not _are_equal(outputs[name], of_name) for name, of_name in expected.items()):
                return True
        return False

    def _prepared(self, split: Encoded, positions: list[int]) -> list[Example]:
        examples = split.examples.__getitems__(positions)
        return [prepared_for_evaluation(self.task, example) for example in examples]

    @torch.no_grad()
    def _compute(self, examples: list[Example]) -> Mapping[str, Tensors]:
        """Return the outputs of the frozen parts for prepared examples."""
        was_training = self.model.training
        self.model.eval()
        batch = self.task.collate(examples).to(self.accelerator.device)
        with self.accelerator.autocast():
            outputs = self.task.frozen_outputs(self.model, batch)
        self.model.train(was_training)
        return outputs


def _are_equal_batches(one: Batch, other: Batch) -> bool:
    """Return whether two batches are equal, bit for bit."""
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
    """Return whether two tensors are equal up to rounding, which can vary from call to call."""
    if one.shape != other.shape:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    largest = float(other.abs().nan_to_num(0.0, 0.0).max()) if other.numel() else 0.0
    tolerance = 16 * torch.finfo(one.dtype).eps * largest
    return bool(torch.allclose(one, other, rtol=0.0, atol=tolerance, equal_nan=True))
