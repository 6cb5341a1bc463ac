"""Error cases of speech synthesis: texts, speakers, recordings and vocoders."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import tiny_synthesis
from cases import CASES, Case, case
from transformers import BertConfig, FastSpeech2ConformerConfig
from world import Printed, World

AREA = "Texts said aloud"
ROW = {"text": "a film", "audio": "a.wav", "speaker": tiny_synthesis.speaker(0)}


def _recipe(world: World, rows: list[dict[str, Any]] | None = None, **task: Any) -> str:
    """Write a base, two rows with a recording each, and a recipe for them."""
    tiny_synthesis.save(world.folder / "base")
    for i in range(2):
        tiny_synthesis.row(i, world.folder)
    defaults = [{**ROW, "audio": "said0.wav"}, {**ROW, "text": "a story", "audio": "said1.wav"}]
    lines = [{**row, **changes} for row, changes in zip(defaults, rows or [{}, {}], strict=True)]
    world.write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in lines))
    speaker = {} if "speaker_embedding" in task else {"speaker_column": "speaker"}
    return world.recipe(
        model={"name": "./base"}, data={"path": "rows.jsonl"},
        task={"type": "text_to_speech", "max_length": ..., **speaker, **task},
        evaluate={"baseline": False},
    )  # fmt: skip


def _task(**task: Any) -> Callable[[World], Printed]:
    return lambda world: world.lora("validate", _recipe(world, **task))


def _row(**values: Any) -> Callable[[World], Printed]:
    """Return a run on rows in which some values of the second are replaced."""
    return lambda world: world.lora("validate", _recipe(world, [{}, values]))


def _speaker(value: Any) -> Callable[[World], Printed]:
    """Return a run with a speaker file that holds an array or bytes; None for no file."""

    def run(world: World) -> Printed:
        recipe = _recipe(world, speaker_embedding="me.npy")
        if isinstance(value, bytes):
            world.write("me.npy", value)
        elif value is not None:
            np.save(world.folder / "me.npy", value)
        return world.lora("validate", recipe)

    return run


def _config(name: str, **changes: Any) -> Callable[[World], Printed]:
    """Return a run with changes of a configuration file of the base or the vocoder."""

    def run(world: World) -> Printed:
        recipe = _recipe(world, vocoder="./vocoder")
        tiny_synthesis.save_vocoder(world.folder / "vocoder")
        file = world.folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}), encoding="utf-8")
        return world.lora("validate", recipe)

    return run


SIZE = tiny_synthesis.SPEAKER
_RUNS = {
    "nobody who speaks": lambda world: world.lora(
        "validate", _recipe(world), "--set", "task.speaker_column=null"
    ),
    "a speaker of each row, and one of all": _task(speaker_column="speaker", speaker_embedding="a"),
    "one column for two things": _task(text_column="audio"),
    "a speaker that is blank": _row(speaker=None),
    "a speaker of too few numbers": _row(speaker=[1.0, 2.0]),
    "a speaker by name": _row(speaker="george"),
    "a speaker of zeros": _row(speaker=[0.0] * SIZE),
    "a text that is blank": _row(text=" "),
    "a text that is too long": _row(text="a film " * 20),
    "a recording that is not there": _row(audio="said7.wav"),
    "no file of the speaker": _speaker(None),
    "a file of the speaker that is no array": _speaker(b"0.1 0.2 0.3"),
    "a file of objects": _speaker(np.array([{}], dtype=object)),
    "a file of words": _speaker(np.array(["a", "b"])),
    "a file of several speakers": _speaker(np.ones((2, SIZE))),
    "a file of another length": _speaker(np.ones(512)),
    "a vocoder that is not there": _task(vocoder="./voice"),
    "a vocoder of other spectrograms": _config("vocoder/config.json", model_in_dim=80),
    "a vocoder of another rate": _config("vocoder/config.json", sampling_rate=22_050),
    "another feature extractor": _config("base/preprocessor_config.json", num_mel_bins=80),
}  # fmt: skip
CASES += [Case(AREA, name, run) for name, run in _RUNS.items()]


@case(AREA, "a recording that is too long")
def _long(world: World) -> Printed:
    recipe = _recipe(world, [{}, {"audio": "said9.wav"}])
    tiny_synthesis.row(9, world.folder, seconds=2.5)
    return world.lora("validate", recipe)


@case(AREA, "a vocoder that is another model")
def _no_vocoder(world: World) -> Printed:
    recipe = _recipe(world, vocoder="./vocoder")
    (world.folder / "vocoder").mkdir()
    BertConfig().save_pretrained(world.folder / "vocoder")
    return world.lora("validate", recipe)


@case(AREA, "a model that speaks otherwise")
def _other_speech(world: World) -> Printed:
    recipe = _recipe(world)
    FastSpeech2ConformerConfig().save_pretrained(world.folder / "base")
    return world.lora("validate", recipe)


@case(AREA, "a model of texts")
def _texts(world: World) -> Printed:
    _recipe(world)
    task = {"type": "text_to_speech", "speaker_embedding": "zeros", "max_length": ...}
    return world.lora(
        "validate", world.recipe("llama", task=task, data={"path": "rows.jsonl"})
    )  # fmt: skip


def _draft(lines: list[dict[str, Any]], *flags: str) -> Callable[[World], Printed]:
    """Return a run of `lora init` on rows."""

    def run(world: World) -> Printed:
        _recipe(world)
        world.write("new.jsonl", "".join(json.dumps(row) + "\n" for row in lines * 12))
        return world.lora("init", "new.jsonl", "--model", "./base", "-o", "new.yaml", *flags)

    return run


_DRAFTS = {
    "no recordings to learn to speak from": _draft([{"text": "a film", "more": "a story"}]),
    "no column of what is said": _draft(
        [{"a": "a film", "b": "a story", "audio": "said0.wav", "speaker": ROW["speaker"]}]
    ),
    "no column of who speaks": _draft([{"text": "a film", "audio": "said0.wav"}]),
}
CASES += [Case(AREA, name, run) for name, run in _DRAFTS.items()]


@case(AREA, "recordings without texts to learn to speak from")
def _no_texts(world: World) -> Printed:
    _recipe(world)
    for i in range(3):
        tiny_synthesis.row(i, world.folder / "sounds")
    return world.lora("init", "sounds", "--model", "./base", "-o", "new.yaml")


@case(AREA, "one text for a model of several speakers")
def _one_text(world: World) -> Printed:
    recipe = _recipe(world)
    assert world.lora("train", recipe, "--set", "train.max_steps=1", "-o", "out").code == 0
    return world.lora("predict", "--adapter", "out", "a film")
