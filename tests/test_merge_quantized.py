"""Merging an adapter of a quantised base: both bases are measured, and the better one is used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from lora_cli.evaluation.evaluate_adapter import evaluate_adapter
from lora_cli.export.merge import merge_adapter
from lora_cli.export.merge_quantized import Candidate, TrainedModel, better_candidate
from lora_cli.models.quantized_linear import QuantizedLinear
from lora_cli.recipe import load_adapter_recipe, load_recipe
from lora_cli.training import train

functional: Any = pytest.importorskip("bitsandbytes.functional")


def trained(tmp_path: Path, kind: str, **sections: Any) -> Path:
    base = tiny.save_encoder(tmp_path / "base")
    path = tiny.recipe(
        base, tmp_path, model={"name": str(base), "quantization": kind},
        adapter={"rank": 4, "alpha": 8, "target_modules": "all-linear"},
        train={"max_steps": 6, "optimizer": {"learning_rate": 0.02}}, **sections,
    )  # fmt: skip
    train(load_recipe(path))
    return tmp_path / "out"


@pytest.mark.proves("merge", variant="lora", layer="Linear", base="{kind}")
@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_merged_into_the_dequantised_weights_it_equals_the_trained_model(
    kind: str, tmp_path: Path
) -> None:
    out = trained(tmp_path, kind)
    result = merge_adapter(None, out, tmp_path / "merged")
    lines = "\n".join(result.choice)
    assert "merged into the dequantised base" in lines
    assert "merged into the original base" in lines
    # without validation rows, the closer outputs decide
    assert result.choice[0].endswith("<- written")
    weights, base = (load_file(tmp_path / f / "model.safetensors") for f in ("merged", "base"))
    adapter = load_file(out / "adapter_model.safetensors")
    name = "encoder.layer.0.attention.self.query"
    inside = next(key for key in weights if key.endswith(f"{name}.weight"))
    w0 = next(tensor for key, tensor in base.items() if key.endswith(f"{name}.weight"))
    codes = QuantizedLinear(*reversed(w0.shape), None, kind)  # type: ignore[arg-type]
    codes.set_weight(w0)
    a, b = (next(t for k, t in adapter.items() if f"{name}.lora_{s}" in k) for s in "AB")
    expected = codes.dequantized() + 2.0 * (b @ a)  # alpha / rank
    torch.testing.assert_close(weights[inside], expected, rtol=0, atol=1e-6)
    assert float((weights[inside] - w0 - 2.0 * (b @ a)).abs().max()) > 1e-4


def test_the_metric_of_both_is_measured_if_rows_are_available(tmp_path: Path) -> None:
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(tiny.CORPUS)]
    file = tmp_path / "held.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": "held.jsonl", "validation": "held.jsonl", "check": {"max_overlap": 1.0}}
    out = trained(tmp_path, "nf4", data=data)
    wanted = evaluate_adapter(out, load_adapter_recipe(out), "validation")["validation"]["loss"]
    best = ["evaluate.best.metric=loss"]
    result = merge_adapter(None, out, tmp_path / "merged", overrides=best)
    assert result.choice[0] == f"trained, on the quantised base: loss {wanted:.4f}"
    assert sum(line.endswith("<- written") for line in result.choice) == 1
    # the written model, loaded by plain transformers, has the reported loss
    chosen = next(line for line in result.choice if line.endswith("<- written"))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    losses = []
    tokenizer = tiny.tokenizer("encoder")
    for row in rows:
        ids = torch.tensor([tokenizer(row["text"])["input_ids"]])
        logits = plain(input_ids=ids).logits.detach()
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor([row["label"]])))
    assert f"loss {float(torch.stack(losses).mean()):.4f}" in chosen
    # and if the rows are gone, the outputs decide
    file.unlink()
    shutil.rmtree(tmp_path / "merged")
    again = merge_adapter(None, out, tmp_path / "merged")
    assert "loss" not in "".join(again.choice)


@pytest.mark.proves(
    "merge",
    variant=lambda adapter: "head alone" if adapter == "none" else adapter,
    layer="Linear",
    base="int8",
)
@pytest.mark.parametrize("adapter", ["none", "bitfit"])
def test_an_adapter_without_matrices_is_merged_too(adapter: str, tmp_path: Path) -> None:
    base = tiny.save_encoder(tmp_path / "base")
    path = tiny.recipe(
        base, tmp_path, model={"name": str(base), "quantization": "int8"},
        adapter={"type": adapter}, train={"max_steps": 2},
    )  # fmt: skip
    train(load_recipe(path))
    result = merge_adapter(None, tmp_path / "out", tmp_path / "merged")
    assert sum(line.endswith("<- written") for line in result.choice) == 1


@pytest.mark.parametrize(
    ("values", "lower", "wanted"),
    [((0.8, 0.9), False, "original"), ((0.8, 0.9), True, "dequantised"),
     ((0.8, 0.8), False, "dequantised"), ((None, None), False, "dequantised")],
)  # fmt: skip
def test_the_better_candidate_is_chosen(values: tuple[Any, Any], lower: bool, wanted: str) -> None:
    trained = TrainedModel({}, torch.zeros(1), "m", lower)
    both = [Candidate("dequantised", 1e-6, values[0]), Candidate("original", 1e-2, values[1])]
    assert better_candidate(both, trained).base == wanted
    assert better_candidate(both[::-1], trained).base == wanted
