"""The prompt of a Whisper model: the language, and whether to transcribe or translate."""

from __future__ import annotations

from typing import Any

from lora_cli.errors import LoraError, nearest
from lora_cli.models.find_base import source_of
from lora_cli.recipe import Recipe, SpeechRecognitionSpec

MULTILINGUAL_VOCABULARY_SIZE = 51_865  # Whisper's English-only models have fewer tokens
NO_TIMESTAMPS = "<|notimestamps|>"


def is_multilingual(recipe: Recipe, vocabulary_size: int) -> bool:
    """Return whether a Whisper model is multilingual, and so needs to know the spoken language.

    English-only models have language tokens too, but were not trained with them.

    Args:
        recipe: The recipe, which names the model.
        vocabulary_size: The model's number of tokens.
    """
    from transformers import GenerationConfig

    source = source_of(recipe)
    try:
        config = GenerationConfig.from_pretrained(
            source["pretrained_model_name_or_path"], revision=source["revision"]
        )
    except (OSError, ValueError):  # no such file; loading the model reports a damaged one
        config = None
    flag = getattr(config, "is_multilingual", None)
    return bool(flag) if isinstance(flag, bool) else vocabulary_size >= MULTILINGUAL_VOCABULARY_SIZE


def prompt_tokens(
    spec: SpeechRecognitionSpec, tokenizer: Any, multilingual: bool, recipe: Recipe
) -> tuple[int, ...]:
    """Return the token ids of the decoder's prompt, without the start token.

    Args:
        spec: The recipe's task, with the language and Whisper's task.
        tokenizer: The model's tokenizer.
        multilingual: Whether the model is multilingual.
        recipe: The recipe, for names and locations in messages.

    Raises:
        LoraError: If the model lacks one of the tokens, or the recipe does not name a language.
    """
    names: list[str] = []
    if multilingual:
        names = [f"<|{language_code(spec, recipe)}|>", f"<|{spec.task or 'transcribe'}|>"]
    elif spec.language is not None or spec.task is not None:
        key = "language" if spec.language is not None else "task"
        what = f"`{recipe.model.name}` knows English only, and takes no `{key}`"
        hint = "leave `language` and `task` out, or take a model of several languages, such as "
        raise LoraError(what, recipe.at(f"task.{key}"), f"{hint}openai/whisper-small")
    vocabulary = tokenizer.get_vocab()
    for name, key in zip((*names, NO_TIMESTAMPS), ("language", "task", "type"), strict=False):
        if name not in vocabulary:
            what = f"the tokenizer of `{recipe.model.name}` has no token `{name}`"
            hint = "take a model that knows it: whisper-large-v3 knows the most languages"
            raise LoraError(what, recipe.at(f"task.{key}"), hint)
    return tuple(vocabulary[name] for name in (*names, NO_TIMESTAMPS))


def language_code(spec: SpeechRecognitionSpec, recipe: Recipe) -> str:
    """Return the code of the spoken language; the recipe gives its code or its English name.

    Raises:
        LoraError: If the recipe names no language, or one that Whisper does not know.
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
    suggestion = nearest(name, [*TO_LANGUAGE_CODE, *LANGUAGES])
    hint = f"did you mean `{suggestion}`? " if suggestion else ""
    hint += "write a code such as `de`, or an English name such as `german`"
    raise LoraError(f"Whisper knows no language `{spec.language}`", at, hint)
