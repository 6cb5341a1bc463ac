"""Tests that changes of an adapter's recipe or base that affect outputs are detected."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from world import Printed, World

from lora_cli.files import write_manifest
from lora_cli.training.checkpoints import checkpoints

TEXT = "a warm film"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and an adapter trained on it."""
    top = tmp_path_factory.mktemp("computation")
    tiny.save_encoder(top / "bases" / "encoder")
    world = World(top / "folder", top / "bases")
    recipe = world.recipe(task={"labels": ["bad", "good"]})
    assert world.lora("train", recipe, "-o", "out").code == 0
    return top


@pytest.fixture
def world(source: Path, tmp_path: Path) -> World:
    shutil.copytree(source, tmp_path / "top")
    edit(tmp_path / "top/folder/out/recipe.yaml", str(source), str(tmp_path / "top"))
    return World(tmp_path / "top" / "folder", tmp_path / "top" / "bases")


USES: dict[str, Callable[[World], Printed]] = {
    "predict": lambda world: world.lora("predict", "--adapter", "out", TEXT),
    "eval": lambda world: world.lora("eval", "--adapter", "out", "--split", "train"),
    "merge": lambda world: world.lora(
        "merge", "--base", "../bases/encoder", "--adapter", "out", "--to", "merged"
    ),
    "from": lambda world: world.lora(
        "train", world.recipe(name="next.yaml", adapter={"from": "./out"}), "-o", "next"
    ),
}


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def exchange_ids(base: Path) -> None:
    file = base / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    ids = tokenizer["model"]["vocab"]
    one, other = [token for token in ids if len(token) > 2][:2]
    ids[one], ids[other] = ids[other], ids[one]
    file.write_text(json.dumps(tokenizer))


def change_config(base: Path, **values: object) -> None:
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# ------------------------------------------------------------------------------------ the recipe


@pytest.mark.parametrize("use", USES)
def test_swapped_labels_are_detected_by_every_command(use: str, world: World) -> None:
    edit(world.folder / "out/recipe.yaml", "- bad\n  - good", "- good\n  - bad")
    printed = USES[use](world)
    assert printed.code == 4
    assert 'trained with `task.labels: ["bad", "good"]`, and the recipe says' in printed.err
    assert "out/recipe.yaml" in printed.err


@pytest.mark.parametrize(
    ("old", "new"),
    [("max_length: 512", "max_length: 5"), ("text_column: text", "text_column: label"),
     ("problem: single_label", "problem: multi_label")],
)  # fmt: skip
def test_other_changes_of_the_task_are_detected(old: str, new: str, world: World) -> None:
    edit(world.folder / "out/recipe.yaml", old, new)
    assert USES["predict"](world).code == 4


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [("split_seed: 0", "split_seed: 1", "data.split_seed"),
     ("temperature: 0.0", "temperature: 1.5", "evaluate.generation.temperature"),
     ("precision: fp32", "precision: bf16", "train.precision")],
)  # fmt: skip
def test_what_a_user_may_want_to_change_is_said(old: str, new: str, key: str, world: World) -> None:
    edit(world.folder / "out/recipe.yaml", old, new)
    printed = USES["predict"](world)
    assert printed.code == 0
    assert f"warning: the adapter was trained with `{key}: " in printed.err


def test_moved_data_and_another_batch_size_are_allowed(world: World) -> None:
    plain = USES["predict"](world)
    assert (plain.code, plain.err) == (0, "")
    file = world.folder / "out/recipe.yaml"
    edit(file, "path: ", "path: /elsewhere")
    edit(file, "micro_batch_size: 2", "micro_batch_size: 3")
    assert USES["predict"](world) == plain


def test_the_command_line_may_rename_labels_with_a_warning(world: World) -> None:
    flags = ("--set", "task.labels=[no, yes]")
    printed = world.lora("predict", "--adapter", "out", TEXT, *flags)
    assert printed.code == 0
    assert "warning: the adapter was trained with `task.labels" in printed.err


@pytest.mark.parametrize("labels", [["good", "bad"], None])
def test_another_recipe_has_the_same_labels_in_the_same_order(
    labels: list[str] | None, world: World
) -> None:
    rows = "text,label\n" + "".join(f"{t.replace(',', '')},{n}\n" for t, n in zip(
        tiny.CORPUS, ["bad", "alright"] * 4, strict=True))  # fmt: skip
    world.write("others.csv", rows)
    recipe = world.recipe(name="r.yaml", task={"labels": labels}, data={"path": "others.csv"})
    printed = world.lora("predict", "--adapter", "out", "--recipe", recipe, TEXT)
    assert printed.code == 4, printed
    assert "`task.labels: [" in printed.err


def test_the_facts_are_in_the_manifest(world: World) -> None:
    # the same exchange in both files, so that they agree
    edit(world.folder / "out/recipe.yaml", "- bad\n  - good", "- good\n  - bad")
    file = world.folder / "out/computation.json"
    values = json.loads(file.read_text())
    values["recipe"]["task.labels"].reverse()
    file.write_text(json.dumps(values, indent=2))
    assert "`computation.json` is not the file that was written" in USES["predict"](world).err


def test_a_folder_of_an_earlier_version_works_with_a_warning(world: World) -> None:
    folder = world.folder / "out"
    (folder / "computation.json").unlink()
    write_manifest(folder)
    printed = USES["predict"](world)
    assert printed.code == 0
    assert "is unverified" in printed.err


# -------------------------------------------------------------------------------------- the base


@pytest.mark.parametrize("use", USES)
def test_another_config_is_another_base(use: str, world: World) -> None:
    change_config(world.bases / "encoder", num_attention_heads=2)
    printed = USES[use](world)
    assert printed.code == 4
    assert "`num_attention_heads` in config.json is 2, and was 4" in printed.err
    if use == "predict":
        allowed = ("--set", "model.allow_other_base=true")
        assert world.lora("predict", "--adapter", "out", TEXT, *allowed).code == 0


@pytest.mark.parametrize(
    "change",
    [{"layer_norm_eps": 0.5}, {"hidden_act": "relu"}, {"pad_token_id": 0},
     {"hidden_dropout_prob": 0.5}],
)  # fmt: skip
def test_every_key_that_affects_outputs_is_compared(
    change: dict[str, object], world: World
) -> None:
    change_config(world.bases / "encoder", **change)
    assert USES["predict"](world).code == 4


@pytest.mark.parametrize(
    "change",
    [{"transformers_version": "9.9"}, {"dtype": "float32"}, {"_name_or_path": "x"},
     {"architectures": ["Roberta"]}, {"use_cache": False}],
)  # fmt: skip
def test_keys_that_do_not_affect_outputs_may_change(
    change: dict[str, object], world: World
) -> None:
    change_config(world.bases / "encoder", **change)
    printed = USES["predict"](world)
    assert (printed.code, printed.err) == (0, "")


def test_the_tokenizer_of_the_training_stays_with_the_adapter(world: World) -> None:
    before = USES["predict"](world)
    exchange_ids(world.bases / "encoder")
    printed = USES["predict"](world)
    assert printed.out == before.out
    assert "the adapter's own copy is used" in printed.err
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (world.bases / "encoder" / name).unlink()
    assert USES["predict"](world).out == before.out


def test_a_merged_model_has_the_tokenizer_of_the_training(world: World) -> None:
    wanted = json.loads((world.bases / "encoder/tokenizer.json").read_text())["model"]
    exchange_ids(world.bases / "encoder")
    assert USES["merge"](world).code == 0
    assert json.loads((world.folder / "merged/tokenizer.json").read_text())["model"] == wanted


def test_without_a_copy_another_tokenizer_is_rejected(world: World) -> None:
    folder = world.folder / "out"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    write_manifest(folder)
    exchange_ids(world.bases / "encoder")
    printed = USES["predict"](world)
    assert printed.code == 4
    assert "is not the one that out was trained with" in printed.err


@pytest.mark.parametrize(
    "change", [exchange_ids, lambda base: change_config(base, hidden_act="relu")]
)
def test_a_run_only_resumes_with_the_same_base_and_tokenizer(
    change: Callable[[Path], None], world: World
) -> None:
    command = ("train", "recipe.yaml", "-o", "run")
    assert world.lora(*command).code == 0
    (world.folder / "run/report.json").unlink()
    assert checkpoints(world.folder / "run")
    change(world.bases / "encoder")
    printed = world.lora(*command, "--resume")
    assert printed.code == 4
    assert "is not as it was when the run run was trained" in printed.err
    if change is exchange_ids:
        assert "the tokenizer is another" in printed.err


def test_an_adapter_is_only_trained_further_with_its_tokenizer(world: World) -> None:
    exchange_ids(world.bases / "encoder")
    printed = USES["from"](world)
    assert printed.code == 4
    assert "the tokenizer is another" in printed.err
