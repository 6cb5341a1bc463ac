"""A base in 4 or 8 bits on a real GPU: equal to bitsandbytes, exact when resumed, and small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_precision import pytestmark as on_a_gpu
from test_precision import recipe, train
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lora_cli.models.quantized_linear import QuantizedLinear
from lora_cli.recipe import load_recipe
from lora_cli.tasks import build_task
from lora_cli.training import run as training_run

pytest.importorskip("bitsandbytes")
pytestmark = on_a_gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_nf4_is_that_of_transformers(dtype: torch.dtype, tmp_path: Path) -> None:
    base = tiny.save_llama(tmp_path / "base", tied=False)
    name = str(dtype).removeprefix("torch.")
    precision = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[name]
    path = tiny.recipe(
        base, tmp_path, model={"name": str(base), "quantization": "nf4"},
        task={"type": "causal_lm", "pad_token": "<pad>"}, train={"precision": precision},
    )  # fmt: skip
    task = build_task(load_recipe(path))
    task.load_processor()
    model = task.load_model(torch.device("cuda"))[0].eval()
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=config, dtype=dtype, device_map={"": 0}
    ).eval()
    ids = torch.randint(5, 20, (2, 12), device="cuda")
    ours, wanted = model(input_ids=ids).logits.float(), theirs(input_ids=ids).logits.float()
    tolerance = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 3e-3}[precision]
    assert float((ours - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


@pytest.mark.proves("resume", variant="lora", layer="Linear", base="{kind}")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_run_on_a_quantised_base_resumes_bit_for_bit(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (f"model.quantization={kind}", "train.precision=bf16", "checkpoint.every_steps=10",
                "train.gradient_checkpointing=true")  # fmt: skip
    train(recipe(tmp_path, *settings, output="whole"))
    real, calls = training_run.train_step, iter(range(1, 1000))

    def cut(*arguments: Any) -> Any:
        if next(calls) > 23:
            raise RuntimeError("pulled the plug")
        return real(*arguments)

    monkeypatch.setattr(training_run, "train_step", cut)
    with pytest.raises(RuntimeError, match="plug"):
        train(recipe(tmp_path, *settings, output="cut"))
    monkeypatch.setattr(training_run, "train_step", real)
    train(recipe(tmp_path, *settings, output="cut"), resume=True)
    whole, again = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut")
    )
    assert whole == again


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_large_layer_computes_what_a_plain_one_does(kind: Any) -> None:
    torch.manual_seed(0)
    layer = QuantizedLinear(1024, 4096, None, kind, device="cuda")
    layer.set_weight(torch.randn(4096, 1024, device="cuda", dtype=torch.bfloat16))
    x = torch.randn(64, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    other = x.detach().float().requires_grad_()
    dy = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16)
    layer(x).backward(dy)
    torch.nn.functional.linear(other, layer.dequantized()).backward(dy.float())
    assert x.grad is not None
    assert other.grad is not None
    cosine = torch.nn.functional.cosine_similarity(
        x.grad.float().flatten(), other.grad.flatten(), 0
    )
    assert float(cosine) > 0.9999
