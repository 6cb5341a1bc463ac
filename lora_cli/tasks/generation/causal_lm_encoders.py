"""Turns the rows of a language model into examples and prompts, with one class for each format.

`PlainText` trains every token, `PromptAndCompletion` the tokens after the prompt, and `Chat` the
assistant's turns.
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

SAMPLE_TOKENS = 16  # the longest beginning of a plain text that a sample continues


class RowFormat(ABC):
    """Encodes rows of one format.

    Args:
        spec: The recipe's task section.
        tokenizer: The model's tokenizer.
        text_tokenizer: The tokenizer for the texts of rows: the same, or one that reads control
            tokens as ordinary text.
        max_length: The maximum length of an example, in tokens.
    """

    def __init__(
        self,
        spec: CausalLMSpec,
        tokenizer: PreTrainedTokenizerBase,
        text_tokenizer: PreTrainedTokenizerBase,
        max_length: int,
    ) -> None:
        self.spec, self.tokenizer, self.text_tokenizer = spec, tokenizer, text_tokenizer
        self.max_length = max_length
        self.eos_id: int = tokenizer.eos_token_id

    @abstractmethod
    def encode(self, rows: Sequence[dict[str, Any]]) -> list[list[Example]]:
        """Return the examples of each row, except for those in which no token is trained."""

    @abstractmethod
    def prompt(self, row: dict[str, Any]) -> list[int]:
        """Return the token ids of a row without its answer."""

    @abstractmethod
    def sample(self, row: dict[str, Any]) -> tuple[list[int], str]:
        """Return the token ids that a sample continues, and the row's own continuation."""

    def why_nothing(self, row: dict[str, Any]) -> str:
        """Return a hint for a row in which no token is trained."""
        return "raise `task.max_length`, if the model can take more; a prompt has to end before it"

    def with_end_token(self, ids: list[int]) -> list[int]:
        """Return the token ids with an end-of-text token, so that the model learns to stop."""
        return ids if ids and ids[-1] == self.eos_id else [*ids, self.eos_id]

    def encode_without_end(self, text: str) -> list[int]:
        """Return the token ids of a text without the end-of-text token, for it to be continued."""
        ids = token_ids(self.text_tokenizer, text)
        return ids[:-1] if ids and ids[-1] == self.eos_id else ids

    def keep_last_tokens(self, ids: list[int], room: int) -> list[int]:
        """Return `room` tokens of a prompt: its BOS token, if it has one, and its last tokens."""
        return [ids[i] for i in self._last_positions(ids, room)]

    def _last_positions(self, ids: list[int], room: int) -> list[int]:
        """Return the positions of the `room` tokens that are kept when the beginning is cut."""
        first = [0] if room > 1 and ids[0] == self.tokenizer.bos_token_id else []
        return [*first, *range(len(ids) - (room - len(first)), len(ids))]

    def fit_to_length(self, ids: list[int], labels: list[int]) -> list[Example]:
        """Return the example, truncated to `max_length` as the recipe says.

        Args:
            ids: Its token ids (T,).
            labels: Its labels (T,), `IGNORED` where the token is not trained.

        Returns:
            A list of one example; empty if it is dropped, or if none of its tokens is trained.

        Raises:
            LoraError: If it is too long and the recipe has `truncate: error`.
        """
        whole = {}
        if len(ids) > self.max_length:
            whole = {"full_length": len(ids)}
            ids, labels = self._cut(ids, labels)
        # the first token has no logits: the model would predict it from nothing
        trained = any(label != IGNORED for label in labels[1:])
        return [{"input_ids": ids, "labels": labels, **whole}] if trained else []

    def _cut(self, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        size = self.max_length
        match self.spec.truncate:
            case "right":
                return ids[:size], labels[:size]
            case "left":
                kept = self._last_positions(ids, size)
                return [ids[i] for i in kept], [labels[i] for i in kept]
            case "drop":
                return [], []
            case "error":
                raise LoraError(
                    f"the row has {counted(len(ids), 'token')}, more than {size:,}",
                    hint="raise `task.max_length`, or cut such rows: `task.truncate: left`",
                )


class PlainText(RowFormat):
    """A column of texts, all of whose tokens are trained."""

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[list[Example]]:
        """Return the examples of each row: its text, cut into windows of `max_length` tokens."""
        column = self.spec.text_column or "text"
        texts = [str(row[column]) for row in rows]
        if any(map(is_long, texts)):
            return [
                self._windows(self.with_end_token(token_ids(self.text_tokenizer, text)))
                for text in texts
            ]
        read = self.text_tokenizer(texts, verbose=False)
        return [self._windows(self.with_end_token(ids)) for ids in read["input_ids"]]

    def _windows(self, ids: list[int]) -> list[Example]:
        """Cut a text into examples of at most `max_length` tokens.

        The last token of a window is also the first of the next one. The first token of a window is
        read but not predicted, so every token except the first of the text is trained once.
        """
        size = self.max_length
        pieces = [ids[i : i + size] for i in range(0, len(ids), max(size - 1, 1))]
        whole = {"full_length": len(ids)} if len(ids) > size else {}
        return [{"input_ids": p, "labels": p, **whole} for p in pieces if len(p) > 1]

    def prompt(self, row: dict[str, Any]) -> list[int]:
        """Return the token ids of the text, for the model to continue."""
        return self.encode_without_end(
            str(row[self.spec.text_column or "text"]) + self.spec.separator
        )

    def sample(self, row: dict[str, Any]) -> tuple[list[int], str]:
        """Return the token ids of the text's beginning, and the text that follows it."""
        column = self.spec.text_column or "text"
        whole = token_ids(self.text_tokenizer, str(row[column]))
        cut = whole_characters(self.tokenizer, whole, min(SAMPLE_TOKENS, (len(whole) + 1) // 2))
        end = whole_characters(self.tokenizer, whole, cut + SAMPLE_NEW_TOKENS)
        return whole[:cut], str(self.tokenizer.decode(whole[cut:end]))


class PromptAndCompletion(RowFormat):
    """A column of prompts, which are only read, and one of completions, which are trained."""

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[list[Example]]:
        """Return the example of each row."""
        return [self._encode(row) for row in rows]

    def _encode(self, row: dict[str, Any]) -> list[Example]:
        prompt = str(row[self.spec.prompt_column or ""]) + self.spec.separator
        completion = str(row[self.spec.completion_column or ""])
        start = self.encode_without_end(prompt)  # some tokenizers add an end-of-text token
        whole = token_ids(self.text_tokenizer, prompt + completion)
        if whole[: len(start)] != start:
            # A token spans the boundary. Generation starts after the tokens of the prompt alone, so
            # that is also how it is trained.
            whole = start + self._encode_continuation(completion)
        whole = self.with_end_token(whole)
        return self.fit_to_length(whole, [IGNORED] * len(start) + whole[len(start) :])

    def _encode_continuation(self, text: str) -> list[int]:
        """Return the tokens of a text that continues another one.

        SentencePiece tokenizers put a space before each text, which the row does not contain, but
        none after a line break. So the text is encoded after a line break, whose tokens are then
        removed, unless they are merged with the first of the text.
        """
        before = token_ids(self.text_tokenizer, "\n", special=False)
        ids = token_ids(self.text_tokenizer, "\n" + text, special=False)
        if before and ids[: len(before)] == before:
            return ids[len(before) :]
        return token_ids(self.text_tokenizer, text, special=False)

    def prompt(self, row: dict[str, Any]) -> list[int]:
        """Return the token ids of the prompt with the separator."""
        return self.encode_without_end(
            str(row[self.spec.prompt_column or ""]) + self.spec.separator
        )

    def sample(self, row: dict[str, Any]) -> tuple[list[int], str]:
        """Return the token ids of the prompt, and the completion."""
        return self.prompt(row), str(row[self.spec.completion_column or ""])


class Chat(RowFormat):
    """A conversation, rendered by the model's chat template."""

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
        stop = len(trained) - trained[::-1].index(True)  # no token after the last trained one
        ids, trained = ids[:stop], trained[:stop]
        labels = [token if on else IGNORED for token, on in zip(ids, trained, strict=True)]
        last_turn = takewhile(lambda label: label != IGNORED, reversed(labels))
        if self.eos_id not in last_turn:  # the template adds none, but the model must learn to stop
            ids.append(self.eos_id)
            labels.append(self.eos_id)
        return self.fit_to_length(ids, labels)

    def why_nothing(self, row: dict[str, Any]) -> str:
        """Return a hint for a row in which no token is trained, perhaps due to the template."""
        conversation = conversations_of(row, self.spec)[0]
        examples = self.template.encode(conversation, self.spec.train_on)
        if not any(any(trained) for _, trained in examples):
            return (
                "the chat template marks or writes nothing of the assistant's turns: give "
                "another with `task.chat_template: FILE`, or `--set task.train_on=all`"
            )
        return super().why_nothing(row)

    def prompt(self, row: dict[str, Any]) -> list[int]:
        """Return the token ids of the conversation, without a last turn of the assistant.

        Raises:
            LoraError: If there is no turn to answer, or the template rejects the conversation.
        """
        conversation = conversations_of(row, self.spec)[0]
        messages = conversation.messages
        question = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        if not question:
            raise LoraError("there is no turn to answer")
        return self.encode_chat(question, conversation.tools)

    def encode_chat(
        self, messages: list[Message], tools: list[dict[str, Any]] | None = None
    ) -> list[int]:
        """Return the token ids of a conversation, for the assistant to continue."""
        return self.template.prompt_ids(Conversation(messages, tools))

    def sample(self, row: dict[str, Any]) -> tuple[list[int], str]:
        """Return the token ids of the conversation up to the assistant's last answer, and that."""
        try:
            ids = self.prompt(row)
        except LoraError:  # such as a conversation that begins with the assistant
            ids = list(self.tokenizer(" ", verbose=False)["input_ids"])
        last = conversations_of(row, self.spec)[0].messages[-1]
        return ids, str(last.get("content") or "") if last["role"] == "assistant" else ""


FORMATS: dict[str, type[PlainText | PromptAndCompletion | Chat]] = {
    "text": PlainText,
    "pair": PromptAndCompletion,
    "chat": Chat,
}


# ---------------------------------------------------------------------------- errors in rows


def conversations_of(row: dict[str, Any], spec: CausalLMSpec) -> list[Conversation]:
    """Return the conversations of a row that has no error."""
    return read_conversations(row, spec.format, spec.messages_column)


def input_error(row: dict[str, Any], spec: CausalLMSpec, columns: Sequence[str]) -> str:
    """Return what is wrong with the input of a row; empty if nothing is.

    Args:
        row: The row.
        spec: The recipe's task section.
        columns: The columns of the text or the prompt.
    """
    by_column = bool(spec.instruction_columns) or not spec.is_chat
    blank = [name for name in ("instruction", "input") if is_blank(row.get(name))]
    if spec.format == "alpaca" and blank == ["instruction"]:
        columns = ["input"]  # the input alone is the question
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
    """Return what is wrong with the target of a row; empty if nothing is.

    Args:
        row: A row for which `input_error` returned nothing.
        spec: The recipe's task section.
        columns: The column of the completion.
    """
    several = spec.format == "self_instruct"
    if not several and (reason := text_error(row, columns)):
        return reason
    if (spec.is_chat or spec.prompt_column) and (found := bad_answer(row)):
        return f"it has {found[0]}"
    if not spec.is_chat:
        return ""
    return conversation_error(row, spec.format, spec.messages_column)
