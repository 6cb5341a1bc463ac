"""Rows with images from folders, tables, parquet and the Hub, compared and hashed by bytes."""

from __future__ import annotations

import base64
import gc
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import tiny_pictures
from tiny_pictures import encoded, picture

from lora_cli.data.load_rows import Rows, load_rows, stream_rows
from lora_cli.data.media import is_media, media_hash, media_value
from lora_cli.data.row_texts import text_of
from lora_cli.errors import LoraError
from lora_cli.preprocessing.data_gate import inspect_data
from lora_cli.recipe import Recipe
from lora_cli.recipe_draft import draft_recipe

Json = dict[str, Any]


def media_bytes(value: dict[str, Any]) -> bytes:
    data = value["bytes"]
    return data if isinstance(data, bytes) else Path(value["path"]).read_bytes()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def recipe_of(data: Json, model: str = "none", **task: Any) -> Recipe:
    task = {"type": "image_classification", **task}
    values = {"model": {"name": model}, "task": task, "data": data}
    if data.get("streaming"):
        values["train"] = {"max_steps": 2}
    return Recipe.model_validate(values)


def save(path: Path, seed: int = 0, kind: str = "dark") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, kind).save(path)
    return path


def found(rows: Rows) -> list[tuple[str, Any]]:
    return [(rows.place(i), rows[i].get("label")) for i in range(len(rows))]


# --------------------------------------------------------------------------------------- folders

LAYOUTS: dict[str, tuple[list[str], dict[str, list[tuple[str, str | None]]]]] = {
    "a folder per class": (
        ["dog/1.png", "cat/2.png", "cat/10.png"],
        {"train": [("cat/10.png", "cat"), ("cat/2.png", "cat"), ("dog/1.png", "dog")]},
    ),
    "and per split": (
        ["train/cat/1.png", "train/dog/1.png", "val/cat/2.png", "test/dog/3.png"],
        {
            "train": [("train/cat/1.png", "cat"), ("train/dog/1.png", "dog")],
            "validation": [("val/cat/2.png", "cat")],
            "test": [("test/dog/3.png", "dog")],
        },
    ),
    "classes that are called as splits are": (
        ["test/1.png", "cat/1.png"],
        {"train": [("cat/1.png", "cat"), ("test/1.png", "test")]},
    ),
    "classes in groups": (
        ["pets/cat/1.png", "pets/dog/1.png", "farm/cow/1.png"],
        {
            "train": [
                ("farm/cow/1.png", "cow"), ("pets/cat/1.png", "cat"), ("pets/dog/1.png", "dog"),
            ]
        },
    ),
    "groups with classes of one name": (
        ["train/Greek/c1/1.png", "train/Latin/c1/1.png", "test/Greek/c1/2.png"],
        {
            "train": [
                ("train/Greek/c1/1.png", "Greek/c1"), ("train/Latin/c1/1.png", "Latin/c1"),
            ],
            "test": [("test/Greek/c1/2.png", "Greek/c1")],
        },
    ),
    "splits without classes": (
        ["train/1.png", "test/2.png"],
        {"train": [("train/1.png", None)], "test": [("test/2.png", None)]},
    ),
    "splits with a word more": (
        ["training_set/cat/1.png", "training_set/dog /1.png", "test_set/cat/2.png",
         "held/cat/3.png"],
        {
            "train": [("training_set/cat/1.png", "cat"), ("training_set/dog /1.png", "dog")],
            "test": [("test_set/cat/2.png", "cat")],
            "held": [("held/cat/3.png", "cat")],
        },
    ),
    "what a run in the same folder wrote": (
        ["train/cat/1.png", "train/dog/2.png", "recipe.schema.json", "out/r/recipe.yaml",
         "out/r/metrics.jsonl", "out/r/report.json", "out/r/learning_curve.png",
         "out/r/samples/1.png", "base/config.json", "base/model.safetensors", "base/train/x.png"],
        {"train": [("train/cat/1.png", "cat"), ("train/dog/2.png", "dog")]},
    ),
    "hidden files, a Mac's, and notes": (
        ["cat/1.png", "cat/.2.png", "__MACOSX/cat/1.png", "cat/Thumbs.db", "README.md"],
        {"train": [("cat/1.png", "cat")]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_folder_of_pictures(name: str, tmp_path: Path) -> None:
    files, expected = LAYOUTS[name]
    root = tmp_path / "pictures"
    for i, file in enumerate(files):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        save(root / file, i) if file.endswith("png") else (root / file).write_text("notes")
    splits = {"validation" if split == "held" else split: split for split in expected}
    rows = load_rows(recipe_of({"path": str(root), **splits}))
    rows = {splits[split]: some for split, some in rows.items()}
    assert {split: found(some) for split, some in rows.items()} == expected
    image = rows["train"][0]["image"]
    assert is_media(image)
    assert image["bytes"] is None
    assert Path(image["path"]).is_absolute()


def test_windows_paths_are_found(tmp_path: Path) -> None:
    save(tmp_path / "cat" / "1.png")
    save(tmp_path / "cat\\2.png")  # a valid file name on this system, not a path with a folder
    (tmp_path / "t.csv").write_text("image,label\ncat\\1.png,a\ncat\\2.png,b\n")
    rows = load_rows(recipe_of({"train": str(tmp_path / "t.csv")}))["train"]
    paths = [row["image"]["path"] for row in rows]
    assert paths == [str(tmp_path / name) for name in ("cat/1.png", "cat\\2.png")]


def test_a_file_url_is_read_as_its_path(tmp_path: Path) -> None:
    file = save(tmp_path / "a b" / "1.png")
    (tmp_path / "t.csv").write_text(f"image,label\n{file.as_uri()},a\n")
    assert "%20" in file.as_uri()
    rows = load_rows(recipe_of({"train": str(tmp_path / "t.csv")}))["train"]
    assert rows[0]["image"]["path"] == str(file)


def test_one_folder_per_split(tmp_path: Path) -> None:
    for i, file in enumerate(["a/cat/1.png", "a/dog/2.png", "b/cat/3.png"]):
        save(tmp_path / file, i)
    data = {"train": str(tmp_path / "a"), "test": str(tmp_path / "b")}
    rows = load_rows(recipe_of(data))
    assert found(rows["train"]) == [("cat/1.png", "cat"), ("dog/2.png", "dog")]
    assert found(rows["test"]) == [("cat/3.png", "cat")]


def test_other_files_among_images_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "p" / "cat" / "1.png")
    (tmp_path / "p" / "cat" / "2.heic").write_bytes(b"x")
    load_rows(recipe_of({"path": str(tmp_path / "p")}))
    assert "1 file in the folders of the classes are left out, the first is cat/2.heic" in (
        capsys.readouterr().err
    )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of `datasets`
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_flat_folder_with_metadata(kind: str, tmp_path: Path) -> None:
    for split in ("train", "test"):
        rows = []
        for i in range(2):
            save(tmp_path / split / f"{i}.png", i)
            rows.append({"file_name": f"{i}.png", "label": ["cat", "dog"][i]})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if kind == "csv":
            text = "file_name,label\n0.png,cat\n1.png,dog\n"
        (tmp_path / split / f"metadata.{kind}").write_text(text)
    rows = load_rows(recipe_of({"path": str(tmp_path), "test": "test"}))
    # the same rows as `datasets` gives for such a folder
    reference = datasets.load_dataset("imagefolder", data_dir=str(tmp_path))
    for split in ("train", "test"):
        undecoded = reference[split].cast_column("image", datasets.Image(decode=False))
        assert [(row["label"], media_bytes(row["image"])) for row in rows[split]] == [
            (row["label"], Path(row["image"]["path"]).read_bytes()) for row in undecoded
        ]
    del reference, undecoded
    gc.collect()  # datasets leaves files open


# ----------------------------------------------------------------------- tables, parquet, the Hub


def table(folder: Path, kind: str) -> Path:
    """Write two images with labels in one of the supported forms."""
    data = [encoded(picture(i, kind)) for i, kind in enumerate(tiny_pictures.CLASSES)]
    if kind == "hub":
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])}
        )
        columns = {"image": [{"bytes": d, "path": f"{i}.png"} for i, d in enumerate(data)]}
        (folder / "data").mkdir()
        made = datasets.Dataset.from_dict({**columns, "label": [0, 1]}, features=features)
        made.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
        return folder
    (folder / "files").mkdir()
    for i, content in enumerate(data):
        (folder / "files" / f"{i}.png").write_bytes(content)
    paths = [f"files/{i}.png" for i in range(2)]
    images: list[Any] = paths
    if kind == "bytes":
        images = data
    elif kind == "structs":
        images = [{"bytes": content, "path": None} for content in data]
    elif kind == "structs of paths":
        images = [{"bytes": None, "path": path} for path in paths]
    if kind in ("csv", "absolute"):
        root = f"{folder}/" if kind == "absolute" else ""
        text = "".join(
            f"{root}{p},{c}\n" for p, c in zip(paths, tiny_pictures.CLASSES, strict=True)
        )
        (folder / "rows.csv").write_text("image,label\n" + text)
        return folder / "rows.csv"
    if kind == "json":
        rows = [{"image": p, "label": c} for p, c in zip(paths, tiny_pictures.CLASSES, strict=True)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder / "rows.jsonl"
    columns = {"image": images, "label": list(tiny_pictures.CLASSES)}
    pq.write_table(pa.table(columns), folder / "rows.parquet")
    return folder / "rows.parquet"


KINDS = ("csv", "absolute", "json", "bytes", "structs", "structs of paths", "hub")


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_images_are_read_undecoded_from(kind: str, streamed: bool, tmp_path: Path) -> None:
    source = table(tmp_path, kind)
    data: Json = {"name" if kind == "hub" else "path": str(source), "streaming": streamed}
    recipe = recipe_of(data)
    if streamed:
        rows = [row.columns or {} for row in stream_rows(recipe)]
    else:
        rows = list(load_rows(recipe)["train"])
    for i, row in enumerate(rows):
        assert is_media(row["image"])
        assert media_bytes(row["image"]) == encoded(picture(i, tiny_pictures.CLASSES[i]))
    assert len({media_hash(row["image"]) for row in rows}) == 2


def test_rows_are_the_same_wherever_their_bytes_are_stored(tmp_path: Path) -> None:
    texts, contents = [], []
    for kind in KINDS:
        folder = tmp_path / kind
        folder.mkdir()
        name = "name" if kind == "hub" else "path"
        rows = load_rows(recipe_of({name: str(table(folder, kind))}))["train"]
        texts.append([text_of(row, ["image"]) for row in rows])
        if kind != "hub":  # its labels are numbers
            contents.append(rows.content_sha256())
    assert all(some == texts[0] for some in texts)
    assert len(set(contents)) == 1


@pytest.mark.parametrize("kind", ["csv", "folder"])
def test_a_changed_image_changes_the_hash(kind: str, tmp_path: Path) -> None:
    if kind == "csv":
        source, file = table(tmp_path, "csv"), tmp_path / "files" / "1.png"
    else:
        source, file = tmp_path / "p", save(tmp_path / "p" / "cat" / "1.png")
        save(tmp_path / "p" / "dog" / "1.png", 1)

    def hashes() -> tuple[str, str]:
        rows = load_rows(recipe_of({"path": str(source)}))["train"]
        return rows.sha256, rows.content_sha256()

    before = hashes()
    assert hashes() == before
    file.write_bytes(encoded(picture(99)))
    assert not set(hashes()) & set(before)


def test_a_missing_file_is_an_error_until_it_exists(tmp_path: Path) -> None:
    source = table(tmp_path, "csv")
    source.write_text(source.read_text() + "gone.png,dark\nhttps://a.b/c.png,dark\nfiles,dark\n")
    with pytest.raises(LoraError) as raised:
        load_rows(recipe_of({"path": str(source)}))
    said = {problem.at: problem.what for problem in raised.value.problems}
    assert said == {
        "rows.csv:4": f"there is no file `{tmp_path}/gone.png`",
        "rows.csv:5": "column `image` holds the address `https://a.b/c.png`: download the file "
        "before",
        "rows.csv:6": f"`{tmp_path}/files` is no file",
    }
    skipping = recipe_of({"path": str(source), "on_bad_row": "skip"})
    assert len(load_rows(skipping)["train"]) == 2
    save(tmp_path / "gone.png", 7)
    assert len(load_rows(skipping)["train"]) == 3


def test_a_drawn_split_shares_no_image_with_train(tmp_path: Path) -> None:
    for i in range(20):  # each image twice, under two names
        save(tmp_path / "p" / "cat" / f"{i}.png", i // 2)
    data = {"path": str(tmp_path / "p"), "test": {"from": "train", "fraction": 0.3}}
    rows = load_rows(recipe_of(data))
    train, test = ({media_hash(row["image"]) for row in rows[n]} for n in ("train", "test"))
    assert len(rows["test"]) >= 2
    assert not train & test


def test_an_image_that_is_also_in_train_is_a_leak(tmp_path: Path) -> None:
    base = tiny_pictures.save("vit", tmp_path / "base")
    root = tiny_pictures.draw_folders(tmp_path / "p", {"train": 4, "test": 4})
    (root / "test" / "dark" / "0.png").write_bytes((root / "train/dark/1.png").read_bytes())
    with pytest.raises(LoraError) as raised:
        inspect_data(recipe_of({"path": str(root), "test": "test"}, str(base)))
    assert "1 of 8 test rows" in str(raised.value)
    assert "test/dark/0.png (`0.png`) is train/dark/1.png" in str(raised.value)


def test_labels_are_sorted_as_text_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_pictures.save("vit", tmp_path / "base", 3)
    tiny_pictures.draw_folders(tmp_path / "p", {"train": 2}, ["1", "2", "10"])
    task, _ = inspect_data(recipe_of({"path": str(tmp_path / "p")}, str(base)))
    assert task.labels == ["1", "10", "2"]
    assert "the labels are numbers and stand in the order of text: 1, 10, 2;" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("begin", ["data:image/png;base64,", ""])
@pytest.mark.parametrize("as_pair", [False, True])
def test_base64_images_are_decoded(begin: str, as_pair: bool, tmp_path: Path) -> None:
    pictures = [encoded(picture(i)) for i in range(3)]
    texts = [begin + base64.b64encode(one).decode() for one in pictures]
    values = [{"bytes": text, "path": None} if as_pair else text for text in texts]
    file = tmp_path / "rows.jsonl"
    rows = [{"image": value, "label": "cat"} for value in values]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = load_rows(recipe_of({"path": str(file)}))["train"]
    assert [media_bytes(row["image"]) for row in read] == pictures


@pytest.mark.parametrize("text", ["/9j/" + "a" * 80 + ".jpg", "iVBORw0KGgo", "data:image/png,x"])
def test_a_path_that_looks_like_base64_is_a_path(text: str) -> None:
    assert media_value(text)["bytes"] is None


def test_a_table_of_base64_images_is_recognised(tmp_path: Path) -> None:
    model = tiny_pictures.save("vit", tmp_path / "model")
    lines = [
        f"{base64.b64encode(encoded(picture(i, kind))).decode()},{kind}"
        for i in range(20)
        for kind in ("dark", "light")
    ]
    file = tmp_path / "rows.csv"
    file.write_text("\n".join(["image,label", *lines]) + "\n")
    draft = draft_recipe(file, str(model), tmp_path / "recipe.yaml")
    assert draft.values["task"]["type"] == "image_classification"
    with pytest.raises(LoraError, match="about files of sound or pictures"):
        draft_recipe(file, str(tiny.save_encoder(tmp_path / "texts")), tmp_path / "recipe.yaml")
