"""Distillation of a language model from a teacher with the same vocabulary."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_cli.errors import LoraError, counted
from lora_cli.recipe import CausalLMSpec, Recipe
from lora_cli.tasks.cached_tensors import restored
from lora_cli.tasks.causal_lm import CausalLM
from lora_cli.tasks.examples import MAIN, Batch, Example
from lora_cli.tasks.generation.output_head import HiddenStates
from lora_cli.tasks.generation.packing import Packed, check_packing, one_row
from lora_cli.tasks.teachers.distillation_loss import (
    TopTokens,
    token_divergence,
    top_tokens,
)
from lora_cli.tasks.teachers.distilled_task import TEACHER, TEACHER_PREFIX, DistilledTask
from lora_cli.tasks.teachers.teacher import errors_of_teacher, open_teacher

TOP_IDS, TOP_LOG_P = f"{TEACHER_PREFIX}top_ids", f"{TEACHER_PREFIX}top_log_p"
TAUGHT = "taught"  # marks the examples for which the teacher is evaluated
PROBE_TEXTS = (
    "The cat sat on the mat.", "  two spaces,\n\ta tab and 1234567890 digits",
    "Größe, naïve café — “quotes” … 日本語 и русский", "def f(x):\n    return x ** 2  # code",
)  # fmt: skip


class DistilledCausalLM(DistilledTask, CausalLM):
    """`task.type: causal_lm` with a teacher that reads the same tokens."""

    def __init__(self, recipe: Recipe, spec: CausalLMSpec) -> None:
        super().__init__(recipe, spec)
        # the teacher reads the student's tokens, so the format of the rows does not matter
        teacher_spec = CausalLMSpec(type="causal_lm", max_length=spec.max_length)
        self.teacher = open_teacher(recipe, task=teacher_spec)

    def load_processor(self) -> None:
        """Load the tokenizers of the student and the teacher, and compare them.

        Raises:
            LoraError: If the teacher has other tokens, or a smaller maximum length.
        """
        super().load_processor()
        self.teacher.load_processor()
        with errors_of_teacher(self.recipe):
            self._require_same_tokens()
            max_length = self.teacher_task.max_length
            if max_length < self.max_length:
                what = f"it reads no more than {counted(max_length, 'token')}, and the student "
                hint = f"`--set task.max_length={max_length}`, or name a teacher that reads more"
                raise LoraError(f"{what}{self.max_length:,}", hint=hint)

    def _require_same_tokens(self) -> None:
        teacher_tokenizer, student_tokenizer = self.teacher_task.tokenizer, self.tokenizer
        teacher_vocabulary, student_vocabulary = (
            teacher_tokenizer.get_vocab(),
            student_tokenizer.get_vocab(),
        )
        differing = {
            token for token, i in student_vocabulary.items() if teacher_vocabulary.get(token) != i
        }
        differing |= teacher_vocabulary.keys() - student_vocabulary.keys()
        what = ""
        if differing:
            # the first by id, which is the easiest to find
            first = min(
                differing, key=lambda token: (student_vocabulary.get(token, math.inf), token)
            )
            there, here = (
                v.get(first, "no token") for v in (teacher_vocabulary, student_vocabulary)
            )
            what = f"its tokenizer differs from that of `{self.recipe.model.name}` in "
            what += f"{counted(len(differing), 'token')}: `{first}` is {there} there, {here} here"
        elif probe := next(
            (p for p in PROBE_TEXTS if _ids(teacher_tokenizer, p) != _ids(student_tokenizer, p)),
            None,
        ):
            what = f"its tokenizer divides a text otherwise than that of `{self.recipe.model.name}`"
            what += f": {probe!r}"
        if what:
            hint = "it has to read the same tokens: take a larger model of the same family"
            raise LoraError(what, hint=hint)

    @property
    def teacher_task(self) -> CausalLM:
        """The task of the teacher."""
        task = self.teacher.task
        assert isinstance(task, CausalLM)
        return task

    def cache_key(self) -> list[str]:
        """Return everything that an encoded row and the cached answers of the teacher depend on."""
        temperature = f"temperature {self.teacher.spec.temperature!r}"
        return [*super().cache_key(), *self.teacher.cache_key(), temperature]

    def encode_to_train(self, rows: Sequence[dict[str, Any]]) -> list[list[Example]]:
        """Return the examples of training rows, marked for the teacher."""
        return [[{**e, TAUGHT: 1} for e in examples] for examples in self.encode(rows)]

    def train_features(self) -> dict[str, str]:
        """Return the type of each key of a training example."""
        return {**self.features(), TAUGHT: "int8"}

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Return the examples as a batch, with the cached answers of the teacher, if any."""
        batch = super().collate(examples)
        if TAUGHT in examples[0]:
            batch.items[TEACHER] = batch.items[MAIN].clone()
        for key in (TOP_IDS, TOP_LOG_P) if TOP_IDS in examples[0] else ():
            batch.targets[key] = torch.cat([example[key] for example in examples])
        return batch

    def losses(
        self, model: nn.Module, output: HiddenStates | Tensor, batch: Batch
    ) -> dict[str, Tensor]:
        """Return the loss of the tokens, and in training the divergence from the teacher."""
        found = super().losses(model, output, batch)
        if TEACHER not in batch.items:
            return found
        answers = self._cached_answers(batch) or self.answers(batch)
        labels, positions = batch.targets["labels"], batch.targets["positions"]
        if isinstance(output, HiddenStates):
            trained = output.logits(output.states.flatten(0, 1).index_select(0, positions))
        else:
            trained = output.flatten(0, 1).index_select(0, positions)
        trained = trained[:, : self._n_tokens(trained)]
        losses = token_divergence(trained, answers, self.teacher.spec.temperature)
        by_token = losses.new_zeros(labels.numel()).index_copy(0, positions, losses)
        return found | {TEACHER: by_token.view(labels.shape).sum(1)}

    @staticmethod
    def _cached_answers(batch: Batch) -> TopTokens | None:
        found = [batch.targets.get(key) for key in (TOP_IDS, TOP_LOG_P)]
        return None if found[0] is None or found[1] is None else TopTokens(found[0], found[1])

    def _n_tokens(self, logits: Tensor) -> int:
        """Return the number of tokens to compare; embeddings may be padded to different sizes."""
        size = self.teacher_task.config.get_text_config().vocab_size
        return min(int(size), logits.shape[1])

    @torch.no_grad()
    def answers(self, batch: Batch) -> TopTokens:
        """Return the teacher's most likely tokens at each of the N trained positions."""
        logits = self.teacher_task.logits(self.teacher.model(), batch.inputs)
        trained = logits.flatten(0, 1).index_select(0, batch.targets["positions"])
        vocabulary_size = int(self.config.get_text_config().vocab_size)
        trained = trained[:, : min(vocabulary_size, trained.shape[1])]
        return top_tokens(trained, self.teacher.spec.temperature)

    def frozen_outputs(self, model: nn.Module, batch: Batch) -> Mapping[str, Sequence[Tensor]]:
        """Return the teacher's most likely tokens at the trained positions of each example."""
        sizes = batch.items[MAIN].long().tolist()
        answers = self.answers(batch)
        return {
            TOP_IDS: torch.split(answers.ids, sizes),
            TOP_LOG_P: torch.split(answers.log_p, sizes),
        }

    def packed(self, split: Any) -> Packed:
        """Return the examples of a split in packs, with the cached answers of the teacher."""
        return _DistilledPacks(self, split)

    def check_packing(self, model: nn.Module, split: Any) -> None:
        """Check that packed texts do not see each other, in the student and in the teacher."""
        super().check_packing(model, split)
        with errors_of_teacher(self.recipe):
            check_packing(self.teacher_task, self.teacher.model(), split)


class _DistilledPacks(Packed):
    """Packs in which the cached answers of the examples are concatenated."""

    def __getitem__(self, index: int) -> Example:
        examples = self.split.examples.__getitems__(self.packs[index])
        packed = {**one_row(examples), TAUGHT: 1}
        if TOP_IDS in examples[0]:
            cached = [restored(example) for example in examples]
            packed |= {k: torch.cat([e[k] for e in cached]) for k in (TOP_IDS, TOP_LOG_P)}
        return packed


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
