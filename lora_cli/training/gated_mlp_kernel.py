"""The gate of an MLP together with the low-rank updates around it, on a GPU: one kernel each way.

The MLP of Llama, and of most decoders since, computes `down(act(gate(x)) * up(x))`. With the
outputs G and U (tokens, n) of the frozen layers gate and up, and updates of rank r, that is

    g = G + h_g B_g^T,    u = U + h_u B_u^T,    y = act(g) u,    h = y A_d^T

where h_g and h_u (tokens, r) are s A x of the layers gate and up, and A_d is the A of down.
Computed one by one, the updates, g and u are matrices of n columns that are written to memory and
read again. Here a program adds the updates to its block of G and U, and writes y alone. The
backward pass computes the same blocks again, and adds the gradient that comes through h.

Both activations are g times a sigmoid: SiLU is g sigmoid(g), and the GELU of Gemma and others, by
its usual approximation, g sigmoid(z) with z = sqrt(8 / pi) (g + 0.044715 g^3).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS, COLUMNS, WARPS = 64, 64, 4  # of a program's block


@triton.jit
def _matrix(x, rows, columns, n_rows, n_columns):  # type: ignore[no-untyped-def]
    """Return the block of a matrix (n_rows, n_columns) at some rows and columns, 0 outside."""
    inside = (rows < n_rows) & (columns < n_columns)
    return tl.load(x + rows.to(tl.int64) * n_columns + columns, inside, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _with_update(x, h, b, tokens, columns, n_tokens, n_columns, rank, RANK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Return a block of x + h b^T in float32, of h (tokens, rank) and b (columns, rank)."""
    block = _matrix(x, tokens[:, None], columns[None, :], n_tokens, n_columns).to(tl.float32)
    if RANK:
        ranks = tl.arange(0, RANK)
        left = _matrix(h, tokens[:, None], ranks[None, :], n_tokens, rank)
        right = _matrix(b, columns[:, None], ranks[None, :], n_columns, rank)
        block += tl.dot(left, tl.trans(right))
    return block


@triton.jit  # type: ignore[untyped-decorator]
def _sigmoid_and_slope(g, IS_GELU: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Return the sigmoid that g is multiplied by, and the derivative of its argument by g."""
    if IS_GELU:
        z = 1.5957691216057308 * (g + 0.044715 * g * g * g)
        slope = 1.5957691216057308 * (1 + 3 * 0.044715 * g * g)
    else:
        z, slope = g, 1.0
    return tl.sigmoid(z), slope


@triton.jit
def _store(x, block, tokens, columns, n_tokens, n_columns):  # type: ignore[no-untyped-def]
    place = x + tokens[:, None].to(tl.int64) * n_columns + columns[None, :]
    inside = (tokens[:, None] < n_tokens) & (columns[None, :] < n_columns)
    tl.store(place, block.to(x.dtype.element_ty), inside)


@triton.jit  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    gate, up, gate_h, up_h, gate_b, up_b, y,
    n_tokens, n_columns, gate_rank, up_rank,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr,  # noqa: N803
    GATE_RANK: tl.constexpr, UP_RANK: tl.constexpr, IS_GELU: tl.constexpr,  # noqa: N803
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    g = _with_update(gate, gate_h, gate_b, tokens, columns, n_tokens, n_columns, gate_rank, GATE_RANK)  # fmt: skip  # noqa: E501
    u = _with_update(up, up_h, up_b, tokens, columns, n_tokens, n_columns, up_rank, UP_RANK)
    share, _ = _sigmoid_and_slope(g, IS_GELU)
    _store(y, g * share * u, tokens, columns, n_tokens, n_columns)


@triton.jit  # type: ignore[untyped-decorator]
def _backward(  # type: ignore[no-untyped-def]
    gate, up, gate_h, up_h, gate_b, up_b, down_a, dy, dh, dgate, dup, y,
    n_tokens, n_columns, gate_rank, up_rank, down_rank,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr,  # noqa: N803
    GATE_RANK: tl.constexpr, UP_RANK: tl.constexpr, DOWN_RANK: tl.constexpr,  # noqa: N803
    IS_GELU: tl.constexpr,  # noqa: N803
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    g = _with_update(gate, gate_h, gate_b, tokens, columns, n_tokens, n_columns, gate_rank, GATE_RANK)  # fmt: skip  # noqa: E501
    u = _with_update(up, up_h, up_b, tokens, columns, n_tokens, n_columns, up_rank, UP_RANK)
    slope = _matrix(dy, tokens[:, None], columns[None, :], n_tokens, n_columns).to(tl.float32)
    if DOWN_RANK:
        ranks = tl.arange(0, DOWN_RANK)
        left = _matrix(dh, tokens[:, None], ranks[None, :], n_tokens, down_rank)
        right = _matrix(down_a, ranks[:, None], columns[None, :], down_rank, n_columns)
        slope += tl.dot(left, right)
    share, inner = _sigmoid_and_slope(g, IS_GELU)
    _store(y, g * share * u, tokens, columns, n_tokens, n_columns)
    _store(dup, slope * g * share, tokens, columns, n_tokens, n_columns)
    dg = slope * u * share * (1 + g * (1 - share) * inner)
    _store(dgate, dg, tokens, columns, n_tokens, n_columns)


def _grid(gate: Tensor) -> tuple[int, int]:
    n_tokens, n_columns = gate.numel() // gate.shape[-1], gate.shape[-1]
    return triton.cdiv(n_columns, COLUMNS), triton.cdiv(n_tokens, TOKENS)


def _sizes(*ranks: int) -> dict[str, int]:
    """Return the sizes of a program's blocks, and how it is compiled.

    Args:
        ranks: Of gate, up and, in the backward pass, down; 0 if there is no update.
    """
    found = {"TOKENS": TOKENS, "COLUMNS": COLUMNS, "num_warps": WARPS}
    for name, rank in zip(("GATE_RANK", "UP_RANK", "DOWN_RANK"), ranks, strict=False):
        found[name] = max(triton.next_power_of_2(rank), 16) if rank else 0
    return found


@torch.library.custom_op("lora_cli::gated_product", mutates_args=())
def gated_product(
    gate: Tensor,
    up: Tensor,
    gate_h: Tensor,
    up_h: Tensor,
    gate_b: Tensor,
    up_b: Tensor,
    down_a: Tensor | None,
    is_gelu: bool,
) -> tuple[Tensor, Tensor]:
    """Return y = act(g) u and h = y A_d^T, as the equations above say.

    All tensors have one dtype, of 16 bits on a GPU.

    Args:
        gate: The output of the frozen layer gate, G (..., n).
        up: The output of the frozen layer up, U (..., n).
        gate_h: s A x of gate, (..., rank); of rank 0 if G is the whole output of gate.
        up_h: s A x of up, (..., rank), likewise.
        gate_b: The B of gate, (n, rank).
        up_b: The B of up, (n, rank).
        down_a: The A of down, (rank, n); None if down has no plain LoRA.
        is_gelu: Whether the activation is GELU (by its approximation), or else SiLU.

    Returns:
        y (..., n) and h (..., rank); h is empty without `down_a`.
    """
    parts = [part.contiguous() for part in (gate, up, gate_h, up_h, gate_b, up_b)]
    y, ranks = torch.empty_like(parts[0]), (gate_b.shape[1], up_b.shape[1])
    n_columns = gate.shape[-1]
    if gate.numel():  # an expert may get no token
        with torch.cuda.device(gate.device):
            _forward[_grid(gate)](
                *parts, y, gate.numel() // n_columns, n_columns, *ranks,
                IS_GELU=is_gelu, **_sizes(*ranks),
            )  # fmt: skip
    return y, gate.new_empty(0) if down_a is None else y @ down_a.T


@gated_product.register_fake
def _(gate: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    down_a = others[5]
    return y, gate.new_empty(0 if down_a is None else (*gate.shape[:-1], len(down_a)))


@torch.library.custom_op("lora_cli::gated_product_backward", mutates_args=())
def _gradients(
    dy: Tensor, dh: Tensor | None, gate: Tensor, up: Tensor, gate_h: Tensor, up_h: Tensor,
    gate_b: Tensor, up_b: Tensor, down_a: Tensor | None, is_gelu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients over G and U, and y again, each (..., n)."""
    parts = [part.contiguous() for part in (gate, up, gate_h, up_h, gate_b, up_b)]
    ranks = [gate_b.shape[1], up_b.shape[1], 0]
    a, slope = gate_b, gate_h  # which are not read
    if down_a is not None and dh is not None:
        a, slope, ranks[2] = down_a, dh, len(down_a)
    dgate, dup, y = (torch.empty_like(parts[0]) for _ in range(3))
    n_columns = gate.shape[-1]
    if gate.numel():
        with torch.cuda.device(gate.device):
            _backward[_grid(gate)](
                *parts, a.contiguous(), dy.contiguous(), slope.contiguous(), dgate, dup, y,
                gate.numel() // n_columns, n_columns, *ranks, IS_GELU=is_gelu, **_sizes(*ranks),
            )  # fmt: skip
    return dgate, dup, y


@_gradients.register_fake
def _(dy: Tensor, dh: Any, gate: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    like = [torch.empty_like(gate, memory_format=torch.contiguous_format) for _ in range(3)]
    return like[0], like[1], like[2]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.is_gelu = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward_of(ctx: Any, dy: Tensor, dh: Tensor | None) -> tuple[Tensor | None, ...]:
    gate, up, gate_h, up_h, gate_b, up_b, down_a = ctx.saved_tensors
    dh = None if down_a is None else dh
    dgate, dup, y = _gradients(dy, dh, gate, up, gate_h, up_h, gate_b, up_b, down_a, ctx.is_gelu)
    da = None if dh is None else _summed(dh, y)
    db = _summed(dgate, gate_h), _summed(dup, up_h)
    return dgate, dup, dgate @ gate_b, dup @ up_b, *db, da, None


def _summed(left: Tensor, right: Tensor) -> Tensor:
    """Return the sum over all tokens of the products of two vectors each: (n, m)."""
    return left.flatten(0, -2).T @ right.flatten(0, -2)


gated_product.register_autograd(_backward_of, setup_context=_keep)
