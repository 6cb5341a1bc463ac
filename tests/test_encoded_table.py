"""Tests that examples read as slices of the table equal those of the data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch

from lora_cli.preprocessing.encoded_table import EncodedTable, TableWithStates
from lora_cli.tasks.hidden_states import STATES, CachedState

FEATURES = datasets.Features({
    "input_ids": datasets.List(datasets.Value("int32")),
    "token_type_ids": datasets.List(datasets.Value("int8")),
    "labels": datasets.List(datasets.Value("float32")),
    "image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
    "length": datasets.Value("int32"),
    "weight": datasets.Value("float32"),
})  # fmt: skip


def row(i: int) -> dict[str, Any]:
    ids = list(range(i, i + i % 4))  # every fourth is empty
    return {
        "input_ids": ids, "token_type_ids": [i % 2] * len(ids), "labels": [i / 4] * 2,
        "image": {"bytes": bytes([i]), "path": None}, "length": len(ids), "weight": i / 8,
    }  # fmt: skip


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> EncodedTable:
    folder = Path(tmp_path_factory.mktemp("table"))
    parts = [
        datasets.Dataset.from_list([row(i) for i in some], features=FEATURES)
        for some in (range(5), range(5, 6), range(6, 23))
    ]
    datasets.concatenate_datasets(parts).save_to_disk(folder, num_shards=2)
    found = EncodedTable(datasets.load_from_disk(str(folder)))
    assert found.data.column("input_ids").num_chunks > 1
    return found


def test_a_batch_of_examples_equals_that_of_the_data_set(table: EncodedTable) -> None:
    order = [22, 0, 5, 6, 4, 17, 5]
    found = table.__getitems__(order)
    for position, example in zip(order, found, strict=True):
        wanted = row(position)
        assert list(example) == list(wanted) or set(example) == set(wanted)
        for name, value in wanted.items():
            given = example[name]
            assert (given.tolist() if isinstance(given, np.ndarray) else given) == value
        assert isinstance(example["input_ids"], np.ndarray)
        assert type(example["length"]) is int
    assert table[3] == row(3)
    assert table["length"][:] == [row(i)["length"] for i in range(23)]
    assert len(table) == 23


def test_examples_are_read_only(table: EncodedTable) -> None:
    (example,) = table.__getitems__([3])
    with pytest.raises(ValueError, match="read-only"):
        example["input_ids"][0] = 7


def test_states_belong_to_their_examples_in_any_order(table: EncodedTable) -> None:
    random = np.random.default_rng(0)
    order = random.permutation(23)
    kept = {i: bytes([i] * (i % 5 + 1)) for i in range(23)}
    column = pa.array([b"before", b"", *(kept[i] for i in order), b"behind"], pa.large_binary())
    whole = column.slice(2, 23)  # a chunk may be a part of a larger array
    chunks = pa.chunked_array([whole.slice(0, 4), whole.slice(4, 1), whole.slice(5)])
    states = datasets.Dataset(pa.table({"layer": chunks}))
    like = CachedState(np.empty(0, dtype=np.uint8), torch.uint8, ())
    joined = TableWithStates(table, states, order, {"layer": like})
    assert joined.n_bytes == sum(map(len, kept.values()))
    asked = [22, 0, *order[:6].tolist(), 7, 7]
    for i, example in zip(asked, joined.__getitems__(asked), strict=True):
        found = example[STATES]["layer"]
        assert found.values.tobytes() == kept[i]
        assert example["length"] == row(i)["length"]
