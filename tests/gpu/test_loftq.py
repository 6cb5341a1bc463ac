"""LoftQ on a real GPU, where PEFT's own function runs: the same matrices on the same weights."""

from __future__ import annotations

import pytest
import torch
from test_precision import pytestmark as on_a_gpu

from lora_cli.adapters.initialise import loftq

pytest.importorskip("bitsandbytes")
loftq_utils = pytest.importorskip("peft.utils.loftq_utils")
pytestmark = on_a_gpu


@pytest.mark.proves(
    "train",
    variant="loftq",
    layer="Linear",
    base=lambda bits, **_: "nf4" if bits == 4 else "int8",
    against="PEFT",
)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rank", [4, 16])
def test_one_iteration_is_that_of_peft(bits: int, rank: int) -> None:
    torch.manual_seed(0)
    w0 = torch.randn(96, 64, device="cuda")
    quantised, a, b = loftq_utils.loftq_init(w0, num_bits=bits, reduced_rank=rank, num_iter=1)
    found = loftq(w0, quantised, rank, 1.0)
    update, wanted = found[1] @ found[0], b @ a
    tolerance = 1e-5 * float(wanted.abs().max())
    torch.testing.assert_close(update, wanted, rtol=0, atol=tolerance)
    # each matrix too, but for the signs of its rows, which a decomposition leaves open
    for one, other in zip(found, (a, b), strict=True):
        largest = float(other.abs().max())
        torch.testing.assert_close(one.abs(), other.abs(), rtol=0, atol=1e-4 * largest)
