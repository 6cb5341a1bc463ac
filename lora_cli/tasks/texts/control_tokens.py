"""Control tokens written out in a text: read as tokens, as tokenizers do, or as plain text.

A tokenizer takes `</s>` or `<|im_end|>` for the token wherever it stands, also in what a user
typed. `ControlTokens.plain` is a copy of the tokenizer in which every control token has a name that
no text holds: with it, a text never becomes a control token, whatever the algorithm is. (Splitting
special tokens, as transformers can, is not enough where the vocabulary has them as words.)

For a chat, only what the template itself writes may be a control token. So in the messages each
is replaced by one character before the template writes them, and what it writes is read with
that copy, in which the template's own control tokens are called by their new names.
"""

from __future__ import annotations

import copy
import json
import re
import secrets
import unicodedata
from bisect import bisect_right
from collections.abc import Collection
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase

from lora_cli.errors import LoraError
from lora_cli.tasks.texts.tokenize_long_texts import tokens_of

# where unassigned characters begin that can stand for control tokens: the private planes
BLOCKS = (0xF0000, 0xF8000, 0x100000, 0x108000)
BLOCK_SIZE = 0x7F00


class ControlTokens:
    """The control tokens of a tokenizer.

    Args:
        tokenizer: The tokenizer.
        more: Other added tokens to include: those with which a chat template ends a turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, more: Collection[str] = ()) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special}
        names = special | set(tokenizer.all_special_tokens) | set(more)
        self.names = sorted(
            (name for name in names if name.strip() and not _is_word(tokenizer, name)),
            key=lambda name: (-len(name), name),
        )
        pattern = "|".join(map(re.escape, self.names)) or r"(?!)"
        self._pattern = re.compile(pattern)
        self._like = re.compile(pattern, re.IGNORECASE)
        # a normalizer may turn another spelling into a control token
        self._is_normalized = any(t.normalized for t in added if t.content in names)

    def first_in(self, values: Any) -> str | None:
        """Return the first control token that is written out in a text, or in lists of texts."""
        found = self._pattern.search("\0".join(_strings(values)))
        return found[0] if found else None

    def may_be_in(self, text: str) -> bool:
        """Return whether the tokenizer may find a control token in a text."""
        if self._is_normalized and self.names:
            return True
        return bool(
            self._like.search(text) or self._like.search(unicodedata.normalize("NFKC", text))
        )

    @cached_property
    def _new_names(self) -> dict[str, str]:
        nonce = secrets.token_hex(8)  # so that nobody can type them; the ids are the same
        return {name: f"\ufdd0{nonce}.{i}\ufdd1" for i, name in enumerate(self.names)}

    @cached_property
    def plain(self) -> PreTrainedTokenizerBase:
        """The tokenizer that reads every text as plain text.

        Tokens that it adds itself, at the beginning of a text or between two, are as before.
        """
        tokenizer = self.tokenizer
        if not tokenizer.is_fast:
            reader = copy.copy(tokenizer)
            reader.split_special_tokens = True
            return reader
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        model, new = state["model"], self._new_names
        for token in state["added_tokens"]:
            token["content"] = new.get(token["content"], token["content"])
        words = model["vocab"]
        if isinstance(words, dict):
            model["vocab"] = {new.get(word, word): i for word, i in words.items()}
        else:  # Unigram has a list of words with their scores
            model["vocab"] = [[new.get(word, word), score] for word, score in words]
        if model.get("unk_token") in new:
            model["unk_token"] = new[model["unk_token"]]
        backend = Tokenizer.from_str(json.dumps(state))
        for name, other in new.items():
            id_ = tokenizer.backend_tokenizer.token_to_id(name)
            assert backend.token_to_id(other) == id_, f"{name} has another id"
        reader = copy.copy(tokenizer)
        reader._tokenizer = backend
        return reader

    def hide(self, *values: Any) -> Hidden:
        """Return messages and tools without any control tokens."""
        return Hidden(self, values)


class Hidden:
    """Strings whose control tokens are replaced by single characters, to be restored later."""

    def __init__(self, control: ControlTokens, values: Collection[Any]) -> None:
        self.control = control
        text = "\0".join(_strings(values))
        self.is_needed = control.may_be_in(text)
        self.values = list(values)
        if not self.is_needed:
            return
        block = next(
            (b for b in BLOCKS if not any(b <= ord(c) < b + BLOCK_SIZE for c in text)), None
        )
        if block is None or len(control.names) > BLOCK_SIZE:
            what = "it has characters of every private plane of Unicode"
            raise LoraError(what, hint="remove them from the row: they mean nothing by themselves")
        self._marks = {name: chr(block + i) for i, name in enumerate(control.names)}
        self._names = {mark: name for name, mark in self._marks.items()}
        self._either = re.compile(
            "|".join([*map(re.escape, control.names), f"[{chr(block)}-{chr(block + BLOCK_SIZE)}]"])
        )
        self.values = [self._replaced(value) for value in values]

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.control._pattern.sub(lambda found: self._marks[found[0]], value)
        if isinstance(value, dict):
            return {self._replaced(key): self._replaced(item) for key, item in value.items()}
        return [self._replaced(item) for item in value] if isinstance(value, list) else value

    def encode(
        self, text: str, spans: list[tuple[int, int]] | None = None
    ) -> tuple[list[int], list[bool]]:
        """Return the tokens of a rendered template, and which of them are within some spans.

        Args:
            text: The rendered template, with the characters that replace control tokens.
            spans: Pairs of a first character and the one after the last.
        """
        tokenizer = self.control.tokenizer
        spans = spans or []
        if self.is_needed:
            tokenizer = self.control.plain
            text, spans = self._restored(text, spans)
        tokens = tokens_of(tokenizer, text, special=False)
        inside = np.zeros(len(tokens.ids), dtype=bool)
        for first, last in spans:
            inside |= (tokens.starts < last) & (first < tokens.ends)
        return tokens.ids, inside.tolist()

    def _restored(
        self, text: str, spans: list[tuple[int, int]]
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text with the template's control tokens renamed, and typed ones restored."""
        parts: list[str] = []
        ends, moved = [0], [0]  # up to where the text is copied, and how far it has moved there
        length = 0
        position = 0
        for found in self._either.finditer(text):
            new = self._names.get(found[0]) or self.control._new_names[found[0]]
            before = text[position : found.start()]
            parts += [before, new]
            length += len(before) + len(new)
            position = found.end()
            ends.append(position)
            moved.append(length - position)
        parts.append(text[position:])

        def at(i: int) -> int:
            return i + moved[bisect_right(ends, i) - 1]

        return "".join(parts), [(at(first), at(last)) for first, last in spans]


def _is_word(tokenizer: PreTrainedTokenizerBase, name: str) -> bool:
    """Return whether a control token is also an ordinary word, such as `!` for padding."""
    model = tokenizer.backend_tokenizer.model if tokenizer.is_fast else None
    if len(name) > 1 and (not isinstance(model, BPE) or model.ignore_merges):
        return False
    return model is not None and [token.value for token in model.tokenize(name)] == [name]


def _strings(value: Any) -> list[str]:
    """Return all strings within some nested values."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for pair in value.items() for part in pair for text in _strings(part)]
    if isinstance(value, list | tuple):
        return [text for item in value for text in _strings(item)]
    return []
