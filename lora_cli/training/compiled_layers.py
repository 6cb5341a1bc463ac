"""A model's repeated layers, compiled: torch fuses small kernels and keeps fewer activations.

Only the layers are compiled: they are most of the work, and identical layers share a compilation.
The rest of the model, with its Python code, stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch._inductor.config as inductor_config
from torch import Tensor, nn
from torch._inductor import inductor_prims
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy

from lora_cli.models.offloaded_inputs import OffloadingCheckpoint
from lora_cli.training.stacked_products import stacked_products, stacked_updates

MAX_SHAPES = 64  # torch compiles a layer again for each shape, and by default gives up after 8
# The share of the activations that is kept; the compiler recomputes the cheapest others. Batches
# with few shapes consist of short texts, which need little memory, so there all are kept.
MEMORY_BUDGET = 0.8
GATED_BUDGET = 0.9  # with the kernel for gated MLPs: at 0.8, attention would be recomputed too
# With gradient checkpointing, a layer keeps only its inputs and seeds. (At 0, the compiler would
# ignore what has to be kept.)
CHECKPOINTING_BUDGET = 1e-9
# fuse small kernels that do not depend on each other
OPTIONS: dict[str, Any] = {"combo_kernels": True, "combo_kernels_autotune": 0}


class KeptSeeds(CustomGraphPass):
    """A pass of the compiler that keeps the seeds of random numbers for the backward pass.

    The compiler may compute anything again instead of keeping it, and would also draw seeds again.
    The backward pass would then use other masks of dropout than the forward pass.
    """

    def __call__(self, graph: torch.fx.Graph) -> None:
        """Mark the seeds, and any other random values, of a forward and backward pass."""
        seeds = (inductor_prims.seed, inductor_prims.seeds)
        for node in graph.nodes:
            is_random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
            if node.op == "call_function" and (is_random or node.target in seeds):
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE

    def uuid(self) -> Any:
        """Return what identifies this pass in the compiler's cache."""
        return get_hash_for_files((__file__,))


class CompiledLayers:
    """The repeated layers of a model.

    Args:
        model: The model, whose layers run compiled only within `in_use`.
        few_shapes: Whether all batches consist of rows of the same width, for which a layer is
            compiled once. Otherwise its second compilation is for any length.
    """

    failure = "the model's layers cannot be compiled"

    def __init__(self, model: nn.Module, few_shapes: bool) -> None:
        self.layers = repeated_layers(model)
        self.few_shapes = few_shapes
        self.on_gpu = any(p.is_cuda for layer in self.layers[:1] for p in layer.parameters())
        trained = [p for layer in self.layers for p in layer.parameters() if p.requires_grad]
        # The order in which a vector's gradient is summed over rows may depend on the number of
        # rows at compilation. (The gradient of a matrix is a product, which cuBLAS computes.)
        any_rows = few_shapes and all(parameter.ndim == 2 for parameter in trained)
        self.compiled = [self._compile(layer, any_rows) for layer in self.layers]
        self.memory_budget = 1.0 if few_shapes else MEMORY_BUDGET
        # transformers' checkpointing would run a whole compiled layer again. The compiler
        # recomputes only what the gradients need, without the layer's last product.
        self.checkpointed: list[Any] = [
            layer for layer in self.layers if getattr(layer, "gradient_checkpointing", False)
        ]
        if self.checkpointed:
            self.memory_budget = CHECKPOINTING_BUDGET
        self.products: Sequence[AbstractContextManager[Any]] = []
        self.kind = "compiled layers"  # for the report

    def _compile(self, layer: nn.Module, any_rows: bool) -> Callable[..., Any]:
        dynamic = False if self.few_shapes else None
        known = {key: value for key, value in OPTIONS.items() if hasattr(inductor_config, key)}
        compiled: Callable[..., Any]
        options = known | {"joint_custom_post_pass": KeptSeeds()}
        compiled = torch.compile(layer.forward, dynamic=dynamic, options=options)
        if not any_rows:
            return compiled

        def forward(*arguments: Any, **named: Any) -> Any:
            for value in tree_leaves((arguments, named)):
                if isinstance(value, Tensor) and value.ndim > 2:
                    torch._dynamo.maybe_mark_dynamic(value, 0)  # any number of rows
            return compiled(*arguments, **named)

        return forward

    def choose_products(self, compute: Callable[[], Any]) -> None:
        """Choose what is computed together from now on.

        With short texts, linear layers with the same input become one product. With long texts,
        only their low-rank updates share a product, and those of gated MLPs are added by a kernel.

        Args:
            compute: Runs a forward pass.
        """
        if self.few_shapes:
            self.products = stacked_products(self.layers, compute)
            if self.on_gpu:
                from lora_cli.training.short_attention import uses_short_attention

                if uses_short_attention(compute):
                    self.kind += " (attention over short rows by a kernel of our own)"
        elif self.on_gpu:  # torch compiles with Triton there, so the kernel can use it too
            from lora_cli.training.gated_mlp import GatedMLPs

            gated = GatedMLPs(self.layers, compiled=True)
            self.products = [*stacked_updates(self.layers, compute, but=gated.layers), gated]
            if gated.replaced:
                self.kind += f" ({len(gated.replaced)} gated MLPs by a kernel of our own)"
                if not self.checkpointed:
                    self.memory_budget = GATED_BUDGET

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Run the layers compiled within the context."""
        own = [layer.__dict__.get("forward") for layer in self.layers]
        with ExitStack() as stack:
            patches = torch._dynamo.config.patch(recompile_limit=MAX_SHAPES)
            stack.enter_context(patches)
            budget = torch._functorch.config.patch(activation_memory_budget=self.memory_budget)
            stack.enter_context(budget)
            for product in self.products:
                stack.enter_context(product)
            if self.few_shapes and self.on_gpu:
                from lora_cli.training.short_attention import short_attention_in_use

                stack.enter_context(short_attention_in_use())
            try:
                for layer in self.checkpointed:
                    layer.gradient_checkpointing = False
                for layer, compiled in zip(self.layers, self.compiled, strict=True):
                    checkpoint: Any = getattr(layer, "_gradient_checkpointing_func", None)
                    offloads = isinstance(checkpoint, OffloadingCheckpoint)
                    layer.forward = checkpoint.inputs.wrap(compiled) if offloads else compiled
                yield
            finally:
                for layer in self.checkpointed:
                    layer.gradient_checkpointing = True
                for layer, forward in zip(self.layers, own, strict=True):
                    if forward is None:
                        del layer.forward
                    else:
                        layer.forward = forward


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of each list of at least two layers of one class, but none within another.

    Such a list is for example the encoder layers of BERT.
    """
    layers: list[nn.Module] = []
    for part in model.children():
        same_class = isinstance(part, nn.ModuleList) and len({type(layer) for layer in part}) == 1
        if same_class and len(part) > 1:  # type: ignore[arg-type]
            layers += list(part.children())
        else:
            layers += repeated_layers(part)
    return layers
