"""Error cases of speech recognition: recordings, transcripts and models."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import tiny_ctc
import tiny_speech
from cases import CASES, Case, case
from tiny_speech import encoded, sound
from transformers import ParakeetCTCConfig
from world import Printed, World

AREA = "Speech"


def _recipe(world: World, languages: bool = False, **task: Any) -> str:
    """Write a base, two recordings with texts, and a recipe for them."""
    if not (world.folder / "base").exists():
        tiny_speech.save(world.folder / "base", languages)
    if not (world.folder / "speech").exists():
        tiny_speech.write_folder(world.folder / "speech", {"train": 2})
    return world.recipe(
        model={"name": "./base"}, data={"path": "speech"},
        task={"type": "speech_recognition", "max_length": ..., **task},
        evaluate={"baseline": False, "generation": {"max_new_tokens": 4}},
    )  # fmt: skip


def _validate(languages: bool = False, **task: Any) -> Callable[[World], Printed]:
    return lambda world: world.lora("validate", _recipe(world, languages, **task))


def _file(content: bytes, name: str = "0.wav") -> Callable[[World], Printed]:
    """Return a run on a folder in which one file is replaced."""

    def run(world: World) -> Printed:
        recipe = _recipe(world)
        (world.folder / "speech/train" / name).write_bytes(content)
        return world.lora("validate", recipe)

    return run


def _floats(samples: Any) -> bytes:
    return encoded(np.asarray(samples, dtype=np.float32), subtype="FLOAT")


OPPOSITE_CHANNELS = np.stack([sound(1), -sound(1)], axis=1)
_RUNS = {
    "a recording that is cut off": _file(encoded(sound(1))[:4_000]),
    "an mp3 that is cut off": _file(encoded(sound(1, 1.0), format="MP3")[:1_000]),
    "a flac that is damaged": _file(encoded(sound(1), format="FLAC")[:2_000]),
    "an empty file": _file(b""),
    "a recording without samples": _file(_floats(np.zeros(0))),
    "no recording": _file(b"not found" * 50),
    "a format that is not read": _file(encoded(sound(1), format="W64")),
    "silence": _file(_floats(np.zeros(4_000))),
    "channels that cancel out": _file(_floats(OPPOSITE_CHANNELS)),
    "samples that are no numbers": _file(_floats([0.1, np.nan, 0.2])),
    "a text that is blank": _file(b" \n", "0.txt"),
    "a text in another encoding": _file(b"caf\xe9", "0.txt"),
    "a text that is too long": _file(b"zq " * 40, "0.txt"),
    "one column for both sides": _validate(text_column="audio"),
    "a language for a model of English": _validate(language="en"),
    "no language for a model of several": _validate(True),
    "a language that there is not": _validate(True, language="germn"),
    "a language that the tokenizer does not have": _validate(True, language="fr"),
}  # fmt: skip
CASES += [Case(AREA, name, run) for name, run in _RUNS.items()]


def _ctc(text: str = "", changes: Any = None, **task: Any) -> Callable[[World], Printed]:
    """Return a validation with a CTC model, another first text and a changed configuration."""

    def run(world: World) -> Printed:
        tiny_ctc.save(world.folder / "base", letters="ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
        recipe = _recipe(world, **task)
        if text:
            world.write("speech/train/0.txt", text)
        file = world.folder / "base/config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **(changes or {})}))
        return world.lora("validate", recipe)

    return run


_CTC_RUNS = {
    "a letter that the vocabulary lacks": _ctc("größe"),
    "a text without letters": _ctc("..."),
    "a text of too many letters": _ctc("a film " * 20),
    "a language, where letters are written": _ctc(language="de"),
    "another blank": _ctc(changes={"pad_token_id": 3}),
    "weights for each language": _ctc(changes={"adapter_attn_dim": 16}),
    "a decoder that the model does not have": _ctc(decoder="attention"),
}
CASES += [Case(AREA, name, run) for name, run in _CTC_RUNS.items()]


def _new_letters(text: str = "", data: Any = None, **task: Any) -> Callable[[World], Printed]:
    """Return a validation with a base that was pretrained on recordings alone."""

    def run(world: World) -> Printed:
        tiny_ctc.save_pretrained(world.folder / "base")
        _recipe(world)
        if text:
            world.write("speech/train/0.txt", text)
        recipe = world.recipe(
            model={"name": "./base"}, data={"path": "speech", **(data or {})},
            task={"type": "speech_recognition", "max_length": ..., **task},
        )  # fmt: skip
        return world.lora("validate", recipe)

    return run


_NEW_VOCABULARY_RUNS = {
    "a transcript without a letter, for a new vocabulary": _new_letters("...\n"),
    "letters with a space": _new_letters(letters="ab c"),
    "a new vocabulary of streamed transcripts": _new_letters(data={"streaming": True}),
    "letters for Whisper": _validate(letters="abc"),
}
CASES += [Case(AREA, name, run) for name, run in _NEW_VOCABULARY_RUNS.items()]


@case(AREA, "a tokenizer that is not one of letters")
def _words(world: World) -> Printed:
    tiny_ctc.save(world.folder / "base")
    recipe = _recipe(world)
    (world.folder / "base/tokenizer_config.json").unlink()
    tiny_speech.tokenizer().save_pretrained(world.folder / "base")
    return world.lora("validate", recipe)


@case(AREA, "a model with CTC that is not known")
def _unknown(world: World) -> Printed:
    recipe = _recipe(world)
    ParakeetCTCConfig().save_pretrained(world.folder / "base")
    return world.lora("validate", recipe)


@case(AREA, "a model of texts")
def _texts(world: World) -> Printed:
    _recipe(world)
    return world.lora(
        "validate",
        world.recipe(
            "llama", task={"type": "speech_recognition", "max_length": ...},
            data={"path": "speech"},
        ),
    )  # fmt: skip


@case(AREA, "a feature extractor of another model")
def _extractor(world: World) -> Printed:
    recipe = _recipe(world)
    file = world.folder / "base/preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "feature_size": 80}))
    return world.lora("validate", recipe)


@case(AREA, "recordings that are all too long to train on")
def _long(world: World) -> Printed:
    tiny_speech.write_folder(world.folder / "speech", {"train": 2}, seconds=1.3)
    return world.lora("validate", _recipe(world))


@case(AREA, "a table that names a file which is not there")
def _missing(world: World) -> Printed:
    _recipe(world)
    world.write("speech/rows.csv", "audio,text\ntrain/0.wav,a\ntrain/9.wav,b\n")
    recipe = world.recipe(
        model={"name": "./base"}, data={"path": "speech/rows.csv"},
        task={"type": "speech_recognition", "max_length": ...},
    )  # fmt: skip
    return world.lora("validate", recipe)


@case("lora init", "recordings without texts")
def _without_texts(world: World) -> Printed:
    _recipe(world)
    for file in (world.folder / "speech").rglob("*.txt"):
        file.unlink()
    return world.lora("init", "speech", "--model", "./base", "-o", "new.yaml")


@case("lora init", "recordings for a model of texts")
def _deaf(world: World) -> Printed:
    _recipe(world)
    return world.lora("init", "speech", "--model", "../bases/llama", "-o", "new.yaml")


@case("lora init", "a table without recordings for a model that hears")
def _no_sound(world: World) -> Printed:
    _recipe(world)
    world.write("rows.csv", "text,label\na,x\nb,y\n")
    return world.lora("init", "rows.csv", "--model", "./base", "-o", "new.yaml")


@case("lora init", "recordings whose text has no name that says so")
def _unnamed(world: World) -> Printed:
    _recipe(world)
    lines = [f"speech/train/{i}.wav,{i},{i}\n" for i in range(2)]
    world.write("rows.csv", "".join(["audio,one,two\n", *lines]))
    return world.lora("init", "rows.csv", "--model", "./base", "-o", "new.yaml")


@case("lora init", "rows that are parts of recordings")
def _parts(world: World) -> Printed:
    _recipe(world)
    lines = [f"speech/train/0.wav,{i},{i + 1},a word {i}\n" for i in range(2)]
    world.write("rows.csv", "".join(["audio,start,end,text\n", *lines]))
    return world.lora("init", "rows.csv", "--model", "./base", "-o", "new.yaml")


@case("lora init", "a language that cannot be guessed")
def _which_language(world: World) -> Printed:
    _recipe(world, languages=True)
    lines = [f"speech/train/{i}.wav,größer {i}\n" for i in range(2)]
    world.write("rows.csv", "".join(["audio,text\n", *lines]))
    return world.lora("init", "rows.csv", "--model", "./base", "-o", "new.yaml")
