from __future__ import annotations

import json
import math
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import datasets
import numpy as np
import peft
import pytest
import tiny
import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoModelForSequenceClassification

from lora_cli.adapters.attach import attach
from lora_cli.adapters.peft_format.adapter_folder import save_adapter
from lora_cli.data.file_formats import read_rows
from lora_cli.errors import LoraError, NumericsError
from lora_cli.evaluation import evaluate_adapter as of_adapter
from lora_cli.evaluation import evaluate_split as evaluation
from lora_cli.evaluation.evaluate_adapter import evaluate_adapter, with_test_file
from lora_cli.evaluation.evaluate_split import best_by, evaluate
from lora_cli.evaluation.open_adapter import open_adapter
from lora_cli.evaluation.samples import MAX_EVALUATIONS, add_samples
from lora_cli.preprocessing.encode import load_data
from lora_cli.recipe import Recipe, load_recipe
from lora_cli.tasks import build_task
from lora_cli.tasks.contract import Task
from lora_cli.tasks.examples import MAIN, Encoded, Prediction
from lora_cli.tasks.sequence_classification import SequenceClassification

CPU = torch.device("cpu")
TEXTS = [" ".join(["great fun", "slow", "a plot"][: 1 + i % 3] * (1 + i % 5)) for i in range(23)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_encoder(tmp_path_factory.mktemp("base"))


def recipe_of(
    base: Path, tmp_path: Path, texts: Any = None, labels: Any = None, **sections: Any
) -> Recipe:
    for name in ("train", "dev"):
        rows = [
            {"text": text, "label": labels[i] if labels else i % 3 % 2}
            for i, text in enumerate(texts or TEXTS)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    data = {"path": "train.jsonl", "validation": "dev.jsonl"}
    return load_recipe(tiny.recipe(base, tmp_path, data=data, **sections))


def opened(recipe: Recipe) -> tuple[Task, nn.Module, Encoded]:
    task = build_task(recipe)
    task.load_processor()
    split = load_data(task)["validation"]
    model, _ = task.load_model(CPU)
    return task, tiny.enliven(model, 2), split


def measured(
    recipe: Recipe, tmp_path: Path, **sections: Any
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    task, model, split = opened(recipe)
    file = tmp_path / "predictions.jsonl"
    metrics = evaluate(model, task, split, Accelerator(cpu=True), file)
    return metrics, [json.loads(line) for line in file.read_text().splitlines()]


# ----------------------------------------------------------------------------------- evaluate


def test_results_depend_on_neither_batch_size_nor_window(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(base, tmp_path)
    results = []
    for size, window in ((1, 64), (3, 2), (4, 64), (64, 64)):
        monkeypatch.setattr(evaluation, "WINDOW", window)
        of_size = recipe.with_values({"evaluate.micro_batch_size": size})
        results.append(measured(of_size, tmp_path))
    metrics, lines = results[0]
    assert [line["row"] for line in lines] == list(range(23))
    assert [line["place"] for line in lines] == [f"dev.jsonl:{i + 1}" for i in range(23)]
    assert len({line["loss"] for line in lines}) > 10  # the rows differ, so a mix-up would show
    for other_metrics, other_lines in results[1:]:
        assert other_metrics == pytest.approx(metrics, rel=1e-4)
        for line, other in zip(lines, other_lines, strict=True):
            assert other["loss"] == pytest.approx(line["loss"], rel=1e-4, abs=1e-5)
            assert {k: other[k] for k in ("row", "place", "reference", "prediction")} == {
                k: line[k] for k in ("row", "place", "reference", "prediction")
            }


def test_a_batch_has_twice_the_training_size_unless_the_recipe_sets_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(base, tmp_path, train={"micro_batch_size": 4})
    for size, sizes in ((None, [8, 8, 7]), (5, [5, 5, 5, 5, 3])):
        task, model, split = opened(recipe.with_values({"evaluate.micro_batch_size": size}))
        own, found, asked = task.predict, [], []

        def predict(model: Any, batch: Any, own: Any = own, found: Any = found) -> list[Prediction]:
            found.append(len(batch.rows))
            return own(model, batch)

        monkeypatch.setattr(task, "predict", predict)
        monkeypatch.setattr(task, "choose_rows_to_answer", asked.append)
        evaluate(model, task, split, Accelerator(cpu=True))
        assert found == sizes
        assert asked == [[23]]


def test_metrics_without_any_reference_are_an_error() -> None:
    split: Any = SimpleNamespace(rows=SimpleNamespace(source="x.jsonl"))
    recipe: Any = SimpleNamespace(at=lambda key: key)
    one = evaluation._no_reference(["f1"], split, recipe).problems[0].what
    assert one == "no row of x.jsonl has a label or an answer, which metric `f1` compares with"
    two = evaluation._no_reference(["f1", "accuracy"], split, recipe).problems[0].what
    assert two.endswith("which the metrics `f1` and `accuracy` compare with")


def test_the_order_of_the_rows_does_not_matter(base: Path, tmp_path: Path) -> None:
    labels = [i % 3 % 2 for i in range(23)]
    metrics, lines = measured(recipe_of(base, tmp_path), tmp_path)
    reverse, backwards = measured(recipe_of(base, tmp_path, TEXTS[::-1], labels[::-1]), tmp_path)
    assert reverse == pytest.approx(metrics, rel=1e-4)
    for line, other in zip(lines, backwards[::-1], strict=True):
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-4, abs=1e-5)


def test_each_line_belongs_to_its_row(base: Path, tmp_path: Path) -> None:
    recipe = recipe_of(base, tmp_path)
    task, model, split = opened(recipe)
    _, lines = measured(recipe, tmp_path)
    with torch.no_grad():
        for i, line in enumerate(lines):
            (alone,) = task.predict(model, task.collate([split.examples[i]]))
            assert line["loss"] == pytest.approx(alone.losses["loss"][0], rel=1e-4, abs=1e-5)
            assert (line["prediction"], line["reference"]) == (alone.prediction, alone.reference)
            assert line["scores"] == pytest.approx(alone.scores, abs=1e-5)


@pytest.mark.parametrize("weights", [None, {"bad": 3.0}])
def test_the_loss_is_the_sum_over_the_number_of_items(
    base: Path, tmp_path: Path, weights: Any
) -> None:
    task = {"class_weights": weights, "labels": ["bad", "good"]}
    metrics, lines = measured(recipe_of(base, tmp_path, task=task), tmp_path)
    total, count = (sum(line[key] for line in lines) for key in ("loss", "n_items"))
    assert metrics["loss"] == pytest.approx(total / count)
    right = sum(line["prediction"] == line["reference"] for line in lines)
    assert metrics["accuracy"] == pytest.approx(right / 23)
    assert 0 < right < 23


def test_logits_are_freed_and_the_mode_of_the_model_is_restored(base: Path, tmp_path: Path) -> None:
    recipe = recipe_of(base, tmp_path, evaluate={"micro_batch_size": 2})
    task, model, split = opened(recipe)
    made: list[weakref.ref[torch.Tensor]] = []
    alive = []

    def before(*_: Any) -> None:
        assert not model.training
        assert not torch.is_grad_enabled()
        alive.append(sum(logits() is not None for logits in made))

    model.register_forward_pre_hook(before)
    model.register_forward_hook(lambda _, __, out: made.append(weakref.ref(out.logits)))
    model.train()
    evaluate(model, task, split, Accelerator(cpu=True))
    assert len(made) == 12
    assert alive == [0] * 12
    assert model.training


def test_a_failure_restores_the_mode_of_the_model(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, model, split = opened(recipe_of(base, tmp_path))
    monkeypatch.setattr(task, "predict", lambda *_: 1 / 0)
    model.train()
    with pytest.raises(ZeroDivisionError):
        evaluate(model, task, split, Accelerator(cpu=True), tmp_path / "p.jsonl")
    assert model.training


# ------------------------------------------------------------------------------ parts and lines


class Parts:
    """A task whose rows have several examples, and a split of rows that are words."""

    joins_examples, compares_rows = True, False
    loss_weights: ClassVar[dict[str, float]] = {MAIN: 1.0}
    rows = ("a", "b", "c", "d")
    main_term = "labels"
    result_of_term = Task.result_of_term

    def join(self, row: str, parts: list[Prediction]) -> Prediction:
        text = row + "".join(str(part.prediction) for part in parts)
        return Prediction(parts[0].row, text, None)


def part(row: int, text: str, loss: float, n_items: float) -> Prediction:
    return Prediction(row, text, None, losses={MAIN: (loss, n_items)})


@pytest.mark.parametrize("cuts", [[6], [1, 6], [2, 4, 6], [3, 5, 6], [1, 2, 3, 4, 5, 6]])
def test_the_examples_of_a_row_are_joined_wherever_a_window_ends(cuts: list[int]) -> None:
    parts = [
        part(0, "1", 1.0, 1),
        part(0, "2", 2.0, 3),
        part(0, "3", 4.0, 1),
        part(1, "4", 8.0, 2),
        part(3, "5", 16.0, 1),
        part(3, "6", 32.0, 5),
    ]
    task: Any = Parts()
    joined = evaluation._RowJoiner(task, task)
    found, start = [], 0
    for end in cuts:
        rows = joined.add(parts[start:end], end == 6)
        # only the last row of a window may continue in the next
        assert len(joined.waiting) == (0 if end == 6 else sum(p.row == parts[end - 1].row
                                                              for p in parts[:end]))  # fmt: skip
        found += rows
        start = end
    assert [(row.row, row.prediction, row.losses[MAIN]) for row in found] == [
        (0, "a123", (7.0, 5)),
        (1, "b4", (8.0, 2)),
        (3, "d56", (48.0, 6)),
    ]
    assert all(row.metric_inputs["nll"] == row.losses[MAIN] for row in found)


def test_examples_that_are_rows_pass_through() -> None:
    task: Any = Parts()
    task.joins_examples = False
    parts = [part(0, "1", 1.0, 1), part(0, "2", 2.0, 1)]
    assert evaluation._RowJoiner(task, task).add(parts, is_last=False) is parts


@pytest.mark.parametrize("answered", [range(9), [], [1, 2, 6]])
@pytest.mark.parametrize("n_rows", [1, 4, 5, 8, 9])
def test_windows_are_in_order_and_sorted_with_answered_rows_first(
    n_rows: int, answered: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "WINDOW", 2)
    lengths = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5])[:n_rows]

    class Split:
        def __len__(self) -> int:
            return n_rows

    split: Any = Split()
    split.lengths, split.examples = lengths, {"row": list(range(n_rows))}
    task: Any = SimpleNamespace(is_answered=lambda row: row in answered)
    windows = list(evaluation._windows(task, split, 2))
    for number, window in enumerate(windows):
        assert all(len(batch) <= 2 for batch in window)
        order = [int(i) for batch in window for i in batch]
        assert sorted(order) == list(range(4 * number, min(4 * number + 4, n_rows)))
        # ties keep their order
        assert order == sorted(order, key=lambda i: (i not in answered, -lengths[i], i))
    assert sum(len(batch) for window in windows for batch in window) == n_rows
    flags = [last for _, last in evaluation._with_last(iter(windows))]
    assert flags == [False] * (len(windows) - 1) + [True]


def test_losses_are_means_of_sums_and_terms_are_weighted() -> None:
    task: Any = Parts()
    assert evaluation._mean_losses(task, {MAIN: [6.0, 4.0]}) == {"loss": 1.5}
    assert math.isnan(evaluation._mean_losses(task, {MAIN: [0.0, 0.0]})["loss"])
    task.loss_weights = {"boxes": 3.0, "classes": 0.5}
    found = evaluation._mean_losses(task, {"boxes": [6.0, 4.0], "classes": [8.0, 2.0]})
    assert found == {"loss": 6.5, "loss_boxes": 1.5, "loss_classes": 4.0}
    found = evaluation._mean_losses(task, {"boxes": [6.0, 4.0], "classes": [0.0, 0.0]})
    assert found == {"loss": 4.5, "loss_boxes": 1.5}
    task.loss_weights = {MAIN: 2.0, "teacher": 0.5}
    found = evaluation._mean_losses(task, {MAIN: [6.0, 4.0], "teacher": [0.0, 0.0]})
    assert found == {"loss": 3.0}  # not returned twice
    found = evaluation._mean_losses(task, {MAIN: [6.0, 4.0], "teacher": [8.0, 2.0]})
    assert found == {"loss": 5.0, "loss_labels": 1.5, "loss_teacher": 4.0}


class Rows(list[Any]):
    """Rows without a file."""

    def place(self, i: int) -> str:
        return f"rows:{i}"

    def set_of(self, i: int) -> None:
        return None


class Lines(Parts):
    """A task that shows rows of any length."""

    def shown_input(self, row: str) -> str:
        return row

    def shown_reference(self, row: str) -> str:
        return row.upper()

    def take(self, text: str, found: Prediction) -> dict[str, Any]:
        split: Any = SimpleNamespace(rows=Rows([text]))
        task: Any = self
        return json.loads(evaluation._line(found, split, task))


@pytest.mark.parametrize("length", [499, 500, 501, 900])
def test_a_long_text_is_shown_to_five_hundred_characters(length: int) -> None:
    text = "x" * length
    line = Lines().take(text, part(0, "y", 1.0, 2))
    assert line["text"] == (text if length <= 500 else "x" * 499 + "…")
    assert line["reference"] == line["text"].upper()
    assert (line["loss"], line["n_items"], line["prediction"]) == (1.0, 2, "y")
    assert "scores" not in line


def test_characters_of_any_script_are_not_escaped() -> None:
    split: Any = SimpleNamespace(rows=Rows(["Zoë 良い"]))
    task: Any = Lines()
    line = evaluation._line(part(0, "y", 1.0, 2), split, task)
    assert "Zoë 良い" in line
    assert line.endswith("}\n")


def test_a_line_has_the_prediction_s_own_reference_and_six_digits_of_scores() -> None:
    found = part(0, "y", 1.0, 2)
    found.reference, found.scores = "own", {"a": 0.12345678, "b": 0.0}
    line = Lines().take("text", found)
    assert line["reference"] == "own"
    assert line["scores"] == {"a": 0.123457, "b": 0.0}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_strict_loss_rejects_a_row_with_a_nan_loss(
    bad: float, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, model, split = opened(recipe_of(base, tmp_path))
    own = task.predict

    def predict(*given: Any) -> list[Prediction]:
        found = own(*given)
        for prediction in found:
            if prediction.row == 7:
                prediction.losses[MAIN] = (bad, 1.0)
        return found

    monkeypatch.setattr(task, "predict", predict)
    with pytest.raises(NumericsError, match=f"loss on this row is {bad}") as caught:
        evaluate(model, task, split, Accelerator(cpu=True), strict_loss=True)
    assert caught.value.problems[0].at == "dev.jsonl:8"
    found = evaluate(model, task, split, Accelerator(cpu=True))
    assert not math.isfinite(found["loss"])


class Samples:
    """A task that generates text."""

    recipe = SimpleNamespace(evaluate=SimpleNamespace(samples=5))

    def sample(self, model: nn.Module, rows: list[str]) -> list[tuple[str, str, str]]:
        assert not model.training
        return [("p" * 3000 + row, "w" * 600, f"{row}!") for row in rows]


def test_samples_are_the_first_rows_with_answers_before_and_after() -> None:
    class Rows(list):
        sets: dict[str, Any] = {}

        def place(self, i: int) -> str:
            return f"rows:{i}"

    task: Any = Samples()
    split: Any = SimpleNamespace(rows=Rows("abcdefg"))
    model, accelerator = nn.Linear(1, 1), Accelerator(cpu=True)
    samples: list[dict[str, Any]] = []
    add_samples(model, task, split, accelerator, samples, "before")
    add_samples(model, task, split, accelerator, samples, "after")
    assert model.training
    for i, sample in enumerate(samples):
        row = "abcde"[i]
        assert sample == {
            "place": f"rows:{i}",
            "prompt": "p" * 1999 + row,
            "reference": "w" * 500,
            "before": f"{row}!",
            "after": f"{row}!",
        }
    assert len(samples) == 5
    for step in (*range(1, 12), 11):  # of many evaluations, some
        add_samples(model, task, split, accelerator, samples, step)
    kept = [one["step"] for one in samples[0]["during"]]
    assert kept == [2, 4, 6, 8, 9, 10, 11]
    assert len(kept) <= MAX_EVALUATIONS
    del samples[0]["during"][-1]
    samples[0]["during"].append({"step": 11, "text": "as at step 11"})
    add_samples(model, task, split, accelerator, samples, "after", {"step": 11})
    assert samples[0]["after"] == "as at step 11"
    add_samples(model, task, split, accelerator, samples, "after", {"step": 3})  # not kept
    assert samples[0]["after"] == "a!"
    add_samples(model, task, None, accelerator, samples, "never")
    other: Any = SimpleNamespace(is_main_process=False)
    add_samples(model, task, split, other, samples, "never")
    assert "never" not in samples[0]


# ----------------------------------------------------------------------------- saved adapters


def test_a_saved_adapter_measures_as_it_did_in_memory(base: Path, tmp_path: Path) -> None:
    recipe = recipe_of(base, tmp_path, task={"labels": None, "class_weights": "balanced"})
    task = build_task(recipe)
    task.load_processor()
    split = load_data(task)["validation"]
    model, new = task.load_model(CPU)
    attach(model, recipe, new)
    tiny.wake(model)
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_adapter(folder, model, recipe, new)
    wanted = evaluate(model, task, split, Accelerator(cpu=True))
    torch.manual_seed(99)  # the head is initialised differently before the saved one is loaded
    found = evaluate_adapter(folder, recipe)
    assert found == {"validation": pytest.approx(wanted, rel=1e-4)}
    # the original recipe has no labels and weights: they come from the train rows
    found = evaluate_adapter(folder, load_recipe(tmp_path / "recipe.yaml"), "validation")
    assert found["validation"]["accuracy"] == wanted["accuracy"]
    task, model, _ = open_adapter(folder, load_recipe(tmp_path / "recipe.yaml"))
    assert task.labels == ["0", "1"]  # type: ignore[attr-defined]
    assert not model.training


def test_a_peft_folder_is_measured_with_a_recipe(base: Path, tmp_path: Path) -> None:
    recipe = recipe_of(base, tmp_path, task={"labels": ["bad", "good"]})
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=4, target_modules=["query", "value"], modules_to_save=["classifier"]
    )  # fmt: skip
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
                assert "lora_" in name or "classifier" in name
    folder = tmp_path / "peft"
    model.save_pretrained(folder)
    found = evaluate_adapter(folder, recipe)["validation"]
    task, _, split = opened(recipe)
    batch = task.collate(list(split.examples))
    with torch.no_grad():
        loss = model.eval()(**batch.inputs, labels=batch.targets["labels"]).loss.item()
    assert found["loss"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("split", ["test", "path", "dev", None])
def test_a_missing_split_is_rejected_early(
    base: Path, tmp_path: Path, split: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(base, tmp_path)
    if split is None:
        recipe = recipe.with_values({"data.validation": None})
    monkeypatch.setattr(of_adapter, "open_task", lambda _: pytest.fail("too late"))
    with pytest.raises(LoraError, match=f"no split `{split or 'validation or test'}`"):
        evaluate_adapter(tmp_path, recipe, split)


def test_the_data_is_checked_before_weights_are_loaded(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(base, tmp_path, labels=["meh"] * 23)
    monkeypatch.setattr(of_adapter, "load_adapted", lambda *_: pytest.fail("too late"))
    with pytest.raises(LoraError, match="`meh` is not a label"):
        evaluate_adapter(tmp_path, recipe)


def test_fp16_without_a_gpu_is_rejected(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LoraError, match="fp16 needs a GPU"):
        open_adapter(tmp_path, recipe_of(base, tmp_path, train={"precision": "fp16"}))


# -------------------------------------------------------------------------------------- best


@pytest.mark.parametrize(
    ("evaluate", "wanted"),
    [
        ({}, ("accuracy", "max")),
        ({"metrics": ["f1_macro", "accuracy"]}, ("f1_macro", "max")),
        ({"metrics": []}, ("loss", "min")),
        ({"metrics": ["own/metric", "f1"]}, ("loss", "min")),
        ({"best": {"metric": "loss"}}, ("loss", "min")),
        ({"best": {"metric": "accuracy"}}, ("accuracy", "max")),
        ({"best": {"metric": "accuracy", "mode": "min"}}, ("accuracy", "min")),
    ],
)
def test_the_metric_for_the_best_adapter(
    base: Path, tmp_path: Path, evaluate: dict[str, Any], wanted: tuple[str, str]
) -> None:
    recipe = recipe_of(base, tmp_path, evaluate=evaluate)
    assert best_by(recipe, build_task(recipe)) == wanted


def test_the_first_of_a_metric_s_results_selects_the_best(tmp_path: Path) -> None:
    task = {"type": "causal_lm", "prompt_column": "a", "completion_column": "b"}
    recipe = recipe_of(tmp_path, tmp_path, task=task, evaluate={"metrics": ["rouge", "bleu"]})
    assert best_by(recipe, build_task(recipe)) == ("rouge1", "max")
    recipe = recipe.with_values({"evaluate.metrics": None})
    assert best_by(recipe, build_task(recipe)) == ("perplexity", "min")


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("x.csv", "label;text\r\ngood;a; b\r\nbad;c\r\n".replace("a; b", '"a; b"').encode("utf-16"),
         {"text": "a; b", "label": "good"}),
        ("x.txt", b"text\tlabel\n\"a\tgood\nb\tbad\n", {"text": '"a', "label": "good"}),
        ("x.jsonl", b'{"text": "a", "label": "good"}\n', {"text": "a", "label": "good"}),
        ("x.csv", "text,label\nna\u00efve,good\nb,bad\n".encode("cp1252"),
         {"text": "na\u00efve", "label": "good"}),
    ],
)  # fmt: skip
def test_a_file_to_measure_is_read_as_predict_reads_it(
    name: str, content: bytes, wanted: dict[str, str], tmp_path: Path
) -> None:
    recipe = load_recipe(tiny.recipe(tiny.save_encoder(tmp_path / "base"), tmp_path))
    (tmp_path / name).write_bytes(content)
    recipe = with_test_file(recipe, tmp_path / name)
    first = next(read_rows(tmp_path / name, recipe.data.format))
    assert first.columns is not None
    assert {key: first.columns[key] for key in wanted} == wanted


@pytest.mark.parametrize("is_mixed", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.tsv", "text\tlabel\na\t1.234\nb\t2.000\n"),
        ("x.jsonl", '{"text": "a", "label": "1.234"}\n{"text": "b", "label": 2000}\n'),
    ],
)
def test_numbers_in_a_measured_file_have_the_format_of_the_train_rows(
    name: str, content: str, is_mixed: bool, base: Path, tmp_path: Path
) -> None:
    (tmp_path / "rows.csv").write_text("text;label\na;1.234,5\n", encoding="utf-8")
    form = {"delimiter": ";", "decimal": ",", "thousands": "."}
    data: dict[str, Any] = {"path": "rows.csv", "format": form}
    task = {"labels": None, "problem": "regression"}
    data = {"mix": {"one": data}} if is_mixed else data
    recipe = load_recipe(tiny.recipe(base, tmp_path, data=data, task=task))
    (tmp_path / name).write_text(content, encoding="utf-8")
    made = build_task(with_test_file(recipe, tmp_path / name))
    made.load_processor()
    found = load_data(made, ("test",))["test"].examples
    assert [example["labels"] for example in found] == [1234.0, 2000.0]


def test_only_a_folder_of_images_is_measured_as_a_folder(base: Path, tmp_path: Path) -> None:
    recipe = recipe_of(base, tmp_path)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "cat.png").write_bytes(b"")
    for wrong in (folder, tmp_path / "missing.csv"):
        with pytest.raises(LoraError, match=r"is a folder, and not a file|there is no file"):
            with_test_file(recipe, wrong)
    pictures = {"type": "image_classification", "labels": ["cat", "dog"]}
    seeing = recipe_of(base, tmp_path, task=pictures)
    found = with_test_file(seeing, folder)
    assert (found.data.test, found.data.validation) == (str(folder), None)
    assert found.data.format == seeing.data.format
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(LoraError, match="is a folder, and not a file"):
        with_test_file(seeing, empty)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"labels": None}, "the labels are not known"),
        ({"class_weights": "balanced"}, "the weights of the labels are not known"),
        ({}, None),
    ],
)
def test_measuring_a_file_does_not_load_rows_from_the_hub(
    task: dict[str, Any], said: str | None, base: Path, tmp_path: Path
) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "a", "label": "good"}\n')
    data = {"name": "some/set", "config": "c", "train": "train", "validation": "dev"}
    recipe = load_recipe(tiny.recipe(base, tmp_path, data=data, task=task))
    if said is not None:
        with pytest.raises(LoraError, match=said):
            with_test_file(recipe, file)
        return
    found = with_test_file(recipe, file).data
    assert (found.name, found.config, found.validation, found.streaming) == (None,) * 3 + (False,)
    assert (found.train, found.test) == (str(file), str(file))


def test_all_splits_except_train_are_measured_by_default(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(base, tmp_path).with_values({"data.test": str(tmp_path / "dev.jsonl")})
    monkeypatch.setattr(of_adapter, "load_adapted", lambda *_: nn.Linear(1, 1))
    given: list[Any] = []
    monkeypatch.setattr(
        of_adapter, "evaluate", lambda *_, **options: given.append(options) or {"loss": 1.0}
    )
    warned: list[str] = []
    monkeypatch.setattr(of_adapter, "warn", warned.append)
    monkeypatch.setattr(
        SequenceClassification, "unknown_input",
        lambda self, name, rows, examples: (0.5, name == "test" and f"{name}: {len(rows)} rows"),
    )  # fmt: skip
    assert set(evaluate_adapter(tmp_path, recipe)) == {"validation", "test"}
    assert given == [{"strict_loss": True}] * 2  # a NaN loss is an error
    assert warned == ["test: 23 rows"]
    for name in ("train", "validation", "test"):
        assert set(evaluate_adapter(tmp_path, recipe, name)) == {name}
    streamed = recipe.with_values({"data.streaming": True})
    with pytest.raises(LoraError, match="train is streamed"):
        evaluate_adapter(tmp_path, streamed, "train")
