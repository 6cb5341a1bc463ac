"""Finds entities of several types: among the words of a row, or as spans of a text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name for it
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification, PretrainedConfig

from lora_cli.data.entity_tags import Entity, entities_of, iob2_tags
from lora_cli.data.load_rows import Rows
from lora_cli.errors import LoraError, Problem
from lora_cli.models.base_model import load_config
from lora_cli.recipe import Recipe, TokenClassificationSpec
from lora_cli.tasks.classification.entity_proposals import propose_entities
from lora_cli.tasks.classification.entity_rows import EntityRows, RowText, spans_in_words
from lora_cli.tasks.classification.head_rows import arrange_rows, rows_of_heads
from lora_cli.tasks.examples import IGNORED, MAIN, Batch, Example, Field, Prediction
from lora_cli.tasks.finite_scores import require_finite
from lora_cli.tasks.texts.padding import RIGHT, fill
from lora_cli.tasks.texts.text_task import TRIAL_TEXT, TextTask
from lora_cli.tasks.texts.tokenize_long_texts import token_ids
from lora_cli.tasks.texts.word_windows import (
    Words,
    complete_tags,
    places_of_tokens,
    special_tokens_of,
    windows_of,
    words_in,
    words_one_by_one,
    words_without_token,
)

MAX_WITHOUT_TOKEN = 0.02  # the share of words without a token above which there is a warning
TaggedWord = tuple[
    int, str, float
]  # a word's position in its row, its tag, and the tag's probability


class TokenClassification(TextTask):
    """`task.type: token_classification`."""

    spec: TokenClassificationSpec
    propose = staticmethod(propose_entities)
    auto_class = AutoModelForTokenClassification
    can_share_rows = True
    answers_tokens = True
    has_head = True
    metric_channel = "tags"
    default_metrics = ("seqeval",)
    loss_definition = "mean cross-entropy per word, at its first token, in nats"
    joins_examples = True

    def __init__(self, recipe: Recipe, spec: TokenClassificationSpec) -> None:
        super().__init__(recipe)
        self.spec = spec
        self.reader = EntityRows(recipe, spec)

    def load_processor(self) -> None:
        """Load the tokenizer, and find the special tokens that it adds to a text.

        Raises:
            LoraError: If it does not return the positions of tokens in the text, which spans need,
                or if it encodes a text differently with special tokens.
        """
        super().load_processor()
        if self.spec.has_spans and not self.tokenizer.is_fast:
            what = "the tokenizer does not say where its tokens stand in a text, as spans need"
            hint = "use a model with a tokenizer.json, or rows of words with tags"
            raise LoraError(what, self.recipe.at("model.name"), hint)
        added = special_tokens_of(self.tokenizer, TRIAL_TEXT)
        if added is None:
            what = "the tokenizer reads a text in another way when it adds its special tokens"
            raise LoraError(what, self.recipe.at("model.name"), "use another base model")
        self._added = added

    @property
    def _capacity(self) -> int:
        """The number of a row's tokens that fit into a window."""
        room = self.max_length - len(self._added.prefix) - len(self._added.suffix)
        if room < 1:
            what = f"`max_length: {self.max_length}` leaves no room for a word"
            raise LoraError(what, self.recipe.at("task.max_length"), self.longer_hint)
        return room

    # ------------------------------------------------------------------------------ rows

    def fields(self) -> list[Field]:
        """Return the columns of words and tags, or of a text and its spans."""
        spec = self.spec
        if spec.text_column is not None and spec.spans_column is not None:
            return [
                Field("task.text_column", spec.text_column, "input", "text"),
                Field("task.spans_column", spec.spans_column, "target", "tags"),
            ]
        return [
            Field("task.tokens_column", spec.tokens_column, "input", "text"),
            Field("task.tags_column", spec.tags_column, "target", "tags"),
        ]

    @property
    def knows_labels(self) -> bool:
        """Whether the labels are known."""
        return bool(self.labels)

    @property
    def labels(self) -> list[str]:
        """The tags in IOB2, in the order of the model's outputs."""
        return self.reader.labels

    @property
    def label_names(self) -> list[str]:
        """The types of entities."""
        return self.reader.types

    def labels_of(self, row: dict[str, Any]) -> list[str]:
        """Return the distinct types of a row's entities."""
        return self.reader.types_in(row)

    def answer_of(self, row: dict[str, Any]) -> str:
        """Return the entities of a row as text, to compare rows of the same text."""
        if self.spec.has_spans:
            spans = self.reader.spans(row)
            text = str(row[str(self.spec.text_column)])
            # without their positions, since texts that differ in spaces or case count as equal
            found = [] if isinstance(spans, str) else spans
            named = [f"{text[s.start : s.end].casefold()} ({s.label})" for s in found]
        else:
            named = [
                f"word {e.start + 1} ({e.label})"
                if e.end == e.start + 1
                else f"words {e.start + 1} to {e.end} ({e.label})"
                for e in self.reader.entities(row)
            ]
        return ", ".join(named) or "without entities"

    def label_counts(self, rows: Rows) -> dict[str, int]:
        """Return how many rows have an entity of each type."""
        counts = Counter(kind for row in rows for kind in self.reader.types_in(row))
        return {kind: counts[kind] for kind in self.reader.types}

    def learn_form(self, splits: dict[str, Rows]) -> None:
        """Find the scheme of the tags, such as IOB2."""
        self.reader.learn_form(splits)
        if self.reader.knows_scheme:
            self.learned.task["scheme"] = self.reader.scheme

    def learn_from(self, splits: dict[str, Rows]) -> None:
        """Find the types of entities, and from them the labels."""
        self.reader.learn(splits)
        self.learned.task["labels"] = list(self.labels)

    def input_error(self, row: dict[str, Any]) -> str:
        """Return what is wrong with the words or the text; empty if nothing is."""
        return self.reader.input_error(row)

    def target_error(self, row: dict[str, Any]) -> str:
        """Return what is wrong with the tags or the spans; empty if nothing is."""
        return self.reader.target_error(row)

    def skip_reason(self, row: dict[str, Any], split: str) -> str:
        """Return why a row from Prodigy is skipped: its annotation was rejected or ignored."""
        answer = row.get("answer")
        put_aside = self.spec.has_spans and "_task_hash" in row and answer in ("reject", "ignore")
        return f"its annotation is marked `{answer}`" if put_aside else ""

    def label_problem(self, row: dict[str, Any], place: str) -> Problem | None:
        """Return an error if a streamed row has a type that is not among the labels."""
        return self.reader.label_problem(row, place)

    def shown_input(self, row: dict[str, Any]) -> str:
        """Return the text of a row, to which the positions of its predictions refer."""
        return self._text_of(row).shown

    def _text_of(self, row: dict[str, Any]) -> RowText:
        """Return the text of a row and the positions of its words."""
        if not self.spec.has_spans:
            return self.reader.text(row)
        text = str(row[str(self.spec.text_column)])
        places = places_of_tokens(self.text_tokenizer, text)
        return RowText(text, places, text, places)

    def _tags_of(self, row: dict[str, Any], text: RowText) -> list[str]:
        """Return the tags of a row's words in IOB2."""
        return iob2_tags(self._entities_of(row, text), len(text.places))

    def _entities_of(self, row: dict[str, Any], text: RowText) -> list[Entity]:
        if not self.spec.has_spans:
            return self.reader.entities(row)
        spans = self.reader.spans(row)
        assert not isinstance(spans, str), spans
        return spans_in_words(spans, text.places, text.text)

    # -------------------------------------------------------------------------- examples

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[list[Example]]:
        """Return an example for each window of a row; most rows have one."""
        return [self._examples(row, has_tags=True) for row in rows]

    def _examples(self, row: dict[str, Any], has_tags: bool) -> list[Example]:
        text = self._text_of(row)
        positions = {label: i for i, label in enumerate(self.labels)}
        tags = [positions[t] for t in self._tags_of(row, text)] if has_tags else []
        words = self._tokenised(text)
        prefix, suffix = self._added.prefix, self._added.suffix
        examples = []
        for window in windows_of(words, self._capacity):
            ids = [*prefix, *words.ids[window.start : window.end], *suffix]
            if not ids:
                continue
            labels, at = [IGNORED] * len(ids), [IGNORED] * len(ids)
            for word in window.words:
                token = len(prefix) + words.first[word] - window.start
                at[token] = word
                labels[token] = tags[word] if has_tags else IGNORED
            example = {"input_ids": ids, "labels": labels, "words": at}
            full = len(words.ids) + len(prefix) + len(suffix)
            examples.append({**example, "n_words": len(words.first), "full_length": full})
        return examples

    def _tokenised(self, text: RowText) -> Words:
        tokenizer = self.text_tokenizer
        if tokenizer.is_fast:
            return words_in(tokenizer, text.text, text.places)
        return words_one_by_one(tokenizer, [text.text[start:end] for start, end in text.places])

    def features(self) -> dict[str, str]:
        """Return the type of each key of an example."""
        return dict.fromkeys(("input_ids", "labels", "words"), "list<int32>") | {"n_words": "int32"}

    def trial_examples(self, length: int) -> tuple[Example, Example]:
        """Return a short example and one of about `length` tokens, to try the model on."""
        ids = token_ids(self.tokenizer, TRIAL_TEXT * length, special=False)
        room = max(1, min(length, self.max_length) - self.max_length + self._capacity)
        short, long = (self._trial(ids[:count]) for count in (min(5, room), room))
        return short, long

    def _trial(self, ids: list[int]) -> Example:
        ids = [*self._added.prefix, *ids, *self._added.suffix]
        labels = [IGNORED] * len(ids)
        return {"input_ids": ids, "labels": labels, "words": labels, "row": 0}

    def shown(self, example: Example, colour: bool) -> tuple[list[str], str]:
        """Return an encoded example for people to read: its tokens, with the tags of words."""
        tokens = self.tokenizer.convert_ids_to_tokens(example["input_ids"])
        opening, closing = ("\x1b[32m", "\x1b[0m") if colour else ("", "")
        shown = [
            token if label == IGNORED else f"{token}{opening}/{self.labels[label]}{closing}"
            for token, label in zip(tokens, example["labels"], strict=True)
        ]
        return [], " ".join(map(str, shown))

    def trained_share(self, split: Any) -> float:
        """Return the share of tokens that are trained: the first one of each word."""
        trained = sum(
            int((labels.flatten().to_numpy(zero_copy_only=False) != IGNORED).sum())
            for labels in split.examples.data.column("labels").chunks
        )
        return trained / int(split.lengths.sum())

    def unknown_input(self, name: str, rows: Rows, examples: Any) -> tuple[float, str | None]:
        """Return the share of unknown tokens, and a warning about words without a token."""
        share, warning = super().unknown_input(name, rows, examples)
        if warning is not None or not len(examples):
            return share, warning
        missing, total = words_without_token(examples)
        count = int(missing.sum())
        if count <= MAX_WITHOUT_TOKEN * total:
            return share, None
        place = rows.place(int(np.flatnonzero(missing)[0]))
        return share, (
            f"{count:,} of {total:,} words of {name} have no token of their own, so that they are "
            f"not learned, the first at {place}: the tokenizer joins them with the word before, or "
            "drops them; see `task.word_separator`"
        )

    # ----------------------------------------------------------------------------- model

    def model_config(self) -> PretrainedConfig:
        """Return the model's configuration, with the names of the labels."""
        if not self.labels:  # unknown in `lora validate`, which needs the names of modules alone
            return load_config(self.recipe)
        return load_config(
            self.recipe,
            num_labels=len(self.labels),
            id2label=dict(enumerate(self.labels)),
            label2id={label: i for i, label in enumerate(self.labels)},
        )

    def arrange_head(self, model: nn.Module, missing: set[str]) -> None:
        """Arrange the rows of a pretrained classifier by the names of the labels."""
        config = (self.config, self.recipe, self.auto_class)
        if note := arrange_rows(model, missing, self.labels, *config):
            self.notes.append(note)

    def complete_from(self, tensors: Mapping[str, Tensor]) -> None:
        """Find the labels for an adapter from another tool, by the number of outputs of its head.

        The labels are those of the base if there are as many, or if the adapter has no head.
        """
        heads = rows_of_heads(tensors, self.empty_model()[1])
        known: dict[int, str] = load_config(self.recipe).id2label
        names = [known[i] for i in sorted(known)]
        count = min(heads) if heads else len(names)
        if len(names) != count:
            names = [f"LABEL_{i}" for i in range(count)]
        self.learned.task["labels"] = names

    # --------------------------------------------------------------------------- batches

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Return the examples padded to the longest. The items of the batch are words."""
        ids, labels, words = ([e[k] for e in examples] for k in ("input_ids", "labels", "words"))
        shared = (
            self.first_position is not None
        )  # each text then has a row of its own in the targets
        options = (self.pad_multiple, RIGHT if shared else self.padding)
        targets = {
            "labels": fill(labels, IGNORED, *options),
            "words": fill(words, IGNORED, *options),
        }
        items = (targets["labels"] != IGNORED).sum(1).float()
        n_tokens = sum(len(sequence) for sequence in ids)
        return Batch(
            self._inputs(ids), targets, {MAIN: items}, n_tokens, [e["row"] for e in examples]
        )

    def _inputs(self, ids: list[list[int]]) -> dict[str, Tensor]:
        token = self.own_padding
        token = self.tokenizer.eos_token_id if token is None else token
        padding = 0 if token is None else int(token)  # any id will do, as it is masked
        return self.inputs_of({"input_ids": ids}, {"input_ids": padding})

    def losses(self, model: nn.Module, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return the cross-entropy of each example (B,), summed over its words."""
        labels = batch.targets["labels"]
        losses = F.cross_entropy(
            output.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        )
        return {MAIN: losses.sum(1)}

    def predictions(self, model: nn.Module, output: Tensor, batch: Batch) -> list[Prediction]:
        """Return the tags of the words of each window, from which `join` finds the entities."""
        return [
            Prediction(row, tagged_words, None)
            for row, tagged_words in zip(
                batch.rows, self._tag_words(output, batch.targets["words"]), strict=True
            )
        ]

    def _tag_words(self, logits: Tensor, words: Tensor) -> list[list[TaggedWord]]:
        """Return the tag of each word of each window, for logits (B, T, C) and words (B, T)."""
        probabilities, label_ids = torch.softmax(logits.float(), -1).max(-1)
        rows = zip(words.tolist(), label_ids.tolist(), probabilities.tolist(), strict=True)
        return [
            [
                (word, self.labels[label], p)
                for word, label, p in zip(*row, strict=True)
                if word >= 0
            ]
            for row in rows
        ]

    def join(self, row: dict[str, Any], parts: Sequence[Prediction]) -> Prediction:
        """Return the entities of a row, from the tags of its windows."""
        text = self._text_of(row)
        tagged_words = [word for part in parts for word in part.prediction]
        tags, entities = self._answer(text, tagged_words)
        true_entities = self._entities_of(row, text)
        reference = [self._span_of(text, entity) for entity in true_entities]
        inputs: dict[str, tuple[Any, Any]] = {
            self.metric_channel: (tags, iob2_tags(true_entities, len(text.places)))
        }
        return Prediction(parts[0].row, entities, reference, None, inputs)

    def _answer(
        self, text: RowText, tagged_words: Sequence[TaggedWord]
    ) -> tuple[list[str], list[dict[str, Any]]]:
        """Return the tags of all words of a row, and its entities as spans of the text.

        The score of an entity is the mean probability of the tags of its words.
        """
        predicted: list[str | None] = [None] * len(text.places)
        probabilities: list[float | None] = [None] * len(text.places)
        for word, tag, p in tagged_words:
            assert predicted[word] is None, "each word is predicted once"
            predicted[word], probabilities[word] = tag, p
        tags = complete_tags(predicted)
        entities = []
        for entity in entities_of(tags):
            of_entity = [p for p in probabilities[entity.start : entity.end] if p is not None]
            score = round(sum(of_entity) / len(of_entity), 6)
            entities.append({**self._span_of(text, entity), "score": score})
        return tags, entities

    @staticmethod
    def _span_of(text: RowText, entity: Entity) -> dict[str, Any]:
        start, end = text.shown_places[entity.start][0], text.shown_places[entity.end - 1][1]
        return {"start": start, "end": end, "label": entity.label, "text": text.shown[start:end]}

    # --------------------------------------------------------------------------- answers

    def answer_error(self, row: dict[str, Any]) -> str:
        """Return why a row cannot be answered; empty if it can. A text may replace its words."""
        return self.reader.input_error(row, may_be_typed=True)

    def answer_columns(self) -> dict[str, str]:
        """Return the column `prediction`: a list of entities, as JSON in tables."""
        return {"prediction": "string"}

    def answer(self, model: nn.Module, rows: Sequence[dict[str, Any]]) -> list[list[Any]]:
        """Return the entities of each row."""
        device = next(model.parameters()).device
        windows = [
            {**example, "row": i}
            for i, row in enumerate(rows)
            for example in self._examples(row, has_tags=False)
        ]
        tagged_words: list[list[TaggedWord]] = [[] for _ in rows]
        size = max(1, len(rows))  # a long row has many windows
        for start in range(0, len(windows), size):
            batch = self.collate(windows[start : start + size]).to(device)
            logits = self.logits(model, batch.inputs).float()
            require_finite(logits, model, self.recipe)
            for row, words in zip(
                batch.rows, self._tag_words(logits, batch.targets["words"]), strict=True
            ):
                tagged_words[row] += words
        return [
            [self._answer(self._text_of(row), words)[1]]
            for row, words in zip(rows, tagged_words, strict=True)
        ]

    def answer_line(self, values: Sequence[Any]) -> str:
        """Return the entities of a typed text as JSON."""
        return json.dumps(values[0], ensure_ascii=False)
