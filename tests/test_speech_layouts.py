"""Tests of the layouts of public speech data sets, and of tables of segments of recordings."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny_speech
from tiny_speech import encoded, sound, write

from lora_cli.data.load_rows import Rows, load_rows
from lora_cli.data.media_folder import texts_without_media
from lora_cli.data.recordings import read_recording
from lora_cli.errors import LoraError
from lora_cli.preprocessing.data_gate import examine, inspect_data
from lora_cli.recipe import Recipe, load_recipe
from lora_cli.recipe_draft import draft_recipe, write_recipe

Json = dict[str, Any]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def build_recipe(data: Json, model: Path | str = "none", **task: Any) -> Recipe:
    task = {"type": "speech_recognition", **task}
    return Recipe.model_validate({"model": {"name": str(model)}, "task": task, "data": data})


def transcripts(rows: Rows, column: str = "text") -> dict[str, str]:
    return {rows.place(i): rows[i][column] for i in range(len(rows))}


def draft_and_load(source: Path, base: Path, **options: Any) -> Recipe:
    target = source.parent / "recipe.yaml"
    draft = draft_recipe(source, str(base), target, **options)
    write_recipe(target, draft.text(), draft.extra_files)
    return load_recipe(target)


# --------------------------------------------------------------------------------- LibriSpeech


def librispeech(root: Path) -> Path:
    for n, (split, chapter) in enumerate((("train-clean-100", "19/198"), ("dev-clean", "26/495"))):
        speaker, _, chapter_id = chapter.partition("/")
        lines = []
        for i in range(3):
            name = f"{speaker}-{chapter_id}-{i:04d}"
            write(root / split / chapter / f"{name}.flac", sound(10 * n + i, 0.3))
            lines.append(f"{name} WORD {n} {i}\n")
        (root / split / chapter / f"{speaker}-{chapter_id}.trans.txt").write_text("".join(lines))
    return root


def test_librispeech_transcripts_are_read(tmp_path: Path) -> None:
    root = librispeech(tmp_path / "LibriSpeech")
    recipe = build_recipe({"path": str(root), "validation": "validation"})
    splits = load_rows(recipe)
    place = "train-clean-100/19/198/19-198-000"
    assert transcripts(splits["train"]) == {f"{place}{i}.flac": f"WORD 0 {i}" for i in range(3)}
    assert list(transcripts(splits["validation"]).values()) == [f"WORD 1 {i}" for i in range(3)]
    assert texts_without_media(root, recipe) == []

    transcript_file = next(root.rglob("19-198.trans.txt"))
    transcript_file.write_text(transcript_file.read_text().replace("WORD 0 1", "ANOTHER"))
    assert transcripts(load_rows(recipe)["train"])[f"{place}1.flac"] == "ANOTHER"
    (transcript_file.parent / "19-198-0001.txt").write_text("its own\n")
    assert transcripts(load_rows(recipe)["train"])[f"{place}1.flac"] == "its own"


def test_librispeech_is_drafted(tmp_path: Path) -> None:
    base = tiny_speech.save(tmp_path / "base")
    recipe = draft_and_load(librispeech(tmp_path / "LibriSpeech"), base)
    assert recipe.task.text_column == "text"
    assert len(load_rows(recipe)["validation"]) == 3


# ------------------------------------------------------------------------ texts next to files

SENTENCES = ["Größe und Maß für die Tür", "schöne Grüße aus Köln", "wir müssen übermorgen gehen"]


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-8-sig", "utf-8"])
def test_the_encoding_of_text_files_is_detected(encoding: str, tmp_path: Path) -> None:
    for i, text in enumerate(SENTENCES * 2):
        write(tmp_path / "speech" / f"{i}.wav", sound(i, 0.3))
        (tmp_path / "speech" / f"{i}.txt").write_bytes(f"{text} {i}\n".encode(encoding))
    recipe = draft_and_load(tmp_path / "speech", tiny_speech.save(tmp_path / "base"))
    rows = {
        place: text
        for split in load_rows(recipe).values()
        for place, text in transcripts(split).items()
    }
    assert rows == {f"{i}.wav": f"{text} {i}" for i, text in enumerate(SENTENCES * 2)}


def test_text_files_may_have_an_upper_case_suffix(tmp_path: Path) -> None:
    write(tmp_path / "speech" / "1.wav", sound(1))
    (tmp_path / "speech" / "1.TXT").write_text("a word\n")
    recipe = build_recipe({"path": str(tmp_path / "speech")})
    assert transcripts(load_rows(recipe)["train"]) == {"1.wav": "a word"}
    assert texts_without_media(tmp_path / "speech", recipe) == []


def test_recordings_in_two_formats_share_a_text_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(2):
        for ending in ("wav", "flac"):
            write(tmp_path / "speech" / f"{i}.{ending}", sound(i))
        (tmp_path / "speech" / f"{i}.txt").write_text(f"word {i}")
    load_rows(build_recipe({"path": str(tmp_path / "speech")}))
    err = capsys.readouterr().err
    assert f"2 text files in {tmp_path}/speech belong to more than one file" in err
    assert "such as 0.flac and 0.wav" in err


# ------------------------------------------------------------------------- folders of classes


def test_folder_names_are_transcripts_only_on_request(tmp_path: Path) -> None:
    base = tiny_speech.save(tmp_path / "base")
    for n, word in enumerate(("yes", "no")):
        for i in range(4):
            write(tmp_path / "words" / word / f"{i}.wav", sound(10 * n + i, 0.3))
    with pytest.raises(LoraError, match="have no texts next to them"):
        draft_and_load(tmp_path / "words", base)
    recipe = draft_and_load(tmp_path / "words", base, text="label")
    assert recipe.task.text_column == "label"
    assert set(transcripts(load_rows(recipe)["train"], "label").values()) == {"yes", "no"}


# -------------------------------------------------------------------------------- Common Voice


def common_voice(root: Path) -> Path:
    lines = ["client_id\tpath\tsentence\tlocale\n"]
    for i in range(4):
        write(root / "clips" / f"voice_{i}.mp3", sound(i, 0.4))
        lines.append(f"{i}\tvoice_{i}.mp3\tWords {i}.\ten\n")
    (root / "train.tsv").write_text("".join(lines))
    return root / "train.tsv"


def test_common_voice_paths_are_relative_to_clips(tmp_path: Path) -> None:
    table = common_voice(tmp_path / "cv")
    recipe = build_recipe({"path": str(table)}, audio_column="path", text_column="sentence")
    rows = load_rows(recipe)["train"]
    assert [row["path"]["path"] for row in rows] == [
        str(tmp_path / "cv" / "clips" / f"voice_{i}.mp3") for i in range(4)
    ]


@pytest.mark.parametrize("inner", ["clips", "wavs", "audio", "audio/train", "train"])
def test_paths_may_be_relative_to_a_folder_next_to_the_table(inner: str, tmp_path: Path) -> None:
    table = common_voice(tmp_path / "cv")
    (tmp_path / "cv" / "clips").rename(tmp_path / "elsewhere")
    recipe = build_recipe({"path": str(table)}, audio_column="path", text_column="sentence")
    with pytest.raises(LoraError, match=f"there is no file `{tmp_path}/cv/voice_0.mp3`"):
        load_rows(recipe)
    folder = tmp_path / "cv" / inner
    folder.parent.mkdir(exist_ok=True)
    (tmp_path / "elsewhere").rename(folder)
    rows = load_rows(recipe)["train"]
    assert rows[0]["path"]["path"] == str(folder / "voice_0.mp3")
    write(tmp_path / "cv" / "voice_2.mp3", sound(9))  # next to the table takes precedence
    table.write_text(table.read_text().replace("voice_0", "voice_2"))
    with pytest.raises(LoraError, match=r"there is no file `.*/cv/voice_1.mp3`"):
        load_rows(recipe)


# ---------------------------------------------------------------------------------- in base64


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "MP3", "OGG", "AIFF", "AU"])
@pytest.mark.parametrize("form", ["bare", "address", "pair"])
def test_recordings_in_base64_are_decoded(form: str, kind: str, tmp_path: Path) -> None:
    files = [encoded(sound(i, 0.3), format=kind) for i in range(3)]
    texts = [base64.b64encode(file).decode() for file in files]
    values: list[Any] = {
        "bare": texts,
        "address": [f"data:audio/wav;base64,{text}" for text in texts],
        "pair": [{"bytes": text, "path": None} for text in texts],
    }[form]
    rows = [{"audio": value, "text": f"word {i}"} for i, value in enumerate(values)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load_rows(build_recipe({"path": str(tmp_path / "rows.jsonl")}))["train"]
    for row, file in zip(loaded, files, strict=True):
        assert row["audio"] == {"bytes": file, "path": None}
        assert read_recording(row["audio"], 16_000).std() > 0.1
    if form != "pair":
        recipe = draft_and_load(tmp_path / "rows.jsonl", tiny_speech.save(tmp_path / "base"))
        assert (recipe.task.type, recipe.task.audio_column) == ("speech_recognition", "audio")


@pytest.mark.parametrize(
    "value",
    [
        {"bytes": "not base64!", "path": None}, {"bytes": [82, 73], "path": None},
        {"bytes": None, "path": 5}, {"bytes": 7, "path": "a.wav"},
        {"array": [0.1], "sampling_rate": 16_000},
    ],
)  # fmt: skip
def test_invalid_media_objects_are_row_errors(value: Json, tmp_path: Path) -> None:
    write(tmp_path / "1.wav", sound(1))
    rows = [{"audio": "1.wav", "text": "a"}, {"audio": value, "text": "b"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = build_recipe(
        {"path": str(tmp_path / "rows.jsonl")}, tiny_speech.save(tmp_path / "base")
    )  # fmt: skip
    with pytest.raises(LoraError) as raised:
        inspect_data(recipe)
    assert [(p.at, p.what) for p in raised.value.problems] == [
        ("rows.jsonl:2", "column `audio` does not hold a file")
    ]


# ------------------------------------------------------------------------- segments of recordings


def write_segments(folder: Path, column: str, files: list[str]) -> Path:
    for name in set(files):
        write(folder / name, sound(len(name), 0.9))
    lines = [f"{name},{0.2 * i:.1f},word {i}\n" for i, name in enumerate(files)]
    (folder / "parts.csv").write_text("".join([f"audio,{column},text\n", *lines]))
    return folder / "parts.csv"


@pytest.mark.parametrize("column", ["start", "start_time", "offset", "begin_ms", "segment_start"])
def test_init_rejects_segments_of_recordings(column: str, tmp_path: Path) -> None:
    base = tiny_speech.save(tmp_path / "base")
    table = write_segments(tmp_path, column, ["1.wav", "1.wav", "22.wav", "22.wav"])
    with pytest.raises(LoraError, match=f"parts of recordings, which begin where `{column}` says"):
        draft_and_load(table, base)


def test_a_start_column_is_fine_if_recordings_are_distinct(tmp_path: Path) -> None:
    base = tiny_speech.save(tmp_path / "base")
    table = write_segments(tmp_path, "start", [f"{'1' * i}.wav" for i in range(1, 5)])
    assert draft_and_load(table, base).task.text_column == "text"


def test_an_offset_in_a_file_of_its_own_is_a_part_of_it_too(tmp_path: Path) -> None:
    base = tiny_speech.save(tmp_path / "base")
    rows = [{"audio_filepath": f"{i}.wav", "offset": 0.0, "text": f"word {i}"} for i in range(8)]
    rows.append({"audio_filepath": "8.wav", "offset": 1.5, "text": "word 8"})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "train.json").write_text(lines)
    with pytest.raises(LoraError, match="parts of recordings, which begin where `offset` says"):
        draft_recipe(tmp_path / "train.json", str(base), tmp_path / "recipe.yaml")


def test_numbers_of_frames_are_no_transcripts(tmp_path: Path) -> None:
    base = tiny_speech.save(tmp_path / "base")
    lines = "".join(f"{i}.wav\t{8000 + i}\n" for i in range(8))
    (tmp_path / "train.tsv").write_text("path\tframes\n" + lines)
    with pytest.raises(LoraError, match="no column has the name of a transcript column"):
        draft_recipe(tmp_path / "train.tsv", str(base), tmp_path / "recipe.yaml")


def data_warnings(recipe: Recipe) -> str:
    task, data = inspect_data(recipe)
    return "\n".join(examine(task, data).warnings())


def test_conflicting_texts_of_a_recording_are_a_warning(tmp_path: Path) -> None:
    base = tiny_speech.save(tmp_path / "base")
    table = write_segments(tmp_path, "start", ["1.wav", "22.wav", "1.wav"])
    warnings = data_warnings(build_recipe({"path": str(table)}, base))
    assert (
        "1 train recording stands in several rows with different texts, such as 1.wav in "
        "parts.csv:2 and parts.csv:4: each row is heard as the whole recording"
    ) in warnings
    table.write_text(table.read_text().replace("word 2", "word 0"))  # now both texts are the same
    assert "different texts" not in data_warnings(build_recipe({"path": str(table)}, base))


def test_recordings_may_be_objects_with_only_a_path(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for i in range(20):
        write(folder / "wavs" / f"{i}.wav", sound(i, 0.3))
    rows = [{"audio": {"path": f"wavs/{i}.wav"}, "txt": f"word {i}", "language": "English"}
            for i in range(20)]  # fmt: skip
    (folder / "train.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = draft_and_load(folder / "train.json", tiny_speech.save(tmp_path / "base"))
    assert (recipe.task.audio_column, recipe.task.text_column) == ("audio", "txt")
    loaded = load_rows(recipe.with_values({"data.validation": None, "data.test": None}))["train"]
    for i, row in enumerate(loaded):
        expected = read_recording({"bytes": None, "path": str(folder / f"wavs/{i}.wav")}, 16_000)
        assert (read_recording(row["audio"], 16_000) == expected).all()
        assert row["txt"] == f"word {i}"
