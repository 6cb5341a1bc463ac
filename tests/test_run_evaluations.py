"""Tests that the evaluations of a run get its own model, rows and folder."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_cli.training import run_evaluations as module
from lora_cli.training.run_evaluations import Evaluations
from lora_cli.training.train_state import TrainState


def evaluations(folder: Path) -> Evaluations:
    task: Any = SimpleNamespace(recipe=SimpleNamespace(output_path=folder), name="task")
    data: Any = {"validation": "rows", "test": "more rows"}
    model, accelerator, stop = "model", "accelerator", "stop"
    return Evaluations(task, model, data, accelerator, stop)  # type: ignore[arg-type]


def test_predictions_are_only_written_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def evaluate(
        model: Any, task: Any, split: Any, accelerator: Any, file: Any, **options: Any
    ) -> dict[str, float]:
        asked.append((model, task.name, split, accelerator, file, options))
        return {"loss": float(len(asked))}

    monkeypatch.setattr(module, "evaluate", evaluate)
    made = evaluations(tmp_path)
    assert made.metrics("validation") == {"loss": 1.0}
    assert not (tmp_path / "predictions").exists()
    for _ in range(2):  # before and after training
        made.metrics("test", write_predictions=True, strict_loss=True)
    assert (tmp_path / "predictions").is_dir()
    start = ("model", "task")
    assert asked[0] == (*start, "rows", "accelerator", None, {"stop": "stop", "strict_loss": False})
    file = tmp_path / "predictions/test.jsonl"
    strict = {"stop": "stop", "strict_loss": True}
    assert asked[1] == asked[2] == (*start, "more rows", "accelerator", file, strict)


def test_samples_and_images_get_the_state_and_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(module, "add_samples", lambda *given: asked.append(given))
    monkeypatch.setattr(module, "draw_samples", lambda *given: asked.append(given))
    made = evaluations(tmp_path)
    state = TrainState(samples=[{"a": 1}], best={"step": 3})
    made.sample(state, "before")
    made.draw(7)
    base = ("model", made.task)
    assert asked == [
        (*base, "rows", "accelerator", state.samples, "before", {"step": 3}),
        (*base, "accelerator", tmp_path, 7),
    ]  # fmt: skip
    assert asked[0][4] is state.samples
    made.data = {}
    made.sample(state, 4)
    assert asked[-1][2] is None
