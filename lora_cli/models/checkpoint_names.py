"""Which parameter of a model a tensor of its checkpoint is.

transformers renames tensors while it loads them, and converts some: it joins those of experts, or
reorders rows. Of a converted tensor the file does not hold what the model computes with; only the
joined experts are known here, as parts of a parameter.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from lora_cli.models.fingerprint import inner_name
from lora_cli.models.stored_tensors import ExpertPart, expert_part

JOINED = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])


class NamePlace(NamedTuple):
    """What a tensor of a file is in the model: a whole tensor, a part of one, or neither."""

    name: str | None
    part: ExpertPart | None = None


class CheckpointNames:
    """Knows what transformers would do with each tensor of a model's checkpoint.

    Args:
        model: May be on the meta device; a part of a base of several counts as a model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.start = f"{getattr(model, 'base_model_prefix', '')}."
        transforms: list[Any] = []
        if isinstance(model, PreTrainedModel):
            transforms = get_model_conversion_mapping(model)
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        tensors = {**self.parameters, **dict(model.named_buffers(remove_duplicate=False))}
        self._by_inner = {inner_name(name, self.start): name for name in tensors}

    def place(self, stored_name: str, shape: tuple[int, ...]) -> NamePlace:
        """Return what a tensor is in the model.

        Args:
            stored_name: Its name in the file.
            shape: Its shape there.
        """
        name = stored_name
        for renaming in self._renamings:
            name, _ = renaming.rename_source_key(name)
        inner = inner_name(name, self.start)
        for converter in self._converters:
            _, pattern = converter.rename_source_key(name)
            if pattern is not None:
                joined = [type(step).__name__ for step in converter.operations] in JOINED
                return NamePlace(None, self._expert_part(inner, shape) if joined else None)
        return NamePlace(self._by_inner.get(inner))

    def _expert_part(self, inner: str, shape: tuple[int, ...]) -> ExpertPart | None:
        part = expert_part(inner, shape)
        name = self._by_inner.get(part.parameter) if part else None
        whole = self.parameters.get(name) if name else None
        if part is None or name is None or whole is None or not part.fits(tuple(whole.shape)):
            return None
        return part._replace(parameter=name)
