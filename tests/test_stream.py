"""Tests of streamed rows: errors have a location, and a stream yields examples or ends."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny

from lora_cli.errors import LoraError
from lora_cli.preprocessing.check_recipe import check_recipe
from lora_cli.preprocessing.encode import check_data
from lora_cli.preprocessing.stream import Stream
from lora_cli.recipe import load_recipe
from lora_cli.tasks import build_task
from lora_cli.tasks.contract import Task
from lora_cli.training import run as training_run
from lora_cli.training import train

Json = dict[str, Any]
CHAT = {"messages_column": "messages", "text_column": None, "chat_template": "chat.jinja"}
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {"encoder": tiny.save_encoder(folder / "e"), "llama": tiny.save_llama(folder / "l")}


def recipe_file(base: Path, folder: Path, rows: list[Json], **sections: Any) -> Path:
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")
    (folder / "chat.jinja").write_text(TEMPLATE)
    data = {"path": "rows.jsonl", "streaming": True, **sections.pop("data", {})}
    sections["train"] = {"max_steps": 2, "micro_batch_size": 2, **sections.get("train", {})}
    return tiny.recipe(base, folder, data=data, **sections)


def task_of(path: Path) -> Task:
    task = build_task(load_recipe(path))
    task.load_processor()
    check_data(task, ("train",))
    return task


def labelled(*labels: Any) -> list[Json]:
    return [{"text": f"{tiny.CORPUS[i % 8]} {i}", "label": label} for i, label in enumerate(labels)]


def first(stream: Stream, count: int) -> list[Json]:
    return list(islice(stream, count))


def test_a_stream_repeats_and_the_count_continues(bases: dict[str, Path], tmp_path: Path) -> None:
    rows = labelled(*["good", "bad"] * 75)  # more than are encoded at once
    stream = Stream(task_of(recipe_file(bases["encoder"], tmp_path, rows)))
    found = first(stream, 320)
    assert [example["row"] for example in found] == list(range(320))
    assert [e["input_ids"] for e in found[:150]] == [e["input_ids"] for e in found[150:300]]
    assert [e["place"] for e in found[149:151]] == ["rows.jsonl:150", "rows.jsonl:1"]
    assert stream.note() is None


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    ("task", "label"),
    [({}, "godo"), ({}, -1), ({}, 2), ({"problem": "multi_label"}, ["good", "godo"])],
)
def test_an_invalid_label_is_an_error_with_its_location(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: Json,
    label: Any, skip: bool,
) -> None:  # fmt: skip
    fine: Any = ["bad"] if task else "bad"
    section = {"type": "sequence_classification", "labels": ["bad", "good"], **task}
    path = recipe_file(
        bases["encoder"], tmp_path, labelled(fine, fine, label), task=section,
        data={"on_bad_row": "skip"} if skip else {},
    )  # fmt: skip
    monkeypatch.setattr(Task, "load_model", None)  # not reached
    for run in (train, check_recipe):
        with pytest.raises(LoraError, match="is not a label") as caught:
            run(load_recipe(path))
        (problem,) = caught.value.problems
        assert problem.at == "rows.jsonl:3"
        assert problem.hint
        assert caught.value.exit_code == 2


def test_a_later_invalid_label_is_an_error_too(bases: dict[str, Path], tmp_path: Path) -> None:
    rows = labelled(*["good"] * 150, "godo")
    with pytest.raises(LoraError, match="is not a label") as caught:
        first(Stream(task_of(recipe_file(bases["encoder"], tmp_path, rows))), 151)
    assert caught.value.problems[0].at == "rows.jsonl:151"


def test_rows_with_a_skipped_label_are_omitted(bases: dict[str, Path], tmp_path: Path) -> None:
    section = {"type": "sequence_classification", "labels": ["bad", "good"], "skip_labels": ["-"]}
    rows = labelled("good", "-", "bad", "-")
    stream = Stream(task_of(recipe_file(bases["encoder"], tmp_path, rows, task=section)))
    assert [example["place"] for example in first(stream, 2)] == ["rows.jsonl:1", "rows.jsonl:3"]
    first(stream, 3)
    assert str(stream.note()).startswith("skipped 2 rows of the stream; the first: rows.jsonl:2: ")


def test_label_names_of_a_hub_stream_are_known(bases: dict[str, Path], tmp_path: Path) -> None:
    names = datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    made = datasets.Dataset.from_dict({"text": ["dull"] * 3, "label": [0, 1, 1]}, features)
    (tmp_path / "hub" / "data").mkdir(parents=True)
    made.to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    section = {"type": "sequence_classification", "labels": ["good", "bad"]}
    hub = {"path": None, "name": str(tmp_path / "hub")}
    path = recipe_file(bases["encoder"], tmp_path, [], task=section, data=hub)
    found = first(Stream(task_of(path)), 3)
    assert [example["labels"] for example in found] == [1, 0, 0]  # by name, not by position


def chats() -> list[Json]:
    roles = [("user", "assistant"), ("tool", "assistant"), ("user", "assistant")]
    return [
        {"messages": [{"role": role, "content": tiny.CORPUS[i]} for role in pair]}
        for i, pair in enumerate(roles)
    ]


def test_a_row_that_cannot_be_encoded_is_an_error_or_skipped(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    path = recipe_file(bases["llama"], tmp_path, chats(), task=CHAT | {"max_length": 128})
    with pytest.raises(LoraError, match="no tools") as caught:
        first(Stream(task_of(path)), 3)
    assert caught.value.problems[0].at == "rows.jsonl:2"
    skipping = {"data": {"on_bad_row": "skip"}, "task": CHAT | {"max_length": 128}}
    stream = Stream(task_of(recipe_file(bases["llama"], tmp_path, chats(), **skipping)))
    found = first(stream, 4)
    assert [e["place"] for e in found] == ["rows.jsonl:1", "rows.jsonl:3"] * 2
    assert str(stream.note()).startswith("skipped 1 row of the stream; the first: rows.jsonl:2: ")


@pytest.mark.parametrize(
    ("kind", "rows", "task", "message"),
    [
        ("encoder", [], {}, "the train split has no rows"),
        (
            "encoder",
            labelled(None, None),
            {},
            "none of 2 rows can be used; the first: rows",
        ),
        (
            "llama",
            chats()[1:2],
            CHAT,
            "the first: rows.jsonl:1: nothing to train",
        ),
        ("llama", chats()[:1], CHAT | {"max_length": 3}, "nothing to train is left within 3"),
    ],
)
def test_a_stream_without_a_usable_row_ends(
    bases: dict[str, Path], tmp_path: Path, kind: str, rows: list[Json], task: Json, message: str
) -> None:
    sections: Json = {"task": task} if task else {}
    path = recipe_file(bases[kind], tmp_path, rows, data={"on_bad_row": "skip"}, **sections)
    with pytest.raises(LoraError) as caught:
        train(load_recipe(path))
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.fixture
def cut_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    real = training_run.train_step

    def cut(steps: int) -> None:
        calls = iter(range(1, 100))

        def step(*arguments: Any) -> Any:
            if next(calls) > steps:
                raise KeyError("pulled the plug")
            return real(*arguments)

        monkeypatch.setattr(training_run, "train_step", step)

    yield cut
    monkeypatch.setattr(training_run, "train_step", real)


@pytest.mark.parametrize("stop", [2, 5])
@pytest.mark.slow
def test_a_streamed_run_with_bad_rows_resumes_exactly(
    bases: dict[str, Path], tmp_path: Path, cut_at: Any, stop: int,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    rows = labelled("good", None, "bad", "bad", "good", "", "good")
    path = recipe_file(
        bases["encoder"], tmp_path, rows, data={"on_bad_row": "skip"}, adapter={"dropout": 0.3},
        train={"max_steps": 7}, checkpoint={"every_steps": 2},
    )  # fmt: skip
    train(load_recipe(path, [f"output_dir={tmp_path / 'whole'}"]))
    assert "skipped 2 rows of the stream; the first: rows.jsonl:2" in capsys.readouterr().err
    cut = load_recipe(path, [f"output_dir={tmp_path / 'cut'}"])
    cut_at(stop)
    with pytest.raises(KeyError):
        train(cut)
    cut_at(99)
    train(load_recipe(path, [f"output_dir={tmp_path / 'cut'}"]), resume=True)
    assert "skipped 2 rows of the stream; the first: rows.jsonl:2" in capsys.readouterr().err
    for name in ("adapter_model.safetensors", "samples.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_values_that_do_not_depend_on_the_row_are_computed_once(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row takes 80 µs; each of these would add 5 to 50 µs."""
    rows = labelled(*"ab" * 50)
    path = recipe_file(bases["encoder"], tmp_path, rows, task={"labels": ["a", "b"]})
    task = task_of(path)
    asked: Counter[str] = Counter()

    def counted(owner: Any, name: str) -> None:
        before = getattr(owner, name)

        def call(*args: Any, **more: Any) -> Any:
            asked[name] += 1
            return before(*args, **more)

        monkeypatch.setattr(owner, name, call)

    counted(type(task.config), "get_text_config")  # type: ignore[attr-defined]  # for text tasks
    counted(type(task.recipe), "at")
    counted(json.JSONDecoder, "__init__")
    assert len(first(Stream(task), 200)) == 200
    assert max(asked.values(), default=0) < 20, asked


@pytest.mark.parametrize("text", ["a half \\ud800 of one", "a half \\uDC01 of one"])
def test_half_a_surrogate_pair_in_a_row_is_an_error(
    text: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    path = recipe_file(bases["encoder"], tmp_path, [], task={"labels": ["a", "b"]})
    row = f'{{"text": "{text}", "label": "a"}}\n'
    (tmp_path / "rows.jsonl").write_text('{"text": "good", "label": "a"}\n' + row)
    with pytest.raises(LoraError, match="half of a character"):
        first(Stream(task_of(path)), 2)
