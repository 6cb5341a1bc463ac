r"""EVA: start A at the main directions of a layer's inputs (https://arxiv.org/abs/2410.07170).

Train rows go through the base, and of each layer's inputs the principal components are found batch
by batch, until they hardly change. A starts at them and B at zero, so step 0 is the base model. The
ranks of all layers together stay what they were, but they go where components explain most of the
variance of their inputs: a layer may get up to `rho` times its rank, or none and no adapter. Alpha
grows with the rank, so that the scale of the update stays as it was.

Layers that read the same input, as query, key and value do, share its components.

This is PEFT's method, number by number (`initialize_lora_eva_weights`), but for what stops PEFT: a
batch with fewer tokens than components waits for the next one, and small layers have an exact SVD.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import xxhash
from torch import Tensor, nn

from lora_cli.adapters.attach import add_layer, lora_layers
from lora_cli.adapters.lora import LoRALayer, LoRALinear
from lora_cli.adapters.targets import Target
from lora_cli.adapters.variants import layers_to_train
from lora_cli.recipe import AdapterSpec

ALIKE = 0.99  # cosine of a component with itself one batch earlier: it has been found
MOST_BATCHES = 1000
SEED = 42  # of the approximate SVD
Look = Callable[[], Tensor | None]
"""Puts a batch through the model; returns which positions of it count (B, T), or None for all."""


@dataclass
class Components:
    """The principal components of inputs that come in batches (incremental PCA, Ross et al. 2008).

    Args:
        count: How many are kept.
    """

    count: int
    vectors: Tensor | None = None
    """(count, in), of unit length, the one that explains most first; None until there are inputs
    enough, and nothing else is known until then."""
    found: Tensor = field(init=False)
    """Which of them hardly changed with the last batch (count,)."""
    shares: Tensor = field(init=False)
    """The share of the variance that each explains (count,)."""
    _strengths: Tensor = field(init=False)
    _mean: Tensor = field(init=False)
    _variance: Tensor = field(init=False)
    _seen: int = 0
    _waiting: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor) -> None:
        """Take in more inputs (rows, in)."""
        x = torch.cat([*self._waiting, x.float()])
        self._waiting = [x] if len(x) < self.count else []
        if not self._waiting:
            self._fit(x)

    def _fit(self, x: Tensor) -> None:
        before, rows, seen = self.vectors, len(x), self._seen
        mean = self._update_moments(x)
        if before is None:
            x = (x - mean).to(x.dtype)
        else:
            own_mean = x.mean(dim=0)
            correction = (seen / (seen + rows) * rows) ** 0.5 * (mean - own_mean)
            parts = (self._strengths[:, None] * before, x - own_mean, correction[None])
            x = torch.cat([part.double() for part in parts])
        strengths, vectors = _right_singular(x, self.count)
        self.shares = (strengths**2 / (self._variance * self._seen).sum())[: self.count]
        self.vectors, self._strengths = vectors[: self.count], strengths[: self.count]
        self.found = torch.zeros(self.count, dtype=torch.bool, device=x.device)
        if before is not None:
            alike = nn.functional.cosine_similarity(self.vectors, before.to(x.dtype))
            self.found = alike >= ALIKE

    def _update_moments(self, x: Tensor) -> Tensor:
        """Count more rows in mean and variance; return the mean that the correction is made with.

        That is the mean of the rows before, or of the first rows themselves.
        """
        wide, rows, seen = x.double(), len(x), self._seen
        own_mean = wide.mean(dim=0)
        spread = ((wide - own_mean) ** 2).sum(dim=0)
        self._seen += rows
        if not seen:
            self._mean, self._variance = own_mean, spread / rows
            return own_mean
        before = self._mean
        self._mean = (before * seen + own_mean * rows) / self._seen
        between = (before - own_mean) ** 2 * (seen * rows / self._seen)
        self._variance = (self._variance * seen + spread + between) / self._seen
        return before


def _right_singular(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return singular values, and right vectors whose largest entry is positive."""
    if 2 * count > min(x.shape):
        _, strengths, vectors = torch.linalg.svd(x, full_matrices=False)
    else:
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(SEED)
            _, strengths, columns = torch.svd_lowrank(x, q=2 * count, niter=4)
        vectors = columns.T
    largest = vectors.abs().argmax(dim=1, keepdim=True)
    return strengths, vectors.mul(vectors.gather(1, largest).sign())


# ------------------------------------------------------------------------------------ all layers


@torch.no_grad()
def find_starts(
    model: nn.Module, batches: Iterator[Look], rho: float
) -> tuple[dict[str, Tensor], int]:
    """Return where A starts in each linear layer with an adapter (rank, in); the rank may be 0.

    Layers that the first batch does not reach, as an expert that no token is sent to, are left out.

    Args:
        model: With fresh layers; it is left in eval mode.
        batches: Train rows, as many as there are wanted.
        rho: Largest factor by which a rank may grow.

    Returns:
        The starts by the names of the modules, and how many layers were still changing when
        `MOST_BATCHES` had been read.
    """
    model.eval()
    layers = {n: m for n, m in lora_layers(model).items() if isinstance(m, LoRALinear)}
    first = next(batches)
    leaders = _leaders(layers, first)
    layers = {name: layer for name, layer in layers.items() if name in leaders}
    most = {
        name: min(round(layer.rank * rho), layer.lora_A.shape[1]) for name, layer in layers.items()
    }
    most |= {n: max(most[m] for m in layers if leaders[m] == leaders[n]) for n in layers}
    found = {name: Components(most[name]) for name in layers if leaders[name] == name}
    budget, ranks, changing = sum(layer.rank for layer in layers.values()), most, list(found)
    for number, look in enumerate(_after(first, batches)):
        changing = [n for n, part in found.items() if not _is_found(part, ranks[n])]
        if not changing or number == MOST_BATCHES:
            break
        inputs = {name: found[name].add for name in changing}
        _observe({name: layers[name] for name in changing}, look, inputs)
        if all(part.vectors is not None for part in found.values()):
            ranks = _ranks(found, leaders, budget, most)
    starts = {}
    for name in layers:
        vectors = found[leaders[name]].vectors
        if vectors is not None:  # else no rows were enough for so many components
            starts[name] = vectors[: ranks[name]].float()
    return starts, len(changing)


def _after(first: Look, batches: Iterator[Look]) -> Iterator[Look]:
    yield first
    yield from batches


def _is_found(part: Components, rank: int) -> bool:
    return part.vectors is not None and bool(part.found[:rank].all())


def _observe(
    layers: Mapping[str, nn.Module], look: Look, take: Mapping[str, Callable[[Tensor], None]]
) -> None:
    """Put a batch through the model, and hand the inputs of layers on, as rows."""
    inputs: dict[str, Tensor] = {}
    handles = []
    for name, layer in layers.items():

        def keep(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            inputs[name] = args[0]

        handles.append(layer.register_forward_pre_hook(keep))
    try:
        counted = look()
    finally:
        for handle in handles:
            handle.remove()
    for name, x in inputs.items():
        fits = counted is not None and x.ndim > 2 and x.shape[:2] == counted.shape
        take[name](x[counted] if fits else x.reshape(-1, x.shape[-1]))


def _leaders(layers: Mapping[str, LoRALayer], look: Look) -> dict[str, str]:
    """Return for each layer that a batch reaches the first one that reads the same input."""
    hashes: dict[str, str] = {}

    def hashing(name: str) -> Callable[[Tensor], None]:
        def take(x: Tensor) -> None:
            data = x.contiguous().cpu().view(torch.uint8).numpy().tobytes()
            hashes[name] = f"{tuple(x.shape)} {xxhash.xxh3_128_hexdigest(data)}"

        return take

    _observe(layers, look, {name: hashing(name) for name in layers})
    first: dict[str, str] = {}
    return {name: first.setdefault(hashes[name], name) for name in layers if name in hashes}


def _ranks(
    found: Mapping[str, Components], leaders: Mapping[str, str], budget: int, most: dict[str, int]
) -> dict[str, int]:
    """Return the ranks of all layers: the components that explain most get the budget."""
    order = [name for name in leaders if name in found]
    # those that share an input come after, in the order of whom they share it with
    order += [n for first in found for n in leaders if leaders[n] == first and n != first]
    shares = {name: found[leaders[name]].shares[: most[name]] for name in order}
    owners = [name for name, of_one in shares.items() for _ in of_one]
    best = torch.cat(list(shares.values())).argsort(descending=True)[:budget]
    counts = Counter(owners[i] for i in best.tolist())
    ranks = {name: counts.get(name, 0) for name in order}
    for name in order:  # the layer that has the components gets the largest rank of its group
        first = leaders[name]
        both = ranks[first], ranks[name]
        ranks[first], ranks[name] = max(both), min(both)
    return ranks


def give_ranks(model: nn.Module, ranks: Mapping[str, int], spec: AdapterSpec) -> None:
    """Give the linear layers with an adapter other ranks, in place; 0 takes the adapter away.

    Args:
        model: With fresh layers.
        ranks: By the names of modules; 0 of those that are not named.
        spec: Says how layers are scaled.
    """
    for name, layer in lora_layers(model).items():
        rank = ranks.get(name, 0)
        if not isinstance(layer, LoRALinear) or rank == layer.rank:
            continue
        parent_name, _, child_name = name.rpartition(".")
        setattr(model.get_submodule(parent_name), child_name, layer.base)
        if rank == 0:
            if spec.bias == "lora_only" and layer.bias is not None:
                layer.bias.requires_grad_(False)
            continue
        target = Target(name, rank, layer.alpha * rank / layer.rank)
        kinds = layers_to_train(spec)
        fresh = add_layer(model, target, kinds, spec.dropout, spec.use_rslora)
        fresh.reset_parameters()


@torch.no_grad()
def start_at(model: nn.Module, starts: Mapping[str, Tensor], spec: AdapterSpec) -> None:
    """Give layers the ranks of their starts, and A the start itself; B stays zero."""
    as_drawn = {name: layer.rank for name, layer in lora_layers(model).items()}
    give_ranks(model, as_drawn | {name: len(start) for name, start in starts.items()}, spec)
    for name, layer in lora_layers(model).items():
        if name in starts:
            layer.lora_A.copy_(starts[name])
