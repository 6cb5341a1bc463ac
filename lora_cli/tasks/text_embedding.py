"""Embeds texts as vectors, so that texts of similar meaning are near each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModel

from lora_cli.errors import LoraError, Problem, counted
from lora_cli.models.bundle import mark_frozen
from lora_cli.models.sentence_transformer import write_embedding_files
from lora_cli.recipe import Recipe, TextEmbeddingSpec
from lora_cli.tasks.embeddings.embedding_losses import NEGATIVE, POSITIVE, embedding_losses
from lora_cli.tasks.embeddings.embedding_proposals import propose_embedding
from lora_cli.tasks.embeddings.embedding_rows import EmbeddingRows
from lora_cli.tasks.embeddings.embedding_search import (
    SearchResult,
    labelled_corpus,
    pairs_corpus,
    search,
)
from lora_cli.tasks.examples import MAIN, Batch, Encoded, Example, Prediction
from lora_cli.tasks.finite_scores import require_finite
from lora_cli.tasks.texts.padding import fill, mask_of, positions_of
from lora_cli.tasks.texts.text_task import forward_parameters

UNUSED_MODULE = "pooler"  # of BERT and similar models; no pooling uses it
DIGITS = 9  # decimal digits that represent a float32 exactly
N_SHOWN = 8  # numbers of an embedding that are printed


class TextEmbedding(EmbeddingRows):
    """`task.type: text_embedding`."""

    auto_class = AutoModel
    propose = staticmethod(propose_embedding)
    compares_rows = True
    several_inputs = True

    def __init__(self, recipe: Recipe, spec: TextEmbeddingSpec) -> None:
        super().__init__(recipe, spec)
        self.couples_examples = spec.couples_examples
        if spec.row_kind == "scored":
            self.metric_channel, self.default_metrics = "value", ("spearman", "pearson")
        else:
            self.metric_channel, self.default_metrics = "ranks", ("retrieval",)

    @property
    def loss_definition(self) -> str:
        """The definition of the loss, for the report."""
        spec = self.spec
        match spec.loss_in_effect:
            case "in_batch_negatives":
                size = self.recipe.train.step_size
                how = "both ways, " if spec.symmetric else ""
                return (
                    f"mean cross-entropy, {how}of the right text among those of {size:,} rows that "
                    f"are drawn together, in nats; cosines are divided by {spec.temperature:g}"
                )
            case "cosent":
                return (
                    f"log(1 + sum of exp((a - b) / {spec.temperature:g})) over the pairs whose "
                    "cosines a and b are not in the order of their scores, mean over groups of "
                    f"{self.recipe.train.step_size:,} rows that are drawn together"
                )
            case "cosine":
                return "mean squared difference of the cosine and the score"

    # ------------------------------------------------------------------------------- batches

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Return the texts of examples as one batch: all anchors, all positives, all negatives."""
        found: list[tuple[int, int, Any, int]] = []  # role, example, tokens, hash
        for i, example in enumerate(examples):
            ends = np.cumsum(example["lengths"]).tolist()
            for n, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
                tokens = example["input_ids"][start:end]
                found.append((min(n, NEGATIVE), i, tokens, int(example["texts"][n])))
        found.sort(key=lambda text: text[0])  # stable, so texts of the same role keep their order
        ids = [tokens for _, _, tokens, _ in found]
        options = (self.pad_multiple, self.padding)
        inputs = {
            "input_ids": fill(ids, self._pad, *options),
            "attention_mask": mask_of(ids, *options),
        }
        if self.padding.positions:
            inputs["position_ids"] = positions_of(inputs["attention_mask"])
        of_text = [examples[i] for _, i, _, _ in found]
        targets = {
            "row": torch.tensor([int(example["row"]) for example in of_text]),
            "role": torch.tensor([role for role, _, _, _ in found]),
            "text": torch.tensor([text for _, _, _, text in found]),
            "label": torch.tensor([int(example["label"]) for example in of_text]),
            "score": torch.tensor([float(example["score"]) for example in of_text]),
        }
        items = {MAIN: torch.ones(len(examples))}
        rows = [int(example["row"]) for example in examples]
        return Batch(inputs, targets, items, sum(map(len, ids)), rows)

    @property
    def _pad(self) -> int:
        """The token id for padding, which may be any, since padding is masked by position."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return int(next((token for token in ids if token is not None), 0))

    # --------------------------------------------------------------------------------- model

    def load_model(
        self, device: torch.device, dtype: torch.dtype | str | None = None
    ) -> tuple[nn.Module, list[str]]:
        """Return the base model, to which no head is added."""
        model, _ = super().load_model(device, dtype)
        self.drawn = frozenset()  # a pooler may be missing in the checkpoint, since it is not used
        return mark_frozen(model, [UNUSED_MODULE]), []

    def empty_model(self) -> tuple[nn.Module, list[str]]:
        """Return the same model without weights."""
        model, _ = super().empty_model()
        return mark_frozen(model, [UNUSED_MODULE]), []

    def save_processor(self, folder: Path, facts: dict[str, Any] | None = None) -> None:
        """Write the tokenizer and the files of sentence-transformers into a folder."""
        super().save_processor(folder, facts)
        prompts = {"query": self.anchor_prompt, "document": self.positive_prompt}
        width = int(self.config.get_text_config().hidden_size)
        how = (self.pooling, self.normalize, prompts)
        write_embedding_files(folder, *how, width, self.max_length)

    def logits(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Return the embedding of each text of a batch (T, D)."""
        takes = forward_parameters(type(model).forward)
        options = {"use_cache": False} if "use_cache" in takes else {}
        mask, taken = inputs["attention_mask"], self._taken(inputs, takes)
        if self.padding.side != "none":
            return self._pooled(model(**taken, **options).last_hidden_state, mask)
        lengths = mask.sum(-1)  # padding is on the right
        found: Tensor | None = None
        for length in sorted(set(lengths.tolist())):
            those = (lengths == length).nonzero().squeeze(-1)
            part = {key: value[those, :length] for key, value in taken.items()}
            vectors = self._pooled(model(**part, **options).last_hidden_state, mask[those, :length])
            found = vectors.new_zeros(len(lengths), vectors.shape[-1]) if found is None else found
            found = found.index_copy(0, those, vectors)
        assert found is not None
        return found

    def _pooled(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return one vector for each text (B, D), from its hidden states (B, T, D) and mask."""
        if hidden.dtype in (torch.float16, torch.bfloat16):
            hidden = hidden.float()
        lines = torch.arange(len(hidden), device=hidden.device)
        match self.pooling:
            case "mean":
                weights = mask.to(hidden.dtype).unsqueeze(-1)
                vectors = (hidden * weights).sum(1) / weights.sum(1)
            case "cls":
                vectors = hidden[lines, mask.argmax(1)]
            case _:
                last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
                vectors = hidden[lines, last]
        return nn.functional.normalize(vectors, dim=-1) if self.normalize else vectors

    def tensor_of(self, output: Any) -> Tensor:
        """Return the hidden states of all tokens, by which two models are compared (B, T, D)."""
        hidden: Tensor = output.last_hidden_state
        return hidden

    # -------------------------------------------------------------------- loss and predictions

    def losses(self, model: nn.Module, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return the loss of each example (B,) of a batch that is a whole step."""
        return {MAIN: embedding_losses(output, batch.targets, self.spec)}

    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        """Return the embeddings of each example, from which `compared` computes predictions."""
        return self.predictions(model, self.output(model, batch), batch)

    def predictions(self, model: nn.Module, output: Tensor, batch: Batch) -> list[Prediction]:
        """Return the embeddings of each example, with a loss of NaN if they are not finite."""
        vectors = output.float().cpu().numpy()
        facts = {name: values.cpu().numpy() for name, values in batch.targets.items()}
        found = []
        for row in batch.rows:
            places = np.flatnonzero(facts["row"] == row)
            own = {name: values[places] for name, values in facts.items()}
            prediction = Prediction(row, None, None, outputs=(vectors[places], own))
            finite = bool(np.isfinite(vectors[places]).all())
            prediction.losses[MAIN] = (0.0 if finite else math.nan, 1.0)
            found.append(prediction)
        return found

    def compared(self, found: Sequence[Prediction], split: Encoded) -> list[Prediction]:
        """Return for each row the search result of its anchor, or the cosine of its pair."""
        vectors = [prediction.outputs[0] for prediction in found]
        facts = [prediction.outputs[1] for prediction in found]
        rows = [prediction.row for prediction in found]
        losses = self._losses_in_groups(vectors, facts)
        if self.spec.row_kind == "scored":
            predictions = [
                self._scored(row, v, f) for row, v, f in zip(rows, vectors, facts, strict=True)
            ]
        else:
            predictions = self._searched(rows, vectors, facts, split)
        for prediction, loss in zip(predictions, losses, strict=True):
            prediction.losses[MAIN] = (0.0, 0.0) if loss is None else (loss, 1.0)
        return predictions

    def _losses_in_groups(
        self, vectors: list[NDArray[np.float32]], facts: list[dict[str, Any]]
    ) -> list[float | None]:
        """Return the loss of each row, computed in fixed random groups as large as a step.

        So the loss does not depend on how many texts are embedded together. If rows have labels,
        the positive is another row of the same label, and the loss is None if there is none.
        """
        positives = self._drawn_positives(facts) if self.is_labelled else {}
        order = np.random.default_rng(0).permutation(len(vectors))
        if self.is_labelled:
            order = order[[int(i) in positives for i in order]]
        losses: list[float | None] = [None] * len(vectors)
        size = self.recipe.train.step_size
        for start in range(0, len(order), size):
            group = order[start : start + size].tolist()
            if self.is_labelled:
                parts = [self._first(vectors[i], facts[i]) for i in group]
                parts += [self._as_positive(vectors, facts, i, positives[i]) for i in group]
            else:
                parts = [(vectors[i], facts[i]) for i in group]
            joined = torch.from_numpy(np.concatenate([v for v, _ in parts]))
            known = {
                name: torch.from_numpy(np.concatenate([f[name] for _, f in parts]))
                for name in facts[0]
            }
            values = embedding_losses(joined, known, self.spec).tolist()
            for i, value in zip(group, values, strict=True):
                losses[i] = value
        return losses

    @staticmethod
    def _drawn_positives(facts: list[dict[str, Any]]) -> dict[int, int]:
        """Return a row with the same label and another text, for each row that has one."""
        of_label: dict[int, list[int]] = {}
        for i, one in enumerate(facts):
            of_label.setdefault(int(one["label"][0]), []).append(i)
        rng, found = np.random.default_rng(1), {}
        for i, one in enumerate(facts):
            same_label = of_label[int(one["label"][0])]
            for j in rng.permutation(same_label).tolist():
                if facts[j]["text"][0] != one["text"][0]:
                    found[i] = j
                    break
        return found

    @staticmethod
    def _as_positive(
        vectors: list[NDArray[np.float32]], facts: list[dict[str, Any]], row: int, other: int
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Return the text of row `other` as the positive of `row`."""
        vector, known = TextEmbedding._first(vectors[other], facts[other])
        role = np.full(1, POSITIVE)
        return vector, {**known, "row": facts[row]["row"][:1], "role": role}

    @staticmethod
    def _first(
        vectors: NDArray[np.float32], facts: dict[str, Any]
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Return the anchor of a row, which is its first text."""
        return vectors[:1], {name: values[:1] for name, values in facts.items()}

    @staticmethod
    def _scored(row: int, vectors: NDArray[np.float32], facts: dict[str, Any]) -> Prediction:
        first, second = vectors
        lengths = np.linalg.norm(first) * np.linalg.norm(second)
        cosine = float(first @ second / np.maximum(lengths, 1e-12))
        score = float(facts["score"][0])
        return Prediction(row, cosine, score, metric_inputs={"value": (cosine, score)})

    def _searched(
        self,
        rows: list[int],
        vectors: list[NDArray[np.float32]],
        facts: list[dict[str, Any]],
        split: Encoded,
    ) -> list[Prediction]:
        anchors = np.stack([row_vectors[0] for row_vectors in vectors])
        texts = [int(row_facts["text"][0]) for row_facts in facts]
        if self.is_labelled:
            corpus, corpus_rows = labelled_corpus(
                anchors, texts, [int(row_facts["label"][0]) for row_facts in facts]
            )
        else:
            seconds = np.stack([row_vectors[1] for row_vectors in vectors])
            corpus, corpus_rows = pairs_corpus(
                anchors, seconds, texts, [int(f["text"][1]) for f in facts]
            )
        results = zip(rows, search(corpus), corpus.right, strict=True)
        return [
            self._retrieved(row, result, len(right), split, rows, corpus_rows)
            for row, result, right in results
        ]

    def _retrieved(
        self,
        row: int,
        found: SearchResult | None,
        n_right: int,
        split: Encoded,
        rows: list[int],
        corpus_rows: list[int],
    ) -> Prediction:
        """Return the nearest text of an anchor, and the ranks of its correct texts."""
        own_row = split.rows[row]
        reference = self.label_of(own_row) if self.is_labelled else self.texts_of(own_row)[1]
        if found is None:
            return Prediction(row, None, reference)
        other = split.rows[rows[corpus_rows[found.nearest]]]
        prediction = self.label_of(other) if self.is_labelled else self.texts_of(other)[1]
        scores = {"rank": float(found.best), "cosine": found.cosine}
        scores["nearest_cosine"] = found.nearest_cosine
        inputs = {"ranks": (found.ranks, n_right)}
        return Prediction(row, prediction, reference, None if self.is_labelled else scores, inputs)

    # --------------------------------------------------------------------------------- answers

    def answer_problem(self, row: dict[str, Any]) -> Problem | None:
        """Return why a text cannot be embedded, with a hint; None if it can."""
        if reason := self.input_error(row):
            return Problem(reason, hint=self.answer_hint)
        text = f"{self.anchor_prompt}{row[self.spec.anchor_column]}"
        (ids,) = self.token_lists([text])
        try:
            self.require_known_tokens(ids)
        except LoraError as error:
            return error.problems[0]
        length = self.full_length(ids, text)
        if self.spec.truncate in ("right", "left") or length <= self.max_length:
            return None
        what = f"it has {counted(length, 'token')}, more than {self.max_length:,}"
        return Problem(what, hint="cut it: `--set task.truncate=right`")

    def answer_error(self, row: dict[str, Any]) -> str:
        """Return why a text cannot be embedded; empty if it can."""
        problem = self.answer_problem(row)
        return problem.what if problem else ""

    def answer_columns(self) -> dict[str, str]:
        """Return the column of the embedding."""
        return {"embedding": "list<float>"}

    def answer(self, model: nn.Module, rows: Sequence[dict[str, Any]]) -> list[list[Any]]:
        """Return the embedding of each row's anchor."""
        texts = [f"{self.anchor_prompt}{row[self.spec.anchor_column]}" for row in rows]
        examples = [
            {"input_ids": ids, "lengths": [len(ids)], "texts": [0], "label": 0, "score": 0.0,
             "row": i}
            for i, ids in enumerate(self.token_lists(texts))
        ]  # fmt: skip
        device = next(model.parameters()).device
        vectors = self.forward(model, self.collate(examples).to(device))
        require_finite(vectors, model, self.recipe)
        return [[[float(f"{x:.{DIGITS}g}") for x in one]] for one in vectors.float().tolist()]

    def answer_line(self, values: Sequence[Any]) -> str:
        """Return the first numbers of an embedding, and their total count."""
        (vector,) = values
        first = " ".join(f"{x:.4f}" for x in vector[:N_SHOWN])
        return f"{first} …\t{len(vector)} numbers"
