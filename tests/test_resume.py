"""Tests of `--resume`: complete runs with more steps, mirrors, and damaged files."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from lora_cli.errors import IntegrityError, LoraError
from lora_cli.files import write_manifest
from lora_cli.recipe import load_recipe
from lora_cli.training import run as training_run
from lora_cli.training import train
from lora_cli.training.checkpoints import checkpoints
from lora_cli.training.step import train_step
from lora_cli.training.train_state import TrainState, recipe_facts, reject_changes

Json = dict[str, Any]
ALLOWED = "checkpoint.allow_changes=true"
Run = Callable[..., Json]


def write_rows(folder: Path) -> None:
    for name, texts in (("train", tiny.CORPUS[:6]), ("validation", tiny.CORPUS[6:])):
        rows = [{"text": text, "label": i % 2} for i, text in enumerate(texts)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the recipe of all runs; its rows are next to it."""
    folder = tmp_path_factory.mktemp("recipe")
    return tiny.recipe(
        tiny.save_encoder(folder / "base"),
        folder,
        data={"train": "train.jsonl", "validation": "validation.jsonl"},
        train={"max_steps": 4, "log_every_steps": 1},
        evaluate={"baseline": False},
        checkpoint={"every_steps": 2},
    )


@pytest.fixture
def run(recipe: Path, tmp_path: Path) -> Run:
    """Return a function that trains, or resumes, and returns the report."""
    write_rows(recipe.parent)  # a test may have changed them

    def go(*sets: str, resume: bool = False) -> Json:
        placed = [s.replace("output_dir=", f"output_dir={tmp_path}/") for s in sets]
        placed = [f"output_dir={tmp_path / 'out'}", *placed]
        return train(load_recipe(recipe, placed), resume=resume)

    return go


# ------------------------------------------------------------------------ complete, and then more


def test_a_complete_run_continues_with_more_steps(
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
    assert run(*more, resume=True)["training"]["steps"] == 6  # it is complete again
    assert "trained" not in capsys.readouterr().err


def test_forbidden_changes_of_a_complete_run_are_named(run: Run, tmp_path: Path) -> None:
    run()
    with pytest.raises(LoraError, match=r"`train.max_steps: 4`, the recipe now says `6`") as caught:
        run("train.max_steps=6", resume=True)
    assert f"`--set {ALLOWED}` continues anyway" in str(caught.value)
    with pytest.raises(LoraError, match="has made 4 steps, and the recipe now asks for 3"):
        run("train.max_steps=3", ALLOWED, resume=True)
    with pytest.raises(LoraError, match=r"adapter\.rank"):
        run("adapter.rank=2", ALLOWED, resume=True)
    assert run(resume=True)["training"]["steps"] == 4


def test_a_complete_run_is_measured_again_with_other_metrics(run: Run) -> None:
    first = run()
    report = run("evaluate.metrics=[f1]", ALLOWED, resume=True)
    assert "f1" in report["metrics"]["after"]["validation"]
    assert report["training"]["steps"] == 4
    loss = first["metrics"]["after"]["validation"]["loss"]
    assert report["metrics"]["after"]["validation"]["loss"] == loss


@pytest.mark.parametrize("more", [[], ["train.max_steps=6"]], ids=["complete", "more steps"])
def test_the_best_adapter_is_selected_again_by_another_metric(
    run: Run, tmp_path: Path, more: list[str]
) -> None:
    first = run("evaluate.best.metric=loss", "train.optimizer.learning_rate=0.02")
    assert first["best"]["value"] > 0.5, "or accuracies would be better than it by chance"
    report = run(
        "evaluate.best.metric=accuracy", "train.optimizer.learning_rate=0.02", ALLOWED, *more,
        resume=True,
    )  # fmt: skip
    log = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    measured = {
        line["step"]: line["validation"] for line in map(json.loads, log) if "validation" in line
    }
    kept = {first["best"]["step"], 4, *(step for step in measured if step > 4)}
    assert report["best"]["metric"] == "accuracy"
    assert report["best"]["value"] == max(measured[step]["accuracy"] for step in kept)
    assert report["metrics"]["after"]["validation"] == measured[report["best"]["step"]]


def test_the_best_adapter_is_measured_again_on_other_rows(run: Run, recipe: Path) -> None:
    by_loss = ("evaluate.best.metric=loss", "train.optimizer.learning_rate=0.02")
    first = run(*by_loss)
    file = recipe.parent / "validation.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    turned = [json.dumps(row | {"label": 1 - row["label"]}) for row in rows]
    file.write_text("".join(f"{line}\n" for line in turned))
    report = run(*by_loss, "train.max_steps=6", ALLOWED, resume=True)
    after = report["metrics"]["after"]["validation"]["loss"]
    assert report["best"]["value"] == after != first["best"]["value"]


def test_results_for_other_rows_are_not_returned(run: Run, recipe: Path) -> None:
    run()
    with (recipe.parent / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"text": "one more", "label": 1}\n')
    with pytest.raises(LoraError, match="the rows of train are not those it was trained with"):
        run(resume=True)


def test_changed_versions_since_a_complete_run_are_reported(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run()
    assert run(resume=True) == first
    assert "made with" not in capsys.readouterr().err
    file = tmp_path / "out" / "report.json"
    changed = first | {"versions": first["versions"] | {"transformers": "4.0.0"}}
    file.write_text(json.dumps(changed))
    assert run(resume=True) == changed
    said = capsys.readouterr().err
    assert f"made with `transformers: 4.0.0`, and now it is `{version('transformers')}`" in said
    assert "`torch" not in said


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_killed_continuation_does_not_count_as_complete(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    more = ("train.max_steps=8", ALLOWED)

    def pulled(*_: object) -> None:
        raise RuntimeError("the plug")

    with monkeypatch.context() as patch:
        patch.setattr("lora_cli.training.run.finish", pulled)
        with pytest.raises(RuntimeError, match="the plug"):
            run(*more, resume=True)
    assert not (tmp_path / "out" / "report.json").exists()
    assert run(*more, resume=True)["training"]["steps"] == 8


# ------------------------------------------------------------------------------------ the mirror


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("change", ["adapter.rank=2", "train.seed=1", "train.max_steps=6"])
@pytest.mark.slow
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
        run(*new)  # a new run of the same recipe is another run too
    run("output_dir=new", change)
    with pytest.raises(LoraError, match="is the mirror of another run"):
        run(*new, change, resume=True)  # a complete run, with the mirror of another
    assert contents(tmp_path / "mirror") == before


def test_a_mirror_of_other_rows_is_left_alone(run: Run, recipe: Path, tmp_path: Path) -> None:
    mirror = f"checkpoint.mirror={tmp_path / 'mirror'}"
    run(mirror)
    before = contents(tmp_path / "mirror")
    with (recipe.parent / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"text": "one more", "label": 1}\n')
    with pytest.raises(LoraError, match="the rows of train are not those it was trained with"):
        run("output_dir=new", mirror, resume=True)
    (tmp_path / "mirror" / "final" / "manifest.json").unlink()
    with pytest.raises(LoraError, match="the rows of train are not those the run was started"):
        run("output_dir=newer", mirror, resume=True)
    del before[tmp_path / "mirror" / "final" / "manifest.json"]
    assert contents(tmp_path / "mirror") == before


@pytest.mark.slow
def test_a_complete_run_continues_from_the_mirror_on_a_new_machine(
    run: Run, tmp_path: Path
) -> None:
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


def test_a_mirror_without_a_readable_owner_is_an_error(run: Run, tmp_path: Path) -> None:
    mirror = f"checkpoint.mirror={tmp_path / 'mirror'}"
    run(mirror)
    (tmp_path / "mirror" / "run.json").write_text("{")
    with pytest.raises(LoraError, match="does not say of which recipe"):
        run("output_dir=new", mirror, resume=True)


# --------------------------------------------------------------------------------- damaged files


class Plug(Exception):
    """Kills a run."""


@pytest.fixture(scope="module")
def died(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output folder of a run that died in its fourth step."""
    folder, count, real = tmp_path_factory.mktemp("died") / "out", itertools.count(1), train_step
    write_rows(recipe.parent)

    def dying(*arguments: Any) -> Any:
        if next(count) == 4:
            raise Plug
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "train_step", dying)
        with pytest.raises(Plug):
            train(load_recipe(recipe, [f"output_dir={folder}"]))
    assert [step for step, _ in checkpoints(folder)] == [2]
    return folder


@pytest.fixture
def cut(died: Path, tmp_path: Path) -> Path:
    """Return a copy of that folder, to resume from."""
    return Path(shutil.copytree(died, tmp_path / "out"))


def _half_a_line(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def _in_the_middle(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    lines[0] = lines[0][:7] + b"\n"
    path.write_bytes(b"".join(lines))


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "is gone, and with it the lines of 2 steps"),
        (_in_the_middle, "was cut or edited"),
        (lambda path: path.write_bytes(b"\xff\xfe[]\n" + path.read_bytes()), "was cut or edited"),
        (
            lambda path: path.write_bytes(b"[1]\n" * 99),
            "was cut or edited; it keeps 0 whole lines",
        ),
        (lambda path: path.write_bytes(b""), "was cut or edited; it keeps 0 whole lines"),
    ],
)
@pytest.mark.slow_after(2)
def test_a_damaged_log_is_repaired_and_reported(
    run: Run,
    cut: Path,
    name: str,
    damage: Callable[[Path], None],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(cut / name)
    capsys.readouterr()
    report = run(resume=True)
    assert f"warning: {cut / name} {said}" in capsys.readouterr().err
    assert [said in change for change in report["training"]["changes"]] == [True]
    lines = (cut / name).read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(steps)
    assert steps[-1] == 4


def test_a_truncated_line_is_written_again(run: Run, cut: Path) -> None:
    """Lines beyond the checkpoint belong to steps that are repeated, so nothing is lost."""
    _half_a_line(cut / "metrics.jsonl")
    report = run(resume=True)
    assert report["training"]["changes"] == []


Tensors = dict[str, torch.Tensor]


def _first(tensors: Tensors, key: str = "exp_avg") -> str:
    return next(
        name for name in sorted(tensors) if name.endswith(f"/{key}") and tensors[name].ndim == 2
    )


def _changed(change: Callable[[torch.Tensor], torch.Tensor], key: str = "exp_avg") -> Any:
    def of(tensors: Tensors) -> Tensors:
        name = _first(tensors, key)
        return tensors | {name: change(tensors[name]).contiguous()}

    return of


def _without(part: str) -> Any:
    return lambda tensors: {name: t for name, t in tensors.items() if part not in name}


OPTIMIZER = {
    "missing": (_without("query.lora_A/exp_avg_sq"), "is missing"),
    "none": (lambda _: {"x/exp_avg": torch.zeros(1)}, "is missing"),
    "transposed": (
        _changed(lambda t: t.T),
        "is not the file that was written with",
    ),  # a square matrix
    "transposed, of another shape": (
        lambda t: {n: x.T.contiguous() if "lora_B/exp_avg" in n else x for n, x in t.items()},
        "was written",
    ),
    "other numbers": (_changed(lambda t: t * 2), "is not the file that was written with"),
    "of another dtype": (_changed(lambda t: t.half()), "float32"),
    "one number": (_changed(lambda t: t[:1, :1]), "was written"),
    "foreign": (lambda t: t | {"other.weight/exp_avg": torch.zeros(2)}, "that is not trained"),
    "more": (lambda t: t | {_first(t) + "_of_more": torch.zeros(2)}, "it was not written"),
    "NaN": (_changed(lambda t: t * float("nan")), "contains NaN or infinity"),
    "infinity": (_changed(lambda t: t + float("inf"), "exp_avg_sq"), "contains NaN or infinity"),
    "negative": (_changed(lambda t: t - 1, "exp_avg_sq"), "has negative entries"),
    "later": (
        lambda t: {n: x + 90 if n.endswith("/step") else x for n, x in t.items()},
        "counts 92 as the number of steps, and the run has made 2",
    ),
}


@pytest.mark.parametrize("kind", OPTIMIZER)
@pytest.mark.slow_after(4)
def test_optimizer_tensors_are_checked_even_if_the_manifest_matches(
    run: Run, cut: Path, kind: str
) -> None:
    change, said = OPTIMIZER[kind]
    folder = cut / "checkpoints" / "step-000002"
    file = folder / "optimizer.safetensors"
    save_file(change(load_file(file)), file)
    write_manifest(folder)
    with pytest.raises(IntegrityError) as caught:
        run(resume=True)
    assert said in str(caught.value)
    assert f"hint: remove {folder}" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: dict(list(t.items())[1:]), "is not there, and should be"),
        (lambda t: {n: x.T.contiguous() if "lora_A" in n else x for n, x in t.items()}, "of shape"),
        (lambda t: {n: x[:, :1].clone() if "lora_A" in n else x for n, x in t.items()}, "of shape"),
        (lambda t: t | {"base_model.model.x.weight": torch.zeros(2)}, "is of shape [2], and"),
    ],
)
def test_weights_of_a_checkpoint_are_checked_even_if_the_manifest_matches(
    run: Run, cut: Path, change: Callable[[Tensors], Tensors], said: str
) -> None:
    folder = cut / "checkpoints" / "step-000002"
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    write_manifest(folder)
    with pytest.raises(IntegrityError) as caught:
        run(resume=True)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [{"step": "two"}, {"step": None}, {"best": 7}, {"logs": [1]}, {"tokens": -4}, {"machine": 3},
     {"before": {"validation": {"loss": "low"}}}, {"pace": 3}],
)  # fmt: skip
def test_a_state_with_other_types_is_invalid(run: Run, cut: Path, values: Json) -> None:
    folder = cut / "checkpoints" / "step-000002"
    file = folder / "trainer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    write_manifest(folder)
    with pytest.raises(IntegrityError, match="its state cannot be read by this version"):
        run(resume=True)


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_another_version_of_a_library_is_reported(run: Run, cut: Path, name: str) -> None:
    folder = cut / "checkpoints" / "step-000002"
    file = folder / "trainer.json"
    state = json.loads(file.read_text())
    assert state["machine"][name] == version(name)
    state["machine"][name] = "1.0"
    file.write_text(json.dumps(state))
    write_manifest(folder)
    with pytest.raises(LoraError, match=f"the run was started with `{name}: 1.0`, and now it is"):
        run(resume=True)
    report = run(ALLOWED, resume=True)
    assert any(f"{name}: 1.0" in change for change in report["training"]["changes"])


def test_keys_that_an_earlier_version_did_not_have_are_no_change(run: Run, cut: Path) -> None:
    file = cut / "checkpoints" / "step-000002" / "trainer.json"
    state = json.loads(file.read_text())
    known = state["recipe"]
    del known["train"]["optimizer"]["weight_decay"], known["adapter"]["dropout"]
    del known["evaluate"]["generation"]
    file.write_text(json.dumps(state))
    write_manifest(file.parent)
    for key, value in (("adapter.dropout", 0.1), ("evaluate.generation.max_new_tokens", 7)):
        with pytest.raises(LoraError, match=f"`{key}: None`, the recipe now says `{value}`"):
            run(f"{key}={value}", resume=True)  # a value that the earlier version did not have
    report = run(resume=True)
    assert report["training"]["steps"] == 4
    assert report["training"]["changes"] == []


def test_an_omitted_section_is_a_change(recipe: Path) -> None:
    """`best: {}` only has defaults, but `best: null` selects by another metric."""
    then = TrainState(recipe=recipe_facts(load_recipe(recipe)))
    assert reject_changes(then, load_recipe(recipe)) == []
    with pytest.raises(
        LoraError, match=r"evaluate\.best\.metric: None`, the recipe now says `loss`"
    ):
        reject_changes(then, load_recipe(recipe, ["evaluate.best={}"]))
