"""Tests of cached outputs of frozen parts: exact, within the limit, and never with augmentation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from calls import write_rows
from closeness import assert_close
from example_task import ExampleTask, save_base
from torch import Tensor, nn

from lora_cli.errors import LoraError
from lora_cli.preprocessing.cached_frozen_outputs import in_words, with_cached_frozen_outputs
from lora_cli.preprocessing.encode import load_data
from lora_cli.recipe import load_recipe
from lora_cli.recipe.spec.section import bytes_of
from lora_cli.tasks.contract import prepared_for_evaluation
from lora_cli.tasks.examples import Batch, Encoded, Example

CPU = torch.device("cpu")
TEXTS = ["a warm film", "dull", "the plot is slow", "great fun", "bore"]


class Opened:
    """The example task, its model, and its train and validation examples."""

    def __init__(self, folder: Path, kind: type[ExampleTask], **data: Any) -> None:
        save_base(folder / "base")
        for name in ("train", "validation"):
            rows = [
                {"text": f"{text} {name} {i}", "label": None} for i in range(4) for text in TEXTS
            ]
            write_rows(folder / f"{name}.jsonl", rows)
        values = {
            "model": {"name": "./base"},
            "task": {"type": "sequence_classification", "labels": ["bad", "good"]},
            "data": {"train": "train.jsonl", "validation": "validation.jsonl", **data},
            "train": {"max_steps": 2, "micro_batch_size": 2},
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        recipe = load_recipe(folder / "recipe.yaml")
        self.task = kind(recipe, recipe.task)
        self.splits = load_data(self.task)
        self.model, _ = self.task.load_model(CPU)
        self.accelerator = Accelerator(cpu=True)

    def kept(self) -> dict[str, Encoded]:
        return with_cached_frozen_outputs(self.task, self.model, self.splits, self.accelerator)

    def computed(self, example: Example) -> dict[str, Tensor]:
        """Return the outputs for a single example, without a cache."""
        batch = self.task.collate([prepared_for_evaluation(self.task, example)])
        with torch.no_grad():
            return {n: t[0] for n, t in self.task.frozen_outputs(self.model, batch).items()}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "lora"


def of_train(splits: dict[str, Encoded], name: str = "train") -> Iterator[Example]:
    yield from splits[name].examples.__getitems__(list(range(len(splits[name]))))


class SeveralTypes(ExampleTask):
    """A task with an output of each dtype, whose size does not depend on the batch."""

    def frozen_outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        ids = batch.inputs["ids"]
        exact = (ids[:, :2].double() + 1) / 3
        exact[0, 0] = float("nan")
        kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        found = {str(kind): exact.to(kind) for kind in kinds}
        found |= {"int": ids[:, :2], "bool": ids[:, :2] > 99, "one": ids[:, 0] / 7}
        return {**found, "empty": torch.zeros(len(ids), 0, 3)}


def test_tensors_of_every_dtype_are_cached_bit_by_bit(tmp_path: Path) -> None:
    opened = Opened(tmp_path, SeveralTypes)
    for split in ("train", "validation"):
        size = 4
        examples = list(of_train(opened.kept(), split))
        for start in range(0, len(examples), size):
            part = [prepared_for_evaluation(opened.task, e) for e in examples[start : start + size]]
            expected = opened.task.frozen_outputs(opened.model, opened.task.collate(part))
            for i, example in enumerate(part):
                for name, tensor in expected.items():
                    found = example[name]
                    assert (found.dtype, found.shape) == (tensor.dtype, tensor[i].shape)
                    ours, theirs = (t.contiguous().view(-1) for t in (found, tensor[i]))
                    assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def test_cached_outputs_are_not_computed_again(tmp_path: Path) -> None:
    opened = Opened(tmp_path, ExampleTask)
    first = opened.kept()
    computed = opened.task.encoded_batches
    second = opened.kept()
    # one example of each split gives the names; augmentation is tested too
    assert opened.task.encoded_batches - computed <= 2 + 1 + 4 < computed
    for ours, theirs in zip(of_train(first), of_train(second), strict=True):
        assert ours["features"] == theirs["features"]
        expected = opened.computed({k: v for k, v in ours.items() if k != "features"})["features"]
        found = prepared_for_evaluation(opened.task, ours)["features"]
        assert_close(found[: len(expected)], expected)


def n_bytes(splits: dict[str, Encoded], name: str) -> int:
    return sum(len(example["features"]["data"]) for example in of_train(splits, name))


def test_a_split_above_the_limit_is_not_cached(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Opened(tmp_path, ExampleTask).kept()
    sizes = {name: n_bytes(whole, name) for name in whole}
    assert capsys.readouterr().err.count("computing once what the frozen `encoder` makes of") == 2
    # both, only train, neither; outputs that are cached already count too
    both = sum(sizes.values())
    for limit, names in ((both, {"train", "validation"}), (both - 1, {"train"})):
        opened = Opened(tmp_path, ExampleTask, cache_limit=f"{limit}B")
        found = opened.kept()
        assert {n for n in found if "features" in next(of_train(found, n))} == names
        said = capsys.readouterr().err
        assert said.count("warning:") == 2 - len(names)
        if len(names) == 1:
            assert "what the frozen `encoder` computes is not kept, but computed in every" in said
            assert "of `validation` take about" in said
            assert f"of `data.cache_limit` ({limit}B)" in said
    folders = len(list(cache.iterdir()))
    opened = Opened(tmp_path, ExampleTask, cache_limit="1kB")
    before = opened.task.encoded_batches
    found = opened.kept()
    assert not any("features" in next(of_train(found, name)) for name in found)
    assert capsys.readouterr().err.count("1.0 kB are left of `data.cache_limit` (1kB)") == 2
    assert len(list(cache.iterdir())) == folders
    assert opened.task.encoded_batches - before < 20


def test_a_limit_that_is_clearly_too_small_ends_caching_early(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Opened(tmp_path / "whole", ExampleTask, validation=None)
    limit = n_bytes(whole.kept(), "train") // 3
    monkey = Opened(tmp_path / "whole", ExampleTask, validation=None, cache_limit=f"{limit}B")
    with torch.no_grad():  # another base, so that nothing is cached
        monkey.model.get_submodule("encoder").embed.weight.mul_(2)  # type: ignore[operator]
    found = monkey.kept()
    assert found is not monkey.splits
    assert "features" not in next(of_train(found))
    assert (
        monkey.task.encoded_batches == 1 + 4 + 1 + 1
    )  # augmentation tested; names; the first batch
    assert "are left of `data.cache_limit`" in capsys.readouterr().err
    assert not list(cache.glob(".*.tmp"))


def test_nothing_is_cached_with_a_limit_of_zero(tmp_path: Path, cache: Path) -> None:
    opened = Opened(tmp_path, ExampleTask, cache_limit="0B")
    n_folders = len(list(cache.iterdir()))
    assert opened.kept() is opened.splits
    assert (opened.task.encoded_batches, len(list(cache.iterdir()))) == (0, n_folders)


class Augmenting(ExampleTask):
    """A task that changes characters at random in training, without declaring it."""

    share = 1.0

    def prepare(self, example: Example, rng: np.random.Generator, training: bool) -> Example:
        ids = np.array(example["ids"])
        if training and rng.random() < self.share:
            ids = rng.permutation(ids)
        return super().prepare({**example, "ids": ids.tolist()}, rng, training)


class Seldom(Augmenting):
    share = 0.3


class Saying(ExampleTask):
    augments = True


@pytest.mark.parametrize("kind", [Augmenting, Seldom, Saying])
def test_augmented_inputs_are_not_cached(
    kind: type[ExampleTask], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Opened(tmp_path, kind).kept()
    assert "features" not in next(of_train(found))
    assert "features" in next(of_train(found, "validation"))
    said = capsys.readouterr().err
    assert "`train` draws their inputs anew in every epoch" in said
    assert said.count("warning:") == 1


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("4GB", 4_000_000_000),
        ("4GiB", 2**32),
        ("1.5TB", 1_500_000_000_000),
        ("500 MB", 500_000_000),
        ("10kB", 10_000),
        ("2KiB", None),
        ("2kiB", 2048),
        ("7B", 7),
        ("0B", 0),
        ("0.5B", 0),
        ("4", None),
        ("4gb", None),
        ("-4GB", None),
        ("GB", None),
        ("4GB ", None),
        ("1e9B", None),
        ("", None),
    ],
)
def test_a_size_has_a_unit(size: str, expected: int | None, tmp_path: Path) -> None:
    values = {"model": {"name": "m"}, "task": {"type": "causal_lm"}}
    values["data"] = {"path": "rows.jsonl", "cache_limit": size}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    if expected is None:
        with pytest.raises(LoraError, match=r"a size with its unit, such as `4GB`"):
            load_recipe(tmp_path / "recipe.yaml")
        return
    assert load_recipe(tmp_path / "recipe.yaml").data.cache_bytes == bytes_of(size) == expected


def test_bytes_are_formatted_with_units() -> None:
    sizes = {0: "0 B", 999: "999 B", 1000: "1.0 kB", 3.2e9: "3.2 GB", 5e15: "5000.0 TB"}
    assert {n: in_words(n) for n in sizes} == sizes
