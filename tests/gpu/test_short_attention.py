"""Tests of the attention kernel for short rows, against torch in float64, including dropout."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from gpu import test_precision as runs

pytestmark = runs.pytestmark
# rows, heads, tokens, head dimension
SHAPES = [(8, 16, 128, 64), (3, 12, 128, 32), (2, 2, 40, 64), (1, 3, 7, 16), (5, 2, 104, 32)]
DTYPES = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
MASKS = ("none", "of texts", "of keys", "of each head")


def parts_of_one_product(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Return queries, keys and values as views of one tensor, as in fused layers."""
    n_rows, n_heads, n_tokens, n_numbers = shape
    whole = torch.randn(n_rows, n_tokens, 3, n_heads, n_numbers, device="cuda").to(dtype)
    return [part.transpose(1, 2).requires_grad_() for part in whole.unbind(2)]


def mask_of(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    n_rows, n_heads, n_tokens, _ = shape
    if kind == "none":
        return None
    if kind == "of each head":
        return torch.randn(n_rows, n_heads, n_tokens, n_tokens, device="cuda").to(dtype)
    if kind == "of keys":
        mask = torch.zeros(n_rows, 1, 1, n_tokens, device="cuda", dtype=dtype)
        mask[..., n_tokens // 2 :] = torch.finfo(dtype).min
        return mask
    text = torch.randint(0, 5, (n_rows, n_tokens), device="cuda").sort(1)[0]
    apart = text[:, None, :, None] != text[:, None, None, :]
    mask = torch.zeros(apart.shape, device="cuda", dtype=dtype)
    return mask.masked_fill_(apart, torch.finfo(dtype).min)


def kept_by(seeds: Tensor, shape: tuple[int, ...], drop: float) -> Tensor:
    """Return the dropout mask, read from outputs for which the values are unit vectors."""
    from lora_cli.training.short_attention_kernel import short_attention

    n_rows, n_heads, n_tokens, n_numbers = shape
    found = []
    for start in range(0, n_tokens, n_numbers):
        values = torch.zeros(n_rows, n_heads, n_tokens, n_numbers, device="cuda")
        width = min(n_numbers, n_tokens - start)
        values[:, :, range(start, start + width), range(width)] = 1
        zeros = torch.zeros_like(values).bfloat16()
        out, _ = short_attention(zeros, zeros, values.bfloat16(), None, seeds, 1.0, drop)
        found.append(out[..., :width].transpose(1, 2) > 0)
    return torch.cat(found, -1)


@pytest.mark.parametrize("drop", [0.0, 0.1])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_equal_torch_s(
    shape: tuple[int, ...], dtype: torch.dtype, kind: str, drop: float
) -> None:
    from lora_cli.training.short_attention_kernel import short_attention

    torch.manual_seed(0)
    parts, scale = parts_of_one_product(shape, dtype), 0.7 / math.sqrt(shape[-1])
    mask = mask_of(kind, shape, dtype)
    seeds = torch.randint(2**31 - 1, (2,), dtype=torch.int32, device="cuda")
    out, _ = short_attention(*parts, mask, seeds, scale, drop)
    slopes = torch.randn_like(out)
    found = torch.autograd.grad(out, parts, slopes)
    exact = [part.detach().double().requires_grad_() for part in parts]
    scores = exact[0] @ exact[1].transpose(-1, -2) * scale
    p = (scores if mask is None else scores + mask.double()).softmax(-1)
    if drop:
        p = torch.where(kept_by(seeds, shape, drop), p / (1 - drop), 0.0)
    wanted = p @ exact[2]
    gradients = torch.autograd.grad(wanted, exact, slopes.transpose(1, 2).double())
    for one, other in zip((out.transpose(1, 2), *found), (wanted, *gradients), strict=True):
        assert one.dtype == dtype
        error = (one.double() - other).abs().max() / other.abs().max()
        assert float(error) < DTYPES[dtype]
    again, _ = short_attention(*parts, mask, seeds, scale, drop)
    assert torch.equal(again, out)
    for one, other in zip(torch.autograd.grad(again, parts, slopes), found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("drop", [0.1, 0.5])
def test_dropout_has_the_requested_rate_and_is_independent(drop: float) -> None:
    shape = (4, 16, 128, 64)
    torch.manual_seed(0)
    one, other = (
        kept_by(torch.randint(2**31 - 1, (2,), dtype=torch.int32, device="cuda"), shape, drop)
        for _ in range(2)
    )
    n = one.numel()
    spread = math.sqrt(drop * (1 - drop) / n)
    keep = 1 - drop

    def share(kept: Tensor) -> float:
        return float(kept.double().mean())

    assert abs(share(one) - keep) < 5 * spread
    # both kept: in two calls, neighbours in a row, in a column, in two heads, in two rows
    pairs = [(one, other), (one[..., 1:], one[..., :-1]), (one[..., 1:, :], one[..., :-1, :]),
             (one[:, 1:], one[:, :-1]), (one[1:], one[:-1])]  # fmt: skip
    for a, b in pairs:
        assert abs(share(a & b) - keep**2) < 6 * math.sqrt(keep**2 * (1 - keep**2) / a.numel())
    assert float((one.double().mean(-1) - keep).std()) < 1.1 * math.sqrt(drop * keep / 128)


def test_a_model_trains_as_with_torch_s_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_cli.training import short_attention, short_attention_kernel

    real, used = short_attention_kernel._sizes, []

    def noted(q: Tensor) -> Any:
        used.append(q.shape)
        return real(q)

    monkeypatch.setattr(short_attention_kernel, "_sizes", noted)
    settings = ("train.max_steps=40", "train.optimizer.learning_rate=1e-3", "train.precision=bf16",
                "train.kernels=fused")  # fmt: skip
    runs.recipe(tmp_path)  # writes the base
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_attention_heads": 2}))
    runs.train(runs.recipe(tmp_path, *settings, output="with"))
    assert used
    monkeypatch.setattr(short_attention, "MAX_TOKENS", 0)
    used.clear()
    runs.train(runs.recipe(tmp_path, *settings, output="without"))
    assert not used
    pairs = zip(runs.losses(tmp_path / "with"), runs.losses(tmp_path / "without"), strict=True)
    for one, other in pairs:
        assert abs(one - other) < 0.02
