"""Two processes give what one gives: the same examples, losses, adapter and metrics."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_ctc
import tiny_detectors
import tiny_diffusion
import tiny_embedders
import tiny_pictures
import tiny_speech
from closeness import assert_close
from killing import Kill, Nursery
from safetensors.torch import load_file

from lora_cli.recipe import load_recipe
from lora_cli.training import train
from lora_cli.training.checkpoints import checkpoints

ROOT = Path(__file__).parents[2]
Json = dict[str, Any]


def lines(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in lines(out / "metrics.jsonl") if "loss" in record]


def recipe(folder: Path, base: Path, **sections: Any) -> Path:
    """Write a recipe of five rows to train, four a step: every other step has a single example."""
    pairs = bool({"completion_column", "positive_column"} & sections.get("task", {}).keys())
    second = "more" if pairs else "label"
    for name, count in (("train", 5), ("validation", 7), ("test", 3)):
        rows = [
            # a label next to a completion would say whether it is a good one
            {"text": f"{text}{' and so on' * (i % 3)}", second: (i % 2, text[: 2 + 3 * i])[pairs]}
            for i, text in enumerate(tiny.CORPUS[:count])
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    data: dict[str, Any] = {name: f"{name}.jsonl" for name in ("train", "validation", "test")}
    data["check"] = {"max_overlap": 1.0}  # all three begin with the same rows
    train = {"max_steps": 10, "micro_batch_size": 2, "gradient_accumulation_steps": 2}
    train |= {"log_every_steps": 1, **sections.pop("train", {})}
    sections = {"evaluate": {"micro_batch_size": 2}, "data": data, **sections}
    return tiny.recipe(base, folder, train=train, **sections)


Launch = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def launch() -> Iterator[Launch]:
    """Start `lora train` in two processes; what still runs at the end is ended."""
    started: list[subprocess.Popen[str]] = []

    def start(path: Path, out: Path, *arguments: str) -> subprocess.Popen[str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        command = [
            sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu",
            "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
            "--dynamo_backend", "no", "--main_process_port", port,
            "-m", "lora_cli", "train", str(path), "-o", str(out), *arguments,
        ]  # fmt: skip
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        started.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, text=True, start_new_session=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
        )  # fmt: skip
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its own session, started above
        process.communicate()


def finished(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Return what a run printed, once it has ended well."""
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    return stdout, stderr


def assert_same_result(one: Path, two: Path, tolerance: float) -> None:
    """Compare a run of one process with a run of two.

    Args:
        one: Output folder of one process.
        two: Output folder of two processes.
        tolerance: Largest difference within a tensor of the adapter, by its largest entry.
    """
    reports = [json.loads((out / "report.json").read_text()) for out in (one, two)]
    assert [report["training"]["processes"] for report in reports] == [1, 2]
    assert [report["training"]["steps"] for report in reports] == [10, 10]
    assert (one / "samples.jsonl").read_bytes() == (two / "samples.jsonl").read_bytes()
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    ours, theirs = (load_file(out / "adapter_model.safetensors") for out in (one, two))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert_close(theirs[name], tensor, tolerance)
    for when in ("before", "after"):
        for split, metrics in reports[0]["metrics"][when].items():
            assert reports[1]["metrics"][when][split] == pytest.approx(metrics, abs=1e-4)
    for file in (one / "predictions").glob("*.jsonl"):
        a, b = lines(file), lines(two / "predictions" / file.name)
        assert [without_numbers(row) for row in a] == [without_numbers(row) for row in b]
        assert [row["loss"] for row in b] == pytest.approx([row["loss"] for row in a], abs=1e-4)
    files = [{p.relative_to(out).as_posix() for p in out.rglob("*")} for out in (one, two)]
    assert files[0] == files[1] - {"learning_curve.png"}  # not drawn in this process: conftest.py
    states = [
        json.loads((checkpoints(out)[-1][1] / "trainer.json").read_text()) for out in (one, two)
    ]
    assert states[0]["tokens"] == states[1]["tokens"]


def without_numbers(row: Json) -> Json:
    return {key: value for key, value in row.items() if key not in ("loss", "scores")}


SGD = {"optimizer": {"type": "sgd", "learning_rate": 0.05}}


PAIRS = {"text_column": None, "prompt_column": "text", "completion_column": "more"}


def test_two_processes_are_as_one(nest: Nursery, tmp_path: Path) -> None:
    path = recipe(tmp_path, tiny.save_llama(tmp_path / "base"), train=SGD, task=PAIRS)
    assert nest.run(path, tmp_path / "one") == [0]
    assert nest.run(path, tmp_path / "two", 2) == [0, 0]
    assert_same_result(tmp_path / "one", tmp_path / "two", 2e-5)
    sizes = [len(r["examples"]) for r in lines(tmp_path / "two/samples.jsonl")]
    assert sizes == [4, 1] * 5  # the second process had nothing to do in every other step


@pytest.mark.slow
def test_the_texts_of_both_processes_are_compared(nest: Nursery, tmp_path: Path) -> None:
    """The loss of in-batch negatives is that of the whole step, also of a step of one example."""
    base = tiny_embedders.save(tmp_path / "base")
    task = {"type": "text_embedding", "anchor_column": "text", "positive_column": "more"}
    path = recipe(tmp_path, base, train=SGD, task=task)
    assert nest.run(path, tmp_path / "one") == [0]
    assert nest.run(path, tmp_path / "two", 2) == [0, 0]
    assert_same_result(tmp_path / "one", tmp_path / "two", 2e-5)


def with_boxes(folder: Path, i: int) -> Json:
    image, objects = tiny_detectors.scene(i)
    image.save(folder / f"{i}.png")
    return {"image": f"{i}.png", "objects": objects}


def with_caption(folder: Path, i: int) -> Json:
    tiny_pictures.picture(i, "dark", 18, 17).save(folder / f"{i}.png")
    return {"image": f"{i}.png", "text": tiny_diffusion.caption(i)}


def spoken(folder: Path, i: int) -> Json:
    tiny_speech.write(folder / f"{i}.wav", tiny_speech.sound(i, 0.5 + 0.05 * (i % 3)))
    return {"audio": f"{i}.wav", "text": "a warm film"}


DRAWING = {"type": "text_to_image", "resolution": tiny_diffusion.SIDE}
MEDIA: dict[str, tuple[Callable[[Path], Path], Json, Callable[[Path, int], Json]]] = {
    "boxes": (
        lambda folder: tiny_detectors.save("yolos", folder), {"type": "object_detection"},
        with_boxes,
    ),
    "letters": (tiny_ctc.save, {"type": "speech_recognition"}, spoken),
    "tokens": (tiny_speech.save, {"type": "speech_recognition"}, spoken),
    "drawings": (tiny_diffusion.save, {**DRAWING, "caption_dropout": 0.2}, with_caption),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", MEDIA)
def test_pictures_and_recordings_are_divided_among_processes(
    kind: str, nest: Nursery, tmp_path: Path
) -> None:
    save, task, row = MEDIA[kind]
    path = recipe(tmp_path, save(tmp_path / "base"), train=SGD, task=task)
    for start, name, count in ((0, "train", 5), (5, "validation", 5), (10, "test", 3)):
        rows = (json.dumps(row(tmp_path, start + i)) + "\n" for i in range(count))
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    assert nest.run(path, tmp_path / "one") == [0]
    assert nest.run(path, tmp_path / "two", 2) == [0, 0]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    if kind != "drawings":  # whose parts have a folder each
        assert_same_result(tmp_path / "one", tmp_path / "two", 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoder", "llama"])
def test_both_processes_learn_from_the_teacher(kind: str, nest: Nursery, tmp_path: Path) -> None:
    if kind == "encoder":
        base, task = tiny.save_encoder(tmp_path / "base"), {"labels": ["0", "1"]}
        tiny.save_encoder(tmp_path / "teacher", ["0", "1"], seed=5)
    else:
        base, task = tiny.save_llama(tmp_path / "base"), PAIRS
        tiny.save_llama(tmp_path / "teacher", tied=False, seed=5)
    taught = {**SGD, "distill": {"teacher": "./teacher", "weight": 0.7}}
    path = recipe(tmp_path, base, train=taught, task=task)
    assert nest.run(path, tmp_path / "one") == [0]
    assert nest.run(path, tmp_path / "two", 2) == [0, 0]
    assert_same_result(tmp_path / "one", tmp_path / "two", 2e-5)
    # and where each process asks the teacher in every step
    online = ["data.cache_limit=0B"]
    assert nest.run(path, tmp_path / "three", 2, sets=online) == [0, 0]
    assert losses(tmp_path / "three") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.slow
def test_a_launcher_goes_on_where_two_processes_were_killed(
    nest: Nursery, tmp_path: Path, launch: Launch
) -> None:
    """Under `accelerate launch`: it leaves what one process leaves that was never killed."""
    often = {"every_steps": 2}
    base = tiny.save_llama(tmp_path / "base")
    path = recipe(tmp_path, base, train=SGD, task=PAIRS, checkpoint=often)
    kill = Kill(0.0, "save", 3)
    assert nest.run(path, tmp_path / "two", 2, kill) == [-signal.SIGKILL] * 2
    assert [step for step, _ in checkpoints(tmp_path / "two")] == [2, 4]
    assert not (tmp_path / "two" / "report.json").exists()
    process = launch(path, tmp_path / "two", "--resume")
    train(load_recipe(path, [f"output_dir={tmp_path / 'one'}"]))
    stdout, stderr = finished(process)
    assert stdout.count("report ") == 1
    assert stderr.count("trained 10 steps") == 1
    assert_same_result(tmp_path / "one", tmp_path / "two", 2e-5)
