"""What a Whisper model needs to know before it writes: the language, and whether to translate."""

from __future__ import annotations

from typing import Any

from lora_cli.errors import LoraError, nearest
from lora_cli.models.find_base import source_of
from lora_cli.recipe import Recipe, SpeechRecognitionSpec

OF_SEVERAL_LANGUAGES = 51_865  # tokens, from where on a Whisper model knows several languages
NO_TIMES = "<|notimestamps|>"


def knows_languages(recipe: Recipe, vocabulary: int) -> bool:
    """Return whether a model knows several languages, and needs to know which is spoken.

    Models of English alone have the same tokens of languages, which they were never trained with.

    Args:
        recipe: Names the model.
        vocabulary: How many tokens it has.
    """
    from transformers import GenerationConfig

    source = source_of(recipe)
    try:
        config = GenerationConfig.from_pretrained(
            source["pretrained_model_name_or_path"], revision=source["revision"]
        )
    except (OSError, ValueError):  # there is none; a damaged one is reported with the model
        config = None
    said = getattr(config, "is_multilingual", None)
    return bool(said) if isinstance(said, bool) else vocabulary >= OF_SEVERAL_LANGUAGES


def first_tokens(
    spec: SpeechRecognitionSpec, tokenizer: Any, has_languages: bool, recipe: Recipe
) -> tuple[int, ...]:
    """Return the tokens that every transcript begins with, after the model's own first one.

    Args:
        spec: Says the language, and the task.
        tokenizer: Of the model.
        has_languages: Whether the model needs a language.
        recipe: Says where the keys stand, and names the model.

    Raises:
        LoraError: If the model does not have them, or needs one that is not given.
    """
    names: list[str] = []
    if has_languages:
        names = [f"<|{language_code(spec, recipe)}|>", f"<|{spec.task or 'transcribe'}|>"]
    elif spec.language is not None or spec.task is not None:
        key = "language" if spec.language is not None else "task"
        what = f"`{recipe.model.name}` knows English only, and takes no `{key}`"
        hint = "leave `language` and `task` out, or take a model of several languages, such as "
        raise LoraError(what, recipe.at(f"task.{key}"), f"{hint}openai/whisper-small")
    known = tokenizer.get_vocab()
    for name, key in zip((*names, NO_TIMES), ("language", "task", "type"), strict=False):
        if name not in known:
            what = f"the tokenizer of `{recipe.model.name}` has no token `{name}`"
            hint = "take a model that knows it: whisper-large-v3 knows the most languages"
            raise LoraError(what, recipe.at(f"task.{key}"), hint)
    return tuple(known[name] for name in (*names, NO_TIMES))


def language_code(spec: SpeechRecognitionSpec, recipe: Recipe) -> str:
    """Return the code of the language that is spoken, of its code or its English name.

    Raises:
        LoraError: If the recipe names none, or one that Whisper does not know.
    """
    from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

    at = recipe.at("task.language")
    if spec.language is None:
        what = "the model knows several languages, and the recipe does not say which is spoken"
        raise LoraError(what, at, "name it by its code, for example `language: de`")
    name = spec.language.strip().lower()
    if name in LANGUAGES:
        return name
    if name in TO_LANGUAGE_CODE:
        return str(TO_LANGUAGE_CODE[name])
    close = nearest(name, [*TO_LANGUAGE_CODE, *LANGUAGES])
    hint = f"did you mean `{close}`? " if close else ""
    hint += "write a code such as `de`, or an English name such as `german`"
    raise LoraError(f"Whisper knows no language `{spec.language}`", at, hint)
