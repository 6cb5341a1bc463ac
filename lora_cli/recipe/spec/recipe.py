"""The recipe: its sections, and the checks across sections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from pydantic import Field, PrivateAttr

from lora_cli.recipe.spec.adapter import LYCORIS_TYPES, AdapterSpec
from lora_cli.recipe.spec.checkpoint import CheckpointSpec
from lora_cli.recipe.spec.data import DataSpec, HeldOutSpec, SourceSpec
from lora_cli.recipe.spec.evaluate import EvaluateSpec
from lora_cli.recipe.spec.model import ModelSpec
from lora_cli.recipe.spec.section import Conflicts, Section, Word
from lora_cli.recipe.spec.task import TaskSpec
from lora_cli.recipe.spec.train import TrainSpec


@dataclass(frozen=True)
class Origin:
    """Where a recipe comes from.

    Args:
        places: Where each key was written: `recipe.yaml:14`, or the `--set` flag.
        metrics_of_adapter: Whether the metrics come from a recipe that was saved with an adapter,
            and may therefore not be trusted to run code.
        of_set: The set of `data.mix` that the data section describes, if it is only one.
    """

    places: Mapping[str, str] = field(default_factory=dict)
    metrics_of_adapter: bool = False
    of_set: str | None = None


class Recipe(Section):
    """A fine-tuning run: which model, which data, and how it is trained."""

    format: Literal[1] = 1
    """The version of the recipe format. Recipes that lora writes contain it; in others it may be
    left out."""

    model: ModelSpec
    """The pretrained base model."""

    task: TaskSpec
    """What the model should learn to do."""

    data: DataSpec
    """Where the rows come from."""

    adapter: AdapterSpec = Field(default_factory=AdapterSpec)
    """Which parameters are trained."""

    train: TrainSpec = Field(default_factory=TrainSpec)
    """The training loop."""

    evaluate: EvaluateSpec = Field(default_factory=EvaluateSpec)
    """How the result is measured."""

    checkpoint: CheckpointSpec = Field(default_factory=CheckpointSpec)
    """When the state of training is saved, and where to."""

    output_dir: Word = "out"
    """Folder for the result, relative to the working directory."""

    _origin: Origin = PrivateAttr(default_factory=Origin)

    def conflicts(self) -> Conflicts:
        """Yield what does not agree between sections."""
        data, task, train = self.data, self.task, self.train
        dtype, own = self.model.dtype, {"float16": "fp16", "bfloat16": "bf16"}
        if dtype in own and train.precision != own[dtype]:
            what = f"a base that is stored in {dtype} cannot compute in "
            what += f"`train.precision: {train.precision}`"
            yield "model.dtype", what, f"`--set train.precision={own[dtype]}`, or leave `dtype` out"
        if data.streaming and train.max_steps is None:
            what = "`data.streaming` does not know how many rows there are"
            yield "data.streaming", what, "say how long to train: `--set train.max_steps=1000`"
        if data.streaming and getattr(task, "class_weights", None) == "balanced":
            what = "`balanced` counts all rows, which `data.streaming` does not have"
            yield "task.class_weights", what, "give each label its weight: `{good: 1, bad: 2.5}`"
        for key in ("packing", "group_by_length"):
            if data.streaming and getattr(train, key):
                what = f"`train.{key}` needs all rows, which `data.streaming` does not have"
                yield f"train.{key}", what, "leave one of the two out"
        if data.streaming and train.micro_batch_size == "auto":
            what = "`auto` tries the longest rows, and `data.streaming` does not know them"
            yield "train.micro_batch_size", what, "name a number: `--set train.micro_batch_size=8`"
        if data.streaming and train.gradient_checkpointing == "auto":
            what = "`auto` tries the longest rows, and `data.streaming` does not know them"
            yield "train.gradient_checkpointing", what, "use `true`, `false` or `offload`"
        if self.model.quantization is not None and self.adapter.type == "full":
            what = "`adapter.type: full` trains all weights, and quantised ones cannot be trained"
            hint = "leave one of the two out: LoRA on a quantised base is `adapter.type: lora`"
            yield "model.quantization", what, hint
        if train.optimizer.lora_plus_ratio is not None and self.adapter.type in LYCORIS_TYPES:
            what = f"`adapter.type: {self.adapter.type}` has no `lora_B` that could learn faster"
            hint = "leave `lora_plus_ratio` out, or use `adapter.type: lora`"
            yield "train.optimizer.lora_plus_ratio", what, hint
        yield from self._init_conflicts()
        yield from self._distill_conflicts()
        yield from self._token_conflicts()
        if train.kernels == "fused" and task.couples_examples:
            what = "`kernels: fused` records micro-batches, and this loss compares the whole step"
            yield "train.kernels", what, "leave `kernels` out"
        if data.streaming and "label_column" in task.model_fields_set and task.couples_examples:
            what = "positives are drawn among all rows, which `data.streaming` does not have"
            yield "data.streaming", what, "leave it out, or write pairs into the file"
        if train.packing and not task.can_pack:
            what = f"`train.packing` has no meaning with `task.type: {task.type}`"
            yield "train.packing", what, task.packing_hint
        if not data.has("validation") and self.evaluate.early_stopping is not None:
            what = "`evaluate.early_stopping` needs `data.validation`, and there is none"
            hint = "name one, `data.validation: {from: train, fraction: 0.1}`, or leave it out"
            yield "evaluate.early_stopping", what, hint
        yield from self._baseline_conflicts()
        yield from self._mix_conflicts()
        names = [f"data.mix.{name}" for name in data.mix] or ["data"]
        for section, source in zip(names, data.sources, strict=True):
            for split in ("validation", "test"):
                spec = getattr(source, split)
                if isinstance(spec, HeldOutSpec) and spec.stratify:
                    if task.label_columns_by_key:
                        continue
                    key = f"{section}.{split}.stratify"
                    what = f"`{key}` keeps the proportions of labels, and this task has none"
                    yield key, what, "leave it out"

    def _mix_conflicts(self) -> Conflicts:
        weighted = any(source.weight is not None for source in self.data.mix.values())
        if weighted and self.task.couples_examples:
            what = "a pair that is drawn twice in a step would be its own negative"
            yield "data.mix", what, "leave `weight` out of the sets"
        if len(self.data.number_forms) > 1 and self.task.answer_kind == "regression":
            what = "the sets write numbers in several ways, but all sets are read in the same way"
            yield "data.mix", what, "write them all with the same `decimal` and `thousands`"

    def _init_conflicts(self) -> Conflicts:
        init, key = self.adapter.init, "adapter.init"
        if init == "loftq" and self.model.quantization is None:
            what = "`init: loftq` reduces the error of quantising, and the base is not quantised"
            yield key, what, "`--set model.quantization=nf4`, or leave `init` out"
        if init == "eva" and self.data.streaming:
            what = "`init: eva` reads train rows before the first step, and `data.streaming` reads "
            yield key, f"{what}each once", "leave one of the two out"

    def _distill_conflicts(self) -> Conflicts:
        if self.train.distill is None:
            return
        if not self.task.can_distill:
            what = f"`distill` has no meaning with `task.type: {self.task.type}`"
            hint = "leave it out: `sequence_classification` and `causal_lm` support it"
            yield "train.distill", what, hint
        elif self.task.answer_kind == "regression":
            what = "`distill` learns probabilities, and a regression has no probabilities"
            yield "train.distill", what, "let the teacher answer the rows: `lora predict --input`"

    def _token_conflicts(self) -> Conflicts:
        """Yield what is wrong with new tokens, and with tokens whose rows are trained."""
        named = {
            "model.add_tokens": self.model.add_tokens,
            "adapter.train_tokens": self.adapter.train_tokens,
        }
        for key, tokens in named.items():
            reads_tokens = set(self.task.length_keys) & type(self.task).model_fields.keys()
            if tokens and not reads_tokens:
                name = key.rpartition(".")[2]
                what = f"`{name}` has no meaning with `task.type: {self.task.type}`"
                yield key, what, "leave it out"
        if self.model.add_tokens and self.adapter.type not in ("lora", "dora", "full"):
            what = f"`adapter.type: {self.adapter.type}` would not train the rows of new tokens"
            yield "model.add_tokens", what, "use `adapter.type: lora`, or leave `add_tokens` out"

    def _baseline_conflicts(self) -> Conflicts:
        key, named = "evaluate.baselines", self.evaluate.baselines
        for name in named:
            if name not in self.task.baselines:
                what = f"`{name}` has no meaning with `task.type: {self.task.type}`"
                yield key, what, f"leave `{name}` out"
        if "base" in named and not self.evaluate.baseline:
            what = "`base` is what `evaluate.baseline` measures, and it is off"
            yield key, what, "set `evaluate.baseline: true`, or leave `base` out"
        if "base" in named and self.adapter.from_ is not None:
            what = "before training, `adapter.from` is the old adapter, and not `base`"
            yield key, what, "leave `base` out"
        if "none" in named and self.adapter.type == "none":
            yield key, "`none` is what `adapter.type: none` trains itself", "leave `none` out"
        if self.data.streaming and {"majority", "none"} & set(named):
            what = "`majority` and `none` need all rows, which `data.streaming` does not have"
            yield key, what, "leave them out"
        if named and not (self.data.has("validation") or self.data.has("test")):
            what = "`evaluate.baselines` are measured on held-out rows, and there are none"
            hint = "name some, `data.validation: {from: train, fraction: 0.1}`, or leave it out"
            yield key, what, hint

    def at(self, key: str) -> str:
        """Return where a key is, for an error message: `adapter.rank (recipe.yaml:14)`.

        A key that the recipe leaves out is located at its section.
        """
        parts = key.split(".")
        if self._origin.of_set is not None and parts[0] == "data":
            is_of_set = len(parts) == 1 or parts[1] in SourceSpec.model_fields
            parts[1:1] = ["mix", self._origin.of_set] if is_of_set else []
            key = ".".join(parts)
        for length in range(len(parts), 0, -1):
            place = self._origin.places.get(".".join(parts[:length]))
            if place:
                return f"{key} ({place})"
        return key

    def is_overridden(self, key: str) -> bool:
        """Return whether the value of a key comes from a `--set` flag."""
        return self._origin.places.get(key, "").startswith("--set")

    @property
    def origin(self) -> Origin:
        """Where the recipe comes from."""
        return self._origin

    def with_origin(self, origin: Origin) -> Recipe:
        """Return a copy with another origin."""
        copied = self.model_copy()
        copied._origin = origin
        return copied

    def for_set(self, name: str) -> Recipe:
        """Return the recipe for one set of `data.mix`; errors name its keys within `data.mix`."""
        alone = self.with_values({"data": self.data.of_set(name)})
        return alone.with_origin(replace(self._origin, of_set=name))

    @property
    def output_path(self) -> Path:
        """The folder of the result."""
        return Path(self.output_dir)
