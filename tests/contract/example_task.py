"""A small task that needs what no task of the tool needs yet: the contract has to offer it.

Noise is drawn upon windows of eight bytes of a text, and is to be taken away again; a row may have
a label too. The loss has two terms, each with its own items: bytes, and windows with a label.
The model has two parts, of which one is frozen and its outputs are kept. The windows of a row have
one answer together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_cli.metrics import MetricContext
from lora_cli.models.bundle import Bundle
from lora_cli.models.find_base import PIPELINE, locate
from lora_cli.recipe import Recipe
from lora_cli.tasks.contract import Task
from lora_cli.tasks.examples import MAIN, Batch, Example, Field, Prediction

WINDOW, WIDTH, HIDDEN = 8, 4, 6
NO_LABEL = -100


class Part(nn.Module):
    """A model that is saved as transformers saves its own."""

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), folder / "model.safetensors", {"format": "pt"})


class Encoder(Part):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        self.project = nn.Linear(WIDTH, WIDTH)


class Decoder(Part):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.clean = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.scores = nn.Linear(HIDDEN, 2)


PARTS = {"encoder": Encoder, "decoder": Decoder}


def save_base(folder: Path) -> Path:
    """Save a base of two parts in a folder, and return the folder."""
    for seed, (name, kind) in enumerate(PARTS.items()):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            kind().save_pretrained(folder / name)
    (folder / PIPELINE).write_text(json.dumps({name: name for name in PARTS}), encoding="utf-8")
    return folder


class ExampleTask(Task):
    """See above."""

    metric_channel, default_metrics = "label", ("accuracy",)
    loss_weights: Mapping[str, float] = {MAIN: 1.0, "label": 0.25}
    unit, joins_examples, max_length = "byte", True, WINDOW
    names = ("bad", "good")

    def __init__(self, recipe: Recipe, spec: Any) -> None:
        super().__init__(recipe)
        self.spec = spec
        self.encoded_batches = 0  # how often the frozen part has computed

    # ------------------------------------------------------------------------------ rows

    def load_processor(self) -> None:
        """There is none."""

    def read_config(self) -> None:
        """There is none."""

    def save_processor(self, folder: Path, facts: dict[str, Any] | None = None) -> None:
        """There is none."""

    @property
    def base_facts(self) -> dict[str, Any]:
        """There is no configuration whose keys could change."""
        return {"config": {}}

    def cache_key(self) -> list[str]:
        return ["example task"]

    def fields(self) -> list[Field]:
        return [
            Field("task.text_column", "text", "input", "text"),
            Field("task.label_column", "label", "target", "label"),
        ]

    def labels_of(self, row: dict[str, Any]) -> list[str] | None:
        return None if row.get("label") is None else [row["label"]]

    def input_error(self, row: dict[str, Any]) -> str:
        return "" if row.get("text") else "column `text` is blank"

    def target_error(self, row: dict[str, Any]) -> str:
        return "" if row.get("label") in (None, *self.names) else "column `label` is no label"

    # -------------------------------------------------------------------------- examples

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[list[Example]]:
        examples = []
        for row in rows:
            ids = list(str(row["text"]).encode())
            label = row.get("label")
            number = NO_LABEL if label is None else self.names.index(label)
            windows = (ids[i : i + WINDOW] for i in range(0, len(ids), WINDOW))
            examples.append([{"ids": w, "label": number, "full_length": len(ids)} for w in windows])
        return examples

    def features(self) -> dict[str, str]:
        return {"ids": "list<uint8>", "label": "int64"}

    def cost(self, example: Example) -> int:
        return len(example["ids"])

    def prepare(self, example: Example, rng: np.random.Generator, training: bool) -> Example:
        noise = rng.normal(0.0, 0.5, (WINDOW, WIDTH))
        return {**example, "noise": torch.tensor(noise[: len(example["ids"])])}

    def collate(self, examples: Sequence[Example]) -> Batch:
        lengths = [len(example["ids"]) for example in examples]
        ids = torch.zeros(len(examples), max(lengths), dtype=torch.long)
        noise = torch.zeros(len(examples), max(lengths), WIDTH)
        inputs = {"ids": ids, "noise": noise, "mask": torch.zeros_like(ids, dtype=torch.float32)}
        if "features" in examples[0]:
            inputs["features"] = torch.zeros_like(noise)
        for i, (example, length) in enumerate(zip(examples, lengths, strict=True)):
            ids[i, :length] = torch.tensor(example["ids"])
            noise[i, :length] = example["noise"]
            inputs["mask"][i, :length] = 1.0
            if "features" in inputs:
                inputs["features"][i, :length] = example["features"][:length]
        labels = torch.tensor([example["label"] for example in examples])
        items = {MAIN: torch.tensor(lengths).float(), "label": (labels != NO_LABEL).float()}
        rows = [example["row"] for example in examples]
        return Batch(inputs, {"labels": labels}, items, sum(lengths), rows)

    # ----------------------------------------------------------------------------- model

    def load_model(
        self, device: torch.device, dtype: torch.dtype | str | None = None
    ) -> tuple[nn.Module, list[str]]:
        return self._load(Path(locate(self.recipe.model.name))).to(device), []

    def _load(self, folder: Path) -> Bundle:
        parts = {name: kind() for name, kind in PARTS.items()}
        for name, part in parts.items():
            part.load_state_dict(load_file(folder / name / "model.safetensors"))
        return Bundle(parts, frozen=["encoder"])

    def reloaded(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        return self._load(folder).to(dtype)

    def empty_model(self) -> tuple[nn.Module, list[str]]:
        with torch.device("meta"):
            return Bundle({name: kind() for name, kind in PARTS.items()}, ["encoder"]), []

    def frozen_parts(self, model: nn.Module) -> Mapping[str, nn.Module]:
        return {"encoder": model.get_submodule("encoder")}

    def frozen_outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"features": self._encoded(model, batch.inputs["ids"])}

    def _encoded(self, model: nn.Module, ids: Tensor) -> Tensor:
        self.encoded_batches += 1
        encoder: Any = model.get_submodule("encoder")
        features: Tensor = encoder.project(encoder.embed(ids))
        return features

    def probe(self) -> dict[str, Tensor]:
        return {"ids": torch.arange(16).reshape(2, 8) * 7}

    def probed(self, model: nn.Module, probe: dict[str, Tensor]) -> Tensor:
        cleaned, scores = self._decoded(model, self._encoded(model, probe["ids"]))
        return torch.cat([cleaned.flatten(), scores.flatten()])

    # --------------------------------------------------------------- loss and predictions

    def _decoded(self, model: nn.Module, noisy: Tensor) -> tuple[Tensor, Tensor]:
        decoder: Any = model.get_submodule("decoder")
        hidden = torch.tanh(decoder.hidden(noisy.to(decoder.hidden.weight.dtype)))
        return decoder.clean(hidden), decoder.scores(hidden)

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        features = batch.inputs.get("features")
        if features is None:
            features = self._encoded(model, batch.inputs["ids"])
        noisy = features + batch.inputs["noise"].to(features.dtype)
        cleaned, scores = self._decoded(model, noisy)
        mask = batch.inputs["mask"].unsqueeze(-1)
        return features, cleaned, (scores * mask).sum(1) / mask.sum(1)

    def losses(self, model: nn.Module, output: Any, batch: Batch) -> dict[str, Tensor]:
        features, cleaned, scores = output
        squares = (cleaned - features).square().sum(-1)
        labels = batch.targets["labels"]
        of_labels = F.cross_entropy(scores, labels, reduction="none", ignore_index=NO_LABEL)
        return {MAIN: (squares * batch.inputs["mask"]).sum(-1), "label": of_labels}

    def predictions(self, model: nn.Module, output: Any, batch: Batch) -> list[Prediction]:
        rows = zip(batch.rows, output[2].tolist(), batch.targets["labels"].tolist(), strict=True)
        return [self._said(row, scores, label) for row, scores, label in rows]

    def _said(self, row: int, scores: Sequence[float], label: int) -> Prediction:
        best, known = int(np.argmax(scores)), label != NO_LABEL
        return Prediction(
            row,
            self.names[best],
            self.names[label] if known else None,
            dict(zip(self.names, scores, strict=True)),
            {"label": (best, label)} if known else {},
        )

    def join(self, row: dict[str, Any], parts: Sequence[Prediction]) -> Prediction:
        scores = np.mean([list((part.scores or {}).values()) for part in parts], 0)
        label = NO_LABEL if row.get("label") is None else self.names.index(row["label"])
        return self._said(parts[0].row, scores.tolist(), label)

    @property
    def loss_definition(self) -> str:
        return "mean squared error per byte, and a quarter of the cross-entropy per window"

    @property
    def metric_context(self) -> MetricContext:
        return MetricContext(2, False, self.names)

    def answer_columns(self) -> dict[str, str]:
        return {"prediction": "string", "windows": "double"}

    def answer(self, model: nn.Module, rows: Sequence[dict[str, Any]]) -> list[list[Any]]:
        answers = []
        for row, examples in zip(rows, self.encode(rows), strict=True):
            still = np.random.default_rng(0)
            prepared = [self.prepare({**e, "row": 0}, still, False) for e in examples]
            found = self.predictions(model, self.forward(model, b := self.collate(prepared)), b)
            answers.append([self.join({**row, "label": None}, found).prediction, len(examples)])
        return answers
