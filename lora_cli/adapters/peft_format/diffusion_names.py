"""What other tools call the modules of diffusion models in adapters that are a single file.

    unet.down_blocks.0.attentions.0.….attn1.to_q.lora_A.weight              diffusers, of PEFT
    unet.….attn1.processor.to_q_lora.down.weight, ….to_q.lora.down.weight   diffusers before
    text_encoder.….q_proj.lora_linear_layer.down.weight                     its text encoders
    lora_unet_down_blocks_0_attentions_0_…_attn1_to_q.lora_down.weight      kohya, LyCORIS
    lora_unet_input_blocks_1_1_…                                            the same, of SDXL
    lora_unet_double_blocks_0_img_attn_qkv.…       Flux, in `original_layers`

Since a name may have lost its dots, it is looked up among the names of the model's modules, which
lose theirs as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from lora_cli.adapters.peft_format.original_layers import Layer, original_layers
from lora_cli.adapters.peft_format.tensor_names import without_prefix

DENOISERS = ("unet", "transformer", "prior")  # one of them draws
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
STARTS = {  # the start of a name, and the parts that it may mean
    "lora_unet_": DENOISERS,
    "lora_transformer_": DENOISERS,
    "lycoris_": DENOISERS,
    "lora_te_": TEXT_ENCODERS[:1],
    "lora_te1_": TEXT_ENCODERS[:1],
    "lora_te2_": TEXT_ENCODERS[1:2],
    "lora_te3_": TEXT_ENCODERS[:0:-1],
    "text_encoders.clip_l.transformer.": TEXT_ENCODERS[:1],  # of ComfyUI
    "text_encoders.clip_g.transformer.": TEXT_ENCODERS[1:2],
    "text_encoders.t5xxl.transformer.": TEXT_ENCODERS[:0:-1],
    "diffusion_model.": DENOISERS,
    "model.diffusion_model.": DENOISERS,
    **{f"{part}.": (part,) for part in (*DENOISERS, *TEXT_ENCODERS)},
}
OF_T5 = ("lora_te3_", "text_encoders.t5xxl.transformer.")  # the third; of Flux the second
CLIP = ("encoder.layers.", "embeddings.", "final_layer_norm")  # in CLIP's own part, `text_model`
OLD_OF_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
OLD_OF_UNET = {"to_out": "to_out.0"}

ENDS = {  # the end of a tensor's name, and PEFT's name of such a tensor
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
    """Return the name of a module, as a file has it, and PEFT's name of what is added to it.

    Returns:
        `(unet.….to_q, lora_A)`; None if the end of the name is unknown.
    """
    found = END.search(name)
    if found is None or found.lastindex is None:
        return None
    kind = list(ENDS.values())[found.lastindex - 1]
    return name[: found.start()], kind or found[0].removeprefix(".")


class ModuleNames:
    """Finds the modules of a base of several parts by the names that files give them.

    Args:
        parts: The models by name.
    """

    def __init__(self, parts: dict[str, nn.Module]) -> None:
        self.parts = parts
        self._tables: dict[str, dict[str, Layer | None]] = {}

    def find(self, name: str) -> tuple[str, Layer] | None:
        """Return the part, and the layer in it, that a file's name means."""
        name = without_prefix(name).replace(".processor.", ".")
        start = next((start for start in STARTS if name.startswith(start)), "")
        for part in STARTS.get(start, DENOISERS):  # without: as `unet.save_attn_procs` wrote them
            if part not in self.parts:
                continue
            for spelling in _spellings(name.removeprefix(start), part in TEXT_ENCODERS):
                found = self._table(part).get(spelling.replace(".", "_"))
                of_clip = found is not None and not found.modules[0].startswith("encoder.block.")
                if found and not (start in OF_T5 and of_clip):
                    return part, found
        return None

    def _table(self, part: str) -> dict[str, Layer | None]:
        """Return a part's layers by what is left of their names without dots; None: several."""
        if part not in self._tables:
            layers: list[tuple[str, Layer]] = []
            # not lists of modules: `to_out` means the layer in one
            modules = self.parts[part].named_modules()
            names = [name for name, module in modules if "weight" in module._parameters]
            blocks = Blocks.of(names)
            for name in names:
                spellings = (name, *_other_spellings(name, blocks))
                layers += [(spelling, Layer((name,))) for spelling in spellings]
            table: dict[str, Layer | None] = {}
            for spelling, layer in (*layers, *original_layers(names).items()):
                flat = spelling.replace(".", "_")
                table[flat] = layer if table.get(flat, layer) == layer else None
            self._tables[part] = table
        return self._tables[part]


def _spellings(name: str, of_text: bool) -> list[str]:
    """Return a name, and what it was called before."""
    head, _, last = name.rpartition(".")
    old = OLD_OF_TEXT if of_text else OLD_OF_UNET
    return [name, *([f"{head}.{old[last]}"] if last in old else [])]


@dataclass(frozen=True)
class Blocks:
    """How the blocks of a U-Net of diffusers are built.

    Args:
        step: Layers of a block of the way down, and the one that halves the picture.
        attentive: Blocks of the way up that look at the text.
    """

    step: int
    attentive: frozenset[str]

    @classmethod
    def of(cls, names: Iterable[str]) -> Blocks:
        """Return it for a U-Net by the names of its modules; of others it says nothing."""
        text = " ".join(names)
        layers = set(re.findall(r"(?<!\S)down_blocks\.0\.resnets\.(\d+)", text))
        attentive = re.findall(r"(?<!\S)(up_blocks\.\d+)\.attentions", text)
        return cls(1 + len(layers), frozenset(attentive))


def _other_spellings(name: str, blocks: Blocks) -> list[str]:
    """Return what else a module is called: with CLIP's `text_model`, or as in the first U-Net."""
    if name.startswith(CLIP):
        return [f"text_model.{name}"]
    if name.startswith("text_model."):
        return [name.removeprefix("text_model.")]
    first = first_name(name, blocks)
    return [] if first is None else [first]


RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
SINGLE = {
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


def first_name(name: str, blocks: Blocks) -> str | None:
    """Return the name that a module of diffusers' U-Net has in the first U-Net of Stable Diffusion.

    There the layers of all blocks are numbered in one row: `input_blocks.4.1` is
    `down_blocks.1.attentions.0`.

    Args:
        name: In diffusers' U-Net.
        blocks: How its blocks are built.

    Returns:
        The name; None if there is none.
    """
    if name in SINGLE:
        return SINGLE[name]
    found = IN_BLOCK.fullmatch(name)
    if found is None:
        return None
    side, block, kind, layer = found[1], int(found[2] or 0), found[3], int(found[4])
    rest = (found[5] or "").removeprefix(".")
    step, place = blocks.step, 0
    if kind == "resnets":
        rest = RESNET.get(rest, rest)
    elif kind == "attentions":
        place = 1
    elif side == "down":
        layer, rest = step - 1, "op" if rest == "conv" else rest
    else:  # it stands behind the last layer of its block
        layer, place = step - 1, 1 + (f"up_blocks.{block}" in blocks.attentive)
    if side == "mid":
        start = f"middle_block.{1 if place else 2 * layer}"
    elif side == "down":
        start = f"input_blocks.{step * block + layer + 1}.{place}"
    else:  # a block of the way up has one layer more, and none that halves
        start = f"output_blocks.{step * block + layer}.{place}"
    return f"{start}.{rest}" if rest else start
