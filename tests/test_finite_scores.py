"""Scores that are NaN or infinity stop every command with exit code 3, and a hint that helps."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lora_cli.adapters.attach import attach, lora_layers
from lora_cli.adapters.peft_format.adapter_folder import save_adapter
from lora_cli.cli.app import app
from lora_cli.errors import LoraError, NumericsError
from lora_cli.evaluation.compare import compare
from lora_cli.evaluation.evaluate_adapter import evaluate_adapter
from lora_cli.export.merge import merge_adapter
from lora_cli.recipe import Recipe, dump_recipe, load_recipe
from lora_cli.tasks import build_task
from lora_cli.tasks.finite_scores import FiniteScores, likely_cause
from lora_cli.training.early_stopping import Judge
from lora_cli.training.run import train
from lora_cli.training.train_state import TrainState


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def adapter(tmp_path: Path, base: Path, alpha: float, **sections: Any) -> tuple[Path, Recipe]:
    """Write an adapter folder as training would, whose update is multiplied by alpha / 4."""
    recipe = load_recipe(tiny.recipe(base, tmp_path, adapter={"alpha": alpha}, **sections))
    recipe = recipe.with_values({"data.validation": recipe.data.path})
    task = build_task(recipe)
    task.load_processor()
    model, new = task.load_model(torch.device("cpu"))
    attach(model, recipe, new)
    tiny.wake(model)
    folder = tmp_path / "a"
    folder.mkdir()
    save_adapter(folder, model, recipe, new)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    return folder, recipe


@pytest.fixture(params=["encoder", "llama"])
def broken(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Recipe, Path]:
    """An adapter whose alpha lets everything overflow, its recipe, and its base."""
    save = {"encoder": tiny.save_encoder, "llama": tiny.save_llama}[request.param]
    base = save(tmp_path / "base")
    folder, recipe = adapter(tmp_path, base, 1e30)
    return folder, recipe, base


ALPHA = r"is multiplied by 2.5e\+29 \(alpha 1e\+30, rank 4\): is the adapter's alpha right\?"


def test_no_command_prints_such_scores(broken: tuple[Path, Recipe, Path], tmp_path: Path) -> None:
    folder, recipe, base = broken
    said = CliRunner().invoke(app, ["predict", "--adapter", str(folder), "a film"])
    assert isinstance(said.exception, NumericsError)
    assert said.exception.exit_code == 3
    assert not said.stdout
    with pytest.raises(NumericsError, match=ALPHA):
        raise said.exception
    with pytest.raises(NumericsError, match=ALPHA):
        evaluate_adapter(folder, recipe, "validation")
    with pytest.raises(NumericsError, match=ALPHA):
        merge_adapter(str(base), folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_such_an_adapter_is_not_compared(broken: tuple[Path, Recipe, Path]) -> None:
    folder, recipe, _ = broken
    with pytest.raises(NumericsError, match=ALPHA):
        compare(folder, folder, recipe, "loss", 1.0, "validation")


def test_a_file_of_such_predictions_is_not_written(
    broken: tuple[Path, Recipe, Path], tmp_path: Path
) -> None:
    folder, _, _ = broken
    said = CliRunner().invoke(
        app,
        ["predict", "--adapter", str(folder), "--input", str(tmp_path / "rows.jsonl"),
         "--output", str(tmp_path / "said.jsonl")],
    )  # fmt: skip
    assert isinstance(said.exception, NumericsError)
    assert not (tmp_path / "said.jsonl").exists()


def test_infinite_scores_of_several_labels_are_no_probabilities(tmp_path: Path) -> None:
    """The sigmoid of infinity is 1.0, which looks sound."""
    base = tiny.save_encoder(tmp_path / "base")
    task = {"problem": "multi_label", "labels": ["a", "b"]}
    recipe = load_recipe(tiny.recipe(base, tmp_path, task=task))
    built = build_task(recipe)
    built.load_processor()
    model, _ = built.load_model(torch.device("cpu"))
    model.classifier.out_proj.bias.data.fill_(torch.inf)
    with pytest.raises(NumericsError, match="one is inf"):
        built.answer(model.eval(), [{"text": "a film"}])


def test_a_language_model_may_rule_out_some_tokens_but_not_all() -> None:
    look, ids = FiniteScores(tiny.llama()), torch.zeros(1, 1)
    scores = torch.tensor([[0.0, -torch.inf, 2.0]])
    assert look(ids, scores) is scores
    for bad in ([[0.0, torch.nan]], [[0.0, torch.inf]], [[-torch.inf, -torch.inf]]):
        with pytest.raises(NumericsError):
            look(ids, torch.tensor(bad))


def test_the_hint_says_what_is_likely() -> None:
    model, recipe = tiny.encoder(), tiny.recipe_of(target_modules=["query"])
    assert "damaged" in likely_cause(model, recipe)
    recipe = recipe.with_values({"train.precision": "bf16"})
    assert "precision=fp32" in likely_cause(model, recipe)
    attach(model, recipe, ["classifier"])
    next(iter(lora_layers(model).values())).scaling = -1e9
    assert "alpha right?" in likely_cause(model, recipe)


@pytest.mark.parametrize("alpha", [math.nan, math.inf, 1e300, 10**400, -1.0, 0.0])
def test_a_recipe_takes_no_alpha_that_is_not_a_number(alpha: float, tmp_path: Path) -> None:
    path = tiny.recipe("base", tmp_path)
    text = path.read_text().replace("alpha: 8", f"alpha: {alpha}".replace("nan", ".nan"))
    path.write_text(text.replace("alpha: inf", "alpha: .inf"))
    with pytest.raises(LoraError, match=r"adapter\.alpha"):
        load_recipe(path)


def test_a_metric_that_is_not_a_number_uses_up_no_patience() -> None:
    recipe = Recipe.model_validate(
        {
            "model": {"name": "base"},
            "task": {"type": "sequence_classification", "problem": "regression"},
            "data": {"path": "rows.csv", "validation": "rows.csv"},
            "evaluate": {"best": {"metric": "pearson"}, "early_stopping": {"patience": 2}},
        }
    )
    judge, state = Judge(recipe, build_task(recipe)), TrainState({}, {}, {})
    for step in range(1, 5):
        state.step = step
        assert not judge.improved({"pearson": math.nan}, state, 0.0)
        assert "`pearson` is nan at step" in (judge.warning({"pearson": math.nan}, step) or "")
    assert (state.best, state.without_improvement, state.stopped_early) == (None, 0, False)
    assert judge.improved({"pearson": 0.5}, state, 1.0)
    assert judge.warning({"pearson": 0.5}, 5) is None
    for value in (0.4, math.nan, 0.3):
        judge.improved({"pearson": value}, state, 2.0)
    assert state.stopped_early


@pytest.mark.parametrize("kind", ["sequence_classification", "causal_lm"])
def test_a_base_with_such_weights_is_rejected_before_padding_is_tried(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No way of padding would give the same outputs as NaN, and a note would blame the model."""
    is_lm = kind == "causal_lm"
    base = (tiny.save_llama if is_lm else tiny.save_encoder)(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    name = next(name for name in tensors if name.endswith(("q_proj.weight", "query.weight")))
    tensors[name][0, 0] = math.nan
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    task = {"type": "causal_lm", "text_column": "text"} if is_lm else {}
    recipe = load_recipe(tiny.recipe(base, tmp_path, task=task, train={"max_steps": 1}))
    with pytest.raises(NumericsError, match=re.escape(name[-20:])):
        train(recipe)
    assert "padded" not in capsys.readouterr().err
