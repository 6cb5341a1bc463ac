r"""Initialise A and B, for some methods from the weights of the base.

    default      A at random, B zero: `LoRALayer.reset_parameters`
    orthogonal   both at random, and B A = 0: A and B get alternating rows of a random orthogonal
                 matrix (https://datta0.github.io/posts/rethink-lora-init/)
    pissa        s B A is the part of W0 with the largest singular values, W0 = U S V^T:
                 A = sqrt(S/s) V^T, B = U sqrt(S/s)       (https://arxiv.org/abs/2404.02948)
    olora        B is the first columns of Q, A the first rows of R, W0 = Q R
                                                          (https://arxiv.org/abs/2406.01775)
    loftq        s B A is the part of W0 - Q with the largest singular values, where Q is the
                 quantised W0                             (https://arxiv.org/abs/2310.08659)
    eva          A is computed from the inputs of the layers: `eva.py`

PiSSA and OLoRA subtract s B A from the base (`residual_lora.py`). LoftQ does one iteration: more
would quantise a weight other than the base's, which no other program could load. PEFT's LoftQ
ignores s, so it compensates the quantisation error only if alpha is equal to the rank.

All methods are for linear layers; embeddings and convolutions are initialised by default, as in
PEFT.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_cli.adapters.lora import LoRALayer, LoRALinear
from lora_cli.adapters.targets import Target
from lora_cli.errors import LoraError, Problem, warn
from lora_cli.models.original_weights import OriginalWeights
from lora_cli.models.quantized_linear import QuantizedLinear
from lora_cli.recipe import AdapterSpec, Recipe

SHOWN = 3
Pair = tuple[Tensor, Tensor]
"""A (rank, in) and B (out, rank)."""


def check_initialisation(model: nn.Module, targets: Iterable[Target], recipe: Recipe) -> None:
    """Check that `adapter.init` is possible for the targets, and warn about those that it skips.

    Args:
        model: The base model; may be on the meta device.
        targets: The modules that get an adapter.
        recipe: Its `adapter` section names the initialisation.

    Raises:
        LoraError: For all ranks that the initialisation does not allow, or if it fits no target.
    """
    spec, at = recipe.adapter, recipe.at("adapter.init")
    if spec.init == "default":
        return
    problems, skipped, n_fitting = [], [], 0
    for target in targets:
        base = model.get_submodule(target.name)
        if not _applies_to(base, spec):
            skipped.append(target.name)
            continue
        n_fitting += 1
        n_in, n_out = _features(base)
        what = f"`init: {spec.init}` cannot have rank {target.rank} at `{target.name}`"
        if spec.init == "orthogonal" and target.rank % 2:
            problems.append(Problem(f"{what}: it needs an even one", at, "take an even rank"))
        # EVA has as many directions as inputs; the others decompose the weight
        max_rank = n_in if spec.init == "eva" else min(n_in, n_out)
        if spec.init != "orthogonal" and target.rank > max_rank:
            shape = f"its weight is {n_out} x {n_in}"
            hint = f"take a rank of at most {max_rank}, or leave the module out"
            problems.append(Problem(f"{what}: {shape}", at, hint))
    if not n_fitting:
        kind = "quantised linear layer" if spec.init == "loftq" else "linear layer"
        what = f"`init: {spec.init}` is for linear layers, and no target is a {kind}"
        problems.append(Problem(what, at, "leave `init` out"))
    if problems:
        raise LoraError(problems[:SHOWN])
    if skipped:
        listed = ", ".join(f"`{name}`" for name in skipped[:SHOWN])
        more = f" and {len(skipped) - SHOWN} more" if len(skipped) > SHOWN else ""
        start = "starts" if len(skipped) == 1 else "start"
        warn(f"{listed}{more} {start} by default: `init: {spec.init}` is for {_for(spec)}")


def _for(spec: AdapterSpec) -> str:
    return "quantised linear layers" if spec.init == "loftq" else "linear layers"


def _applies_to(base: nn.Module, spec: AdapterSpec) -> bool:
    """Return whether `adapter.init` applies to a module."""
    return isinstance(base, QuantizedLinear) if spec.init == "loftq" else LoRALinear.fits(base)


def _features(base: nn.Module) -> tuple[int, int]:
    """Return the sizes of a linear layer's input and output."""
    if isinstance(base, nn.Linear):
        return base.in_features, base.out_features
    assert isinstance(base, Conv1D)
    n_in, n_out = base.weight.shape
    return n_in, n_out


@torch.no_grad()
def initialise_layers(model: nn.Module, layers: Mapping[str, LoRALayer], recipe: Recipe) -> None:
    """Initialise the layers of a model by `adapter.init`, except `eva`, which needs batches.

    Args:
        model: The model that contains the layers.
        layers: The layers by the names of their modules, already initialised by default.
        recipe: Its `adapter` section names the method, and `model` the original weights.
    """
    spec = recipe.adapter
    if spec.init in ("default", "eva"):
        return
    originals = OriginalWeights(recipe, model) if spec.init == "loftq" else None
    for name, layer in layers.items():
        if not _applies_to(layer.base, spec) or layer.lora_A.is_meta:
            continue
        assert isinstance(layer, LoRALinear)
        if originals is not None:
            layer.start_at(*loftq(originals.of(name), layer.w0(), layer.rank, layer.scaling))
        elif spec.init == "orthogonal":
            n_in, n_out = _features(layer.base)
            layer.start_at(*orthogonal(n_in, n_out, layer.rank))
        elif spec.init == "olora":
            layer.start_at(*olora(layer.w0(), layer.rank))
        else:
            n_iterations = int(spec.init.rpartition("_")[2]) if "niter" in spec.init else None
            layer.start_at(*pissa(layer.w0(), layer.rank, layer.scaling, n_iterations))


def pissa(w0: Tensor, rank: int, scaling: float, n_iterations: int | None = None) -> Pair:
    """Return A and B so that s B A is the part of W0 with the largest singular values.

    Args:
        w0: (out, in), float32.
        rank: The number of singular values.
        scaling: s.
        n_iterations: The number of subspace iterations of a randomised SVD; None for an exact SVD.
    """
    if n_iterations is None:
        u, s, vh = torch.linalg.svd(w0, full_matrices=False)
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    else:
        u, s, v = torch.svd_lowrank(w0, rank, n_iterations)
        vh = v.T
    root = torch.diag((s / scaling).sqrt())
    return root @ vh, u @ root


def olora(w0: Tensor, rank: int) -> Pair:
    """Return the first rows of R and columns of Q, W0 = Q R (out, in)."""
    q, r = torch.linalg.qr(w0)
    return r[:rank], q[:, :rank]


def loftq(w0: Tensor, quantised: Tensor, rank: int, scaling: float) -> Pair:
    """Return A and B of this rank for which Q + s B A is closest to W0.

    Args:
        w0: The weight before it was quantised (out, in), float32.
        quantised: Q, the dequantised weight (out, in).
        rank: The rank of A and B.
        scaling: s.
    """
    u, s, vh = torch.linalg.svd(w0 - quantised, full_matrices=False)
    root = (s[:rank] / scaling).sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


def orthogonal(n_in: int, n_out: int, rank: int) -> Pair:
    """Return random A and B with B A = 0: their rows and columns span orthogonal spaces."""
    # on the CPU, so that a seed gives the same adapter on every device
    q, _ = torch.linalg.qr(torch.randn(rank, rank))
    half = rank // 2
    a = (torch.randn(n_in, half) @ q[0::2]).T / 10
    b = torch.randn(half, n_out).T @ q[1::2] / 10
    return a, b
