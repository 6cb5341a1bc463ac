"""The hidden states that enter the first trained layer: computed once, and kept on the disk.

Where whole layers below it are frozen, they compute the same of an example in every epoch. Their
outputs lie in the cache of encoded rows, under a hash of the examples and of all that is frozen.
Examples of the same shape are computed together, so that no padding is kept. A split is computed
again in every step if its states take more than `data.cache_limit`, or if training draws its inputs
anew, as augmentation does.
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
from lora_cli.tasks.cached_tensors import kept as bytes_of
from lora_cli.tasks.contract import Task, prepared_for_evaluation
from lora_cli.tasks.examples import Encoded, Example
from lora_cli.tasks.hidden_states import STATES, KeptState
from lora_cli.tasks.texts.padding import ROUNDING

DRAWS = 4  # of some examples, to find out whether training draws what the layers read
TRIED = 4  # examples on which the outputs are compared with those of the whole model


class _TooLargeError(Exception):
    """The states of a split take more bytes than may be kept: about so many."""

    def __init__(self, n_bytes: float) -> None:
        super().__init__(n_bytes)
        self.n_bytes = n_bytes


class _UnlikeError(Exception):
    """The states are not a block an example, alike but for its first dimension; the text says why.

    XLNet's have the tokens first, and then the examples.
    """


def find_layers(
    task: Task, model: nn.Module, splits: dict[str, Encoded], accelerator: Accelerator
) -> FrozenLayers | None:
    """Return what lies below the first trained layer, as the task computes an example."""

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
    """Find the frozen layers of a model, and keep what they compute of each split where that pays.

    Args:
        task: Gets the layers that are frozen, and a note on each split.
        model: The model, on its device.
        splits: The encoded rows, by the name of the split. `data.cache_limit` is for all together,
            in their order.
        accelerator: Precision and device.

    Returns:
        The splits; where it is kept, their examples bring it along.
    """
    recipe, found = task.recipe, dict(splits)
    if recipe.adapter.frozen_entries:
        task.notes.append(f"frozen: {frozen_in_words(model)}")
    task.frozen_layers = layers = find_layers(task, model, splits, accelerator)
    if layers is None:
        return found
    left = recipe.data.cache_bytes
    said: dict[str, str] = {}
    passes = passes_over(recipe, splits)
    for name, split in splits.items():
        why = _why_not(task, model)
        states = _States(task, model, accelerator, layers)
        if passes.get(name, 2.0) <= 1:
            why = why or "the run computes it once"
        try:
            why = why or states.why_not(name, split)
            if not why:
                found[name], n_bytes = states.added_to(split, left)
                left -= n_bytes
                said[name] = f"kept, {in_words(n_bytes)}"
                continue
        except _TooLargeError as error:
            why = f"it takes about {in_words(error.n_bytes)}, and {in_words(left)} are left "
            why += f"of `data.cache_limit` ({recipe.data.cache_limit})"
        except _UnlikeError as error:
            why = str(error)
        said[name] = f"not kept: {why}"
    said = {"layers": f"{len(layers.frozen)} in evaluation mode", **said}
    task.frozen_facts = {"frozen_layers": "; ".join(f"{k}: {v}" for k, v in said.items())}
    task.notes.append(f"frozen {task.frozen_facts['frozen_layers']}")
    return found


def passes_over(recipe: Recipe, splits: dict[str, Encoded]) -> dict[str, float]:
    """Return how often a run computes the examples of each split, where that may be once."""
    train, found = recipe.train, {"test": 1.0 + recipe.evaluate.baseline}
    if "train" in splits:
        steps = train.max_steps or 0
        epochs = 3.0 if train.epochs is None else train.epochs
        found["train"] = steps * train.step_size / len(splits["train"]) if steps else epochs
    return found


def _why_not(task: Task, model: nn.Module) -> str:
    """Return why the states of no split are kept, or nothing."""
    assert task.frozen_layers is not None
    if not task.recipe.data.cache_bytes:
        return "`data.cache_limit` is 0"
    if not task.frozen_layers.recorded:
        return "its layers hand on more than hidden states"
    if task.same_in_any_batch:
        return "texts share rows"
    if task.several_inputs:
        return "an example has several texts"
    own = set(task.frozen_parts(model).values())
    if any(module in own for module in model.modules()):
        return "the task keeps what its frozen parts compute"
    return ""


def _prepared(task: Task, split: Encoded, positions: Sequence[int]) -> list[Example]:
    found = split.examples.__getitems__(list(positions))
    return [prepared_for_evaluation(task, example) for example in found]


@dataclass
class _States:
    """Computes, keeps and checks what enters the first trained layer."""

    task: Task
    model: nn.Module
    accelerator: Accelerator
    layers: FrozenLayers

    @property
    def batch_size(self) -> int:
        """Examples that are computed at once."""
        return self.task.recipe.evaluate.micro_batch_size or 2 * self.task.micro_batch

    def why_not(self, name: str, split: Encoded) -> str:
        """Return why the states of a split are not kept, or nothing."""
        if name == "train" and self.task.recipe.train.packing:
            return "`train.packing` puts several examples into a row"
        if name == "train" and self.are_drawn(split):
            return "training draws the inputs anew in every epoch"
        return "" if self.agree(split) else "with it alone, the model computes something else"

    def are_drawn(self, split: Encoded) -> bool:
        """Return whether training draws what the frozen layers read, as augmentation does."""
        task = self.task
        if task.augments:
            return True
        if type(task).prepare is Task.prepare:
            return False
        positions = list(range(min(self.batch_size, len(split))))
        expected = task.collate(_prepared(task, split, positions)).inputs
        for draw in range(DRAWS):
            rng = np.random.default_rng((task.recipe.train.seed, draw))
            rows = split.examples.__getitems__(positions)
            found = task.collate([task.prepare(row, rng, training=True) for row in rows]).inputs
            if any(not torch.equal(found[name], expected[name]) for name in expected):
                return True
        return False

    @torch.no_grad()
    def agree(self, split: Encoded) -> bool:
        """Return whether outputs are the same with kept states, up to rounding.

        What only the first trained module reads is tried first, and then what the last frozen
        layers compute: a model may have other ways past them.
        """
        by_length = np.argsort(split.lengths, kind="stable")
        some = sorted(
            {int(by_length[i]) for i in np.linspace(0, len(split) - 1, TRIED).astype(int)}
        )
        was_training = self.model.training
        self.model.eval()
        try:
            with self.accelerator.autocast():
                if self._agrees(split, some):
                    return True
                if self.layers.first is None or not self.layers.last:
                    return False
                self.layers = self.layers.recording_last()
                return self._agrees(split, some)
        finally:
            self.model.train(was_training)

    def _agrees(self, split: Encoded, positions: list[int]) -> bool:
        """Return the same of some examples; a model that then cannot compute does not agree."""
        try:
            return self._agree_on(split, positions)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # what comes after reads more of the frozen layers than hidden states
            return False

    def _agree_on(self, split: Encoded, positions: list[int]) -> bool:
        task, device = self.task, self.accelerator.device
        whole = task.collate(_prepared(task, split, positions)).to(device)
        expected = task.losses(self.model, task.forward(self.model, whole), whole)
        rows = split.examples.__getitems__(positions)
        for row, position in zip(rows, positions, strict=True):
            row[STATES] = self._of(split, [position])[0]
            _require_alike(row[STATES], rows[0][STATES])
        batch = task.batch([prepared_for_evaluation(task, row) for row in rows]).to(device)
        found = task.losses(self.model, task.output(self.model, batch), batch)
        dtype = self._dtype_of(row[STATES])
        rounding = 4 * ROUNDING.get(dtype, 128) * torch.finfo(dtype).eps
        for name, losses in expected.items():
            finite = losses.nan_to_num(0.0, 0.0, 0.0)
            limit = rounding * float(finite.abs().clamp(min=1.0).max())
            if not torch.allclose(found[name], losses, rtol=0.0, atol=limit, equal_nan=True):
                return False
        return True

    @staticmethod
    def _dtype_of(states: dict[str, KeptState]) -> torch.dtype:
        return next(iter(states.values())).dtype

    def _of(self, split: Encoded, positions: Sequence[int]) -> list[dict[str, KeptState]]:
        """Return the states of some examples of the same shape."""
        task = self.task
        batch = task.collate(_prepared(task, split, positions)).to(self.accelerator.device)
        with self.layers.recording() as states, torch.no_grad(), self.accelerator.autocast():
            task.forward(self.model, batch)
        found: list[dict[str, KeptState]] = [{} for _ in positions]
        for name, tensor in states.items():
            if len(tensor) != len(positions):
                raise _UnlikeError("its layers do not compute a block for each example")
            for i in range(len(positions)):
                found[i][name] = KeptState.of(tensor[i])
        return found

    def added_to(self, split: Encoded, limit: int) -> tuple[Encoded, int]:
        """Return a split with the states in its examples, and how many bytes they take.

        Raises:
            _TooLargeError: If they take more than the limit.
        """
        import datasets

        assert isinstance(split.examples, EncodedTable)
        groups = self._groups(split)
        order = np.concatenate([np.array(group, dtype=np.int64) for group in groups])
        first = self._of(split, [int(order[0])])[0]
        names = list(first)
        features = datasets.Features({name: datasets.Value("large_binary") for name in names})
        was_training = self.model.training
        self.model.eval()
        try:
            found = cached_dataset(
                lambda: self._rows(split, groups, limit, first), self._key(split, names), features
            )
        finally:
            self.model.train(was_training)
        table = TableWithStates(split.examples, found, order, first)
        if table.n_bytes > limit:  # kept when the limit was another
            raise _TooLargeError(table.n_bytes)
        return replace(split, examples=table), table.n_bytes

    def _groups(self, split: Encoded) -> list[list[int]]:
        """Return the positions of examples that are computed together, all of the same shape."""
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
        like: dict[str, KeptState],
    ) -> Iterator[dict[str, bytes]]:
        """Yield the states of each example, group after group.

        Raises:
            _TooLargeError: As soon as they are more than the limit, or will clearly be.
            _UnlikeError: If those of an example do not fit the others.
        """
        n_bytes, cost, total = 0, 0, max(int(split.lengths.sum()), 1)
        for group in groups:
            for states in self._of(split, group):
                _require_alike(states, like)
                n_bytes += sum(state.values.nbytes for state in states.values())
                yield {name: state.values.tobytes() for name, state in states.items()}
            cost += int(split.lengths[group].sum())
            expected = n_bytes * total / max(cost, 1)
            if n_bytes > limit or expected > 2 * limit:
                raise _TooLargeError(max(expected, n_bytes))

    def _key(self, split: Encoded, names: list[str]) -> list[str]:
        """Return all that the states of a split depend on."""
        task, accelerator = self.task, self.accelerator
        config = json.dumps(task.base_facts.get("config"), sort_keys=True, default=str)
        own = getattr(getattr(self.model, "config", None), "_attn_implementation", None)
        how = f"{accelerator.mixed_precision} {accelerator.device.type} {self.batch_size} {own}"
        kind = "inputs" if self.layers.first is not None else "outputs"
        return [
            f"states, {kind} of {' '.join(names)}",
            *cache_key(task, split.rows),
            config,
            str(task.base_facts.get("processor")),
            f"{how} {task.layout} {task.recipe.train.seed} torch {installed_version('torch')}",
            self._hash(),
        ]

    def _hash(self) -> str:
        """Return a hash (xxh3, 128 bits) of all tensors of the model that are not trained."""
        state = xxhash.xxh3_128()
        tensors: list[tuple[str, Tensor]] = [*self.model.named_buffers()]
        tensors += [(n, p) for n, p in self.model.named_parameters() if not p.requires_grad]
        for name, tensor in tensors:
            state.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            state.update(bytes_of(tensor)["data"])
        return state.hexdigest()


def _require_alike(states: dict[str, KeptState], like: dict[str, KeptState]) -> None:
    if not all(state.is_like(like[name]) for name, state in states.items()):
        raise _UnlikeError("the hidden states of examples differ in more than their length")


def _shape(example: Example) -> tuple[int, ...]:
    """Return how long the sequences of an example are."""
    values: Sequence[Any] = [example[name] for name in sorted(example)]
    return tuple(len(value) for value in values if isinstance(value, list | np.ndarray))
