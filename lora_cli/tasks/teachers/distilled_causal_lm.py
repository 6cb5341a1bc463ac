"""A language model that learns from a teacher with the same tokens."""

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
from lora_cli.tasks.teachers.distilled_task import READS, TEACHER, DistilledTask
from lora_cli.tasks.teachers.teacher import errors_of_teacher, open_teacher

TOP_IDS, TOP_LOG_P = f"{READS}top_ids", f"{READS}top_log_p"
TAUGHT = "taught"  # marks the examples that a teacher answers
PROBES = (
    "The cat sat on the mat.", "  two spaces,\n\ta tab and 1234567890 digits",
    "Größe, naïve café — “quotes” … 日本語 и русский", "def f(x):\n    return x ** 2  # code",
)  # fmt: skip


class DistilledCausalLM(DistilledTask, CausalLM):
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
            trained = output.logits(output.states.flatten(0, 1).index_select(0, positions))
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
        return _DistilledPacks(self, split)

    def check_packing(self, model: nn.Module, split: Any) -> None:
        """Check that neither the student nor the teacher lets packed texts see each other."""
        super().check_packing(model, split)
        with errors_of_teacher(self.recipe):
            check_packing(self.reader_of_teacher, self.teacher.model(), split)


class _DistilledPacks(Packed):
    """Packs whose members' answers stand one after another."""

    def __getitem__(self, index: int) -> Example:
        examples = self.split.examples.__getitems__(self.packs[index])
        found = {**one_row(examples), TAUGHT: 1}
        if TOP_IDS in examples[0]:
            kept = [restored(example) for example in examples]
            found |= {k: torch.cat([e[k] for e in kept]) for k in (TOP_IDS, TOP_LOG_P)}
        return found


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
