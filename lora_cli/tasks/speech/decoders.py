"""How a model writes down what it hears: one token after the other, or a letter for each moment."""

from __future__ import annotations

from typing import Any, Literal

from lora_cli.errors import LoraError
from lora_cli.models.base_model import load_config
from lora_cli.recipe import Recipe

Decoder = Literal["attention", "ctc"]

SPECTROGRAMS = "wav2vec2-bert"  # reads them; others do too, such as Parakeet, in other ways
CTC_MODELS = {  # the others read samples
    "data2vec-audio", "hubert", "sew", "sew-d", "unispeech", "unispeech-sat", "wav2vec2",
    "wav2vec2-conformer", "wavlm", SPECTROGRAMS,
}  # fmt: skip


def decoder_of(recipe: Recipe) -> Decoder:
    """Return how the recipe's base writes; of one that cannot be read, as Whisper does.

    What is wrong with the base is said when it is loaded.
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
    """Reject a base that writes in another way than the task expects.

    Raises:
        LoraError: With what the model is.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CTC_MAPPING_NAMES

    kind, name = load_config(recipe).model_type, recipe.model.name
    if kind in (CTC_MODELS if decoder == "ctc" else {"whisper"}):
        return
    if kind in CTC_MODELS or kind == "whisper":
        right = "attention" if kind == "whisper" else "ctc"
        what = f"`{name}` ({kind}) does not write by `{decoder}`"
        hint = f"leave `decoder` out, or set it to `{right}`"
        raise LoraError(what, recipe.at("task.decoder"), hint)
    what = f"`{name}` is no model of speech that can be trained here ({kind})"
    if kind in MODEL_FOR_CTC_MAPPING_NAMES:
        what = f"`{name}` ({kind}) writes by CTC in a way of its own, which is not supported"
    raise LoraError(what, recipe.at("model.name"), recipe.task.suitable_models)
