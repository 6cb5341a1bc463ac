"""Tests of the micro-batches of a run: their order, their processes, and their preparation."""

from __future__ import annotations

import itertools
import json
import math
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import tiny
import torch

from lora_cli.preprocessing.batch_plan import BatchPlan
from lora_cli.preprocessing.encode import load_data
from lora_cli.recipe import load_recipe
from lora_cli.tasks import build_task
from lora_cli.training import batches as module
from lora_cli.training.batches import Batches, PlannedStep

COUNT = 11
TEXTS = ["a warm film " * (1 + i * 7 % 5) for i in range(COUNT)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_llama(tmp_path_factory.mktemp("base") / "base")


def rows_of(folder: Path, name: str = "rows") -> Path:
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps({"text": f"{text}{name}"}) + "\n" for text in TEXTS))
    return file


def of(
    folder: Path, base: Path, *sets: str, rank: int = 0, processes: int = 1, **sections: Any
) -> Batches:
    rows_of(folder)
    sections["data"] = {"path": "rows.jsonl", **sections.get("data", {})}
    sections["train"] = {
        "max_steps": None, "epochs": 2, "micro_batch_size": 2, "gradient_accumulation_steps": 2,
        "seed": 5, **sections.get("train", {}),
    }  # fmt: skip
    task = build_task(load_recipe(tiny.recipe(base, folder, **sections), list(sets)))
    task.load_processor()
    split = load_data(task, ("train",))["train"]
    device = SimpleNamespace(type="cpu")
    accelerator: Any = SimpleNamespace(
        device=device, process_index=rank, num_processes=processes
    )  # fmt: skip
    return Batches(task, split, accelerator)


def ids(batches: list[Any]) -> list[list[list[int]]]:
    return [batch.inputs["input_ids"].tolist() for batch in batches]


def rows_in(batches: list[Any]) -> list[list[int]]:
    return [list(batch.rows) for batch in batches]


def test_steps_have_the_examples_of_the_plan(base: Path, tmp_path: Path) -> None:
    made = of(tmp_path, base)
    assert (made.steps_per_epoch, made.total_steps) == (math.ceil(COUNT / 4), 6)
    examples = [made.split.examples[i] for i in range(COUNT)]
    lengths = [len(example["input_ids"]) for example in examples]
    plan = BatchPlan(COUNT, 4, 5, None, None)
    steps = list(made.steps(0))
    wanted = [(step, some.tolist()) for step, some in plan.steps(0, 6)]
    assert [(step.number, step.examples) for step in steps] == wanted
    for step in steps:
        assert step.cost == sum(lengths[i] for i in step.examples)
        parts = [step.examples[:2], step.examples[2:]]
        assert rows_in(step.batches) == [part for part in parts if part]
        alone = [made.task.batch([examples[i] for i in part]) for part in parts if part]
        assert ids(step.batches) == ids(alone)
        assert [place.rpartition(":")[2] for place in step.places()] == [
            str(i + 1) for i in step.examples
        ]
    assert sorted(i for step in steps[:3] for i in step.examples) == list(range(COUNT))
    later = list(made.steps(4))
    assert [step.number for step in later] == [5, 6]
    assert [ids(step.batches) for step in later] == [ids(step.batches) for step in steps[4:]]
    assert made.total_cost == pytest.approx(2 * sum(lengths))
    assert [made.epoch_of(step) for step in (1, 3, 6)] == [0.3333, 1.0, 2.0]
    assert made.note is None


def test_processes_share_the_micro_batches_of_a_step(base: Path, tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    alone = list(of(tmp_path / "0", base).steps(0))
    shared: list[list[PlannedStep]] = []
    for rank in range(2):
        (tmp_path / f"r{rank}").mkdir()
        shared.append(list(of(tmp_path / f"r{rank}", base, rank=rank, processes=2).steps(0)))
    for whole, *parts in zip(alone, *shared, strict=True):
        assert all(part.examples == whole.examples and part.cost == whole.cost for part in parts)
        found = sorted(rows for part in parts for rows in rows_in(part.batches))
        assert found == sorted(rows_in(whole.batches))
        assert all(len(part.batches) <= 1 for part in parts)


@pytest.mark.parametrize(
    ("train", "total"),
    [({"epochs": None}, 9), ({"epochs": 1.5}, 5), ({"epochs": None, "max_steps": 7}, 7),
     ({"epochs": 0.1}, 1)],
)  # fmt: skip
def test_how_many_steps_a_run_has(
    train: dict[str, Any], total: int, base: Path, tmp_path: Path
) -> None:
    given = {key: value for key, value in train.items() if value is not None}
    made = of(tmp_path, base, *([] if "epochs" in given else ["train.epochs=null"]), train=given)
    assert made.total_steps == total


def test_examples_of_similar_length_are_in_the_same_step(base: Path, tmp_path: Path) -> None:
    made = of(tmp_path, base, train={"group_by_length": True})
    lengths = np.array([len(made.split.examples[i]["input_ids"]) for i in range(COUNT)])
    plan = BatchPlan(COUNT, 4, 5, lengths, None)
    wanted = [some.tolist() for _, some in plan.steps(0, 6)]
    assert [step.examples for step in made.steps(0)] == wanted
    assert wanted != [some.tolist() for _, some in BatchPlan(COUNT, 4, 5, None, None).steps(0, 6)]


def test_the_locations_of_a_pack_are_those_of_its_members(base: Path, tmp_path: Path) -> None:
    made = of(tmp_path, base, train={"packing": True}, task={"max_length": 60})
    lengths = [len(made.split.examples[i]["input_ids"]) for i in range(COUNT)]
    packs: Any = made.examples.packs
    assert 1 < len(packs) < COUNT
    (first, *_) = made.steps(0)
    members = [i for pack in first.examples for i in packs[pack]]
    assert [place.rpartition(":")[2] for place in first.places()] == [str(i + 1) for i in members]
    assert first.cost == sum(lengths[i] for i in members)
    assert sum(map(sum, (made.lengths,))) == sum(lengths)
    assert made.total_cost == pytest.approx(sum(lengths) * made.total_steps / made.steps_per_epoch)


def test_the_cost_of_a_mixture_is_that_of_its_sampled_examples(base: Path, tmp_path: Path) -> None:
    made = of(tmp_path, base)
    members = (np.arange(3), np.arange(3, COUNT))
    made.mixture = SimpleNamespace(members=members, quotas=(8, 2))  # type: ignore[assignment]
    lengths = [len(made.split.examples[i]["input_ids"]) for i in range(COUNT)]
    epoch = 8 * np.mean(lengths[:3]) + 2 * np.mean(lengths[3:])
    assert made.total_cost == pytest.approx(2 * epoch)


def test_preparing_an_example_depends_on_seed_step_and_row(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = of(tmp_path, base)
    kind: Any = type(made.task)

    def prepare(self: Any, example: Any, rng: np.random.Generator, training: bool) -> Any:
        assert training
        drawn = int(rng.integers(7, 200))
        return {**example, "input_ids": [drawn], "labels": [drawn]}

    monkeypatch.setattr(kind, "prepares", True, raising=False)
    monkeypatch.setattr(kind, "prepare", prepare)
    for step in made.steps(4):
        for batch in step.batches:
            wanted = [
                [int(np.random.default_rng((5, step.number, row)).integers(7, 200))]
                for row in batch.rows
            ]
            assert batch.inputs["input_ids"].tolist() == wanted
    first, second = itertools.islice(made.from_the_start(), 2)
    (step, *_) = made.steps(0)
    assert ids([first, second]) == ids(step.batches)


def test_rows_from_the_start_are_in_training_order_across_epochs(
    base: Path, tmp_path: Path
) -> None:
    made = of(tmp_path, base, rank=1, processes=2)
    found = made.from_the_start()
    plan = BatchPlan(COUNT, 4, 5, None, None)
    for _, some in plan.steps(0, 7):
        parts = [some[i : i + 2].tolist() for i in range(0, len(some), 2)]
        assert rows_in([next(found) for _ in parts]) == parts


@pytest.mark.parametrize("prepares", [False, True])
def test_a_stream_is_split_into_steps(prepares: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"row": i, "place": f"rows:{i}", "cost": 10 + i} for i in range(100)]
    monkeypatch.setattr(module, "Stream", lambda task: Rows(rows))
    monkeypatch.setattr(
        module, "prepared_for", lambda task, one, seed, step: {**one, "of": (seed, step)}
    )
    train = SimpleNamespace(max_steps=5, step_size=4, seed=9, micro_batch_size=3)
    task: Any = SimpleNamespace(
        recipe=SimpleNamespace(train=train), micro_batch=3, prepares=prepares,
        batch=lambda examples: examples, cost=lambda example: example["cost"],
    )  # fmt: skip
    made = Batches(task, None, SimpleNamespace(process_index=0, num_processes=1))  # type: ignore[arg-type]
    steps = list(made.steps(2))
    assert [step.number for step in steps] == [3, 4, 5]
    for step in steps:
        numbers = list(range(4 * (step.number - 1), 4 * step.number))
        more = {"of": (9, step.number)} if prepares else {}
        chunk = [{**rows[i], **more} for i in numbers]
        assert step.examples == numbers
        assert step.batches == [chunk[:3], chunk[3:]]
        assert step.cost == sum(10 + i for i in numbers)
        assert step.places() == [f"rows:{i}" for i in numbers]
    assert (made.total_steps, made.total_cost, made.epoch_of(3)) == (5, 0.0, 0.0)
    assert made.note == "a note"


class Rows(list[Any]):
    """A stream with a note."""

    def note(self) -> str:
        return "a note"


@pytest.mark.parametrize(("workers", "most"), [(0, 0), (1, 11), (3, 17)])
def test_workers_need_semaphores(workers: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def context() -> Any:
        return SimpleNamespace(Semaphore=lambda: made.append(1) or full())

    def full() -> None:
        if len(made) == 17:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.multiprocessing, "get_context", context)
    if workers == 3:
        with pytest.raises(OSError, match="No space left") as caught:
            module.require_shared_memory(workers)
        assert (caught.value.errno, caught.value.filename) == (28, "/dev/shm")
    else:
        module.require_shared_memory(workers)
    assert len(made) == most


def test_workers_leave_signals_to_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ignored: dict[int, Any] = {}
    monkeypatch.setattr(module.signal, "signal", ignored.__setitem__)
    module._leave_signals_to_the_run(0)
    assert set(ignored) == {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    assert set(ignored.values()) == {signal.SIG_IGN}


def test_memory_is_pinned_only_for_gpus(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[bool] = []
    loader = torch.utils.data.DataLoader

    def noting(*arguments: Any, pin_memory: bool, **options: Any) -> Any:
        given.append(pin_memory)
        return loader(*arguments, **options)

    monkeypatch.setattr(module, "DataLoader", noting)
    made = of(tmp_path, base)
    for kind in ("cpu", "cuda"):
        made.accelerator.device.type = kind  # type: ignore[misc]
        next(made.steps(0))
    assert given == [False, True]
