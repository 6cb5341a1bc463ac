"""Read the original weights of a quantised base from its checkpoint, one at a time."""

from __future__ import annotations

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lora_cli.errors import IntegrityError
from lora_cli.models.base_model import storage_dtype
from lora_cli.models.find_base import checkpoint_files
from lora_cli.models.fingerprint import inner_name
from lora_cli.models.quantized_linear import QuantizedLinear, quantized
from lora_cli.recipe import Recipe
from lora_cli.tensorfile import read_header


class OriginalWeights:
    """Reads weights of a checkpoint by the names of a model's modules.

    Args:
        recipe: The `model` section names the checkpoint.
        model: The model that was loaded from it; may have adapter layers.
    """

    def __init__(self, recipe: Recipe, model: nn.Module) -> None:
        self.recipe, self.model = recipe, model
        self.prefix = f"{getattr(model, 'base_model_prefix', '')}."
        self.stored = {
            inner_name(name, self.prefix): (file, name)
            for file in checkpoint_files(recipe)
            for name in read_header(file)
        }

    def of(self, name: str) -> Tensor:
        """Return the weight (out, in) of a quantised module in float32, on its device.

        Raises:
            IntegrityError: If quantising the checkpoint's weight of this name does not give the
                module's codes, because transformers renamed, joined or changed it while loading.
        """
        module = self.model.get_submodule(name)
        base = getattr(module, "base", module)
        assert isinstance(base, QuantizedLinear)
        stored = self.stored.get(inner_name(f"{name}.weight", self.prefix))
        if stored is not None:
            file, stored_name = stored
            with safe_open(file, framework="pt") as tensors:
                weight: Tensor = tensors.get_tensor(stored_name)
            weight = weight.T if base.transposed else weight
            # quantising it again, as when it was loaded, must give the same codes
            weight = weight.to(base.weight.device, storage_dtype(self.recipe))
            if torch.equal(quantized(weight, base.kind)["weight"], base.weight):
                return weight.float()
        raise IntegrityError(
            f"the checkpoint has no weight of its own for `{name}`, as `init: loftq` needs",
            self.recipe.at("model.name"),
            "leave `init` out: the architecture's weights are converted while they are read",
        )
