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
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lora_cli.adapters.load_adapter import chosen_layers
from lora_cli.adapters.lora import LoRAEmbedding, LoRALayer, LoRALinear
from lora_cli.adapters.lora_parameter import LoRAParameter
from lora_cli.adapters.peft_format.adapter_folder import AdapterFolder, read_adapter
from lora_cli.adapters.peft_format.peft_experts import with_current_names
from lora_cli.adapters.peft_format.peft_tensors import sort_tensors
from lora_cli.adapters.peft_format.peft_tokens import SavedRows, saved_rows, split_rows
from lora_cli.adapters.variants import layer_for, layers_of
from lora_cli.errors import IntegrityError, counted
from lora_cli.models.base_model import checkpoint_files, load_config
from lora_cli.models.bundle import Bundle
from lora_cli.models.fingerprint import inner_name
from lora_cli.recipe import Recipe
from lora_cli.tasks.head_rows import match_rows, own_names

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
    adapter: AdapterFolder,
    recipe: Recipe,
    ties: Iterable[list[str]],
    numbers: dict[str, Tensor],
    heads: Iterable[str],
) -> WeightsProof:
    """Compare every tensor of a merged folder with the files that it was made from.

    Args:
        folder: Of the merged model.
        model: The merged model, for the names and kinds of its modules; not for its weights.
        adapter: As `load_adapter` got it; its tensors are read from the folder again.
        recipe: Its `model` section names the base.
        ties: The names that shared a parameter in the base.
        numbers: Weights that modules of the base got instead of those of its files.
        heads: Names of modules whose outputs are in the order of the task's labels, not the base's.

    Raises:
        IntegrityError: If a tensor is another; the largest difference is named.
    """
    proof = WeightsProof(FORMULAS.get(adapter.type, "W0 + s B A"))
    sources = _Sources(model, adapter, ties, numbers)
    sources.rows, sources.heads = _rows(model, recipe), tuple(f"{head}." for head in heads)
    parts = model.parts if isinstance(model, Bundle) else {"": model}
    wrong: dict[str, float] = {}
    for part, module in parts.items():
        start = f"{getattr(module, 'base_model_prefix', '')}."
        base = _Tensors(checkpoint_files(recipe, part), start)
        merged = _Tensors(sorted((folder / part).glob("*.safetensors")), start)
        sources.enter(part, start, base)
        if not base.places:
            proof.reason = "the base has no safetensors files"
        elif lost := sources.not_in(merged.places):
            proof.reason = f"the files have another name for `{lost}`"
        if proof.reason:
            return proof
        for name, written in merged:
            difference = sources.compare(name, written, proof)
            if difference != 0:  # also where it is not a number
                wrong[name] = difference
    if wrong:
        worst = max(wrong, key=lambda name: (math.isnan(wrong[name]), wrong[name]))
        raise IntegrityError(
            "the merged model is not what the files of base and adapter say, in "
            f"{counted(len(wrong), 'tensor')}: the largest difference is {wrong[worst]:.1e}, "
            f"of `{worst}`",
            "--to",
            "please report this: merging should be exact",
        )
    return proof


class _Tensors:
    """The tensors of safetensors files, by their names inside the pretrained model."""

    def __init__(self, files: Iterable[Path], start: str) -> None:
        self.places: dict[str, tuple[Path, str]] = {}
        for file in files:
            with safe_open(file, "pt") as handle:
                for name in handle.keys():  # noqa: SIM118 - it is no dictionary
                    self.places[inner_name(name, start)] = (file, name)
        self._opened: tuple[Path, Any] | None = None  # files are large: one at a time

    def read(self, name: str) -> Tensor:
        """Return a tensor, in memory of its own."""
        file, stored = self.places[name]
        if self._opened is None or self._opened[0] != file:
            self._opened = (file, safe_open(file, "pt"))
        tensor: Tensor = self._opened[1].get_tensor(stored)
        return tensor.clone()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.places:
            yield name, self.read(name)


class _Sources:
    """What the files of base and adapter say of each tensor of one part of a model."""

    def __init__(
        self,
        model: nn.Module,
        adapter: AdapterFolder,
        ties: Iterable[list[str]],
        numbers: dict[str, Tensor],
    ) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.config, self.kind, self.numbers = adapter.config, adapter.type, numbers
        self.tied = {name: group for group in ties for name in group}
        self.rows: list[int] = []
        self.heads: tuple[str, ...] = ()
        again = read_adapter(adapter.path).tensors
        # the names may have been put right since the first reading, in the same order
        tensors = dict(zip(adapter.tensors, again.values(), strict=True))
        adapter, of_tokens = split_rows(
            with_current_names(replace(adapter, tensors=tensors), model)
        )
        found = sort_tensors(adapter.tensors, self.kind, self.parameters)
        chosen, _ = chosen_layers(found.of_layers, model, adapter, layers_of(self.kind))
        self.trained = found.plain
        self.adapted = {
            f"{target.name}.{target.parameter or 'weight'}": (target, shapes, found.of_layers[site])
            for site, (target, shapes) in chosen.items()
        }
        self.of_tokens = {
            f"{place}.weight": saved
            for saved in saved_rows(model, of_tokens, adapter)[0]
            for place in (saved.name, *saved.others)
        }

    def enter(self, part: str, start: str, base: _Tensors) -> None:
        """Go on with a part of the model: the names below are those inside it."""
        self.before, self.start, self.base = f"{part}." if part else "", start, base
        sharers: dict[int, list[str]] = {}
        for name, parameter in self.parameters.items():
            if name.startswith(self.before):
                sharers.setdefault(id(parameter), []).append(name)
        self.names = {self._inner(name): group for group in sharers.values() for name in group}

    def _inner(self, name: str) -> str:
        return inner_name(name.removeprefix(self.before), self.start)

    def not_in(self, written: Collection[str]) -> str | None:
        """Return the first parameter that the adapter changes and that no file has by its name."""
        for name in [*self.adapted, *self.of_tokens, *self.trained]:
            if name.startswith(self.before):
                group = self.names.get(self._inner(name), [name])
                if not any(self._inner(other) in written for other in group):
                    return name
        return None

    def compare(self, name: str, written: Tensor, proof: WeightsProof) -> float:
        """Count a tensor in the proof, and return its largest difference from the files.

        Args:
            name: Inside the pretrained model.
            written: The tensor of the merged folder.
            proof: Gets the count.
        """
        group = self.names.get(name, [name])
        adapted = next((n for n in group if n in self.adapted), None)
        trained = next((n for n in group if n in self.trained), None)
        tokens = next((self.of_tokens[n] for n in group if n in self.of_tokens), None)
        owners = (n.removesuffix(".weight") for n in group)
        codes = next((owner for owner in owners if owner in self.numbers), None)
        if trained is not None and adapted is None:
            proof.trained += 1
            return _difference(written, self.trained[trained].float())
        stored = [self.numbers[codes]] if codes else self._stored(name, group)
        if not stored:
            proof.unknown.append(name)
            return 0.0
        if codes is None and all(tensor.dtype != written.dtype for tensor in stored):
            proof.loaded_as += 1
        if adapted is not None:
            proof.adapted += 1
        elif tokens is not None:
            proof.of_tokens += 1
        elif codes:
            proof.dequantised += 1
        else:
            proof.identical += 1
        return min(
            self._from_base(w0 if codes else w0.to(written.dtype), written, adapted, tokens)
            for w0 in stored
        )

    def _from_base(
        self, w0: Tensor, written: Tensor, adapted: str | None, tokens: SavedRows | None
    ) -> float:
        """Return the largest difference of a tensor from the base's with what was trained of it."""
        if w0.shape[1:] != written.shape[1:] or w0.ndim != written.ndim:
            return math.inf
        count = len(w0) if w0.ndim else 0
        if w0.ndim and count < len(written):  # the vocabulary was made larger
            w0 = torch.cat([w0, torch.zeros_like(written[count:], dtype=w0.dtype)])
        if adapted is not None:
            w0 = self._with_update(adapted, w0.float())
        if tokens is not None:
            w0 = w0.float().index_copy(0, torch.tensor(tokens.token_ids), tokens.rows.float())
        if w0.ndim and count < len(written):  # without new rows that no file has
            ids = set(tokens.token_ids if tokens else ())
            known = [i for i in range(len(w0)) if i < count or i in ids]
            w0, written = w0[known], written[known]
        return _difference(written, w0)

    def _stored(self, name: str, group: list[str]) -> list[Tensor]:
        """Return the base's tensor; of tied ones, of which a file may have several, each."""
        tied = [other for own in group for other in self.tied.get(own, [])]
        names = dict.fromkeys([name, *(self._inner(other) for other in [*group, *tied])])
        stored = [self.base.read(other) for other in names if other in self.base.places]
        if self.rows and any(own.startswith(self.heads) for own in group):
            most = max(self.rows)
            stored += [t[self.rows] for t in stored if t.ndim and len(t) > most]
        return stored

    def _with_update(self, name: str, w0: Tensor) -> Tensor:
        """Return the merged weight of an adapted module in float32, in the shape of W0."""
        target, shapes, own = self.adapted[name]
        module, use_rslora = self.modules[target.name], bool(self.config.get("use_rslora"))
        kind = None if target.parameter else layer_for(module, layers_of(self.kind))
        if kind in (LoRALinear, LoRAEmbedding):
            a, b = own["lora_A"].float(), own["lora_B"].float()
            s = target.alpha / (math.sqrt(len(a)) if use_rslora else len(a))
            delta = s * (b @ a)
            return w0 + (delta if isinstance(module, nn.Linear) else delta.T)
        layer: LoRALayer
        if target.parameter is not None:
            named = (module, target.parameter, target.rank, target.alpha)
            layer = LoRAParameter(*named, use_rslora)
        else:
            assert kind is not None, f"{target.name} was adapted and no layer fits it"
            layer = kind(module, target.rank, target.alpha, 0.0, use_rslora, shapes)
        for parameter, tensor in own.items():
            layer.from_peft(parameter, tensor.clone())
        return layer.merged_weight(w0)


def _rows(model: nn.Module, recipe: Recipe) -> list[int]:
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
