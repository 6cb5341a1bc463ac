"""`task` for `type: causal_lm`."""

from __future__ import annotations

import math
import re
from pathlib import PurePath
from typing import Any, Literal

from lora_cli.recipe.spec.section import Conflicts, Positive, Word
from lora_cli.recipe.spec.task_section import (
    AnswerKind,
    TaskSection,
    Truncation,
    Usage,
    UsualTraining,
    pattern_conflicts,
)

GENERATING = """\
inputs = tokenizer({text}, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens={length}, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""
CHAT = """tokenizer.apply_chat_template(
    [{"role": "user", "content": "Some text"}], add_generation_prompt=True, return_dict=True,
    return_tensors="pt",
)"""


class CausalLMSpec(TaskSection):
    """Continue a text: language modelling, prompt and completion, or chat."""

    peft_task_type = "CAUSAL_LM"
    pipeline_tag = "text-generation"
    suitable_models = (
        "use a decoder such as GPT-2, Llama or Qwen; encoders, and models that translate one text "
        "into another, can be used for `sequence_classification`"
    )
    can_pack = True
    usual_training = UsualTraining(
        writes=True, longest=2048, epochs=((1_000, 3), (20_000, 2), (math.inf, 1))
    )
    can_distill = True

    type: Literal["causal_lm"]
    """The type of task."""

    text_column: Word | None = None
    """Column of plain text. Every token is trained; texts longer than `max_length` are split into
    several examples. Default: `text`, if no other column is named."""

    prompt_column: Word | None = None
    """Column of the prompt. The model reads it, but is not trained to write it."""

    completion_column: Word | None = None
    """Column of the completion, which the model is trained to write."""

    separator: str = ""
    """Text between the prompt and the completion; it counts as a part of the prompt."""

    messages_column: Word | None = None
    """Column of a conversation, which is formatted with the model's chat template."""

    format: Literal["openai", "sharegpt", "pairs", "alpaca", "self_instruct"] = "openai"
    """How a conversation is stored: `openai` (role, content), `sharegpt` (from, value), `pairs` (a
    list of questions with their answers, under the keys human and assistant, or input and output),
    `alpaca` (the columns instruction, input, output), or `self_instruct` (the columns instruction
    and instances, a list of inputs with their outputs). The last two do not use
    `messages_column`."""

    chat_template: Word | None = None
    """File with a Jinja chat template, if the model has none or should use another."""

    train_on: Literal["assistant", "all", "last"] = "assistant"
    """Which turns of a conversation are trained: all turns of the assistant, the turns of every
    speaker, or only the assistant's last turn."""

    pad_token: Word | None = None
    """The padding token, if the tokenizer does not have one."""

    max_length: Positive = 1024
    """Maximum length of an example in tokens. It never exceeds what the model supports."""

    truncate: Truncation = "right"
    """What happens to a prompt with its completion, or a conversation, that is longer: its end is
    cut off (`right`; if the prompt alone is that long, nothing is left to train), its beginning is
    cut off (`left`; a token that begins every text stays), the row is left out (`drop`), or it is
    an error (`error`). Plain texts are split, not truncated. With `left`, a prompt that leaves no
    room for an answer also loses its beginning, even if the model was trained on plain texts."""

    answer_pattern: Word | None = None
    """A regular expression that finds the final answer in the text that the model writes and in the
    expected text, such as `"#### (-?[0-9.,]+)"`. The last match counts; if the expression has
    groups, its first group. `exact_match` then compares these answers, and numbers by their value
    without commas (`1,234.0` is 1234). The metric `no_answer`, which is added, is the share of
    texts in which nothing is found. If nothing is found in the expected text of a row, whole texts
    are compared."""

    split_special_tokens: bool | None = None
    """Whether a control token that is spelled out in a text, such as `</s>`, is read as ordinary
    characters instead of the token. Default: no in plain texts, prompts and completions, as in
    transformers; always yes in conversations, where only the chat template writes control
    tokens."""

    def conflicts(self) -> Conflicts:
        """Yield what prevents a row from being read in exactly one way."""
        pair = self.prompt_column is not None or self.completion_column is not None
        if (self.prompt_column is None) != (self.completion_column is None):
            given = "prompt_column" if self.prompt_column else "completion_column"
            other = "completion_column" if self.prompt_column else "prompt_column"
            what = f"`{given}` needs `{other}`"
            yield given, what, f"name both columns: add `{other}: …`"
        if self.is_chat + pair + (self.text_column is not None) > 1:
            yield (
                "",
                "the rows can be read in more than one way",
                "keep one of `text_column`, `prompt_column` with `completion_column`, "
                "`messages_column`, or `format: alpaca` (or `self_instruct`)",
            )
        if self.is_chat and self.split_special_tokens is False:
            what = "in a conversation, control tokens in a text are always read as letters"
            yield "split_special_tokens", what, "leave it out: otherwise a text could forge a turn"
        if self.truncate in ("drop", "error") and not (self.is_chat or pair):
            what = f"`truncate: {self.truncate}` has no meaning with a text column"
            yield "truncate", what, "leave it out: plain texts are divided into several examples"
        if self.answer_pattern is not None and not (self.is_chat or pair):
            what = "`answer_pattern` finds an answer, and plain texts have no prompts to answer"
            hint = "name `prompt_column` and `completion_column`, or `messages_column`"
            yield "answer_pattern", what, hint
        yield from pattern_conflicts(self.answer_pattern)
        if self.format in ("sharegpt", "pairs") and self.messages_column is None:
            what = f"`format: {self.format}` needs `messages_column`"
            yield "format", what, "name the column: often `messages_column: conversations`"

    @property
    def instruction_columns(self) -> list[str]:
        """The columns that the format defines by itself."""
        columns = {
            "alpaca": ["instruction", "input", "output"],
            "self_instruct": ["instruction", "instances"],
        }
        return columns.get(self.format, [])

    @property
    def is_chat(self) -> bool:
        """Whether a row is a conversation."""
        return self.messages_column is not None or bool(self.instruction_columns)

    @property
    def answer_kind(self) -> AnswerKind:
        """Text."""
        return "text"

    @property
    def input_columns_by_key(self) -> dict[str, str]:
        """The columns of the text, the prompt or the conversation."""
        if columns := self.instruction_columns:
            # of Self-Instruct's rows, the instances are the input (and their outputs); Alpaca's
            # second column may be missing, so no key asks for it
            return {"task.format": columns[0], "": columns[1]}
        keys = ["text_column", "prompt_column", "messages_column"]
        named = {f"task.{key}": column for key in keys if (column := getattr(self, key))}
        return named or {"task.text_column": "text"}

    @property
    def local_files(self) -> list[str]:
        """The file of the chat template."""
        return ["chat_template"] if self.chat_template else []

    def usage(self, labels: list[str], settings: Any) -> Usage:
        """Return how to continue a text with the model, or to let it answer in a chat."""
        text, setup = repr(f"Some text{self.separator}"), ""
        code = GENERATING.format(text=text, length=settings.max_new_tokens)
        if self.is_chat:
            code = re.sub(r"tokenizer\(.*\)", CHAT, code, count=1)
        if self.chat_template:
            name = PurePath(self.chat_template).name
            setup = f"tokenizer.chat_template = open({name!r}).read()\n"
        if self.pad_token:
            setup += f"tokenizer.pad_token = {self.pad_token!r}\n"
        return Usage("AutoModelForCausalLM", code, setup=setup)
