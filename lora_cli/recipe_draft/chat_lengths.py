"""Measure the length of conversations as formatted by the chat template."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from lora_cli.data.chat_formats import Conversation, conversation_error, read_conversations
from lora_cli.errors import LoraError
from lora_cli.tasks.proposal import Proposal


class TurnCounter:
    """Counts the tokens of conversations as formatted by the chat template.

    Args:
        tokenizer: The tokenizer.
        template: A chat template to use instead of the tokenizer's.
    """

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        from lora_cli.tasks.generation.chat_template import (
            ChatTemplate,  # needs torch, which most drafts do not
        )

        if template is not None:
            tokenizer = copy.copy(tokenizer)
            tokenizer.chat_template = template
        self._template = ChatTemplate(tokenizer)

    def whole(self, conversation: Conversation) -> int | None:
        """Return the number of tokens of a conversation; None if the template rejects it."""
        return self._count(conversation.messages, conversation.tools, is_prompt=False)

    def prompt(self, conversation: Conversation) -> int | None:
        """Return the number of tokens before the first answer; None if the template rejects it."""
        roles = [message["role"] for message in conversation.messages]
        prompt_turns = conversation.messages[: roles.index("assistant")]
        return self._count(prompt_turns, conversation.tools, is_prompt=True)

    def _count(self, messages: Sequence[dict[str, Any]], tools: Any, is_prompt: bool) -> int | None:
        try:
            text = (
                self._template.prompt(messages, tools)
                if is_prompt
                else self._template.write(messages, tools)
            )
        except LoraError:
            return None  # `lora validate` names the row
        encoded = self._template.tokenizer(text, add_special_tokens=False, verbose=False)
        return len(encoded["input_ids"])


def conversations_of(row: dict[str, Any], chosen: Proposal) -> list[Conversation]:
    """Return the conversations of a row; empty if it cannot be used for training."""
    form, column = chosen.keys["format"], chosen.keys.get("messages_column")
    if conversation_error(row, form, column):
        return []
    return read_conversations(row, form, column)
