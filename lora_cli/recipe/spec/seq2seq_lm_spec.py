"""`task` for `type: seq2seq_lm`."""

from __future__ import annotations

import math
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
output = model.generate(**inputs, {options})
print(tokenizer.decode(output[0], skip_special_tokens=True))"""
LANGUAGES = """\
tokenizer.src_lang, tokenizer.tgt_lang = {source!r}, {target!r}
around = tokenizer(text_target="")["input_ids"]  # the language that is written, and the end
first = {{"forced_bos_token_id": around[0]}}
if around[0] == tokenizer.eos_token_id:  # this model begins with the language by itself
    first = {{"decoder_start_token_id": around[-1]}}
"""


class Seq2SeqLMSpec(TaskSection):
    """Read a text and write another: translation, summarisation, data to text."""

    peft_task_type = "SEQ_2_SEQ_LM"
    pipeline_tag = "text2text-generation"
    suitable_models = (
        "use an encoder-decoder such as T5, BART, Marian (opus-mt), mBART or NLLB; models that "
        "continue a text learn pairs of texts as `causal_lm`, by `prompt_column` and "
        "`completion_column`"
    )
    usual_training = UsualTraining(
        writes=True, longest=512, epochs=((1_000, 10), (20_000, 5), (math.inf, 2)),
        learning_rate=1e-3, metrics=("bleu", "chrf"),
    )  # fmt: skip
    length_keys = ("max_source_length", "max_target_length")

    type: Literal["seq2seq_lm"]
    """The type of task."""

    source_column: Word = "source"
    """Column of the text that the model reads."""

    target_column: Word = "target"
    """Column of the text that the model should write. A list of texts stands for several correct
    answers: each is trained, and metrics compare an answer with all of them."""

    prefix: str = ""
    """Text before every source that the model was trained with, such as T5's `"translate English to
    German: "`, or `">>fra<< "` for a Marian model that writes several languages."""

    source_language: Word | None = None
    """The code of the source language, if the tokenizer has such codes: `eng_Latn` for NLLB,
    `en_XX` for mBART, `en` for M2M100."""

    target_language: Word | None = None
    """The code of the target language. Every answer is forced to begin with it."""

    max_source_length: Positive = 256
    """Maximum length of a source in tokens, including the prefix and the special tokens at both
    ends. It never exceeds the model's positions; nor, unless the recipe has this key, what its
    tokenizer expects."""

    max_target_length: Positive = 128
    """Maximum length of a target in training, counted in the same way.
    (`evaluate.generation.max_new_tokens` limits what the model writes.)"""

    truncate_source: Truncation = "right"
    """What happens to a longer source: its end (`right`) or its beginning (`left`) is cut off,
    while the prefix and the special tokens at both ends stay; its row is left out (`drop`); or it
    is an error (`error`)."""

    truncate_target: Truncation = "right"
    """What happens to a longer target, with the same values. If it is truncated, the model learns
    to stop there, as with the tokenizer's own truncation."""

    answer_pattern: Word | None = None
    """A regular expression that finds the final answer in the text that the model writes and in the
    expected text, such as `"#### (-?[0-9.,]+)"`. The last match counts; if the expression has
    groups, its first group. `exact_match` then compares these answers, and numbers by their value
    without commas (`1,234.0` is 1234). The metric `no_answer`, which is added, is the share of
    texts in which nothing is found. If nothing is found in the expected text of a row, whole texts
    are compared."""

    split_special_tokens: bool | None = None
    """Whether a control token that is spelled out in a text, such as `</s>`, is read as ordinary
    characters instead of the token. Default: no, as in transformers."""

    def conflicts(self) -> Conflicts:
        """Yield what prevents a row from being read."""
        if (self.source_language is None) != (self.target_language is None):
            given = "source_language" if self.source_language else "target_language"
            other = "target_language" if self.source_language else "source_language"
            yield given, f"`{given}` needs `{other}`", f"name both languages: add `{other}: …`"
        yield from pattern_conflicts(self.answer_pattern)
        if self.source_column == self.target_column:
            what = f"`{self.source_column}` is both the source and the target"
            yield "target_column", what, "name the column of the text that is to be written"

    @property
    def answer_kind(self) -> AnswerKind:
        """Text."""
        return "text"

    @property
    def input_columns_by_key(self) -> dict[str, str]:
        """The column of the source."""
        return {"task.source_column": self.source_column}

    def usage(self, labels: list[str], settings: Any) -> Usage:
        """Return how to write the target of a source with the model."""
        options = f"max_new_tokens={settings.max_new_tokens}, num_beams={settings.num_beams}"
        options += ", do_sample=False"
        setup = ""
        if self.source_language and self.target_language:
            setup = LANGUAGES.format(source=self.source_language, target=self.target_language)
            options += ", **first"
        code = GENERATING.format(text=repr(f"{self.prefix}Some text"), options=options)
        return Usage("AutoModelForSeq2SeqLM", code, setup=setup)
