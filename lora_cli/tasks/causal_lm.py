"""Continue a text: language modelling, prompt and completion, or chat."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name for it
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lora_cli.data.files import text_fault
from lora_cli.errors import LoraError, Problem
from lora_cli.metrics import reads
from lora_cli.recipe import CausalLMSpec, Recipe
from lora_cli.recipe.spec import GenerationSpec
from lora_cli.tasks.base import IGNORED, Batch, Example, Prediction, Task, pad
from lora_cli.tasks.chat import (
    Message,
    encode_chat,
    end_of_turn,
    opened_block,
    prompt_of,
    read_conversations,
)
from lora_cli.tasks.generation import (
    REPLACEMENT,
    decode,
    generate,
    stop_ids,
    until_stop,
    whole_characters,
)

SAMPLE_TOKENS, SAMPLE_NEW_TOKENS = 16, 64  # of a plain text that is continued; of what is added


class CausalLM(Task):
    """`task.type: causal_lm`."""

    auto_class = AutoModelForCausalLM
    metric_channel = "nll"
    loss_definition = "mean cross-entropy per trained token, in nats"
    default_metrics = ("perplexity",)

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
        if self.spec.chat_template is not None:
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
            hint = "take a model with a tokenizer.json, or rows of prompt and completion"
            raise LoraError(what, self.recipe.at("model.name"), hint)
        if self.tokenizer.eos_token_id is None:
            what, at = "the tokenizer has no end-of-text token", self.recipe.at("model.name")
            raise LoraError(what, at, "name it as `eos_token` in the model's tokenizer_config.json")
        self._end_of_turn = end_of_turn(self.tokenizer) if self.is_chat else set()
        self._opened = opened_block(self.tokenizer) if self.is_chat else ""
        if self._opened:
            self.notes.append(
                f"the chat template asks for an answer with `{self._opened.strip()}` and writes "
                "answers without it: so they are trained, and so they are asked for"
            )
        self._pad = self._pad_id()
        if self._pad == self.tokenizer.eos_token_id and self.spec.pad_token is None:
            self.notes.append(
                f"the end-of-text token `{self.tokenizer.eos_token}` also fills the rows, where it "
                "is masked; it is trained where a text ends (`task.pad_token` names another)"
            )

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
                    "name a token of its vocabulary that texts do not hold, or leave it out",
                )
            return int(token)
        return int(
            tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        )

    # ------------------------------------------------------------------------------ rows

    def input_columns(self) -> dict[str, str]:
        """Return the column of the text, the prompt or the conversation."""
        spec = self.spec
        if spec.instruction_columns:
            return {self.recipe.at("task.format"): "instruction"}
        if spec.messages_column:
            return {self.recipe.at("task.messages_column"): spec.messages_column}
        if spec.prompt_column:
            return {self.recipe.at("task.prompt_column"): spec.prompt_column}
        return {self.recipe.at("task.text_column"): self.text_column}

    def target_columns(self) -> dict[str, str]:
        """Return the column of the completion, where it has one of its own."""
        if columns := self.spec.instruction_columns:
            return {self.recipe.at("task.format"): columns[-1]}
        if self.spec.completion_column:
            return {self.recipe.at("task.completion_column"): self.spec.completion_column}
        return {}

    def input_fault(self, row: dict[str, Any]) -> str:
        """Return what is wrong with the text or the prompt, or nothing."""
        by_column = bool(self.spec.instruction_columns) or not self.is_chat
        if by_column and (fault := text_fault(row, self.input_columns().values())):
            return fault
        conversations = self._conversations(row) if self.is_chat else ""
        return conversations if isinstance(conversations, str) else ""

    def target_fault(self, row: dict[str, Any]) -> str:
        """Return what is wrong with the completion, or nothing."""
        several = self.spec.format == "self_instruct"
        if not several and (fault := text_fault(row, self.target_columns().values())):
            return fault
        if not self.is_chat:
            return ""
        conversations = self._conversations(row)
        if isinstance(conversations, str):
            return conversations
        answered = [any(m["role"] == "assistant" for m in turns) for turns in conversations]
        if all(answered):
            return ""
        if several:
            return f"instance {answered.index(False) + 1} has no `output`"
        return "no turn is the assistant's"

    def _conversations(self, row: dict[str, Any]) -> list[list[Message]] | str:
        return read_conversations(row, self.spec.format, self.spec.messages_column)

    def _messages(self, row: dict[str, Any]) -> list[Message]:
        """Return the conversation of a row without a fault, or the first of several."""
        messages = self._conversations(row)[0]
        assert isinstance(messages, list)
        return messages

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[list[Example]]:
        """Return the examples of each row; those in which nothing is trained are left out."""
        if self.is_chat:
            conversations = map(self._conversations, rows)
            return [list(chain(*map(self._encode_chat, several))) for several in conversations]
        if self.is_pair:
            return [self._encode_pair(row) for row in rows]
        texts = self.tokenizer([str(row[self.text_column]) for row in rows], verbose=False)
        return [self._windows(self._ended(ids)) for ids in texts["input_ids"]]

    def _ended(self, ids: list[int]) -> list[int]:
        """Return a text with its end-of-text token, so that the model learns to stop."""
        end = self.tokenizer.eos_token_id
        return ids if ids and ids[-1] == end else [*ids, end]

    def _windows(self, ids: list[int]) -> list[Example]:
        """Cut a text into examples of at most `max_length` tokens.

        The last token of one is the first of the next, which is read but not predicted: so every
        token but the text's first is trained, once.
        """
        size = self.max_length
        pieces = [ids[i : i + size] for i in range(0, len(ids) - 1, max(size - 1, 1))]
        whole = {"full_length": len(ids)} if len(ids) > size else {}
        return [{"input_ids": p, "labels": p, **whole} for p in pieces if len(p) > 1]

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

    def why_nothing(self, row: dict[str, Any]) -> str:
        """Return a hint, where a row leaves nothing to train: is it the template's fault?"""
        if self.is_chat:
            messages = self._messages(row)
            examples = encode_chat(self.tokenizer, messages, self.spec.train_on, self._opened)
            if not any(any(trained) for _, trained in examples):
                return (
                    "the chat template marks or writes nothing of the assistant's turns: give "
                    "another with `task.chat_template: FILE`, or `--set task.train_on=all`"
                )
        return f"{super().why_nothing(row)}; a prompt has to end before it"

    def _encode_chat(self, messages: Sequence[Message] | str) -> list[Example]:
        assert not isinstance(messages, str)
        examples = encode_chat(self.tokenizer, messages, self.spec.train_on, self._opened)
        return [made for ids, trained in examples for made in self._encode_turns(ids, trained)]

    def _encode_turns(self, ids: list[int], trained: list[bool]) -> list[Example]:
        if not any(trained):
            return []
        stop = len(trained) - trained[::-1].index(True)  # what follows teaches nothing
        ids, trained = ids[:stop], trained[:stop]
        labels = [token if on else IGNORED for token, on in zip(ids, trained, strict=True)]
        end = self.tokenizer.eos_token_id
        last_turn = takewhile(lambda label: label != IGNORED, reversed(labels))
        if end not in last_turn:  # the template does not end it: the model must learn to stop
            ids.append(end)
            labels.append(end)
        return self._trained_from(ids, labels)

    def _trained_from(self, ids: list[int], labels: list[int]) -> list[Example]:
        whole = {"full_length": len(ids)} if len(ids) > self.max_length else {}
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        # the first token is predicted from nothing
        trained = any(label != IGNORED for label in labels[1:])
        return [{"input_ids": ids, "labels": labels, **whole}] if trained else []

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
        inputs = {"input_ids": pad(ids, self._pad, self.pad_multiple)}
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
            inputs["attention_mask"] = pad(
                [[1] * len(sequence) for sequence in ids], 0, self.pad_multiple
            )
        padded = pad(labels, IGNORED, self.pad_multiple)
        n_items = float((padded != IGNORED).sum())
        return Batch(inputs, padded, n_items, n_tokens, [e["row"] for e in examples])

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

    def metric_problems(self) -> list[Problem]:
        """Return what is wrong with the recipe's metrics; those of text need an answer."""
        problems = super().metric_problems()
        of_text = [name for name in self.metric_names if reads(name) == "text"]
        at = self.recipe.at("evaluate.metrics")
        if of_text and not (self.is_chat or self.is_pair):
            hint = "name `prompt_column` and `completion_column`, or `messages_column`"
            problems.append(Problem(f"metric `{of_text[0]}` needs prompts to answer", at, hint))
        elif of_text and self.is_chat and self.spec.train_on == "all":
            what = f"metric `{of_text[0]}` reads the assistant's answer, not all turns"
            problems.append(Problem(what, at, "set `task.train_on` to `assistant` or `last`"))
        return problems

    def _add_answers(self, model: nn.Module, batch: Batch, predictions: list[Prediction]) -> None:
        """Let the model answer what stands before the last trained span of each example."""
        prompts, references, stops = [], [], self.stop_ids(model)
        for ids, labels in zip(
            batch.inputs["input_ids"].tolist(), batch.labels.tolist(), strict=True
        ):
            last = max(i for i, label in enumerate(labels) if label != IGNORED)
            first = last
            while first > 0 and labels[first - 1] != IGNORED:
                first -= 1
            prompts.append(ids[:first])
            wanted = until_stop(labels[first : last + 1], stops)
            is_cut = len(wanted) == last + 1 - first
            references.append(decode(self.tokenizer, wanted, is_cut))
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

    def row_of(self, text: str) -> dict[str, Any]:
        """Return a row that holds a user's text; in a chat it is the user's turn."""
        if not self.is_chat or self.spec.instruction_columns:
            return super().row_of(text)
        turn = {"role": "user", "content": text}
        if self.spec.format == "sharegpt":
            turn = {"from": "human", "value": text}
        return {str(self.spec.messages_column): [turn]}

    def answer_fault(self, row: dict[str, Any]) -> str:
        """Return why a row cannot be answered, or nothing."""
        if fault := self.input_fault(row):
            return fault
        try:
            self._prompt(row)
        except LoraError as error:
            return error.problems[0].what
        return ""

    def _prompt(self, row: dict[str, Any]) -> list[int]:
        """Return the token ids of a row without its answer."""
        if self.is_chat:
            return self.chat_prompt(self._question(row))
        (column,) = self.input_columns().values()
        ids = self.tokenizer(str(row[column]) + self.spec.separator, verbose=False)["input_ids"]
        return list(ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids)

    def text_prompt(self, text: str) -> list[int]:
        """Return the token ids of a user's text that the model is to continue."""
        return self._prompt(self.row_of(text))

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation that the assistant is to continue."""
        text = prompt_of(self.tokenizer, messages, self._opened)
        encoding = self.tokenizer(text, add_special_tokens=False, verbose=False)
        return list(encoding["input_ids"])

    @property
    def room_for_prompt(self) -> int | None:
        """Tokens that leave room for the longest answer, or for half of them; None is no limit."""
        if self.positions is None:
            return None
        longest = self.recipe.evaluate.generation.max_new_tokens
        return max(self.positions - longest, self.positions // 2)

    def _question(self, row: dict[str, Any]) -> list[Message]:
        """Return the conversation without the assistant's last answer, if it ends with one."""
        messages = self._messages(row)
        question = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        if not question:
            raise LoraError("there is no turn to answer")
        return question

    def generate(
        self, model: nn.Module, prompts: Sequence[Sequence[int]], streamer: Any = None
    ) -> list[str]:
        """Return what the model says after each prompt, as the recipe's generation section asks.

        A streamer of transformers is given the tokens as they come; for it there is one prompt.
        """
        options = self.recipe.evaluate.generation
        return self._written(model, prompts, options, streamer)

    def _written(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        options: GenerationSpec,
        streamer: Any = None,
    ) -> list[str]:
        stops, tokenizer = self.stop_ids(model), self.tokenizer
        return generate(
            model, prompts, tokenizer, options, self._pad, self.positions, stops, streamer
        )

    def stop_ids(self, model: nn.Module) -> list[int]:
        """Return the tokens that end what the model says: of a text, or of its turn in a chat."""
        return stop_ids(model, self.tokenizer, self._end_of_turn)

    def sample_prompt(self, row: dict[str, Any]) -> tuple[list[int], str, str]:
        """Return what a sample continues: token ids, the same as text, and the row's own words."""
        (column,) = self.input_columns().values()
        if self.is_chat:
            messages = self._messages(row)
            try:
                ids = self._prompt(row)
            except LoraError:  # the assistant speaks first
                ids = list(self.tokenizer(" ", verbose=False)["input_ids"])
            last = messages[-1]
            wanted = str(last.get("content") or "") if last["role"] == "assistant" else ""
        elif self.is_pair:
            ids, wanted = self._prompt(row), str(row[self.spec.completion_column or ""])
        else:
            whole = list(self.tokenizer(str(row[column]), verbose=False)["input_ids"])
            cut = min(SAMPLE_TOKENS, (len(whole) + 1) // 2)
            cut = whole_characters(self.tokenizer, whole, cut)
            ids = whole[:cut]
            end = whole_characters(self.tokenizer, whole, cut + SAMPLE_NEW_TOKENS)
            wanted = self.tokenizer.decode(whole[cut:end])
        is_cut, ids = len(ids) > self.max_length, ids[-self.max_length :]
        shown = str(self.tokenizer.decode(ids, skip_special_tokens=not self.is_chat))
        return ids, shown.lstrip(REPLACEMENT) if is_cut else shown, wanted

    def continue_greedily(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> list[str]:
        """Return a short continuation of each prompt, the likeliest token every time."""
        tokens = min(SAMPLE_NEW_TOKENS, self.recipe.evaluate.generation.max_new_tokens)
        return self._written(model, prompts, GenerationSpec(max_new_tokens=tokens))
