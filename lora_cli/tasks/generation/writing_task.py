"""What tasks share whose model writes text: prompts that leave room, stop tokens, warnings."""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Sequence
from typing import Any

import torch.nn.functional as F  # noqa: N812 - the field's own name for it
from torch import Tensor, nn
from transformers import PretrainedConfig

from lora_cli.data.load_rows import Rows
from lora_cli.errors import LoraError, Problem, counted, printable, warn
from lora_cli.metrics import MetricContext, final_answer
from lora_cli.recipe import Recipe
from lora_cli.recipe.spec import GenerationSpec
from lora_cli.tasks.contract import Task
from lora_cli.tasks.examples import Batch, Example
from lora_cli.tasks.generation.output_head import Finish, HiddenStates, find_finish, hidden_states
from lora_cli.tasks.generation.text_generation import (
    Answer,
    base_generation_settings,
    generate,
    stop_ids,
    stop_note,
)
from lora_cli.tasks.texts.text_task import TextTask

SAMPLE_NEW_TOKENS = 64  # that are added to a sample
PATTERN_ROWS = 200  # of a split, in which a pattern of final answers is looked for
LAYER_DROP = ("encoder_layerdrop", "decoder_layerdrop", "layerdrop")


def layer_drop_of(config: PretrainedConfig) -> str | None:
    """Return a note of the keys by which a model would skip layers in training, if it would."""
    dropped = [f"`{key}`" for key in LAYER_DROP if getattr(config, key, 0)]
    if not dropped:
        return None
    verb = "are" if len(dropped) > 1 else "is"
    names = " and ".join(dropped)
    return f"{names} of the model {verb} set to 0: no layer is skipped in training"


def keep_all_layers(config: PretrainedConfig) -> PretrainedConfig:
    """Return a configuration, changed so that no layer is skipped at random."""
    for key in LAYER_DROP:
        if getattr(config, key, 0):
            setattr(config, key, 0.0)
    return config


def losses_of_tokens(
    output: HiddenStates | Tensor, labels: Tensor, positions: Tensor, ahead: int = 0
) -> Tensor:
    """Return the negative log-likelihood of each row's trained tokens, summed over them (B,).

    Args:
        output: Scores of tokens (B, T, V), or what they are computed from.
        labels: The token that is wanted at each place (B, T).
        positions: Places in the flattened rows whose logits are trained (N,). Only these are
            copied: a float32 copy of all logits is what fills the memory.
        ahead: How many places behind its logits a wanted token stands: 1 where a model predicts the
            next token of its own input.
    """
    wanted = labels.flatten().index_select(0, positions + ahead)
    if isinstance(output, HiddenStates):
        losses = output.losses(positions, wanted)
    else:
        trained = output.flatten(0, 1).index_select(0, positions).float()
        losses = F.cross_entropy(trained, wanted, reduction="none")
    by_token = losses.new_zeros(labels.numel()).index_copy(0, positions, losses)
    return by_token.view(labels.shape).sum(1)


class WritingTask(TextTask):
    """A task whose model answers with a text of its own."""

    pad: int
    """The id that fills rows."""
    prompt_name: str = "prompt"
    """What a text that is answered is called."""
    end_of_turn: Collection[int] = ()
    """Tokens that end an answer, besides the tokenizer's and the model's own."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.n_cut_answers = self.n_cut_prompts = 0  # since the last warning
        self._has_named_base_settings = False
        self.rows_to_answer: frozenset[int] | None = None  # of the split that is measured
        self.finish: Finish | None = None

    def check_trial(self, model: nn.Module, example: Example, logits: Tensor) -> None:
        """Find how the model's scores can be computed for some tokens at a time."""
        super().check_trial(model, example, logits)
        inputs = self.collate([example]).to(logits.device).inputs
        fits = self.recipe.train.kernels != "reference" and self.padding.side != "none"
        self.finish = find_finish(model, lambda: self.logits(model, inputs)) if fits else None

    def fit_as(self, other: Task) -> None:
        """Pad, and compute scores, as another instance of the task does."""
        super().fit_as(other)
        assert isinstance(other, WritingTask)
        self.finish = other.finish

    def forward(self, model: nn.Module, batch: Batch) -> HiddenStates | Tensor:  # type: ignore[override]
        """Return what the losses of tokens are computed from."""
        finish = self.finish if self.padding.side != "none" else None
        return hidden_states(model, finish, lambda: self.logits(model, batch.inputs))

    # -- what is measured of the answers

    @property
    def answer_pattern(self) -> str | None:
        """What finds the final answer in a text, if the recipe has it."""
        return getattr(self.recipe.task, "answer_pattern", None)

    @property
    def metric_names(self) -> Sequence[str]:
        """The recipe's metrics, or the task's own; with final answers, how many are missing too."""
        names = list(super().metric_names)
        if self.answer_pattern is None:
            return names
        if self.recipe.evaluate.metrics is None:
            names.insert(0, "exact_match")
        if "exact_match" in names and "no_answer" not in names:
            names.insert(names.index("exact_match") + 1, "no_answer")
        return names

    @property
    def metric_context(self) -> MetricContext:
        """What finds final answers, and of how many rows at most."""
        most = self.recipe.evaluate.generation.max_rows
        return MetricContext(answer_pattern=self.answer_pattern, max_answers=most)

    def metric_problems(self) -> list[Problem]:
        """Return what is wrong with the recipe's metrics; a pattern needs one that uses it."""
        problems = super().metric_problems()
        if self.answer_pattern is not None and "no_answer" not in self.metric_names:
            what = "`answer_pattern` is for `exact_match`, which is not measured"
            at = self.recipe.at("task.answer_pattern")
            problems.append(Problem(what, at, "add `exact_match` to `evaluate.metrics`"))
        return problems

    def wanted_texts(self, row: dict[str, Any]) -> list[str]:
        """Return the texts that a row wants, any of which is right; none if it is not known."""
        return []

    def learn_from(self, splits: dict[str, Rows]) -> None:
        """Check that the pattern of final answers finds one in some row that is measured.

        Raises:
            LoraError: If it finds none in the first rows of a split.
        """
        super().learn_from(splits)
        pattern = self.answer_pattern
        for name, rows in splits.items():
            if pattern is None or name == "train":
                continue
            first = [row for part in rows.parts for row in next(part.batches(PATTERN_ROWS))]
            wanted = [text for row in first for text in self.wanted_texts(row)]
            if wanted and all(final_answer(pattern, text) is None for text in wanted):
                what = f"`answer_pattern` finds no answer in what the {name} rows want, such as "
                what += f"`{printable(wanted[0][-60:])}`"
                hint = f"it is at {rows.place(0)}: write a pattern that matches a part of it"
                raise LoraError(what, self.recipe.at("task.answer_pattern"), hint)

    def choose_rows_to_answer(self, sizes: Sequence[int]) -> None:
        """Choose as many rows of each set as the recipe allows, spread evenly over it."""
        most = self.recipe.evaluate.generation.max_rows
        self.rows_to_answer = None
        if most is not None:
            starts = itertools.accumulate(sizes, initial=0)
            self.rows_to_answer = frozenset(
                start + size * i // min(most, size)
                for start, size in zip(starts, sizes, strict=False)
                for i in range(min(most, size))
            )

    def is_answered(self, row: int) -> bool:
        """Return whether the answer to a row is measured."""
        return self.rows_to_answer is None or row in self.rows_to_answer

    def answer_columns(self) -> dict[str, str]:
        """Return the column of the answer."""
        return {"prediction": "string"}

    @property
    def room_for_prompt(self) -> int | None:
        """Tokens that leave room for the longest answer, or for half of them; None is no limit."""
        if self.positions is None:
            return None
        longest = self.recipe.evaluate.generation.max_new_tokens
        return max(self.positions - longest, self.positions // 2)

    def require_room(self, prompt: Sequence[int]) -> None:
        """Reject a prompt that leaves no position for an answer.

        Raises:
            LoraError: If it does.
        """
        if not prompt:
            raise LoraError("the prompt is empty", "the prompt", "write some text")
        if self.positions is not None and len(prompt) >= self.positions:
            raise LoraError(
                f"the prompt has {counted(len(prompt), 'token')}, and the model takes "
                f"{self.positions:,}: no room is left for an answer",
                "the prompt",
                "shorten it, or cut its beginning: `--set task.truncate=left`",
            )

    def generate(
        self, model: nn.Module, prompts: Sequence[Sequence[int]], streamer: Any = None
    ) -> list[str]:
        """Return what the model says after each prompt, as the recipe's generation section asks.

        A streamer of transformers is given the tokens as they come; for it there is one prompt.

        Raises:
            LoraError: If a prompt leaves no room for an answer.
        """
        for prompt in prompts:
            self.require_room(prompt)
        options = self.recipe.evaluate.generation
        answers = self._written(model, prompts, options, streamer)
        self.n_cut_answers += sum(answer.is_cut for answer in answers)
        return [answer.text for answer in answers]

    def _written(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        options: GenerationSpec,
        streamer: Any = None,
    ) -> list[Answer]:
        self.warn_of_base_settings(model)
        stops, tokenizer = self.stop_ids(model), self.tokenizer
        return generate(
            model, prompts, tokenizer, options, self.pad, self.positions, stops, streamer
        )

    def base_settings(self, model: nn.Module) -> dict[str, Any]:
        """Return what the base's generation config asks for that the recipe does not."""
        return base_generation_settings(model)

    def warn_of_base_settings(self, model: nn.Module) -> None:
        """Say once what the base would have liked, as its makers measured it so."""
        is_first, self._has_named_base_settings = not self._has_named_base_settings, True
        settings_of_base = self.base_settings(model) if is_first else {}
        if settings_of_base and os.environ.get("RANK", "0") == "0":
            shown = ", ".join(f"{key} {value}" for key, value in settings_of_base.items())
            warn(
                f"the base's generation_config.json asks for {shown}; answers are written as "
                "`evaluate.generation` of the recipe says, without that"
            )
        if is_first and (note := self._stop_note(model)) and os.environ.get("RANK", "0") == "0":
            warn(note)

    def _stop_note(self, model: nn.Module) -> str:
        """Return which tokens end an answer, where the base's files name one that is surprising."""
        usual = {int(self.tokenizer.eos_token_id), *self.end_of_turn}
        return stop_note(self.tokenizer, self.stop_ids(model), usual)

    def take_warnings(self) -> list[str]:
        """Return what a user should know of the answers since the last call, each with a count."""
        lines = super().take_warnings()
        if self.n_cut_answers:
            lines.append(f"{counted(self.n_cut_answers, 'answer')} {self.cut_answers_note}")
        if self.n_cut_prompts:
            lines.append(f"{counted(self.n_cut_prompts, self.prompt_name)} {self.cut_prompts_note}")
        self.n_cut_answers = self.n_cut_prompts = 0
        return lines

    @property
    def cut_answers_note(self) -> str:
        """What is said of answers that end where the model's positions end."""
        return (
            f"ended where the model's {self.positions:,} tokens end, not by itself: shorter "
            "prompts leave more room"
        )

    @property
    def cut_prompts_note(self) -> str:
        """What is said of prompts that were cut."""
        return "lost the beginning, to leave room for the answer"

    def stop_ids(self, model: nn.Module) -> list[int]:
        """Return the tokens that end what the model says: of a text, or of its turn in a chat."""
        return stop_ids(model, self.tokenizer, self.end_of_turn)

    def continue_greedily(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> list[str]:
        """Return a short continuation of each prompt, the most likely token every time."""
        tokens = min(SAMPLE_NEW_TOKENS, self.recipe.evaluate.generation.max_new_tokens)
        answers = self._written(model, prompts, GenerationSpec(max_new_tokens=tokens))
        return [answer.text for answer in answers]
