"""Tests that different processes do not train together, and a dead process is reported."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import tiny
import torch
from killing import Kill, Nursery, write_recipe
from runs import assert_same_run
from torch import nn

from lora_cli.errors import NumericsError
from lora_cli.training import rank_agreement
from lora_cli.training.checkpoints import checkpoints


def said(out: Path, rank: int) -> str:
    text = Path(f"{out}.{rank}.log").read_text()
    assert "Traceback" not in text
    return text


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a recipe for two processes."""
    return write_recipe(tmp_path_factory.mktemp("pair"), "two processes")[0]


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ("train.optimizer.learning_rate=0.5", "process 0 has `0.01`, process 1 has `0.5`"),
        ("train.seed=1", "`train.seed`"),
        ("adapter.dropout=0.1", "`adapter.dropout`"),
        ("train.max_steps=9", "`train.max_steps`"),
        ("checkpoint.every_steps=1", "`checkpoint.every_steps`"),
        ("evaluate.every_steps=2", "`evaluate.every_steps`"),
        ("train.max_hours=1", "`train.max_hours`"),
        ("output_dir=elsewhere", "`output_dir`"),
    ],
)
@pytest.mark.slow_after(3)
def test_another_recipe_in_one_process_is_named(
    nest: Nursery, pair: Path, tmp_path: Path, other: str, named: str
) -> None:
    out = tmp_path / "out"
    assert nest.run(pair, out, 2, others=[other]) == [2, 2]
    assert "error: the processes differ in `" in said(out, 0)
    assert named in said(out, 0)
    assert said(out, 1) == ""
    assert not out.exists()


@pytest.mark.slow
def test_other_rows_and_another_base_are_named(nest: Nursery, pair: Path, tmp_path: Path) -> None:
    rows = (pair.parent / "train.jsonl").read_text()
    other = tmp_path / "train.jsonl"
    other.write_text(rows.replace("funny", "sad"))
    out = tmp_path / "rows"
    assert nest.run(pair, out, 2, others=[f"data.train={other}"]) == [2, 2]
    assert "error: the processes differ in `data.train`" in said(out, 0)
    assert checkpoints(out) == []

    base = tmp_path / "base"
    shutil.copytree(pair.parent / "encoder", base)
    tiny.encoder(None, "roberta", seed=1).save_pretrained(base)
    out = tmp_path / "base-of-one"
    assert nest.run(pair, out, 2, others=[f"model.name={base}"]) == [2, 2]
    assert "error: the processes differ in `the weights of the base`" in said(out, 0)

    other.write_text(rows)  # the same rows in another place are the same rows
    few = ["train.max_steps=2"]
    assert nest.run(pair, tmp_path / "same", 2, sets=few, others=[f"data.train={other}"]) == [0, 0]


def test_an_error_in_the_data_ends_both_and_is_printed_once(
    nest: Nursery, pair: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "train.jsonl"
    rows.write_text((pair.parent / "train.jsonl").read_text() + '{"text": "", "label": 0}\n')
    out = tmp_path / "out"
    assert nest.run(pair, out, 2, sets=[f"data.train={rows}"]) == [2, 2]
    assert said(out, 0).count("column `text` is blank") == 1
    assert said(out, 1) == ""
    assert not any(out.iterdir())


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.slow_after(1)
def test_a_dead_process_is_reported_by_the_other(
    nest: Nursery, pair: Path, tmp_path: Path, rank: int
) -> None:
    sets, out = ["train.max_steps=9"], tmp_path / "out"
    kill = Kill(0.0, "step", 5, rank=rank, alone=True)
    ends = nest.run(pair, out, 2, kill, sets)
    assert ends[rank] == -signal.SIGKILL
    assert ends[1 - rank] == 5
    one = said(out, 1 - rank)
    assert one.count(f"error: process {rank} of 2 has ended, so process {1 - rank} ends too") == 1
    assert "continue with `--resume`" in one
    assert nest.run(pair, out, 2, sets=sets) == [0, 0]
    if rank == 0:
        assert nest.run(pair, tmp_path / "whole", 2, sets=sets) == [0, 0]
        assert_same_run(tmp_path / "whole", out)


def test_different_parameters_are_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    class Two:
        num_processes = 2

    model = nn.Linear(3, 2)
    sums = [rank_agreement.checksum(dict(model.named_parameters()))]
    monkeypatch.setattr(rank_agreement, "gather_object", lambda one: sums + one)
    rank_agreement.require_same_parameters(model, 7, Two())  # type: ignore[arg-type]
    with torch.no_grad():
        model.weight[1, 2] += 1e-7
    with pytest.raises(NumericsError, match="after step 7 process 1 and process 0 hold different"):
        rank_agreement.require_same_parameters(model, 7, Two())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.bool]
)
def test_a_checksum_depends_on_every_bit(dtype: torch.dtype) -> None:
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    first = rank_agreement.checksum({"a": tensor, "b": torch.ones(())})
    assert rank_agreement.checksum({"a": tensor.clone(), "b": torch.ones(())}) == first
    assert rank_agreement.checksum({"b": tensor, "a": torch.ones(())}) != first
    assert rank_agreement.checksum({"a": tensor.reshape(4, 3), "b": torch.ones(())}) != first
    tensor.view(torch.uint8)[0, 0] ^= 1
    assert rank_agreement.checksum({"a": tensor, "b": torch.ones(())}) != first
    assert json.dumps(first)
