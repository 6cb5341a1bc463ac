"""How long conversations are once the chat template has written them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from lora_cli.data.chat_formats import Conversation, conversation_error, read_conversations
from lora_cli.errors import LoraError
from lora_cli.tasks.proposal import Proposal


class TurnCounter:
    """Counts the tokens of conversations as the chat template writes them.

    Args:
        tokenizer: It counts.
        template: The chat template, where the tokenizer has none.
    """

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        from lora_cli.tasks.generation.chat_template import (
            ChatTemplate,  # torch, which most drafts do not need
        )

        if template is not None:
            tokenizer = copy.copy(tokenizer)
            tokenizer.chat_template = template
        self._template = ChatTemplate(tokenizer)

    def whole(self, conversation: Conversation) -> int | None:
        """Return the tokens of a conversation, or None if the template does not write it."""
        return self._count(conversation.messages, conversation.tools, ask=False)

    def prompt(self, conversation: Conversation) -> int | None:
        """Return the tokens before the first answer, or None if the template does not write it."""
        roles = [message["role"] for message in conversation.messages]
        before = conversation.messages[: roles.index("assistant")]
        return self._count(before, conversation.tools, ask=True)

    def _count(self, messages: Sequence[dict[str, Any]], tools: Any, ask: bool) -> int | None:
        try:
            text = (
                self._template.prompt(messages, tools)
                if ask
                else self._template.write(messages, tools)
            )
        except LoraError:
            return None  # `lora validate` names the row
        encoded = self._template.tokenizer(text, add_special_tokens=False, verbose=False)
        return len(encoded["input_ids"])


def conversations_of(row: dict[str, Any], chosen: Proposal) -> list[Conversation]:
    """Return the conversations of a row; none if it cannot be trained."""
    form, column = chosen.keys["format"], chosen.keys.get("messages_column")
    if conversation_error(row, form, column):
        return []
    return read_conversations(row, form, column)
