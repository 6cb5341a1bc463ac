"""How a source and a target become tokens: languages, prefix, what begins and ends them, the cut.

A tokenizer may put the code of a language before a text or behind it (NLLB, mBART), and read
targets with another vocabulary than sources (Marian). What it puts around a text is found by trying
it on a short one, so that the text itself can be cut between the two.
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
SHORT = "a"


@dataclass(frozen=True)
class Frame:
    """The tokens that a tokenizer puts before a text and behind it."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.before) + len(self.after)

    def around(self, ids: Sequence[int]) -> list[int]:
        """Return tokens in the frame."""
        return [*self.before, *ids, *self.after]


class SourcesAndTargets:
    """Reads sources and targets.

    Args:
        spec: The recipe's task section.
        tokenizer: Of the model; it is left as it is.
        reader: Reads the texts of rows: the same, or a copy that knows no control tokens.
        limits: The longest source and the longest target in tokens.
        start: The token that the model itself puts before a target, if it is always the same.

    Raises:
        LoraError: If the recipe's languages are not those of the tokenizer.
    """

    def __init__(
        self,
        spec: Seq2SeqLMSpec,
        tokenizer: PreTrainedTokenizerBase,
        reader: PreTrainedTokenizerBase,
        limits: dict[Side, int],
        start: int | None,
    ) -> None:
        self.spec, self.limits = spec, limits
        framing: Any = _with_languages(spec, tokenizer)
        self.source_frame = _frame(framing, "source")
        frame = _frame(framing, "target")
        if frame.before[:1] == (start,):  # the model adds it: it must not stand there twice
            frame = Frame(frame.before[1:], frame.after)
        self.adds_end = not frame.after
        if self.adds_end:  # the tokenizer ends no text: the model would never learn to stop
            frame = Frame(frame.before, (int(framing.eos_token_id),))
        self.target_frame = frame
        # of its own, since a tokenizer of several languages is changed by each text that it reads
        self._reader: Any = reader
        if reader.is_fast:
            self._reader = PreTrainedTokenizerFast(tokenizer_object=reader.backend_tokenizer)
        elif has_languages(reader):  # without them, M2M100's reads no target
            self._reader = _with_languages(spec, reader)
        # a space at its end belongs to the word that follows
        prefix = spec.prefix.rstrip()
        self._prefix = self._read("source", [prefix])[0] if prefix else []

    def sources(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of sources with their prefix, not cut."""
        whole = self._read("source", [f"{self.spec.prefix}{text}" for text in texts])
        return [self.source_frame.around(ids) for ids in whole]

    def targets(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of targets, not cut."""
        return [self.target_frame.around(ids) for ids in self._read("target", texts)]

    def cut(self, ids: list[int], side: Side, how: Truncation | None = None) -> list[int]:
        """Return a source or a target within its limit, or nothing if it is left out.

        Args:
            ids: Its tokens.
            side: Which of the two it is.
            how: What happens to a longer one; None is as the recipe says.

        Raises:
            LoraError: If it is too long, and the recipe asks for an error.
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
        prefix = self._prefix if side == "source" else []
        text = ids[len(frame.before) : len(ids) - len(frame.after)]
        room = limit - len(frame) - len(prefix)
        if room <= 0:
            return []
        text = text[len(prefix) :]
        return frame.around([*prefix, *(text[-room:] if how == "left" else text[:room])])

    def truncation(self, side: Side) -> Truncation:
        """Return what happens to a source or a target that is too long."""
        return self.spec.truncate_source if side == "source" else self.spec.truncate_target

    def _read(self, side: Side, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of texts without those that begin and end every text."""
        reader = self._reader
        if not reader.is_fast and side == "target":
            read = reader(text_target=list(texts), add_special_tokens=False, verbose=False)
        elif any(map(is_long, texts)):
            return [token_ids(reader, text, special=False) for text in texts]
        else:
            read = reader(list(texts), add_special_tokens=False, verbose=False)
        return [list(ids) for ids in read["input_ids"]]


def has_languages(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer marks the language of each text."""
    return hasattr(tokenizer, "src_lang") and hasattr(tokenizer, "tgt_lang")


def _with_languages(
    spec: Seq2SeqLMSpec, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase:
    """Return a copy of the tokenizer that marks texts with the recipe's languages.

    Raises:
        LoraError: If it has no languages and the recipe names some, or the other way round; if it
            does not know one of them.
    """
    names: dict[Side, str | None] = {
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
    for side, name in names.items():
        known = language_codes(tokenizer)
        if name is None:
            raise LoraError(
                f"the model translates many languages, and the recipe does not say which is the "
                f"{side}",
                f"task.{side}_language",
                f"name both by the model's codes: {_some(known)}",
            )
        if known and name not in known:
            what = f"the tokenizer of this model has no language `{name}`"
            close = nearest(name, known)
            hint = f"did you mean `{close}`? " if close else ""
            hint += f"it has {_some(known)}"
            raise LoraError(what, f"task.{side}_language", hint)
    framing: Any = copy.deepcopy(tokenizer)
    framing.src_lang, framing.tgt_lang = names["source"], names["target"]
    read: PreTrainedTokenizerBase = framing
    return read


def language_codes(tokenizer: Any) -> list[str]:
    """Return the codes by which a tokenizer knows languages, in their order in its vocabulary."""
    for table in ("lang_code_to_token", "lang_code_to_id"):  # of M2M100, and of mBART
        if codes := getattr(tokenizer, table, None):
            return list(codes)
    special = set(tokenizer.all_special_tokens) - {
        tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token,
        tokenizer.sep_token, tokenizer.cls_token, tokenizer.mask_token,
    }  # fmt: skip
    return sorted(special, key=tokenizer.convert_tokens_to_ids)


def _some(codes: Sequence[str]) -> str:
    return ", ".join(codes[:5]) + (", …" if len(codes) > 5 else "")


def _frame(tokenizer: Any, side: Side) -> Frame:
    """Return what a tokenizer puts around a text."""
    key = "text" if side == "source" else "text_target"
    whole, inner = (
        list(tokenizer(**{key: SHORT}, add_special_tokens=special)["input_ids"])
        for special in (True, False)
    )
    for start in range(len(whole) - len(inner) + 1):
        if inner and whole[start : start + len(inner)] == inner:
            return Frame(tuple(whole[:start]), tuple(whole[start + len(inner) :]))
    # it knows no letter: what stands around is what it makes of nothing
    return Frame((), tuple(whole))
