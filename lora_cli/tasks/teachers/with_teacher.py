"""Tasks as they are trained with a teacher: its answers are a second term of the loss.

Validation and test are measured as without one: by the labels, and the teacher is not asked. Train
examples alone hold what it reads, or what it answered, by which `collate` knows them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_cli.data.file_formats import is_blank
from lora_cli.errors import LoraError, counted
from lora_cli.recipe import CausalLMSpec, Recipe, SequenceClassificationSpec
from lora_cli.tasks.cached_tensors import restored
from lora_cli.tasks.causal_lm import CausalLM
from lora_cli.tasks.classification.classification_task import Classification
from lora_cli.tasks.classification.head_rows import match_rows
from lora_cli.tasks.contract import Task
from lora_cli.tasks.examples import IGNORED, MAIN, Batch, Example
from lora_cli.tasks.generation.output_head import HiddenStates
from lora_cli.tasks.generation.packing import Packed, check_packing, one_row
from lora_cli.tasks.sequence_classification import SequenceClassification
from lora_cli.tasks.teachers.distillation_loss import (
    TopTokens,
    label_divergence,
    marks_divergence,
    token_divergence,
    top_tokens,
)
from lora_cli.tasks.teachers.teacher import Teacher, errors_of_teacher, open_teacher

TEACHER = "teacher"  # the second term of the loss
READS = "teacher_"  # before the names of what the teacher reads, and of what it answers
ANSWER = f"{READS}logits"
TOP_IDS, TOP_LOG_P = f"{READS}top_ids", f"{READS}top_log_p"
TAUGHT = "taught"  # marks the examples that a teacher answers
PROBES = (
    "The cat sat on the mat.", "  two spaces,\n\ta tab and 1234567890 digits",
    "Größe, naïve café — “quotes” … 日本語 и русский", "def f(x):\n    return x ** 2  # code",
)  # fmt: skip


class TaughtTask(Task):
    """The part that tasks of all kinds share; it comes before the task's own class."""

    teacher: Teacher
    frozen_splits = ("train",)

    @property
    def train_loss_weights(self) -> Mapping[str, float]:
        """The weights of the labels' part and of the teacher's."""
        weight = self.teacher.spec.weight
        return {MAIN: 1.0 - weight, TEACHER: weight}

    def frozen_parts(self, model: nn.Module) -> Mapping[str, nn.Module]:
        """Return the teacher."""
        return {TEACHER: self.teacher.model()}

    def release_frozen(self) -> None:
        """Let go of the teacher."""
        self.teacher.release()

    @property
    def teacher_identity(self) -> dict[str, str]:
        """The teacher's name and the hash of its tensors."""
        facts = self.teacher.facts
        return {TEACHER: f"{facts['name']} ({facts['fingerprint']})"}

    @property
    def teacher_facts(self) -> dict[str, Any]:
        """What a report says of the teacher."""
        return self.teacher.facts

    def answers(self, batch: Batch) -> Any:
        """Return what the teacher says of a batch, without gradients."""
        raise NotImplementedError


class TaughtClassification(TaughtTask, Classification):
    """A classification whose train rows may have no label, and whose teacher has the same labels.

    A row without a label is an item of the teacher's term alone.
    """

    order: Tensor
    """Where each label stands among the teacher's outputs (C,)."""

    def load_processor(self) -> None:
        """Load the student's processor, and the teacher's."""
        super().load_processor()  # type: ignore[safe-super]  # the task's own
        self.teacher.load_processor()

    def is_unlabelled(self, row: dict[str, Any]) -> bool:
        """Return whether no column of a row says anything of its label."""
        return all(is_blank(row.get(column)) for column in self.label_spec.target_columns)

    def needed_columns(self, training: bool = False) -> dict[str, str]:
        """Return the columns that rows must have; train rows may have no label."""
        return self.input_columns() if training else super().needed_columns()

    def row_error(self, row: dict[str, Any], training: bool = False) -> str:
        """Return what is wrong with a row, or nothing."""
        if training and self.is_unlabelled(row):
            return self.input_error(row)
        return super().row_error(row)

    def learn_from(self, splits: dict[str, Any]) -> None:
        """Find the labels, and compare them with the teacher's.

        Raises:
            LoraError: If they differ, or if no train row has one and the recipe wants to learn it.
        """
        super().learn_from(splits)
        with errors_of_teacher(self.recipe):
            self.order = torch.tensor(self._order())
        if "train" not in splits:
            return
        rows = splits["train"]
        unlabelled = sum(map(self.is_unlabelled, rows))
        if unlabelled == len(rows) and self.teacher.spec.weight < 1:
            what = "no train row has a label, so the labels' part of the loss has nothing to learn"
            at = self.recipe.at("task.label_column")
            hint = "is it the right column? To learn from the teacher alone: "
            raise LoraError(what, at, f"{hint}`--set train.distill.weight=1`")
        with_label = f"{counted(len(rows) - unlabelled, 'train row')} with a label"
        note = f"{with_label}, {unlabelled:,} without: those learn from the teacher alone"
        if unlabelled and note not in self.notes:
            self.notes.append(note)

    def _order(self) -> list[int]:
        theirs, ours = self.teacher.task.labels, self.labels
        unnamed = [f"LABEL_{i}" for i in range(len(theirs))] == theirs
        if unnamed and ours == [str(i) for i in range(len(theirs))]:
            return list(range(len(theirs)))
        rows = match_rows(theirs, ours)
        found = [row for row in rows if row is not None]
        if len(found) == len(ours) == len(theirs):
            return found
        missing = [label for label, row in zip(ours, rows, strict=True) if row is None]
        if missing:
            what = f"it has no label `{missing[0]}`; its labels are {_listed(theirs)}"
        else:
            others = [name for i, name in enumerate(theirs) if i not in found]
            what = f"it has the label `{others[0]}`, which the recipe does not have"
        hint = "teacher and student need the same labels, by name: `task.labels` names them"
        if unnamed:
            what = f"its {counted(len(theirs), 'label')} have no names"
            hint = "name them, in the order of its outputs, as `id2label` of its config.json"
        raise LoraError(what, hint=hint)

    def label_of(self, row: dict[str, Any]) -> float | int | list[int]:
        """Return the label of a row as the model learns it; of none, what is ignored."""
        if not self.is_unlabelled(row):
            return super().label_of(row)
        is_one = self.label_spec.problem == "single_label"
        return IGNORED if is_one else [IGNORED] * len(self.labels)

    def labels_and_items(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """Return the labels of examples, and how many items each is; none without a label."""
        known = {**examples[0], "labels": self.trial_label}
        has = torch.tensor([not _is_ignored(example["labels"]) for example in examples])
        some = [e if ok else {**e, **known} for e, ok in zip(examples, has.tolist(), strict=True)]
        labels, items = super().labels_and_items(some)
        shape = (-1,) + (1,) * (labels.ndim - 1)
        return torch.where(has.view(shape), labels, IGNORED), items * has

    def shown(self, example: Example, colour: bool) -> tuple[list[str], str]:
        """Return the label of an encoded example, if it has one, and what is shown of its input."""
        if not _is_ignored(example["labels"]):
            return super().shown(example, colour)
        labelled = {**example, "labels": self.trial_label}
        return ["without a label"], super().shown(labelled, colour)[1]

    def losses(self, model: nn.Module, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return the loss of the labels, and in training that of the teacher's answers."""
        labels = batch.targets["labels"]
        has = (labels if labels.ndim == 1 else labels[:, 0]) != IGNORED
        known = {"labels": labels.clamp(min=0)}
        own = Batch(batch.inputs, known, batch.items, batch.cost, batch.rows)
        of_labels = super().losses(model, output, own)[MAIN]
        found = {MAIN: torch.where(has, of_labels, 0.0)}
        if TEACHER in batch.items:
            said = batch.targets.get(ANSWER)
            said = self.answers(batch) if said is None else said
            several = self.label_spec.problem == "multi_label"
            compare = marks_divergence if several else label_divergence
            theirs = said.float()[:, self.order.to(said.device)]
            found[TEACHER] = compare(output.float(), theirs, self.teacher.spec.temperature)
        return found

    def frozen_outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the teacher's logits for each example (B, C), in the order of its own labels."""
        return {ANSWER: self.answers(batch)}


class TaughtSequenceClassification(TaughtClassification, SequenceClassification):
    """`task.type: sequence_classification` with a teacher, which has a tokenizer of its own."""

    def __init__(self, recipe: Recipe, spec: SequenceClassificationSpec) -> None:
        super().__init__(recipe, spec)
        self.teacher = open_teacher(recipe)

    @property
    def reader_of_teacher(self) -> SequenceClassification:
        """The task that reads rows as the teacher does."""
        task = self.teacher.task
        assert isinstance(task, SequenceClassification)
        return task

    def cache_key(self) -> list[str]:
        """Return what an encoded row depends on besides the row: also the teacher's tokenizer."""
        return [*super().cache_key(), *self.teacher.cache_key()]

    def encode_to_train(self, rows: Sequence[dict[str, Any]]) -> list[list[Example]]:
        """Return the examples of rows, with what the teacher reads of each."""
        with errors_of_teacher(self.recipe):
            theirs = self.reader_of_teacher.encode_inputs(rows)
            self.reader_of_teacher.check_examples(theirs)
        return [
            [one | {f"{READS}{key}": value for key, value in read.items()} for one in own]
            for own, read in zip(self.encode(rows), theirs, strict=True)
        ]

    def train_features(self) -> dict[str, str]:
        """Return the types of what student and teacher read."""
        theirs = self.reader_of_teacher.features()
        read = {f"{READS}{key}": kind for key, kind in theirs.items() if key != "labels"}
        return self.features() | read

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Return the examples as a batch, with what the teacher reads, or has answered."""
        batch = super().collate(examples)
        keys = [key for key in examples[0] if key.startswith(READS)]
        if not keys:
            return batch
        batch.items[TEACHER] = torch.ones(len(examples))
        if self.label_spec.problem == "multi_label":
            batch.items[TEACHER] *= len(self.labels)
        if ANSWER in keys:
            batch.targets[ANSWER] = torch.stack([example[ANSWER] for example in examples])
            return batch
        read = [{key.removeprefix(READS): e[key] for key in keys} for e in examples]
        inputs = self.reader_of_teacher.input_tensors(read)
        batch.targets |= {f"{READS}{key}": value for key, value in inputs.items()}
        return batch

    @torch.no_grad()
    def answers(self, batch: Batch) -> Tensor:
        """Return the teacher's logits (B, C) for what it reads of a batch."""
        model = self.teacher.model()
        inputs = {
            key.removeprefix(READS): value
            for key, value in batch.targets.items()
            if key.startswith(READS)
        }
        return self.reader_of_teacher.logits(model, inputs)


class TaughtCausalLM(TaughtTask, CausalLM):
    """`task.type: causal_lm` with a teacher, which reads the same tokens."""

    def __init__(self, recipe: Recipe, spec: CausalLMSpec) -> None:
        super().__init__(recipe, spec)
        # it is given the student's tokens, whatever rows they are of
        plain = CausalLMSpec(type="causal_lm", max_length=spec.max_length)
        self.teacher = open_teacher(recipe, task=plain)

    def load_processor(self) -> None:
        """Load the student's tokenizer, and compare the teacher's.

        Raises:
            LoraError: If the teacher has other tokens, or reads fewer of them at once.
        """
        super().load_processor()
        self.teacher.load_processor()
        with errors_of_teacher(self.recipe):
            self._require_same_tokens()
            most = self.reader_of_teacher.max_length
            if most < self.max_length:
                what = f"it reads no more than {counted(most, 'token')}, and the student "
                hint = f"`--set task.max_length={most}`, or name a teacher that reads more"
                raise LoraError(f"{what}{self.max_length:,}", hint=hint)

    def _require_same_tokens(self) -> None:
        theirs, ours = self.reader_of_teacher.tokenizer, self.tokenizer
        known, vocabulary = theirs.get_vocab(), ours.get_vocab()
        differing = {token for token, i in vocabulary.items() if known.get(token) != i}
        differing |= known.keys() - vocabulary.keys()
        what = ""
        if differing:
            # the first by id, as a user would find it
            first = min(differing, key=lambda token: (vocabulary.get(token, math.inf), token))
            there, here = (v.get(first, "no token") for v in (known, vocabulary))
            what = f"its tokenizer differs from that of `{self.recipe.model.name}` in "
            what += f"{counted(len(differing), 'token')}: `{first}` is {there} there, {here} here"
        elif probe := next((p for p in PROBES if _ids(theirs, p) != _ids(ours, p)), None):
            what = f"its tokenizer divides a text otherwise than that of `{self.recipe.model.name}`"
            what += f": {probe!r}"
        if what:
            hint = "it has to read the same tokens: take a larger model of the same family"
            raise LoraError(what, hint=hint)

    @property
    def reader_of_teacher(self) -> CausalLM:
        """The task that reads tokens as the teacher does."""
        task = self.teacher.task
        assert isinstance(task, CausalLM)
        return task

    def cache_key(self) -> list[str]:
        """Return what an encoded row depends on besides the row, and what is kept of a teacher."""
        temperature = f"temperature {self.teacher.spec.temperature!r}"
        return [*super().cache_key(), *self.teacher.cache_key(), temperature]

    def encode_to_train(self, rows: Sequence[dict[str, Any]]) -> list[list[Example]]:
        """Return the examples of rows, marked as the teacher's."""
        return [[{**e, TAUGHT: 1} for e in examples] for examples in self.encode(rows)]

    def train_features(self) -> dict[str, str]:
        """Return the types of the tokens, the labels and the mark."""
        return {**self.features(), TAUGHT: "int8"}

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Return the examples as a batch, with what the teacher said of each trained token."""
        batch = super().collate(examples)
        if TAUGHT in examples[0]:
            batch.items[TEACHER] = batch.items[MAIN].clone()
        for key in (TOP_IDS, TOP_LOG_P) if TOP_IDS in examples[0] else ():
            batch.targets[key] = torch.cat([example[key] for example in examples])
        return batch

    def losses(
        self, model: nn.Module, output: HiddenStates | Tensor, batch: Batch
    ) -> dict[str, Tensor]:
        """Return the loss of the tokens, and in training that of the teacher's probabilities."""
        found = super().losses(model, output, batch)
        if TEACHER not in batch.items:
            return found
        said = self._kept(batch) or self.answers(batch)
        labels, positions = batch.targets["labels"], batch.targets["positions"]
        if isinstance(output, HiddenStates):
            trained = output.scores(output.states.flatten(0, 1).index_select(0, positions))
        else:
            trained = output.flatten(0, 1).index_select(0, positions)
        trained = trained[:, : self._n_tokens(trained)]
        losses = token_divergence(trained, said, self.teacher.spec.temperature)
        by_token = losses.new_zeros(labels.numel()).index_copy(0, positions, losses)
        return found | {TEACHER: by_token.view(labels.shape).sum(1)}

    @staticmethod
    def _kept(batch: Batch) -> TopTokens | None:
        found = [batch.targets.get(key) for key in (TOP_IDS, TOP_LOG_P)]
        return None if found[0] is None or found[1] is None else TopTokens(found[0], found[1])

    def _n_tokens(self, logits: Tensor) -> int:
        """Return how many tokens are compared: embeddings may have been filled up differently."""
        size = self.reader_of_teacher.config.get_text_config().vocab_size
        return min(int(size), logits.shape[1])

    @torch.no_grad()
    def answers(self, batch: Batch) -> TopTokens:
        """Return the teacher's likeliest tokens at each place that is trained (N)."""
        logits = self.reader_of_teacher.logits(self.teacher.model(), batch.inputs)
        trained = logits.flatten(0, 1).index_select(0, batch.targets["positions"])
        own = int(self.config.get_text_config().vocab_size)
        trained = trained[:, : min(own, trained.shape[1])]
        return top_tokens(trained, self.teacher.spec.temperature)

    def frozen_outputs(self, model: nn.Module, batch: Batch) -> Mapping[str, Sequence[Tensor]]:
        """Return the teacher's likeliest tokens for the trained places of each example."""
        sizes = batch.items[MAIN].long().tolist()
        said = self.answers(batch)
        return {TOP_IDS: torch.split(said.ids, sizes), TOP_LOG_P: torch.split(said.log_p, sizes)}

    def packed(self, split: Any) -> Packed:
        """Return the examples of a split, several in a row, with what the teacher said of them."""
        return _TaughtPacks(self, split)

    def check_packing(self, model: nn.Module, split: Any) -> None:
        """Check that neither the student nor the teacher lets packed texts see each other."""
        super().check_packing(model, split)
        with errors_of_teacher(self.recipe):
            check_packing(self.reader_of_teacher, self.teacher.model(), split)


class _TaughtPacks(Packed):
    """Packs whose members' answers stand one after another."""

    def __getitem__(self, index: int) -> Example:
        examples = self.split.examples.__getitems__(self.packs[index])
        found = {**one_row(examples), TAUGHT: 1}
        if TOP_IDS in examples[0]:
            kept = [restored(example) for example in examples]
            found |= {k: torch.cat([e[k] for e in kept]) for k in (TOP_IDS, TOP_LOG_P)}
        return found


WITH_TEACHER: dict[type[Task], type[TaughtTask]] = {
    SequenceClassification: TaughtSequenceClassification,
    CausalLM: TaughtCausalLM,
}
"""What a task is while it is trained with a teacher; `can_distill` of its spec says so."""


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _is_ignored(labels: Any) -> bool:
    if isinstance(labels, int):
        return labels == IGNORED
    return len(labels) > 0 and int(labels[0]) == IGNORED


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(f"`{name}`" for name in names[:5]) + more
