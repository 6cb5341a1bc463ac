"""Encodes sources and targets: languages, prefixes, special tokens around the text, truncation.

A tokenizer may put a language code before or after a text (NLLB, mBART), and use different
vocabularies for sources and targets (Marian). The tokens that it puts around a text are found by
encoding a short one, so that only the text between them is truncated.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lora_cli.errors import LoraError, counted, nearest
from lora_cli.recipe import Seq2SeqLMSpec
from lora_cli.recipe.spec.task_section import Truncation
from lora_cli.tasks.texts.tokenize_long_texts import is_long, token_ids

Side = Literal["source", "target"]
TRIAL_TEXT = "a"


@dataclass(frozen=True)
class Frame:
    """The tokens that a tokenizer puts before and after a text."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.before) + len(self.after)

    def around(self, ids: Sequence[int]) -> list[int]:
        """Return the tokens of a text within the frame."""
        return [*self.before, *ids, *self.after]


class SourcesAndTargets:
    """Encodes sources and targets.

    Args:
        spec: The recipe's task section.
        tokenizer: The model's tokenizer, which is not changed.
        text_tokenizer: The tokenizer for the texts of rows: the same, or a copy that reads control
            tokens as ordinary text.
        limits: The maximum lengths of a source and of a target, in tokens.
        start: The token that the model itself puts before each target, if it is always the same.

    Raises:
        LoraError: If the tokenizer does not have the recipe's languages.
    """

    def __init__(
        self,
        spec: Seq2SeqLMSpec,
        tokenizer: PreTrainedTokenizerBase,
        text_tokenizer: PreTrainedTokenizerBase,
        limits: dict[Side, int],
        start: int | None,
    ) -> None:
        self.spec, self.limits = spec, limits
        with_languages: Any = _with_languages(spec, tokenizer)
        self.source_frame = _frame(with_languages, "source")
        frame = _frame(with_languages, "target")
        if frame.before[:1] == (start,):  # the model adds it itself
            frame = Frame(frame.before[1:], frame.after)
        self.adds_end = not frame.after
        if self.adds_end:  # without an end token, the model would never learn to stop
            frame = Frame(frame.before, (int(with_languages.eos_token_id),))
        self.target_frame = frame
        # a separate instance, since encoding a text changes the state of a multilingual tokenizer
        self._text_tokenizer: Any = text_tokenizer
        if text_tokenizer.is_fast:
            self._text_tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=text_tokenizer.backend_tokenizer
            )
        elif has_languages(text_tokenizer):  # M2M100's cannot encode targets without
            self._text_tokenizer = _with_languages(spec, text_tokenizer)
        # a space at the end of the prefix is encoded with the word that follows
        prefix = spec.prefix.rstrip()
        self._prefix_ids = self._encode("source", [prefix])[0] if prefix else []

    def sources(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of sources with their prefix, not truncated."""
        whole = self._encode("source", [f"{self.spec.prefix}{text}" for text in texts])
        return [self.source_frame.around(ids) for ids in whole]

    def targets(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of targets, not truncated."""
        return [self.target_frame.around(ids) for ids in self._encode("target", texts)]

    def cut(self, ids: list[int], side: Side, how: Truncation | None = None) -> list[int]:
        """Return a source or a target, truncated to its limit; empty if it is dropped.

        Args:
            ids: Its token ids.
            side: Whether it is a source or a target.
            how: How to truncate it; None for the recipe's setting.

        Raises:
            LoraError: If it is too long and the setting is `error`.
        """
        limit, how = self.limits[side], how or self.truncation(side)
        if len(ids) <= limit:
            return ids
        if how == "drop":
            return []
        if how == "error":
            key = f"max_{side}_length"
            raise LoraError(
                f"the {side} has {counted(len(ids), 'token')}, more than {limit:,}",
                hint=f"raise `task.{key}`, or cut such rows: `task.truncate_{side}: right`",
            )
        frame = self.source_frame if side == "source" else self.target_frame
        prefix = self._prefix_ids if side == "source" else []
        text = ids[len(frame.before) : len(ids) - len(frame.after)]
        room = limit - len(frame) - len(prefix)
        if room <= 0:
            return []
        text = text[len(prefix) :]
        return frame.around([*prefix, *(text[-room:] if how == "left" else text[:room])])

    def truncation(self, side: Side) -> Truncation:
        """Return the recipe's setting for sources or targets that are too long."""
        return self.spec.truncate_source if side == "source" else self.spec.truncate_target

    def _encode(self, side: Side, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of texts without special tokens."""
        text_tokenizer = self._text_tokenizer
        if not text_tokenizer.is_fast and side == "target":
            encoded = text_tokenizer(
                text_target=list(texts), add_special_tokens=False, verbose=False
            )
        elif any(map(is_long, texts)):
            return [token_ids(text_tokenizer, text, special=False) for text in texts]
        else:
            encoded = text_tokenizer(list(texts), add_special_tokens=False, verbose=False)
        return [list(ids) for ids in encoded["input_ids"]]


def has_languages(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer adds language codes to texts."""
    return hasattr(tokenizer, "src_lang") and hasattr(tokenizer, "tgt_lang")


def _with_languages(
    spec: Seq2SeqLMSpec, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase:
    """Return a copy of the tokenizer that uses the recipe's languages.

    A tokenizer without languages is returned as it is.

    Raises:
        LoraError: If only one of the recipe and the tokenizer has languages, or if the tokenizer
            does not know one of the recipe's.
    """
    codes: dict[Side, str | None] = {
        "source": spec.source_language, "target": spec.target_language
    }  # fmt: skip
    if not has_languages(tokenizer):
        if spec.source_language is not None:
            raise LoraError(
                "the tokenizer of this model marks no languages",
                "task.source_language",
                "leave both languages out; for T5 and multilingual Marian models, name them in "
                "`task.prefix`",
            )
        return tokenizer
    for side, name in codes.items():
        known = language_codes(tokenizer)
        if name is None:
            raise LoraError(
                f"the model translates many languages, and the recipe does not say which is the "
                f"{side}",
                f"task.{side}_language",
                f"name both by the model's codes: {_list_some(known)}",
            )
        if known and name not in known:
            what = f"the tokenizer of this model has no language `{name}`"
            close = nearest(name, known)
            hint = f"did you mean `{close}`? " if close else ""
            hint += f"it has {_list_some(known)}"
            raise LoraError(what, f"task.{side}_language", hint)
    with_languages: Any = copy.deepcopy(tokenizer)
    with_languages.src_lang, with_languages.tgt_lang = codes["source"], codes["target"]
    copied: PreTrainedTokenizerBase = with_languages
    return copied


def language_codes(tokenizer: Any) -> list[str]:
    """Return the language codes of a tokenizer, in the order of its vocabulary."""
    for table in ("lang_code_to_token", "lang_code_to_id"):  # M2M100 and mBART
        if codes := getattr(tokenizer, table, None):
            return list(codes)
    special = set(tokenizer.all_special_tokens) - {
        tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token,
        tokenizer.sep_token, tokenizer.cls_token, tokenizer.mask_token,
    }  # fmt: skip
    return sorted(special, key=tokenizer.convert_tokens_to_ids)


def _list_some(codes: Sequence[str]) -> str:
    return ", ".join(codes[:5]) + (", …" if len(codes) > 5 else "")


def _frame(tokenizer: Any, side: Side) -> Frame:
    """Return the tokens that a tokenizer puts around a text."""
    key = "text" if side == "source" else "text_target"
    whole, inner = (
        list(tokenizer(**{key: TRIAL_TEXT}, add_special_tokens=special)["input_ids"])
        for special in (True, False)
    )
    for start in range(len(whole) - len(inner) + 1):
        if inner and whole[start : start + len(inner)] == inner:
            return Frame(tuple(whole[:start]), tuple(whole[start + len(inner) :]))
    # no token for the text itself (such as an unknown letter): all tokens belong to the frame
    return Frame((), tuple(whole))
