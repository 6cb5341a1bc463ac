"""Compare the files of a merged model bit by bit with the files that it was made from.

Each written tensor must equal, in the dtype in which it is written:

    W0 + s B A         for an adapted module: computed in float32 and rounded once; W0 is the base's
                       tensor. For LoHa and LoKr it is W0 + s D, for DoRA m V / |V|
    adapter's tensor   for a head, a bias or another parameter that was trained in full
    W0                 for all others, bit for bit

The tensors of base, adapter and merged model are all read from files again. For LoRA on linear
layers, `Conv1D` and embeddings, the formula is computed here; for other kinds of layers, it is the
variant's `merged_weight`, called on a new layer with the tensors of the files.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_cli.adapters.peft_format.peft_tokens import SavedRows
from lora_cli.errors import IntegrityError, counted
from lora_cli.export.adapter_changes import AdapterChanges, WeightedAdapter, changes_of
from lora_cli.models.base_model import load_config
from lora_cli.models.bundle import Bundle
from lora_cli.models.checkpoint_names import CheckpointNames
from lora_cli.models.find_base import checkpoint_files
from lora_cli.models.fingerprint import inner_name
from lora_cli.models.stored_tensors import ExpertPart, Stored, StoredTensors
from lora_cli.recipe import Recipe
from lora_cli.tasks.classification.head_rows import base_label_names, match_rows
from lora_cli.tensorfile import read_header

FORMULAS = {"dora": "m V / |V|", "loha": "W0 + s D", "lokr": "W0 + s D"}


@dataclass
class WeightsProof:
    """The number of tensors of a merged folder that were compared with the source files.

    Args:
        formula: The formula of adapted tensors.
        adapted: Number of tensors that equal the formula, rounded once.
        trained: Number of tensors that equal those of the adapter's file.
        of_tokens: Number of tensors that equal the base's, with some rows from the adapter.
        identical: Number of unchanged tensors, bit-identical to those of the base's file.
        dequantised: Number of tensors that equal the dequantised weights of a quantised base.
        loaded_as: Number of tensors whose dtype in the base's file is not that of its
            configuration: W0 is converted to the dtype of the configuration.
        unknown: Names of tensors that neither base nor adapter has.
        reason: Why nothing was compared; empty if the tensors were compared.
    """

    formula: str
    adapted: int = 0
    trained: int = 0
    of_tokens: int = 0
    identical: int = 0
    dequantised: int = 0
    loaded_as: int = 0
    unknown: list[str] = field(default_factory=list)
    reason: str = ""

    @property
    def in_words(self) -> str:
        """A line for the user."""
        if self.reason:
            return f"weights: not compared bit by bit, as {self.reason}"
        parts = []
        if self.adapted:
            tensors = f"{self.adapted:,} of {counted(self.adapted, 'adapted tensor')}"
            parts.append(f"{tensors} equal {self.formula} rounded once")
        if self.trained:
            parts.append(f"{self.trained:,} equal the adapter's file")
        if self.of_tokens:
            parts.append(f"{self.of_tokens:,} equal the base's with the adapter's rows of tokens")
        if self.dequantised:
            parts.append(f"{self.dequantised:,} equal the dequantised base")
        parts.append(f"{self.identical:,} others bit-identical to the base's")
        if self.loaded_as:
            parts.append(f"{self.loaded_as:,} had another dtype in the base's file")
        if self.unknown:
            parts.append(
                f"{len(self.unknown):,} not compared, since neither file has the name "
                f"(`{self.unknown[0]}`)"
            )
        return f"weights: {'; '.join(parts)}"

    @property
    def facts(self) -> dict[str, Any]:
        """The entry of `merge.json`."""
        if self.reason:
            return {"not_compared": self.reason}
        counts = ("adapted", "trained", "of_tokens", "dequantised", "identical", "loaded_as")
        numbers = {name: getattr(self, name) for name in counts}
        return {"formula": self.formula, **numbers, "unknown": self.unknown}


@torch.no_grad()
def prove_weights(
    folder: Path,
    model: nn.Module,
    adapters: Sequence[WeightedAdapter],
    recipe: Recipe,
    ties: Iterable[list[str]],
    dequantised: dict[str, Tensor],
    heads: Iterable[str],
    in_parts: bool = False,
) -> WeightsProof:
    """Compare every tensor of a merged folder with the files that it was made from.

    Args:
        folder: The folder of the merged model.
        model: The merged model, for the names and kinds of its modules; its weights are not used,
            so it may be on the meta device.
        adapters: The adapters, whose tensors are read from their folders again.
        recipe: Its `model` section names the base.
        ties: Groups of names that shared a parameter in the base.
        dequantised: Dequantised weights by module that replaced those of the base's files.
        heads: Names of modules whose outputs are in the order of the task's labels, not the base's.
        in_parts: Whether the update of each expert was computed separately.

    Raises:
        IntegrityError: If a tensor differs; the message contains the largest difference.
    """
    proof = WeightsProof(formula_of(adapters))
    sources = _Sources(
        model, [changes_of(adapter, model) for adapter in adapters], ties, dequantised
    )
    sources.in_parts = in_parts
    sources.rows, sources.heads = label_rows(model, recipe), tuple(f"{head}." for head in heads)
    parts = model.parts if isinstance(model, Bundle) else {"": model}
    for part, module in parts.items():
        base = checkpoint_files(recipe, part)
        merged = sorted((folder / part).glob("*.safetensors"))
        sources.enter(part, module, base)
        if not base:
            proof.reason = "the base has no safetensors files"
        elif lost := sources.missing_from(merged):
            proof.reason = f"the files have another name for `{lost}`"
        if proof.reason:
            return proof
        for file in merged:
            sources.compare_file(file, proof)
    sources.require_equal()
    return proof


def formula_of(adapters: Sequence[WeightedAdapter]) -> str:
    """Return the formula of adapted weights as text."""
    if len(adapters) > 1:
        return "W0 + the sum of w s B A"
    one = adapters[0]
    return FORMULAS.get(one.saved.type, "W0 + s B A") if one.weight == 1 else "W0 + w s B A"


class _Sources:
    """Computes the expected tensors of one part of a model from the files of base and adapters."""

    def __init__(
        self,
        model: nn.Module,
        changes: Sequence[AdapterChanges],
        ties: Iterable[list[str]],
        dequantised: dict[str, Tensor],
    ) -> None:
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.changes, self.dequantised = changes, dequantised
        self.adapted = {name for change in changes for name in change.adapted}
        self.trained = {n: t for change in changes for n, t in change.trained.items()}
        self.of_tokens = {n: rows for change in changes for n, rows in change.of_tokens.items()}
        self.tied = {name: group for group in ties for name in group}
        self.rows: list[int] = []
        self.heads: tuple[str, ...] = ()
        self.wrong: dict[str, float] = {}
        self.in_parts = False

    def enter(self, part: str, module: nn.Module, base: Iterable[Path]) -> None:
        """Switch to a part of the model, to which names in files are relative."""
        self.prefix, self.places = f"{part}." if part else "", CheckpointNames(module)
        self.inner_prefix = self.places.prefix
        self.base = StoredTensors(base, self.inner_prefix)
        sharers: dict[int, list[str]] = {}
        for name, parameter in self.parameters.items():
            if name.startswith(self.prefix):
                sharers.setdefault(id(parameter), []).append(name)
        self.groups = {name: group for group in sharers.values() for name in group}

    def _inner(self, name: str) -> str:
        return inner_name(name.removeprefix(self.prefix), self.inner_prefix)

    def missing_from(self, files: Iterable[Path]) -> str | None:
        """Return the first parameter that an adapter changes but that is in no file by its name."""
        complete: set[str] = set()
        rows: Counter[str] = Counter()
        for file in files:
            for name, entry in read_header(file).items():
                place = self.places.find(name, entry.shape)
                if place.name is not None:
                    complete.add(self.prefix + place.name)
                if place.part is not None:
                    rows[self.prefix + place.part.parameter] += entry.shape[0]
        complete |= {
            n for n, count in rows.items() if count == self.parameters[n].shape[:2].numel()
        }
        for name in [*self.adapted, *self.of_tokens, *self.trained]:
            if name.startswith(self.prefix) and complete.isdisjoint(self.groups.get(name, [name])):
                return name
        return None

    def compare_file(self, file: Path, proof: WeightsProof) -> None:
        """Compare every tensor of a file, and record those that differ."""
        for name, entry in read_header(file).items():
            difference = self._compare(Stored(file, name, entry), proof)
            if difference != 0:  # true for NaN as well
                self.wrong[inner_name(name, self.inner_prefix)] = difference

    def require_equal(self) -> None:
        """Reject a merged model in which a tensor differs.

        Raises:
            IntegrityError: With the largest difference.
        """
        if not self.wrong:
            return
        wrong = self.wrong
        worst = max(wrong, key=lambda name: (math.isnan(wrong[name]), wrong[name]))
        raise IntegrityError(
            "the merged model is not what the files of base and adapter say, in "
            f"{counted(len(wrong), 'tensor')}: the largest difference is {wrong[worst]:.1e}, "
            f"of `{worst}`",
            "--to",
            "please report this: merging should be exact",
        )

    def _compare(self, file_tensor: Stored, proof: WeightsProof) -> float:
        """Count a tensor in the proof, and return its largest difference from what is expected."""
        inner = inner_name(file_tensor.name, self.inner_prefix)
        place = self.places.find(file_tensor.name, file_tensor.entry.shape)
        parameter = place.part.parameter if place.part else place.name
        name = inner if parameter is None else self.prefix + parameter
        group = self.groups.get(name, [name])
        adapted = next((n for n in group if n in self.adapted), None)
        trained = next((n for n in group if n in self.trained), None)
        tokens = next((self.of_tokens[n] for n in group if n in self.of_tokens), None)
        owners = (n.removesuffix(".weight") for n in group)
        quantised = next((owner for owner in owners if owner in self.dequantised), None)
        stored = self._stored(inner, group)
        if (adapted, trained, tokens, quantised) == (None, None, None, None):
            if not stored:
                proof.unknown.append(inner)
                return 0.0
            if any(file_tensor.same_bytes(tensor) for tensor in stored):  # without loading them
                proof.identical += 1
                return 0.0
        written = file_tensor.read()
        if trained is not None and adapted is None:
            proof.trained += 1
            full = self.trained[trained]
            expected = full if place.part is None else place.part.of(full)
            return _difference(written, expected.float())
        candidates = [self.dequantised[quantised]] if quantised else self._read(stored, group)
        if not candidates:
            proof.unknown.append(inner)
            return 0.0
        if quantised is None and all(tensor.dtype != written.dtype for tensor in candidates):
            proof.loaded_as += 1
        if adapted is not None:
            proof.adapted += 1
        elif tokens is not None:
            proof.of_tokens += 1
        elif quantised:
            proof.dequantised += 1
        else:
            proof.identical += 1
        change = (adapted, tokens, place.part)
        return min(
            self._from_base(w0 if quantised else w0.to(written.dtype), written, *change)
            for w0 in candidates
        )

    def _from_base(
        self,
        w0: Tensor,
        written: Tensor,
        adapted: str | None,
        tokens: SavedRows | None,
        part: ExpertPart | None,
    ) -> float:
        """Return a tensor's largest difference from W0 with the update or the trained rows."""
        if w0.shape[:1] == written.shape[:1] == (1,) and w0.numel() < written.numel():
            w0, written = w0[0], written[0]  # BART's vocabulary bias is (1, vocabulary)
        if w0.shape[1:] != written.shape[1:] or w0.ndim != written.ndim:
            return math.inf
        count = len(w0) if w0.ndim else 0
        if w0.ndim and count < len(written):  # the vocabulary was enlarged
            w0 = torch.cat([w0, torch.zeros_like(written[count:], dtype=w0.dtype)])
        if adapted is not None:
            w0 = self._with_update(adapted, w0.float(), part)
        if tokens is not None:
            w0 = w0.float().index_copy(0, torch.tensor(tokens.token_ids), tokens.rows.float())
        if w0.ndim and count < len(written):  # ignore new rows that no file has
            ids = set(tokens.token_ids if tokens else ())
            known = [i for i in range(len(w0)) if i < count or i in ids]
            w0, written = w0[known], written[known]
        return _difference(written, w0)

    def _stored(self, inner: str, group: list[str]) -> list[Stored]:
        """Return the base's tensors of a parameter; for tied ones, files may have several."""
        tied = [tied_name for name in group for tied_name in self.tied.get(name, [])]
        names = dict.fromkeys([inner, *(self._inner(tied_name) for tied_name in [*group, *tied])])
        return [self.base.places[name] for name in names if name in self.base.places]

    def _read(self, stored: list[Stored], group: list[str]) -> list[Tensor]:
        """Read the base's tensors; for a head, also in the order of the task's labels."""
        tensors = [tensor.read() for tensor in stored]
        if self.rows and any(self._inner(name).startswith(self.heads) for name in group):
            last_row = max(self.rows)
            tensors += [t[self.rows] for t in tensors if t.ndim and len(t) > last_row]
        return tensors

    def _with_update(self, name: str, w0: Tensor, part: ExpertPart | None) -> Tensor:
        """Return the merged weight of an adapted module in float32, in the shape of W0."""
        for change in self.changes:
            update = change.adapted.get(name)
            if update is None:
                continue
            if part is not None:
                for other in change.adapted.values():  # cache one module at a time: they are large
                    other.all_updates = other.all_updates if other.module is update.module else None
                w0 = update.merged_expert(w0, part, self.in_parts)
            elif (merged := update.by_formula(w0)) is not None:
                w0 = merged
            else:
                w0 = update.layer().merged_weight(w0)
        return w0


def label_rows(model: nn.Module, recipe: Recipe) -> list[int]:
    """Return the index of the base's output for each label; empty if the order is the same."""
    if isinstance(model, Bundle) or not (labels := base_label_names(model.config)):
        return []
    rows = match_rows(own := base_label_names(load_config(recipe)), labels)
    known = [row for row in rows if row is not None]
    return known if labels != own and len(known) == len(labels) else []


def _difference(written: Tensor, expected: Tensor) -> float:
    """Return the largest difference after rounding the expected tensor to the written dtype."""
    rounded = expected.to(written.dtype)
    if rounded.shape != written.shape:
        return math.inf
    if torch.equal(_bytes(rounded), _bytes(written)):
        return 0.0
    difference = float((rounded.double() - written.double()).abs().max())
    return difference or math.ulp(0.0)  # zeros of different sign


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
