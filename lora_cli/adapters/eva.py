r"""EVA: start A at the principal components of a layer's inputs (https://arxiv.org/abs/2410.07170).

Train rows are run through the base model, and the principal components of each layer's inputs are
updated batch by batch until they converge. A starts at the components and B at zero, so training
starts at the base model. The sum of all ranks stays the same, but ranks are redistributed to the
components that explain most of the variance of their inputs: a layer may get up to `rho` times its
rank, or rank 0 and no adapter. Alpha grows with the rank, so that the scaling stays the same.

Layers that read the same input, such as query, key and value, share its components.

The values are those of PEFT's `initialize_lora_eva_weights`, except where PEFT raises an error: a
batch with fewer tokens than components is joined with the next one, and small layers get an exact
SVD.
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

CONVERGED = 0.99  # least cosine similarity of a converged component in consecutive batches
MAX_BATCHES = 1000
SEED = 42  # of the approximate SVD
RunBatch = Callable[[], Tensor | None]
"""Runs a batch through the model; returns a mask of the tokens to use (B, T), or None for all."""


@dataclass
class Components:
    """The principal components of batches of inputs (incremental PCA, Ross et al. 2008).

    Args:
        count: The number of components.
    """

    count: int
    vectors: Tensor | None = None
    """Unit vectors (count, in), by decreasing variance. None until there are as many inputs as
    components; the attributes below are unset until then."""
    converged: Tensor = field(init=False)
    """Which components hardly changed with the last batch (count,)."""
    shares: Tensor = field(init=False)
    """The share of the variance that each component explains (count,)."""
    _strengths: Tensor = field(init=False)
    _mean: Tensor = field(init=False)
    _variance: Tensor = field(init=False)
    _n_rows: int = 0
    _pending: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor) -> None:
        """Update the components with further inputs (rows, in)."""
        x = torch.cat([*self._pending, x.float()])
        self._pending = [x] if len(x) < self.count else []
        if not self._pending:
            self._fit(x)

    def _fit(self, x: Tensor) -> None:
        old_vectors, rows, n_before = self.vectors, len(x), self._n_rows
        mean = self._update_moments(x)
        if old_vectors is None:
            x = (x - mean).to(x.dtype)
        else:
            own_mean = x.mean(dim=0)
            correction = (n_before / (n_before + rows) * rows) ** 0.5 * (mean - own_mean)
            parts = (self._strengths[:, None] * old_vectors, x - own_mean, correction[None])
            x = torch.cat([part.double() for part in parts])
        strengths, vectors = _right_singular(x, self.count)
        self.shares = (strengths**2 / (self._variance * self._n_rows).sum())[: self.count]
        self.vectors, self._strengths = vectors[: self.count], strengths[: self.count]
        self.converged = torch.zeros(self.count, dtype=torch.bool, device=x.device)
        if old_vectors is not None:
            similarity = nn.functional.cosine_similarity(self.vectors, old_vectors.to(x.dtype))
            self.converged = similarity >= CONVERGED

    def _update_moments(self, x: Tensor) -> Tensor:
        """Update the mean and the variance; return the mean of the earlier rows for the correction.

        For the first rows, return their own mean.
        """
        x64, rows, n_before = x.double(), len(x), self._n_rows
        own_mean = x64.mean(dim=0)
        spread = ((x64 - own_mean) ** 2).sum(dim=0)
        self._n_rows += rows
        if not n_before:
            self._mean, self._variance = own_mean, spread / rows
            return own_mean
        old_mean = self._mean
        self._mean = (old_mean * n_before + own_mean * rows) / self._n_rows
        between = (old_mean - own_mean) ** 2 * (n_before * rows / self._n_rows)
        self._variance = (self._variance * n_before + spread + between) / self._n_rows
        return old_mean


def _right_singular(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the singular values and right singular vectors; each vector's largest entry is > 0."""
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
    model: nn.Module, batches: Iterator[RunBatch], rho: float
) -> tuple[dict[str, Tensor], int]:
    """Return the initial A (rank, in) of each linear layer with an adapter; the rank may be 0.

    Layers that the first batch does not reach, such as an expert without tokens, are left out.

    Args:
        model: The model with newly attached layers; it is left in eval mode.
        batches: Batches of train rows; only as many as needed are read.
        rho: The largest factor by which a rank may grow.

    Returns:
        The initial matrices by module name, and the number of layers that had not converged after
        `MAX_BATCHES` batches.
    """
    model.eval()
    layers = {n: m for n, m in lora_layers(model).items() if isinstance(m, LoRALinear)}
    first = next(batches)
    leaders = _leaders(layers, first)
    layers = {name: layer for name, layer in layers.items() if name in leaders}
    max_ranks = {
        name: min(round(layer.rank * rho), layer.lora_A.shape[1]) for name, layer in layers.items()
    }
    max_ranks |= {n: max(max_ranks[m] for m in layers if leaders[m] == leaders[n]) for n in layers}
    components = {name: Components(max_ranks[name]) for name in layers if leaders[name] == name}
    budget, ranks, changing = (
        sum(layer.rank for layer in layers.values()),
        max_ranks,
        list(components),
    )
    for number, run_batch in enumerate(_prepended(first, batches)):
        changing = [n for n, c in components.items() if not _has_converged(c, ranks[n])]
        if not changing or number == MAX_BATCHES:
            break
        inputs = {name: components[name].add for name in changing}
        _observe({name: layers[name] for name in changing}, run_batch, inputs)
        if all(c.vectors is not None for c in components.values()):
            ranks = _ranks(components, leaders, budget, max_ranks)
    starts = {}
    for name in layers:
        vectors = components[leaders[name]].vectors
        if vectors is not None:  # otherwise there were fewer rows than components
            starts[name] = vectors[: ranks[name]].float()
    return starts, len(changing)


def _prepended(first: RunBatch, batches: Iterator[RunBatch]) -> Iterator[RunBatch]:
    yield first
    yield from batches


def _has_converged(components: Components, rank: int) -> bool:
    return components.vectors is not None and bool(components.converged[:rank].all())


def _observe(
    layers: Mapping[str, nn.Module],
    run_batch: RunBatch,
    consumers: Mapping[str, Callable[[Tensor], None]],
) -> None:
    """Run a batch through the model, and pass each layer's inputs (rows, in) to its function."""
    inputs: dict[str, Tensor] = {}
    handles = []
    for name, layer in layers.items():

        def hook(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            inputs[name] = args[0]

        handles.append(layer.register_forward_pre_hook(hook))
    try:
        token_mask = run_batch()
    finally:
        for handle in handles:
            handle.remove()
    for name, x in inputs.items():
        fits = token_mask is not None and x.ndim > 2 and x.shape[:2] == token_mask.shape
        consumers[name](x[token_mask] if fits else x.reshape(-1, x.shape[-1]))


def _leaders(layers: Mapping[str, LoRALayer], run_batch: RunBatch) -> dict[str, str]:
    """Map each layer that a batch reaches to the first layer that reads the same input."""
    hashes: dict[str, str] = {}

    def hash_input(name: str) -> Callable[[Tensor], None]:
        def take(x: Tensor) -> None:
            data = x.contiguous().cpu().view(torch.uint8).numpy().tobytes()
            hashes[name] = f"{tuple(x.shape)} {xxhash.xxh3_128_hexdigest(data)}"

        return take

    _observe(layers, run_batch, {name: hash_input(name) for name in layers})
    first: dict[str, str] = {}
    return {name: first.setdefault(hashes[name], name) for name in layers if name in hashes}


def _ranks(
    components: Mapping[str, Components],
    leaders: Mapping[str, str],
    budget: int,
    max_ranks: dict[str, int],
) -> dict[str, int]:
    """Return the ranks of all layers: the budget goes to the components that explain most."""
    order = [name for name in leaders if name in components]
    # followed by the layers that share an input, in the order of their leaders
    order += [n for first in components for n in leaders if leaders[n] == first and n != first]
    shares = {name: components[leaders[name]].shares[: max_ranks[name]] for name in order}
    owners = [name for name, values in shares.items() for _ in values]
    best = torch.cat(list(shares.values())).argsort(descending=True)[:budget]
    counts = Counter(owners[i] for i in best.tolist())
    ranks = {name: counts.get(name, 0) for name in order}
    for name in order:  # the leader gets the largest rank of its group
        first = leaders[name]
        pair = ranks[first], ranks[name]
        ranks[first], ranks[name] = max(pair), min(pair)
    return ranks


def set_ranks(model: nn.Module, ranks: Mapping[str, int], spec: AdapterSpec) -> None:
    """Change the ranks of the linear layers with an adapter, in place; rank 0 removes the adapter.

    Args:
        model: The model with newly attached layers.
        ranks: The ranks by module name; 0 for modules that are not named.
        spec: The recipe's adapter section, which says how layers are scaled.
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
def set_starts(model: nn.Module, starts: Mapping[str, Tensor], spec: AdapterSpec) -> None:
    """Set the ranks of layers and A to the given initial matrices; B stays zero."""
    ranks = {name: layer.rank for name, layer in lora_layers(model).items()}
    set_ranks(model, ranks | {name: len(start) for name, start in starts.items()}, spec)
    for name, layer in lora_layers(model).items():
        if name in starts:
            layer.lora_A.copy_(starts[name])
