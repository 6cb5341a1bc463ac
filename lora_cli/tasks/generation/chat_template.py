"""How a chat template writes a conversation, and which tokens of it are trained.

A conversation is rendered once by the model's chat template. A template with generation markers
says itself what the assistant wrote. For others, a turn's share of the text is what the template
adds for it: the difference between the rendering up to the turn and the rendering before it. Where
a template rewrites earlier turns (Qwen 3 takes their reasoning away), or writes no token that ends
a turn, each of the assistant's turns becomes an example of its own, rendered up to there: as the
model sees it when it is asked. So every answer has an end to learn.

What the messages say is text: a control token that stands in it is read as its letters. What a
template would leave out or cannot write (tools, calls, a turn's words) is an error.
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
PATIENCE_S = 10.0  # of computing, for one conversation; most take a thousandth of a second
ANOTHER = "give another template with `task.chat_template: FILE`"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Spans = list[tuple[int, int]]


class ChatTemplate:
    """A tokenizer's chat template, and how a conversation is read that it writes.

    Args:
        tokenizer: It holds the template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._endless: LoraError | None = None
        given = tokenizer.chat_template  # one, or one for each use by its name
        self.source = "\n".join(given.values()) if isinstance(given, dict) else str(given)
        self.opened = self._opened_block()
        """What it opens to ask for an answer, but does not write into an answer.

        DeepSeek's asks with `<think>` and keeps turns without it. The assistant's turn begins
        before that: so it is trained, and so it is asked."""
        self.end_of_turn, self._ends_turns = self._end_of_turn()
        """The token by which it ends the assistant's turn, if it is one token."""
        self.reopened = self._reopened()
        """What it opens behind an answer though nothing is asked, as the first one of Llama 3 did.

        It is no part of the turn."""
        self.control = ControlTokens(tokenizer, self._delimiters())

    # -- what the template is like

    def _opened_block(self) -> str:
        question = {"role": "user", "content": "Hi"}
        answers = [{"role": "assistant", "content": content} for content in ("0", "1")]
        try:
            prompt = self.write([question], add_generation_prompt=True)
            written = [self.write([question, answer]) for answer in answers]
        except LoraError:  # it takes no such conversation, and says so of the rows
            return ""
        shared = takewhile(
            lambda letters: len(set(letters)) == 1, zip(prompt, *written, strict=False)
        )
        return prompt[len(list(shared)) :]

    def _end_of_turn(self) -> tuple[set[int], bool]:
        """Return the token that follows an answer, and whether any follows: added ones count."""
        content = "Hello"
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
        try:
            text = self.write(messages)
        except LoraError:  # it takes no such conversation, and says so of the rows
            return set(), True
        tail = text[text.rfind(content) + len(content) :].strip()
        ids = self.tokenizer(tail, add_special_tokens=False, verbose=False)["input_ids"]
        added = set(self.tokenizer.added_tokens_decoder)
        return set(ids[:1]) & added, not added.isdisjoint(ids)

    def _reopened(self) -> str:
        content, question = "Hello", {"role": "user", "content": "Hi"}
        turns = [question, {"role": "assistant", "content": content}, question]
        try:
            prompt, with_answer, with_next_turn = (self.write(turns[:n]) for n in (1, 2, 3))
        except LoraError:  # it takes no such conversation, and says so of the rows
            return ""
        if not with_answer.startswith(prompt + content) or with_next_turn.startswith(with_answer):
            return ""
        tail = with_answer[len(prompt + content) :]
        ends = [self.tokenizer.added_tokens_decoder[i].content for i in self.end_of_turn]
        opened = [tail.removeprefix(end) for end in ends if tail.startswith(end)]
        return opened[0] if opened and prompt.endswith(opened[0]) else ""

    def _delimiters(self) -> set[str]:
        """Return the added tokens around a user's turn: control tokens whatever they are called."""
        added = self.tokenizer.added_tokens_decoder
        names = {added[i].content for i in self.end_of_turn}
        try:
            text = self.write([{"role": "user", "content": "Hi"}])
        except LoraError:
            return names
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return names | {added[i].content for i in ids if i in added}

    # -- writing

    def write(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        **options: Any,
    ) -> str:
        """Return a conversation as the template writes it.

        Raises:
            LoraError: If the template rejects it.
        """
        options = {"tokenize": False, "tools": tools or None, **options}
        return str(
            self._run(lambda: self.tokenizer.apply_chat_template(_unmarked(messages), **options))
        )

    def _run(self, program: Callable[[], Any]) -> Any:
        """Return what the template gives; one that did not come to an end is not tried again."""
        if self._endless is not None:
            raise self._endless
        try:
            with time_limit(PATIENCE_S):
                return program()
        except TooLongError as error:
            what = f"the chat template does not come to an end: {error}"
            self._endless = LoraError(what, hint=ANOTHER)
            raise self._endless from error
        except Exception as error:  # a template is a program; it fails in any way it likes
            raise _refusal(error) from error

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None) -> str:
        """Return a conversation as text that the assistant is to continue."""
        return self.write(messages, tools, add_generation_prompt=True).removesuffix(self.opened)

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """Return the tokens of a conversation that the assistant is to continue.

        Raises:
            LoraError: If the template rejects it, or does not write all of it.
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
        """Return the tokens of a conversation's examples, one as a rule, and which are trained.

        Args:
            conversation: The conversation.
            train_on: `assistant`, `all` or `last`.

        Raises:
            LoraError: If the template rejects the conversation or leaves something of it out, or
                the turns cannot be told apart.
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
        """Return a conversation's examples as text, each with the spans of characters to train."""
        if train_on != "all" and _GENERATION.search(self.source):
            return [self._render_marked(messages, train_on, tools)]
        whole = self.write(messages, tools).removesuffix(self.reopened)
        _require_contents(messages, whole)
        if train_on == "all":
            return [(whole, [(0, len(whole))])]
        assistant = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        alone = []
        for turn in assistant if train_on == "assistant" else assistant[-1:]:
            if messages[turn].get("weight") == 0:
                continue
            after = self.write(messages[: turn + 1], tools).removesuffix(self.reopened)
            before = self._before(messages, turn, after, tools)
            if not after.startswith(before):
                raise LoraError(
                    f"turn {turn + 1} cannot be told from what stands before it: the chat template "
                    "writes it in another way than it asks for it",
                    hint=ANOTHER,
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
        """Return a conversation with what the template itself marks as the assistant's."""
        texts, marked = self._run(
            lambda: render_jinja_template(
                [_unmarked(messages)],
                tools=list(tools) if tools else None,
                chat_template=self.tokenizer.get_chat_template(tools=list(tools or ()) or None),
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        )
        text, spans = str(texts[0]), _joined(marked[0])
        _require_contents(messages, text)
        turns = [message for message in messages if message["role"] == "assistant"]
        if any(turn.get("weight") == 0 for turn in turns):
            if len(turns) != len(spans):
                what = "the chat template marks other spans than the assistant's turns"
                raise LoraError(f"{what}, so turns of weight 0 cannot be left out", hint=ANOTHER)
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
        """Return what the template writes before the assistant's turn begins to speak."""
        if turn:
            return self.prompt(messages[:turn], tools)
        # Templates cannot render no messages. What they add to ask for an answer stands in front.
        prompt = self.prompt(messages[:1], tools)[len(after) :].lstrip()
        start = after.find(prompt) + len(prompt) if prompt in after else 0
        return after[:start]

    def _require_roles(self, messages: Sequence[Message]) -> None:
        """Reject a role that the template does not know: it would be written as it stands."""
        for number, message in enumerate(messages, 1):
            role = message["role"]
            if role not in ROLES and not re.search(rf"['\"]{re.escape(role)}['\"]", self.source):
                raise LoraError(
                    f"turn {number}: its role is `{role}`, which the chat template does not name",
                    hint=f"the usual roles are {', '.join(ROLES)}; or {ANOTHER}",
                )


def _joined(spans: Sequence[tuple[int, int]]) -> Spans:
    """Return spans, of which those without anything between them are one."""
    joined: Spans = []
    for first, last in spans:
        if joined and joined[-1][1] == first:
            first = joined.pop()[0]
        joined.append((first, last))
    return joined


def _unmarked(messages: Sequence[Message]) -> list[Message]:
    """Return messages without the weights, which are ours to obey."""
    return [{key: value for key, value in m.items() if key != "weight"} for m in messages]


def _refusal(error: Exception) -> LoraError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    what = f"the chat template refuses the conversation: {reason}"
    hint = "fix the row, or give a template that accepts it with `task.chat_template: FILE`"
    return LoraError(what, hint=hint)


# ------------------------------------------------------------------- what must have been written


def _holds(text: str, part: str) -> bool:
    """Return whether a text says something, as it stands or within JSON; spaces do not count."""
    part = part.strip()
    if part in text:
        return True
    close = "".join(text.split())
    return any(
        "".join(form.split()) in close
        for form in (part, json.dumps(part, ensure_ascii=False)[1:-1], json.dumps(part)[1:-1])
    )


def _names(text: str, name: str) -> bool:
    """Return whether a text has a name as a word: `<end_of_turn>` does not name `f`."""
    forms = (name, json.dumps(name, ensure_ascii=False)[1:-1], json.dumps(name)[1:-1])
    return any(re.search(rf"(?<!\w){re.escape(form.strip())}(?!\w)", text) for form in forms)


def _require_tools(tools: Sequence[dict[str, Any]] | None, text: str) -> None:
    """Reject tools that the template does not write."""
    for tool in tools or ():
        if not _names(text, str(name_of(tool))):
            raise LoraError(
                f"the chat template does not write the row's tools: `{name_of(tool)}` is missing",
                hint=f"use a base model that was trained to call tools, or {ANOTHER}",
            )


def _require_contents(messages: Sequence[Message], text: str) -> None:
    """Reject a conversation of which the template leaves out what another than the assistant says.

    (Of the assistant, templates take the reasoning of earlier turns away.)
    """
    for number, message in enumerate(messages, 1):
        content = message.get("content")
        if message["role"] != "assistant" and content and not _holds(text, str(content)):
            raise LoraError(
                f"turn {number}: the chat template leaves out or changes what the role "
                f"`{message['role']}` says",
                hint=ANOTHER,
            )


def _require_turn(message: Message, written: str, number: int) -> None:
    """Reject a turn of which the template does not write all: it would be lost unnoticed."""
    content, reasoning = message.get("content"), message.get("reasoning_content")
    reasoning = reasoning or message.get("reasoning") or message.get("thinking")
    answer = content if isinstance(content, str) else ""
    if not isinstance(reasoning, str) and THINK_END in answer:
        reasoning = answer.partition(THINK_END)[0].rpartition("<think>")[2]
        answer = answer.rpartition(THINK_END)[2]
    if isinstance(reasoning, str) and not _holds(written, reasoning):
        raise LoraError(
            f"turn {number}: the chat template leaves out the reasoning before the answer",
            hint="remove it from the data, or give a template that writes it with "
            "`task.chat_template`",
        )
    for call in message.get("tool_calls") or ():
        if not _names(written, str(name_of(call))):
            raise LoraError(
                f"turn {number}: the chat template does not write its call of `{name_of(call)}`",
                hint=f"use a base model that was trained to call tools, or {ANOTHER}",
            )
    if not _holds(written, answer):
        raise LoraError(
            f"turn {number}: the chat template leaves out or changes what the assistant says",
            hint=ANOTHER,
        )
