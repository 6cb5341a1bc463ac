"""The rows of text embedding: columns, errors, labels and examples.

`TextEmbedding` adds batches, the loss and the answers. An example has the tokens of all texts of
its row in one list, and their lengths: the anchor comes first, then the positive, then negatives.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash

from lora_cli.characters import normalised
from lora_cli.data.cell_values import NumberForm, read_number
from lora_cli.data.file_formats import is_blank, text_error
from lora_cli.data.label_lists import texts_in_cell
from lora_cli.data.load_rows import Rows
from lora_cli.errors import LoraError, counted
from lora_cli.models.sentence_transformer import (
    ANCHOR_NAMES,
    POSITIVE_NAMES,
    EmbeddingFiles,
    make_lower_case,
    read_embedding_files,
)
from lora_cli.recipe import Recipe, TextEmbeddingSpec
from lora_cli.tasks.classification.labels import not_a_number, number
from lora_cli.tasks.examples import Example, Field
from lora_cli.tasks.texts.text_task import TRIAL_TEXT, TextTask
from lora_cli.tasks.texts.tokenize_long_texts import end_of_text, in_batches, token_ids


class EmbeddingRows(TextTask):
    """A task whose rows are texts that are compared with each other."""

    spec: TextEmbeddingSpec

    def __init__(self, recipe: Recipe, spec: TextEmbeddingSpec) -> None:
        super().__init__(recipe)
        self.spec = spec
        self.is_labelled = spec.row_kind == "labelled"
        self.pooling: str = spec.pooling or "mean"
        self.normalize = spec.normalize is not False
        self.anchor_prompt, self.positive_prompt = "", ""  # until the base's files are read
        self.base_max_length: int | None = None  # tokens, in the base's own files
        self.class_names: list[str] = []  # of a ClassLabel column of the Hub
        self._label_names: list[str] = []  # the labels, in order
        self.train_texts: dict[int, list[tuple[int, str]]] = {}  # by label: hash and text

    def load_processor(self) -> None:
        """Load the tokenizer, the configuration, and the base's settings for embeddings."""
        super().load_processor()
        name, at = self.recipe.model.name, self.recipe.at("model.name")
        if getattr(self.config, "is_encoder_decoder", False):
            what = f"`{name}` is an encoder-decoder ({self.config.model_type})"
            raise LoraError(what, at, self.spec.suitable_models)
        files, spec = read_embedding_files(self.recipe, self.spec.pooling), self.spec
        self._adopt_base_settings(files)
        self.pooling = files.pooling or "mean"
        choices = (spec.normalize, files.normalize)
        self.normalize = next((value for value in choices if value is not None), True)
        prompts = [spec.anchor_prompt, spec.positive_prompt]
        if prompts[0] is None:
            prompts[0] = files.prompt(*ANCHOR_NAMES)
        if prompts[1] is None:
            # only in pairs may the second text be of another kind than the anchor
            positive_prompt = files.prompt(*POSITIVE_NAMES)
            prompts[1] = positive_prompt if spec.row_kind == "pairs" else prompts[0]
        self.anchor_prompt, self.positive_prompt = (prompt or "" for prompt in prompts)
        if spec.truncate == "left" and (self.anchor_prompt or self.positive_prompt):
            what = "`truncate: left` would cut off the prompt, with which a text begins"
            hint = "take `truncate: right`, drop or error; or set the prompts to `''`"
            raise LoraError(what, self.recipe.at("task.truncate"), hint)
        self.learned.task |= {
            "pooling": self.pooling,
            "normalize": self.normalize,
            "anchor_prompt": self.anchor_prompt,
            "positive_prompt": self.positive_prompt,
        }

    def _adopt_base_settings(self, files: EmbeddingFiles) -> None:
        """Adopt the base's settings for reading texts: the maximum length, and lower case."""
        if files.lower_case:
            make_lower_case(self.tokenizer)
        self.base_max_length, file = files.max_length, "sentence_bert_config.json"
        if self.base_max_length is None:
            return
        if "max_length" not in self.spec.model_fields_set:
            self.learned.task["max_length"] = self.max_length
        elif self.max_length > self.base_max_length:
            self.notes.append(
                f"`task.max_length` is {self.max_length}, and the base's {file} cuts texts at "
                f"{counted(self.base_max_length, 'token')}: it was measured with shorter ones"
            )

    @property
    def max_length(self) -> int:  # type: ignore[override]
        """The recipe's `max_length`; if it has none, the base's own limit applies too."""
        limit = super().max_length
        if self.base_max_length is None or "max_length" in self.spec.model_fields_set:
            return limit
        return min(limit, self.base_max_length)

    @property
    def longer_hint(self) -> str:
        """A hint for texts that are too long."""
        if self.max_length < super().max_length:
            return (
                f"the base cuts texts there: `--set task.max_length={super().max_length}` does not"
            )
        return super().longer_hint

    def cache_key(self) -> list[str]:
        """Return everything that an encoded row depends on, besides the row itself."""
        return [*super().cache_key(), self.anchor_prompt, self.positive_prompt]

    # ------------------------------------------------------------------------------ columns

    def fields(self) -> list[Field]:
        """Return the columns of the anchor, and of its label or the texts it is compared with."""
        spec = self.spec
        found = [Field("task.anchor_column", spec.anchor_column, "input", "text")]
        if spec.label_column is not None:
            return [*found, Field("task.label_column", spec.label_column, "target", "label")]
        found.append(Field("task.positive_column", spec.second_column, "target", "text"))
        for i, column in enumerate(spec.negative_columns or ()):
            found.append(Field(f"task.negative_columns.{i}", column, "target", "text"))
        if spec.score_column is not None:
            found.append(Field("task.score_column", spec.score_column, "target", "number"))
        return found

    def compared_columns(self) -> list[str]:
        """Return the columns by which rows count as equal: both texts of a pair."""
        spec = self.spec
        return [spec.anchor_column] + ([] if self.is_labelled else [spec.second_column])

    def more_text_columns(self) -> list[str]:
        """Return the other columns whose texts the model reads."""
        if self.is_labelled:
            return []
        return [self.spec.second_column, *(self.spec.negative_columns or ())]

    def input_error(self, row: dict[str, Any]) -> str:
        """Return what is wrong with the anchor; empty if nothing is."""
        return text_error(row, [self.spec.anchor_column])

    def target_error(self, row: dict[str, Any]) -> str:
        """Return what is wrong with the other columns; empty if nothing is."""
        spec = self.spec
        if spec.label_column is not None:
            return text_error(row, [spec.label_column])
        if error := text_error(row, [spec.second_column]):
            return error
        if spec.score_column is not None:
            return self._score_error(row, spec.score_column)
        return self._negatives_error(row)

    def _negatives_error(self, row: dict[str, Any]) -> str:
        spec = self.spec
        for column in spec.negative_columns or ():
            value = row.get(column)
            if is_blank_cell(value):
                continue
            negatives = texts_in_cell(value)
            is_one = negatives == [value]
            for i, text in enumerate(negatives, 1):
                if error := text_error({column: text}, [column]):
                    return error if is_one else f"{error} in text {i} of its list"
        texts = self.texts_of(row)
        for text in texts[2:]:
            for name, other in (("positive", texts[1]), ("anchor", texts[0])):
                if text.strip() == other.strip():
                    return f"a negative is equal to the {name}"
        return ""

    def _score_error(self, row: dict[str, Any], column: str) -> str:
        score = self.score_of(row)
        if score is None:
            return not_a_number(column, row.get(column), self._number_form)
        if self.spec.loss_in_effect == "cosine" and abs(score) > 1:
            what = f"column `{column}` is {score * self.spec.score_scale:g}, and a cosine is "
            return what + "between -1 and 1: set `task.score_scale` to the highest score"
        return ""

    @property
    def _number_form(self) -> NumberForm:
        return NumberForm(*self.recipe.data.number_forms[0])

    def score_of(self, row: dict[str, Any]) -> float | None:
        """Return a pair's score divided by `score_scale`, or None if it is not a number."""
        value = row.get(self.spec.score_column or "")
        form = self._number_form
        found = read_number(value, form) if isinstance(value, str) else number(value)
        return None if found is None else found / self.spec.score_scale

    def texts_of(self, row: dict[str, Any]) -> list[str]:
        """Return the texts of a row: the anchor, the positive, and the negatives."""
        values = [row.get(self.spec.anchor_column)]
        if not self.is_labelled:
            values.append(row.get(self.spec.second_column))
            for column in self.spec.negative_columns or ():
                values += texts_in_cell(row.get(column))
        return [str(text) for text in values if not is_blank_cell(text)]

    # -------------------------------------------------------------------------------- labels

    def label_of(self, row: dict[str, Any]) -> str:
        """Return the name of a row's label."""
        value = row.get(self.spec.label_column or "")
        if isinstance(value, int) and 0 <= value < len(self.class_names):
            return self.class_names[value]
        return str(value).strip()

    def labels_of(self, row: dict[str, Any]) -> list[str] | None:
        """Return a row's label, if rows have one."""
        return [self.label_of(row)] if self.is_labelled else None

    @property
    def label_names(self) -> list[str]:
        """The labels that the rows have, in order."""
        return self._label_names

    def label_counts(self, rows: Rows) -> dict[str, int]:
        """Return how often each label occurs in the rows."""
        if not self.is_labelled:
            return {}
        counts = Counter(map(self.label_of, rows))
        return {name: counts[name] for name in self._label_names}

    def answer_of(self, row: dict[str, Any]) -> str | None:
        """Return a row's label or score as text, to find equal texts with different ones."""
        if self.spec.score_column is not None:
            return str(self.score_of(row))
        return super().answer_of(row)

    def learn_from(self, splits: dict[str, Rows]) -> None:
        """Learn the labels, and the train texts of each, from which positives are drawn.

        Raises:
            LoraError: If a label has only one train text, or if no train row has a negative.
        """
        for rows in splits.values():
            column = self.spec.label_column or ""
            self.class_names = rows.label_names.get(column, self.class_names)
        if self.is_labelled:
            found = {self.label_of(row) for rows in splits.values() for row in rows}
            self._label_names = sorted(found)
        if (train := splits.get("train")) is None:
            return
        if self.spec.negative_columns and not any(len(self.texts_of(row)) > 2 for row in train):
            named = " and ".join(f"`{name}`" for name in self.spec.negative_columns)
            what = f"no row of the train split has a negative in {named}"
            raise LoraError(what, train.source, "is it the right column? Else leave it out")
        if self.is_labelled:
            self._learn_texts(train)

    def _learn_texts(self, train: Rows) -> None:
        texts: dict[str, dict[int, str]] = defaultdict(dict)
        first_row: dict[str, int] = {}
        for i, row in enumerate(train):
            text, label = self.texts_of(row)[0], self.label_of(row)
            texts[label].setdefault(text_hash(text), text)
            first_row.setdefault(label, i)
        single = [label for label, texts_of_label in texts.items() if len(texts_of_label) < 2]
        if single:
            others = counted(len(single) - 1, "other label")
            more = f" (as {others})" if len(single) > 1 else ""
            what = f"the label `{single[0]}` has one text in train{more}: no other is its positive"
            hint = "leave such rows out, or join the label with another"
            raise LoraError(what, train.place(first_row[single[0]]), hint)
        self.train_texts = {
            label_hash(label): list(texts_of_label.items())
            for label, texts_of_label in sorted(texts.items())
        }

    # ------------------------------------------------------------------------------ examples

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[list[Example]]:
        """Return one example for each row, or none if the row is too long and dropped."""
        texts = [self.texts_of(row) for row in rows]
        prompted = [text for texts_of_row in texts for text in self.prompted(texts_of_row)]
        encoded, full_texts = self.token_lists(prompted), iter(prompted)
        lists = iter(encoded)
        return [
            self._example(
                row,
                texts_of_row,
                [next(lists) for _ in texts_of_row],
                [next(full_texts) for _ in texts_of_row],
            )
            for row, texts_of_row in zip(rows, texts, strict=True)
        ]

    def prompted(self, texts: Sequence[str]) -> list[str]:
        """Return the texts of a row with their prompts."""
        prompts = [self.anchor_prompt, *[self.positive_prompt] * (len(texts) - 1)]
        return [f"{prompt}{text}" for prompt, text in zip(prompts, texts, strict=True)]

    def _example(
        self, row: dict[str, Any], texts: list[str], ids: list[list[int]], full_texts: list[str]
    ) -> list[Example]:
        full = [
            self.full_length(tokens, text) for tokens, text in zip(ids, full_texts, strict=True)
        ]
        n_tokens, is_cut = max(full), any(a > len(b) for a, b in zip(full, ids, strict=True))
        if is_cut and self.spec.truncate == "error":
            what = f"a text has {counted(n_tokens, 'token')}, more than {self.max_length:,}"
            raise LoraError(what, hint="raise `task.max_length`, or set `task.truncate: right`")
        if is_cut and self.spec.truncate == "drop":
            return []
        example = {
            "input_ids": [token for tokens in ids for token in tokens],
            "lengths": [len(tokens) for tokens in ids],
            "texts": [text_hash(text) for text in texts],
            "label": label_hash(self.label_of(row)) if self.is_labelled else 0,
            "score": self.score_of(row) or 0.0,
        }
        return [{**example, "full_length": sum(full)} if is_cut else example]

    def full_length(self, ids: Sequence[int], text: str) -> int:
        """Return the number of tokens of a text before truncation."""
        if len(ids) < self.max_length:
            return len(ids)
        return len(token_ids(self.text_tokenizer, text))

    def token_lists(self, texts: Sequence[str], max_length: int | None = None) -> list[list[int]]:
        """Return the token ids of each text, truncated to `max_length`."""
        tokenizer, length = self.text_tokenizer, max_length or self.max_length
        keeps_end = self.spec.truncate == "left"
        tokenizer.truncation_side = "left" if keeps_end else "right"
        shortened = [end_of_text(tokenizer, text, length, keeps_end) for text in texts]
        token_ids_of_texts: list[list[int]] = []
        for part in in_batches([len(part) for part in shortened]):
            options = {"truncation": True, "max_length": length, "return_attention_mask": False}
            token_ids_of_texts += tokenizer(shortened[part], **options)["input_ids"]
        return token_ids_of_texts

    def features(self) -> dict[str, str]:
        """Return the type of each key of an example."""
        return {
            "input_ids": "list<int32>",
            "lengths": "list<int32>",
            "texts": "list<int64>",
            "label": "int64",
            "score": "float32",
        }

    @property
    def prepares(self) -> bool:
        """Whether `prepare` draws positives."""
        return self.is_labelled

    def prepare(self, example: Example, rng: np.random.Generator, training: bool) -> Example:
        """Draw the positive in training if rows have labels: another text of the same label."""
        if not (training and self.is_labelled):
            return example
        candidates = self.train_texts[int(example["label"])]
        anchor_hash = int(example["texts"][0])
        positive_hash, text = anchor_hash, ""
        while positive_hash == anchor_hash:
            positive_hash, text = candidates[int(rng.integers(len(candidates)))]
        (ids,) = self.token_lists([f"{self.positive_prompt}{text}"])
        return {
            **example,
            "input_ids": [*example["input_ids"], *ids],
            "lengths": [*example["lengths"], len(ids)],
            "texts": [anchor_hash, positive_hash],
        }

    def shown(self, example: Example, colour: bool) -> tuple[list[str], str]:
        """Return an encoded example for people to read: each text with its role."""
        names = ["anchor", "second" if self.spec.score_column else "positive"]
        lines, start = [], 0
        for i, length in enumerate(example["lengths"]):
            ids = example["input_ids"][start : start + length]
            name = names[i] if i < 2 else "negative"
            lines.append(f"{'text' if self.is_labelled else name}: {self.tokenizer.decode(ids)}")
            start += length
        facts = [f"score {example['score']:g}"] if self.spec.score_column else []
        return facts, "\n".join(lines)

    def shown_reference(self, row: dict[str, Any]) -> str | None:
        """Return the positive of a row for people to read."""
        texts = self.texts_of(row)
        return texts[1] if self.spec.row_kind == "pairs" and len(texts) > 1 else None

    def trial_examples(self, length: int) -> tuple[Example, Example]:
        """Return a short example and one of about `length` tokens, to try the model on."""
        texts = (TRIAL_TEXT[:13], TRIAL_TEXT * (1 + length // 10))
        short, long = (
            {"input_ids": ids, "lengths": [len(ids)], "texts": [0], "label": 0, "score": 0.0}
            for ids in self.token_lists(texts, length)
        )
        return {**short, "row": 0}, {**long, "row": 1}


def is_blank_cell(value: Any) -> bool:
    """Return whether a cell is empty, in a column that may be empty; lists are not."""
    return not isinstance(value, list | dict) and is_blank(value)


def text_hash(text: str) -> int:
    """Return a hash of a text, equal for texts that differ only in case, spaces and the like."""
    return _signed(normalised(text))


def label_hash(label: str) -> int:
    """Return a hash of a label, never 0, which means no label."""
    return _signed(label) or 1


def _signed(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "replace")) - (1 << 63)
