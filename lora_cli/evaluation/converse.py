"""Converse with an adapted model, line by line, at a terminal or through a pipe."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import TextIO

from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from lora_cli.data.chat_formats import Message
from lora_cli.errors import LoraError
from lora_cli.evaluation.predict import answer
from lora_cli.tasks.contract import Task
from lora_cli.tasks.generation.text_generation import decode

Write = Callable[[str], object]
MAX_LINE_CHARACTERS = 1_000_000  # a longer line is no question; it may never end
HELP = "/reset forgets the conversation, /quit ends"


class Streamer(BaseStreamer):  # type: ignore[misc]  # transformers is untyped
    """Writes an answer piece by piece while it is generated.

    Only text that later tokens cannot change is written.

    Args:
        tokenizer: The model's tokenizer.
        write: Called with each piece of text.
        stops: The ids of the tokens that end an answer.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, write: Write, stops: Collection[int]
    ) -> None:
        self.tokenizer, self.write, self.stops = tokenizer, write, stops
        self.ids: list[int] | None = None  # None until the prompt, which is put first, was skipped
        self.written = 0
        self.has_ended = False

    def put(self, value: Tensor) -> None:
        """Take the next token; write the text that can no longer change."""
        if self.ids is None:
            self.ids = []
            return
        new = value.flatten().tolist()
        self.has_ended = self.has_ended or any(i in self.stops for i in new)
        self.ids += [i for i in new if i not in self.stops]
        text = self._text()
        if not text.endswith("\ufffd"):  # otherwise the character is incomplete
            self._write_from(text)

    def end(self) -> None:
        """Write the remaining text."""
        self._write_from(decode(self.tokenizer, self.ids or [], is_cut=not self.has_ended))

    def _text(self) -> str:
        return str(self.tokenizer.decode(self.ids or [], skip_special_tokens=True))

    def _write_from(self, text: str) -> None:
        if len(text) > self.written:
            self.write(text[self.written :])
            self.written = len(text)


def read_line(stream: TextIO, note: Write) -> str:
    """Return the next line that is not too long, with its newline; "" at the end of the stream.

    Args:
        stream: The user's input.
        note: Called with a message for each line that is skipped because it is too long.
    """
    while (
        len(line := stream.readline(MAX_LINE_CHARACTERS)) == MAX_LINE_CHARACTERS
        and line[-1] != "\n"
    ):
        while line and line[-1] != "\n":
            line = stream.readline(MAX_LINE_CHARACTERS)
        note(f"a line has {MAX_LINE_CHARACTERS:,} characters or more, and is not answered\n")
    return line


def converse(
    model: nn.Module,
    task: Task,
    accelerator: Accelerator,
    lines: Iterable[str],
    write: Write,
    note: Write,
) -> None:
    """Answer each line, until the lines end or one is `/quit`.

    A chat model gets the whole conversation each time; other models answer each line by itself.

    Args:
        model: The adapted model.
        task: The task that it was trained for.
        accelerator: The precision and the device.
        lines: The user's messages.
        write: Called with the pieces of the answers.
        note: Called with everything else: errors and hints.

    Raises:
        LoraError: If all further answers would fail too, such as a full disk behind standard
            output (exit code 5) or scores that are not finite (3). An error that concerns one
            message only is noted, and the conversation continues.
    """
    model.eval()
    history: list[Message] = []
    for line in lines:
        message = line.strip()
        if message == "/quit":
            return
        if message == "/reset":
            history = []
            note("the conversation starts over\n")
        elif message.startswith("/"):
            note(f"there is no command {message.split()[0]}; {HELP}\n")
        elif message:
            try:
                _reply(model, task, accelerator, message, history, write, note)
            except LoraError as error:
                if error.exit_code != LoraError.exit_code:  # every further answer would fail too
                    raise
                note(f"{error}\n")


def _reply(
    model: nn.Module,
    task: Task,
    accelerator: Accelerator,
    message: str,
    history: list[Message],
    write: Write,
    note: Write,
) -> None:
    """Write the answer to a line, and add both to the history."""
    writer = task.writer
    if writer is None:
        (values,) = answer(model, task, [task.parse_input(message)], accelerator)
        write(f"{task.answer_line(values)}\n")
        return
    writer.note_control_tokens([writer.parse_input(message)])
    if writer.is_chat:
        turns = [*history, {"role": "user", "content": message}]
        prompt = writer.chat_prompt(turns)
        max_tokens = writer.room_for_prompt
        while max_tokens is not None and len(prompt) > max_tokens and len(turns) > 2:
            turns = turns[2:]
            prompt = writer.chat_prompt(turns)
        if len(turns) <= len(history):
            note("the conversation is too long for the model: its oldest turns were dropped\n")
        untruncated, prompt = prompt, writer.shortened(prompt)
        if len(prompt) < len(untruncated):
            note("what you wrote is too long for the model: its beginning was cut\n")
    else:
        turns = []
        prompt = writer.text_prompt(message)
    with accelerator.autocast():
        streamer = Streamer(writer.tokenizer, write, writer.stop_ids(model))
        (text,) = writer.generate(model, [prompt], streamer)
    write("\n")
    for line in writer.take_warnings():
        note(f"warning: {line}\n")
    history[:] = [*turns, {"role": "assistant", "content": text}] if writer.is_chat else []
