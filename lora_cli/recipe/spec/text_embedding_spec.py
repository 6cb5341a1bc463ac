"""`task` for `type: text_embedding`."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field

from lora_cli.recipe.spec.section import Conflicts, Positive, Word, Words
from lora_cli.recipe.spec.task_section import (
    AnswerKind,
    TaskSection,
    Truncation,
    Usage,
    UsualTraining,
)

Pooling = Literal["mean", "cls", "last"]
EmbeddingLoss = Literal["in_batch_negatives", "cosent", "cosine"]
RowKind = Literal["pairs", "scored", "labelled"]

EMBEDDING = """\
inputs = tokenizer({text}, truncation=True, max_length={length}, return_tensors="pt")
with torch.no_grad():
    tokens = model(**inputs).last_hidden_state
print({pooled})"""
POOLED = {"mean": "tokens.mean(1)", "cls": "tokens[:, 0]", "last": "tokens[:, -1]"}


class TextEmbeddingSpec(TaskSection):
    """Turn texts into vectors, so that texts with similar meanings are close to each other."""

    peft_task_type = "FEATURE_EXTRACTION"
    pipeline_tag = "sentence-similarity"
    suitable_models = (
        "use an encoder such as MiniLM, BERT, MPNet or ModernBERT, or a decoder such as Llama or "
        "Qwen; one part of an encoder-decoder cannot be used alone"
    )
    usual_training = UsualTraining(
        longest=256, epochs=((1_000, 5), (10_000, 3), (math.inf, 1)), step=64,
        targets_note="all linear layers; a large step has many wrong answers to tell apart",
    )  # fmt: skip
    packing_hint = "leave it out; `train.group_by_length: true` saves padding here"

    type: Literal["text_embedding"]
    """The type of task."""

    anchor_column: Word = "anchor"
    """Column of the text that is searched with; the first text of scored pairs; with
    `label_column`, the only text."""

    positive_column: Word | None = None
    """Column of a text that is close to the anchor in meaning, such as the answer to a question;
    the second text of scored pairs. Default: `positive`."""

    negative_columns: Words | None = None
    """Columns of texts that resemble the anchor but are wrong answers (hard negatives). A cell may
    also be a list of texts, of any length."""

    score_column: Word | None = None
    """Column of a number that says how similar the two texts of a pair are, for scored pairs."""

    score_scale: Annotated[float, Field(gt=0)] = 1.0
    """The score of two texts with the same meaning, such as 5 if scores go from 0 to 5. Scores are
    divided by it."""

    label_column: Word | None = None
    """Column of a label, for rows with one text and its label. The positive of a text is another
    train text with the same label, drawn again in each epoch."""

    loss: EmbeddingLoss | None = None
    """`in_batch_negatives`: among all second texts of a step, the positive should be the closest to
    the anchor (InfoNCE; MultipleNegativesRankingLoss in sentence-transformers). All examples of a
    step are compared, however they are divided into micro-batches and processes. For scored pairs,
    `cosent` orders the pairs of a step by their scores, and `cosine` brings the cosine of each pair
    close to its score. Default: `in_batch_negatives`, or `cosent` for scored pairs."""

    temperature: Annotated[float, Field(gt=0)] = 0.05
    """Divides the cosines in `in_batch_negatives` and `cosent`: 0.05 equals the `scale=20` of
    sentence-transformers."""

    symmetric: bool = False
    """With `in_batch_negatives`: among all anchors of a step, the anchor should also be the closest
    to its positive. The loss is the mean of both directions."""

    pooling: Pooling | None = None
    """How the vectors of a text's tokens are combined into one: their `mean`, the first (`cls`) or
    the `last`. Default: what the base's `1_Pooling/config.json` says, or `mean` without one."""

    normalize: bool | None = None
    """Whether embeddings are scaled to length 1. Default: what the base's `modules.json` says, or
    yes without one. Training only compares directions, so this does not change it."""

    anchor_prompt: str | None = None
    """Text before every anchor, as E5 and other models were trained with: `"query: "`. Default:
    what the base's `config_sentence_transformers.json` says, or none without one."""

    positive_prompt: str | None = None
    """Text before every positive and negative, such as `"passage: "`. The default is found in the
    same way; for scored pairs and texts with labels it is `anchor_prompt`."""

    max_length: Positive = 256
    """Maximum length of a text in tokens, including its prompt. It never exceeds what the model
    supports; nor, unless the recipe has this key, what the base's `sentence_bert_config.json`
    says."""

    truncate: Truncation = "right"
    """What happens to a longer text: its end (`right`) or its beginning (`left`) is cut off, its
    row is left out (`drop`), or it is an error (`error`)."""

    split_special_tokens: bool = False
    """Whether a control token that is spelled out in a text, such as `</s>` or `[SEP]`, is read as
    ordinary characters instead of the token."""

    def conflicts(self) -> Conflicts:
        """Yield keys that exclude each other, or that have no effect."""
        if self.label_column is not None:
            for key in ("positive_column", "negative_columns", "score_column"):
                if getattr(self, key) is not None:
                    what = f"`label_column` and `{key}` exclude each other"
                    hint = "leave one out: with `label_column` the positive is a text of that label"
                    yield key, what, hint
        if self.score_column is not None and self.negative_columns is not None:
            what = "scored pairs have no negatives: the score says how near two texts are"
            yield "negative_columns", what, "leave `negative_columns` or `score_column` out"
        if self.score_column is None and self.score_scale != 1.0:
            what = "`score_scale` has no meaning without `score_column`"
            yield "score_scale", what, "name the column of the scores, or leave it out"
        is_scored = self.score_column is not None
        if self.loss is not None and (self.loss == "in_batch_negatives") == is_scored:
            rows = "scored pairs" if is_scored else "rows without scores"
            what = f"`loss: {self.loss}` has no meaning for {rows}"
            fitting = "`cosent` or `cosine`" if is_scored else "`in_batch_negatives`"
            yield "loss", what, f"use {fitting}, or leave it out"
        if self.symmetric and is_scored:
            what = "`symmetric` has no meaning for scored pairs"
            yield "symmetric", what, "leave it out"
        yield from self._column_conflicts()

    def _column_conflicts(self) -> Conflicts:
        columns = {"anchor_column": self.anchor_column}
        if self.label_column is None:
            columns["positive_column"] = self.second_column
        for i, name in enumerate(self.negative_columns or ()):
            columns[f"negative_columns.{i}"] = name
        for key in ("score_column", "label_column"):
            if (name := getattr(self, key)) is not None:
                columns[key] = name
        seen: dict[str, str] = {}
        for key, column in columns.items():
            if column in seen:
                what = f"`{column}` is named by `{seen[column]}` and by `{key}`"
                yield key.partition(".")[0], what, "name another column"
            seen.setdefault(column, key)

    @property
    def row_kind(self) -> RowKind:
        """What a row consists of: a pair, a pair with a score, or a text with a label."""
        if self.label_column is not None:
            return "labelled"
        return "pairs" if self.score_column is None else "scored"

    @property
    def second_column(self) -> str:
        """The column of the second text."""
        return self.positive_column or "positive"

    @property
    def loss_in_effect(self) -> EmbeddingLoss:
        """The loss that is used for training."""
        return self.loss or ("in_batch_negatives" if self.score_column is None else "cosent")

    @property
    def couples_examples(self) -> bool:
        """Whether the loss compares the examples of a step with each other."""
        return self.loss_in_effect != "cosine"

    @property
    def answer_kind(self) -> AnswerKind:
        """A label, a ranking of texts, or a similarity."""
        kinds: dict[RowKind, AnswerKind] = {
            "labelled": "single_label", "scored": "regression", "pairs": "retrieval",
        }  # fmt: skip
        return kinds[self.row_kind]

    @property
    def label_columns_by_key(self) -> dict[str, str]:
        """The column of the label, if there is one."""
        return {} if self.label_column is None else {"task.label_column": self.label_column}

    @property
    def input_columns_by_key(self) -> dict[str, str]:
        """The column of the anchor, and of the second text of scored pairs."""
        found = {"task.anchor_column": self.anchor_column}
        if self.row_kind == "scored":
            found["task.positive_column"] = self.second_column
        return found

    def usage(self, labels: list[str], settings: Any) -> Usage:
        """Return how to compute the vector of a text with the model."""
        pooled = POOLED[self.pooling or "mean"]
        if self.normalize is not False:
            pooled = f"torch.nn.functional.normalize({pooled}, dim=-1)"
        text = repr(f"{self.anchor_prompt or ''}Some text")
        code = EMBEDDING.format(text=text, length=self.max_length, pooled=pooled)
        return Usage("AutoModel", code, "import torch\n")
