"""Resolve other tools' names of the modules of diffusion models, in single-file adapters.

    unet.down_blocks.0.attentions.0.….attn1.to_q.lora_A.weight              diffusers, with PEFT
    unet.….attn1.processor.to_q_lora.down.weight, ….to_q.lora.down.weight   diffusers, earlier
    text_encoder.….q_proj.lora_linear_layer.down.weight                     its text encoders
    lora_unet_down_blocks_0_attentions_0_…_attn1_to_q.lora_down.weight      kohya, LyCORIS
    lora_unet_input_blocks_1_1_…                                            the same, for SDXL
    lora_unet_double_blocks_0_img_attn_qkv.…       Flux, see `original_layers`

Since some tools replace dots by underscores, names are compared with the names of the model's
modules after the same replacement.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from lora_cli.adapters.peft_format.original_layers import Layer, original_layers
from lora_cli.adapters.peft_format.tensor_names import without_prefix

DENOISERS = ("unet", "transformer", "prior")  # every diffusion model has one of these
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
PREFIXES = {  # the prefix of a name: the parts that it may refer to
    "lora_unet_": DENOISERS,
    "lora_transformer_": DENOISERS,
    "lycoris_": DENOISERS,
    "lora_te_": TEXT_ENCODERS[:1],
    "lora_te1_": TEXT_ENCODERS[:1],
    "lora_te2_": TEXT_ENCODERS[1:2],
    "lora_te3_": TEXT_ENCODERS[:0:-1],
    "text_encoders.clip_l.transformer.": TEXT_ENCODERS[:1],  # ComfyUI's
    "text_encoders.clip_g.transformer.": TEXT_ENCODERS[1:2],
    "text_encoders.t5xxl.transformer.": TEXT_ENCODERS[:0:-1],
    "diffusion_model.": DENOISERS,
    "model.diffusion_model.": DENOISERS,
    **{f"{part}.": (part,) for part in (*DENOISERS, *TEXT_ENCODERS)},
}
# T5 is the third text encoder, or the second of Flux
T5_PREFIXES = ("lora_te3_", "text_encoders.t5xxl.transformer.")
# modules of CLIP's `text_model`
CLIP_PREFIXES = ("encoder.layers.", "embeddings.", "final_layer_norm")
TEXT_ENCODER_RENAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
UNET_RENAMES = {"to_out": "to_out.0"}

ENDS = {  # the end of a tensor's name: PEFT's name of the tensor
    r"\.lora_A(?:\.default(?:_\d+)?)?\.weight": "lora_A",
    r"\.lora_B(?:\.default(?:_\d+)?)?\.weight": "lora_B",
    r"(?:\.lora|_lora|\.lora_linear_layer)\.down\.weight": "lora_A",
    r"(?:\.lora|_lora|\.lora_linear_layer)\.up\.weight": "lora_B",
    r"\.lora_down\.weight": "lora_A",
    r"\.lora_up\.weight": "lora_B",
    r"(?<=_lora[12])\.down\.weight": "lora_A",  # XLabs: `qkv_lora1.down.weight`
    r"(?<=_lora[12])\.up\.weight": "lora_B",
    r"\.lora_mid\.weight": "lora_mid",  # LyCORIS: the kernel of a convolution, between the two
    r"\.lora_magnitude_vector(?:\.default(?:_\d+)?)?(?:\.weight)?": "lora_magnitude_vector",
    r"\.dora_scale": "lora_magnitude_vector",
    r"\.alpha": "alpha",
    r"\.hada_(?:w[12]_[ab]|t[12])": "",  # the same as in PEFT
    r"\.lokr_(?:w[12](?:_[ab])?|t2)": "",
}
END = re.compile("|".join(f"({end})$" for end in ENDS))


def split_name(name: str) -> tuple[str, str] | None:
    """Split a tensor's name in a file into the module's name and PEFT's name of the tensor.

    Returns:
        For example `(unet.….to_q, lora_A)`; None if the end of the name is unknown.
    """
    match = END.search(name)
    if match is None or match.lastindex is None:
        return None
    kind = list(ENDS.values())[match.lastindex - 1]
    return name[: match.start()], kind or match[0].removeprefix(".")


class ModuleNames:
    """Finds the modules of a base with several parts by the names in files.

    Args:
        parts: The base's models by name.
    """

    def __init__(self, parts: dict[str, nn.Module]) -> None:
        self.parts = parts
        self._tables: dict[str, dict[str, Layer | None]] = {}

    def find(self, name: str) -> tuple[str, Layer] | None:
        """Return the part, and the layer in it, that a name in a file refers to."""
        name = without_prefix(name).replace(".processor.", ".")
        start = next((start for start in PREFIXES if name.startswith(start)), "")
        for part in PREFIXES.get(start, DENOISERS):  # `unet.save_attn_procs` wrote no prefix
            if part not in self.parts:
                continue
            for spelling in _spellings(name.removeprefix(start), part in TEXT_ENCODERS):
                layer = self._table(part).get(spelling.replace(".", "_"))
                is_clip = layer is not None and not layer.modules[0].startswith("encoder.block.")
                if layer and not (start in T5_PREFIXES and is_clip):
                    return part, layer
        return None

    def _table(self, part: str) -> dict[str, Layer | None]:
        """Map names with underscores for dots to a part's layers; None if a name is ambiguous."""
        if part not in self._tables:
            layers: list[tuple[str, Layer]] = []
            # without module lists: `to_out` refers to the layer in the list
            modules = self.parts[part].named_modules()
            names = [name for name, module in modules if "weight" in module._parameters]
            blocks = Blocks.of(names)
            for name in names:
                spellings = (name, *_other_spellings(name, blocks))
                layers += [(spelling, Layer((name,))) for spelling in spellings]
            table: dict[str, Layer | None] = {}
            for spelling, layer in (*layers, *original_layers(names).items()):
                key = spelling.replace(".", "_")
                table[key] = layer if table.get(key, layer) == layer else None
            self._tables[part] = table
        return self._tables[part]


def _spellings(name: str, of_text: bool) -> list[str]:
    """Return a name, and its newer spelling if it is an old one."""
    head, _, last = name.rpartition(".")
    new_names = TEXT_ENCODER_RENAMES if of_text else UNET_RENAMES
    return [name, *([f"{head}.{new_names[last]}"] if last in new_names else [])]


@dataclass(frozen=True)
class Blocks:
    """The structure of the blocks of diffusers' U-Net.

    Args:
        step: The number of layers of a down block, including the downsampler.
        attentive: Names of the up blocks that attend to the text.
    """

    step: int
    attentive: frozenset[str]

    @classmethod
    def of(cls, names: Iterable[str]) -> Blocks:
        """Return the structure of a U-Net from the names of its modules."""
        text = " ".join(names)
        layers = set(re.findall(r"(?<!\S)down_blocks\.0\.resnets\.(\d+)", text))
        attentive = re.findall(r"(?<!\S)(up_blocks\.\d+)\.attentions", text)
        return cls(1 + len(layers), frozenset(attentive))


def _other_spellings(name: str, blocks: Blocks) -> list[str]:
    """Return other names of a module: with CLIP's `text_model`, or of the original U-Net."""
    if name.startswith(CLIP_PREFIXES):
        return [f"text_model.{name}"]
    if name.startswith("text_model."):
        return [name.removeprefix("text_model.")]
    original = original_name(name, blocks)
    return [] if original is None else [original]


RESNET_LAYERS = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
IN_BLOCK = re.compile(
    r"(down|mid|up)_blocks?(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)(\..+)?"
)


def original_name(name: str, blocks: Blocks) -> str | None:
    """Translate the name of a module of diffusers' U-Net to Stable Diffusion's original U-Net.

    In the original, the layers of all blocks are numbered consecutively: `input_blocks.4.1` is
    `down_blocks.1.attentions.0`.

    Args:
        name: The name in diffusers' U-Net.
        blocks: The structure of its blocks.

    Returns:
        The original name, or None if there is none.
    """
    if name in OUTSIDE_BLOCKS:
        return OUTSIDE_BLOCKS[name]
    match = IN_BLOCK.fullmatch(name)
    if match is None:
        return None
    side, block, kind, layer = match[1], int(match[2] or 0), match[3], int(match[4])
    rest = (match[5] or "").removeprefix(".")
    step, place = blocks.step, 0
    if kind == "resnets":
        rest = RESNET_LAYERS.get(rest, rest)
    elif kind == "attentions":
        place = 1
    elif side == "down":
        layer, rest = step - 1, "op" if rest == "conv" else rest
    else:  # an upsampler comes after the last layer of its block
        layer, place = step - 1, 1 + (f"up_blocks.{block}" in blocks.attentive)
    if side == "mid":
        start = f"middle_block.{1 if place else 2 * layer}"
    elif side == "down":
        start = f"input_blocks.{step * block + layer + 1}.{place}"
    else:  # an up block has one more layer, and no downsampler
        start = f"output_blocks.{step * block + layer}.{place}"
    return f"{start}.{rest}" if rest else start
