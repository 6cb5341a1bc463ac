"""What a task owes to those who load its model: the base, its frozen parts, and a probe of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from lora_cli.data.load_rows import SPLITS
from lora_cli.models.base_model import build_empty, load_config, load_pretrained, new_modules
from lora_cli.recipe import Recipe
from lora_cli.tasks.examples import Batch


class TaskModel(ABC):
    """The part of a task that knows the model; most tasks have one of transformers' own."""

    recipe: Recipe
    drawn: frozenset[str]  # parameters that the base's checkpoint lacks
    auto_class: Any
    """The transformers class that builds the model."""
    has_head: bool = False
    """Whether the task adds a head to the pretrained model."""

    def model_config(self) -> PretrainedConfig:
        """Return the model's configuration with the task's changes."""
        return load_config(self.recipe)

    def load_model(
        self, device: torch.device, dtype: torch.dtype | str | None = None
    ) -> tuple[nn.Module, list[str]]:
        """Return the base model, and the names of the modules that are new in it.

        Args:
            device: Where the weights go.
            dtype: How they are kept, instead of as the recipe says; `auto` is as the checkpoint.
        """
        named = (self.auto_class, self.recipe, self.model_config())
        model, missing = load_pretrained(*named, device, dtype, self.has_head)
        self.arrange_head(model, missing)
        self.adjust_config(model)
        self.drawn = frozenset(missing)
        return model, new_modules(model, missing) if self.has_head else []

    def arrange_head(self, model: nn.Module, missing: set[str]) -> None:  # noqa: B027 - optional
        """Put the outputs of a head that the checkpoint holds into the order of the task's own."""

    def empty_model(self) -> tuple[nn.Module, list[str]]:
        """Return the same without weights."""
        model = build_empty(self.auto_class, self.recipe, self.model_config())
        return model, new_modules(model) if self.has_head else []

    def adjust_config(self, model: nn.Module) -> None:  # noqa: B027 - optional
        """Set what the task decides of the configurations of a model that was loaded."""

    def fit_to_model(self, model: nn.Module, longest: int | None = None) -> None:  # noqa: B027 - optional
        """Try the model on small batches, and choose what depends on it, such as the padding.

        Args:
            model: The model that will be used; it is left as it was.
            longest: Cost of the longest example, if that is known.

        Raises:
            LoraError: If the model is of no use for the task, or if what it says of an example
                depends on the others of the batch.
        """

    def frozen_parts(self, model: nn.Module) -> Mapping[str, nn.Module]:
        """Return frozen models whose outputs for an example are computed once, and kept.

        They may be parts of the model, or models that the task holds itself, as a teacher. What is
        kept depends on their tensors, and on the example as `prepare` returns it in evaluation.
        """
        return {}

    def frozen_outputs(
        self, model: nn.Module, batch: Batch
    ) -> Mapping[str, Tensor | Sequence[Tensor]]:
        """Return what the frozen parts make of each example of a batch, by name.

        The examples that are collated then hold their rows of these tensors (B, …), or their own of
        B tensors. Where a batch has none (new rows), `forward` or `losses` has to compute them.
        """
        return {}

    frozen_splits: tuple[str, ...] = SPLITS
    """The splits whose examples need them."""

    @property
    def unused_parts(self) -> Sequence[str]:
        """Parts that pipelines of the base's kind may have, and the task leaves out."""
        return ()

    def release_frozen(self) -> None:  # noqa: B027 - optional
        """Let go of frozen models that the task holds itself: all their outputs are kept."""

    @property
    def teacher_identity(self) -> dict[str, str]:
        """What identifies the frozen models that the task holds itself, and a run depends on."""
        return {}

    @property
    def teacher_facts(self) -> dict[str, Any]:
        """What a report says of a teacher."""
        return {}

    def complete_data(self, device: torch.device) -> None:  # noqa: B027 - optional
        """Make what the data of a training need and do not have yet, such as drawn pictures.

        It is called before they are read, on one process.
        """

    def try_training(self, model: nn.Module, longest: int | None = None) -> None:  # noqa: B027 - optional
        """Compute small batches as in training, whose forward pass may ask for more.

        Raises:
            LoraError: If the model cannot compute them.
        """

    @abstractmethod
    def probe(self) -> dict[str, Tensor]:
        """Return inputs of the model to compare outputs on, the same every time."""

    def probed(self, model: nn.Module, probe: dict[str, Tensor]) -> Tensor:
        """Return what is compared of what a model makes of the probe."""
        return self.tensor_of(model(**probe))

    def reloaded(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        """Return a whole model from a folder that the model's `save_pretrained` wrote."""
        model: nn.Module = self.auto_class.from_pretrained(folder, dtype=dtype)
        return model

    def tensor_of(self, output: Any) -> Tensor:
        """Return what of a model's output is compared."""
        logits: Tensor = output.logits
        return logits

    def complete_from(self, tensors: Mapping[str, Tensor]) -> None:  # noqa: B027 - optional
        """Learn what the recipe of an adapter that another tool made would say, by its tensors.

        Raises:
            LoraError: If they do not tell what has to be known.
        """
