"""Classify a text or a pair of texts: one label, several labels, or a number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from lora_cli.data.file_formats import text_error
from lora_cli.data.unsupported_rows import several_answers
from lora_cli.errors import LoraError, Problem, counted
from lora_cli.recipe import Recipe, SequenceClassificationSpec
from lora_cli.tasks.classification.classification_task import Classification
from lora_cli.tasks.classification.labelled_text_proposals import propose_labelled
from lora_cli.tasks.examples import MAIN, Batch, Example, Field
from lora_cli.tasks.finite_scores import require_finite
from lora_cli.tasks.texts.text_task import TRIAL_TEXT, TextTask
from lora_cli.tasks.texts.tokenize_long_texts import end_of_text, in_batches, is_long, token_ids


class SequenceClassification(Classification, TextTask):
    """`task.type: sequence_classification`."""

    spec: SequenceClassificationSpec
    propose = staticmethod(propose_labelled)
    auto_class = AutoModelForSequenceClassification
    can_share_rows = True

    def __init__(self, recipe: Recipe, spec: SequenceClassificationSpec) -> None:
        super().__init__(recipe, spec)
        self.spec = spec

    # ------------------------------------------------------------------------------ rows

    def fields(self) -> list[Field]:
        """Return the columns of the text, the second text, and the label or labels."""
        spec = self.spec
        texts = {
            "task.text_column": spec.text_column,
            "task.text_pair_column": spec.text_pair_column,
        }
        found = [Field(key, column, "input", "text") for key, column in texts.items() if column]
        return found + self.label_fields()

    def input_error(self, row: dict[str, Any]) -> str:
        """Return what is wrong with the texts; empty if nothing is."""
        return text_error(row, filter(None, (self.spec.text_column, self.spec.text_pair_column)))

    def unsupported(self, row: dict[str, Any]) -> tuple[str, str] | None:
        """Return an error and a hint if the label is a list: answers to be ranked, or scores."""
        columns = self.spec.label_columns
        return None if columns else several_answers(row, self.spec.label_column)

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[list[Example]]:
        """Return one example for each row; none for one that is too long, with `truncate: drop`."""
        return [
            self._example(row, inputs)
            for row, inputs in zip(rows, self.encode_inputs(rows), strict=True)
        ]

    def _example(self, row: dict[str, Any], inputs: Example) -> list[Example]:
        full = self._full_length(row, inputs)
        if full and self.spec.truncate == "error":
            hint = "raise `task.max_length`, or cut such texts: `task.truncate: right`, or left"
            raise LoraError(self._too_long(full["full_length"]), hint=hint)
        if full and self.spec.truncate == "drop":
            return []
        return [{**inputs, "labels": self.label_of(row), **full}]

    def _too_long(self, length: int) -> str:
        return f"the row has {counted(length, 'token')}, more than {self.max_length:,}"

    def answer_error(self, row: dict[str, Any]) -> str:
        """Return why a row cannot be answered; empty if it can."""
        problem = self.answer_problem(row)
        return problem.what if problem else ""

    def answer_problem(self, row: dict[str, Any]) -> Problem | None:
        """Return why a row cannot be answered, with a hint; None if it can."""
        if reason := super().answer_error(row):
            return Problem(reason, hint=self.answer_hint)
        try:
            (inputs,) = self.encode_inputs([row])
            self.require_known_tokens(inputs["input_ids"])
        except LoraError as error:
            return error.problems[0]
        full = None if self.spec.truncate in ("right", "left") else self._full_length(row, inputs)
        if not full:
            return None
        hint = "shorten it, or cut its beginning: `--set task.truncate=left`"
        return Problem(self._too_long(full["full_length"]), hint=hint)

    def _full_length(self, row: dict[str, Any], inputs: Example) -> dict[str, int]:
        """Return the number of tokens of a row before it was cut; empty if it was not."""
        if len(inputs["input_ids"]) < self.max_length:
            return {}
        texts = [str(row[column]) for column in self.input_columns().values()]
        tokenizer = self.text_tokenizer
        if any(map(is_long, texts)):
            full = sum(len(token_ids(tokenizer, text, special=False)) for text in texts)
            full += tokenizer.num_special_tokens_to_add(pair=len(texts) > 1)
        else:
            full = len(tokenizer(*texts, verbose=False)["input_ids"])
        return {"full_length": full} if full > self.max_length else {}

    def encode_inputs(self, rows: Sequence[dict[str, Any]]) -> list[Example]:
        """Return the model's inputs for rows.

        Encoder-decoders classify a text at its last end-of-text token, and need the same number of
        these in every row.

        Raises:
            LoraError: If a text contains an end-of-text token, or the tokenizer adds none.
        """
        encoded = self._encode_texts(rows)
        end = getattr(self.config, "eos_token_id", None)  # Funnel's has none
        if not self.config.is_encoder_decoder or not isinstance(end, int):
            return encoded
        n_ends = self._count_end_tokens(end)
        if any(example["input_ids"].count(end) != n_ends for example in encoded):
            token = self.tokenizer.convert_ids_to_tokens(end)
            raise LoraError(
                f"the text holds `{token}`, by which this model finds the end of a text",
                hint=f"write `{token}` otherwise in the text, or leave the row out",
            )
        return encoded

    def _count_end_tokens(self, end: int) -> int:
        """Return how many end-of-text tokens the tokenizer adds to an ordinary text."""
        row = dict.fromkeys(self.input_columns().values(), TRIAL_TEXT)
        count = int(self._encode_texts([row])[0]["input_ids"].count(end))
        if not count:
            token = self.tokenizer.convert_ids_to_tokens(end)
            raise LoraError(
                f"the tokenizer does not end a text with `{token}`, and this model answers there",
                self.recipe.at("model.name"),
                "copy the model's own tokenizer into its folder",
            )
        return count

    def _encode_texts(
        self, rows: Sequence[dict[str, Any]], max_length: int | None = None
    ) -> list[Example]:
        tokenizer = self.text_tokenizer
        tokenizer.truncation_side = "left" if self.spec.truncate == "left" else "right"
        length = max_length or self.max_length
        columns = [self.spec.text_column, *filter(None, [self.spec.text_pair_column])]
        texts = [self._shorten_texts([str(row[c]) for c in columns], length) for row in rows]
        examples: list[Example] = []
        for part in in_batches([sum(map(len, row)) for row in texts]):
            encoding = tokenizer(
                *(list(column) for column in zip(*texts[part], strict=True)),
                truncation=True,
                max_length=length,
                return_attention_mask=False,
            )
            keys = [key for key in encoding if key == "input_ids" or key in self.features()]
            values = (encoding[key] for key in keys)
            examples += [dict(zip(keys, v, strict=True)) for v in zip(*values, strict=True)]
        return examples

    def _shorten_texts(self, texts: list[str], max_length: int) -> list[str]:
        """Return a row's texts without most of what truncation would remove.

        Tokenizers also return what they cut off; for a pair, each part of one text with each part
        of the other, which needs much memory. In a pair, the longer text is truncated first, so it
        has to remain the longer one.
        """
        tokenizer, keeps_end = self.text_tokenizer, self.spec.truncate == "left"
        shortened = [end_of_text(tokenizer, text, max_length, keeps_end) for text in texts]
        if len(texts) > 1 and shortened != texts:
            full_lengths, shortened_lengths = (
                [len(token_ids(tokenizer, text, special=False)) for text in versions]
                for versions in (texts, shortened)
            )
            if full_lengths[0] == full_lengths[1]:
                return texts
            longer = int(full_lengths[1] > full_lengths[0])
            if shortened_lengths[longer] <= shortened_lengths[1 - longer]:
                max_tokens = shortened_lengths[1 - longer] + 1
                shortened[longer] = end_of_text(tokenizer, texts[longer], max_tokens, keeps_end)
        return shortened

    def features(self) -> dict[str, str]:
        """Return the type of each key of an example."""
        # some tokenizers return segments for models that have no embedding for them
        embedded = getattr(self.config, "type_vocab_size", 0) > 1
        segments = embedded and "token_type_ids" in self.tokenizer.model_input_names
        return {
            "input_ids": "list<int32>",
            "labels": self.label_feature,
            **({"token_type_ids": "list<int8>"} if segments else {}),
        }

    # ----------------------------------------------------------------------------- model

    def adjust_config(self, model: nn.Module) -> None:
        """Set the padding token, from which decoders find the last token of a text."""
        assert isinstance(model, PreTrainedModel)
        for config in (model.config, model.config.get_text_config()):
            config.pad_token_id = self._pad

    def _pad_id(self) -> int:
        """Return the id of the padding token."""
        name = self.spec.pad_token or self.tokenizer.pad_token or self.tokenizer.eos_token
        token = self.tokenizer.convert_tokens_to_ids(name) if name else None
        if token is None or (
            token == self.tokenizer.unk_token_id and name != self.tokenizer.unk_token
        ):
            raise LoraError(
                f"the tokenizer has no token `{name}`" if name else "the tokenizer has no padding",
                self.recipe.at("task.pad_token"),
                "name a token of its vocabulary that does not occur in the texts",
            )
        self.require_known_tokens([int(token)])
        return int(token)

    def trial_examples(self, length: int) -> tuple[Example, Example]:
        """Return a short example and one of about `length` tokens, to try the model on."""
        columns = self.input_columns().values()
        texts = (TRIAL_TEXT[:13], TRIAL_TEXT * (1 + length // 10))
        short, long = (
            {
                **self._encode_texts([dict.fromkeys(columns, text)], length)[0],
                "labels": self.trial_label,
            }
            for text in texts
        )
        return {**short, "row": 0}, {**long, "row": 0}

    # --------------------------------------------------------------------------- batches

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Return the examples as a batch. Its items are rows, or the weights of their labels."""
        inputs = self.input_tensors(examples)
        labels, items = self.labels_and_items(examples)
        n_tokens = sum(len(example["input_ids"]) for example in examples)
        rows = [example["row"] for example in examples]
        return Batch(inputs, {"labels": labels}, {MAIN: items}, n_tokens, rows)

    def input_tensors(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Return the examples as tensors for the model."""
        keys = [key for key in ("input_ids", "token_type_ids") if key in examples[0]]
        texts: dict[str, Any] = {key: [example[key] for example in examples] for key in keys}
        return self.inputs_of(texts, {"input_ids": self._pad, "token_type_ids": 0})

    @property
    def _pad(self) -> int:
        if not hasattr(self, "_pad_token_id"):
            self._pad_token_id = self._pad_id()
        return self._pad_token_id

    def answer(self, model: nn.Module, rows: Sequence[dict[str, Any]]) -> list[list[Any]]:
        """Return the prediction and the probabilities of each row."""
        device = next(model.parameters()).device
        inputs = self.input_tensors(self._encode_texts(rows))
        moved = {key: value.to(device) for key, value in inputs.items()}
        logits = self.logits(model, moved).float()
        require_finite(logits, model, self.recipe)
        return self.answers_of(logits)
