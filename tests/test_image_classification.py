"""Pictures as models see them, augmentation, and the task from `init` to `merge`."""

from __future__ import annotations

import contextlib
import copy
import csv
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import tiny
import tiny_pictures
import torch
from accelerate import Accelerator
from closeness import assert_close, assert_different
from peft import PeftModel
from PIL import Image
from test_pictures import BROKEN, READ, media
from tiny_pictures import CLASSES, SIZE, encoded, picture
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification

from lora_cli.adapters.attach import attach, lora_layers, training_mode
from lora_cli.data import pictures
from lora_cli.errors import IntegrityError, LoraError
from lora_cli.evaluation.evaluate_adapter import evaluate_adapter, with_test_file
from lora_cli.evaluation.open_adapter import open_adapter
from lora_cli.evaluation.predict import answer, answer_file
from lora_cli.export.merge import merge_adapter
from lora_cli.preprocessing.encode import check_data, load_data
from lora_cli.recipe import load_adapter_recipe, load_recipe
from lora_cli.recipe_draft import draft_recipe, write_recipe
from lora_cli.tasks import build_task, image_classification
from lora_cli.tasks.contract import Task
from lora_cli.tasks.examples import Encoded
from lora_cli.tasks.image_classification import random_box
from lora_cli.tasks.pictures.picture_task import dtype_of_base
from lora_cli.training import train
from lora_cli.training.batches import Batches
from lora_cli.training.step import train_step

Json = dict[str, Any]
CPU = torch.device("cpu")
ARCHITECTURES = ("vit", "resnet", "efficientnet", "convnext", "swin")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_recipe_of(folder: Path, base: Path, **sections: Any) -> Path:
    """Write a recipe for the pictures in `folder/pictures`, which are drawn if they are not."""
    root = folder / "pictures"
    if not root.exists():
        tiny_pictures.draw_folders(root, {"train": 6, "validation": 3, "test": 3})
    values: Json = {
        "model": {"name": str(base)},
        "task": {"type": "image_classification"},
        "data": {"path": "pictures", "validation": "validation", "test": "test"},
        "adapter": {"rank": 2, "alpha": 4},
        "train": {"max_steps": 3, "micro_batch_size": 4, "log_every_steps": 1},
        "output_dir": str(folder / "out"),
    }
    return tiny.write_recipe(folder, values, sections)


def opened(folder: Path, kind: str = "vit", **sections: Any) -> tuple[Task, dict[str, Encoded]]:
    base = folder / "base"
    if not base.exists():
        tiny_pictures.save(kind, base)
    task = build_task(load_recipe(write_recipe_of(folder, base, **sections)))
    task.load_processor()
    with contextlib.redirect_stderr(io.StringIO()):
        return task, load_data(task)


def run(recipe: Path, **options: Any) -> Json:
    with contextlib.redirect_stderr(io.StringIO()):
        return train(load_recipe(recipe), **options)


def test_broken_pictures_are_named_by_file_and_row_or_skipped(tmp_path: Path) -> None:
    base = tiny_pictures.save("vit", tmp_path / "base")
    root = tiny_pictures.draw_folders(
        tmp_path / "pictures", {"train": 3, "validation": 1, "test": 1}
    )
    (root / "train/dark/cut.png").write_bytes(BROKEN["a cut PNG"][0])
    (root / "train/light/text.png").write_bytes(b"no picture")
    task = build_task(load_recipe(write_recipe_of(tmp_path, base)))
    with pytest.raises(LoraError) as raised:
        check_data(task, ["train"])
    cut, text = raised.value.problems
    assert (cut.at, text.at) == ("train/dark/cut.png", "train/light/text.png")
    assert cut.what.startswith("`cut.png` is cut off or damaged: ")
    assert text.what.startswith("`text.png` is not a picture")
    recipe = load_recipe(write_recipe_of(tmp_path, base), ["data.on_bad_row=skip"])
    rows = check_data(build_task(recipe), ["train"])["train"]
    assert (len(rows), len(rows.skipped)) == (6, 2)
    # as rows of a table
    lines = ["train/dark/0.png,dark", "train/dark/cut.png,dark", "train/light/0.png,light"]
    (root / "rows.csv").write_text("\n".join(["image,label", *lines]))
    recipe = load_recipe(
        write_recipe_of(tmp_path, base, data={"path": "pictures/rows.csv"}),
        ["data.validation=null", "data.test=null"],
    )
    with pytest.raises(LoraError, match=r"`cut.png` is cut off[\s\S]*rows\.csv:3"):
        check_data(build_task(recipe), ["train"])


# ----------------------------------------------------------------------------- the model's pixels


@pytest.mark.parametrize("kind", ["vit", "efficientnet", "convnext"])
def test_pixels_are_those_of_transformers_with_pillow(kind: str, tmp_path: Path) -> None:
    names = {
        "vit": {}, "efficientnet": {
            "image_processor_type": "EfficientNetImageProcessor", "size": {"shortest_edge": 40},
            "do_center_crop": True, "crop_size": {"height": SIZE, "width": SIZE},
            "include_top": False, "resample": 3,
        },
        "convnext": {
            "image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": SIZE},
            "crop_pct": 0.875,
        },
    }  # fmt: skip
    tiny_pictures.save(kind, tmp_path / "base", **names[kind])
    task, data = opened(tmp_path, kind)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "base", backend="pil")
    split = data["train"]
    for i in range(4):
        found = task.prepare(split.examples[i], RNG, training=False)["pixels"]
        image = Image.open(split.rows[i]["image"]["path"]).convert("RGB")
        assert torch.equal(found, processor(image, return_tensors="pt")["pixel_values"][0])


def test_a_grey_model_reads_grey(tmp_path: Path) -> None:
    model = tiny_pictures.model("vit")
    config = copy.deepcopy(model.config)
    config.num_channels = 1
    type(model)(config).save_pretrained(tmp_path / "base")
    processor = {**tiny_pictures.PROCESSOR, "image_mean": [0.5], "image_std": [0.5]}
    (tmp_path / "base" / "preprocessor_config.json").write_text(json.dumps(processor))
    task, data = opened(tmp_path)
    assert task.prepare(data["train"].examples[0], RNG, training=False)["pixels"].shape == (
        1,
        SIZE,
        SIZE,
    )


ODD_PROCESSORS: dict[str, tuple[Json, str]] = {
    "tensors of any shape": (
        {"image_processor_type": "EfficientNetImageProcessor", "size": {"shortest_edge": SIZE}},
        "makes tensors of 32 x 49 and 49 x 32|makes tensors of 32 x 50 and 50 x 32",
    ),
    "another size than the model's": (
        {"size": {"height": 48, "width": 48}}, "cannot read the pictures of 48 x 48 pixels"
    ),
    "means of another number": ({"image_mean": [0.5, 0.5]}, "the image processor of .* fails"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD_PROCESSORS)
def test_a_processor_that_makes(name: str, tmp_path: Path) -> None:
    options, wanted = ODD_PROCESSORS[name]
    base = tiny_pictures.save("vit", tmp_path / "base", **options)
    task = build_task(load_recipe(write_recipe_of(tmp_path, base)))

    def use() -> None:
        task.load_processor()
        task.empty_model()

    with pytest.raises(LoraError, match=wanted):
        use()


def test_a_model_without_a_processor(tmp_path: Path) -> None:
    tiny_pictures.model("vit").save_pretrained(tmp_path / "base")
    with pytest.raises(LoraError, match="cannot load the image processor"):
        opened(tmp_path)


# ------------------------------------------------------------------------------- augmentation

RNG = np.random.default_rng(0)
AUGMENTED = {"type": "image_classification", "augmentation": {"crop": True, "flip": True}}


def pixels_by_row(task: Task, split: Encoded, done: int = 0) -> dict[Any, Tensor]:
    """Return the pixels of each row in each step, as training gets them."""
    found = {}
    for planned in Batches(task, split, Accelerator()).steps(done):
        for batch in planned.batches:
            for row, pixels in zip(batch.rows, batch.inputs["pixel_values"], strict=True):
                found[planned.number, row] = pixels
    return found


def test_augmentation_depends_on_seed_step_and_row_alone(tmp_path: Path) -> None:
    task, data = opened(tmp_path, task=AUGMENTED, train={"max_steps": 5})
    split, recipe = data["train"], task.recipe
    before = pixels_by_row(task, split)
    rows = {row for _, row in before}
    several = [row for row in rows if sum(other == row for _, other in before) > 1]
    assert several
    for row in several:  # another picture in every step
        a, b = [pixels for (_, other), pixels in before.items() if other == row][:2]
        assert not torch.equal(a, b)
    for workers, micro_batch, done in ((2, 4, 0), (0, 1, 0), (1, 3, 0), (0, 4, 2)):
        values = {"workers": workers, "micro_batch_size": micro_batch, "examples_per_step": 4}
        task.recipe = recipe.with_values({f"train.{key}": value for key, value in values.items()})
        again = pixels_by_row(task, split, done=done)
        assert again.keys() == {key for key in before if key[0] > done}
        assert all(torch.equal(again[key], before[key]) for key in again)
    task.recipe = recipe.with_values({"train.seed": 1})
    other = pixels_by_row(task, split)
    assert not any(torch.equal(other[key], before[key]) for key in other.keys() & before.keys())


def test_evaluation_reads_pictures_as_they_are(tmp_path: Path) -> None:
    plain, data = opened(tmp_path)
    augmented, _ = opened(tmp_path, task=AUGMENTED)
    example = data["train"].examples[0]
    assert torch.equal(
        augmented.prepare(example, RNG, training=False)["pixels"],
        plain.prepare(example, RNG, training=False)["pixels"],
    )


def test_random_parts_are_of_the_promised_size() -> None:
    rng = np.random.default_rng(0)
    shares, ratios = [], []
    for _ in range(2000):
        left, upper, right, lower = random_box(80, 60, 0.25, rng)
        assert 0 <= left < right <= 80
        assert 0 <= upper < lower <= 60
        shares.append((right - left) * (lower - upper) / 4800)
        ratios.append((right - left) / (lower - upper))
    assert 0.25 - 1e-9 <= min(shares) < 0.3
    assert 0.9 < max(shares) <= 1
    assert min(ratios) >= 3 / 4 - 1e-9
    assert max(ratios) <= 4 / 3 + 1e-9
    assert random_box(1000, 10, 0.9, rng) == (
        pytest.approx(500 - 20 / 3),
        0,
        pytest.approx(500 + 20 / 3),
        10,
    )


def test_a_flip_mirrors_half_of_the_pictures(tmp_path: Path) -> None:
    task, data = opened(tmp_path, task={"augmentation": {"flip": True}})
    example = data["train"].examples[0]
    plain = task.prepare(example, RNG, training=False)["pixels"]
    image = Image.open(example["image"]["path"]).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    mirrored = task.prepare({**example, "image": media(encoded(image))}, RNG, training=False)[
        "pixels"
    ]
    found = [
        task.prepare(example, np.random.default_rng(i), training=True)["pixels"] for i in range(40)
    ]
    flipped = [torch.equal(pixels, mirrored) for pixels in found]
    assert all(f or torch.equal(p, plain) for f, p in zip(flipped, found, strict=True))
    assert 10 < sum(flipped) < 30


# --------------------------------------------------------------------- architectures and adapters


def targets(kind: str, folder: Path) -> tuple[Task, torch.nn.Module, list[str]]:
    task, _ = opened(folder, kind)
    model, head = task.load_model(CPU)
    attach(model, task.recipe, head)
    return task, model, [name.rpartition(".")[2] for name in lora_layers(model)]


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_what_is_adapted_by_default(kind: str, tmp_path: Path) -> None:
    _, model, names = targets(kind, tmp_path)
    layers = lora_layers(model).values()
    assert names
    if kind in ("vit", "swin", "convnext"):
        assert all(isinstance(layer.base, torch.nn.Linear) for layer in layers)
        assert {"vit": 12, "swin": 13, "convnext": 4}[kind] == len(names)
    elif kind == "resnet":
        convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
        assert len(convolutions) == len(names)
    else:
        assert set(names) == {"expand_conv", "project_conv", "top_conv"}
        assert all(layer.base.kernel_size == (1, 1) for layer in layers)
        assert all(layer.base.groups == 1 for layer in layers)


def test_a_rank_that_groups_do_not_divide_is_an_error(tmp_path: Path) -> None:
    base = tiny_pictures.save("efficientnet", tmp_path / "base")
    adapter = {"target_modules": ["depthwise_conv"], "rank": 3}
    task = build_task(load_recipe(write_recipe_of(tmp_path, base, adapter=adapter)))
    model, head = task.empty_model()
    with pytest.raises(LoraError, match="rank 3 cannot be divided among the"):
        attach(model, task.recipe, head)


def proves(*what: str, against: str) -> pytest.MarkDecorator:
    return pytest.mark.proves(
        *what, task="image_classification", rows="pictures", model="{kind}", against=against
    )


@pytest.mark.slow_after(2)
@proves("loss", against="transformers")
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_loss_is_that_of_transformers(kind: str, tmp_path: Path) -> None:
    task, data = opened(tmp_path, kind)
    model, _ = task.load_model(CPU)
    examples = [data["train"].examples[i] for i in range(4)]
    batch = task.collate([task.prepare(example, RNG, training=False) for example in examples])
    loss = task.loss(model.eval(), batch) / batch.n_items
    theirs = model(**batch.inputs, labels=batch.targets["labels"]).loss
    assert_close(loss, theirs)


@proves("save", "merge", against="PEFT")
@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.slow_after(1)
def test_a_run_leaves_an_adapter_that_peft_reads_and_merge_proves(
    kind: str, tmp_path: Path
) -> None:
    base = tiny_pictures.save(kind, tmp_path / "base")
    report = run(write_recipe_of(tmp_path, base, task=AUGMENTED))
    out = tmp_path / "out"
    recipe = load_adapter_recipe(out)
    assert recipe.task.labels == ["dark", "light"]
    again = evaluate_adapter(out, load_adapter_recipe(out))
    assert again["test"] == pytest.approx(report["metrics"]["after"]["test"], rel=1e-5)

    task, ours, _ = open_adapter(out, load_adapter_recipe(out))
    inputs = task.probe()
    theirs = AutoModelForImageClassification.from_pretrained(
        base, num_labels=2, id2label={0: "dark", 1: "light"}
    )
    plain = theirs(**inputs).logits
    with torch.no_grad():
        found, wanted = (
            ours(**inputs).logits,
            PeftModel.from_pretrained(theirs, out)(**inputs).logits,
        )
    assert_close(found, wanted)
    assert_different(found, plain)

    result = merge_adapter(None, out, tmp_path / "merged")
    assert result.merged_modules == len(lora_layers(ours))
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    assert_close(merged(**inputs).logits, found)
    processors = [
        AutoImageProcessor.from_pretrained(folder, backend="pil").to_dict()
        for folder in (base, tmp_path / "merged")
    ]
    assert processors[0] == processors[1]


@pytest.mark.parametrize("adapter", ["lora", "bitfit", "full", "none"])
def test_statistics_of_batch_normalisation_stay_bit_for_bit(adapter: str, tmp_path: Path) -> None:
    base = tiny_pictures.save("resnet", tmp_path / "base")
    recipe = load_recipe(write_recipe_of(tmp_path, base, adapter={"type": adapter}))
    task = build_task(recipe)
    task.load_processor()
    load_data(task)
    model, head = task.load_model(CPU)
    attach(model, recipe, head)
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert any("running_mean" in name for name in kept)
    training_mode(model)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        model(
            pixel_values=torch.randn(4, 3, SIZE, SIZE, generator=generator)
        ).logits.sum().backward()
    assert all(torch.equal(kept[name], buffer) for name, buffer in model.named_buffers())


def test_a_normalisation_trained_in_full_is_read_by_peft_merged_and_resumed(
    tmp_path: Path,
) -> None:
    base = tiny_pictures.save("resnet", tmp_path / "base")
    adapter = {"target_modules": ["convolution"], "train_modules": ["normalization"]}
    path = write_recipe_of(tmp_path, base, adapter=adapter, checkpoint={"every_steps": 1})
    run(path)
    train(load_recipe(path, ["train.max_steps=4", "checkpoint.allow_changes=true"]), resume=True)
    out, pixels = tmp_path / "out", torch.randn(2, 3, SIZE, SIZE)
    _, ours, _ = open_adapter(out, load_adapter_recipe(out))
    merge_adapter(None, out, tmp_path / "merged")
    plain = AutoModelForImageClassification.from_pretrained(base, num_labels=2)
    with torch.no_grad():
        found = ours(pixel_values=pixels).logits
        for model in (
            PeftModel.from_pretrained(plain, out).eval(),
            AutoModelForImageClassification.from_pretrained(tmp_path / "merged").eval(),
        ):
            assert_close(model(pixel_values=pixels).logits, found)


@pytest.mark.proves("write", "read", "resume", variant="full", layer="Conv2d")
@pytest.mark.slow
def test_trained_in_full_a_model_with_running_statistics_is_the_same_reloaded_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_pictures.save("resnet", tmp_path / "base")
    sections: Json = {
        "adapter": {"type": "full", "rank": 8, "alpha": 8},
        "train": {"max_steps": 4, "precision": "fp32"},
        "checkpoint": {"every_steps": 2},
    }
    path = write_recipe_of(tmp_path, base, **sections)
    whole = run(path)
    cut = load_recipe(path, [f"output_dir={tmp_path / 'cut'}"])

    def pulled(*arguments: Any) -> Any:
        if len(seen) == 3:
            raise RuntimeError("the plug")
        seen.append(1)
        return train_step(*arguments)

    seen: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr("lora_cli.training.run.train_step", pulled)
        with pytest.raises(RuntimeError, match="the plug"):
            train(cut)
    assert train(cut, resume=True)["metrics"] == whole["metrics"]
    pixels = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    recipe = load_adapter_recipe(tmp_path / "out")
    _, ours, _ = open_adapter(tmp_path / "out", recipe)
    theirs, resumed, before = (
        AutoModelForImageClassification.from_pretrained(folder).eval()
        for folder in (tmp_path / "out", tmp_path / "cut", base)
    )
    with torch.no_grad():
        logits = theirs(pixels).logits
        assert torch.equal(resumed(pixels).logits, logits)
        assert_close(ours(pixels.to(next(ours.parameters()).device)).logits.cpu(), logits)
        assert_different(before(pixels).logits, logits)
    again = evaluate_adapter(tmp_path / "out", recipe, "test")["test"]
    wanted = whole["metrics"]["after"]["test"]
    assert again == pytest.approx(wanted, rel=1e-5)


def test_rows_of_a_pretrained_head_go_by_the_names_of_labels(tmp_path: Path) -> None:
    base = tiny_pictures.save("vit", tmp_path / "base", ["light", "other", "dark"])
    task, _ = opened(tmp_path)
    model, _ = task.load_model(CPU)
    own = AutoModelForImageClassification.from_pretrained(base)
    assert torch.equal(model.classifier.weight, own.classifier.weight[[2, 0]])
    assert torch.equal(model.classifier.bias, own.classifier.bias[[2, 0]])


@pytest.mark.parametrize("problem", ["multi_label", "regression"])
def test_several_labels_and_numbers(problem: str, tmp_path: Path) -> None:
    root = tiny_pictures.draw_folders(tmp_path / "pictures", {"train": 4})
    files = sorted(root.rglob("*.png"))
    values = (["a", "b", "a,b", ""] if problem == "multi_label" else [1.5, -2.0, 0.25, 7.0]) * 2
    rows = [
        {"image": str(file), "label": value.split(",") if isinstance(value, str) else value}
        for file, value in zip(files, values, strict=True)
    ]
    for row in rows:
        if isinstance(row["label"], list):
            row["label"] = [label for label in row["label"] if label]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task, data = opened(
        tmp_path, task={"problem": problem},
        data={"path": "pictures/rows.jsonl", "validation": None, "test": None},
    )  # fmt: skip
    model, _ = task.load_model(CPU)
    examples = [task.prepare(data["train"].examples[i], RNG, training=False) for i in range(8)]
    batch = task.collate(examples)
    loss = task.loss(model.eval(), batch) / batch.n_items
    labels = batch.targets["labels"]
    labels = labels[:, None] if problem == "regression" else labels
    assert_close(loss, model(**batch.inputs, labels=labels.float()).loss)


def test_another_processor_than_that_of_the_training_is_an_error(tmp_path: Path) -> None:
    base = tiny_pictures.save("vit", tmp_path / "base")
    run(write_recipe_of(tmp_path, base, train={"max_steps": 1}))
    tiny_pictures.save("vit", base, image_mean=[0.1, 0.1, 0.1])
    with pytest.raises(IntegrityError, match="the processor of its inputs is another"):
        open_adapter(tmp_path / "out", load_adapter_recipe(tmp_path / "out"))


# -------------------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ViT that was trained on pictures, some of them wrongly labelled."""
    folder = tmp_path_factory.mktemp("trained")
    base = tiny_pictures.save("vit", folder / "base")
    recipe = write_recipe_of(folder, base, train={"max_steps": 2})
    for kind, name in (("light", "dark"), ("dark", "light")):
        picture(99, kind).save(folder / "pictures" / "test" / name / "wrong.png")
    run(recipe)
    return folder


def test_predict_files_folders_and_tables(trained: Path, tmp_path: Path) -> None:
    task, model, accelerator = open_adapter(trained / "out", load_adapter_recipe(trained / "out"))
    folder = trained / "pictures" / "test"
    files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.png"))
    rows = [task.parse_input(str(folder / file)) for file in files]
    wanted = answer(model, task, rows, accelerator)
    assert list(task.answer_columns()) == ["prediction", "p_dark", "p_light"]

    def answered(source: Path, name: str) -> list[Json]:
        target = tmp_path / name
        answer_file(model, task, source, target, accelerator)
        if name.endswith("csv"):
            return list(csv.DictReader(io.StringIO(target.read_text())))
        return datasets.Dataset.from_parquet(str(target)).to_list()

    for name in ("folder.csv", "folder.parquet"):
        found = answered(folder, name)
        assert [row["image"] for row in found] == files
        assert [row["prediction"] for row in found] == [values[0] for values in wanted]
    (folder / "rows.csv").write_text("id,file_name\n" + "".join(f"7,{file}\n" for file in files))
    found = answered(folder / "rows.csv", "table.csv")
    assert list(found[0]) == ["id", "file_name", "prediction", "p_dark", "p_light"]
    assert [(row["file_name"], float(row["p_dark"])) for row in found] == [
        (file, values[1]) for file, values in zip(files, wanted, strict=True)
    ]
    (folder / "rows.csv").unlink()


def test_a_picture_that_cannot_be_predicted_is_named(trained: Path, tmp_path: Path) -> None:
    task, model, accelerator = open_adapter(trained / "out", load_adapter_recipe(trained / "out"))
    picture(3).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "rows.csv").write_text("id,image\n1,good.png\n2,bad.png\n3,gone.png\n")
    target = tmp_path / "answers.csv"
    written, problems = answer_file(model, task, tmp_path / "rows.csv", target, accelerator)
    assert written == 3
    assert [problem.at for problem in problems] == ["rows.csv:3", "rows.csv:4"]
    assert "is not a picture" in problems[0].what
    assert "there is no file" in problems[1].what
    answered = csv.DictReader(io.StringIO(target.read_text()))
    assert [row["prediction"] != "" for row in answered] == [True, False, False]
    assert "there is no file" in task.answer_error(task.parse_input("gone.png"))


def test_eval_measures_a_folder(trained: Path) -> None:
    recipe = with_test_file(load_adapter_recipe(trained / "out"), trained / "pictures" / "test")
    found = evaluate_adapter(trained / "out", recipe, "test")
    report = json.loads((trained / "out" / "report.json").read_text())
    assert found["test"] == pytest.approx(report["metrics"]["after"]["test"], rel=1e-6)


def test_the_report_shows_the_worst_pictures_in_one_file(trained: Path) -> None:
    page = (trained / "out" / "report.html").read_text()
    wrong = [
        line
        for text in (trained / "out/predictions/test.jsonl").read_text().splitlines()
        if (line := json.loads(text))["reference"] != line["prediction"]
    ]
    assert wrong
    shown = re.findall(r'<img class="thumb" alt="" src="(data:image/jpeg;base64,[^"]+)">', page)
    assert len(shown) == len(wrong)
    assert "http" not in re.sub(r"http-equiv|https?://(www\.)?w3\.org\S*", "", page)
    assert "tokens (median" not in page


def test_the_log_and_the_report_count_pictures(trained: Path) -> None:
    report = json.loads((trained / "out" / "report.json").read_text())
    logged = json.loads((trained / "out" / "metrics.jsonl").read_text().splitlines()[-2])
    for found in (report["training"], logged):
        assert found["pictures_per_s"] == pytest.approx(found["examples_per_s"], abs=0.06)
        assert not any("token" in key for key in found)
    # all pictures are read in one size, so that a row has no length
    assert not report["data"]["train"].keys() & {"max_tokens", "max_pictures", "tokens", "pictures"}
    assert "pictures a second" in (trained / "out" / "report.html").read_text()


def test_the_card_runs(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = (trained / "out" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    out = tmp_path / "out"
    out.symlink_to(trained / "out")
    monkeypatch.chdir(out)
    file = sorted((trained / "pictures/test").rglob("*.png"))[0]
    (trained / "out" / "picture.jpg").write_bytes(file.read_bytes())
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "card", "exec"), {})
    task, model, accelerator = open_adapter(trained / "out", load_adapter_recipe(trained / "out"))
    ((said, *_),) = answer(model, task, [task.parse_input(str(file))], accelerator)
    assert printed.getvalue().strip() == said
    assert 'lora predict --adapter . "picture.jpg"' in card


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("source", ["folder", "table"])
def test_init_drafts_a_recipe_that_trains(source: str, tmp_path: Path) -> None:
    base = tiny_pictures.save("resnet", tmp_path / "base")
    root = tiny_pictures.draw_folders(tmp_path / "pictures", {"train": 10, "test": 2})
    data = root
    if source == "table":
        data = root / "train" / "list.csv"
        lines = [f"{kind}/{i}.png,{kind}\n" for kind in CLASSES for i in range(10)]
        data.write_text("".join(["photo,species\n", *lines]))
    target = tmp_path / "recipe.yaml"
    draft = draft_recipe(data, str(base), target)
    write_recipe(target, draft.text(), draft.extra_files)
    task = load_recipe(target).task
    assert task.type == "image_classification"
    assert task.labels == ["dark", "light"]
    assert task.image_column == ("photo" if source == "table" else "image")
    report = train_quietly(target, tmp_path / "out")
    assert report["data"]["train"]["rows"] == 16


def train_quietly(recipe: Path, out: Path) -> Json:
    with contextlib.redirect_stderr(io.StringIO()):
        return train(
            load_recipe(recipe, ["train.epochs=null", "train.max_steps=1", f"output_dir={out}"])
        )


def test_init_rejects_what_cannot_be_learned(tmp_path: Path) -> None:
    import tiny

    text_model = tiny.save_encoder(tmp_path / "text")
    seeing = tiny_pictures.save("vit", tmp_path / "base")
    root = tiny_pictures.draw_folders(tmp_path / "pictures", {"train": 2})
    target = tmp_path / "recipe.yaml"
    with pytest.raises(LoraError, match=r"reads texts, and .* holds pictures"):
        draft_recipe(root, str(text_model), target)
    flat = tmp_path / "flat"
    flat.mkdir()
    picture(1).save(flat / "1.png")
    with pytest.raises(LoraError, match="no folder in it names a class"):
        draft_recipe(flat, str(seeing), target)
    (tmp_path / "texts.csv").write_text("text,label\na,x\nb,y\n")
    with pytest.raises(LoraError, match="no column holds pictures"):
        draft_recipe(tmp_path / "texts.csv", str(seeing), target)


def test_animations_and_transparent_parts_are_warned_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lora_cli.preprocessing.data_gate import pass_gate

    base = tiny_pictures.save("vit", tmp_path / "base")
    root = tiny_pictures.draw_folders(
        tmp_path / "pictures", {"train": 2, "validation": 1, "test": 1}
    )
    (root / "train/dark/moving.gif").write_bytes(READ["an animation"][0])
    (root / "train/dark/glass.png").write_bytes(READ["transparent parts"][0])
    task = build_task(load_recipe(write_recipe_of(tmp_path, base)))
    task.load_processor()
    pass_gate(task, load_data(task))
    printed = capsys.readouterr().err
    assert "1 train row has several pictures in one file, of which the first is read" in printed
    assert "1 train row has transparent parts, which are read as white" in printed


def test_a_picture_that_breaks_in_the_middle_of_a_run_is_named(tmp_path: Path) -> None:
    task, data = opened(tmp_path)
    example = data["train"].examples[0]
    Path(example["image"]["path"]).write_bytes(b"no picture any more")
    with pytest.raises(LoraError, match=r"is not a picture[\s\S]*was whole when the run began"):
        task.prepare(example, RNG, training=False)


def test_pillow_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(LoraError, match=r"pillow[\s\S]*lora-cli\[vision\]"):
        pictures.require_pillow()


# ------------------------------------------------------------------------ one value at a time


class Scripted:
    """A generator whose numbers are known: each a given share of the way from low to high."""

    def __init__(self, shares: list[float], coin: float = 0.9) -> None:
        self.shares, self.coin, self.count = shares, coin, 0

    def uniform(self, low: float, high: float) -> float:
        self.count += 1
        return low + self.shares[(self.count - 1) % len(self.shares)] * (high - low)

    def random(self) -> float:
        return self.coin


def test_where_a_random_part_lies() -> None:
    rng: Any = Scripted([0.5, 0.75, 0.25, 1.0])
    left, upper, right, lower = random_box(80, 60, 0.2, rng)
    area, ratio = 0.6 * 4800, (4 / 3) ** 0.5  # three quarters of the way from 3:4 to 4:3, in logs
    w, h = (area * ratio) ** 0.5, (area / ratio) ** 0.5
    assert (left, right) == pytest.approx(((80 - w) / 4, (80 - w) / 4 + w))
    assert (upper, lower) == pytest.approx((60 - h, 60))
    # the least area at the widest ratio, and the greatest at the ratio of the picture
    box = random_box(100, 100, 0.25, Scripted([0.0, 1.0, 0.0, 0.0]))  # type: ignore[arg-type]
    assert box == pytest.approx((0, 0, 50 * (4 / 3) ** 0.5, 50 * (3 / 4) ** 0.5))
    rng = Scripted([1.0, 0.5, 0.0, 0.0])
    assert random_box(64, 64, 0.25, rng) == (0, 0, 64, 64)
    assert rng.count == 4  # the whole of a picture is a part that fits


@pytest.mark.parametrize(
    ("size", "box"),
    [((900, 30), (430, 0, 470, 30)), ((30, 900), (0, 430, 30, 470)), ((30, 33), (0, 0, 30, 33))],
)
def test_of_a_picture_that_no_random_part_fits_the_middle_is_read(
    size: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    wide_or_high = 1.0 if size[0] < size[1] else 0.0  # the ratio that fits worst
    rng: Any = Scripted([1.0, wide_or_high])
    assert random_box(*size, 0.9, rng) == pytest.approx(box)
    assert rng.count == 20  # ten trials, as in torchvision


@pytest.mark.parametrize("resample", [3, None])
def test_a_random_part_is_resized_once_and_not_cut_again(
    resample: int | None, tmp_path: Path
) -> None:
    """The processor makes 40 pixels of the shorter side, and then takes the 32 in the middle."""
    options = {
        "image_processor_type": "EfficientNetImageProcessor", "size": {"shortest_edge": 40},
        "do_center_crop": True, "crop_size": {"height": SIZE, "width": SIZE},
        "include_top": False, "resample": 3,
    }  # fmt: skip
    base = tiny_pictures.save("efficientnet", tmp_path / "base", **options)
    task: Any = build_task(load_recipe(write_recipe_of(tmp_path, base, task=AUGMENTED)))
    task.load_processor()
    assert task.size == (SIZE, SIZE)
    task.processor.resample = resample
    image = picture(5, width=70, height=50)
    value, shares = media(encoded(image)), [0.5, 0.5, 0.5, 0.5]
    box = random_box(70, 50, task.spec.augmentation.smallest_crop, Scripted(shares))  # type: ignore[arg-type]
    by_hand = image.resize(
        (SIZE, SIZE), Image.Resampling.BICUBIC if resample else Image.Resampling.BILINEAR, box=box
    )
    pixels = (np.asarray(by_hand).transpose(2, 0, 1) / 255 - [[[0.5]], [[0.4]], [[0.3]]]) / [
        [[0.5]], [[0.6]], [[0.7]]
    ]  # fmt: skip
    found = task._pixels(value, Scripted(shares))
    np.testing.assert_allclose(found, pixels, atol=1e-5)
    assert torch.equal(task._pixels(value, Scripted(shares, 0.5)), found)
    assert torch.equal(task._pixels(value, Scripted(shares, 0.49)), found.flip(-1))


def test_pixels_are_of_the_dtype_of_the_frozen_base(tmp_path: Path) -> None:
    first, second, third = (torch.nn.Linear(2, 2, dtype=d) for d in
                            (torch.float32, torch.float16, torch.float64))  # fmt: skip
    second.requires_grad_(False)
    third.requires_grad_(False)
    model = torch.nn.Sequential(first, second, third)
    assert dtype_of_base(model) == torch.float16
    assert dtype_of_base(torch.nn.Sequential(first)) == torch.float32
    trained = torch.nn.Sequential(torch.nn.Linear(1, 1, dtype=torch.float64), first)
    assert dtype_of_base(trained) == torch.float64


def test_pixels_are_cast_to_the_model_s_dtype_but_within_autocast(tmp_path: Path) -> None:
    task, _ = opened(tmp_path)
    model = tiny_pictures.model("vit").double()
    pixels = task.probe()["pixel_values"]
    assert pixels.shape[1:] == (3, SIZE, SIZE)
    assert torch.equal(task.logits(model, pixels), model(pixel_values=pixels.double()).logits)  # type: ignore[attr-defined]
    seen: list[torch.dtype] = []
    model.forward = lambda pixel_values: seen.append(pixel_values.dtype) or model  # type: ignore[assignment]
    model.logits = pixels
    with torch.autocast("cpu", torch.bfloat16):
        task.logits(model, pixels)  # type: ignore[attr-defined]
    assert seen == [torch.float32]


@pytest.mark.parametrize("channels", [None, 3, 1, 2, 4])
def test_how_many_channels_a_model_reads(
    channels: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_pictures.save("vit", tmp_path / "base")
    task: Any = build_task(load_recipe(write_recipe_of(tmp_path, base)))
    config = SimpleNamespace() if channels is None else SimpleNamespace(num_channels=channels)
    monkeypatch.setattr(image_classification, "load_config", lambda recipe: config)
    monkeypatch.setattr(image_classification, "require_kind", lambda *_: None)
    monkeypatch.setattr(image_classification, "output_size", lambda *_: (SIZE, SIZE))
    if channels in (2, 4):
        with pytest.raises(LoraError, match=f"reads pictures of {channels} channels"):
            task.load_processor()
    else:
        task.load_processor()
        assert task.channels == (channels or 3)


@pytest.mark.parametrize(
    ("given", "names", "shown"),
    [
        (None, ["1", "10", "2"], "of text: 1, 10, 2; for"),
        (None, ["1", "10", "2", "3", "4"], "of text: 1, 10, 2, 3, 4; for"),
        (None, ["1", "10", "2", "3", "4", "5"], "of text: 1, 10, 2, 3, 4, …; for"),
        (None, ["1", "2", "10"], ""),
        (None, ["1", "10", "2", "x"], ""),
        (["1", "10", "2"], ["1", "10", "2"], ""),
    ],
)
def test_numbered_labels_in_text_order_are_warned_about(
    given: list[str] | None, names: list[str], shown: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    base = tiny_pictures.save("vit", tmp_path / "base")
    task: Any = build_task(load_recipe(write_recipe_of(tmp_path, base, task={"labels": given})))
    monkeypatch.setattr(task.reader, "learn", lambda _: setattr(task.reader, "names", names))
    task.learn_from({})
    printed = " ".join(capsys.readouterr().err.split())
    assert (shown in printed and "the labels are numbers" in printed) if shown else not printed


def test_what_is_said_of_animations_names_the_first_row(tmp_path: Path) -> None:
    base = tiny_pictures.save("vit", tmp_path / "base")
    task = build_task(load_recipe(write_recipe_of(tmp_path, base)))
    rows: Any = SimpleNamespace(place=lambda i: f"rows.csv:{i}")
    look = {"is_animated": False, "is_transparent": False}
    examples = [{**look, "row": i} for i in range(5, 9)]
    assert task.unknown_input("train", rows, examples) == (0.0, None)
    examples[1]["is_animated"] = examples[3]["is_animated"] = True
    share, said = task.unknown_input("train", rows, examples)
    assert share == 0
    assert said == (
        "2 train rows have several pictures in one file, of which the first is read: rows.csv:6"
    )
    assert all(task.cost(example) == 1 for example in examples)
