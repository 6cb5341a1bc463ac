"""The base class of tasks that generate text: lengths of prompts, stop tokens, warnings."""

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
from lora_cli.tasks.generation.output_head import (
    HiddenStates,
    LogitTransform,
    find_logit_transform,
    hidden_states,
)
from lora_cli.tasks.generation.text_generation import (
    Answer,
    base_generation_settings,
    generate,
    stop_ids,
    stop_note,
)
from lora_cli.tasks.texts.text_task import TextTask

SAMPLE_NEW_TOKENS = 64  # the longest continuation in a sample
N_PATTERN_ROWS = 200  # rows of each split on which `answer_pattern` is tried
LAYER_DROP_KEYS = ("encoder_layerdrop", "decoder_layerdrop", "layerdrop")


def layer_drop_of(config: PretrainedConfig) -> str | None:
    """Return a note that names the LayerDrop settings of a model; None if it skips no layers."""
    dropped = [f"`{key}`" for key in LAYER_DROP_KEYS if getattr(config, key, 0)]
    if not dropped:
        return None
    verb = "are" if len(dropped) > 1 else "is"
    names = " and ".join(dropped)
    return f"{names} of the model {verb} set to 0: no layer is skipped in training"


def keep_all_layers(config: PretrainedConfig) -> PretrainedConfig:
    """Turn off LayerDrop in a model's configuration, and return it."""
    for key in LAYER_DROP_KEYS:
        if getattr(config, key, 0):
            setattr(config, key, 0.0)
    return config


def sum_token_losses(
    output: HiddenStates | Tensor, labels: Tensor, positions: Tensor, shift: int = 0
) -> Tensor:
    """Return the sum of the negative log-likelihoods of each row's trained tokens (B,).

    Args:
        output: The logits (B, T, V), or the hidden states before them.
        labels: The target tokens (B, T).
        positions: The positions in the flattened rows whose logits are trained (N,). Only these
            are copied, since a float32 copy of all logits would need too much memory.
        shift: The position of a target minus that of its logits: 1 if the model predicts the next
            token of its own input.
    """
    targets = labels.flatten().index_select(0, positions + shift)
    if isinstance(output, HiddenStates):
        losses = output.losses(positions, targets)
    else:
        trained = output.flatten(0, 1).index_select(0, positions).float()
        losses = F.cross_entropy(trained, targets, reduction="none")
    by_token = losses.new_zeros(labels.numel()).index_copy(0, positions, losses)
    return by_token.view(labels.shape).sum(1)


class WritingTask(TextTask):
    """A task whose model generates text."""

    pad: int
    """The token id for padding."""
    prompt_name: str = "prompt"
    """The word for an input text in warnings."""
    end_of_turn: Collection[int] = ()
    """Tokens that end an answer, besides those of the tokenizer and of the model's files."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.n_cut_answers = self.n_cut_prompts = 0  # since the last warning
        self._has_warned = False
        self.rows_to_answer: frozenset[int] | None = None  # of the evaluated split; None is all
        self.logit_transform: LogitTransform | None = None

    def check_trial(self, model: nn.Module, example: Example, logits: Tensor) -> None:
        """Find out whether the model's logits can be computed for a few tokens at a time."""
        super().check_trial(model, example, logits)
        inputs = self.collate([example]).to(logits.device).inputs
        fits = self.recipe.train.kernels != "reference" and self.padding.side != "none"
        self.logit_transform = (
            find_logit_transform(model, lambda: self.logits(model, inputs)) if fits else None
        )

    def fit_as(self, other: Task) -> None:
        """Adopt the padding and the computation of logits of another instance of the task."""
        super().fit_as(other)
        assert isinstance(other, WritingTask)
        self.logit_transform = other.logit_transform

    def forward(self, model: nn.Module, batch: Batch) -> HiddenStates | Tensor:  # type: ignore[override]
        """Return the hidden states from which the losses are computed, or all logits."""
        logit_transform = self.logit_transform if self.padding.side != "none" else None
        return hidden_states(model, logit_transform, lambda: self.logits(model, batch.inputs))

    # -- metrics of the answers

    @property
    def answer_pattern(self) -> str | None:
        """The recipe's regular expression that finds the final answer in a text, if any."""
        return getattr(self.recipe.task, "answer_pattern", None)

    @property
    def metric_names(self) -> Sequence[str]:
        """The recipe's metrics, or the task's defaults; `no_answer` is added to `exact_match`."""
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
        """The pattern of final answers, and the maximum number of rows to generate answers for."""
        max_rows = self.recipe.evaluate.generation.max_rows
        return MetricContext(answer_pattern=self.answer_pattern, max_answers=max_rows)

    def metric_problems(self) -> list[Problem]:
        """Return the errors in the recipe's metrics, such as a pattern that no metric uses."""
        problems = super().metric_problems()
        if self.answer_pattern is not None and "no_answer" not in self.metric_names:
            what = "`answer_pattern` is for `exact_match`, which is not measured"
            at = self.recipe.at("task.answer_pattern")
            problems.append(Problem(what, at, "add `exact_match` to `evaluate.metrics`"))
        return problems

    def reference_texts(self, row: dict[str, Any]) -> list[str]:
        """Return the reference texts of a row, each of which is correct; empty if it has none."""
        return []

    def learn_from(self, splits: dict[str, Rows]) -> None:
        """Check that the pattern of final answers matches some of the references.

        Raises:
            LoraError: If it matches no reference in the first rows of an evaluated split.
        """
        super().learn_from(splits)
        pattern = self.answer_pattern
        for name, rows in splits.items():
            if pattern is None or name == "train":
                continue
            first = [row for part in rows.parts for row in next(part.batches(N_PATTERN_ROWS))]
            references = [text for row in first for text in self.reference_texts(row)]
            if references and all(final_answer(pattern, text) is None for text in references):
                what = f"`answer_pattern` finds no answer in the references of the {name} rows, "
                what += f"such as `{printable(references[0][-60:])}`"
                hint = f"it is at {rows.place(0)}: write a pattern that matches a part of it"
                raise LoraError(what, self.recipe.at("task.answer_pattern"), hint)

    def choose_rows_to_answer(self, sizes: Sequence[int]) -> None:
        """Choose the rows to generate answers for: at most `max_rows` of each set, evenly spaced.

        Args:
            sizes: The number of rows of each data set of the split.
        """
        max_rows = self.recipe.evaluate.generation.max_rows
        self.rows_to_answer = None
        if max_rows is not None:
            starts = itertools.accumulate(sizes, initial=0)
            self.rows_to_answer = frozenset(
                start + size * i // min(max_rows, size)
                for start, size in zip(starts, sizes, strict=False)
                for i in range(min(max_rows, size))
            )

    def is_answered(self, row: int) -> bool:
        """Return whether an answer to a row is generated and measured."""
        return self.rows_to_answer is None or row in self.rows_to_answer

    def answer_columns(self) -> dict[str, str]:
        """Return the column of the answer."""
        return {"prediction": "string"}

    @property
    def room_for_prompt(self) -> int | None:
        """The most tokens that a prompt may have, to leave room for an answer; None for no limit.

        The longest answer gets its room, but at most half of the model's positions.
        """
        if self.positions is None:
            return None
        longest = self.recipe.evaluate.generation.max_new_tokens
        return max(self.positions - longest, self.positions // 2)

    def require_room(self, prompt: Sequence[int]) -> None:
        """Check that a prompt is not empty and leaves at least one position for an answer.

        Raises:
            LoraError: If it is empty or too long.
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
        """Return the model's answer to each prompt, generated with the recipe's settings.

        Args:
            model: The model, in eval mode.
            prompts: The token ids of each prompt.
            streamer: A streamer of transformers, which receives the tokens as they are generated.
                It works with a single prompt only.

        Raises:
            LoraError: If a prompt leaves no room for an answer.
        """
        for prompt in prompts:
            self.require_room(prompt)
        options = self.recipe.evaluate.generation
        answers = self._answers(model, prompts, options, streamer)
        self.n_cut_answers += sum(answer.is_cut for answer in answers)
        return [answer.text for answer in answers]

    def _answers(
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
        """Return the settings in the base's generation config that are not used."""
        return base_generation_settings(model)

    def warn_of_base_settings(self, model: nn.Module) -> None:
        """Warn once about settings in the base's files that would change the answers."""
        is_first, self._has_warned = not self._has_warned, True
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
        """Return a note of the tokens that end an answer if the base's files name unusual ones."""
        usual = {int(self.tokenizer.eos_token_id), *self.end_of_turn}
        return stop_note(self.tokenizer, self.stop_ids(model), usual)

    def take_warnings(self) -> list[str]:
        """Return the warnings about the answers since the last call, each with a count."""
        lines = super().take_warnings()
        if self.n_cut_answers:
            lines.append(f"{counted(self.n_cut_answers, 'answer')} {self.cut_answers_note}")
        if self.n_cut_prompts:
            lines.append(f"{counted(self.n_cut_prompts, self.prompt_name)} {self.cut_prompts_note}")
        self.n_cut_answers = self.n_cut_prompts = 0
        return lines

    @property
    def cut_answers_note(self) -> str:
        """The warning about answers that end because the model has no more positions."""
        return (
            f"ended where the model's {self.positions:,} tokens end, not by itself: shorter "
            "prompts leave more room"
        )

    @property
    def cut_prompts_note(self) -> str:
        """The warning about prompts that were cut."""
        return "lost the beginning, to leave room for the answer"

    def stop_ids(self, model: nn.Module) -> list[int]:
        """Return the tokens that end an answer: the end of a text, or of a turn in a chat."""
        return stop_ids(model, self.tokenizer, self.end_of_turn)

    def continue_greedily(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> list[str]:
        """Return a short continuation of each prompt, always with the most likely token."""
        tokens = min(SAMPLE_NEW_TOKENS, self.recipe.evaluate.generation.max_new_tokens)
        answers = self._answers(model, prompts, GenerationSpec(max_new_tokens=tokens))
        return [answer.text for answer in answers]
