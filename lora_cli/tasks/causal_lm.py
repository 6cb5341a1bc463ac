"""Continue a text: language modelling, prompt and completion, or chat."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name for it
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lora_cli.errors import LoraError
from lora_cli.recipe import CausalLMSpec, Recipe
from lora_cli.tasks.base import IGNORED, Batch, Example, Prediction, Task, pad
from lora_cli.tasks.chat import read_messages, render


class CausalLM(Task):
    """`task.type: causal_lm`."""

    auto_class = AutoModelForCausalLM
    metric_channel = "nll"
    default_metrics = ("perplexity",)

    def __init__(self, recipe: Recipe, spec: CausalLMSpec) -> None:
        super().__init__(recipe)
        self.spec = spec
        self.is_chat = spec.messages_column is not None or spec.format == "alpaca"
        self.is_pair = spec.prompt_column is not None
        self.text_column = spec.text_column or "text"
        self.writes_answers = False

    def load_processor(self) -> None:
        """Load the tokenizer, the configuration and the chat template."""
        super().load_processor()
        if self.spec.chat_template is not None:
            file = Path(self.spec.chat_template)
            if not file.is_file():
                raise LoraError(f"there is no file {file}", self.recipe.at("task.chat_template"))
            self.tokenizer.chat_template = file.read_text(encoding="utf-8")
        if self.is_chat and not self.tokenizer.chat_template:
            raise LoraError(
                f"`{self.recipe.model.name}` has no chat template",
                self.recipe.at("task.messages_column"),
                "give one with `task.chat_template: FILE`, or use an instruction-tuned base",
            )
        if self.tokenizer.eos_token_id is None:
            raise LoraError("the tokenizer has no end-of-text token", self.recipe.at("model.name"))
        self._pad = self._pad_id()

    def _pad_id(self) -> int:
        """Return an id to fill rows with.

        Filled positions are masked by their position, never by their id, so the end of a text
        stays trained whichever id this is.
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
                )
            return int(token)
        candidates = (tokenizer.pad_token_id, tokenizer.unk_token_id, 0)
        return next(int(i) for i in candidates if i is not None and i != tokenizer.eos_token_id)

    # ------------------------------------------------------------------------------ rows

    def input_columns(self) -> dict[str, str]:
        """Return the column of the text, the prompt or the conversation."""
        spec = self.spec
        if spec.format == "alpaca":
            return {self.recipe.at("task.format"): "instruction"}
        if spec.messages_column:
            return {self.recipe.at("task.messages_column"): spec.messages_column}
        if spec.prompt_column:
            return {self.recipe.at("task.prompt_column"): spec.prompt_column}
        return {self.recipe.at("task.text_column"): self.text_column}

    def target_columns(self) -> dict[str, str]:
        """Return the column of the completion, where it has one of its own."""
        if self.spec.format == "alpaca":
            return {self.recipe.at("task.format"): "output"}
        if self.spec.completion_column:
            return {self.recipe.at("task.completion_column"): self.spec.completion_column}
        return {}

    def input_fault(self, row: dict[str, Any]) -> str:
        """Return what is wrong with the text or the prompt, or nothing."""
        if self.spec.messages_column:
            messages = read_messages(row, self.spec.format, self.spec.messages_column)
            return messages if isinstance(messages, str) else ""
        return self._blank(row, self.input_columns())

    def target_fault(self, row: dict[str, Any]) -> str:
        """Return what is wrong with the completion, or nothing."""
        return self._blank(row, self.target_columns())

    def _blank(self, row: dict[str, Any], columns: dict[str, str]) -> str:
        for column in columns.values():
            value = row.get(column)
            if value is None or (isinstance(value, str) and not value.strip()):
                return f"column `{column}` is blank"
            if not isinstance(value, str | int | float):
                return f"column `{column}` holds a {type(value).__name__}, not text"
        return ""

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[list[Example]]:
        """Return the examples of each row; those in which nothing is trained are left out."""
        if self.is_chat:
            return [self._encode_chat(row) for row in rows]
        if self.is_pair:
            return [self._encode_pair(row) for row in rows]
        texts = self.tokenizer([str(row[self.text_column]) for row in rows], verbose=False)
        return [self._windows(self._ended(ids)) for ids in texts["input_ids"]]

    def _ended(self, ids: list[int]) -> list[int]:
        """Return a text with its end-of-text token, so that the model learns to stop."""
        end = self.tokenizer.eos_token_id
        return ids if ids and ids[-1] == end else [*ids, end]

    def _windows(self, ids: list[int]) -> list[Example]:
        """Cut a text into examples of at most `max_length` tokens; nothing is thrown away."""
        size = self.max_length
        pieces = [ids[i : i + size] for i in range(0, len(ids), size)]
        # a single token has nothing to be predicted from
        return [{"input_ids": piece, "labels": piece} for piece in pieces if len(piece) > 1]

    def _encode_pair(self, row: dict[str, Any]) -> list[Example]:
        prompt = str(row[self.spec.prompt_column or ""]) + self.spec.separator
        completion = str(row[self.spec.completion_column or ""])
        start = self.tokenizer(prompt, verbose=False)["input_ids"]
        if start and start[-1] == self.tokenizer.eos_token_id:
            start = start[:-1]  # a tokenizer that ends texts itself: this one goes on
        whole = self.tokenizer(prompt + completion, verbose=False)["input_ids"]
        if whole[: len(start)] != start:
            # A token spans the border. Generation starts after the prompt's own tokens: train so.
            whole = start + self.tokenizer(completion, add_special_tokens=False)["input_ids"]
        whole = self._ended(whole)
        return self._trained_from(whole, [IGNORED] * len(start) + whole[len(start) :])

    def _encode_chat(self, row: dict[str, Any]) -> list[Example]:
        messages = read_messages(row, self.spec.format, self.spec.messages_column)
        assert not isinstance(messages, str)
        text, spans = render(self.tokenizer, messages, self.spec.train_on)
        encoding = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids = list(encoding["input_ids"])
        labels = [
            token if any(start < last and first < end for first, last in spans) else IGNORED
            for token, (start, end) in zip(ids, encoding["offset_mapping"], strict=True)
        ]
        end = self.tokenizer.eos_token_id
        if end not in labels:  # a template that does not end turns: the model must learn to stop
            ids.append(end)
            labels.append(end)
        return self._trained_from(ids, labels)

    def _trained_from(self, ids: list[int], labels: list[int]) -> list[Example]:
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        # the first token is predicted from nothing
        trained = any(label != IGNORED for label in labels[1:])
        return [{"input_ids": ids, "labels": labels}] if trained else []

    def features(self) -> dict[str, str]:
        """Return the type of the labels."""
        return {"labels": "list<int32>"}

    # --------------------------------------------------------------------------- batches

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Return the examples padded to the longest; an example may be a pack of several.

        Packed examples have positions that start again at 0 and no attention mask: with the cache
        off, transformers then builds a block mask, so that none attends to another.
        """
        ids = [example["input_ids"] for example in examples]
        labels = [[IGNORED, *example["labels"][1:]] for example in examples]
        inputs = {"input_ids": pad(ids, self._pad)}
        n_tokens = sum(len(sequence) for sequence in ids)
        if "position_ids" in examples[0]:
            # filled positions are a document of their own, so that every row is a whole pack
            width = inputs["input_ids"].shape[1]
            inputs["position_ids"] = torch.tensor(
                [
                    [*example["position_ids"], *range(width - len(example["position_ids"]))]
                    for example in examples
                ]
            )
        else:
            inputs["attention_mask"] = pad([[1] * len(sequence) for sequence in ids], 0)
        padded = pad(labels, IGNORED)
        n_items = float((padded != IGNORED).sum())
        return Batch(inputs, padded, n_items, n_tokens, [e["row"] for e in examples])

    def pack(self, examples: Sequence[Example]) -> Example:
        """Return several examples as one row; the first token of each is not predicted."""
        return {
            "input_ids": [token for e in examples for token in e["input_ids"]],
            "labels": [label for e in examples for label in [IGNORED, *e["labels"][1:]]],
            "position_ids": [i for e in examples for i in range(len(e["input_ids"]))],
            "row": examples[0]["row"],
        }

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the negative log-likelihood summed over the trained tokens."""
        logits = model(**batch.inputs, use_cache=False).logits[:, :-1]
        trained = batch.labels[:, 1:] != IGNORED
        # masked rows are dropped first: a float32 copy of all logits is what fills the memory
        return F.cross_entropy(
            logits[trained].float(), batch.labels[:, 1:][trained], reduction="sum"
        )

    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        """Return the negative log-likelihood of each example, and the answer if a metric asks."""
        logits = model(**batch.inputs, use_cache=False).logits
        predictions = []
        for i, row in enumerate(batch.rows):
            trained = batch.labels[i, 1:] != IGNORED
            loss = F.cross_entropy(
                logits[i, :-1][trained].float(), batch.labels[i, 1:][trained], reduction="sum"
            ).item()
            count = int(trained.sum())
            predictions.append(
                Prediction(row, loss, count, None, None, None, {"nll": (loss, count)})
            )
        if self.writes_answers:
            self._add_answers(model, batch, predictions)
        return predictions

    def check_metrics(self, channels: set[str]) -> None:
        """Let the model write answers, if a metric reads text."""
        self.writes_answers = "text" in channels
        if self.writes_answers and not (self.is_chat or self.is_pair):
            raise LoraError(
                "metrics of text need prompts to answer",
                self.recipe.at("evaluate.metrics"),
                "name `prompt_column` and `completion_column`, or `messages_column`",
            )

    def _add_answers(self, model: nn.Module, batch: Batch, predictions: list[Prediction]) -> None:
        """Let the model answer what stands before the last trained span of each example."""
        prompts, references = [], []
        for ids, labels in zip(
            batch.inputs["input_ids"].tolist(), batch.labels.tolist(), strict=True
        ):
            last = max(i for i, label in enumerate(labels) if label != IGNORED)
            first = last
            while first > 0 and labels[first - 1] != IGNORED:
                first -= 1
            prompts.append(ids[:first])
            references.append(
                self.tokenizer.decode(labels[first : last + 1], skip_special_tokens=True)
            )
        for prediction, answer, reference in zip(
            predictions, self.generate(model, prompts), references, strict=True
        ):
            prediction.prediction, prediction.reference = answer, reference
            prediction.metric_inputs["text"] = (answer, reference)

    def answer_columns(self) -> list[str]:
        """Return the column of the answer."""
        return ["prediction"]

    def answer(self, model: nn.Module, rows: Sequence[dict[str, Any]]) -> list[list[Any]]:
        """Return what the model says to each row's prompt, text or conversation."""
        return [[text] for text in self.generate(model, [self._prompt(row) for row in rows])]

    def _prompt(self, row: dict[str, Any]) -> list[int]:
        """Return the token ids of a row without its answer."""
        if self.is_chat:
            messages = self._question(row)
            text = str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True
                )
            )
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        (column,) = self.input_columns().values()
        ids = list(self.tokenizer(str(row[column]) + self.spec.separator)["input_ids"])
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def _question(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the turns before the assistant's last; a plain text is the user's turn."""
        column = self.spec.messages_column
        if column is not None and isinstance(row.get(column), str):
            return [{"role": "user", "content": row[column]}]
        row = {**row, "output": "-"} if self.spec.format == "alpaca" else row
        messages = read_messages(row, self.spec.format, column)
        assert not isinstance(messages, str)
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        return messages[:last]

    @torch.no_grad()
    def generate(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> list[str]:
        """Return what the model says after each prompt, as the recipe's generation section asks.

        Args:
            model: The model, in eval mode.
            prompts: Token ids of each prompt.
        """
        options = self.recipe.evaluate.generation
        device = next(model.parameters()).device
        width = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), width), self._pad)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):  # on the left, so that every answer starts at once
            ids[i, width - len(prompt) :] = torch.tensor(prompt)
            mask[i, width - len(prompt) :] = 1
        sampling: dict[str, Any] = {"do_sample": options.temperature > 0, "top_k": 0}
        if options.temperature > 0:
            sampling |= {"temperature": options.temperature, "top_p": options.top_p}
        output = model.generate(  # type: ignore[operator]  # transformers' generation mix-in
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=options.max_new_tokens,
            pad_token_id=self._pad,
            eos_token_id=self.tokenizer.eos_token_id,
            **sampling,
        )
        answers: list[str] = self.tokenizer.batch_decode(
            output[:, width:], skip_special_tokens=True
        )
        return answers
