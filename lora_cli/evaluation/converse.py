"""Talk with an adapted model: line by line, at a terminal or through a pipe."""

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
MOST_CHARACTERS = 1_000_000  # of a line; what is longer is no question, and may not end
HELP = "/reset forgets the conversation, /quit ends"


class Streamer(BaseStreamer):  # type: ignore[misc]  # transformers is untyped
    """Writes an answer while it is generated, piece by piece, and nothing that it does not hold.

    Args:
        tokenizer: Of the model.
        write: Takes each piece of text.
        stops: The tokens that end an answer.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, write: Write, stops: Collection[int]
    ) -> None:
        self.tokenizer, self.write, self.stops = tokenizer, write, stops
        self.ids: list[int] | None = None  # None until the prompt, which comes first, has passed
        self.written = 0
        self.has_ended = False

    def put(self, value: Tensor) -> None:
        """Take the next token; write what is certain of the text."""
        if self.ids is None:
            self.ids = []
            return
        new = value.flatten().tolist()
        self.has_ended = self.has_ended or any(i in self.stops for i in new)
        self.ids += [i for i in new if i not in self.stops]
        text = self._text()
        if not text.endswith("\ufffd"):  # else the rest of a character is yet to come
            self._write_from(text)

    def end(self) -> None:
        """Write what is left."""
        self._write_from(decode(self.tokenizer, self.ids or [], is_cut=not self.has_ended))

    def _text(self) -> str:
        return str(self.tokenizer.decode(self.ids or [], skip_special_tokens=True))

    def _write_from(self, text: str) -> None:
        if len(text) > self.written:
            self.write(text[self.written :])
            self.written = len(text)


def read_line(stream: TextIO, note: Write) -> str:
    """Return the next line that is not too long, with its end; nothing at the end of the stream.

    Args:
        stream: Where the user writes.
        note: Takes what to say of a line that is too long; the line is passed over.
    """
    while len(line := stream.readline(MOST_CHARACTERS)) == MOST_CHARACTERS and line[-1] != "\n":
        while line and line[-1] != "\n":
            line = stream.readline(MOST_CHARACTERS)
        note(f"a line has {MOST_CHARACTERS:,} characters or more, and is not answered\n")
    return line


def converse(
    model: nn.Module,
    task: Task,
    accelerator: Accelerator,
    lines: Iterable[str],
    write: Write,
    note: Write,
) -> None:
    """Answer line after line, until they end or one is `/quit`.

    A chat model is given the whole conversation each time; any other answers each line by itself.

    Args:
        model: The adapted model.
        task: What it was trained for.
        accelerator: Precision and device.
        lines: What the user says.
        write: Takes the answers, piece by piece.
        note: Takes what is not an answer: errors, hints.

    Raises:
        LoraError: If the next answer would fail too, such as a full disk behind standard output
            (exit code 5) or scores that are not finite (3). What is wrong with a single message
            is noted, and the conversation continues.
    """
    model.eval()
    history: list[Message] = []
    for line in lines:
        said = line.strip()
        if said == "/quit":
            return
        if said == "/reset":
            history = []
            note("the conversation starts over\n")
        elif said.startswith("/"):
            note(f"there is no command {said.split()[0]}; {HELP}\n")
        elif said:
            try:
                _reply(model, task, accelerator, said, history, write, note)
            except LoraError as error:
                if error.exit_code != LoraError.exit_code:  # every further answer would fail too
                    raise
                note(f"{error}\n")


def _reply(
    model: nn.Module,
    task: Task,
    accelerator: Accelerator,
    said: str,
    history: list[Message],
    write: Write,
    note: Write,
) -> None:
    """Write the answer to a line, and add both to the history."""
    writer = task.writer
    if writer is None:
        (values,) = answer(model, task, [task.parse_input(said)], accelerator)
        write(f"{task.answer_line(values)}\n")
        return
    writer.note_control_tokens([writer.parse_input(said)])
    if writer.is_chat:
        turns = [*history, {"role": "user", "content": said}]
        prompt = writer.chat_prompt(turns)
        room = writer.room_for_prompt
        while room is not None and len(prompt) > room and len(turns) > 2:
            turns = turns[2:]
            prompt = writer.chat_prompt(turns)
        if len(turns) <= len(history):
            note("the conversation is too long for the model: its oldest turns were dropped\n")
        whole, prompt = prompt, writer.shortened(prompt)
        if len(prompt) < len(whole):
            note("what you wrote is too long for the model: its beginning was cut\n")
    else:
        turns = []
        prompt = writer.text_prompt(said)
    with accelerator.autocast():
        streamer = Streamer(writer.tokenizer, write, writer.stop_ids(model))
        (text,) = writer.generate(model, [prompt], streamer)
    write("\n")
    for line in writer.take_warnings():
        note(f"warning: {line}\n")
    history[:] = [*turns, {"role": "assistant", "content": text}] if writer.is_chat else []
