"""What is known of the base model without loading it: its family, its size, its tokenizer."""

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
PIPELINE = "model_index.json"  # of diffusers
SPEAKING = "speecht5"
SECONDS = 5  # to wait for the Hub
SAMPLE = 2000  # rows whose length is measured


@dataclass(frozen=True)
class Base:
    """A base model, as far as it is at hand (a folder, a package, or the Hub's cache).

    Args:
        name: As the recipe names it.
        tokenizer: Its tokenizer, or None.
        can_write: It continues texts; True where that is not known.
        positions: Tokens that it can take, if that is known.
        hidden_size: Width of its layers, if that is known.
        shape: Its sizes, if they are known.
        size_from: What says how many parameters it has.
        sees: It reads pictures and no texts; None where that is not known.
        is_encoder_decoder: It reads one text and writes another.
        hears: It writes down what is said in recordings.
        hears_languages: It hears several languages, and needs to know which is spoken.
        speaker_size: How many numbers tell it who speaks, if it says texts aloud.
        lacks_letters: It was pretrained on recordings alone, and gets a vocabulary of letters.
        embeds: It has the files of sentence-transformers.
        draws: It draws pictures, as models of diffusers do.
        picture_side: The side of the pictures that it draws, in pixels.
        drawing: Keys of `evaluate.drawing` with which it usually draws; none: the defaults.
        model_type: What transformers calls its architecture, or diffusers its pipeline, if that is
            known.
    """

    name: str
    tokenizer: Any = None
    can_write: bool = True
    positions: int | None = None
    hidden_size: int | None = None
    shape: Shape | None = None
    size_from: str = "by its configuration"
    sees: bool | None = None
    model_type: str | None = None
    is_encoder_decoder: bool = False
    hears: bool = False
    hears_languages: bool = False
    speaker_size: int | None = None
    lacks_letters: bool = False
    embeds: bool = False
    draws: bool = False
    picture_side: int | None = None
    drawing: Mapping[str, float] = field(default_factory=dict)

    @property
    def language_codes(self) -> Sequence[str]:
        """The languages that it asks for, by its own codes; none, if it asks for none."""
        from lora_cli.tasks.generation.seq2seq_texts import has_languages, language_codes

        if self.tokenizer is None or not has_languages(self.tokenizer):
            return ()
        return language_codes(self.tokenizer)

    @property
    def lacks_template(self) -> bool:
        """Whether the tokenizer is known to have no chat template."""
        return self.tokenizer is not None and not getattr(self.tokenizer, "chat_template", None)

    def tokens(self, texts: Sequence[Sequence[str]]) -> list[int]:
        """Return the length of each row's texts in tokens, the special ones included."""
        from lora_cli.tasks.texts.tokenize_long_texts import token_ids

        total = [0] * len(texts)
        for column in zip(*texts, strict=True):
            # bytes that are not text stop the tokenizer; their rows are skipped later, and counted
            read = (text.encode("utf-8", "replace").decode() for text in column)
            encoded = (token_ids(self.tokenizer, text) for text in read)
            total = [a + len(ids) for a, ids in zip(total, encoded, strict=True)]
        return total


def describe_base(name: str) -> Base:
    """Return what is known of a model; its weights are not read.

    The configuration and the tokenizer of a model on the Hub are downloaded, if they can be.

    Raises:
        LoraError: If the name is that of a folder or a package which is not there.
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
        return _drawing(name, Path(source), pipeline)
    try:
        config = _from_hub(AutoConfig, source, local)
    except Exception as error:  # a damaged configuration raises anything
        known = isinstance(error, OSError | ValueError)
        if local or name.startswith("package:") or not known:
            what = str(error).strip().splitlines()[0] if known and str(error) else own_words(error)
            hint = "is the folder complete? Copy or download it again"
            raise LoraError(f"cannot read the model: {what}", "--model", hint) from error
        return Base(name, shape=shape_by_name(name), size_from="by its name")
    check_config(config, _recipe_of(name))
    kind = config.model_type
    both = _translates(config)
    writes = kind in known_models.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not both
    encodes = kind in known_models.MODEL_FOR_MASKED_LM_MAPPING_NAMES or "ernie" in kind
    if kind in known_models.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES:
        return Base(name, can_write=False, sees=True, model_type=kind)
    sees = kind in known_models.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    if sees and not (writes or encodes):
        shape = _shape_of(config, False)
        return Base(name, can_write=False, shape=shape, sees=True, model_type=kind)
    if kind == "whisper" or kind == SPEAKING or kind in CTC_MODELS:
        return _of_sound(name, config)
    text_config = config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None) or None
    tokenizer = _tokenizer_of(source, local)
    if tokenizer is not None:
        limit = min(limit or 1 << 30, int(tokenizer.model_max_length))
    return Base(
        name,
        tokenizer,
        writes and not encodes,
        None if limit == 1 << 30 else limit,
        getattr(text_config, "hidden_size", None),
        _shape_of(config, writes and not encodes),
        sees=False,
        model_type=kind,
        is_encoder_decoder=both,
        embeds=_has_modules(source),
    )


def _drawing(name: str, folder: Path, pipeline: str) -> Base:
    """Return what is known of a model of several parts."""
    from lora_cli.models.diffusion_base import FAMILIES, DiffusionBase

    if pipeline not in FAMILIES:
        return Base(name, can_write=False, model_type=pipeline)
    kind = next(kind for kind, spec in TASKS.items() if spec.draws)
    place = {"name": str(folder.absolute())}
    values = {"model": place, "task": {"type": kind}, "data": {"path": "none"}}
    recipe = Recipe.model_validate(values).with_origin(Origin({"model.name": f"--model {name}"}))
    base = DiffusionBase(recipe)
    parameters = sum(p.numel() for p in base.empty(()).parameters())
    return Base(
        name, can_write=False, shape=Shape(parameters), model_type=pipeline, draws=True,
        picture_side=base.family.usual_side, drawing=base.family.sampling_defaults,
    )  # fmt: skip


def _of_sound(name: str, config: Any) -> Base:
    """Return what is known of a model that writes down what is said, or that speaks."""
    from lora_cli.tasks.speech.decoders import CTC_MODELS
    from lora_cli.tasks.speech.new_vocabulary import lacks_vocabulary
    from lora_cli.tasks.speech.spoken_languages import is_multilingual

    speaks = config.model_type == SPEAKING
    return Base(
        name,
        can_write=False,
        shape=_shape_of(config, False),
        sees=False,
        model_type=config.model_type,
        hears=not speaks,
        speaker_size=int(config.speaker_embedding_dim) if speaks else None,
        hears_languages=config.model_type == "whisper"
        and is_multilingual(_recipe_of(name), int(config.vocab_size)),
        lacks_letters=config.model_type in CTC_MODELS and lacks_vocabulary(_recipe_of(name)),
    )


def _has_modules(source: str) -> bool:
    """Return whether sentence-transformers' own file lies beside a model that is at hand."""
    from transformers.utils.hub import cached_file

    found = cached_file(
        source, "modules.json", local_files_only=True, _raise_exceptions_for_missing_entries=False
    )
    return found is not None


def _tokenizer_of(source: str, local: bool) -> Any:
    """Return the tokenizer of a model, or None if it is not at hand.

    Raises:
        LoraError: If it is damaged.
    """
    from transformers import AutoTokenizer

    try:
        return _from_hub(AutoTokenizer, source, local)
    except (OSError, ValueError):
        return None
    except Exception as error:  # a damaged file raises anything
        hint = "copy or download tokenizer.json and tokenizer_config.json again"
        what = f"cannot read the tokenizer of the model: {own_words(error)}"
        raise LoraError(what, "--model", hint) from error


def _translates(config: Any) -> bool:
    """Return whether a model reads one text and writes another."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

    is_known = config.model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    return is_known and bool(getattr(config, "is_encoder_decoder", False))


def _pipeline_in(folder: Path) -> str | None:
    """Return the class of a model of several parts, as diffusers writes it into its folder."""
    try:
        found = json.loads((folder / PIPELINE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    name = found.get("_class_name") if isinstance(found, dict) else None
    return name if isinstance(name, str) else None


def _recipe_of(name: str) -> Recipe:
    """Return a recipe that says no more than the model, with the option as its place."""
    any_task = {"type": next(iter(TASKS))}
    values = {"model": {"name": name}, "task": any_task, "data": {"path": "none.csv"}}
    return Recipe.model_validate(values).with_origin(Origin({"model.name": f"--model {name}"}))


def _from_hub(kind: Any, source: str, local: bool) -> Any:
    """Return a configuration or a tokenizer: from the disk, or else from the Hub."""
    try:
        return kind.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError):
        if local or source.startswith("/") or not _hub_answers():
            raise
    return kind.from_pretrained(source)


@functools.cache
def _hub_answers() -> bool:
    """Return whether the Hub can be reached: asked once, for its own client tries for a minute."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception:  # of whichever library it speaks through
        return False
    return True


def _shape_of(config: Any, can_write: bool) -> Shape | None:
    """Return the sizes of a model, counted without memory for its weights."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    kind: Any = AutoModelForCausalLM if can_write else AutoModel
    try:
        with torch.device("meta"):
            parameters = sum(p.numel() for p in kind.from_config(config).parameters())
    except Exception:  # of other people's code, and of configurations that build no such model
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
    """Return the number of parameters that a name gives: `Llama-3.1-8B`, `mixtral-8x7b`."""
    match = SIZE.search(name.rpartition("/")[2])
    if match is None:
        return None
    parameters = float(match[2]) * {"b": 1e9, "m": 1e6}[match[3].lower()]
    return Shape(int(parameters * int(match[1] or 1)))
