"""The files of a merged model, compared bit by bit with the files that it was made from.

Each tensor that was written must be, in the dtype that it is written in:

    W0 + s B A       of an adapted module: computed in float32 and rounded once; W0 is the base's
                     tensor. LoHa and LoKr have W0 + s D, DoRA has m V / |V| instead
    of the adapter   of a head, a bias or another parameter that was trained in full
    W0               of all others, bit for bit

The tensors of all three are read from files again, not taken from the model that was merged. Of
LoRA on linear layers, `Conv1D` and embeddings the formula stands here; that of the other kinds is
the variant's own `merged_weight`, on a new layer that gets the tensors of the files.
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
from lora_cli.tasks.classification.head_rows import match_rows, own_names
from lora_cli.tensorfile import read_header

FORMULAS = {"dora": "m V / |V|", "loha": "W0 + s D", "lokr": "W0 + s D"}


@dataclass
class WeightsProof:
    """How many tensors of a merged folder were compared with the files, and as what.

    Args:
        formula: What an adapted tensor equals.
        adapted: Tensors that equal the formula, rounded once.
        trained: Tensors that equal the adapter's file.
        of_tokens: Tensors whose rows of some tokens are the adapter's, and the others the base's.
        identical: Tensors that no adapter changed, bit-identical to the base's file.
        dequantised: Tensors that equal the numbers that the codes of a quantised base stand for.
        loaded_as: Tensors that the base's file stores in another dtype than its configuration asks
            for: W0 is what they are in the dtype of the configuration.
        unknown: Names that neither file has.
        reason: Why nothing was compared; empty where it was.
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
        """One line for a person."""
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
        """What `merge.json` says of it."""
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
    numbers: dict[str, Tensor],
    heads: Iterable[str],
    in_parts: bool = False,
) -> WeightsProof:
    """Compare every tensor of a merged folder with the files that it was made from.

    Args:
        folder: Of the merged model.
        model: The merged model, for the names and kinds of its modules; not for its weights, so it
            may be on the meta device.
        adapters: Their tensors are read from the folders again.
        recipe: Its `model` section names the base.
        ties: The names that shared a parameter in the base.
        numbers: Weights that modules of the base got instead of those of its files.
        heads: Names of modules whose outputs are in the order of the task's labels, not the base's.
        in_parts: The update of each expert was multiplied out alone.

    Raises:
        IntegrityError: If a tensor is another; the largest difference is named.
    """
    proof = WeightsProof(formula_of(adapters))
    sources = _Sources(model, [changes_of(one, model) for one in adapters], ties, numbers)
    sources.in_parts = in_parts
    sources.rows, sources.heads = label_rows(model, recipe), tuple(f"{head}." for head in heads)
    parts = model.parts if isinstance(model, Bundle) else {"": model}
    for part, module in parts.items():
        base = checkpoint_files(recipe, part)
        merged = sorted((folder / part).glob("*.safetensors"))
        sources.enter(part, module, base)
        if not base:
            proof.reason = "the base has no safetensors files"
        elif lost := sources.not_in(merged):
            proof.reason = f"the files have another name for `{lost}`"
        if proof.reason:
            return proof
        for file in merged:
            sources.compare_file(file, proof)
    sources.require_equal()
    return proof


def formula_of(adapters: Sequence[WeightedAdapter]) -> str:
    """Return what an adapted weight is, in a few letters."""
    if len(adapters) > 1:
        return "W0 + the sum of w s B A"
    one = adapters[0]
    return FORMULAS.get(one.saved.type, "W0 + s B A") if one.weight == 1 else "W0 + w s B A"


class _Sources:
    """What the files of base and adapters say of each tensor of one part of a model."""

    def __init__(
        self,
        model: nn.Module,
        changes: Sequence[AdapterChanges],
        ties: Iterable[list[str]],
        numbers: dict[str, Tensor],
    ) -> None:
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.changes, self.numbers = changes, numbers
        self.adapted = {name for one in changes for name in one.adapted}
        self.trained = {n: t for one in changes for n, t in one.trained.items()}
        self.of_tokens = {n: rows for one in changes for n, rows in one.of_tokens.items()}
        self.tied = {name: group for group in ties for name in group}
        self.rows: list[int] = []
        self.heads: tuple[str, ...] = ()
        self.wrong: dict[str, float] = {}
        self.in_parts = False

    def enter(self, part: str, module: nn.Module, base: Iterable[Path]) -> None:
        """Go on with a part of the model: the names below are those inside it."""
        self.before, self.places = f"{part}." if part else "", CheckpointNames(module)
        self.start = self.places.prefix
        self.base = StoredTensors(base, self.start)
        sharers: dict[int, list[str]] = {}
        for name, parameter in self.parameters.items():
            if name.startswith(self.before):
                sharers.setdefault(id(parameter), []).append(name)
        self.groups = {name: group for group in sharers.values() for name in group}

    def _inner(self, name: str) -> str:
        return inner_name(name.removeprefix(self.before), self.start)

    def not_in(self, files: Iterable[Path]) -> str | None:
        """Return the first parameter that an adapter changes and that no file has by its name."""
        whole: set[str] = set()
        rows: Counter[str] = Counter()
        for file in files:
            for name, entry in read_header(file).items():
                place = self.places.find(name, entry.shape)
                if place.name is not None:
                    whole.add(self.before + place.name)
                if place.part is not None:
                    rows[self.before + place.part.parameter] += entry.shape[0]
        whole |= {n for n, count in rows.items() if count == self.parameters[n].shape[:2].numel()}
        for name in [*self.adapted, *self.of_tokens, *self.trained]:
            if name.startswith(self.before) and whole.isdisjoint(self.groups.get(name, [name])):
                return name
        return None

    def compare_file(self, file: Path, proof: WeightsProof) -> None:
        """Compare every tensor of a file, and remember which are wrong."""
        for name, entry in read_header(file).items():
            difference = self._compare(Stored(file, name, entry), proof)
            if difference != 0:  # also where it is not a number
                self.wrong[inner_name(name, self.start)] = difference

    def require_equal(self) -> None:
        """Reject a merged model in which a tensor is another.

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
        """Count a tensor in the proof, and return its largest difference from the files."""
        inner = inner_name(file_tensor.name, self.start)
        place = self.places.find(file_tensor.name, file_tensor.entry.shape)
        known = place.part.parameter if place.part else place.name
        named = inner if known is None else self.before + known
        group = self.groups.get(named, [named])
        adapted = next((n for n in group if n in self.adapted), None)
        trained = next((n for n in group if n in self.trained), None)
        tokens = next((self.of_tokens[n] for n in group if n in self.of_tokens), None)
        owners = (n.removesuffix(".weight") for n in group)
        codes = next((owner for owner in owners if owner in self.numbers), None)
        stored = self._stored(inner, group)
        if (adapted, trained, tokens, codes) == (None, None, None, None):
            if not stored:
                proof.unknown.append(inner)
                return 0.0
            if any(file_tensor.same_bytes(one) for one in stored):  # without reading them whole
                proof.identical += 1
                return 0.0
        written = file_tensor.read()
        if trained is not None and adapted is None:
            proof.trained += 1
            whole = self.trained[trained]
            wanted = whole if place.part is None else place.part.of(whole)
            return _difference(written, wanted.float())
        known_weights = [self.numbers[codes]] if codes else self._read(stored, group)
        if not known_weights:
            proof.unknown.append(inner)
            return 0.0
        if codes is None and all(tensor.dtype != written.dtype for tensor in known_weights):
            proof.loaded_as += 1
        if adapted is not None:
            proof.adapted += 1
        elif tokens is not None:
            proof.of_tokens += 1
        elif codes:
            proof.dequantised += 1
        else:
            proof.identical += 1
        change = (adapted, tokens, place.part)
        return min(
            self._from_base(w0 if codes else w0.to(written.dtype), written, *change)
            for w0 in known_weights
        )

    def _from_base(
        self,
        w0: Tensor,
        written: Tensor,
        adapted: str | None,
        tokens: SavedRows | None,
        part: ExpertPart | None,
    ) -> float:
        """Return the largest difference of a tensor from the base's with what was trained of it."""
        if w0.shape[:1] == written.shape[:1] == (1,) and w0.numel() < written.numel():
            w0, written = w0[0], written[0]  # BART's bias of the vocabulary is (1, vocabulary)
        if w0.shape[1:] != written.shape[1:] or w0.ndim != written.ndim:
            return math.inf
        count = len(w0) if w0.ndim else 0
        if w0.ndim and count < len(written):  # the vocabulary was made larger
            w0 = torch.cat([w0, torch.zeros_like(written[count:], dtype=w0.dtype)])
        if adapted is not None:
            w0 = self._with_update(adapted, w0.float(), part)
        if tokens is not None:
            w0 = w0.float().index_copy(0, torch.tensor(tokens.token_ids), tokens.rows.float())
        if w0.ndim and count < len(written):  # without new rows that no file has
            ids = set(tokens.token_ids if tokens else ())
            known = [i for i in range(len(w0)) if i < count or i in ids]
            w0, written = w0[known], written[known]
        return _difference(written, w0)

    def _stored(self, inner: str, group: list[str]) -> list[Stored]:
        """Return the base's tensor; of tied ones, of which a file may have several, each."""
        tied = [other for own in group for other in self.tied.get(own, [])]
        names = dict.fromkeys([inner, *(self._inner(other) for other in [*group, *tied])])
        return [self.base.places[name] for name in names if name in self.base.places]

    def _read(self, stored: list[Stored], group: list[str]) -> list[Tensor]:
        """Return the base's tensors, and each also in the order of the task's labels."""
        tensors = [one.read() for one in stored]
        if self.rows and any(self._inner(own).startswith(self.heads) for own in group):
            most = max(self.rows)
            tensors += [t[self.rows] for t in tensors if t.ndim and len(t) > most]
        return tensors

    def _with_update(self, name: str, w0: Tensor, part: ExpertPart | None) -> Tensor:
        """Return the merged weight of an adapted module in float32, in the shape of W0."""
        for one in self.changes:
            update = one.adapted.get(name)
            if update is None:
                continue
            if part is not None:
                for other in one.adapted.values():  # of one module at a time, as they are large
                    other.of_all = other.of_all if other.module is update.module else None
                w0 = update.of_expert(w0, part, self.in_parts)
            elif (found := update.written_out(w0)) is not None:
                w0 = found
            else:
                w0 = update.layer().merged_weight(w0)
        return w0


def label_rows(model: nn.Module, recipe: Recipe) -> list[int]:
    """Return which of the base's outputs each label has; none where their order is the same."""
    if isinstance(model, Bundle) or not (labels := own_names(model.config)):
        return []
    rows = match_rows(own := own_names(load_config(recipe)), labels)
    known = [row for row in rows if row is not None]
    return known if labels != own and len(known) == len(labels) else []


def _difference(written: Tensor, wanted: Tensor) -> float:
    """Return the largest difference from a tensor that is rounded to the dtype of the other."""
    rounded = wanted.to(written.dtype)
    if rounded.shape != written.shape:
        return math.inf
    if torch.equal(_bytes(rounded), _bytes(written)):
        return 0.0
    difference = float((rounded.double() - written.double()).abs().max())
    return difference or math.ulp(0.0)  # only the sign of a zero


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
