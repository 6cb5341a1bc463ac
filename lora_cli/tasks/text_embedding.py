"""Turn texts into vectors, so that texts of like meaning are near each other."""

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
from lora_cli.tasks.embeddings.embedding_search import Found, labelled_corpus, pairs_corpus, search
from lora_cli.tasks.examples import MAIN, Batch, Encoded, Example, Prediction
from lora_cli.tasks.finite_scores import require_finite
from lora_cli.tasks.texts.padding import fill, mask_of, positions_of
from lora_cli.tasks.texts.text_task import forward_parameters

UNUSED = "pooler"  # of BERT and its kin, trained for another task; no embedding comes from it
DIGITS = 9  # of a number of an embedding, which bring float32 back exactly
SHOWN = 8  # numbers of an embedding that are printed


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
        """What the loss measures."""
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
        """Return the texts of the examples as one batch: all anchors, all positives, the rest."""
        found: list[tuple[int, int, Any, int]] = []  # role, example, tokens, hash
        for i, example in enumerate(examples):
            ends = np.cumsum(example["lengths"]).tolist()
            for n, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
                tokens = example["input_ids"][start:end]
                found.append((min(n, NEGATIVE), i, tokens, int(example["texts"][n])))
        found.sort(key=lambda text: text[0])  # stable: in each role by example
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
        """What rows are filled with; it is masked by its position, so any token will do."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return int(next((token for token in ids if token is not None), 0))

    # --------------------------------------------------------------------------------- model

    def load_model(
        self, device: torch.device, dtype: torch.dtype | str | None = None
    ) -> tuple[nn.Module, list[str]]:
        """Return the base model; there is no head."""
        model, _ = super().load_model(device, dtype)
        self.drawn = frozenset()  # a pooler that the checkpoint lacks takes no part
        return mark_frozen(model, [UNUSED]), []

    def empty_model(self) -> tuple[nn.Module, list[str]]:
        """Return the same without weights."""
        model, _ = super().empty_model()
        return mark_frozen(model, [UNUSED]), []

    def save_processor(self, folder: Path, facts: dict[str, Any] | None = None) -> None:
        """Write the tokenizer, and what sentence-transformers reads, into a folder."""
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
        lengths = mask.sum(-1)  # filled on the right
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
        """Return one vector for each text, of the vectors of its tokens (B, T, D)."""
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
        """Return what of a model's output is compared: the vectors of all tokens."""
        hidden: Tensor = output.last_hidden_state
        return hidden

    # -------------------------------------------------------------------- loss and predictions

    def losses(self, model: nn.Module, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return the loss of each example, of a batch that is a whole step."""
        return {MAIN: embedding_losses(output, batch.targets, self.spec)}

    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        """Return the embeddings of each example; `compared` makes answers of them."""
        return self.predictions(model, self.output(model, batch), batch)

    def predictions(self, model: nn.Module, output: Tensor, batch: Batch) -> list[Prediction]:
        """Return the embeddings of each example, and a loss of NaN if one is not finite."""
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
        """Return for each row what its anchor finds in the split, or how near its pair is."""
        vectors = [one.outputs[0] for one in found]
        facts = [one.outputs[1] for one in found]
        rows = [one.row for one in found]
        losses = self._losses_in_groups(vectors, facts)
        if self.spec.row_kind == "scored":
            made = [self._scored(row, v, f) for row, v, f in zip(rows, vectors, facts, strict=True)]
        else:
            made = self._searched(rows, vectors, facts, split)
        for prediction, loss in zip(made, losses, strict=True):
            prediction.losses[MAIN] = (0.0, 0.0) if loss is None else (loss, 1.0)
        return made

    def _losses_in_groups(
        self, vectors: list[NDArray[np.float32]], facts: list[dict[str, Any]]
    ) -> list[float | None]:
        """Return the loss of each row, in groups as large as a step that are drawn once for all.

        So the loss does not depend on how many texts are embedded together. Where rows have a
        label, the positive is another row of that label; None for a row that has none.
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
        """Return for rows that have another text of their label, one such row."""
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
        """Return the text of one row as the positive of another."""
        vector, known = TextEmbedding._first(vectors[other], facts[other])
        role = np.full(1, POSITIVE)
        return vector, {**known, "row": facts[row]["row"][:1], "role": role}

    @staticmethod
    def _first(
        vectors: NDArray[np.float32], facts: dict[str, Any]
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Return the first text of a row, which is the anchor."""
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
        anchors = np.stack([own[0] for own in vectors])
        texts = [int(one["text"][0]) for one in facts]
        if self.is_labelled:
            corpus, of = labelled_corpus(anchors, texts, [int(one["label"][0]) for one in facts])
        else:
            seconds = np.stack([own[1] for own in vectors])
            corpus, of = pairs_corpus(anchors, seconds, texts, [int(f["text"][1]) for f in facts])
        results = zip(rows, search(corpus), corpus.right, strict=True)
        return [
            self._retrieved(row, one, len(right), split, rows, of) for row, one, right in results
        ]

    def _retrieved(
        self,
        row: int,
        found: Found | None,
        n_right: int,
        split: Encoded,
        rows: list[int],
        of: list[int],
    ) -> Prediction:
        """Return what an anchor finds first, and the ranks of what it should find."""
        own = split.rows[row]
        wanted = self.label_of(own) if self.is_labelled else self.texts_of(own)[1]
        if found is None:
            return Prediction(row, None, wanted)
        other = split.rows[rows[of[found.nearest]]]
        said = self.label_of(other) if self.is_labelled else self.texts_of(other)[1]
        scores = {"rank": float(found.best), "cosine": found.cosine}
        scores["nearest_cosine"] = found.nearest_cosine
        inputs = {"ranks": (found.ranks, n_right)}
        return Prediction(row, said, wanted, None if self.is_labelled else scores, inputs)

    # --------------------------------------------------------------------------------- answers

    def answer_problem(self, row: dict[str, Any]) -> Problem | None:
        """Return why a text cannot be embedded, with what to do about it, or nothing."""
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
        """Return why a row cannot be answered, or nothing."""
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
        """Return the first numbers of an embedding, and how many there are."""
        (vector,) = values
        first = " ".join(f"{x:.4f}" for x in vector[:SHOWN])
        return f"{first} …\t{len(vector)} numbers"
