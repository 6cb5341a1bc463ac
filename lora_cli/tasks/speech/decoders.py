"""How a speech recognition model produces text: by an autoregressive decoder, or by CTC."""

from __future__ import annotations

from typing import Any, Literal

from lora_cli.errors import LoraError
from lora_cli.models.base_model import load_config
from lora_cli.recipe import Recipe

Decoder = Literal["attention", "ctc"]

SPECTROGRAM_MODEL = "wav2vec2-bert"  # the one supported CTC model that reads spectrograms
CTC_MODELS = {  # the other models read samples
    "data2vec-audio", "hubert", "sew", "sew-d", "unispeech", "unispeech-sat", "wav2vec2",
    "wav2vec2-conformer", "wavlm", SPECTROGRAM_MODEL,
}  # fmt: skip


def decoder_of(recipe: Recipe) -> Decoder:
    """Return the decoder of the recipe's base; `attention` if the base cannot be read.

    Loading the base reports why it cannot be read.
    """
    spec: Any = recipe.task
    if spec.decoder is not None:
        return "ctc" if spec.decoder == "ctc" else "attention"
    try:
        kind = load_config(recipe).model_type
    except LoraError:
        return "attention"
    return "ctc" if kind in CTC_MODELS else "attention"


def require_decoder(recipe: Recipe, decoder: Decoder) -> None:
    """Reject a base whose decoder is not the expected one.

    Raises:
        LoraError: With the kind of model that the base is.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CTC_MAPPING_NAMES

    kind, name = load_config(recipe).model_type, recipe.model.name
    if kind in (CTC_MODELS if decoder == "ctc" else {"whisper"}):
        return
    if kind in CTC_MODELS or kind == "whisper":
        expected = "attention" if kind == "whisper" else "ctc"
        what = f"`{name}` ({kind}) does not write by `{decoder}`"
        hint = f"leave `decoder` out, or set it to `{expected}`"
        raise LoraError(what, recipe.at("task.decoder"), hint)
    what = f"`{name}` is not a speech model that can be trained here ({kind})"
    if kind in MODEL_FOR_CTC_MAPPING_NAMES:
        what = f"`{name}` ({kind}) writes by CTC in a way of its own, which is not supported"
    raise LoraError(what, recipe.at("model.name"), recipe.task.suitable_models)
