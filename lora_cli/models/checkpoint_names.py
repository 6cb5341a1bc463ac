"""Map the tensors of a checkpoint to the parameters of a model.

transformers renames tensors while it loads them, and converts some: it joins the tensors of
experts, or reorders rows. Values of converted tensors in the file differ from those in the model.
Of the conversions, only joined experts are supported here, as parts of a parameter.
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


class Target(NamedTuple):
    """The counterpart of a stored tensor in the model: a tensor, a part of one, or neither."""

    name: str | None
    part: ExpertPart | None = None


class CheckpointNames:
    """Maps names in a checkpoint to names in the model, as transformers does while loading.

    Args:
        model: The model, or one part of a base of several models; may be on the meta device.
    """

    def __init__(self, model: nn.Module) -> None:
        self.prefix = f"{getattr(model, 'base_model_prefix', '')}."
        transforms: list[Any] = []
        if isinstance(model, PreTrainedModel):
            transforms = get_model_conversion_mapping(model)
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        tensors = {**self.parameters, **dict(model.named_buffers(remove_duplicate=False))}
        self._by_inner = {inner_name(name, self.prefix): name for name in tensors}

    def find(self, stored_name: str, shape: tuple[int, ...]) -> Target:
        """Return the counterpart of a stored tensor in the model.

        Args:
            stored_name: Its name in the file.
            shape: Its shape in the file.
        """
        name = stored_name
        for renaming in self._renamings:
            name, _ = renaming.rename_source_key(name)
        inner = inner_name(name, self.prefix)
        for converter in self._converters:
            _, pattern = converter.rename_source_key(name)
            if pattern is not None:
                joined = [type(step).__name__ for step in converter.operations] in JOINED
                return Target(None, self._expert_part(inner, shape) if joined else None)
        return Target(self._by_inner.get(inner))

    def _expert_part(self, inner: str, shape: tuple[int, ...]) -> ExpertPart | None:
        part = expert_part(inner, shape)
        name = self._by_inner.get(part.parameter) if part else None
        experts = self.parameters.get(name) if name else None
        if part is None or name is None or experts is None or not part.fits(tuple(experts.shape)):
            return None
        return part._replace(parameter=name)
