"""`--resume`: what a complete run does with more steps, and what it makes of damaged files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from lora_cli.errors import LoraError
from lora_cli.recipe import load_recipe
from lora_cli.training import train
from lora_cli.training.checkpoints import checkpoints

Json = dict[str, Any]
ALLOWED = "checkpoint.allow_changes=true"
Run = Callable[..., Json]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_encoder(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Run:
    """Return a function that trains, or goes on with `resume`, and returns the report."""
    for name, texts in (("train", tiny.CORPUS[:6]), ("validation", tiny.CORPUS[6:])):
        rows = [{"text": text, "label": i % 2} for i, text in enumerate(texts)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    path = tiny.recipe(
        base,
        tmp_path,
        data={"train": "train.jsonl", "validation": "validation.jsonl"},
        train={"max_steps": 4, "log_every_steps": 1},
        evaluate={"baseline": False},
        checkpoint={"every_steps": 2},
    )

    def go(*sets: str, resume: bool = False) -> Json:
        placed = [s.replace("output_dir=", f"output_dir={tmp_path}/") for s in sets]
        return train(load_recipe(path, placed), resume=resume)

    return go


# ------------------------------------------------------------------------ complete, and then more


def test_a_complete_run_goes_on_with_more_steps(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    constant = "train.scheduler.type=constant"
    run(constant)
    capsys.readouterr()
    more = ("train.max_steps=6", ALLOWED, constant)
    report = run(*more, resume=True)
    assert report["training"]["steps"] == 6
    assert "the run was complete after 4 steps; it goes on" in capsys.readouterr().err
    assert any("train.max_steps: 4" in change for change in report["training"]["changes"])
    whole = run("train.max_steps=6", constant, "output_dir=whole")
    assert report["metrics"]["after"] == whole["metrics"]["after"]
    ours, theirs = (
        checkpoints(tmp_path / name)[-1][1] / "adapter_model.safetensors"
        for name in ("out", "whole")
    )
    assert ours.read_bytes() == theirs.read_bytes()
    capsys.readouterr()
    assert run(*more, resume=True)["training"]["steps"] == 6  # and is then complete
    assert "trained" not in capsys.readouterr().err


def test_what_a_complete_run_may_not_change_is_named(run: Run, tmp_path: Path) -> None:
    run()
    with pytest.raises(LoraError, match=r"`train.max_steps: 4`, the recipe now says `6`") as caught:
        run("train.max_steps=6", resume=True)
    assert f"`--set {ALLOWED}` goes on" in str(caught.value)
    with pytest.raises(LoraError, match="has made 4 steps, and the recipe now asks for 3"):
        run("train.max_steps=3", ALLOWED, resume=True)
    with pytest.raises(LoraError, match=r"adapter\.rank"):
        run("adapter.rank=2", ALLOWED, resume=True)
    assert run(resume=True)["training"]["steps"] == 4


def test_a_complete_run_is_measured_anew_by_other_metrics(run: Run) -> None:
    first = run()
    report = run("evaluate.metrics=[f1]", ALLOWED, resume=True)
    assert "f1" in report["metrics"]["after"]["validation"]
    assert report["training"]["steps"] == 4
    loss = first["metrics"]["after"]["validation"]["loss"]
    assert report["metrics"]["after"]["validation"]["loss"] == loss


def test_the_results_of_other_rows_are_not_given(run: Run, tmp_path: Path) -> None:
    run()
    with (tmp_path / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"text": "one more", "label": 1}\n')
    with pytest.raises(LoraError, match="the rows of train are not those it was trained with"):
        run(resume=True)


def test_early_stopping_says_why_there_are_no_more_steps(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    early = ("evaluate.every_steps=1", "evaluate.best.metric=loss", "evaluate.best.mode=max",
             "evaluate.early_stopping.patience=1", "train.optimizer.learning_rate=0.1",
             "train.max_steps=9")  # fmt: skip
    report = run(*early)
    stopped = report["training"]["steps"]
    assert stopped < 9
    assert report["training"]["stopped_early"]
    report = run(*early[:-1], "train.max_steps=12", ALLOWED, resume=True)
    assert report["training"]["steps"] == stopped
    assert f"stopped early at step {stopped}, so it makes no more steps" in capsys.readouterr().err
    sets = [s for s in early if "early" not in s]
    report = run(*sets, "evaluate.early_stopping=null", ALLOWED, resume=True)
    assert report["training"]["steps"] == 9


def test_a_killed_continuation_is_not_taken_for_complete(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    more = ("train.max_steps=8", ALLOWED)

    def pulled(*_: object) -> None:
        raise RuntimeError("the plug")

    with monkeypatch.context() as patch:
        patch.setattr("lora_cli.training.loop.finish", pulled)
        with pytest.raises(RuntimeError, match="the plug"):
            run(*more, resume=True)
    assert not (tmp_path / "out" / "report.json").exists()
    assert run(*more, resume=True)["training"]["steps"] == 8


# ------------------------------------------------------------------------------------ the mirror


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("change", ["adapter.rank=2", "train.seed=1", "train.max_steps=6"])
def test_a_mirror_belongs_to_one_run(run: Run, tmp_path: Path, change: str) -> None:
    mirror = f"checkpoint.mirror={tmp_path / 'mirror'}"
    run(mirror)
    before = contents(tmp_path / "mirror")
    new = ("output_dir=new", mirror)
    key, _, value = change.partition("=")
    with pytest.raises(LoraError, match="is the mirror of another run") as caught:
        run(*new, change, resume=True)
    assert f"`{key}: " in str(caught.value)
    assert f"now says `{value}`" in str(caught.value)
    assert "name another with `--set checkpoint.mirror=" in str(caught.value)
    with pytest.raises(LoraError, match="holds a run already, and a mirror belongs to one"):
        run(*new, change)
    with pytest.raises(LoraError, match="holds a run already, and a mirror belongs to one"):
        run(*new)  # the same recipe anew is another run too
    run("output_dir=new", change)
    with pytest.raises(LoraError, match="is the mirror of another run"):
        run(*new, change, resume=True)  # a complete run, into the mirror of another
    assert contents(tmp_path / "mirror") == before


def test_a_mirror_of_other_rows_is_left_alone(run: Run, tmp_path: Path) -> None:
    mirror = f"checkpoint.mirror={tmp_path / 'mirror'}"
    run(mirror)
    before = contents(tmp_path / "mirror")
    with (tmp_path / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"text": "one more", "label": 1}\n')
    with pytest.raises(LoraError, match="the rows of train are not those it was trained with"):
        run("output_dir=new", mirror, resume=True)
    (tmp_path / "mirror" / "final" / "manifest.json").unlink()
    with pytest.raises(LoraError, match="the rows of train are not those the run was started"):
        run("output_dir=newer", mirror, resume=True)
    del before[tmp_path / "mirror" / "final" / "manifest.json"]
    assert contents(tmp_path / "mirror") == before


def test_an_empty_machine_gives_a_complete_run_more_steps(run: Run, tmp_path: Path) -> None:
    mirror = f"checkpoint.mirror={tmp_path / 'mirror'}"
    run(mirror)
    more = ("output_dir=new", mirror, ALLOWED, "train.max_steps=6")
    report = run(*more, resume=True)
    assert report["training"]["steps"] == 6
    final = tmp_path / "mirror" / "final" / "output" / "report.json"
    assert json.loads(final.read_text())["training"]["steps"] == 6
    with pytest.raises(LoraError, match=r"started with `train.max_steps: 6`"):
        run("output_dir=old", mirror, resume=True)
    assert run("output_dir=third", *more[1:], resume=True)["training"]["steps"] == 6


def test_a_mirror_that_does_not_say_whose_it_is(run: Run, tmp_path: Path) -> None:
    mirror = f"checkpoint.mirror={tmp_path / 'mirror'}"
    run(mirror)
    (tmp_path / "mirror" / "run.json").write_text("{")
    with pytest.raises(LoraError, match="does not say of which recipe"):
        run("output_dir=new", mirror, resume=True)
