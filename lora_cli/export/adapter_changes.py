"""Determine which parameters of a model an adapter's file changes, and how."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_cli.adapters.check_adapter import check_layers
from lora_cli.adapters.lora import LoRAEmbedding, LoRALayer, LoRALinear, Shape
from lora_cli.adapters.lora_parameter import LoRAParameter
from lora_cli.adapters.peft_format.adapter_folder import AdapterFolder, read_adapter
from lora_cli.adapters.peft_format.other_names import use_names_of
from lora_cli.adapters.peft_format.peft_experts import with_current_names
from lora_cli.adapters.peft_format.peft_tensors import sort_tensors
from lora_cli.adapters.peft_format.peft_tokens import SavedRows, saved_rows, split_rows
from lora_cli.adapters.peft_format.saved_buffers import without_buffers
from lora_cli.adapters.targets import Target
from lora_cli.adapters.variants import layer_for, layers_of
from lora_cli.models.stored_tensors import ExpertPart
from lora_cli.recipe import AdapterType

PLAIN = (LoRALinear, LoRAEmbedding)


@dataclass
class AdaptedParameter:
    """A parameter with a low-rank update.

    Args:
        target: The module, its rank and its alpha.
        module: The module without an adapter; may be on the meta device.
        kind: The type of the adapter.
        tensors: The layer's parameters by the layer's names.
        shapes: Their shapes, if they differ from the default.
        use_rslora: Whether the scaling is alpha / sqrt(rank).
        weight: The factor of the update when several adapters are added.
        all_updates: The cached update of all experts.
    """

    target: Target
    module: nn.Module
    kind: AdapterType
    tensors: dict[str, Tensor]
    shapes: dict[str, Shape] | None
    use_rslora: bool
    weight: float = 1.0
    all_updates: Tensor | None = None

    def layer(self) -> LoRALayer:
        """Return an adapter layer with the tensors of the file, on the CPU."""
        target = self.target
        if target.parameter is not None:
            target_args = (self.module, target.parameter, target.rank, target.alpha)
            layer: LoRALayer = LoRAParameter(*target_args, self.use_rslora)
        else:
            kind = layer_for(self.module, layers_of(self.kind))
            assert kind is not None, f"{target.name} was adapted and no layer fits it"
            options = (0.0, self.use_rslora, self.shapes)
            layer = kind(self.module, target.rank, target.alpha, *options)
        if layer.weight.is_meta:
            layer.to_empty(device="cpu", recurse=False)
        for name, tensor in self.tensors.items():
            layer.from_peft(name, tensor.clone())
        layer.scaling *= self.weight
        return layer

    def merged_expert(self, w0: Tensor, part: ExpertPart, alone: bool) -> Tensor:
        """Return the merged weight of one expert's part of a parameter.

        Args:
            w0: The part's weight in float32 (rows, in).
            part: The part.
            alone: Compute the update of this part by itself, not that of all experts at once,
                whose last digits may differ.
        """
        if alone:
            layer = self.layer()
            a, b = layer.lora_A[part.expert], layer.lora_B[part.expert, part.rows]
            return w0 + layer.scaling * (b @ a)
        if self.all_updates is None:
            self.all_updates = self.layer().delta_weight()
        return w0 + self.all_updates[part.expert, part.rows]

    def by_formula(self, w0: Tensor) -> Tensor | None:
        """Return W0 + s B A computed directly from the formula; None for other kinds of layers.

        Args:
            w0: In float32.
        """
        if self.target.parameter is not None:
            return None
        if layer_for(self.module, layers_of(self.kind)) not in PLAIN:
            return None
        a, b = self.tensors["lora_A"].float(), self.tensors["lora_B"].float()
        s = self.target.alpha / (math.sqrt(len(a)) if self.use_rslora else len(a))
        delta = (self.weight * s) * (b @ a)
        return w0 + (delta.T if isinstance(self.module, nn.Embedding | Conv1D) else delta)


@dataclass
class WeightedAdapter:
    """One of the adapters to merge.

    Args:
        saved: The adapter, with the names that `use_names_of` has translated.
        weight: The factor of its low-rank updates.
        in_full: Whether its modules trained in full are used, not those of another adapter.
        left_out: Names of tensors in its file that are not used.
    """

    saved: AdapterFolder
    weight: float = 1.0
    in_full: bool = True
    left_out: frozenset[str] = frozenset()


@dataclass
class AdapterChanges:
    """The changes of one adapter to a model, by parameter name.

    Args:
        adapted: Parameters with a low-rank update.
        trained: Parameters that are in the file in full.
        of_tokens: Parameters of which some rows are in the file.
        frozen: Copies of base parameters in the file.
    """

    adapted: dict[str, AdaptedParameter]
    trained: dict[str, Tensor]
    of_tokens: dict[str, SavedRows]
    frozen: dict[str, Tensor]


def changes_of(weighted: WeightedAdapter, model: nn.Module) -> AdapterChanges:
    """Return the changes of an adapter; its tensors are read from its folder again.

    Args:
        weighted: The adapter.
        model: The base model without an adapter; may be on the meta device.
    """
    adapter = weighted.saved
    reread = read_adapter(adapter.path)
    if reread.file is not None:
        use_names_of(model, reread)
    used = {
        name: tensor for name, tensor in reread.tensors.items() if name not in weighted.left_out
    }
    # names may have been translated since the first reading, in the same order
    tensors = without_buffers(dict(zip(adapter.tensors, used.values(), strict=True)), model)
    adapter, rows = split_rows(with_current_names(replace(adapter, tensors=tensors), model))
    kind, use_rslora = adapter.type, bool(adapter.config.get("use_rslora"))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules(remove_duplicate=False))
    kinds = sort_tensors(adapter.tensors, kind, parameters)
    targets, _ = check_layers(kinds.by_layer, model, adapter, layers_of(kind))
    adapted = {}
    for layer_name, (target, shapes) in targets.items():
        of_layer = (kind, kinds.by_layer[layer_name], shapes, use_rslora, weighted.weight)
        name = f"{target.name}.{target.parameter or 'weight'}"
        adapted[name] = AdaptedParameter(target, modules[target.name], *of_layer)
    of_tokens = {
        f"{module_name}.weight": saved
        for saved in saved_rows(model, rows, adapter)[0]
        for module_name in (saved.name, *saved.others)
    }
    return AdapterChanges(
        adapted, kinds.full_parameters if weighted.in_full else {}, of_tokens, kinds.base_copies
    )
