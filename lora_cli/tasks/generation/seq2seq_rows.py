"""The rows of sequence-to-sequence tasks: columns, lengths and examples.

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
CUT_BITS = {"source": 1, "target": 2}  # bits of `cut` in an example: what was truncated
# trained in bfloat16, with activations beyond the range of float16
OVERFLOWS_IN_FP16 = ("longt5", "mt5", "switch_transformers", "t5", "umt5")


class SourceAndTargetTask(WritingTask):
    """A task whose rows have a source, and one or several targets."""

    spec: Seq2SeqLMSpec  # type: ignore[assignment]  # it has two maximum lengths
    length_key = "task.max_source_length"
    prompt_name = "source"

    def __init__(self, recipe: Recipe, spec: Seq2SeqLMSpec) -> None:
        super().__init__(recipe)
        self.spec = spec
        self.has_several_references = False  # references of a row

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
        is_float16 = self.recipe.train.precision == "fp16" or self.recipe.model.dtype == "float16"
        if is_float16 and self.config.model_type in OVERFLOWS_IN_FP16:
            self.notes.append(
                f"models like {self.config.model_type} were trained in bfloat16, and often make "
                "NaN in float16: better take `train.precision: bf16`, or fp32"
            )
        if dropped := layer_drop_of(self.config):
            self.notes.append(dropped)

    def model_config(self) -> PretrainedConfig:
        """Return the model's configuration, without LayerDrop."""
        return keep_all_layers(super().model_config())

    @functools.cached_property
    def texts(self) -> SourcesAndTargets:
        """The encoder of sources and targets.

        Raises:
            LoraError: If the tokenizer does not have the recipe's languages.
        """
        start = getattr(self.config, "decoder_start_token_id", None)
        limits: dict[Side, int] = {side: self.limit(side) for side in SIDES}
        try:
            return SourcesAndTargets(self.spec, self.tokenizer, self.text_tokenizer, limits, start)
        except LoraError as error:
            problem = error.problems[0]
            raise LoraError(problem.what, self.recipe.at(problem.at or ""), problem.hint) from error

    def positions_of(self, side: Side) -> int | None:
        """Return the number of positions of the encoder or the decoder; None if not limited."""
        key = "encoder" if side == "source" else "decoder"  # LED has one for each
        n_positions = getattr(self.config, f"max_{key}_position_embeddings", None)
        return int(n_positions) if isinstance(n_positions, int) else self.positions

    def limit(self, side: Side) -> int:
        """Return the maximum tokens of a source or target: the recipe's, if the model allows it."""
        key = f"max_{side}_length"
        limits = [int(getattr(self.spec, key))]
        positions = self.positions_of(side)
        if positions is not None:
            limits.append(positions)
        if positions is not None or key not in self.spec.model_fields_set:
            # T5 has no limit of its own: a length in the recipe overrides the tokenizer's
            limits.append(int(self.tokenizer.model_max_length))
        return min(limits)

    @property
    def max_length(self) -> int:  # type: ignore[override]
        """The sum of the maximum lengths of source and target."""
        return sum(map(self.limit, SIDES))

    @property
    def length_note(self) -> str | None:
        """A warning if the recipe's lengths are more than the model can read; otherwise None."""
        lengths = {side: int(getattr(self.spec, f"max_{side}_length")) for side in SIDES}
        notes = [
            f"`task.max_{side}_length` is {length}, and the model takes "
            f"{counted(self.limit(side), 'token')}"
            for side, length in lengths.items()
            if self.limit(side) < length and f"max_{side}_length" in self.spec.model_fields_set
        ]
        return f"warning: {'; '.join(notes)}: longer texts are cut there" if notes else None

    @property
    def length_limit(self) -> str:
        """The maximum lengths in words."""
        source, target = self.limit("source"), self.limit("target")
        return f"{counted(source, 'token')} of the source and {target:,} of the target"

    @property
    def length_name(self) -> str:
        """The maximum lengths for a table."""
        return " + ".join(str(self.limit(side)) for side in SIDES)

    @property
    def longer_hint(self) -> str:
        """A hint for texts that are too long."""
        return "raise `task.max_source_length` or `task.max_target_length`, if the model takes more"

    def cache_key(self) -> list[str]:
        """Return everything that an encoded row depends on, besides the row itself."""
        return [*super().cache_key(), str(self.texts.target_frame)]

    # ------------------------------------------------------------------------------ rows

    def fields(self) -> list[Field]:
        """Return the columns of the source and of the target."""
        return [
            Field("task.source_column", self.spec.source_column, "input", "text"),
            Field("task.target_column", self.spec.target_column, "target", "text"),
        ]

    def references(self, row: dict[str, Any]) -> list[str]:
        """Return the targets of a row, each of which is a correct answer."""
        value = row[self.spec.target_column]
        return [str(text) for text in (value if isinstance(value, list) else [value])]

    def input_error(self, row: dict[str, Any]) -> str:
        """Return what is wrong with the source; empty if nothing is."""
        return text_error(row, [self.spec.source_column])

    def target_error(self, row: dict[str, Any]) -> str:
        """Return what is wrong with the target, or with one of several; empty if nothing is."""
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
        self.has_several_references = any(
            isinstance(row.get(column), list) for rows in splits.values() for row in rows
        )

    def more_text_columns(self) -> list[str]:
        """Return the column of the target, which is a text too."""
        return [self.spec.target_column]

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[list[Example]]:
        """Return an example for each reference of each row."""
        sources = self.texts.sources([str(row[self.spec.source_column]) for row in rows])
        references = [self.references(row) for row in rows]
        targets = iter(self.texts.targets([text for texts in references for text in texts]))
        encoded: list[list[Example]] = []
        for source, texts in zip(sources, references, strict=True):
            encoded.append(self._examples(source, [next(targets) for _ in texts]))
        return encoded

    def _examples(self, source: list[int], targets: list[list[int]]) -> list[Example]:
        """Return the examples of a source and its targets, except for dropped ones.

        Raises:
            LoraError: If a source or target is too long and the recipe's setting is `error`.
        """
        ids = self.texts.cut(source, "source")
        examples: list[Example] = []
        for target in targets if ids else []:
            if labels := self.texts.cut(target, "target"):
                cut = CUT_BITS["source"] * (len(ids) < len(source))
                cut += CUT_BITS["target"] * (len(labels) < len(target))
                first = int(not examples)
                examples.append({"input_ids": ids, "labels": labels, "first": first, "cut": cut})
        if any(example["cut"] for example in examples):
            full_length = sum(len(source) + len(target) for target in targets)
            examples = [{**example, "full_length": full_length} for example in examples]
        return examples

    def features(self) -> dict[str, str]:
        """Return the type of each key of an example."""
        lists = {"input_ids": "list<int32>", "labels": "list<int32>"}
        return {**lists, "first": "int32", "cut": "int32"}

    def cost(self, example: Example) -> int:
        """Return the number of tokens of the source and the target together."""
        return len(example["input_ids"]) + len(example["labels"])

    def check_examples(self, examples: Sequence[Example]) -> None:
        """Check that the model has an embedding for each token.

        Raises:
            LoraError: If it has not.
        """
        for key in ("input_ids", "labels"):
            self.require_known_tokens([max(e[key], default=0) for e in examples])

    def cut_note(self, split: Encoded) -> str | None:
        """Return a note of how many sources and targets of a split were cut; None if none was."""
        cut = split.examples.data.column("cut").to_numpy()
        parts = []
        for side in SIDES:
            if count := int((cut & CUT_BITS[side] > 0).sum()):
                end = "the beginning" if self.texts.truncation(side) == "left" else "the end"
                limit = f"more than {counted(self.limit(side), 'token')}"
                parts.append(f"{counted(count, side)} lost {end} ({limit})")
        return ", ".join(parts) or None

    def unknown_input(self, name: str, rows: Rows, examples: Any) -> tuple[float, str | None]:
        """Return the share of unknown tokens, and a warning if it is high.

        The share is that of the sources or that of the targets, whichever is larger.
        """
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
        """Return an encoded example for people to read, with its target marked as trained."""
        ids, labels = list(example["input_ids"]), list(example["labels"])
        source = str(self.tokenizer.decode(ids))
        target = marked(self.tokenizer, labels, [True] * len(labels), colour)
        facts = [f"source {counted(len(ids), 'token')}", f"target {counted(len(labels), 'token')}"]
        return facts, f"{source}\n{target}"

    def shown_reference(self, row: dict[str, Any]) -> str | None:
        """Return the target of a row for people to read."""
        return readable_value([row.get(self.spec.target_column)]) or None

    def trained_share(self, split: Encoded) -> float:
        """Return the share of the tokens that are trained, which are those of the targets."""
        column = split.examples.data.column("labels")
        trained = sum(len(chunk.flatten()) for chunk in column.chunks)
        return trained / int(split.lengths.sum())
