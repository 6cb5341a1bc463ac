"""Map the layer names of the original Flux and Stable Diffusion 3 checkpoints to diffusers' names.

kohya's scripts, XLabs and Black Forest Labs use the layer names of the original checkpoints. Some
of these layers are several modules in diffusers: `img_attn.qkv` is `to_q`, `to_k` and `to_v`,
stacked by rows. To convert an update B A of such a layer, B is split by rows, and each module gets
all of A.

    lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight        Flux, by kohya
    diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight     Flux, by other tools
    double_blocks.0.processor.qkv_lora1.down.weight                Flux, by XLabs
    lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight     Stable Diffusion 3, by kohya
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MAIN = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
OF_FLUX = {  # layers outside the blocks
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
OF_STABLE_DIFFUSION_3 = {
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
BLOCKS: dict[str, tuple[str, Mapping[str, Sequence[str]]]] = {
    # original name of a block: its name in diffusers, and the layers in it
    "double_blocks": ("transformer_blocks", {
        "img_attn.qkv": MAIN, "qkv_lora1": MAIN,
        "txt_attn.qkv": ADDED, "qkv_lora2": ADDED,
        "img_attn.proj": ("attn.to_out.0",), "proj_lora1": ("attn.to_out.0",),
        "txt_attn.proj": ("attn.to_add_out",), "proj_lora2": ("attn.to_add_out",),
        "img_mlp.0": ("ff.net.0.proj",), "img_mlp.2": ("ff.net.2",),
        "txt_mlp.0": ("ff_context.net.0.proj",), "txt_mlp.2": ("ff_context.net.2",),
        "img_mod.lin": ("norm1.linear",), "txt_mod.lin": ("norm1_context.linear",),
    }),
    "single_blocks": ("single_transformer_blocks", {
        "linear1": (*MAIN, "proj_mlp"), "qkv": MAIN,
        "linear2": ("proj_out",), "proj": ("proj_out",), "modulation.lin": ("norm.linear",),
    }),
    "joint_blocks": ("transformer_blocks", {
        "x_block.attn.qkv": MAIN, "context_block.attn.qkv": ADDED,
        "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
        "x_block.attn.proj": ("attn.to_out.0",), "x_block.attn2.proj": ("attn2.to_out.0",),
        "context_block.attn.proj": ("attn.to_add_out",),
        "x_block.mlp.fc1": ("ff.net.0.proj",), "x_block.mlp.fc2": ("ff.net.2",),
        "context_block.mlp.fc1": ("ff_context.net.0.proj",),
        "context_block.mlp.fc2": ("ff_context.net.2",),
        "x_block.adaLN_modulation.1": ("norm1.linear",),
        "context_block.adaLN_modulation.1": ("norm1_context.linear",),
    }),
}  # fmt: skip
XLABS = ("qkv_lora1", "qkv_lora2", "proj_lora1", "proj_lora2", "qkv", "proj")
BY_ROW = ("lora_B", "lora_magnitude_vector", "hada_w1_a", "hada_w2_a")  # a row for each output


@dataclass(frozen=True)
class Layer:
    """A layer of the original checkpoint.

    Args:
        modules: The diffusers modules that the layer consists of, in the order of its rows.
        is_swapped: Whether its first half are shifts and its second half scales, which are in the
            opposite order in diffusers.
    """

    modules: tuple[str, ...]
    is_swapped: bool = False

    @property
    def is_module(self) -> bool:
        """Whether the layer is identical to one diffusers module."""
        return len(self.modules) == 1 and not self.is_swapped


def original_layers(names: Collection[str], with_xlabs: bool = True) -> dict[str, Layer]:
    """Return the layers of a transformer by their original names.

    Args:
        names: Names of the modules of diffusers' transformer.
        with_xlabs: Whether to include the names that XLabs uses.
    """
    known = set(names)
    is_flux = any(name.startswith("single_transformer_blocks.") for name in known)
    outside = OF_FLUX if is_flux else OF_STABLE_DIFFUSION_3
    result = {original: Layer((diffusers_name,)) for original, diffusers_name in outside.items()}
    result["final_layer.adaLN_modulation.1"] = Layer(("norm_out.linear",), True)
    blocks = {name for name in known if re.match(r"(single_)?transformer_blocks\.\d+\.", name)}
    for block in sorted({".".join(name.split(".")[:2]) for name in blocks}):
        kind, number = block.split(".")
        # the last block's text output is unused: its norm has the form of the final norm
        is_last = f"{block}.ff_context.net.2" not in known
        for original, (diffusers_name, layers) in BLOCKS.items():
            for layer, inner in layers.items():
                is_of_model = (original == "joint_blocks") != is_flux
                if diffusers_name == kind and is_of_model and (with_xlabs or layer not in XLABS):
                    is_swapped = is_last and layer == "context_block.adaLN_modulation.1"
                    modules = tuple(f"{block}.{name}" for name in inner)
                    result[f"{original}.{number}.{layer}"] = Layer(modules, is_swapped)
    return {name: layer for name, layer in result.items() if known.issuperset(layer.modules)}


def split_tensor(layer: Layer, kind: str, tensor: Tensor, n_rows: Sequence[int]) -> list[Tensor]:
    """Split one tensor of a layer's update into the tensors of its modules.

    Args:
        layer: The layer.
        kind: PEFT's name of the tensor.
        tensor: The tensor; not a factor of LoKr if the layer is several modules.
        n_rows: The number of outputs of each module.

    Raises:
        ValueError: If the tensor has a different number of rows.
    """
    if layer.is_module:
        return [tensor]
    if kind not in BY_ROW:
        return [tensor] * len(n_rows)
    if sum(n_rows) != len(tensor):
        raise ValueError(f"has {len(tensor)} rows, and its layer has {sum(n_rows)}")
    return list(torch.split(swapped(tensor) if layer.is_swapped else tensor, list(n_rows)))


def joined_update(
    layer: Layer, pairs: Mapping[str, tuple[Tensor, Tensor]], n_rows: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Join the updates of a layer's modules into one update of the layer.

    Args:
        layer: The layer.
        pairs: A and B by module; modules that are missing have no update.
        n_rows: The number of outputs of each module of the layer.

    Returns:
        A (sum of ranks, in), the modules' matrices stacked by rows, and B (sum of outputs, sum of
        ranks), which is block-diagonal.
    """
    a = torch.cat([pairs[module][0] for module in layer.modules if module in pairs])
    if len(layer.modules) == 1:
        b = pairs[layer.modules[0]][1]
        return a, swapped(b) if layer.is_swapped else b
    b, row, column = a.new_zeros(sum(n_rows), len(a)), 0, 0
    for module, count in zip(layer.modules, n_rows, strict=True):
        if module in pairs:
            rank = len(pairs[module][0])
            b[row : row + count, column : column + rank] = pairs[module][1]
            column += rank
        row += count
    return a, b


def n_outputs(module: nn.Module) -> int:
    """Return the number of outputs of a layer."""
    weight = module.weight
    assert isinstance(weight, Tensor), "such a layer has a weight"
    return int(getattr(module, "out_features", len(weight)))


def swapped(tensor: Tensor) -> Tensor:
    """Return a tensor with its two halves swapped."""
    return torch.cat(tensor.chunk(2)[::-1])
