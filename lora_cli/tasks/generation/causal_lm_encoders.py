"""How a row of a language model becomes examples, and what is asked of it: one class a format.

`PlainText` trains every token, `PromptAndCompletion` what follows a prompt, `Chat` what the
assistant says.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_cli.data.chat_formats import (
    Conversation,
    Message,
    RowError,
    conversation_error,
    read_conversations,
)
from lora_cli.data.file_formats import is_blank, text_error
from lora_cli.data.unsupported_rows import bad_answer, unread_media
from lora_cli.errors import LoraError, counted
from lora_cli.recipe import CausalLMSpec
from lora_cli.tasks.examples import IGNORED, Example
from lora_cli.tasks.generation.chat_template import ChatTemplate
from lora_cli.tasks.generation.text_generation import whole_characters
from lora_cli.tasks.generation.writing_task import SAMPLE_NEW_TOKENS
from lora_cli.tasks.texts.tokenize_long_texts import is_long, token_ids

SAMPLE_TOKENS = 16  # of a plain text that is continued


class RowFormat(ABC):
    """A way in which rows hold what is trained.

    Args:
        spec: The recipe's task.
        tokenizer: Of the model.
        reader: Reads the texts of rows; the same, or one that knows no control tokens.
        max_length: Longest example in tokens.
    """

    def __init__(
        self,
        spec: CausalLMSpec,
        tokenizer: PreTrainedTokenizerBase,
        reader: PreTrainedTokenizerBase,
        max_length: int,
    ) -> None:
        self.spec, self.tokenizer, self.reader = spec, tokenizer, reader
        self.max_length = max_length
        self.end: int = tokenizer.eos_token_id

    @abstractmethod
    def encode(self, rows: Sequence[dict[str, Any]]) -> list[list[Example]]:
        """Return the examples of each row; those in which nothing is trained are left out."""

    @abstractmethod
    def prompt(self, row: dict[str, Any]) -> list[int]:
        """Return the token ids of a row without its answer."""

    @abstractmethod
    def sample(self, row: dict[str, Any]) -> tuple[list[int], str]:
        """Return the token ids that a sample continues, and what the row says there."""

    def why_nothing(self, row: dict[str, Any]) -> str:
        """Return a hint, where a row leaves nothing to train."""
        return "raise `task.max_length`, if the model can take more; a prompt has to end before it"

    def ended(self, ids: list[int]) -> list[int]:
        """Return a text with its end-of-text token, so that the model learns to stop."""
        return ids if ids and ids[-1] == self.end else [*ids, self.end]

    def begun(self, text: str) -> list[int]:
        """Return the tokens of a text that goes on."""
        ids = token_ids(self.reader, text)
        return ids[:-1] if ids and ids[-1] == self.end else ids

    def shortened(self, ids: list[int], room: int) -> list[int]:
        """Return the last tokens of a prompt, behind the token that begins every text."""
        return [ids[i] for i in self._last(ids, room)]

    def _last(self, ids: list[int], room: int) -> list[int]:
        """Return the positions of the tokens that are kept where the beginning is cut."""
        first = [0] if room > 1 and ids[0] == self.tokenizer.bos_token_id else []
        return [*first, *range(len(ids) - (room - len(first)), len(ids))]

    def fitted(self, ids: list[int], labels: list[int]) -> list[Example]:
        """Return the example within `max_length`, as the recipe says, or nothing.

        Raises:
            LoraError: If it is too long, and the recipe asks for an error.
        """
        whole = {}
        if len(ids) > self.max_length:
            whole = {"full_length": len(ids)}
            ids, labels = self._cut(ids, labels)
        # the first token is predicted from nothing
        trained = any(label != IGNORED for label in labels[1:])
        return [{"input_ids": ids, "labels": labels, **whole}] if trained else []

    def _cut(self, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        size = self.max_length
        match self.spec.truncate:
            case "right":
                return ids[:size], labels[:size]
            case "left":
                kept = self._last(ids, size)
                return [ids[i] for i in kept], [labels[i] for i in kept]
            case "drop":
                return [], []
            case "error":
                raise LoraError(
                    f"the row has {counted(len(ids), 'token')}, more than {size:,}",
                    hint="raise `task.max_length`, or cut such rows: `task.truncate: left`",
                )


class PlainText(RowFormat):
    """A column of text, of which every token is trained."""

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[list[Example]]:
        """Return the windows of each row."""
        column = self.spec.text_column or "text"
        texts = [str(row[column]) for row in rows]
        if any(map(is_long, texts)):
            return [self._windows(self.ended(token_ids(self.reader, text))) for text in texts]
        read = self.reader(texts, verbose=False)
        return [self._windows(self.ended(ids)) for ids in read["input_ids"]]

    def _windows(self, ids: list[int]) -> list[Example]:
        """Cut a text into examples of at most `max_length` tokens.

        The last token of one is the first of the next, which is read but not predicted: so every
        token but the text's first is trained, once.
        """
        size = self.max_length
        pieces = [ids[i : i + size] for i in range(0, len(ids), max(size - 1, 1))]
        whole = {"full_length": len(ids)} if len(ids) > size else {}
        return [{"input_ids": p, "labels": p, **whole} for p in pieces if len(p) > 1]

    def prompt(self, row: dict[str, Any]) -> list[int]:
        """Return the token ids of the text, which is to be continued."""
        return self.begun(str(row[self.spec.text_column or "text"]) + self.spec.separator)

    def sample(self, row: dict[str, Any]) -> tuple[list[int], str]:
        """Return the beginning of the text, and what follows it."""
        column = self.spec.text_column or "text"
        whole = token_ids(self.reader, str(row[column]))
        cut = whole_characters(self.tokenizer, whole, min(SAMPLE_TOKENS, (len(whole) + 1) // 2))
        end = whole_characters(self.tokenizer, whole, cut + SAMPLE_NEW_TOKENS)
        return whole[:cut], str(self.tokenizer.decode(whole[cut:end]))


class PromptAndCompletion(RowFormat):
    """A column of prompts, which are read, and one of completions, which are trained."""

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[list[Example]]:
        """Return the example of each row."""
        return [self._encode(row) for row in rows]

    def _encode(self, row: dict[str, Any]) -> list[Example]:
        prompt = str(row[self.spec.prompt_column or ""]) + self.spec.separator
        completion = str(row[self.spec.completion_column or ""])
        start = self.begun(prompt)  # a tokenizer that ends texts itself: this one goes on
        whole = token_ids(self.reader, prompt + completion)
        if whole[: len(start)] != start:
            # A token spans the border. Generation starts after the prompt's own tokens: train so.
            whole = start + self._going_on(completion)
        whole = self.ended(whole)
        return self.fitted(whole, [IGNORED] * len(start) + whole[len(start) :])

    def _going_on(self, text: str) -> list[int]:
        """Return the tokens of a text that goes on where another one ended.

        SentencePiece's tokenizers put a space before whatever they read, which the row does not
        have. Behind a line end they do not; where that is no part of the text's own tokens, it is
        read with the text and taken away again.
        """
        before = token_ids(self.reader, "\n", special=False)
        ids = token_ids(self.reader, "\n" + text, special=False)
        if before and ids[: len(before)] == before:
            return ids[len(before) :]
        return token_ids(self.reader, text, special=False)

    def prompt(self, row: dict[str, Any]) -> list[int]:
        """Return the token ids of the prompt and the separator."""
        return self.begun(str(row[self.spec.prompt_column or ""]) + self.spec.separator)

    def sample(self, row: dict[str, Any]) -> tuple[list[int], str]:
        """Return the prompt and the completion."""
        return self.prompt(row), str(row[self.spec.completion_column or ""])


class Chat(RowFormat):
    """A conversation, written with the model's chat template."""

    @functools.cached_property
    def template(self) -> ChatTemplate:
        """The tokenizer's chat template."""
        return ChatTemplate(self.tokenizer)

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[list[Example]]:
        """Return the examples of each row's conversations."""
        return [
            [
                example
                for conversation in conversations_of(row, self.spec)
                for ids, trained in self.template.encode(conversation, self.spec.train_on)
                for example in self._example(ids, trained)
            ]
            for row in rows
        ]

    def _example(self, ids: list[int], trained: list[bool]) -> list[Example]:
        if not any(trained):
            return []
        stop = len(trained) - trained[::-1].index(True)  # what follows teaches nothing
        ids, trained = ids[:stop], trained[:stop]
        labels = [token if on else IGNORED for token, on in zip(ids, trained, strict=True)]
        last_turn = takewhile(lambda label: label != IGNORED, reversed(labels))
        if self.end not in last_turn:  # the template does not end it: the model must learn to stop
            ids.append(self.end)
            labels.append(self.end)
        return self.fitted(ids, labels)

    def why_nothing(self, row: dict[str, Any]) -> str:
        """Return a hint, where a row leaves nothing to train: is it due to the template?"""
        conversation = conversations_of(row, self.spec)[0]
        examples = self.template.encode(conversation, self.spec.train_on)
        if not any(any(trained) for _, trained in examples):
            return (
                "the chat template marks or writes nothing of the assistant's turns: give "
                "another with `task.chat_template: FILE`, or `--set task.train_on=all`"
            )
        return super().why_nothing(row)

    def prompt(self, row: dict[str, Any]) -> list[int]:
        """Return the tokens of the conversation without the assistant's last answer, if it has one.

        Raises:
            LoraError: If there is no turn to answer, or the template rejects the conversation.
        """
        conversation = conversations_of(row, self.spec)[0]
        messages = conversation.messages
        question = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        if not question:
            raise LoraError("there is no turn to answer")
        return self.ask(question, conversation.tools)

    def ask(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """Return the tokens of a conversation that the assistant is to continue."""
        return self.template.prompt_ids(Conversation(messages, tools))

    def sample(self, row: dict[str, Any]) -> tuple[list[int], str]:
        """Return the conversation up to the assistant's last answer, and that answer."""
        try:
            ids = self.prompt(row)
        except LoraError:  # the assistant speaks first
            ids = list(self.tokenizer(" ", verbose=False)["input_ids"])
        last = conversations_of(row, self.spec)[0].messages[-1]
        return ids, str(last.get("content") or "") if last["role"] == "assistant" else ""


FORMATS: dict[str, type[PlainText | PromptAndCompletion | Chat]] = {
    "text": PlainText,
    "pair": PromptAndCompletion,
    "chat": Chat,
}


# ------------------------------------------------------------------------------ what is wrong


def conversations_of(row: dict[str, Any], spec: CausalLMSpec) -> list[Conversation]:
    """Return the conversations of a row that has no error."""
    return read_conversations(row, spec.format, spec.messages_column)


def input_error(row: dict[str, Any], spec: CausalLMSpec, columns: Sequence[str]) -> str:
    """Return what is wrong with what a model reads of a row, or nothing.

    Args:
        row: The row.
        spec: The recipe's task.
        columns: Those of the text or the prompt.
    """
    by_column = bool(spec.instruction_columns) or not spec.is_chat
    blank = [name for name in ("instruction", "input") if is_blank(row.get(name))]
    if spec.format == "alpaca" and blank == ["instruction"]:
        columns = ["input"]  # which is the question then
    if by_column and (reason := text_error(row, columns)):
        return reason
    if (spec.is_chat or spec.prompt_column) and (found := unread_media(row)):
        return f"it has {found[0]}"
    if not spec.is_chat:
        return ""
    try:
        conversations_of(row, spec)
    except RowError as error:
        return str(error)
    return ""


def target_error(row: dict[str, Any], spec: CausalLMSpec, columns: Sequence[str]) -> str:
    """Return what is wrong with what a model should learn of a row, or nothing.

    Args:
        row: A row without an error of `input_error`.
        spec: The recipe's task.
        columns: That of the completion.
    """
    several = spec.format == "self_instruct"
    if not several and (reason := text_error(row, columns)):
        return reason
    if (spec.is_chat or spec.prompt_column) and (found := bad_answer(row)):
        return f"it has {found[0]}"
    if not spec.is_chat:
        return ""
    return conversation_error(row, spec.format, spec.messages_column)
