r"""The starting values of A and B, which can depend on the weights of the base.

    default      A at random, B zero: `LoRALayer.reset_parameters`
    orthogonal   both at random, and B A = 0: the rows of a random orthogonal matrix go to A and B
                 in turn (https://datta0.github.io/posts/rethink-lora-init/)
    pissa        s B A is the part of W0 of its largest singular values, W0 = U S V^T:
                 A = sqrt(S/s) V^T, B = U sqrt(S/s)       (https://arxiv.org/abs/2404.02948)
    olora        B is the first columns of Q, A the first rows of R, W0 = Q R
                                                          (https://arxiv.org/abs/2406.01775)
    loftq        s B A is the part of W0 - Q of its largest singular values, where Q is what
                 quantising has left of W0                (https://arxiv.org/abs/2310.08659)
    eva          A is found from the inputs of the layers: `eva.py`

PiSSA and OLoRA subtract s B A from the base (`residual_lora.py`). LoftQ makes one iteration: more
would quantise another weight than the base's, which no other program could load. PEFT's LoftQ
ignores s, so it compensates the loss of quantising only if alpha is equal to the rank.

All are for linear layers; embeddings and convolutions have the default start, as in PEFT.
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


def reject_impossible_starts(model: nn.Module, targets: Iterable[Target], recipe: Recipe) -> None:
    """Check that the targets can start as `adapter.init` says, and print which of them do not.

    Args:
        model: The base model; may be on the meta device.
        targets: The modules that get an adapter.
        recipe: Its `adapter` section says how they start.

    Raises:
        LoraError: With every rank that a start cannot have, or if it fits none of the targets.
    """
    spec, at = recipe.adapter, recipe.at("adapter.init")
    if spec.init == "default":
        return
    problems, others, fitting = [], [], 0
    for target in targets:
        base = model.get_submodule(target.name)
        if not _starts(base, spec):
            others.append(target.name)
            continue
        fitting += 1
        n_in, n_out = _features(base)
        what = f"`init: {spec.init}` cannot have rank {target.rank} at `{target.name}`"
        if spec.init == "orthogonal" and target.rank % 2:
            problems.append(Problem(f"{what}: it needs an even one", at, "take an even rank"))
        # EVA has as many directions as inputs; the others decompose the weight
        most = n_in if spec.init == "eva" else min(n_in, n_out)
        if spec.init != "orthogonal" and target.rank > most:
            shape = f"its weight is {n_out} x {n_in}"
            hint = f"take a rank of at most {most}, or leave the module out"
            problems.append(Problem(f"{what}: {shape}", at, hint))
    if not fitting:
        kind = "quantised linear layer" if spec.init == "loftq" else "linear layer"
        what = f"`init: {spec.init}` is for linear layers, and no target is a {kind}"
        problems.append(Problem(what, at, "leave `init` out"))
    if problems:
        raise LoraError(problems[:SHOWN])
    if others:
        listed = ", ".join(f"`{name}`" for name in others[:SHOWN])
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        start = "starts" if len(others) == 1 else "start"
        warn(f"{listed}{more} {start} by default: `init: {spec.init}` is for {_for(spec)}")


def _for(spec: AdapterSpec) -> str:
    return "quantised linear layers" if spec.init == "loftq" else "linear layers"


def _starts(base: nn.Module, spec: AdapterSpec) -> bool:
    """Return whether a module starts otherwise than by default."""
    return isinstance(base, QuantizedLinear) if spec.init == "loftq" else LoRALinear.fits(base)


def _features(base: nn.Module) -> tuple[int, int]:
    """Return the sizes of a linear layer's input and output."""
    if isinstance(base, nn.Linear):
        return base.in_features, base.out_features
    assert isinstance(base, Conv1D)
    n_in, n_out = base.weight.shape
    return n_in, n_out


@torch.no_grad()
def start_layers(model: nn.Module, layers: Mapping[str, LoRALayer], recipe: Recipe) -> None:
    """Let the layers of a model start as `adapter.init` says; `eva` needs batches, and comes later.

    Args:
        model: Its base says what is in the checkpoint.
        layers: By the names of the modules that they adapt; already drawn as by default.
        recipe: Its `adapter` section says how, and `model` where the original weights are.
    """
    spec = recipe.adapter
    if spec.init in ("default", "eva"):
        return
    originals = OriginalWeights(recipe, model) if spec.init == "loftq" else None
    for name, layer in layers.items():
        if not _starts(layer.base, spec) or layer.lora_A.is_meta:
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
    """Return A and B with s B A = the part of W0 of its largest singular values.

    Args:
        w0: (out, in), float32.
        rank: How many singular values.
        scaling: s.
        n_iterations: Of the subspace that is iterated for an approximation; None is exact.
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
    """Return A and B with Q + s B A nearer to W0 than any others of this rank.

    Args:
        w0: The weight before it was quantised (out, in), float32.
        quantised: Q, the numbers that its codes stand for.
        rank: Of A and B.
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
