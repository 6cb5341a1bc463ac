"""Values that a recipe leaves open and that a command determines while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from lora_cli.recipe.spec import AdapterSpec, Recipe, TrainSpec

Checkpointing = bool | Literal["offload"]


@dataclass
class Learned:
    """Values that the recipe leaves open, learned while a command runs.

    The recipe itself never changes. This object is created once, together with the task, and passed
    on. Each attribute is set in only one place.

    Args:
        task: Values for keys of the recipe's task section: the labels, their weights, the tagging
            scheme. The task sets them after reading the rows.
        adapter: The adapter section, with the values that the adapter in `adapter.from` decides.
            Set by `make_trainable`, or by the checkpoint of a run that is resumed.
        in_checkpoint: Whether the adapter's parameters are in the checkpoint of a run that is
            resumed. They are then neither read from `adapter.from` nor computed from the base's
            weights again.
        ranks: With `init: eva`, the rank of each module in that checkpoint.
        micro_batch: Examples per forward pass, if the run chooses the number: because
            `micro_batch_size` is `auto`, or because the micro-batches of a step are computed
            together. Set by the run, or by the checkpoint of a run that is resumed.
        checkpointing: How activations are recomputed, if the run chooses it because
            `gradient_checkpointing` is `auto`. Set like `micro_batch`.
        token_ids: Tokens whose rows of the embedding are trained. The task sets them after loading
            the tokenizer.
    """

    task: dict[str, Any] = field(default_factory=dict)
    adapter: AdapterSpec | None = None
    in_checkpoint: bool = False
    ranks: dict[str, int] = field(default_factory=dict)
    micro_batch: int | None = None
    checkpointing: Checkpointing | None = None
    token_ids: list[int] = field(default_factory=list)

    def completed(self, recipe: Recipe) -> Recipe:
        """Return the recipe with the learned values, as it is saved with the adapter."""
        values: dict[str, Any] = {f"task.{key}": value for key, value in self.task.items()}
        if self.adapter is not None:
            values["adapter"] = self.adapter
        return recipe.with_values(values)

    def checkpointing_of(self, train: TrainSpec) -> Checkpointing:
        """Return how activations are recomputed; for `auto`, False until the run has chosen."""
        setting = train.gradient_checkpointing
        return self.checkpointing or False if setting == "auto" else setting

    def micro_batch_of(self, train: TrainSpec) -> int:
        """Return the examples per forward pass; for `auto`, at most 8 until the run has chosen."""
        if self.micro_batch is not None:
            return self.micro_batch
        if train.micro_batch_size != "auto":
            return train.micro_batch_size
        return min(8, train.examples_per_step or 8)
