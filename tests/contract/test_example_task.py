"""What the contract offers beyond today's tasks: parts, kept outputs, terms, windows, draws."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from calls import run, stopped_copy, write_rows
from closeness import assert_close
from example_task import ExampleTask, save_base
from runs import assert_same_run
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_cli.adapters.attach import attach, trainable_parameters
from lora_cli.adapters.load_adapter import load_adapter
from lora_cli.adapters.peft_format.adapter_folder import AdapterFolder, read_adapter
from lora_cli.errors import IntegrityError, LoraError
from lora_cli.evaluation import evaluate_adapter as evaluate_adapters
from lora_cli.evaluation import open_adapter
from lora_cli.evaluation.evaluate_adapter import evaluate_adapter
from lora_cli.evaluation.predict import answer_file
from lora_cli.export import adapter_task as adapter_tasks
from lora_cli.export import export_adapter as export_adapters
from lora_cli.export.combine import combine_adapters
from lora_cli.export.combine_methods import Method
from lora_cli.export.export_adapter import export_adapter
from lora_cli.export.merge import merge_adapter
from lora_cli.export.push import collect_files
from lora_cli.files import sha256_of
from lora_cli.preprocessing.encode import load_data
from lora_cli.recipe import Learned, Recipe, load_adapter_recipe, load_recipe
from lora_cli.tasks.contract import prepared_for_evaluation
from lora_cli.tasks.teachers import trained_task
from lora_cli.training import run as runs_of_training

CPU = torch.device("cpu")
TEXTS = ["a warm and funny film", "dull", "the plot is slow, and far too long", "great fun", "bore"]
ROWS = [{"text": text, "label": ("bad", "good", None)[i % 3]} for i, text in enumerate(TEXTS)]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> list[ExampleTask]:
    """Let every room build the example task, and return those that were built."""
    built: list[ExampleTask] = []

    def build(recipe: Recipe, learned: Learned | None = None) -> ExampleTask:
        built.append(ExampleTask(recipe, recipe.task))
        built[-1].learned = learned or Learned()
        return built[-1]

    monkeypatch.setattr(runs_of_training, "build_training_task", build)
    for module in (trained_task, evaluate_adapters, adapter_tasks, export_adapters):
        monkeypatch.setattr(module, "build_task", build)
    return built


def write(folder: Path, **sections: Any) -> Path:
    save_base(folder / "base")
    train = [{**row, "text": f"{row['text']} {i}"} for i, row in enumerate(ROWS * 2)]
    write_rows(folder / "train.jsonl", train)
    write_rows(folder / "validation.jsonl", ROWS)
    values: dict[str, Any] = {
        "model": {"name": "./base"},
        "task": {"type": "sequence_classification", "labels": ["bad", "good"]},
        "data": {"train": "train.jsonl", "validation": "validation.jsonl"},
        "adapter": {"rank": 2, "alpha": 4, "target_modules": "all-linear"},
        "train": {"max_steps": 2, "micro_batch_size": 3, "gradient_accumulation_steps": 2},
        "evaluate": {"every_steps": 2},
        "checkpoint": {"every_steps": 1},
    }
    return tiny.write_recipe(folder, values, sections)


def opened(folder: Path) -> tuple[ExampleTask, nn.Module, list[Any]]:
    """Return the task, its model with a drawn adapter, and the train examples, ready."""
    recipe = load_recipe(write(folder))
    task = ExampleTask(recipe, recipe.task)
    split = load_data(task)["train"]
    torch.manual_seed(0)
    model, new = task.load_model(CPU)
    attach(model, recipe, new)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.normal_(std=0.25)
    examples = [prepared_for_evaluation(task, split.examples[i]) for i in range(len(split))]
    return task, model.double(), examples


def test_each_term_is_a_mean_over_its_own_items(tmp_path: Path) -> None:
    task, model, examples = opened(tmp_path)
    with torch.no_grad():
        sums: dict[str, float] = {"loss": 0.0, "label": 0.0}
        for example in examples:
            batch = task.collate([example])
            features, cleaned, scores = task.forward(model, batch)
            sums["loss"] += float((cleaned - features).square().sum())
            if example["label"] >= 0:
                sums["label"] -= float(scores.log_softmax(-1)[0, example["label"]])
        n_bytes = sum(len(example["ids"]) for example in examples)
        n_labels = sum(example["label"] >= 0 for example in examples)
        assert 0 < n_labels < len(examples) < n_bytes
        found = task.predict(model, task.collate(examples))
    for term, count in (("loss", n_bytes), ("label", n_labels)):
        assert sum(p.losses[term][1] for p in found) == count
        assert sum(p.losses[term][0] for p in found) == pytest.approx(sums[term], rel=1e-5)
    unlabelled = next(p for p, e in zip(found, examples, strict=True) if e["label"] < 0)
    loss, items = unlabelled.losses["loss"]
    assert unlabelled.weighted_loss(task.loss_weights) == pytest.approx((loss / items, 1.0))


def test_only_the_part_that_is_not_frozen_is_adapted(tmp_path: Path) -> None:
    for adapter in ({}, {"type": "bitfit"}, {"type": "full"}, {"bias": "all"}):
        recipe = load_recipe(write(tmp_path, adapter=adapter))
        model, new = ExampleTask(recipe, recipe.task).load_model(CPU)
        attach(model, recipe, new)
        names = trainable_parameters(model)
        assert names
        assert all(name.startswith("decoder.") for name in names)
        assert not model.train().get_submodule("encoder").training
        assert model.get_submodule("decoder").training


def test_a_run_from_training_to_a_merged_model(
    tmp_path: Path, registered: list[ExampleTask], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write(tmp_path)
    out = tmp_path / "out"
    run(recipe, out)
    report = json.loads((out / "report.json").read_text())
    after = report["metrics"]["after"]["validation"]
    assert after["loss"] == pytest.approx(after["loss_labels"] + 0.25 * after["loss_label"])
    assert "bytes_per_s" in report["training"]
    assert "weight 0.25" in report["metric_definitions"]["loss_label"]
    assert not (out / "encoder").exists()
    assert not (out / "adapter_config.json").exists()
    assert load_file(out / "decoder/adapter_model.safetensors").keys() == {
        f"base_model.model.{module}.lora_{side}.weight"
        for module in ("hidden", "clean", "scores")
        for side in "AB"
    }
    tensors = json.loads((out / "base.json").read_text())["tensors"]
    assert {name.partition(".")[0] for name in tensors} == {"encoder", "decoder"}

    # every evaluation draws the same noise: that of the run, a new one, and another batch size
    for changes in ([], ["evaluate.micro_batch_size=1"]):
        again = evaluate_adapter(out, load_adapter_recipe(out, changes), "validation")
        assert again["validation"] == pytest.approx(after, rel=1e-5)

    # a row of several windows has one line, and one answer
    lines = (out / "predictions/validation.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == list(range(len(ROWS)))
    task, model, accelerator = open_adapter.open_adapter(out, load_adapter_recipe(out))
    target = tmp_path / "answers.jsonl"
    answer_file(model, task, tmp_path / "validation.jsonl", target, accelerator)
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["windows"] for row in answers] == [-(-len(text) // 8) for text in TEXTS]

    merged = merge_adapter(None, out, tmp_path / "merged")
    assert merged.difference < 1e-6
    plain = task._load(tmp_path / "merged")
    assert_close(task.probed(plain, task.probe()), task.probed(model, task.probe()))


def test_its_folder_is_an_adapter_for_every_command(tmp_path: Path) -> None:
    out, to = tmp_path / "out", tmp_path / "to"
    run(write(tmp_path), out)
    folders = (out, out / "checkpoints/step-000002")
    evaluated = [
        evaluate_adapter(folder, load_adapter_recipe(out), "validation")["validation"]["loss"]
        for folder in folders
    ]
    assert evaluated[0] == evaluated[1]
    task, saved = adapter_tasks.adapter_task(out)
    wanted = probed(task, saved)

    # started from, it begins where the other ended
    recipe = write(tmp_path, adapter={"from": str(out)}, train={"max_steps": 1})
    report = runs_of_training.train(load_recipe(recipe, [f"output_dir={tmp_path / 'more'}"]))
    assert report["metrics"]["before"]["validation"]["loss"] == pytest.approx(evaluated[0])
    assert (tmp_path / "more/decoder/adapter_model.safetensors").is_file()

    for reader in ("peft", "plain"):
        compared = export_adapter(out, to / reader, reader, say=print)
        assert any("loaded in PEFT" in line for line in compared)
        assert_close(probed(task, read_adapter(to / reader)), wanted)
    for reader in ("vllm", "mlx", "gguf"):
        with pytest.raises(LoraError, match="parts of one: `decoder`"):
            export_adapter(out, to / reader, reader)

    combine_adapters([out, tmp_path / "more"], to / "both", Method("cat"), [0.5, 0.0])
    both = read_adapter(to / "both")
    assert both.parts == ("decoder",)
    assert_close(probed(task, both), (wanted + probed(task, None)) / 2, 0.2)  # not linear
    merged = merge_adapter(None, [out, tmp_path / "more"], to / "merged", weights=[0.5, 0.0])
    assert merged.difference < 1e-6
    assert_close(task.probed(task._load(to / "merged"), task.probe()), probed(task, both))
    sha256 = json.loads((to / "merged/merge.json").read_text())["adapters"][0]["sha256"]
    assert sha256 == sha256_of(out / "decoder/adapter_model.safetensors")

    (to / "pushed").mkdir()
    collect_files(out, to / "pushed", "user/base")
    pushed = json.loads((to / "pushed/decoder/adapter_config.json").read_text())
    assert pushed["base_model_name_or_path"] == "user/base"
    assert_close(probed(task, read_adapter(to / "pushed")), wanted)


def probed(task: ExampleTask, saved: AdapterFolder | None) -> Tensor:
    """Return what the base with an adapter, or without, makes of the probe."""
    model, new = task.load_model(CPU)
    if saved is not None:
        load_adapter(model, saved, new)
    with torch.no_grad():
        return task.probed(model, task.probe())


def test_a_stopped_run_is_resumed_exactly_though_noise_is_drawn(tmp_path: Path) -> None:
    recipe = write(tmp_path)
    run(recipe, tmp_path / "whole")
    stopped_copy(tmp_path / "whole", tmp_path / "resumed")
    run(recipe, tmp_path / "resumed", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")


@pytest.mark.slow
def test_kept_outputs_are_those_of_the_frozen_part(
    tmp_path: Path, registered: list[ExampleTask]
) -> None:
    recipe = write(tmp_path, train={"max_steps": 12}, evaluate={"every_steps": 12})
    run(recipe, tmp_path / "kept")
    once = registered[-1].encoded_batches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExampleTask, "frozen_parts", lambda self, model: {})
        run(recipe, tmp_path / "computed")
    assert registered[-1].encoded_batches > 24 > once  # without, in every step
    ours, theirs = (
        load_file(tmp_path / name / "decoder/adapter_model.safetensors")
        for name in ("kept", "computed")
    )
    for name, tensor in ours.items():
        assert_close(tensor, theirs[name])

    # a run that kept them goes on with a limit that they exceed
    stopped_copy(tmp_path / "kept", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/checkpoints/step-000012")
    limited = write(
        tmp_path,
        train={"max_steps": 12},
        evaluate={"every_steps": 12},
        data={"cache_limit": "0B"},
    )
    run(limited, tmp_path / "resumed", resume=True)
    resumed = load_file(tmp_path / "resumed" / "decoder/adapter_model.safetensors")
    for name, tensor in ours.items():
        assert_close(tensor, resumed[name])

    # with another frozen part they are computed again
    save_base(tmp_path / "base")
    file = tmp_path / "base/encoder/model.safetensors"
    tensors = load_file(file)
    from safetensors.torch import save_file

    save_file({name: 2 * tensor for name, tensor in tensors.items()}, file)
    run(recipe, tmp_path / "other")
    other = load_file(tmp_path / "other" / "decoder/adapter_model.safetensors")
    assert any(not torch.equal(other[name], ours[name]) for name in ours)
    with (
        pytest.raises(IntegrityError, match=r"`encoder\..*` differs"),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        evaluate_adapter(tmp_path / "kept", load_adapter_recipe(tmp_path / "kept"))


def test_a_split_without_labels_has_a_loss_and_no_metric(tmp_path: Path) -> None:
    file, out = write(tmp_path), f"output_dir={tmp_path / 'out'}"
    write_rows(tmp_path / "validation.jsonl", [{**row, "label": None} for row in ROWS])
    with pytest.raises(LoraError) as found:
        runs_of_training.train(load_recipe(file, [out]))
    text = str(found.value)
    for part in ("no row of ", "validation.jsonl has a label or an answer", "`accuracy`"):
        assert part in text
    assert "--set 'evaluate.metrics=[]'" in text
    out = f"output_dir={tmp_path / 'loss_alone'}"
    report = runs_of_training.train(load_recipe(file, [out, "evaluate.metrics=[]"]))
    after = report["metrics"]["after"]["validation"]
    assert set(after) == {"loss"}
