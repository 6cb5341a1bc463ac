"""A language model whose gated MLPs and norms are computed by kernels learns as it does without."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_precision import decoder, losses, train
from test_precision import pytestmark as on_a_gpu
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lora_cli.training.fused_modules import RMSNorms

pytestmark = on_a_gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 33, 4096), (3, 17, 4, 128), (5, 100), (1, 1), (0, 64)])
def test_a_norm_is_that_of_llama(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(shape[-1], eps=1e-5).cuda().to(dtype).requires_grad_(False)
    nn.init.normal_(norm.weight)
    x = torch.randn(shape, device="cuda").to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    slope = torch.randn(shape, device="cuda").double()
    scale = torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + 1e-5)
    wanted = norm.weight.double() * exact * scale
    with RMSNorms(norm):
        found = norm(x)
    gradients = [torch.autograd.grad(y, z, slope.to(y.dtype)) for y, z in
                 ((found, x), (wanted, exact))]  # fmt: skip
    assert found.dtype == dtype
    for a, b in ((found, wanted), (gradients[0][0], gradients[1][0])):
        limit = (0.01 if dtype == torch.bfloat16 else 0.002) * b.abs().amax() if b.numel() else 0
        assert ((a.double() - b).abs() <= limit).all()


@pytest.mark.parametrize(
    "settings",
    [
        (), ("adapter.dropout=0.2",), ("adapter.target_modules=[q_proj, v_proj]",),
        ("adapter.type=dora",), ("train.gradient_checkpointing=true",),
        ("train.gradient_checkpointing=offload",), ("train.precision=fp16",),
        ("adapter.type=full", "train.optimizer.learning_rate=1e-4"),
    ],
    ids=str,
)  # fmt: skip
def test_it_learns_the_same_in_less_memory(tmp_path: Path, settings: tuple[str, ...]) -> None:
    peaks, reports = {}, {}
    for kernels in ("auto", "reference"):
        torch.cuda.reset_peak_memory_stats()
        reports[kernels] = train(
            decoder(tmp_path, *settings, f"train.kernels={kernels}", output=kernels)
        )
        peaks[kernels] = torch.cuda.max_memory_allocated()
    steps = reports["auto"]["kernels"]["steps"]
    norms = "" if "adapter.type=full" in settings else " and 17 norms"
    assert steps.startswith(f"plain autograd with 8 gated MLPs{norms} by one kernel each")
    tolerance = 0.05 if "dropout" in str(settings) else 0.01  # the kernel draws other masks
    wanted = losses(tmp_path / "reference")
    assert losses(tmp_path / "auto") == pytest.approx(wanted, rel=tolerance)
    if "train.gradient_checkpointing" not in str(settings):  # which leaves little to save
        assert peaks["auto"] < (0.95 if settings else 0.85) * peaks["reference"]


def test_it_resumes_bit_for_bit(tmp_path: Path) -> None:
    settings = ("adapter.dropout=0.2", "checkpoint.every_steps=5", "checkpoint.keep=10")
    train(decoder(tmp_path, *settings, output="out"))
    whole, curve = (
        load_file(tmp_path / "out" / "adapter_model.safetensors"),
        losses(tmp_path / "out"),
    )
    for name in ("step-000015", "step-000020"):
        shutil.rmtree(tmp_path / "out" / "checkpoints" / name)
    (tmp_path / "out" / "report.json").unlink()
    train(decoder(tmp_path, *settings, output="out"), resume=True)
    again = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert again.keys() == whole.keys()
    for name, tensor in again.items():
        assert torch.equal(whole[name], tensor), name
    assert losses(tmp_path / "out") == curve
