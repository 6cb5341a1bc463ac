"""Generates one text from another: translation, summaries, data to text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM

from lora_cli.errors import Problem, counted
from lora_cli.metrics import MetricContext
from lora_cli.recipe import Recipe, Seq2SeqLMSpec
from lora_cli.recipe.spec import GenerationSpec
from lora_cli.recipe.spec.task_section import Truncation
from lora_cli.tasks.examples import IGNORED, MAIN, Batch, Example, Prediction
from lora_cli.tasks.generation.output_head import HiddenStates
from lora_cli.tasks.generation.seq2seq_generation import (
    DecodingSetup,
    decoder_inputs,
    first_decoder_token,
    generate_targets,
)
from lora_cli.tasks.generation.seq2seq_rows import SourceAndTargetTask
from lora_cli.tasks.generation.text_generation import Answer, base_generation_settings
from lora_cli.tasks.generation.text_pair_proposals import propose_pairs
from lora_cli.tasks.generation.writing_task import SAMPLE_NEW_TOKENS, sum_token_losses
from lora_cli.tasks.texts.padding import fill, mask_of
from lora_cli.tasks.texts.text_task import TRIAL_TEXT

TRIAL_TARGET = 24  # tokens of the longer target on which the model is tried


class Seq2SeqLM(SourceAndTargetTask):
    """`task.type: seq2seq_lm`."""

    auto_class = AutoModelForSeq2SeqLM
    metric_channel = "nll"
    loss_definition = "mean cross-entropy per token of the target, in nats"
    default_metrics = ("perplexity",)
    joins_examples = True  # a row with several references has several examples, but one answer
    propose = staticmethod(propose_pairs)

    def __init__(self, recipe: Recipe, spec: Seq2SeqLMSpec) -> None:
        super().__init__(recipe, spec)
        self.writes_answers = False

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Return the examples padded to the longest source and the longest target.

        Padding of targets is masked by its position, never by its id.
        """
        ids = [example["input_ids"] for example in examples]
        labels = fill([example["labels"] for example in examples], IGNORED, self.pad_multiple)
        inputs = {
            "input_ids": fill(ids, self.pad, self.pad_multiple, self.padding),
            "attention_mask": mask_of(ids, self.pad_multiple, self.padding),
            "labels": labels,
        }
        trained = labels != IGNORED
        targets = {
            "labels": labels,
            # computed here, since `nonzero` on a GPU would make the host wait
            "positions": trained.flatten().nonzero().squeeze(1),
            "first": torch.tensor([example.get("first", 1) for example in examples]),
        }
        items = {MAIN: trained.sum(1).float()}
        cost = sum(self.cost(example) for example in examples)
        return Batch(inputs, targets, items, cost, [example["row"] for example in examples])

    def logits(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Return the logits of the targets' tokens (B, T, V)."""
        inputs, n_written = dict(inputs), None
        if "labels" in inputs:
            n_written = (inputs["labels"] != IGNORED).sum(1).clamp(min=1).tolist()
            inputs["decoder_input_ids"] = decoder_inputs(model, inputs.pop("labels"))
        if self.padding.side != "none":
            scores: Tensor = model(**inputs, use_cache=False).logits
            return scores
        lengths = (
            inputs["attention_mask"].sum(1).tolist()
        )  # one row at a time; padding is on the right
        rows = []
        for i, length in enumerate(lengths):
            one = {key: value[i : i + 1] for key, value in inputs.items()}
            one |= {key: one[key][:, :length] for key in ("input_ids", "attention_mask")}
            width = n_read = one["decoder_input_ids"].shape[1]
            if (
                n_written is not None
            ):  # padding of the target may change its logits too (ProphetNet)
                n_read = n_written[i]
                one["decoder_input_ids"] = one["decoder_input_ids"][:, :n_read]
            found = model(**one, use_cache=False).logits
            rows.append(nn.functional.pad(found, (0, 0, 0, width - n_read)))
        return torch.cat(rows)

    def losses(
        self, model: nn.Module, output: HiddenStates | Tensor, batch: Batch
    ) -> dict[str, Tensor]:
        """Return the negative log-likelihood of each target (B,), summed over its tokens."""
        labels, positions = batch.targets["labels"], batch.targets["positions"]
        return {MAIN: sum_token_losses(output, labels, positions)}

    def predictions(
        self, model: nn.Module, output: HiddenStates | Tensor, batch: Batch
    ) -> list[Prediction]:
        """Return a prediction per example; the first of each row has the answer, if needed."""
        predictions = [Prediction(row, None, None) for row in batch.rows]
        if self.writes_answers:
            ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"] > 0
            answered_rows = [
                i
                for i, first in enumerate(batch.targets["first"].tolist())
                if first and self.is_answered(batch.rows[i])
            ]
            sources = [ids[i][mask[i]].tolist() for i in answered_rows]
            options = self.recipe.evaluate.generation
            texts = self.generate_texts(model, sources, options) if sources else []
            for i, text in zip(answered_rows, texts, strict=True):
                predictions[i].prediction = text
        return predictions

    def join(self, row: dict[str, Any], parts: Sequence[Prediction]) -> Prediction:
        """Return the predictions for the references of a row as one, with its only answer."""
        prediction, references = parts[0].prediction, self.references(row)
        reference = references if isinstance(row[self.spec.target_column], list) else references[0]
        joined = Prediction(parts[0].row, prediction, reference)
        if self.writes_answers and self.is_answered(joined.row):
            joined.metric_inputs["text"] = (prediction, reference)
        return joined

    def output_length(self, example: Example) -> int:
        """Return the number of tokens of an example that have logits."""
        return len(example["labels"])

    def trial_examples(self, length: int) -> tuple[Example, Example]:
        """Return a short source and target, and longer ones, to try the model on."""
        length = min(length, self.limit("source"))  # it counts the target too
        text = f"{TRIAL_TEXT} " * length
        frames = self.texts.source_frame, self.texts.target_frame
        read = self.texts.sources([text])[0], self.texts.targets([text])[0]
        whole = [ids[len(frame.before) :] for frame, ids in zip(frames, read, strict=True)]

        def example(*lengths: int) -> Example:
            ids, labels = (
                frame.around(inner[: max(n - len(frame), 1)])
                for frame, inner, n in zip(frames, whole, lengths, strict=True)
            )
            return {"input_ids": ids, "labels": labels, "row": 0}

        short = min(length, len(frames[0]) + 6)
        return example(short, 4), example(length, min(TRIAL_TARGET, self.limit("target")))

    def probe(self) -> dict[str, Tensor]:
        """Return fixed random tokens for the encoder and the decoder."""
        found = super().probe()
        start = getattr(self.config, "decoder_start_token_id", None)
        targets = found["input_ids"].flip(0)[:, :16].clone()
        targets[:, 0] = self.pad if start is None else start
        return {**found, "decoder_input_ids": targets}

    # --------------------------------------------------------------------------- answers

    def adjust_config(self, model: nn.Module) -> None:
        """Set the language code with which each target begins in the model's generation config.

        Answers here begin with it anyway; this is for users of the merged model.
        """
        config: Any = getattr(model, "generation_config", None)
        if config is not None and self.spec.target_language is not None:
            frame = self.texts.target_frame
            config.forced_bos_token_id = frame.before[0] if frame.before else None
            config.decoder_start_token_id = first_decoder_token(model, frame.around([]))

    @property
    def metric_context(self) -> MetricContext:
        """The facts that metrics need, such as whether rows have several references."""
        return replace(super().metric_context, several_references=self.has_several_references)

    def reference_texts(self, row: dict[str, Any]) -> list[str]:
        """Return the targets of a row."""
        return self.references(row)

    def check_metrics(self, channels: set[str]) -> None:
        """Turn on the generation of answers if a metric needs texts."""
        self.writes_answers = "text" in channels

    def base_settings(self, model: nn.Module) -> dict[str, Any]:
        """Return the settings in the base's generation config that are not used.

        A first token that is also the recipe's is left out.
        """
        found, begin = base_generation_settings(model), self.texts.target_frame.before
        return {k: v for k, v in found.items() if k != "forced_bos_token_id" or (v,) != begin[:1]}

    def generate_texts(
        self, model: nn.Module, sources: Sequence[Sequence[int]], options: GenerationSpec
    ) -> list[str]:
        """Return the texts that the model generates for sources, given as token ids."""
        self.warn_of_base_settings(model)
        frame, positions = self.texts.target_frame, self.positions_of("target")
        stops = self.stop_ids(model)
        setup = DecodingSetup(
            self.tokenizer, frame.before, frame.after, self.pad, self.padding, positions, stops
        )
        answers: list[Answer] = generate_targets(model, sources, options, setup)
        self.n_cut_answers += sum(answer.is_cut for answer in answers)
        return [answer.text for answer in answers]

    def answer(self, model: nn.Module, rows: Sequence[dict[str, Any]]) -> list[list[Any]]:
        """Return the text that the model generates for each row's source."""
        whole = self.texts.sources([str(row[self.spec.source_column]) for row in rows])
        sources = [self.texts.cut(ids, "source") for ids in whole]
        self.n_cut_prompts += sum(len(a) > len(b) for a, b in zip(whole, sources, strict=True))
        options = self.recipe.evaluate.generation
        return [[text] for text in self.generate_texts(model, sources, options)]

    def answer_problem(self, row: dict[str, Any]) -> Problem | None:
        """Return why a row cannot be answered, with a hint; None if it can."""
        if reason := self.input_error(row):
            return Problem(reason, hint=self.answer_hint)
        if self.spec.truncate_source in ("drop", "error"):
            length = len(self.texts.sources([str(row[self.spec.source_column])])[0])
            if length > self.limit("source"):
                what = f"it has {counted(length, 'token')}, more than {self.limit('source'):,}"
                return Problem(what, hint="cut it: `--set task.truncate_source=right`")
        return None

    def answer_error(self, row: dict[str, Any]) -> str:
        """Return why a row cannot be answered; empty if it can."""
        problem = self.answer_problem(row)
        return problem.what if problem else ""

    @property
    def cut_answers_note(self) -> str:
        """The warning about answers that end because the decoder has no more positions."""
        return f"ended where the decoder's {self.positions_of('target'):,} tokens end"

    @property
    def cut_prompts_note(self) -> str:
        """The warning about sources that were truncated."""
        end = "the beginning" if self.spec.truncate_source == "left" else "the end"
        limit = counted(self.limit("source"), "token")
        return f"lost {end}: more than {limit} (`task.max_source_length`)"

    def sample(
        self, model: nn.Module, rows: Sequence[dict[str, Any]]
    ) -> list[tuple[str, str, str]]:
        """Return the model's greedy answer to each row, with its source and reference."""
        sources_of_rows = [str(row[self.spec.source_column]) for row in rows]
        how: Truncation = "left" if self.spec.truncate_source == "left" else "right"
        sources = [
            self.texts.cut(ids, "source", how) for ids in self.texts.sources(sources_of_rows)
        ]
        tokens = min(SAMPLE_NEW_TOKENS, self.recipe.evaluate.generation.max_new_tokens)
        texts = self.generate_texts(model, sources, GenerationSpec(max_new_tokens=tokens))
        references = [self.shown_reference(row) or "" for row in rows]
        return list(zip(sources_of_rows, references, texts, strict=True))
