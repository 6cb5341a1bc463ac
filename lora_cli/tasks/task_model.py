"""The part of `Task` about its model: loading the base, its frozen parts, and a probe."""

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
    """The methods of a task about its model, which most tasks take from transformers."""

    recipe: Recipe
    drawn: frozenset[str]  # parameters that the base's checkpoint lacks
    auto_class: Any
    """The transformers class that builds the model."""
    other_auto_classes: tuple[Any, ...] = ()
    """Classes for models of another kind, for which the task has a subclass."""
    has_head: bool = False
    """Whether the task adds a head to the pretrained model."""

    def model_config(self) -> PretrainedConfig:
        """Return the model's configuration with the task's changes."""
        return load_config(self.recipe)

    def load_model(
        self, device: torch.device, dtype: torch.dtype | str | None = None
    ) -> tuple[nn.Module, list[str]]:
        """Return the base model, and the names of the modules that the task added to it.

        Args:
            device: The device for the weights.
            dtype: The dtype to store them in, instead of the recipe's; `auto` is the checkpoint's.
        """
        named = (self.auto_class, self.recipe, self.model_config())
        model, missing = load_pretrained(*named, device, dtype, self.has_head)
        self.arrange_head(model, missing)
        self.adjust_config(model)
        self.drawn = frozenset(missing)
        return model, new_modules(model, missing) if self.has_head else []

    def arrange_head(self, model: nn.Module, missing: set[str]) -> None:  # noqa: B027 - optional
        """Put the outputs of a pretrained head into the order of the task's labels."""

    def empty_model(self) -> tuple[nn.Module, list[str]]:
        """Return the same as `load_model`, but without weights."""
        model = build_empty(self.auto_class, self.recipe, self.model_config())
        return model, new_modules(model) if self.has_head else []

    def adjust_config(self, model: nn.Module) -> None:  # noqa: B027 - optional
        """Change the configuration of a loaded model as the task needs it."""

    def fit_to_model(self, model: nn.Module, longest: int | None = None) -> None:  # noqa: B027 - optional
        """Try the model on small batches, and choose what depends on it, such as the padding.

        Args:
            model: The model that will be used; it is not changed.
            longest: The cost of the longest example, if it is known.

        Raises:
            LoraError: If the model does not suit the task, or if its outputs for an example depend
                on the other examples of the batch.
        """

    def frozen_parts(self, model: nn.Module) -> Mapping[str, nn.Module]:
        """Return the frozen models whose outputs for an example are computed once and cached.

        They may be parts of the model, or other models of the task, such as a teacher. The cached
        outputs depend on their tensors, and on the example as `prepare` returns it in evaluation.
        """
        return {}

    def frozen_outputs(
        self, model: nn.Module, batch: Batch
    ) -> Mapping[str, Tensor | Sequence[Tensor]]:
        """Return the outputs of the frozen parts for each example of a batch, by name.

        An example that is collated later contains its row of each tensor (B, …), or its own one of
        B tensors. For examples without cached outputs (new rows), `forward` or `losses` computes
        them.
        """
        return {}

    frozen_splits: tuple[str, ...] = SPLITS
    """The splits whose examples need the outputs of frozen parts."""

    @property
    def unused_parts(self) -> Sequence[str]:
        """Parts that a pipeline of this kind may have, and that the task does not use."""
        return ()

    def release_frozen(self) -> None:  # noqa: B027 - optional
        """Free the task's other frozen models once all their outputs are cached."""

    @property
    def teacher_identity(self) -> dict[str, str]:
        """The identity of the task's other frozen models, which affect the result of a run."""
        return {}

    @property
    def teacher_facts(self) -> dict[str, Any]:
        """What the report says about the teacher."""
        return {}

    def complete_data(self, device: torch.device) -> None:  # noqa: B027 - optional
        """Create missing files that training needs, such as generated images.

        It is called in one process, before the data are read.
        """

    def try_training(self, model: nn.Module, longest: int | None = None) -> None:  # noqa: B027 - optional
        """Run small batches as in training, which may require more than evaluation.

        Raises:
            LoraError: If the model cannot compute them.
        """

    @abstractmethod
    def probe(self) -> dict[str, Tensor]:
        """Return fixed inputs on which the outputs of models are compared."""

    def probed(self, model: nn.Module, probe: dict[str, Tensor]) -> Tensor:
        """Return the outputs of a model for the probe, for comparison."""
        return self.tensor_of(model(**probe))

    def reloaded(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        """Return a whole model from a folder that the model's `save_pretrained` wrote."""
        model: nn.Module = self.auto_class.from_pretrained(folder, dtype=dtype)
        return model

    def tensor_of(self, output: Any) -> Tensor:
        """Return the part of a model's output that is used for comparison."""
        logits: Tensor = output.logits
        return logits

    def complete_from(self, tensors: Mapping[str, Tensor]) -> None:  # noqa: B027 - optional
        """Learn settings such as the labels from the tensors of another tool's adapter.

        Raises:
            LoraError: If the tensors do not show it.
        """
