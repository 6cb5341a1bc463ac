"""What is learnt on the way, and a recipe leaves open."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from lora_cli.recipe.spec import AdapterSpec, Recipe, TrainSpec

Checkpointing = bool | Literal["offload"]


@dataclass
class Learned:
    """What a command learns that its recipe leaves open; the recipe itself never changes.

    It is created once, with the task, and handed on. Each part has one place that sets it.

    Args:
        task: Values of keys of the recipe's task section: the labels, their weights, the scheme of
            tags. The task sets them when it has seen the rows.
        adapter: The adapter section with what the adapter of `adapter.from` decides.
            `make_trainable` sets it, or the checkpoint of a run that is resumed.
        in_checkpoint: The adapter's parameters are in the checkpoint of a run that is resumed: they
            are neither read from `adapter.from` again, nor decomposed from the base's weights.
        ranks: With `init: eva`, the rank of each module in that checkpoint.
        token_ids: The tokens whose rows of the embedding are trained. The task sets them when it
            has its tokenizer.
        micro_batch: Examples of one forward pass, where the run chooses them: `micro_batch_size`
            is `auto`, or the micro-batches of a step are computed together. The run sets it, or
            the checkpoint of one that is resumed.
        checkpointing: How activations are computed again, where the run chooses it:
            `gradient_checkpointing` is `auto`. Set like `micro_batch`.
    """

    task: dict[str, Any] = field(default_factory=dict)
    adapter: AdapterSpec | None = None
    in_checkpoint: bool = False
    ranks: dict[str, int] = field(default_factory=dict)
    micro_batch: int | None = None
    checkpointing: Checkpointing | None = None
    token_ids: list[int] = field(default_factory=list)

    def completed(self, recipe: Recipe) -> Recipe:
        """Return the recipe with what is learnt: as `recipe.yaml` beside the adapter says it."""
        values: dict[str, Any] = {f"task.{key}": value for key, value in self.task.items()}
        if self.adapter is not None:
            values["adapter"] = self.adapter
        return recipe.with_values(values)

    def checkpointing_of(self, train: TrainSpec) -> Checkpointing:
        """Return how activations are computed again; `auto` is what was found, or False before."""
        asked = train.gradient_checkpointing
        return self.checkpointing or False if asked == "auto" else asked

    def micro_batch_of(self, train: TrainSpec) -> int:
        """Return the examples of one forward pass; `auto` is what was found, or 8 before."""
        if self.micro_batch is not None:
            return self.micro_batch
        if train.micro_batch_size != "auto":
            return train.micro_batch_size
        return min(8, train.examples_per_step or 8)
