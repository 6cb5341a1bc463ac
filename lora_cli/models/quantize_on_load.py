"""Load a base and quantise its linear layers while their weights are read.

transformers reads a checkpoint tensor by tensor, directly to the device, and lets a quantizer
convert each one, so a full-precision copy of the whole model never exists. Quantizers are
registered by name; this one replaces linear layers by `QuantizedLinear`.

Embeddings, normalisations, the output layer of a language model and tensors tied to it, and all
modules that are trained in full are not quantised.
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
    """The `quantization_config` argument for `from_pretrained`.

    Args:
        kind: The format of the weights.
        unquantized: Names of modules that are not quantised.
    """

    def __init__(self, kind: Format, unquantized: Collection[str] = ()) -> None:
        _register()
        self.quant_method: Any = METHOD
        self.kind, self.unquantized = kind, list(unquantized)


def quantize_linears(model: nn.Module, kind: Format, unquantized: Collection[str]) -> None:
    """Replace the linear layers of a model on the meta device by quantised layers without weights.

    Args:
        model: The model, changed in place.
        kind: The format of the weights.
        unquantized: Names of modules that are not replaced, including their submodules.
    """
    for name, module in list(model.named_modules()):
        # subclasses of linear layers may compute something else
        is_excluded = any(f".{module_name}." in f".{name}." for module_name in unquantized)
        if is_excluded or type(module) not in (nn.Linear, Conv1D):
            continue
        transposed = isinstance(module, Conv1D)
        n_out, n_in = module.weight.T.shape if transposed else module.weight.shape
        layer = QuantizedLinear(n_in, n_out, module.bias, kind, transposed, module.weight.device)
        # a placeholder until the weight is read: some versions of transformers cast weights to the
        # dtype of this parameter, and casting them to the dtype of the codes would give zeros
        layer.weight = nn.Parameter(module.weight.detach(), requires_grad=False)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)


class _Quantizer(HfQuantizer):  # type: ignore[misc]  # transformers has no types
    """Called by `from_pretrained` before, while and after it reads the weights."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        config = self.quantization_config
        unquantized = [
            *get_keys_to_not_convert(model),
            *(model._keep_in_fp32_modules or ()),
            *config.unquantized,
        ]
        quantize_linears(model, config.kind, unquantized)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        for module in model.modules():
            if isinstance(module, QuantizedLinear):  # transformers would train the scales
                module.requires_grad_(False)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        module, name = param_name.rpartition(".")[::2]
        return name == "weight" and isinstance(model.get_submodule(module), QuantizedLinear)

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Any) -> float:
        """Return the bytes per weight, by which transformers preallocates memory."""
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
    """Converts a weight that was read to its quantised tensors."""

    def convert(self, input_dict: dict[str, Any], **options: Any) -> dict[str, torch.Tensor]:
        result: dict[str, torch.Tensor] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            module = name.removesuffix(".weight")
            layer = options["model"].get_submodule(module)
            weight = weight.T if layer.transposed else weight
            tensors = quantized(weight, layer.kind)
            result |= {f"{module}.{key}": tensor for key, tensor in tensors.items()}
        return result


@functools.cache
def _register() -> None:
    register_quantization_config(METHOD)(QuantizeOnLoad)
    register_quantizer(METHOD)(_Quantizer)
