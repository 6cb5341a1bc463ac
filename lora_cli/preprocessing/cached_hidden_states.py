"""Compute the hidden states that enter the first trained layer once, and cache them on disk.

If all layers below it are frozen, their outputs for an example are the same in every epoch. The
outputs are cached next to the encoded rows, under a hash of the examples and of all frozen tensors.
Examples of the same shape are computed together, so that no padding is cached. The states of a
split are recomputed in every step if they take more than `data.cache_limit`, or if training
augments the inputs at random.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
import xxhash
from accelerate import Accelerator
from torch import Tensor, nn

from lora_cli.adapters.describe_trained import frozen_in_words
from lora_cli.adapters.frozen_lower_layers import FrozenLayers, find_frozen_layers
from lora_cli.data.dataset_cache import cached_dataset
from lora_cli.environment import installed_version
from lora_cli.preprocessing.cached_frozen_outputs import in_words
from lora_cli.preprocessing.encode import cache_key
from lora_cli.preprocessing.encoded_table import EncodedTable, TableWithStates
from lora_cli.recipe import Recipe
from lora_cli.tasks.cached_tensors import to_cached
from lora_cli.tasks.contract import Task, prepared_for_evaluation
from lora_cli.tasks.examples import Encoded, Example
from lora_cli.tasks.hidden_states import STATES, CachedState
from lora_cli.tasks.texts.padding import ROUNDING

N_DRAWS = 4  # of some examples, to test whether training changes the layers' inputs at random
N_TRIED = 4  # examples on which the outputs are compared with those of the whole model


class _TooLargeError(Exception):
    """The states of a split take more bytes than may be cached: about `n_bytes`."""

    def __init__(self, n_bytes: float) -> None:
        super().__init__(n_bytes)
        self.n_bytes = n_bytes


class _ShapeMismatchError(Exception):
    """The states are not one block per example that differs only in its first dimension.

    In XLNet, for example, the token dimension comes before the batch dimension.
    """


def find_layers(
    task: Task, model: nn.Module, splits: dict[str, Encoded], accelerator: Accelerator
) -> FrozenLayers | None:
    """Return the frozen layers below the first trained one, by running the task on an example."""

    def run() -> None:
        with accelerator.autocast():
            split = next(iter(splits.values()), None)
            if split is None:
                probe = {key: value.to(accelerator.device) for key, value in task.probe().items()}
                task.probed(model, probe)
            else:
                batch = task.collate(_prepared(task, split, [0])).to(accelerator.device)
                task.forward(model, batch)

    return find_frozen_layers(model, run)


def with_cached_hidden_states(
    task: Task, model: nn.Module, splits: dict[str, Encoded], accelerator: Accelerator
) -> dict[str, Encoded]:
    """Find the frozen layers of a model, and cache their outputs for each split that profits.

    Args:
        task: Gets the frozen layers, and a note on each split.
        model: The model, on its device.
        splits: The encoded rows, by the name of the split. `data.cache_limit` applies to their
            total, in this order.
        accelerator: The precision and the device.

    Returns:
        The splits; the examples of those that are cached contain their hidden states.
    """
    recipe, cached = task.recipe, dict(splits)
    if recipe.adapter.frozen_entries:
        task.notes.append(f"frozen: {frozen_in_words(model)}")
    task.frozen_layers = layers = find_layers(task, model, splits, accelerator)
    if layers is None:
        return cached
    bytes_left = recipe.data.cache_bytes
    status: dict[str, str] = {}
    passes = passes_over(recipe, splits)
    for name, split in splits.items():
        reason = _reason_not_to_cache(task, model)
        states = _States(task, model, accelerator, layers)
        if passes.get(name, 2.0) <= 1:
            reason = reason or "the run computes it once"
        try:
            reason = reason or states.reason_not_to_cache(name, split)
            if not reason:
                cached[name], n_bytes = states.with_states(split, bytes_left)
                bytes_left -= n_bytes
                status[name] = f"kept, {in_words(n_bytes)}"
                continue
        except _TooLargeError as error:
            reason = f"it takes about {in_words(error.n_bytes)}, and {in_words(bytes_left)} are "
            reason += f"left of `data.cache_limit` ({recipe.data.cache_limit})"
        except _ShapeMismatchError as error:
            reason = str(error)
        status[name] = f"not kept: {reason}"
    status = {"layers": f"{len(layers.frozen)} in evaluation mode", **status}
    task.frozen_facts = {"frozen_layers": "; ".join(f"{k}: {v}" for k, v in status.items())}
    task.notes.append(f"frozen {task.frozen_facts['frozen_layers']}")
    return cached


def passes_over(recipe: Recipe, splits: dict[str, Encoded]) -> dict[str, float]:
    """Return how often a run computes each example, for the splits that it may compute once."""
    train, passes = recipe.train, {"test": 1.0 + recipe.evaluate.baseline}
    if "train" in splits:
        steps = train.max_steps or 0
        epochs = 3.0 if train.epochs is None else train.epochs
        passes["train"] = steps * train.step_size / len(splits["train"]) if steps else epochs
    return passes


def _reason_not_to_cache(task: Task, model: nn.Module) -> str:
    """Return why no split can be cached, or ""."""
    assert task.frozen_layers is not None
    if not task.recipe.data.cache_bytes:
        return "`data.cache_limit` is 0"
    if not task.frozen_layers.recorded:
        return "its layers hand on more than hidden states"
    if task.same_in_any_batch:
        return "texts share rows"
    if task.several_inputs:
        return "an example has several texts"
    frozen_parts = set(task.frozen_parts(model).values())
    if any(module in frozen_parts for module in model.modules()):
        return "the task keeps what its frozen parts compute"
    return ""


def _prepared(task: Task, split: Encoded, positions: Sequence[int]) -> list[Example]:
    examples = split.examples.__getitems__(list(positions))
    return [prepared_for_evaluation(task, example) for example in examples]


@dataclass
class _States:
    """Computes, caches and checks the inputs of the first trained layer."""

    task: Task
    model: nn.Module
    accelerator: Accelerator
    layers: FrozenLayers

    @property
    def batch_size(self) -> int:
        """The number of examples in a forward pass."""
        return self.task.recipe.evaluate.micro_batch_size or 2 * self.task.micro_batch

    def reason_not_to_cache(self, name: str, split: Encoded) -> str:
        """Return why the states of a split cannot be cached, or ""."""
        if name == "train" and self.task.recipe.train.packing:
            return "`train.packing` puts several examples into a row"
        if name == "train" and self.inputs_vary(split):
            return "training draws the inputs anew in every epoch"
        return (
            "" if self.is_equivalent(split) else "with it alone, the model computes something else"
        )

    def inputs_vary(self, split: Encoded) -> bool:
        """Return whether the frozen layers' inputs are random in training, due to augmentation."""
        task = self.task
        if task.augments:
            return True
        if type(task).prepare is Task.prepare:
            return False
        positions = list(range(min(self.batch_size, len(split))))
        expected = task.collate(_prepared(task, split, positions)).inputs
        for draw in range(N_DRAWS):
            rng = np.random.default_rng((task.recipe.train.seed, draw))
            rows = split.examples.__getitems__(positions)
            drawn = task.collate([task.prepare(row, rng, training=True) for row in rows]).inputs
            if any(not torch.equal(drawn[name], expected[name]) for name in expected):
                return True
        return False

    @torch.no_grad()
    def is_equivalent(self, split: Encoded) -> bool:
        """Return whether the losses are the same with cached states, up to rounding.

        Caching the inputs of the first trained module is tried first, and then caching the outputs
        of the last frozen layers, as a model may have connections that skip the former.
        """
        by_length = np.argsort(split.lengths, kind="stable")
        positions = sorted(
            {int(by_length[i]) for i in np.linspace(0, len(split) - 1, N_TRIED).astype(int)}
        )
        was_training = self.model.training
        self.model.eval()
        try:
            with self.accelerator.autocast():
                if self._try_outputs_match(split, positions):
                    return True
                if self.layers.first is None or not self.layers.last:
                    return False
                self.layers = self.layers.recording_last()
                return self._try_outputs_match(split, positions)
        finally:
            self.model.train(was_training)

    def _try_outputs_match(self, split: Encoded, positions: list[int]) -> bool:
        """Compare the losses on some examples; a model that fails with cached states differs."""
        try:
            return self._outputs_match(split, positions)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # later layers need other outputs of the frozen layers
            return False

    def _outputs_match(self, split: Encoded, positions: list[int]) -> bool:
        task, device = self.task, self.accelerator.device
        plain_batch = task.collate(_prepared(task, split, positions)).to(device)
        expected = task.losses(self.model, task.forward(self.model, plain_batch), plain_batch)
        rows = split.examples.__getitems__(positions)
        for row, position in zip(rows, positions, strict=True):
            row[STATES] = self._compute(split, [position])[0]
            _require_same_form(row[STATES], rows[0][STATES])
        batch = task.batch([prepared_for_evaluation(task, row) for row in rows]).to(device)
        cached_losses = task.losses(self.model, task.output(self.model, batch), batch)
        dtype = self._dtype_of(row[STATES])
        rounding = 4 * ROUNDING.get(dtype, 128) * torch.finfo(dtype).eps
        for name, expected_losses in expected.items():
            finite = expected_losses.nan_to_num(0.0, 0.0, 0.0)
            limit = rounding * float(finite.abs().clamp(min=1.0).max())
            if not torch.allclose(
                cached_losses[name], expected_losses, rtol=0.0, atol=limit, equal_nan=True
            ):
                return False
        return True

    @staticmethod
    def _dtype_of(states: dict[str, CachedState]) -> torch.dtype:
        return next(iter(states.values())).dtype

    def _compute(self, split: Encoded, positions: Sequence[int]) -> list[dict[str, CachedState]]:
        """Return the states of examples of the same shape."""
        task = self.task
        batch = task.collate(_prepared(task, split, positions)).to(self.accelerator.device)
        with self.layers.recording() as states, torch.no_grad(), self.accelerator.autocast():
            task.forward(self.model, batch)
        by_example: list[dict[str, CachedState]] = [{} for _ in positions]
        for name, tensor in states.items():
            if len(tensor) != len(positions):
                raise _ShapeMismatchError("its layers do not compute a block for each example")
            for i in range(len(positions)):
                by_example[i][name] = CachedState.of(tensor[i])
        return by_example

    def with_states(self, split: Encoded, limit: int) -> tuple[Encoded, int]:
        """Return a split with the states in its examples, and their size in bytes.

        Raises:
            _TooLargeError: If the size is above the limit.
        """
        import datasets

        assert isinstance(split.examples, EncodedTable)
        groups = self._groups(split)
        order = np.concatenate([np.array(group, dtype=np.int64) for group in groups])
        first = self._compute(split, [int(order[0])])[0]
        names = list(first)
        features = datasets.Features({name: datasets.Value("large_binary") for name in names})
        was_training = self.model.training
        self.model.eval()
        try:
            cached = cached_dataset(
                lambda: self._rows(split, groups, limit, first), self._key(split, names), features
            )
        finally:
            self.model.train(was_training)
        table = TableWithStates(split.examples, cached, order, first)
        if table.n_bytes > limit:  # cached when the limit was higher
            raise _TooLargeError(table.n_bytes)
        return replace(split, examples=table), table.n_bytes

    def _groups(self, split: Encoded) -> list[list[int]]:
        """Return groups of positions whose examples have the same shape, to compute together."""
        examples = split.examples.__getitems__(list(range(len(split))))
        shapes = [_shape(example) for example in examples]
        order = sorted(range(len(split)), key=lambda i: shapes[i])
        groups = [list(same) for _, same in groupby(order, key=lambda i: shapes[i])]
        size = self.batch_size
        return [group[i : i + size] for group in groups for i in range(0, len(group), size)]

    def _rows(
        self,
        split: Encoded,
        groups: list[list[int]],
        limit: int,
        first_states: dict[str, CachedState],
    ) -> Iterator[dict[str, bytes]]:
        """Yield the states of each example, group after group.

        Raises:
            _TooLargeError: As soon as they exceed the limit, or clearly will.
            _ShapeMismatchError: If the states of an example do not fit the others.
        """
        n_bytes, cost, total = 0, 0, max(int(split.lengths.sum()), 1)
        for group in groups:
            for states in self._compute(split, group):
                _require_same_form(states, first_states)
                n_bytes += sum(state.values.nbytes for state in states.values())
                yield {name: state.values.tobytes() for name, state in states.items()}
            cost += int(split.lengths[group].sum())
            expected = n_bytes * total / max(cost, 1)
            if n_bytes > limit or expected > 2 * limit:
                raise _TooLargeError(max(expected, n_bytes))

    def _key(self, split: Encoded, names: list[str]) -> list[str]:
        """Return everything that the states of a split depend on."""
        task, accelerator = self.task, self.accelerator
        config = json.dumps(task.base_facts.get("config"), sort_keys=True, default=str)
        attention = getattr(getattr(self.model, "config", None), "_attn_implementation", None)
        setup = (
            f"{accelerator.mixed_precision} {accelerator.device.type} {self.batch_size} {attention}"
        )
        kind = "inputs" if self.layers.first is not None else "outputs"
        return [
            f"states, {kind} of {' '.join(names)}",
            *cache_key(task, split.rows),
            config,
            str(task.base_facts.get("processor")),
            f"{setup} {task.layout} {task.recipe.train.seed} torch {installed_version('torch')}",
            self._hash(),
        ]

    def _hash(self) -> str:
        """Return a hash (xxh3, 128 bits) of all frozen tensors of the model."""
        state = xxhash.xxh3_128()
        tensors: list[tuple[str, Tensor]] = [*self.model.named_buffers()]
        tensors += [(n, p) for n, p in self.model.named_parameters() if not p.requires_grad]
        for name, tensor in tensors:
            state.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            state.update(to_cached(tensor)["data"])
        return state.hexdigest()


def _require_same_form(states: dict[str, CachedState], like: dict[str, CachedState]) -> None:
    if not all(state.is_like(like[name]) for name, state in states.items()):
        raise _ShapeMismatchError("the hidden states of examples differ in more than their length")


def _shape(example: Example) -> tuple[int, ...]:
    """Return the lengths of the sequences of an example."""
    values: Sequence[Any] = [example[name] for name in sorted(example)]
    return tuple(len(value) for value in values if isinstance(value, list | np.ndarray))
