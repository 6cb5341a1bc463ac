"""Settings with which `lora init` fits training into GPU memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from drafting import table, texts

from lora_cli.errors import LoraError
from lora_cli.recipe_draft import base_model_info, draft_recipe, text_lengths
from lora_cli.recipe_draft.base_model_info import describe_base, shape_by_name
from lora_cli.recipe_draft.memory_budget import GIB, Card, Fit, Shape, fit_to, needed_bytes

LLAMA_8B = Shape(8_030_000_000, 32, 4096, 14336, 128256)
ROBERTA = Shape(125_000_000, 12, 768, 3072)


def card(memory: float, has_bf16: bool = True) -> Card:
    return Card(memory * GIB, f"a GPU of {memory:g} GiB", has_bf16)


@pytest.mark.parametrize(("checkpointing", "measured"), [(False, 72.4), (True, 29.4)])
def test_the_estimate_is_near_the_measured_memory(checkpointing: bool, measured: float) -> None:
    fit = Fit("bf16", 2, 1, checkpointing, 4096, 0.0)
    assert needed_bytes(LLAMA_8B, fit) / GIB == pytest.approx(measured, rel=0.1)


def test_the_estimate_for_a_4_bit_base_is_near_the_measured_memory() -> None:
    fit = Fit("bf16", 1, 1, True, 4096, 0.0, four_bit=True)
    assert needed_bytes(LLAMA_8B, fit) / GIB == pytest.approx(15.1, rel=0.1)


def test_a_base_that_does_not_fit_in_16_bits_is_quantized() -> None:
    assert not fit_to(LLAMA_8B, card(24), 4, 4, 2048).four_bit
    small = fit_to(LLAMA_8B, card(16), 4, 4, 2048)
    assert (small.four_bit, small.checkpointing, small.length) == (True, True, 2048)
    assert not fit_to(ROBERTA, card(2), 4, 4, 512).four_bit


@pytest.mark.parametrize("length", [256, 512, 2048, 4096])
@pytest.mark.parametrize("memory", [20, 24, 40, 80, 192])
def test_the_settings_fit_into_memory_and_keep_the_examples_per_step(
    memory: int, length: int
) -> None:
    fit = fit_to(LLAMA_8B, card(memory), 4, 4, length)
    assert fit.precision == "bf16"
    assert fit.needed <= 0.9 * memory * GIB
    assert fit.micro_batch * fit.accumulation == 16
    assert fit.length <= length


def test_more_memory_needs_fewer_savings() -> None:
    fits = [fit_to(LLAMA_8B, card(memory), 4, 4, 2048) for memory in (24, 40, 192)]
    assert [(f.micro_batch, f.checkpointing) for f in fits] == [(1, True), (4, True), (4, False)]
    assert fit_to(LLAMA_8B, card(20), 4, 4, 2048).four_bit


@pytest.mark.parametrize(
    ("shape", "gpu", "precision"),
    [
        (ROBERTA, None, "fp32"),
        (ROBERTA, card(24), "fp32"),
        (Shape(355_000_000, 24, 1024, 4096), None, "fp32"),
        (Shape(355_000_000, 24, 1024, 4096), card(24), "bf16"),
        (Shape(355_000_000, 24, 1024, 4096), card(16, has_bf16=False), "fp16"),
        (LLAMA_8B, None, "bf16"),
        (Shape(8_000_000_000), None, "bf16"),
        (Shape(0), card(24), "fp32"),
    ],
)
def test_the_precision_depends_on_size_and_gpu(
    shape: Shape, gpu: Card | None, precision: str
) -> None:
    fit = fit_to(shape, gpu, 4, 4, 512)
    assert fit.precision == precision
    assert fit.checkpointing == (shape.parameters > 1_000_000_000)


@pytest.mark.parametrize(("shape", "memory"), [(LLAMA_8B, 8), (Shape(70_000_000_000), 80)])
def test_a_model_that_cannot_fit_is_rejected(shape: Shape, memory: float) -> None:
    with pytest.raises(LoraError, match="billion parameters needs about") as caught:
        fit_to(shape, card(memory), 4, 4, 2048)
    hint = caught.value.problems[0].hint or ""
    larger = int(hint.split("--memory ")[1].rstrip("`"))
    assert fit_to(shape, card(larger), 4, 4, 2048).needed <= larger * GIB


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 8e9),
        ("Qwen/Qwen2.5-0.5B", 0.5e9),
        ("mistralai/Mixtral-8x7B-v0.1", 56e9),
        ("EleutherAI/pythia-160m", 160e6),
        ("org/model-7b", 7e9),
        ("FacebookAI/roberta-large", None),
        ("org/v2.0-base", None),
        ("sentence-transformers/all-MiniLM-L6-v2", None),
    ],
)
def test_a_name_may_contain_the_size(name: str, parameters: float | None) -> None:
    shape = shape_by_name(name)
    assert (shape and shape.parameters) == parameters


def test_the_parameters_of_an_available_model_are_counted(bases: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM

    result = describe_base(str(bases["llama"])).shape
    real = AutoModelForCausalLM.from_pretrained(bases["llama"])
    assert result is not None
    assert result.parameters == sum(p.numel() for p in real.parameters())


def test_the_memory_is_written_into_the_draft(
    tmp_path: Path, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text(table(["text", "label"], [[t, i % 2] for i, t in enumerate(texts(60))]))
    base = describe_base(str(bases["llama"]))
    large = base_model_info.Base("llama", base.tokenizer, True, 4096, 4096, LLAMA_8B)
    monkeypatch.setattr("lora_cli.recipe_draft.draft.describe_base", lambda name: large)
    draft = draft_recipe(rows, str(bases["llama"]), tmp_path / "r.yaml", memory=24)
    assert draft.values["train"]["precision"] == "bf16"
    assert dict(draft.findings)["memory"].startswith("8.0 billion parameters")


@pytest.mark.parametrize(
    "text",
    ["a warm and funny film, and a great cast", "この映画はとても面白かった", "Größe passt nicht",
     "Фильм очень хороший, советую", "antidisestablishmentarianism", "https://a.example/b?c=d"],
)  # fmt: skip
def test_the_estimated_length_has_a_margin(text: str) -> None:
    assert len(text.split()) <= text_lengths.estimated_tokens(text) <= 2 * len(text)
    assert text_lengths.estimated_tokens(text) >= len(text) / 4


def test_an_estimated_length_is_reported_as_such(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text(table(["text", "label"], [[t, i % 2] for i, t in enumerate(texts(60))]))
    draft = draft_recipe(rows, "org/some-8B", tmp_path / "r.yaml")
    assert "could not be fetched" in draft.why["task.max_length"]
    assert draft.values["train"]["precision"] == "bf16"
