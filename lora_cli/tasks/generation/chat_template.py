"""Renders conversations by the model's chat template, and finds the tokens that are trained.

A template with generation markers marks the assistant's text itself. For other templates, the text
of a turn is the difference between the rendering up to and including the turn, and the prompt that
asks for it. If a template rewrites earlier turns (Qwen 3 removes their reasoning), or writes no
token that ends a turn, each turn of the assistant becomes a separate example, rendered only up to
that turn, as the model will see it in use. So each answer is trained to end.

The contents of messages are ordinary text: a control token written out in them is encoded as its
characters. It is an error if the template leaves out a tool, a tool call or the content of a turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from lora_cli.data.chat_formats import ROLES, Conversation, Message, name_of
from lora_cli.errors import LoraError
from lora_cli.tasks.texts.control_tokens import ControlTokens
from lora_cli.time_limit import TooLongError, time_limit

THINK_END = "</think>"
TIMEOUT_S = 10.0  # for rendering one conversation, which usually takes a millisecond
OTHER_TEMPLATE_HINT = "give another template with `task.chat_template: FILE`"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Spans = list[tuple[int, int]]


class ChatTemplate:
    """A tokenizer's chat template, and the tokens of the conversations that it renders.

    Args:
        tokenizer: The tokenizer, which has a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._timeout_error: LoraError | None = None
        templates = tokenizer.chat_template  # one template, or several by name
        self.source = (
            "\n".join(templates.values()) if isinstance(templates, dict) else str(templates)
        )
        self.prompt_only_suffix = self._find_prompt_only_suffix()
        """The end of the generation prompt that is missing from rendered answers.

        DeepSeek's prompt ends with `<think>`, which its rendered turns do not contain. It is
        removed from the prompts, so that training and prediction agree."""
        self.end_of_turn, self._ends_turns = self._find_end_of_turn()
        """The token that ends the assistant's turn, if it is a single token."""
        self.trailing_prompt = self._find_trailing_prompt()
        """The generation prompt that is added after an answer even if none is asked for.

        The first template of Llama 3 did this. It is not part of the turn."""
        self.control = ControlTokens(tokenizer, self._turn_delimiters())

    # -- properties of the template, found by rendering short conversations

    def _find_prompt_only_suffix(self) -> str:
        question = {"role": "user", "content": "Hi"}
        answers = [{"role": "assistant", "content": content} for content in ("0", "1")]
        try:
            prompt = self.write([question], add_generation_prompt=True)
            written = [self.write([question, answer]) for answer in answers]
        except LoraError:  # it rejects this conversation; rows get errors of their own
            return ""
        shared = takewhile(
            lambda letters: len(set(letters)) == 1, zip(prompt, *written, strict=False)
        )
        return prompt[len(list(shared)) :]

    def _find_end_of_turn(self) -> tuple[set[int], bool]:
        """Return the added token right after an answer, and whether any added token follows it."""
        content = "Hello"
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
        try:
            text = self.write(messages)
        except LoraError:  # it rejects this conversation; rows get errors of their own
            return set(), True
        tail = text[text.rfind(content) + len(content) :].strip()
        ids = self.tokenizer(tail, add_special_tokens=False, verbose=False)["input_ids"]
        added = set(self.tokenizer.added_tokens_decoder)
        return set(ids[:1]) & added, not added.isdisjoint(ids)

    def _find_trailing_prompt(self) -> str:
        content, question = "Hello", {"role": "user", "content": "Hi"}
        turns = [question, {"role": "assistant", "content": content}, question]
        try:
            prompt, with_answer, with_next_turn = (self.write(turns[:n]) for n in (1, 2, 3))
        except LoraError:  # it rejects this conversation; rows get errors of their own
            return ""
        if not with_answer.startswith(prompt + content) or with_next_turn.startswith(with_answer):
            return ""
        tail = with_answer[len(prompt + content) :]
        ends = [self.tokenizer.added_tokens_decoder[i].content for i in self.end_of_turn]
        trailing = [tail.removeprefix(end) for end in ends if tail.startswith(end)]
        return trailing[0] if trailing and prompt.endswith(trailing[0]) else ""

    def _turn_delimiters(self) -> set[str]:
        """Return the added tokens around a user's turn, which are control tokens by their use."""
        added = self.tokenizer.added_tokens_decoder
        names = {added[i].content for i in self.end_of_turn}
        try:
            text = self.write([{"role": "user", "content": "Hi"}])
        except LoraError:
            return names
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return names | {added[i].content for i in ids if i in added}

    # -- rendering

    def write(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        **options: Any,
    ) -> str:
        """Return a conversation as text, rendered by the template.

        Raises:
            LoraError: If the template rejects it.
        """
        options = {"tokenize": False, "tools": tools or None, **options}
        return str(
            self._run(
                lambda: self.tokenizer.apply_chat_template(_without_weights(messages), **options)
            )
        )

    def _run(self, render: Callable[[], Any]) -> Any:
        """Return what `render` returns; after a timeout, raise the same error without a new try."""
        if self._timeout_error is not None:
            raise self._timeout_error
        try:
            with time_limit(TIMEOUT_S):
                return render()
        except TooLongError as error:
            what = f"the chat template did not finish: {error}"
            self._timeout_error = LoraError(what, hint=OTHER_TEMPLATE_HINT)
            raise self._timeout_error from error
        except Exception as error:  # a template is a program, which may raise any error
            raise _rejection(error) from error

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None) -> str:
        """Return a conversation as text, for the assistant to continue."""
        return self.write(messages, tools, add_generation_prompt=True).removesuffix(
            self.prompt_only_suffix
        )

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """Return the token ids of a conversation, for the assistant to continue.

        Raises:
            LoraError: If the template rejects the conversation or leaves a part of it out.
        """
        self._require_roles(conversation.messages)
        hidden = self.control.hide(conversation.messages, conversation.tools)
        messages, tools = hidden.values
        text = self.prompt(messages, tools)
        _require_tools(tools, text)
        _require_contents(messages, text)
        return hidden.encode(text)[0]

    def encode(
        self, conversation: Conversation, train_on: str
    ) -> list[tuple[list[int], list[bool]]]:
        """Return the examples of a conversation, usually one.

        Args:
            conversation: The conversation.
            train_on: `assistant`, `all` or `last`.

        Returns:
            For each example, its token ids (T,), and whether each of them is trained (T,).

        Raises:
            LoraError: If the template rejects the conversation, leaves a part of it out, or renders
                it so that its turns cannot be separated.
        """
        self._require_roles(conversation.messages)
        hidden = self.control.hide(conversation.messages, conversation.tools)
        messages, tools = hidden.values
        texts = self.render(messages, train_on, tools)
        _require_tools(tools, texts[-1][0])
        return [hidden.encode(text, spans) for text, spans in texts]

    def render(
        self,
        messages: Sequence[Message],
        train_on: str,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> list[tuple[str, Spans]]:
        """Return the examples of a conversation as texts, each with its trained character spans."""
        if train_on != "all" and _GENERATION.search(self.source):
            return [self._render_marked(messages, train_on, tools)]
        whole = self.write(messages, tools).removesuffix(self.trailing_prompt)
        _require_contents(messages, whole)
        if train_on == "all":
            return [(whole, [(0, len(whole))])]
        assistant = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        alone = []
        for turn in assistant if train_on == "assistant" else assistant[-1:]:
            if messages[turn].get("weight") == 0:
                continue
            after = self.write(messages[: turn + 1], tools).removesuffix(self.trailing_prompt)
            before = self._before(messages, turn, after, tools)
            if not after.startswith(before):
                raise LoraError(
                    f"turn {turn + 1} cannot be separated from the turns before it: the chat "
                    "template renders it differently after the prompt that asks for it",
                    hint=OTHER_TEMPLATE_HINT,
                )
            _require_turn(messages[turn], after[len(before) :], turn + 1)
            alone.append((after, [(len(before), len(after))]))
        if self._ends_turns and all(whole.startswith(after) for after, _ in alone):
            return [(whole, [span for _, spans in alone for span in spans])]
        return alone

    def _render_marked(
        self,
        messages: Sequence[Message],
        train_on: str,
        tools: Sequence[dict[str, Any]] | None,
    ) -> tuple[str, Spans]:
        """Return a conversation as text, with the spans that the template marks as generated."""
        texts, marked = self._run(
            lambda: render_jinja_template(
                [_without_weights(messages)],
                tools=list(tools) if tools else None,
                chat_template=self.tokenizer.get_chat_template(tools=list(tools or ()) or None),
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        )
        text, spans = str(texts[0]), _join_adjacent(marked[0])
        _require_contents(messages, text)
        turns = [message for message in messages if message["role"] == "assistant"]
        if any(turn.get("weight") == 0 for turn in turns):
            if len(turns) != len(spans):
                what = "the chat template marks other spans than the assistant's turns"
                raise LoraError(
                    f"{what}, so turns of weight 0 cannot be left out", hint=OTHER_TEMPLATE_HINT
                )
            spans = [
                span for span, turn in zip(spans, turns, strict=True) if turn.get("weight") != 0
            ]
            if train_on == "last" and turns[-1].get("weight") == 0:
                spans = []
        for number, turn in enumerate(messages, 1):
            if turn["role"] == "assistant" and turn.get("weight") != 0:
                _require_turn(turn, text, number)
        return text, spans[-1:] if train_on == "last" else spans

    def _before(
        self,
        messages: Sequence[Message],
        turn: int,
        after: str,
        tools: Sequence[dict[str, Any]] | None,
    ) -> str:
        """Return the text before the content of an assistant's turn."""
        if turn:
            return self.prompt(messages[:turn], tools)
        # A template cannot render an empty conversation. The text before the first turn ends with
        # the generation prompt, which is what it adds after this turn.
        prompt = self.prompt(messages[:1], tools)[len(after) :].lstrip()
        start = after.find(prompt) + len(prompt) if prompt in after else 0
        return after[:start]

    def _require_roles(self, messages: Sequence[Message]) -> None:
        """Reject a role that the template's source does not mention: it would be copied as it is.

        Raises:
            LoraError: If a message has such a role.
        """
        for number, message in enumerate(messages, 1):
            role = message["role"]
            if role not in ROLES and not re.search(rf"['\"]{re.escape(role)}['\"]", self.source):
                raise LoraError(
                    f"turn {number}: its role is `{role}`, which the chat template does not name",
                    hint=f"the usual roles are {', '.join(ROLES)}; or {OTHER_TEMPLATE_HINT}",
                )


def _join_adjacent(spans: Sequence[tuple[int, int]]) -> Spans:
    """Return the spans, with adjacent ones joined."""
    joined: Spans = []
    for first, last in spans:
        if joined and joined[-1][1] == first:
            first = joined.pop()[0]
        joined.append((first, last))
    return joined


def _without_weights(messages: Sequence[Message]) -> list[Message]:
    """Return messages without the key `weight`, which is not meant for the template."""
    return [{key: value for key, value in m.items() if key != "weight"} for m in messages]


def _rejection(error: Exception) -> LoraError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    what = f"the chat template rejects the conversation: {reason}"
    hint = "fix the row, or give a template that accepts it with `task.chat_template: FILE`"
    return LoraError(what, hint=hint)


# ------------------------------------------------------------ checks that nothing is left out


def _contains(text: str, part: str) -> bool:
    """Return whether a text contains a part, literally or escaped as JSON, ignoring whitespace."""
    part = part.strip()
    if part in text:
        return True
    without_spaces = "".join(text.split())
    return any(
        "".join(form.split()) in without_spaces
        for form in (part, json.dumps(part, ensure_ascii=False)[1:-1], json.dumps(part)[1:-1])
    )


def _contains_word(text: str, name: str) -> bool:
    """Return whether a text contains a name as a whole word: `<end_of_turn>` does not contain `f`.

    Letters escaped as in JSON are accepted too.
    """
    forms = (name, json.dumps(name, ensure_ascii=False)[1:-1], json.dumps(name)[1:-1])
    return any(re.search(rf"(?<!\w){re.escape(form.strip())}(?!\w)", text) for form in forms)


def _require_tools(tools: Sequence[dict[str, Any]] | None, text: str) -> None:
    """Reject tools whose names are missing from the rendered text."""
    for tool in tools or ():
        if not _contains_word(text, str(name_of(tool))):
            raise LoraError(
                f"the chat template does not write the row's tools: `{name_of(tool)}` is missing",
                hint=f"use a base model that was trained to call tools, or {OTHER_TEMPLATE_HINT}",
            )


def _require_contents(messages: Sequence[Message], text: str) -> None:
    """Reject a conversation if the rendered text lacks the content of a turn.

    The assistant's turns are not checked here, since templates remove the reasoning from earlier
    ones.
    """
    for number, message in enumerate(messages, 1):
        content = message.get("content")
        if message["role"] != "assistant" and content and not _contains(text, str(content)):
            raise LoraError(
                f"turn {number}: the chat template leaves out or changes what the role "
                f"`{message['role']}` says",
                hint=OTHER_TEMPLATE_HINT,
            )


def _require_turn(message: Message, written: str, number: int) -> None:
    """Reject an assistant's turn if the rendered text lacks its reasoning, a call or its content.

    Otherwise that part would not be trained, and nobody would notice.
    """
    content, reasoning = message.get("content"), message.get("reasoning_content")
    reasoning = reasoning or message.get("reasoning") or message.get("thinking")
    answer = content if isinstance(content, str) else ""
    if not isinstance(reasoning, str) and THINK_END in answer:
        reasoning = answer.partition(THINK_END)[0].rpartition("<think>")[2]
        answer = answer.rpartition(THINK_END)[2]
    if isinstance(reasoning, str) and not _contains(written, reasoning):
        raise LoraError(
            f"turn {number}: the chat template leaves out the reasoning before the answer",
            hint="remove it from the data, or give a template that writes it with "
            "`task.chat_template`",
        )
    for call in message.get("tool_calls") or ():
        if not _contains_word(written, str(name_of(call))):
            raise LoraError(
                f"turn {number}: the chat template does not write its call of `{name_of(call)}`",
                hint=f"use a base model that was trained to call tools, or {OTHER_TEMPLATE_HINT}",
            )
    if not _contains(written, answer):
        raise LoraError(
            f"turn {number}: the chat template leaves out or changes what the assistant says",
            hint=OTHER_TEMPLATE_HINT,
        )
