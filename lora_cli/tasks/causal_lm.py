"""Continue a text: language modelling, prompt and completion, or chat."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lora_cli.data.chat_formats import Message
from lora_cli.data.row_texts import readable_value
from lora_cli.data.unsupported_rows import unsupported
from lora_cli.errors import LoraError, Problem
from lora_cli.metrics import channel_of
from lora_cli.recipe import CausalLMSpec, Recipe, read_computation
from lora_cli.tasks.examples import IGNORED, MAIN, Batch, Encoded, Example, Field, Prediction
from lora_cli.tasks.generation import causal_lm_encoders
from lora_cli.tasks.generation.causal_lm_encoders import FORMATS, Chat, RowFormat
from lora_cli.tasks.generation.language_model_proposals import propose_writing
from lora_cli.tasks.generation.output_head import HiddenStates
from lora_cli.tasks.generation.packing import Packed, check_packing
from lora_cli.tasks.generation.text_generation import (
    REPLACEMENT,
    before_stop,
    decode,
)
from lora_cli.tasks.generation.writing_task import SAMPLE_NEW_TOKENS, WritingTask, sum_token_losses
from lora_cli.tasks.texts.marked_tokens import marked
from lora_cli.tasks.texts.padding import fill, mask_of, tolerance
from lora_cli.tasks.texts.text_task import TRIAL_TEXT

TRIAL_TOKENS = 64  # length of the longer text on which the model is tried


class CausalLM(WritingTask):
    """`task.type: causal_lm`."""

    spec: CausalLMSpec
    propose = staticmethod(propose_writing)
    auto_class = AutoModelForCausalLM
    metric_channel = "nll"
    loss_definition = "mean cross-entropy per trained token, in nats"
    default_metrics = ("perplexity",)
    rows: RowFormat
    forward_options = {"use_cache": False}
    looks_back_only = True
    can_fill_left = False  # causal attention never sees padding on the right

    def __init__(self, recipe: Recipe, spec: CausalLMSpec) -> None:
        super().__init__(recipe)
        self.spec = spec
        self.is_chat = spec.is_chat
        self.is_pair = spec.prompt_column is not None
        self.text_column = spec.text_column or "text"
        self.writes_answers = False

    def load_processor(self) -> None:
        """Load the tokenizer, the configuration and the chat template."""
        super().load_processor()
        if self.spec.chat_template is not None and not self._keeps_template():
            file = Path(self.spec.chat_template)
            if not file.is_file():
                hint = "a path in a recipe starts from the recipe's own folder"
                at = self.recipe.at("task.chat_template")
                raise LoraError(f"there is no file {file}", at, hint)
            self.tokenizer.chat_template = file.read_text(encoding="utf-8")
        if self.is_chat and not self.tokenizer.chat_template:
            raise LoraError(
                f"`{self.recipe.model.name}` has no chat template",
                self.recipe.at("task.messages_column"),
                "give one with `task.chat_template: FILE`, or use an instruction-tuned base",
            )
        if self.is_chat and not self.tokenizer.is_fast:
            what = "the tokenizer does not say where its tokens stand in a text, as chats need"
            hint = "use a model with a tokenizer.json, or rows of prompt and completion"
            raise LoraError(what, self.recipe.at("model.name"), hint)
        if self.tokenizer.eos_token_id is None:
            what, at = "the tokenizer has no end-of-text token", self.recipe.at("model.name")
            raise LoraError(what, at, "name it as `eos_token` in the model's tokenizer_config.json")
        kind = "chat" if self.is_chat else "pair" if self.is_pair else "text"
        self.rows = FORMATS[kind](self.spec, self.tokenizer, self.text_tokenizer, self.max_length)
        if isinstance(self.rows, Chat):
            self.end_of_turn = self.rows.template.end_of_turn
            self.control_tokens = self.rows.template.control
            if suffix := self.rows.template.prompt_only_suffix:
                self.notes.append(
                    f"the chat template asks for an answer with `{suffix.strip()}` and writes "
                    "answers without it: it is used neither in training nor in prediction"
                )
        self.pad = self._pad_id()
        if self.pad == self.tokenizer.eos_token_id and self.spec.pad_token is None:
            self.notes.append(
                f"the end-of-text token `{self.tokenizer.eos_token}` also fills the rows, where it "
                "is masked; it is trained where a text ends (`task.pad_token` names another)"
            )

    @property
    def reads_control_tokens(self) -> bool:
        """Whether control tokens written out in a text are read as tokens: never in chats."""
        return not (self.is_chat or self.spec.split_special_tokens)

    def _keeps_template(self) -> bool:
        """Return whether to use the chat template of a trained adapter, not the recipe's file."""
        is_overridden = self.recipe.is_overridden("task.chat_template")
        folder = self.trained_in
        return folder is not None and read_computation(folder) is not None and not is_overridden

    def _pad_id(self) -> int:
        """Return the id for padding.

        Padding is masked by its position, never by its id. So the end of a text is trained even if
        it has the same id.
        """
        tokenizer = self.tokenizer
        if self.spec.pad_token is not None:
            token = tokenizer.convert_tokens_to_ids(self.spec.pad_token)
            if token is None or (
                token == tokenizer.unk_token_id and self.spec.pad_token != tokenizer.unk_token
            ):
                raise LoraError(
                    f"the tokenizer has no token `{self.spec.pad_token}`",
                    self.recipe.at("task.pad_token"),
                    "name a token of its vocabulary that does not occur in the texts, or leave it "
                    "out",
                )
            return int(token)
        own = self.own_padding
        return int(tokenizer.eos_token_id) if own is None else own

    # ------------------------------------------------------------------------------ rows

    def fields(self) -> list[Field]:
        """Return the columns of a text, of a prompt and its completion, or of a conversation."""
        spec = self.spec
        if columns := spec.instruction_columns:
            return [
                Field("task.format", "instruction", "input", "text"),
                Field("task.format", columns[-1], "target", "text"),
            ]
        if spec.messages_column:
            return [Field("task.messages_column", spec.messages_column, "input", "messages")]
        if spec.prompt_column:
            return [
                Field("task.prompt_column", spec.prompt_column, "input", "text"),
                Field("task.completion_column", str(spec.completion_column), "target", "text"),
            ]
        return [Field("task.text_column", self.text_column, "input", "text")]

    def compared_columns(self) -> list[str]:
        """Return the columns of prompts and answers, since prompts can be the same in every row."""
        if columns := self.spec.instruction_columns:
            return [*columns, "history"]  # the same question may continue another conversation
        return [*self.input_columns().values(), *self.target_columns().values()]

    def input_error(self, row: dict[str, Any]) -> str:
        """Return what is wrong with the text or the prompt; empty if nothing is."""
        return causal_lm_encoders.input_error(row, self.spec, list(self.input_columns().values()))

    def target_error(self, row: dict[str, Any]) -> str:
        """Return what is wrong with the completion; empty if nothing is."""
        return causal_lm_encoders.target_error(row, self.spec, list(self.target_columns().values()))

    def more_text_columns(self) -> list[str]:
        """Return the columns of answers, and those whose texts are inserted into a conversation."""
        more = ["system", "tools", "functions", "history"] if self.is_chat else []
        return [*self.target_columns().values(), *self.spec.instruction_columns, *more]

    def unsupported(self, row: dict[str, Any]) -> tuple[str, str] | None:
        """Return an error and a hint for a row with answers that the recipe does not read.

        Rows of plain text may have any other columns.
        """
        return unsupported(row) if self.is_chat or self.is_pair else None

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[list[Example]]:
        """Return the examples of each row, except those in which nothing is trained."""
        return self.rows.encode(rows)

    def why_nothing(self, row: dict[str, Any]) -> str:
        """Return a hint for a row in which nothing is trained."""
        return self.rows.why_nothing(row)

    def features(self) -> dict[str, str]:
        """Return the types of the tokens and the labels."""
        return {"input_ids": "list<int32>", "labels": "list<int32>"}

    def trial_examples(self, length: int) -> tuple[Example, Example]:
        """Return a short example and a longer one, to try the model on."""
        text = TRIAL_TEXT * TRIAL_TOKENS
        ids = list(self.tokenizer(text, verbose=False)["input_ids"])[: min(TRIAL_TOKENS, length)]
        start = ids[: max(min(7, len(ids) // 2), 2)]
        return (
            {"input_ids": start, "labels": start, "row": 0},
            {"input_ids": ids, "labels": ids, "row": 0},
        )

    def check_trial(self, model: nn.Module, example: Example, logits: Tensor) -> None:
        """Check that the model cannot see the tokens that it has to predict.

        Raises:
            LoraError: If changing the last token changes the predictions before it.
        """
        super().check_trial(model, example, logits)
        *others, last = example["input_ids"]
        other = int(last == 0)  # any other token
        inputs = self.collate([{**example, "input_ids": [*others, other]}])
        device = next(model.parameters()).device
        changed = self.logits(model, inputs.to(device).inputs)[0]
        difference = float((changed[: len(others)] - logits[: len(others)]).abs().max())
        if difference > tolerance(logits, 0.0, logits.dtype):
            raise LoraError(
                "this model sees the tokens that it has to predict",
                self.recipe.at("model.name"),
                "it is an encoder: take a decoder such as GPT-2, Llama or Qwen, or set "
                "`is_decoder` to true in its config.json",
            )

    # --------------------------------------------------------------------------- batches

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Return the examples padded to the longest one. An example may be a pack of several texts.

        In a pack, positions restart at 0 for each text, and there is no attention mask. Without a
        cache, transformers then builds a block-diagonal mask, so that no text sees another.
        """
        ids = [example["input_ids"] for example in examples]
        inputs = {"input_ids": fill(ids, self.pad, self.pad_multiple)}
        n_tokens = sum(len(sequence) for sequence in ids)
        if "position_ids" in examples[0]:
            # padding is treated as another text
            width = inputs["input_ids"].shape[1]
            positions = [example["position_ids"] for example in examples]
            positions = [np.append(row, np.arange(width - len(row))) for row in positions]
            inputs["position_ids"] = torch.from_numpy(np.stack(positions))
        elif self.padding.mask:
            inputs["attention_mask"] = mask_of(ids, self.pad_multiple)
        padded = fill([example["labels"] for example in examples], IGNORED, self.pad_multiple)
        padded[:, 0] = IGNORED  # there is nothing to predict the first token from
        # computed on the host, since on the device it would need a synchronisation
        trained = padded[:, 1:] != IGNORED
        row, column = trained.nonzero(as_tuple=True)
        targets = {"labels": padded, "positions": row * padded.shape[1] + column}
        items = {MAIN: trained.sum(1).float()}
        return Batch(inputs, targets, items, n_tokens, [e["row"] for e in examples])

    def losses(
        self, model: nn.Module, output: HiddenStates | Tensor, batch: Batch
    ) -> dict[str, Tensor]:
        """Return the negative log-likelihood of each example, summed over its trained tokens."""
        labels, positions = batch.targets["labels"], batch.targets["positions"]
        return {MAIN: sum_token_losses(output, labels, positions, shift=1)}

    def predictions(
        self, model: nn.Module, output: HiddenStates | Tensor, batch: Batch
    ) -> list[Prediction]:
        """Return the answer to each example, if a metric needs it."""
        predictions = [Prediction(row, None, None) for row in batch.rows]
        if self.writes_answers:
            self._add_answers(model, batch, predictions)
        return predictions

    def packed(self, split: Encoded) -> Packed:
        """Return the examples of a split in packs of several."""
        return Packed(self, split)

    def check_packing(self, model: nn.Module, split: Encoded) -> None:
        """Check that packed texts do not see each other."""
        check_packing(self, model, split)

    def shown(self, example: Example, colour: bool) -> tuple[list[str], str]:
        """Return the text of an encoded example, with the trained tokens marked."""
        # there is nothing to predict the first token from
        trained = [i > 0 and label != IGNORED for i, label in enumerate(example["labels"])]
        return [], marked(self.tokenizer, example["input_ids"], trained, colour)

    def shown_reference(self, row: dict[str, Any]) -> str | None:
        """Return the completion of a row."""
        return readable_value([row.get(c) for c in self.target_columns().values()]) or None

    def reference_texts(self, row: dict[str, Any]) -> list[str]:
        """Return the last answer of each conversation, or the completion."""
        if not self.is_chat:
            return [str(row[column]) for column in self.target_columns().values()]
        last = [one.messages[-1] for one in causal_lm_encoders.conversations_of(row, self.spec)]
        return [str(m.get("content") or "") for m in last if m["role"] == "assistant"]

    def trained_share(self, split: Encoded) -> float:
        """Return the share of tokens that are trained; the first of an example never is."""
        trained = 0
        for labels in split.examples.data.column("labels").chunks:
            values = labels.flatten().to_numpy(zero_copy_only=False) != IGNORED
            starts = labels.offsets.to_numpy()[:-1] - labels.offsets[0].as_py()
            trained += int(values.sum()) - int(values[starts].sum())
        return trained / int(split.lengths.sum())

    def check_metrics(self, channels: set[str]) -> None:
        """Note whether the model has to write answers, because a metric compares texts."""
        self.writes_answers = "text" in channels

    def metric_problems(self) -> list[Problem]:
        """Return what is wrong with the recipe's metrics; those of texts need an answer."""
        problems = super().metric_problems()
        of_text = [name for name in self.metric_names if channel_of(name) == "text"]
        at = self.recipe.at("evaluate.metrics")
        if of_text and not (self.is_chat or self.is_pair):
            hint = "name `prompt_column` and `completion_column`, or `messages_column`"
            problems.append(Problem(f"metric `{of_text[0]}` needs prompts to answer", at, hint))
        elif of_text and self.is_chat and self.spec.train_on == "all":
            what = f"metric `{of_text[0]}` reads the assistant's answer, not all turns"
            problems.append(Problem(what, at, "set `task.train_on` to `assistant` or `last`"))
        return problems

    def _add_answers(self, model: nn.Module, batch: Batch, predictions: list[Prediction]) -> None:
        """Generate an answer to the text before the last trained span of each example."""
        prompts, references, stops = [], [], self.stop_ids(model)
        answered_rows = [i for i, row in enumerate(batch.rows) if self.is_answered(row)]
        for ids, labels in (
            (batch.inputs["input_ids"][i].tolist(), batch.targets["labels"][i].tolist())
            for i in answered_rows
        ):
            last = max(i for i, label in enumerate(labels) if label != IGNORED)
            first = last
            while labels[first - 1] != IGNORED:  # stops at the first token at the latest
                first -= 1
            prompts.append(ids[:first])
            span = labels[first : last + 1]
            reference_ids = before_stop(span, stops)
            references.append(decode(self.tokenizer, reference_ids, is_cut=reference_ids == span))
        answers = self.generate(model, prompts) if prompts else []
        for i, answer, reference in zip(answered_rows, answers, references, strict=True):
            prediction = predictions[i]
            prediction.prediction, prediction.reference = answer, reference
            prediction.metric_inputs["text"] = (answer, reference)

    # --------------------------------------------------------------------------- answers

    def answer(self, model: nn.Module, rows: Sequence[dict[str, Any]]) -> list[list[Any]]:
        """Return the model's answer to each row's prompt, text or conversation."""
        whole = [self.rows.prompt(row) for row in rows]
        prompts = [self.shortened(prompt) for prompt in whole]
        self.n_cut_prompts += sum(len(a) > len(b) for a, b in zip(whole, prompts, strict=True))
        return [[text] for text in self.generate(model, prompts)]

    def parse_input(self, typed: str) -> dict[str, Any]:
        """Return a row with a typed text, which in a chat is the user's turn."""
        if not self.is_chat or self.spec.instruction_columns:
            return super().parse_input(typed)
        turn = {"role": "user", "content": typed}
        if self.spec.format == "sharegpt":
            turn = {"from": "human", "value": typed}
        if self.spec.format == "pairs":
            turn = {"human": typed, "assistant": ""}
        return {str(self.spec.messages_column): [turn]}

    def answer_error(self, row: dict[str, Any]) -> str:
        """Return why a row cannot be answered; empty if it can."""
        problem = self.answer_problem(row)
        return problem.what if problem else ""

    def answer_problem(self, row: dict[str, Any]) -> Problem | None:
        """Return why a row cannot be answered, with a hint; None if it can."""
        if reason := self.input_error(row):
            return Problem(reason, hint=self.answer_hint)
        try:
            self.require_room(self.prompt(row))
        except LoraError as error:
            return error.problems[0]
        return None

    def prompt(self, row: dict[str, Any]) -> list[int]:
        """Return the token ids of a row without its answer, shortened if the recipe allows it.

        Raises:
            LoraError: If there is no turn to answer, or the template rejects the conversation.
        """
        return self.shortened(self.rows.prompt(row))

    def text_prompt(self, text: str) -> list[int]:
        """Return the token ids of a typed text, for the model to continue."""
        return self.prompt(self.parse_input(text))

    def chat_prompt(self, messages: list[Message]) -> list[int]:
        """Return the token ids of a conversation, for the assistant to continue."""
        assert isinstance(self.rows, Chat)
        return self.rows.encode_chat(messages)

    def shortened(self, prompt: list[int]) -> list[int]:
        """Return a prompt, without its beginning if it is too long and the recipe allows that."""
        room = self.room_for_prompt
        if room is None or self.spec.truncate != "left":
            return prompt
        return self.rows.keep_last_tokens(prompt, min(room, len(prompt)))

    @property
    def writer(self) -> CausalLM:
        """The task itself: its model writes text."""
        return self

    def sample(
        self, model: nn.Module, rows: Sequence[dict[str, Any]]
    ) -> list[tuple[str, str, str]]:
        """Return the model's greedy continuation of each row."""
        prompts = [self.sample_prompt(row) for row in rows]
        written = self.continue_greedily(model, [ids for ids, _, _ in prompts])
        return [
            (shown, reference, text)
            for (_, shown, reference), text in zip(prompts, written, strict=True)
        ]

    def sample_prompt(self, row: dict[str, Any]) -> tuple[list[int], str, str]:
        """Return the prompt of a sample as token ids and as text, and the reference."""
        ids, reference = self.rows.sample(row)
        room = self.max_length
        if self.positions is not None:  # the continuation takes positions too
            room = min(room, max(self.positions - SAMPLE_NEW_TOKENS, self.positions // 2))
        last = ids[-room:]
        shown = str(self.tokenizer.decode(last, skip_special_tokens=not self.is_chat))
        return last, shown if last == ids else shown.lstrip(REPLACEMENT), reference
