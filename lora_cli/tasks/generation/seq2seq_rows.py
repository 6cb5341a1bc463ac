"""What a source and its targets are: columns, lengths, examples.

`Seq2SeqLM` adds batches, the loss and the answers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from lora_cli.data.file_formats import text_error
from lora_cli.data.load_rows import Rows
from lora_cli.data.row_texts import readable_value
from lora_cli.errors import LoraError, counted
from lora_cli.recipe import Recipe, Seq2SeqLMSpec
from lora_cli.tasks.examples import Encoded, Example, Field
from lora_cli.tasks.generation.seq2seq_texts import Side, SourcesAndTargets
from lora_cli.tasks.generation.writing_task import WritingTask, keep_all_layers, layer_drop_of
from lora_cli.tasks.texts.marked_tokens import marked
from lora_cli.tasks.texts.unknown_tokens import MOST_UNKNOWN, count_unknown, unknown_warning

SIDES: tuple[Side, Side] = ("source", "target")
CUT = {"source": 1, "target": 2}  # bits of an example's `cut`
# their weights were trained in bfloat16, and make numbers that float16 cannot hold
OVERFLOW_IN_FP16 = ("longt5", "mt5", "switch_transformers", "t5", "umt5")


class SourceAndTargetTask(WritingTask):
    """A task whose rows are a source, and one or several targets."""

    spec: Seq2SeqLMSpec  # type: ignore[assignment]  # its lengths are two
    length_key = "task.max_source_length"
    prompt_name = "source"

    def __init__(self, recipe: Recipe, spec: Seq2SeqLMSpec) -> None:
        super().__init__(recipe)
        self.spec = spec
        self.has_several = False  # references of a row

    def load_processor(self) -> None:
        """Load the tokenizer and the configuration."""
        super().load_processor()
        at, name = self.recipe.at("model.name"), self.recipe.model.name
        if not getattr(self.config, "is_encoder_decoder", False):
            what = f"`{name}` is no encoder-decoder ({self.config.model_type})"
            raise LoraError(what, at, self.spec.suitable_models)
        if self.tokenizer.eos_token_id is None:
            what = "the tokenizer has no end-of-text token"
            raise LoraError(what, at, "name it as `eos_token` in the model's tokenizer_config.json")
        pad = self.tokenizer.pad_token_id
        self.pad = int(self.tokenizer.eos_token_id if pad is None else pad)
        half = self.recipe.train.precision == "fp16" or self.recipe.model.dtype == "float16"
        if half and self.config.model_type in OVERFLOW_IN_FP16:
            self.notes.append(
                f"models like {self.config.model_type} were trained in bfloat16, and often make "
                "NaN in float16: better take `train.precision: bf16`, or fp32"
            )
        if dropped := layer_drop_of(self.config):
            self.notes.append(dropped)

    def model_config(self) -> PretrainedConfig:
        """Return the model's configuration, by which no layer is skipped at random."""
        return keep_all_layers(super().model_config())

    @functools.cached_property
    def texts(self) -> SourcesAndTargets:
        """What reads sources and targets.

        Raises:
            LoraError: If the recipe's languages are not those of the tokenizer.
        """
        start = getattr(self.config, "decoder_start_token_id", None)
        limits: dict[Side, int] = {side: self.limit(side) for side in SIDES}
        try:
            return SourcesAndTargets(self.spec, self.tokenizer, self.text_tokenizer, limits, start)
        except LoraError as error:
            problem = error.problems[0]
            raise LoraError(problem.what, self.recipe.at(problem.at or ""), problem.hint) from error

    def positions_of(self, side: Side) -> int | None:
        """Return the tokens that the encoder, or the decoder, has positions for, if limited."""
        key = "encoder" if side == "source" else "decoder"  # LED's are two
        own = getattr(self.config, f"max_{key}_position_embeddings", None)
        return int(own) if isinstance(own, int) else self.positions

    def limit(self, side: Side) -> int:
        """Return the longest source or target in tokens, as far as the model can take it."""
        key = f"max_{side}_length"
        limits = [int(getattr(self.spec, key))]
        positions = self.positions_of(side)
        if positions is not None:
            limits.append(positions)
        if positions is not None or key not in self.spec.model_fields_set:
            # T5 takes more than its tokenizer expects, if the recipe says so
            limits.append(int(self.tokenizer.model_max_length))
        return min(limits)

    @property
    def max_length(self) -> int:  # type: ignore[override]
        """The longest source and the longest target together."""
        return sum(map(self.limit, SIDES))

    @property
    def length_note(self) -> str | None:
        """What to say of lengths that are more than the model can take."""
        asked = {side: int(getattr(self.spec, f"max_{side}_length")) for side in SIDES}
        notes = [
            f"`task.max_{side}_length` is {length}, and the model takes "
            f"{counted(self.limit(side), 'token')}"
            for side, length in asked.items()
            if self.limit(side) < length and f"max_{side}_length" in self.spec.model_fields_set
        ]
        return f"warning: {'; '.join(notes)}: longer texts are cut there" if notes else None

    @property
    def length_limit(self) -> str:
        """The limits in words."""
        source, target = self.limit("source"), self.limit("target")
        return f"{counted(source, 'token')} of the source and {target:,} of the target"

    @property
    def length_name(self) -> str:
        """The limits, to stand in a table."""
        return " + ".join(str(self.limit(side)) for side in SIDES)

    @property
    def longer_hint(self) -> str:
        """What to do where texts are too long."""
        return "raise `task.max_source_length` or `task.max_target_length`, if the model takes more"

    def cache_key(self) -> list[str]:
        """Return what an encoded row depends on besides the row."""
        return [*super().cache_key(), str(self.texts.target_frame)]

    # ------------------------------------------------------------------------------ rows

    def fields(self) -> list[Field]:
        """Return the columns of the source and of the target."""
        return [
            Field("task.source_column", self.spec.source_column, "input", "text"),
            Field("task.target_column", self.spec.target_column, "target", "text"),
        ]

    def references(self, row: dict[str, Any]) -> list[str]:
        """Return the right answers to a row."""
        value = row[self.spec.target_column]
        return [str(text) for text in (value if isinstance(value, list) else [value])]

    def input_error(self, row: dict[str, Any]) -> str:
        """Return what is wrong with the source, or nothing."""
        return text_error(row, [self.spec.source_column])

    def target_error(self, row: dict[str, Any]) -> str:
        """Return what is wrong with the target, or with one of several, or nothing."""
        column = self.spec.target_column
        value = row.get(column)
        if not isinstance(value, list):
            return text_error(row, [column])
        if not value:
            return f"column `{column}` holds an empty list: no right answer"
        errors = (text_error({column: text}, [column]) for text in value)
        found = next(((i, error) for i, error in enumerate(errors, 1) if error), None)
        return f"{found[1]} in text {found[0]} of its list" if found else ""

    def learn_from(self, splits: dict[str, Rows]) -> None:
        """Learn whether rows have several references; check the recipe's languages."""
        super().learn_from(splits)
        if hasattr(self, "tokenizer") and self.texts.adds_end:
            end = self.tokenizer.eos_token
            self.notes.append(f"the tokenizer ends no text: `{end}` is added to each target")
        column = self.spec.target_column
        self.has_several = any(
            isinstance(row.get(column), list) for rows in splits.values() for row in rows
        )

    def more_text_columns(self) -> list[str]:
        """Return the column of what the model learns to write."""
        return [self.spec.target_column]

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[list[Example]]:
        """Return an example for each reference of each row."""
        sources = self.texts.sources([str(row[self.spec.source_column]) for row in rows])
        wanted = [self.references(row) for row in rows]
        targets = iter(self.texts.targets([text for texts in wanted for text in texts]))
        encoded: list[list[Example]] = []
        for source, texts in zip(sources, wanted, strict=True):
            encoded.append(self._examples(source, [next(targets) for _ in texts]))
        return encoded

    def _examples(self, source: list[int], targets: list[list[int]]) -> list[Example]:
        """Return the examples of a source and its targets; those that are too long may be left out.

        Raises:
            LoraError: If one is too long, and the recipe asks for an error.
        """
        ids = self.texts.cut(source, "source")
        examples: list[Example] = []
        for target in targets if ids else []:
            if labels := self.texts.cut(target, "target"):
                cut = CUT["source"] * (len(ids) < len(source))
                cut += CUT["target"] * (len(labels) < len(target))
                first = int(not examples)
                examples.append({"input_ids": ids, "labels": labels, "first": first, "cut": cut})
        if any(example["cut"] for example in examples):
            whole = sum(len(source) + len(target) for target in targets)
            examples = [{**example, "full_length": whole} for example in examples]
        return examples

    def features(self) -> dict[str, str]:
        """Return the types of the tokens, and of what is known of them."""
        lists = {"input_ids": "list<int32>", "labels": "list<int32>"}
        return {**lists, "first": "int32", "cut": "int32"}

    def cost(self, example: Example) -> int:
        """Return the tokens of the source and of the target."""
        return len(example["input_ids"]) + len(example["labels"])

    def check_examples(self, examples: Sequence[Example]) -> None:
        """Reject tokens that the model's embeddings do not have."""
        for key in ("input_ids", "labels"):
            self.require_known_tokens([max(e[key], default=0) for e in examples])

    def cut_note(self, split: Encoded) -> str | None:
        """Return how many sources and targets of a split were cut, and where."""
        cut = split.examples.data.column("cut").to_numpy()
        parts = []
        for side in SIDES:
            if count := int((cut & CUT[side] > 0).sum()):
                end = "the beginning" if self.texts.truncation(side) == "left" else "the end"
                limit = f"more than {counted(self.limit(side), 'token')}"
                parts.append(f"{counted(count, side)} lost {end} ({limit})")
        return ", ".join(parts) or None

    def unknown_input(self, name: str, rows: Rows, examples: Any) -> tuple[float, str | None]:
        """Return the share of tokens that stand for what the tokenizer does not know."""
        shares, warning = [], None
        columns = {"input_ids": self.spec.source_column, "labels": self.spec.target_column}
        for key, column in columns.items():
            lists = [np.asarray(example[key], dtype=np.int64) for example in examples]
            if not lists:
                return 0.0, None
            ends = np.cumsum([len(ids) for ids in lists])
            found = count_unknown(self.tokenizer, np.concatenate(lists), ends)
            shares.append(found.share)
            if found.first is not None and found.share > MOST_UNKNOWN and warning is None:
                row = int(examples[found.first]["row"])
                texts = [readable_value([rows[row].get(column)])]
                what = f"`{column}` in {name}"
                warning = unknown_warning(self.tokenizer, what, found.share, rows.place(row), texts)
        return max(shares), warning

    def shown(self, example: Example, colour: bool) -> tuple[list[str], str]:
        """Return the source and the target of an encoded example, the target marked as trained."""
        ids, labels = list(example["input_ids"]), list(example["labels"])
        source = str(self.tokenizer.decode(ids))
        target = marked(self.tokenizer, labels, [True] * len(labels), colour)
        facts = [f"source {counted(len(ids), 'token')}", f"target {counted(len(labels), 'token')}"]
        return facts, f"{source}\n{target}"

    def shown_reference(self, row: dict[str, Any]) -> str | None:
        """Return the target of a row."""
        return readable_value([row.get(self.spec.target_column)]) or None

    def trained_share(self, split: Encoded) -> float:
        """Return the share of the tokens that are written, not read."""
        column = split.examples.data.column("labels")
        trained = sum(len(chunk.flatten()) for chunk in column.chunks)
        return trained / int(split.lengths.sum())
