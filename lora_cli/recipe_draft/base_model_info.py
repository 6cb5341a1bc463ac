"""Describe a base model without loading its weights: its type, size and tokenizer."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_cli.errors import LoraError
from lora_cli.recipe import TASKS, Recipe
from lora_cli.recipe.spec import Origin
from lora_cli.recipe_draft.memory_budget import Shape
from lora_cli.unexpected_errors import own_words

SIZE = re.compile(r"(?i)(?<![a-z0-9.])(?:(\d+)x)?(\d+(?:\.\d+)?)([bm])(?![a-z])")
PIPELINE = "model_index.json"  # written by diffusers
SPEECH_SYNTHESIS = "speecht5"
TIMEOUT_S = 5  # timeout of a request to the Hub
SAMPLE = 2000  # number of rows whose length is measured


@dataclass(frozen=True)
class Base:
    """Properties of a base model, as far as they are known.

    Args:
        name: Name in the recipe.
        tokenizer: The tokenizer; None if it is not available.
        can_write: Whether it is a causal language model; True if unknown.
        positions: Maximum number of input tokens; None if unknown.
        hidden_size: Hidden size; None if unknown.
        shape: Sizes that determine memory use; None if unknown.
        size_from: Where the number of parameters is from.
        reads_images: Whether its input is images instead of text; None if unknown.
        is_encoder_decoder: Whether it is an encoder-decoder of text.
        reads_audio: Whether it transcribes speech.
        recognises_languages: Whether it transcribes several languages, and must be told which.
        speaker_size: Size of its speaker embedding, if it synthesises speech.
        lacks_letters: Whether it was pretrained without transcripts, and needs a new vocabulary.
        is_embedding_model: Whether it has the files of sentence-transformers.
        generates_images: Whether it is a diffusion model that generates images.
        picture_side: Side of its generated images in pixels.
        drawing: Values of `evaluate.drawing` that are usual for it; empty for the defaults.
        model_type: The `model_type` of transformers or the pipeline class of diffusers; None if
            unknown.
    """

    name: str
    tokenizer: Any = None
    can_write: bool = True
    positions: int | None = None
    hidden_size: int | None = None
    shape: Shape | None = None
    size_from: str = "by its configuration"
    reads_images: bool | None = None
    model_type: str | None = None
    is_encoder_decoder: bool = False
    reads_audio: bool = False
    recognises_languages: bool = False
    speaker_size: int | None = None
    lacks_letters: bool = False
    is_embedding_model: bool = False
    generates_images: bool = False
    picture_side: int | None = None
    drawing: Mapping[str, float] = field(default_factory=dict)

    @property
    def language_codes(self) -> Sequence[str]:
        """Codes of the languages that it must be told; empty if it needs none."""
        from lora_cli.tasks.generation.seq2seq_texts import has_languages, language_codes

        if self.tokenizer is None or not has_languages(self.tokenizer):
            return ()
        return language_codes(self.tokenizer)

    @property
    def lacks_template(self) -> bool:
        """Whether the tokenizer is known to have no chat template."""
        return self.tokenizer is not None and not getattr(self.tokenizer, "chat_template", None)

    def tokens(self, texts: Sequence[Sequence[str]]) -> list[int]:
        """Return the length of the texts of each row in tokens, including special tokens."""
        from lora_cli.tasks.texts.tokenize_long_texts import token_ids

        total = [0] * len(texts)
        for column in zip(*texts, strict=True):
            # lone surrogates would stop the tokenizer; their rows are skipped and counted later
            clean = (text.encode("utf-8", "replace").decode() for text in column)
            encoded = (token_ids(self.tokenizer, text) for text in clean)
            total = [a + len(ids) for a, ids in zip(total, encoded, strict=True)]
        return total


def describe_base(name: str) -> Base:
    """Describe a base model without reading its weights.

    The configuration and the tokenizer of a Hub model are downloaded if possible.

    Raises:
        LoraError: If a local model does not exist, or the model cannot be read.
    """
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto as known_models

    from lora_cli.models.find_base import locate
    from lora_cli.models.load_errors import check_config
    from lora_cli.tasks.speech.decoders import CTC_MODELS

    folder = Path(name).expanduser()
    local = folder.is_dir() or name.startswith((".", "/", "~"))
    source = locate(str(folder.absolute()) if local else name, "--model")
    if (pipeline := _pipeline_in(Path(source))) is not None:
        return _describe_diffusion(name, Path(source), pipeline)
    try:
        config = _load(AutoConfig, source, local)
    except Exception as error:  # a damaged configuration can raise any error
        known = isinstance(error, OSError | ValueError)
        if local or name.startswith("package:") or not known:
            what = str(error).strip().splitlines()[0] if known and str(error) else own_words(error)
            hint = "is the folder complete? Copy or download it again"
            raise LoraError(f"cannot read the model: {what}", "--model", hint) from error
        return Base(name, shape=shape_by_name(name), size_from="by its name")
    check_config(config, _recipe_of(name))
    kind = config.model_type
    is_encoder_decoder = _is_encoder_decoder(config)
    is_causal = kind in known_models.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not is_encoder_decoder
    is_encoder = kind in known_models.MODEL_FOR_MASKED_LM_MAPPING_NAMES or "ernie" in kind
    if kind in known_models.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES:
        return Base(name, can_write=False, reads_images=True, model_type=kind)
    reads_images = kind in known_models.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    if reads_images and not (is_causal or is_encoder):
        shape = _shape_of(config, False)
        return Base(name, can_write=False, shape=shape, reads_images=True, model_type=kind)
    if kind == "whisper" or kind == SPEECH_SYNTHESIS or kind in CTC_MODELS:
        return _describe_speech(name, config)
    text_config = config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None) or None
    tokenizer = _tokenizer_of(source, local)
    if tokenizer is not None:
        limit = min(limit or 1 << 30, int(tokenizer.model_max_length))
    return Base(
        name,
        tokenizer,
        is_causal and not is_encoder,
        None if limit == 1 << 30 else limit,
        getattr(text_config, "hidden_size", None),
        _shape_of(config, is_causal and not is_encoder),
        reads_images=False,
        model_type=kind,
        is_encoder_decoder=is_encoder_decoder,
        is_embedding_model=_has_modules(source),
    )


def _describe_diffusion(name: str, folder: Path, pipeline: str) -> Base:
    """Describe a diffusion pipeline."""
    from lora_cli.models.diffusion_base import FAMILIES, DiffusionBase

    if pipeline not in FAMILIES:
        return Base(name, can_write=False, model_type=pipeline)
    kind = next(kind for kind, spec in TASKS.items() if spec.generates_images)
    model = {"name": str(folder.absolute())}
    values = {"model": model, "task": {"type": kind}, "data": {"path": "none"}}
    recipe = Recipe.model_validate(values).with_origin(Origin({"model.name": f"--model {name}"}))
    base = DiffusionBase(recipe)
    parameters = sum(p.numel() for p in base.empty(()).parameters())
    return Base(
        name, can_write=False, shape=Shape(parameters), model_type=pipeline, generates_images=True,
        picture_side=base.family.usual_side, drawing=base.family.sampling_defaults,
    )  # fmt: skip


def _describe_speech(name: str, config: Any) -> Base:
    """Describe a model for speech recognition or synthesis."""
    from lora_cli.tasks.speech.decoders import CTC_MODELS
    from lora_cli.tasks.speech.new_vocabulary import lacks_vocabulary
    from lora_cli.tasks.speech.spoken_languages import is_multilingual

    speaks = config.model_type == SPEECH_SYNTHESIS
    return Base(
        name,
        can_write=False,
        shape=_shape_of(config, False),
        reads_images=False,
        model_type=config.model_type,
        reads_audio=not speaks,
        speaker_size=int(config.speaker_embedding_dim) if speaks else None,
        recognises_languages=config.model_type == "whisper"
        and is_multilingual(_recipe_of(name), int(config.vocab_size)),
        lacks_letters=config.model_type in CTC_MODELS and lacks_vocabulary(_recipe_of(name)),
    )


def _has_modules(source: str) -> bool:
    """Return whether a local or cached model has the files of sentence-transformers."""
    from transformers.utils.hub import cached_file

    modules_file = cached_file(
        source, "modules.json", local_files_only=True, _raise_exceptions_for_missing_entries=False
    )
    return modules_file is not None


def _tokenizer_of(source: str, local: bool) -> Any:
    """Return the tokenizer of a model; None if it is not available.

    Raises:
        LoraError: If the tokenizer is damaged.
    """
    from transformers import AutoTokenizer

    try:
        return _load(AutoTokenizer, source, local)
    except (OSError, ValueError):
        return None
    except Exception as error:  # a damaged file can raise any error
        hint = "copy or download tokenizer.json and tokenizer_config.json again"
        what = f"cannot read the tokenizer of the model: {own_words(error)}"
        raise LoraError(what, "--model", hint) from error


def _is_encoder_decoder(config: Any) -> bool:
    """Return whether a model is an encoder-decoder of text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

    is_known = config.model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    return is_known and bool(getattr(config, "is_encoder_decoder", False))


def _pipeline_in(folder: Path) -> str | None:
    """Return the pipeline class in the folder of a diffusers model; None if it is not one."""
    try:
        index = json.loads((folder / PIPELINE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    name = index.get("_class_name") if isinstance(index, dict) else None
    return name if isinstance(name, str) else None


def _recipe_of(name: str) -> Recipe:
    """Return a minimal recipe with the model, whose errors refer to `--model`."""
    any_task = {"type": next(iter(TASKS))}
    values = {"model": {"name": name}, "task": any_task, "data": {"path": "none.csv"}}
    return Recipe.model_validate(values).with_origin(Origin({"model.name": f"--model {name}"}))


def _load(kind: Any, source: str, local: bool) -> Any:
    """Load a configuration or tokenizer from disk, or otherwise from the Hub."""
    try:
        return kind.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError):
        if local or source.startswith("/") or not _hub_is_reachable():
            raise
    return kind.from_pretrained(source)


@functools.cache
def _hub_is_reachable() -> bool:
    """Return whether the Hub can be reached, with one short request: its client retries long."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT_S)
    except Exception:  # of any HTTP library
        return False
    return True


def _shape_of(config: Any, can_write: bool) -> Shape | None:
    """Return the sizes of a model, which is built on the meta device, without weights."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    kind: Any = AutoModelForCausalLM if can_write else AutoModel
    try:
        with torch.device("meta"):
            parameters = sum(p.numel() for p in kind.from_config(config).parameters())
    except Exception:  # remote code, or a configuration that does not fit the class
        return None
    text = config.get_text_config()
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 0
    return Shape(
        parameters,
        int(getattr(text, "num_hidden_layers", 0) or 0),
        int(getattr(text, "hidden_size", 0) or 0),
        int(inner) if isinstance(inner, int) else 0,
        int(getattr(text, "vocab_size", 0) or 0) if can_write else 0,
    )


def shape_by_name(name: str) -> Shape | None:
    """Return the number of parameters in a model name: `Llama-3.1-8B`, `mixtral-8x7b`."""
    match = SIZE.search(name.rpartition("/")[2])
    if match is None:
        return None
    parameters = float(match[2]) * {"b": 1e9, "m": 1e6}[match[3].lower()]
    return Shape(int(parameters * int(match[1] or 1)))
