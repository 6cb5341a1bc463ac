"""Tests of object detection: warnings, loss, metrics, and the task from rows to a merged model."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import tiny
import tiny_detectors
import torch
from accelerate import Accelerator
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny_detectors import LABELS
from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection, DetrConfig

from lora_cli.adapters.attach import attach, trainable_parameters
from lora_cli.errors import LoraError
from lora_cli.evaluation.evaluate_split import evaluate
from lora_cli.evaluation.open_adapter import open_adapter
from lora_cli.evaluation.predict import answer_file
from lora_cli.export.merge import merge_adapter
from lora_cli.metrics.box_scores import box_scores
from lora_cli.preprocessing.encode import load_data
from lora_cli.recipe import load_adapter_recipe, load_recipe
from lora_cli.recipe.spec.augmentation import BoxAugmentationSpec
from lora_cli.reporting.page_analysis import read_predictions
from lora_cli.reporting.page_boxes import per_label
from lora_cli.tasks import build_task
from lora_cli.tasks.contract import Task, prepared_for_evaluation
from lora_cli.tasks.detection.box_augmentation import (
    AnnotatedImage,
    augment,
    crop,
    mirror,
    random_crop,
)
from lora_cli.tasks.detection.detection_loss import Detections
from lora_cli.tasks.examples import Encoded
from lora_cli.tasks.object_detection import ObjectDetection
from lora_cli.training import train
from lora_cli.training.engine import Engine

Json = dict[str, Any]
CPU = torch.device("cpu")
SPLITS = {"train": 9, "validation": 5}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_recipe_file(folder: Path, kind: str = "yolos", **sections: Any) -> Path:
    """Write a recipe, and COCO files in `folder/data` and a base unless they exist."""
    data = folder / "data"
    if not data.exists():
        tiny_detectors.write_coco(data, SPLITS, crowd=True)
    if not (folder / "base").exists():
        tiny_detectors.save(kind, folder / "base")
    values: Json = {
        "model": {"name": "base"},
        "task": {"type": "object_detection"},
        "data": {"train": "data/train.json", "validation": "data/validation.json"},
        "adapter": {"rank": 2, "alpha": 4},
        "train": {"max_steps": 3, "micro_batch_size": 4, "log_every_steps": 1},
        "output_dir": str(folder / "out"),
    }
    return tiny.write_recipe(folder, values, sections)


def load_task_and_data(
    folder: Path, kind: str = "yolos", **sections: Any
) -> tuple[Task, dict[str, Encoded]]:
    task = build_task(load_recipe(write_recipe_file(folder, kind, **sections)))
    task.load_processor()
    with contextlib.redirect_stderr(io.StringIO()):
        return task, load_data(task)


def prepare_all(task: Task, split: Encoded) -> list[Json]:
    return [prepared_for_evaluation(task, split.examples[i]) for i in range(len(split))]


# ------------------------------------------------------------------------------------- the boxes


@pytest.mark.parametrize(
    ("orientation", "side", "with_size", "warns"),
    [
        (1, 30, True, False), (3, 30, True, True), (2, 30, True, True),
        (6, 30, True, False), (6, 30, False, True), (6, 40, True, True),
    ],
)  # fmt: skip
def test_images_turned_by_exif_data_are_a_warning(
    orientation: int, side: int, with_size: bool, warns: bool, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (40, side)).save(tmp_path / "data" / "a.jpg", exif=exif)
    upright_size = (side, 40) if orientation > 4 else (40, side)
    size = {"width": upright_size[0], "height": upright_size[1]} if with_size else {}
    box = {"image_id": 1, "bbox": [1, 1, 5, 5], "category_id": 1}
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", **size}], "annotations": [box],
        "categories": [{"id": 1, "name": "cat"}],
    }  # fmt: skip
    (tmp_path / "data" / "train.json").write_text(json.dumps(content))
    task, data = load_task_and_data(tmp_path, data={"validation": None})
    train = data["train"]
    _, warning = task.unknown_input("train", train.rows, train.examples)
    assert ("turned or mirrored by its EXIF data" in (warning or "")) == warns


@pytest.mark.parametrize(
    ("categories", "labels", "warns"),
    [
        ([1, 2], ["dark", "light", "red"], True), ([0, 2], ["dark", "light", "red"], False),
        (["light", "red"], ["dark", "light", "red"], False), ([1, 2], [0, 1, 2], False),
        ([1, 2], None, False),
    ],
)  # fmt: skip
def test_class_indices_from_one_are_a_warning(
    categories: list[Any], labels: list[Any] | None, warns: bool, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "data" / "a.png")
    objects = [{"bbox": [2, 1, 8, 8], "label": category} for category in categories]
    line = json.dumps({"image": "a.png", "objects": objects})
    (tmp_path / "data" / "train.jsonl").write_text(line)
    files = {"train": "data/train.jsonl", "validation": None}
    task, data = load_task_and_data(tmp_path, data=files, task={"labels": labels})
    train = data["train"]
    _, warning = task.unknown_input("train", train.rows, train.examples)
    assert ("do the numbers begin at 1?" in (warning or "")) == warns


def test_a_better_box_format_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "data" / "a.png")
    objects = [{"bbox": [20, 10, 38, 28], "label": "cat"}]
    line = json.dumps({"image": "a.png", "objects": objects})
    (tmp_path / "data" / "train.jsonl").write_text(line)
    files = {"train": "data/train.jsonl", "validation": None}
    task, data = load_task_and_data(tmp_path, data=files, task={"clip_boxes": True})
    train = data["train"]
    _, warning = task.unknown_input("train", train.rows, train.examples)
    assert "with `task.box_format: xyxy` none would" in (warning or "")


def write_objects(folder: Path, objects: Json, count: int, size: tuple[int, int]) -> None:
    """Write `count` images with the same objects."""
    (folder / "data").mkdir()
    rows = []
    for i in range(count):
        Image.new("RGB", size, (i, 0, 0)).save(folder / "data" / f"{i}.png")
        rows.append(json.dumps({"image": f"{i}.png", "objects": objects}) + "\n")
    (folder / "data" / "train.jsonl").write_text("".join(rows))


@pytest.mark.parametrize(
    ("box", "count", "words"),
    [
        ([10, 20, 30, 60], 10, "in per cent, or of pictures of another size?"),
        ([10, 20, 120, 60], 10, "are they of pictures of another size?"),
        ([10, 20, 30, 60], 9, ""), ([10, 20, 200, 60], 10, ""),
    ],
)  # fmt: skip
def test_boxes_in_one_corner_are_a_warning(
    box: list[int], count: int, words: str, tmp_path: Path
) -> None:
    write_objects(tmp_path, {"bbox": [box, box], "category": ["a", "a"]}, count, (320, 240))
    task, data = load_task_and_data(
        tmp_path, data={"train": "data/train.jsonl", "validation": None}
    )
    _, warning = task.unknown_input("train", data["train"].rows, data["train"].examples)
    assert words in (warning or "")
    assert bool(words) == bool(warning)


def test_ignored_objects_are_counted(tmp_path: Path) -> None:
    objects = {"bbox": [[1, 1, 30, 20], [5, 5, 8, 8]], "category": ["a", "b"], "iscrowd": [0, 1]}
    write_objects(tmp_path, objects, 3, (40, 30))
    files = {"train": "data/train.jsonl", "validation": None}
    task, data = load_task_and_data(tmp_path, data=files)
    _, warning = task.unknown_input("train", data["train"].rows, data["train"].examples)
    assert warning == (
        "3 objects of train are marked as `iscrowd` or `difficult`, and are neither trained nor "
        "measured: train.jsonl:1"
    )
    objects["iscrowd"] = [1, 1]
    (tmp_path / "data" / "train.jsonl").write_text(
        json.dumps({"image": "0.png", "objects": objects})
    )
    with pytest.raises(LoraError, match="all objects of the train split are marked as `iscrowd`"):
        load_task_and_data(tmp_path, data=files)


# ------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("kind", ["yolos", "detr", "detr with auxiliary losses"])
def test_loss_and_gradients_equal_those_of_transformers(kind: str, tmp_path: Path) -> None:
    options = {"auxiliary_loss": True} if "auxiliary" in kind else {}
    # different from the defaults, so that each weight matters
    options |= {"eos_coefficient": 0.3, "bbox_loss_coefficient": 3, "giou_loss_coefficient": 7}
    tiny_detectors.save(kind.split()[0], tmp_path / "base", **options)
    task, data = load_task_and_data(tmp_path)
    model, head = task.load_model(CPU)
    attach(model, task.recipe, head)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    examples = prepare_all(task, data["train"])
    assert {len(example["trained"]) for example in examples} >= {0, 1, 2}
    parameters = trainable_parameters(model)
    labels = [
        {"class_labels": example["trained_classes"], "boxes": example["trained"]}
        for example in examples
    ]
    batch = task.collate(examples)
    reference = model(**batch.inputs, labels=labels)
    expected_gradients = torch.autograd.grad(reference.loss, parameters.values(), allow_unused=True)

    engine = Engine(model, task, None, Accelerator())
    terms = task.loss_weights
    assert list(terms.values()) == [1.0, 3.0, 7.0]
    weights = {name: weight / batch.items[name].sum() for name, weight in terms.items()}
    # in two micro-batches, with the loss of the whole batch
    losses = sum(
        engine.add_gradients(task.collate(part), weights) for part in (examples[:4], examples[4:])
    )
    assert float(losses.sum()) == pytest.approx(float(reference.loss.detach()), rel=1e-5)
    scale = max(float(g.abs().max()) for g in expected_gradients if g is not None)
    for (name, parameter), gradient in zip(parameters.items(), expected_gradients, strict=True):
        own_gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradient = torch.zeros_like(parameter) if gradient is None else gradient
        assert float((own_gradient - gradient).abs().max()) <= 1e-5 * scale, name


def test_more_objects_than_queries_are_matched_as_by_transformers(
    tmp_path: Path,
) -> None:
    task, _ = load_task_and_data(tmp_path)
    model, _ = task.load_model(CPU)
    rng = np.random.default_rng(3)
    boxes = torch.from_numpy(rng.uniform(0.2, 0.4, (8, 4))).float()
    labels = torch.from_numpy(rng.integers(0, 2, 8))
    image = tiny_detectors.scene(1)[0]
    example = {
        "pixels": torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(1)),
        "mask": torch.ones(32, 32), "trained": boxes, "trained_classes": labels, "row": 0,
        "truth": torch.zeros(0, 6), "width": image.width, "height": image.height,
    }  # fmt: skip
    batch = task.collate([example])
    sums = task.losses(model, task.forward(model, batch), batch)
    mean = sum(task.loss_weights[n] * sums[n].sum() / batch.items[n].sum() for n in sums)
    reference = model(**batch.inputs, labels=[{"class_labels": labels, "boxes": boxes}])
    assert float(mean.detach()) == pytest.approx(float(reference.loss.detach()), rel=1e-5)


# ---------------------------------------------------------------------------------- the metrics


@pytest.mark.parametrize("kind", ["yolos", "detr"])
def test_metrics_do_not_depend_on_the_batch_size(kind: str, tmp_path: Path) -> None:
    task, data = load_task_and_data(tmp_path, kind)
    model, _ = task.load_model(CPU)
    results = []
    for size in (1, 2, 8):
        recipe = task.recipe.with_values({"evaluate.micro_batch_size": size})
        task.recipe = recipe
        results.append(evaluate(model, task, data["train"], Accelerator()))
    for result in results[1:]:
        assert result == pytest.approx(results[0], rel=1e-5, nan_ok=True)
    assert results[0].keys() >= {"map", "map_50", "map_75", "mar_100", "ap_dark", "ap_light"}
    assert results[0]["loss_boxes"] > 0


def random_boxes() -> tuple[list[Any], list[Any]]:
    """Return predicted boxes, of which some are near true ones, and the true boxes."""
    rng = np.random.default_rng(0)
    predictions, references = [], []
    for _ in range(25):
        n = int(rng.integers(0, 6))
        corner, size = rng.uniform(0, 80, (n, 2)), rng.uniform(5, 40, (n, 2))
        boxes, labels = np.hstack([corner, corner + size]), rng.integers(0, 3, n)
        crowd = rng.random(n) < 0.15
        references.append(np.column_stack([boxes, labels, crowd]).tolist())
        near = boxes + rng.normal(0, 3, boxes.shape)
        predicted_labels = np.where(rng.random(n) < 0.8, labels, (labels + 1) % 3)
        near_boxes = np.column_stack([near, rng.random(n), predicted_labels]).tolist()
        corner = rng.uniform(0, 80, (int(rng.integers(0, 4)), 2))
        score, label = rng.random(len(corner)), rng.integers(0, 3, len(corner))
        predictions.append(
            near_boxes + np.column_stack([corner, corner + 20, score, label]).tolist()
        )
    return predictions, references


def coco_box(box: list[float]) -> list[float]:
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def test_average_precision_equals_that_of_pycocotools() -> None:
    predictions, references = random_boxes()
    names = ["a", "b", "c", "d"]
    scores = box_scores(predictions, references, names)
    with contextlib.redirect_stdout(io.StringIO()):
        truth, numbered = (
            COCO(),
            [(i, box) for i, boxes in enumerate(references, 1) for box in boxes],
        )
        truth.dataset = {
            "info": {}, "images": [{"id": i} for i in range(1, len(references) + 1)],
            "categories": [{"id": i} for i in range(len(names))],
            "annotations": [
                {"id": n, "image_id": i, "category_id": int(box[4]), "iscrowd": int(box[5]),
                 "bbox": coco_box(box), "area": coco_box(box)[2] * coco_box(box)[3]}
                for n, (i, box) in enumerate(numbered, 1)
            ],
        }  # fmt: skip
        truth.createIndex()
        detections = truth.loadRes([
            {"image_id": i, "category_id": int(box[5]), "score": box[4], "bbox": coco_box(box)}
            for i, boxes in enumerate(predictions, 1) for box in boxes
        ])  # fmt: skip
        evaluation = COCOeval(truth, detections, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    expected = dict(
        zip(["map", "map_50", "map_75"], evaluation.stats[:3], strict=True),
        mar_100=evaluation.stats[8],
    )
    precision = evaluation.eval["precision"][:, :, :, 0, 2]
    for i, name in enumerate(names[:3]):
        expected[f"ap_{name}"] = precision[:, :, i].mean()
    assert 0.01 < scores["map"] < 0.5
    assert np.isnan(scores.pop("ap_d"))
    assert scores == pytest.approx(expected, rel=1e-9)


def test_each_query_predicts_a_box_with_its_best_label() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 2, 3, 4, generator=generator)  # 3 labels, and "no object"
    boxes = torch.rand(2, 2, 3, 4, generator=generator)
    sizes = torch.tensor([[10.0, 20.0], [7.0, 5.0]])
    task: Any = object.__new__(ObjectDetection)
    predictions = task._boxes_in_pixels(Detections(logits, boxes), sizes)
    for i, (width, height) in enumerate(sizes.tolist()):
        for q in range(3):
            shares = logits[1, i, q].double().exp() / logits[1, i, q].double().exp().sum()
            label = max(range(3), key=lambda c: float(shares[c]))
            x, y, w, h = boxes[1, i, q].tolist()
            expected = [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width,
                      (y + h / 2) * height, float(shares[label]), float(label)]  # fmt: skip
            assert predictions[i][q] == pytest.approx(expected, abs=1e-5)


def test_scores_without_predictions_or_objects() -> None:
    predictions, references = random_boxes()
    without_predictions = box_scores([[] for _ in references], references, ["a", "b", "c"])
    assert set(without_predictions.values()) == {0.0}
    without_objects = box_scores(predictions, [[] for _ in references], ["a", "b", "c"])
    assert all(np.isnan(value) for value in without_objects.values())


# ------------------------------------------------------------------------------------- the head


@pytest.mark.parametrize("kind", ["yolos", "detr"])
def test_output_rows_of_the_base_are_reused_by_label(kind: str, tmp_path: Path) -> None:
    """Rows of new labels are initialised at random; that of "no object" remains the last."""
    base = tiny_detectors.model(kind, ["light", "cup", "dark"])
    tiny_detectors.save(kind, tmp_path / "base", ["light", "cup", "dark"])
    task, _ = load_task_and_data(tmp_path)
    assert task.labels == list(LABELS)  # in the order of the file's ids
    model, new_modules = task.load_model(CPU)
    assert new_modules == ["class_labels_classifier", "bbox_predictor"]
    last = "class_labels_classifier" + (".layers.2" if kind == "yolos" else "")
    base_layer, layer = base.get_submodule(last), model.get_submodule(last)
    assert torch.equal(layer.weight, base_layer.weight[[2, 0, 3]])
    assert torch.equal(layer.bias, base_layer.bias[[2, 0, 3]])
    assert task.notes == []
    other_task, _ = load_task_and_data(tmp_path, task={"labels": ["dark", "cat", "light"]})
    model, _ = other_task.load_model(CPU)
    layer = model.get_submodule(last)
    assert torch.equal(layer.weight[[0, 2, 3]], base_layer.weight[[2, 0, 3]])
    assert not torch.equal(layer.weight[1], base_layer.weight[1])
    assert "the rows of `cat` start at random" in other_task.notes[0]


def test_timm_backbones_are_rejected(tmp_path: Path) -> None:
    recipe = write_recipe_file(tmp_path)
    config = DetrConfig(backbone_config={"model_type": "timm_backbone", "backbone": "resnet50"})
    config.architectures = ["DetrForObjectDetection"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(LoraError, match="timm, which needs torchvision") as caught:
        build_task(load_recipe(recipe)).load_processor()
    assert "model.revision=no_timm" in str(caught.value)


# --------------------------------------------------------------------------------- augmentation


def image_with_grey_boxes(
    boxes: list[list[int]], width: int = 40, height: int = 30
) -> AnnotatedImage:
    """Return a black image in which each box has its own grey level."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    for n, (x0, y0, x1, y1) in enumerate(boxes, 1):
        pixels[y0:y1, x0:x1] = 50 * n
    classes = np.arange(len(boxes))
    return AnnotatedImage(
        Image.fromarray(pixels), np.array(boxes, dtype=float).reshape(-1, 4), classes
    )


def assert_boxes_match_greys(annotated: AnnotatedImage) -> None:
    pixels = np.asarray(annotated.image)[..., 0]
    for box, label in zip(annotated.boxes.astype(int).tolist(), annotated.classes, strict=True):
        rows, columns = np.nonzero(pixels == 50 * (label + 1))
        expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert box == expected


@pytest.mark.parametrize("seed", range(8))
def test_boxes_are_augmented_with_their_image(seed: int) -> None:
    original = image_with_grey_boxes([[2, 3, 9, 12], [20, 5, 30, 25], [33, 20, 40, 30]])
    spec = BoxAugmentationSpec(crop=True, flip=True)
    augmented = augment(original, spec, np.random.default_rng(seed))
    assert 1 <= len(augmented.boxes) <= 3
    share = augmented.image.width * augmented.image.height / (40 * 30)
    assert 0.25 < share <= 1.0
    assert_boxes_match_greys(augmented)
    relative = augmented.relative_boxes().double().numpy() * np.tile(augmented.image.size, 2)
    corner = relative[:, :2] - relative[:, 2:] / 2
    assert np.abs(corner - augmented.boxes[:, :2]).max() < 1e-4


def test_objects_whose_centre_is_cropped_are_dropped() -> None:
    cropped = crop(image_with_grey_boxes([[2, 3, 9, 12], [20, 5, 30, 25]]), (5, 0, 24, 30))
    assert cropped.boxes.tolist() == [[0, 3, 4, 12]]
    assert cropped.classes.tolist() == [0]
    assert mirror(cropped).boxes.tolist() == [[15, 3, 19, 12]]
    empty = image_with_grey_boxes([])
    assert random_crop(empty, 0.3, np.random.default_rng(0)).boxes.shape == (0, 4)


# --------------------------------------------------------------------- from training to merging


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("boxes")
    task, learn = {"threshold": 0.2}, {"max_steps": 4}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()):
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        train(load_recipe(write_recipe_file(folder, task=task, train=learn)))
    return folder


def test_predictions_equal_those_of_the_merged_model_in_transformers(
    trained: Path, tmp_path: Path
) -> None:
    with contextlib.redirect_stderr(io.StringIO()):
        merge_adapter(None, trained / "out", tmp_path / "merged")
    task, model, accelerator = open_adapter(trained / "out", load_adapter_recipe(trained / "out"))
    images, target = trained / "data" / "images", tmp_path / "found.jsonl"
    count, problems = answer_file(model, task, images, target, accelerator)
    assert (count, problems) == (sum(SPLITS.values()), [])
    processor = AutoImageProcessor.from_pretrained(tmp_path / "merged", backend="pil")
    merged = AutoModelForObjectDetection.from_pretrained(tmp_path / "merged").eval()
    for line in target.read_text().splitlines():
        row = json.loads(line)
        image = Image.open(images / row["image"])
        with torch.no_grad():
            output = merged(pixel_values=processor(image, return_tensors="pt")["pixel_values"])
        (expected,) = processor.post_process_object_detection(
            output, 0.2, target_sizes=[(image.height, image.width)]
        )
        order = expected["scores"].argsort(descending=True)
        assert len(row["prediction"]) == len(order) > 0
        for predicted, i in zip(row["prediction"], order.tolist(), strict=True):
            assert predicted["score"] == pytest.approx(float(expected["scores"][i]), abs=1e-5)
            assert predicted["label"] == merged.config.id2label[int(expected["labels"][i])]
            assert predicted["box"] == pytest.approx(expected["boxes"][i].tolist(), abs=0.02)


def test_predictions_have_the_objects_and_crowds_of_the_file(trained: Path) -> None:
    file = json.loads((trained / "data" / "validation.json").read_text())
    names = {entry["id"]: entry["name"] for entry in file["categories"]}
    expected: dict[int, list[tuple[str, list[float], bool]]] = {
        entry["id"]: [] for entry in file["images"]
    }
    for entry in file["annotations"]:
        x, y, width, height = entry["bbox"]
        box = [x, y, x + width, y + height]
        expected[entry["image_id"]].append(
            (names[entry["category_id"]], box, bool(entry["iscrowd"]))
        )
    lines = read_predictions(trained / "out" / "predictions" / "validation.jsonl")
    objects = [
        [(entry["label"], pytest.approx(entry["box"]), entry.get("crowd", False)) for entry in row]
        for row in (line["reference"] for line in lines)
    ]
    assert objects == list(expected.values())
    assert {crowd for row in expected.values() for *_, crowd in row} == {True, False}


def test_the_report_shows_boxes_on_the_worst_images(trained: Path) -> None:
    page = (trained / "out" / "report.html").read_text()
    assert page.count('<svg class="boxed"') == SPLITS["validation"]
    lines = read_predictions(trained / "out" / "predictions" / "validation.jsonl")
    n_objects = sum(len(line["reference"]) for line in lines)
    n_predictions = sum(len(line["prediction"]) for line in lines)
    assert page.count('<rect class="wanted"') == n_objects > 0
    assert page.count('<rect class="found"') == n_predictions > 0
    assert "average precision" in page


def test_the_table_of_labels_counts_correct_boxes() -> None:
    def box(x: int, label: str, **options: Any) -> Json:
        return {"box": [x, 0, x + 10, 10], "label": label, **options}

    line = {
        "reference": [box(0, "cup"), box(50, "cup"), box(100, "cat", crowd=True)],
        "prediction": [
            box(1, "cup", score=0.9), box(2, "cup", score=0.8),  # the second is a duplicate
            box(50, "cat", score=0.7), box(101, "cat", score=0.6),  # the last is on a crowd
        ],
    }  # fmt: skip
    assert per_label([line]) == {"cat": (0, 1, 0), "cup": (2, 2, 1)}


def test_the_model_card_has_code_for_detection(trained: Path) -> None:
    card = (trained / "out" / "README.md").read_text()
    assert "AutoModelForObjectDetection" in card
    assert "post_process_object_detection" in card
    assert "object-detection" in card


# ---------------------------------------------------------------------------- labels and answers


@pytest.mark.parametrize("n_more_labels", [None, 0, 2])
def test_adapters_of_other_tools_have_the_base_s_labels(
    n_more_labels: int | None, tmp_path: Path
) -> None:
    task: Any = build_task(load_recipe(write_recipe_file(tmp_path)))
    id2label = AutoConfig.from_pretrained(tmp_path / "base").id2label
    names = [id2label[i] for i in range(len(id2label))]
    head = next(
        name
        for name in AutoModelForObjectDetection.from_pretrained(tmp_path / "base").state_dict()
        if name.startswith("class_labels_classifier") and name.endswith("weight")
    )
    tensors = {"bbox_predictor.layers.2.weight": torch.zeros(4, 32)}
    if n_more_labels is not None:  # one row is for "no object"
        tensors[head] = torch.zeros(len(names) + n_more_labels + 1, 32)
    task.complete_from(tensors)
    expected = [f"LABEL_{i}" for i in range(len(names) + 2)] if n_more_labels else names
    assert task.learned.task["labels"] == expected


def test_predictions_reach_the_threshold() -> None:
    task: Any = object.__new__(ObjectDetection)
    task.spec = SimpleNamespace(threshold=0.5)
    task._object = lambda box, label: {"box": box, "label": label}
    boxes = [[1, 2, 3, 4, 0.5, 1], [5, 6, 7, 8, 0.75, 0], [1, 1, 2, 2, 0.49, 1]]
    assert task._named(boxes) == [
        {"box": [5, 6, 7, 8], "label": 0, "score": 0.75},
        {"box": [1, 2, 3, 4], "label": 1, "score": 0.5},
    ]


def test_shown_examples_list_objects_and_crowds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ObjectDetection, "labels", ["cat", "dog"])
    task: Any = object.__new__(ObjectDetection)
    task.size = (30, 40)
    example = {
        "crowd": [False, True], "boxes": [[1, 2, 3, 4.4], [5, 6, 7, 8]], "classes": [1, 0],
        "image": {"bytes": None, "path": "b/a.png"}, "width": 50, "height": 20,
    }  # fmt: skip
    assert task.cost(example) == 1, "pictures are read in one size"
    assert task.shown(example, colour=False) == (
        ["2 objects"],
        "a.png: 50 x 20 pixels, read within 40 x 30; dog at 1, 2, 3, 4; cat at 5, 6, 7, 8 (crowd)",
    )


@pytest.mark.parametrize("kind", ["detr", "yolos"])
def test_the_probe_has_a_full_and_a_half_masked_image(kind: str) -> None:
    task: Any = object.__new__(ObjectDetection)
    task.channels, task.size, task.config = 3, (4, 6), SimpleNamespace(model_type=kind)
    probe, again = task.probe(), task.probe()
    assert probe["pixel_values"].shape == (2, 3, 4, 6)
    assert torch.equal(probe["pixel_values"], again["pixel_values"])
    if kind == "yolos":  # it reads no mask
        assert list(probe) == ["pixel_values"]
    else:
        assert probe["pixel_mask"].tolist() == [[[1] * 6] * 4, [[1, 1, 1, 0, 0, 0]] * 4]
