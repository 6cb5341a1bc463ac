"""Load a base whose linear layers are quantised while they are read.

transformers reads a checkpoint tensor by tensor, straight to the device, and lets a quantizer
replace each on the way, so a full-precision copy of the whole model never exists. It knows a
quantizer by its name; this one puts `QuantizedLinear` in the place of linear layers.

Embeddings, normalisations, the output layer of a language model, whatever is tied to it, and every
module that is trained in full keep their numbers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer, get_keys_to_not_convert
from transformers.utils.quantization_config import QuantizationConfigMixin

from lora_cli.models.quantized_linear import Format, QuantizedLinear, quantized

METHOD = "lora_cli"


class QuantizeOnLoad(QuantizationConfigMixin):  # type: ignore[misc]  # it has no types
    """What to pass to `from_pretrained` as `quantization_config`.

    Args:
        kind: How weights are kept.
        kept: Names of modules whose weights keep their numbers.
    """

    def __init__(self, kind: Format, kept: Collection[str] = ()) -> None:
        _register()
        self.quant_method: Any = METHOD
        self.kind, self.kept = kind, list(kept)


def quantize_linears(model: nn.Module, kind: Format, kept: Collection[str]) -> None:
    """Put layers without weights in the place of the linear layers of a model on `meta`.

    Args:
        model: Changed in place.
        kind: How weights are kept.
        kept: Names of modules that stay as they are, with all that is in them.
    """
    for name, module in list(model.named_modules()):
        # no subclass of a linear layer, which may compute something else
        is_kept = any(f".{top}." in f".{name}." for top in kept)
        if is_kept or type(module) not in (nn.Linear, Conv1D):
            continue
        transposed = isinstance(module, Conv1D)
        n_out, n_in = module.weight.T.shape if transposed else module.weight.shape
        layer = QuantizedLinear(n_in, n_out, module.bias, kind, transposed, module.weight.device)
        # until it is read: some versions of transformers cast what they read to the dtype of what
        # stands here, and every weight cast to the dtype of codes would be 0
        layer.weight = nn.Parameter(module.weight.detach(), requires_grad=False)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)


class _Quantizer(HfQuantizer):  # type: ignore[misc]  # transformers has no types
    """Called by `from_pretrained`, before, while and after it reads the weights."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        config = self.quantization_config
        kept = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or ()), *config.kept]
        quantize_linears(model, config.kind, kept)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        for module in model.modules():
            if isinstance(module, QuantizedLinear):  # transformers takes scales for weights
                module.requires_grad_(False)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        module, name = param_name.rpartition(".")[::2]
        return name == "weight" and isinstance(model.get_submodule(module), QuantizedLinear)

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Any) -> float:
        """Return the bytes that a number takes: transformers sets aside as much for all of them."""
        if not self.param_needs_quantization(model, param_name):
            return float(param.element_size())
        layer: Any = model.get_submodule(param_name.rpartition(".")[0])
        stored = layer.stored(layer.in_features, layer.out_features, layer.kind).values()
        n_bytes: float = sum(math.prod(shape) * dtype.itemsize for shape, dtype in stored)
        return n_bytes / int(param.numel())

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize()

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class _Quantize(ConversionOps):  # type: ignore[misc]  # transformers has no types
    """Turns the weight that was read into the tensors that it is kept in."""

    def convert(self, input_dict: dict[str, Any], **options: Any) -> dict[str, torch.Tensor]:
        result: dict[str, torch.Tensor] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            module = name.removesuffix(".weight")
            layer = options["model"].get_submodule(module)
            weight = weight.T if layer.transposed else weight
            found = quantized(weight, layer.kind)
            result |= {f"{module}.{key}": tensor for key, tensor in found.items()}
        return result


@functools.cache
def _register() -> None:
    register_quantization_config(METHOD)(QuantizeOnLoad)
    register_quantizer(METHOD)(_Quantizer)
