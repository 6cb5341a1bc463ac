"""Details of merging: which base is chosen, what is printed, and what is compared."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_cli.errors import LoraError
from lora_cli.export import merge as merging
from lora_cli.export import merge_quantized as quantized
from lora_cli.export.merge_quantized import BASES, Candidate, TrainedModel, in_words, use_weights


@pytest.mark.parametrize("values", [(0.5, 0.9), (0.9, 0.5), (None, None)])
def test_both_bases_are_merged_and_the_better_is_written(
    values: tuple[float | None, float | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the dequantised base is better, the model is merged into it again."""
    task: Any = SimpleNamespace(
        recipe=SimpleNamespace(model=SimpleNamespace(quantization="int8")), name="quantised"
    )
    plain, weights = SimpleNamespace(name="plain"), {"layer": torch.ones(2)}
    given: Any = SimpleNamespace(joint="joint")
    trained = TrainedModel(weights, torch.tensor([2.0, 4.0]), "m", value=0.7)

    def merged(of: Any, what: Any, numbers: dict[str, Tensor]) -> Any:
        assert (of, what) == (plain, given)
        assert numbers == {} or numbers is weights
        far = 0.5 if numbers else 1.0
        return SimpleNamespace(outputs=trained.outputs + far, model="dequantised" if numbers else
                               "original")  # fmt: skip

    def metric_of(of: TrainedModel, who: Any, model: str) -> float | None:
        assert (of, who) == (trained, plain)
        return values[BASES.index(model)]

    written: list[str] = []

    def write(found: Any, of: Any, what: Any, to: Path) -> Any:
        assert (of, what, to) == (plain, given, Path("to"))
        written.append(found.model)
        return SimpleNamespace(choice=[])

    def was_trained(of: Any, joint: Any) -> TrainedModel:
        assert (of, joint) == (task, "joint")
        return trained

    monkeypatch.setattr(merging, "measure_trained", was_trained)
    monkeypatch.setattr(merging, "_without_quantization", lambda of: plain if of is task else None)
    for name, function in (("_merged", merged), ("metric_of", metric_of), ("_write", write)):
        monkeypatch.setattr(merging, name, function)
    result = merging._merge(task, given, Path("to"))
    expected = "original" if values == (0.5, 0.9) else "dequantised"
    assert written == [expected]
    first, *lines = result.choice
    assert first == "trained, on the quantised base: m 0.7000"
    for line, base, value, difference in zip(lines, BASES, values, ("1.2e-01", "2.5e-01"),
                                             strict=True):  # fmt: skip
        by = f"outputs differ by {difference}"
        if value is not None:
            by = f"m {value:.4f} ({value - 0.7:+.4f}), {by}"
        mark = "  <- written" if base == expected else ""
        assert line == f"merged into the {base} base: {by}{mark}"


def test_without_rows_no_metric_is_mentioned() -> None:
    trained = TrainedModel({}, torch.zeros(1))
    both = [Candidate(name, 0.25, None) for name in BASES]
    assert in_words(both, both[1], trained) == [
        "merged into the dequantised base: outputs differ by 2.5e-01",
        "merged into the original base: outputs differ by 2.5e-01  <- written",
    ]


def test_dequantised_weights_are_copied_into_the_layers() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(2, 3)})
    kept = model["b"].weight.detach().clone()
    use_weights(model, {"a": torch.full((3, 2), 5.0)})
    assert bool((model["a"].weight == 5.0).all())
    assert torch.equal(model["b"].weight, kept)


def test_shared_parameters_and_buffers_are_listed_under_each_name() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    table = torch.zeros(1)
    model["a"].register_buffer("table", table)
    model["b"].register_buffer("table", table)
    assert [name for name, _ in merging._tensors(model)] == [
        "a.weight", "b.weight", "a.table", "b.table",
    ]  # fmt: skip


def test_a_reloaded_model_requires_gradients_like_the_merged_one() -> None:
    merged, reloaded = nn.Linear(2, 2), nn.Linear(2, 2)
    merged.bias.requires_grad_(False)
    reloaded.weight.requires_grad_(False)
    merging._match_requires_grad(reloaded, like=merged)
    assert (reloaded.weight.requires_grad, reloaded.bias.requires_grad) == (True, False)
    assert (merged.weight.requires_grad, merged.bias.requires_grad) == (True, False)


class Measured:
    """A task that records the models that it is called with."""

    def __init__(self, *splits: str, streaming: bool = False) -> None:
        self.recipe: Any = SimpleNamespace(
            with_values=lambda values: values,
            data=SimpleNamespace(has=lambda name: name in splits, streaming=streaming),
        )
        self.drawn, self.fitted = frozenset({"head"}), list[Any]()
        self.model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}).half()

    def load_model(self, device: torch.device) -> tuple[nn.Module, list[str]]:
        assert device.type == "cpu"
        return self.model, ["b"]

    def probe(self) -> str:
        return "probe"

    def probed(self, model: nn.Module, probe: str) -> Tensor:
        assert (model, probe) == (self.model, "probe")
        assert not torch.is_grad_enabled()
        assert model["a"].weight.dtype == torch.float32
        return torch.tensor([1.0])

    def fit_to_model(self, model: Any) -> None:
        self.fitted.append(model)


@pytest.mark.parametrize("rows", [None, "rows"])
@pytest.mark.parametrize("metric", [None, "f1"])
def test_a_model_is_measured_where_there_are_rows_and_a_metric(
    rows: Any, metric: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    task: Any = Measured()
    started: list[Any] = []
    monkeypatch.setattr(
        quantized, "start_accelerator", lambda recipe, cpu: started.append((recipe, cpu)) or "here"
    )
    asked: list[Any] = []
    monkeypatch.setattr(
        quantized, "evaluate", lambda *given: asked.append(given) or {"f1": 0.5, "loss": 9.0}
    )
    model: Any = "model"
    found = quantized.metric_of(TrainedModel({}, torch.zeros(1), metric, rows=rows), task, model)
    if rows is None or metric is None:
        assert (found, asked, task.fitted) == (None, [], [])
        return
    assert found == 0.5
    assert asked == [("model", task, "rows", "here")]
    assert task.fitted == ["model"]
    assert started == [({"train.precision": "fp32", "model.dtype": None}, True)]


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize(
    ("splits", "streaming", "is_there", "measures"),
    [((), False, True, False), (("validation",), False, True, True),
     (("validation",), True, True, False), (("validation",), False, False, False)],
)  # fmt: skip
def test_the_trained_model_is_measured_on_the_validation_rows(
    splits: tuple[str, ...], streaming: bool, is_there: bool, measures: bool, mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    task: Any = Measured(*splits, streaming=streaming)
    saved: Any = "adapter"
    attached: list[Any] = []
    monkeypatch.setattr(
        quantized, "load_adapter", lambda *given, drawn: attached.append((*given, drawn))
    )

    def load_data(of: Any, names: list[str]) -> dict[str, str]:
        assert (of, names) == (task, ["validation"])
        if not is_there:
            raise LoraError("its files are elsewhere", "data")
        return {"validation": "rows"}

    monkeypatch.setattr(quantized, "load_data", load_data)
    monkeypatch.setattr(
        quantized, "best_by", lambda recipe, of: ("f1", mode) if recipe is of.recipe else None
    )
    seen: list[Any] = []
    monkeypatch.setattr(quantized, "metric_of", lambda *given: seen.append(given) or 0.25)
    found = quantized.measure_trained(task, saved)
    assert attached == [(task.model, "adapter", ["b"], task.drawn)]
    assert found.weights == {}
    assert found.outputs.tolist() == [1.0]
    assert not task.model.training
    if measures:
        assert (found.metric, found.value, found.rows) == ("f1", 0.25, "rows")
        assert found.lower_is_better == (mode == "min")
        assert seen == [(found, task, task.model)]
    else:
        assert (found.metric, found.value, found.rows, seen) == (None, None, None, [])
