"""The parts of a merge one by one: which base is chosen, what is said, and what is compared."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_cli.export import merge as merging
from lora_cli.export.merge_quantized import BASES, Candidate, Trained, in_words, use_numbers


@pytest.mark.parametrize("values", [(0.5, 0.9), (0.9, 0.5), (None, None)])
def test_both_bases_are_merged_and_the_better_is_written(
    values: tuple[float | None, float | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base whose numbers the codes stand for is at hand again, where it is the better one."""
    task: Any = SimpleNamespace(
        recipe=SimpleNamespace(model=SimpleNamespace(quantization="int8")), name="quantised"
    )
    plain, weights = SimpleNamespace(name="plain"), {"layer": torch.ones(2)}
    given: Any = SimpleNamespace(joint="joint")
    trained = Trained(weights, torch.tensor([2.0, 4.0]), "m", value=0.7)

    def merged(of: Any, what: Any, numbers: dict[str, Tensor]) -> Any:
        assert (of, what) == (plain, given)
        assert numbers == {} or numbers is weights
        far = 0.5 if numbers else 1.0
        return SimpleNamespace(outputs=trained.outputs + far, model="dequantised" if numbers else
                               "original")  # fmt: skip

    def measured(of: Trained, who: Any, model: str) -> float | None:
        assert (of, who) == (trained, plain)
        return values[BASES.index(model)]

    written: list[str] = []

    def write(found: Any, of: Any, what: Any, to: Path) -> Any:
        assert (of, what, to) == (plain, given, Path("to"))
        written.append(found.model)
        return SimpleNamespace(choice=[])

    def was_trained(of: Any, joint: Any) -> Trained:
        assert (of, joint) == (task, "joint")
        return trained

    monkeypatch.setattr(merging, "what_was_trained", was_trained)
    monkeypatch.setattr(merging, "_without_quantization", lambda of: plain if of is task else None)
    for name, function in (("_merged", merged), ("measured", measured), ("_write", write)):
        monkeypatch.setattr(merging, name, function)
    result = merging._merge(task, given, Path("to"))
    wanted = "original" if values == (0.5, 0.9) else "dequantised"
    assert written == [wanted]
    first, *lines = result.choice
    assert first == "trained, on the quantised base: m 0.7000"
    for line, base, value, difference in zip(lines, BASES, values, ("1.2e-01", "2.5e-01"),
                                             strict=True):  # fmt: skip
        by = f"outputs differ by {difference}"
        if value is not None:
            by = f"m {value:.4f} ({value - 0.7:+.4f}), {by}"
        mark = "  <- written" if base == wanted else ""
        assert line == f"merged into the {base} base: {by}{mark}"


def test_without_rows_nothing_is_said_of_a_metric() -> None:
    trained = Trained({}, torch.zeros(1))
    both = [Candidate(name, 0.25, None) for name in BASES]
    assert in_words(both, both[1], trained) == [
        "merged into the dequantised base: outputs differ by 2.5e-01",
        "merged into the original base: outputs differ by 2.5e-01  <- written",
    ]


def test_numbers_of_codes_are_copied_into_the_layers() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(2, 3)})
    kept = model["b"].weight.detach().clone()
    use_numbers(model, {"a": torch.full((3, 2), 5.0)})
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


def test_a_model_that_was_read_is_trained_as_the_merged_one() -> None:
    merged, reloaded = nn.Linear(2, 2), nn.Linear(2, 2)
    merged.bias.requires_grad_(False)
    reloaded.weight.requires_grad_(False)
    merging._require_gradients(reloaded, like=merged)
    assert (reloaded.weight.requires_grad, reloaded.bias.requires_grad) == (True, False)
    assert (merged.weight.requires_grad, merged.bias.requires_grad) == (True, False)
