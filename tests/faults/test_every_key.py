"""Every key of a recipe is read: when it changes, the run, what it leaves or its message differs.

A key that nothing reads is the quietest of faults: the recipe says one thing and the run does
another. So each key stands in `CHANGES` with two settings and what must differ between them, and a
key that is added to the recipe without an entry here fails.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import datasets
import numpy as np
import pytest
import tiny
import tiny_detectors
import tiny_diffusion
import tiny_embedders
import tiny_pictures
import tiny_speech
import tiny_synthesis
import torch
from accelerate.state import AcceleratorState
from runs import lines, without_times
from safetensors.torch import load_file
from transformers.models.roberta.modeling_roberta import RobertaSelfAttention
from world import Printed, World

from lora_cli.errors import LoraError
from lora_cli.preprocessing.encode import load_data
from lora_cli.recipe import TASKS, Recipe
from lora_cli.recipe.spec import MixedSpec, SourceSpec
from lora_cli.recipe.spec.section import Section
from lora_cli.tasks import build_task
from lora_cli.tasks.contract import prepared_for_evaluation
from lora_cli.tasks.sequence_classification import SequenceClassification
from lora_cli.training.batches import prepared_for

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
Settings = dict[str, Any]

# ------------------------------------------------------------------------------------ all keys


def keys(section: type[Section] = Recipe, prefix: str = "") -> Iterator[str]:
    """Yield every key; those of a task begin with its type."""
    for name, field in section.model_fields.items():
        if section is MixedSpec and name in SourceSpec.model_fields:
            continue  # a set reads these as the section of one data set does
        name = field.alias or name
        inner = list(sections_in(field.annotation))
        if not inner or _may_be_a_word(field.annotation):
            yield f"{prefix}{name}"
        for found in inner:
            kind = found.model_fields.get("type")
            of_task = name == "task" and kind is not None
            part = get_args(kind.annotation)[0] if of_task and kind else f"{prefix}{name}"
            yield from keys(found, f"{part}.")


def _may_be_a_word(annotation: Any) -> bool:
    if get_origin(annotation) is dict:
        return False
    return annotation is str or any(_may_be_a_word(part) for part in get_args(annotation))


def sections_in(annotation: Any) -> Iterator[type[Section]]:
    """Yield the sections that a value may be."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    elif get_origin(annotation) is not Literal:
        for argument in get_args(annotation):
            yield from sections_in(argument)


# ----------------------------------------------------------------------- what a run leaves behind


@dataclass(frozen=True)
class Left:
    """What a command printed, and the folder that it wrote."""

    printed: Printed
    out: Path
    used: dict[str, int]
    """What leaves no trace in files: forward passes, workers, the largest batch evaluated."""


def adapter(left: Left) -> Any:
    file = next(f for f in (left.out / "adapter_model.safetensors", left.out / "model.safetensors")
                if f.exists())  # fmt: skip
    return {name: tensor.tolist() for name, tensor in load_file(file).items()}


def order(left: Left) -> Any:
    return (left.out / "samples.jsonl").read_text()


def losses(left: Left) -> Any:
    return [without_times(record) for record in lines(left.out / "metrics.jsonl")]


def report(left: Left) -> Any:
    value = json.loads((left.out / "report.json").read_text())
    for key in ("created", "command", "versions"):
        del value[key]
    for key in (
        "seconds",
        "examples_per_s",
        "tokens_per_s",
        "pictures_per_s",
        "seconds_per_s",
        "frames_per_s",
        "peak_memory_bytes",
    ):
        value["training"].pop(key, None)
    for key in [key for key in value["training"] if key.startswith("gpu_")]:
        del value["training"][key]
    return value


def results(left: Left) -> Any:
    return report(left)["metrics"]


def data(left: Left) -> Any:
    return report(left)["data"]


def config(left: Left) -> Any:
    return json.loads((left.out / "adapter_config.json").read_text())


def files(left: Left) -> Any:
    return sorted(path.relative_to(left.out).as_posix() for path in left.out.rglob("*"))


def modules(left: Left) -> Any:
    return json.loads((left.out / "modules.json").read_text())


def predictions(left: Left) -> Any:
    return (left.out / "predictions" / "validation.jsonl").read_text()


def message(left: Left) -> Any:
    return left.printed.code, left.printed.message if left.printed.code else ""


def answer(left: Left) -> Any:
    assert left.printed.code == 0, left.printed.err
    return left.printed.out


# ------------------------------------------------------------------------------- the two settings


@dataclass(frozen=True)
class Change:
    """A key's two settings, and what differs.

    Args:
        watch: Reads what must differ from what the command left.
        settings: The two values; `...` leaves the key out.
        kind: Which recipe the settings are laid over: a key of `KINDS`.
        also: Other keys, the same in both.
        command: What is run instead of `lora train`.
        key: The key to set, where its name in the table is not it.
    """

    watch: Callable[[Left], Any]
    settings: tuple[Any, Any]
    kind: str = "labels"
    also: Settings = dataclasses.field(default_factory=dict)
    command: Callable[[World, list[str]], Printed] | None = None
    key: str | None = None


WORDS = ["warm", "dull", "great", "slow", "funny", "long", "fine", "flat"]
TRAIN = [
    {"text": f"a {word} film {'and so on ' * (i % 3)}".strip(), "other": f"{word} {i}",
     "label": "bad" if i % 2 else "good", "word": "lo" if i % 3 else "hi", "number": i / 4,
     "comma": f"{i},5", "tags": "good;bad" if i % 3 else "good", "is_bad": i % 2,
     "is_good": 1 - i % 2, "is_odd": i % 2, "prompt": f"the {word}", "answer": f"film {i}",
     "shouted": f"THE {word}!", "who": f"p{i // 3}", "turns": [
         {"role": "user", "content": f"a {word}?"}, {"role": "assistant", "content": f"yes {i}"},
         {"role": "user", "content": "why?"}, {"role": "assistant", "content": f"so {word}"}],
     "talk": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": f"so {word}"}],
     "said": [{"from": "human", "value": f"a {word}?"}, {"from": "gpt", "value": "yes"}],
     "words": ["a", word, "film"], "others": ["so", word, f"{i}"], "odd": ["a", "</s>", word],
     "ner": ["O", "B-A", "O"], "kinds": ["B-A", "O", "O"], "ids": [0, 1, 0], "alike": f"a {word}",
     "shot": f"shots/{i}.png", "view": f"shots/{i + 20}.png",
     "listed": f"{word}, film, {i}, long, good",
     "sound": f"sounds/{i}.wav", "noise": f"sounds/{i + 20}.wav",
     "speaker": tiny_synthesis.speaker(i % 2), "speaker_2": tiny_synthesis.speaker(i % 2 + 2),
     "things": {"bbox": [[2, 1, 6, 9]], "category": ["bad" if i % 2 else "good"]},
     "wide": {"bbox": [[9, 1, 60, 9]], "category": ["bad" if i % 2 else "good"]},
     "spans": [[2, 2 + len(word), "A"]], "marks": [[0, 1, "A"]]}
    for i, word in enumerate(WORDS * 2)
]  # fmt: skip
DEV = [{**row, "text": f"{row['text']} indeed", "other": f"{row['other']} too"}
       for row in TRAIN[:6]]  # fmt: skip
COMMON: Settings = {
    "data": {"train": "train.jsonl", "validation": "dev.jsonl",
             "check": {"max_overlap": 1.0, "near_duplicates": False}},
    "train": {"max_steps": 2, "micro_batch_size": 2, "log_every_steps": 1,
              "optimizer": {"learning_rate": 0.01}},
    "evaluate": {"baseline": False},
}  # fmt: skip
SHORT = {"baseline": False, "generation": {"max_new_tokens": 4}}  # samples take most of a run
WIDE = {"task.resolution": 24, "task.upscale": True}
CLASS = {"task.prior.path": "shots", "task.prior.caption": "a film", "task.prior.count": 0}
KINDS: dict[str, Settings] = {
    "labels": {
        "model": {"name": "../bases/encoder"},
        "task": {"type": "sequence_classification", "labels": ["bad", "good"]},
    },
    "tags": {
        "model": {"name": "../bases/encoder"},
        "task": {"type": "sequence_classification", "problem": "multi_label",
                 "label_column": "tags", "labels": ["bad", "good"], "label_separator": ";"},
    },
    "number": {
        "model": {"name": "../bases/encoder"},
        "task": {"type": "sequence_classification", "problem": "regression",
                 "label_column": "number"},
    },
    "entities": {
        "model": {"name": "../bases/encoder"},
        "task": {"type": "token_classification", "tokens_column": "words", "tags_column": "ner",
                 "labels": ["O", "B-A", "I-A"]},
    },
    "spans": {
        "model": {"name": "../bases/encoder"},
        "task": {"type": "token_classification", "text_column": "text", "spans_column": "marks"},
    },
    "pictures": {
        "model": {"name": "../bases/vit"},
        "task": {"type": "image_classification", "image_column": "shot",
                 "labels": ["bad", "good"]},
    },
    "scenes": {
        "model": {"name": "../bases/yolos"},
        "task": {"type": "object_detection", "image_column": "shot", "objects_column": "things",
                 "labels": ["bad", "good"]},
    },
    "speech": {
        "model": {"name": "../bases/whisper"},
        "task": {"type": "speech_recognition", "audio_column": "sound", "text_column": "prompt",
                 "language": "de"},
        "evaluate": SHORT,
    },
    "synthesis": {
        "model": {"name": "../bases/speecht5"},
        "task": {"type": "text_to_speech", "audio_column": "sound", "text_column": "prompt",
                 "speaker_column": "speaker"},
        "evaluate": {"baseline": False},
    },
    "drawing": {
        "model": {"name": "../bases/diffusion"},
        "task": {"type": "text_to_image", "image_column": "shot", "caption_column": "prompt",
                 "resolution": 8, "validation_draws": 1},
        "evaluate": {"baseline": False, "drawing": {"steps": 1}},
    },
    "flow": {
        "model": {"name": "../bases/sd3"},
        "task": {"type": "text_to_image", "image_column": "shot", "caption_column": "prompt",
                 "resolution": 8, "validation_draws": 1},
        "evaluate": {"baseline": False, "drawing": {"steps": 1}},
    },
    "flux": {
        "model": {"name": "../bases/flux"},
        "task": {"type": "text_to_image", "image_column": "shot", "caption_column": "prompt",
                 "resolution": 8, "validation_draws": 1},
        "evaluate": {"baseline": False, "drawing": {"steps": 1}},
    },
    "search": {
        "model": {"name": "../bases/embedder"},
        "task": {"type": "text_embedding", "anchor_column": "prompt",
                 "positive_column": "answer"},
    },
    "translation": {
        "model": {"name": "../bases/bart"},
        "task": {"type": "seq2seq_lm", "source_column": "prompt", "target_column": "answer"},
        "evaluate": SHORT,
    },
    "text": {
        "model": {"name": "../bases/llama"},
        "task": {"type": "causal_lm", "text_column": "text"},
        "evaluate": SHORT,
    },
    "pair": {
        "model": {"name": "../bases/llama"},
        "task": {"type": "causal_lm", "prompt_column": "prompt", "completion_column": "answer"},
        "evaluate": SHORT,
    },
    "chat": {
        "model": {"name": "../bases/llama"},
        "task": {"type": "causal_lm", "messages_column": "turns", "chat_template": "chat.jinja"},
        "evaluate": SHORT,
    },
}  # fmt: skip


def train(world: World, options: list[str]) -> Printed:
    """Train as the recipe says."""
    return world.lora("train", "recipe.yaml", *options)


def said(world: World, options: list[str]) -> Printed:
    """Let the adapter of a run go on from a few words."""
    assert world.lora("train", "recipe.yaml", "-o", "out").code == 0
    return world.lora("predict", "--adapter", "out", "the warm", *options[:-2])


def said_aloud(world: World, options: list[str]) -> Printed:
    """Let the adapter of a run say a text, and tell which file it writes."""
    assert train(world, options).code == 0
    (world.folder / "asked.jsonl").write_text(json.dumps(TRAIN[0]), encoding="utf-8")
    answer = ["--input", "asked.jsonl", "--output", "answer.jsonl"]
    assert world.lora("predict", "--adapter", "out", *answer).code == 0
    files = sorted(file.suffix for file in world.folder.glob("answer_recordings/*"))
    return Printed(0, f"{files}", "")


BASES: dict[str, Any] = {}
"""Models that were loaded once: nothing here changes them."""


def opened(world: World, options: list[str]) -> tuple[Any, Any]:
    """Return the task of a recipe for diffusion models, and its base."""
    given = [option for option in options if option not in ("-o", "out")]
    task = build_task(world.load("recipe.yaml", *given[1::2]))
    task.load_processor()
    task.complete_data(torch.device("cpu"))
    name = task.recipe.model.name
    if name not in BASES:
        BASES[name] = task.load_model(torch.device("cpu"))[0]
    return task, BASES[name]


def computed(world: World, options: list[str]) -> Printed:
    """Compute the losses of some rows as in training and in evaluation, without a run."""
    try:
        task: Any
        task, model = opened(world, options)
        data = load_data(task, ("train", "validation"))
    except LoraError as error:
        return Printed(error.exit_code, "", f"error: {error}")
    lines = [str(task.frozen)]
    for name, split in data.items():
        first = [split.examples[i] for i in range(3)]
        if name == "train":
            ready = [prepared_for(task, one, 0, 1) for one in first]
        else:
            ready = [prepared_for_evaluation(task, one) for one in first]
        with torch.no_grad():
            lines.append(f"{len(split)} {float(task.loss(model, task.collate(ready)))}")
    return Printed(0, "\n".join(lines), "")


def drawn(world: World, options: list[str]) -> Printed:
    """Draw a picture, without a run."""
    task, model = opened(world, options)
    (picture,) = task.draw_pictures(model, ["the warm"])
    return Printed(0, str(picture.tobytes()), "")


def resumed(world: World, options: list[str]) -> Printed:
    """Run, then go on with another learning rate."""
    assert world.lora("train", "recipe.yaml", "-o", "out").code == 0
    (world.folder / "out/report.json").unlink()
    options = [*options, "--resume", "--set", "train.optimizer.learning_rate=0.5"]
    return train(world, options)


def on_another_base(world: World, options: list[str]) -> Printed:
    """Start from an adapter, on a base that is not its own."""
    assert world.lora("train", "recipe.yaml", "-o", "first").code == 0
    options = [*options, "--set", "adapter.from=first", "--set", "model.name=../bases/other"]
    return train(world, options)


def mirrored(world: World, options: list[str]) -> Printed:
    """Run, and look at what stands in the mirror's folder."""
    printed = train(world, options)
    found = sorted(p.name for p in world.folder.glob("mirror/*"))
    return dataclasses.replace(printed, out=f"{bool(found)}")


def best(left: Left) -> Any:
    return report(left)["best"]


TEXT_FILE = {"train": "lines.txt", "validation": None}
CSV = {"data.train": "train.csv", "data.validation": None}
TAUGHT = {"train.distill.teacher": "../bases/adapter"}
MANY = {"train.max_steps": 6, "evaluate.every_steps": 1}
CHANGES: dict[str, Change] = {
    "format": Change(message, (1, 2)),
    "model.name": Change(losses, ("../bases/encoder", "../bases/other")),
    "model.revision": Change(config, ("main", "v2")),
    "model.dtype": Change(losses, ("float32", "bfloat16"), also={"train.precision": "bf16"}),
    "model.quantization": Change(losses, (None, "int8")),
    "model.add_tokens": Change(report, ([], ["<a>"])),
    "model.attention": Change(message, ("sdpa", "flash_attention_2")),
    "model.trust_remote_code": Change(
        message, (False, True), also={"evaluate.metrics": ["not_a_known_metric"]}
    ),
    "model.allow_other_base": Change(message, (False, True), command=on_another_base),
    # ------------------------------------------------------------------------------------- task
    "sequence_classification.type": Change(
        message, ("sequence_classification", "causal_lm"), also={"task.labels": ...}
    ),
    "sequence_classification.text_column": Change(losses, ("text", "other")),
    "sequence_classification.text_pair_column": Change(losses, (None, "other")),
    "sequence_classification.label_column": Change(
        data, ("label", "word"), also={"task.labels": None}
    ),
    "sequence_classification.label_columns": Change(
        losses, (["is_bad", "is_good"], ["is_good", "is_odd"])
    ),
    "sequence_classification.labels": Change(losses, (["bad", "good"], ["good", "bad"])),
    "sequence_classification.problem": Change(
        losses, ("single_label", "multi_label"), also={"task.label_columns": ["is_bad", "is_good"]}
    ),
    "sequence_classification.label_separator": Change(message, (";", "|"), "tags"),
    "sequence_classification.class_weights": Change(losses, (None, {"bad": 3.0})),
    "sequence_classification.label_smoothing": Change(losses, (0.0, 0.2)),
    "sequence_classification.max_length": Change(losses, (64, 5)),
    "sequence_classification.truncate": Change(losses, ("right", "left"),
        also={"task.max_length": 5}),
    "sequence_classification.split_special_tokens": Change(losses, (False, True),
        also={"data.train": "tokens.jsonl"}),
    "sequence_classification.skip_labels": Change(message, ([], ["-"]),
        also={"data.train": "marked.jsonl"}),
    "sequence_classification.pad_token": Change(message, ("<pad>", "<nothing>")),
    "token_classification.type": Change(
        message, ("token_classification", "causal_lm"), "entities", {"task.labels": ...}
    ),
    "token_classification.tokens_column": Change(losses, ("words", "others"), "entities"),
    "token_classification.tags_column": Change(losses, ("ner", "kinds"), "entities"),
    "token_classification.scheme": Change(message, ("iob2", "iobes"), "entities"),
    "token_classification.text_column": Change(losses, ("text", "alike"), "spans"),
    "token_classification.spans_column": Change(losses, ("marks", "spans"), "spans"),
    "token_classification.labels": Change(
        losses, (["O", "B-A", "I-A"], ["B-A", "O", "I-A"]), "entities"
    ),
    "token_classification.tag_names": Change(
        losses, (["O", "B-A", "I-A"], ["B-A", "O", "I-A"]), "entities", {"task.tags_column": "ids"}
    ),
    "token_classification.word_separator": Change(losses, (" ", "_"), "entities"),
    "token_classification.max_length": Change(losses, (64, 4), "entities"),
    "token_classification.split_special_tokens": Change(
        losses, (False, True), "entities", {"task.tokens_column": "odd"}
    ),
    "image_classification.type": Change(
        message, ("image_classification", "causal_lm"), "pictures", {"task.labels": ...}
    ),
    "image_classification.image_column": Change(losses, ("shot", "view"), "pictures"),
    "image_classification.augmentation.crop": Change(losses, (False, True), "pictures"),
    "image_classification.augmentation.smallest_crop": Change(
        losses, (0.25, 0.9), "pictures", {"task.augmentation.crop": True}
    ),
    "image_classification.augmentation.flip": Change(losses, (False, True), "pictures"),
    "image_classification.label_column": Change(
        data, ("label", "word"), "pictures", {"task.labels": None}
    ),
    "image_classification.label_columns": Change(
        losses, (["is_bad", "is_good"], ["is_good", "is_odd"]), "pictures"
    ),
    "image_classification.labels": Change(
        losses, (["bad", "good"], ["good", "bad"]), "pictures"
    ),
    "image_classification.problem": Change(
        losses, ("single_label", "multi_label"), "pictures",
        {"task.label_columns": ["is_bad", "is_good"]},
    ),
    "image_classification.label_separator": Change(
        message, (";", "|"), "pictures",
        {"task.problem": "multi_label", "task.label_column": "tags"},
    ),
    "image_classification.class_weights": Change(losses, (None, {"bad": 3.0}), "pictures"),
    "image_classification.label_smoothing": Change(losses, (0.0, 0.2), "pictures"),
    "image_classification.skip_labels": Change(
        message, ([], ["-"]), "pictures", {"data.train": "marked.jsonl"}
    ),
    "object_detection.type": Change(
        message, ("object_detection", "causal_lm"), "scenes", {"task.labels": ...}
    ),
    "object_detection.image_column": Change(losses, ("shot", "view"), "scenes"),
    "object_detection.objects_column": Change(losses, ("things", "wide"), "scenes",
                                              {"task.clip_boxes": True}),
    "object_detection.labels": Change(losses, (["bad", "good"], ["good", "bad"]), "scenes"),
    "object_detection.box_format": Change(losses, ("xywh", "xyxy"), "scenes"),
    "object_detection.clip_boxes": Change(
        message, (False, True), "scenes", {"task.objects_column": "wide"}
    ),
    "object_detection.image_size": Change(losses, (None, 48), "scenes"),
    "object_detection.threshold": Change(predictions, (0.0, 0.999), "scenes"),
    "object_detection.augmentation.crop": Change(losses, (False, True), "scenes"),
    "object_detection.augmentation.smallest_crop": Change(
        losses, (0.3, 0.9), "scenes", {"task.augmentation.crop": True}
    ),
    "object_detection.augmentation.flip": Change(losses, (False, True), "scenes"),
    "causal_lm.type": Change(message, ("causal_lm", "sequence_classification"), "pair"),
    "causal_lm.text_column": Change(losses, ("text", "other"), "text"),
    "causal_lm.prompt_column": Change(losses, ("prompt", "other"), "pair"),
    "causal_lm.completion_column": Change(losses, ("answer", "other"), "pair"),
    "causal_lm.separator": Change(losses, ("", " : "), "pair"),
    "causal_lm.messages_column": Change(losses, ("turns", "talk"), "chat"),
    "causal_lm.format": Change(
        message, ("sharegpt", "openai"), "chat", {"task.messages_column": "said"}
    ),
    "causal_lm.chat_template": Change(losses, ("chat.jinja", "other.jinja"), "chat"),
    "causal_lm.train_on": Change(losses, ("assistant", "last"), "chat"),
    "causal_lm.truncate": Change(losses, ("right", "left"), "pair", {"task.max_length": 9}),
    "causal_lm.split_special_tokens": Change(losses, (False, True), "text",
        {"data.train": "tokens.jsonl"}),
    "causal_lm.pad_token": Change(message, ("<pad>", "<nothing>"), "pair"),
    "causal_lm.max_length": Change(data, (64, 6), "text"),
    "causal_lm.answer_pattern": Change(results, (None, "film (.*)"), "pair"),
    "speech_recognition.type": Change(
        message, ("speech_recognition", "causal_lm"), "speech",
        {"task.language": ..., "task.audio_column": ...},
    ),
    "speech_recognition.audio_column": Change(losses, ("sound", "noise"), "speech"),
    "speech_recognition.text_column": Change(losses, ("prompt", "other"), "speech"),
    "speech_recognition.decoder": Change(message, ("attention", "ctc"), "speech"),
    "speech_recognition.language": Change(losses, ("de", "zh"), "speech"),
    "speech_recognition.task": Change(losses, ("transcribe", "translate"), "speech"),
    "speech_recognition.letters": Change(message, (None, "abc"), "speech"),
    "speech_recognition.long_audio": Change(
        data, ("silence", "drop"), "speech", {"data.validation": "long.jsonl"}
    ),
    "speech_recognition.normalizer": Change(
        predictions, ("basic", "none"), "speech", {"task.text_column": "shouted"}
    ),
    "text_to_speech.type": Change(
        message, ("text_to_speech", "causal_lm"), "synthesis",
        {"task.audio_column": ..., "task.text_column": ..., "task.speaker_column": ...},
    ),
    "text_to_speech.audio_column": Change(losses, ("sound", "noise"), "synthesis"),
    "text_to_speech.text_column": Change(losses, ("prompt", "other"), "synthesis"),
    "text_to_speech.speaker_column": Change(losses, ("speaker", "speaker_2"), "synthesis"),
    "text_to_speech.speaker_embedding": Change(
        losses, ("zeros", "me.npy"), "synthesis", {"task.speaker_column": ...}
    ),
    "text_to_speech.vocoder": Change(
        answer, (None, "../bases/vocoder"), "synthesis", command=said_aloud
    ),
    "text_to_speech.stop_threshold": Change(
        results, (0.5, 9.0), "synthesis", {"evaluate.metrics": ["length_error"]}
    ),
    "text_to_speech.longest_ratio": Change(
        results, (20.0, 0.1), "synthesis",
        {"evaluate.metrics": ["length_error"], "task.stop_threshold": 9.0},
    ),
    "text_to_image.type": Change(
        message, ("text_to_image", "causal_lm"), "drawing",
        {"task.image_column": ..., "task.caption_column": ..., "task.resolution": ...,
         "task.validation_draws": ...},
    ),
    **{
        f"text_to_image.{key}": Change(answer, settings, "drawing", also, computed)
        for key, settings, also in (
            ("image_column", ("shot", "view"), {}),
            ("caption_column", ("prompt", "other"), {}),
            ("caption", (None, "a film"), {"task.caption_column": "text"}),
            ("resolution", (8, 16), {"task.upscale": True}),
            ("aspect_ratios", (False, True), WIDE),
            ("max_aspect_ratio", (1.0, 2.0), {**WIDE, "task.aspect_ratios": True}),
            ("crop", ("center", "random"), {}),
            ("flip", (False, True), {}),
            ("caption_dropout", (0.0, 0.9), {}),
            ("shuffle_tags", (False, True), {"task.caption_column": "listed"}),
            ("keep_tags", (0, 3),
             {"task.caption_column": "listed", "task.shuffle_tags": True}),
            ("latents", ("sample", "mean"), {}),
            ("snr_gamma", (None, 0.5), {}),
            ("noise_offset", (0.0, 0.5), {}),
            ("validation_draws", (1, 3), {}),
            ("train_text_encoder", (False, True), {}),
            ("prior.path", ("shots", "views"), CLASS),
            ("prior.caption", ("a film", "a plot"), CLASS),
            ("prior.weight", (1.0, 0.5), CLASS),
        )
    },
    **{
        f"text_to_image.{key}": Change(answer, settings, "flow", also, computed)
        for key, settings, also in (
            ("flow.timesteps", ("logit_normal", "uniform"), {}),
            ("flow.mean", (0.0, 2.0), {}),
            ("flow.std", (1.0, 0.1), {}),
            ("flow.mode_scale", (1.29, -1.0), {"task.flow.timesteps": "mode"}),
            ("flow.weighting", ("none", "cosmap"), {}),
            ("without_t5", (False, True), {}),
        )
    },
    "text_to_image.flow.guidance": Change(answer, (3.5, 1.0), "flux", {}, computed),
    "text_to_image.upscale": Change(
        message, (False, True), "drawing", {"task.resolution": 16}, computed
    ),
    "text_to_image.prior.count": Change(
        answer, (0, 41), "drawing", CLASS, computed
    ),
    "text_to_image.validation_prompts": Change(
        files, (None, ["a film"]), "drawing", {"train.max_steps": 1}
    ),
    "text_embedding.type": Change(
        message, ("text_embedding", "causal_lm"), "search",
        {"task.anchor_column": ..., "task.positive_column": ...},
    ),
    "text_embedding.anchor_column": Change(losses, ("prompt", "other"), "search"),
    "text_embedding.positive_column": Change(losses, ("answer", "other"), "search"),
    "text_embedding.negative_columns": Change(losses, (None, ["other"]), "search"),
    "text_embedding.score_column": Change(losses, (None, "number"), "search"),
    "text_embedding.score_scale": Change(
        losses, (4.0, 8.0), "search", {"task.score_column": "number", "task.loss": "cosine"}
    ),
    "text_embedding.label_column": Change(
        losses, ("label", "word"), "search", {"task.positive_column": ...}
    ),
    "text_embedding.loss": Change(
        losses, ("cosent", "cosine"), "search",
        {"task.score_column": "number", "task.score_scale": 4.0},
    ),
    "text_embedding.temperature": Change(losses, (0.05, 0.2), "search"),
    "text_embedding.symmetric": Change(losses, (False, True), "search"),
    "text_embedding.pooling": Change(losses, ("mean", "cls"), "search"),
    "text_embedding.normalize": Change(modules, (True, False), "search"),
    "text_embedding.anchor_prompt": Change(losses, (None, "query: "), "search"),
    "text_embedding.positive_prompt": Change(losses, (None, "passage: "), "search"),
    "text_embedding.max_length": Change(losses, (64, 4), "search"),
    "text_embedding.truncate": Change(
        losses, ("right", "left"), "search", {"task.max_length": 4}
    ),
    "text_embedding.split_special_tokens": Change(
        losses, (False, True), "search",
        {"data.train": "tokens.jsonl", "task.anchor_column": "text"},
    ),
    "seq2seq_lm.type": Change(message, ("seq2seq_lm", "causal_lm"), "translation"),
    "seq2seq_lm.source_column": Change(losses, ("prompt", "other"), "translation"),
    "seq2seq_lm.target_column": Change(losses, ("answer", "other"), "translation"),
    "seq2seq_lm.prefix": Change(losses, ("", "say: "), "translation"),
    "seq2seq_lm.source_language": Change(message, (None, "de"), "translation"),
    "seq2seq_lm.target_language": Change(message, (None, "de"), "translation"),
    "seq2seq_lm.max_source_length": Change(losses, (64, 4), "translation"),
    "seq2seq_lm.max_target_length": Change(losses, (64, 4), "translation"),
    "seq2seq_lm.answer_pattern": Change(results, (None, "film (.*)"), "translation"),
    "seq2seq_lm.truncate_source": Change(
        losses, ("right", "left"), "translation",
        {"task.source_column": "text", "task.max_source_length": 5},
    ),
    "seq2seq_lm.truncate_target": Change(
        losses, ("right", "left"), "translation", {"task.max_target_length": 4}
    ),
    "seq2seq_lm.split_special_tokens": Change(
        losses, (False, True), "translation",
        {"task.source_column": "text", "data.train": "tokens.jsonl"},
    ),
    # ------------------------------------------------------------------------------------- data
    # see tests/contract/test_cached_frozen_outputs.py: these tasks keep no such outputs
    "data.cache_limit": Change(message, ("16GB", "4")),
    "data.name": Change(losses, ("a/b", "a/c"),
        also={"data.train": "train", "data.validation": None}),
    "data.config": Change(losses, ("one", "two"),
        also={"data.name": "a/b", "data.train": "train", "data.validation": None}),
    "data.revision": Change(losses, ("main", "v2"),
        also={"data.name": "a/b", "data.train": "train", "data.validation": None}),
    "data.path": Change(losses, ("train.jsonl", "dev.jsonl"),
        also={"data.train": ..., "data.validation": None}),
    "data.split_column": Change(message, ("word", "label"),
        also={"data.path": "train.jsonl", "data.train": "hi", "data.validation": None}),
    "data.columns": Change(losses, ({}, {"text": "other", "other": "text"})),
    "data.train": Change(losses, ("train.jsonl", "dev.jsonl")),
    "data.validation": Change(results, ("dev.jsonl", "train.jsonl")),
    "data.validation.from": Change(message, ("train", "test"),
        also={"data.validation": {"fraction": 0.25}}),
    "data.validation.fraction": Change(data, (0.25, 0.5),
        also={"data.validation": {"from": "train"}}),
    "data.validation.disjoint": Change(data, ("exact", None),
        also={"data.train": "twice.jsonl", "data.validation": {"fraction": 0.3}}),
    "data.validation.stratify": Change(data, (False, True),
        also={"data.validation": {"fraction": 0.25}}),
    "data.validation.group_by": Change(data, (None, "who"),
        also={"data.validation": {"fraction": 0.25}}),
    "data.test": Change(results, (None, "dev.jsonl")),
    "data.split_seed": Change(data, (0, 1), also={"data.validation": {"fraction": 0.25}}),
    "data.format.type": Change(message, ("csv", "text"),
        also={"data.path": "rows.dat", "data.train": ..., "data.validation": None}),
    "data.format.encoding": Change(losses, ("utf-8", "cp1252"), also=CSV),
    "data.format.delimiter": Change(message, (",", ";"), also=CSV),
    "data.format.header": Change(data, (True, False),
        also=CSV | {"data.format.columns": ["text", "label"], "task.labels": None}),
    "data.format.columns": Change(message, (["text", "label"], ["body", "label"]), also=CSV),
    "data.format.skip_lines": Change(data, (0, 2),
        also=CSV | {"data.format.columns": ["text", "label"]}),
    "data.format.decimal": Change(message, (",", "."), "number",
        {"task.label_column": "comma"}),
    "data.format.quoting": Change(message, ("csv", "none"),
        also={"data.train": "quoted.csv", "data.validation": None}),
    "data.format.thousands": Change(message, (",", None), "number",
        {"data.train": "thousands.csv", "data.validation": None}),
    "data.format.label_from": Change(message, (None, "fasttext"),
        also={"data.train": "fast.txt", "data.validation": None}),
    "data.format.sample_by": Change(data, ("line", "document"), "text",
        {"data.train": "lines.txt", "data.validation": None}),
    "data.streaming": Change(order, (False, True)),
    "data.on_bad_row": Change(message, ("error", "skip"), also={"data.train": "broken.jsonl"}),
    "data.check.max_overlap": Change(message, (0.0, 1.0), also={"data.validation": "train.jsonl"}),
    "data.check.near_duplicates": Change(data, (True, False), also={"data.train": "near.jsonl"}),
    # ---------------------------------------------------------------------------------- adapter
    "adapter.type": Change(config, ("lora", "bitfit")),
    "adapter.from": Change(losses, (..., "../bases/adapter")),
    "adapter.rank": Change(config, (2, 4)),
    "adapter.alpha": Change(losses, (4.0, 64.0)),
    "adapter.dropout": Change(losses, (0.0, 0.5)),
    "adapter.use_rslora": Change(losses, (False, True)),
    "adapter.init": Change(losses, ("default", "pissa"), also={"adapter.rank": 2}),
    "adapter.eva_rho": Change(config, (1.0, 3.0), also={"adapter.init": "eva"}),
    "adapter.target_modules": Change(config, (["query"], ["value"])),
    "adapter.target_parameters": Change(report, ([], ["intermediate.dense.weight"])),
    "adapter.train_tokens": Change(report, ([], ["<s>"])),
    "adapter.exclude_modules": Change(report, (None, ["value"])),
    "adapter.layers": Change(report, ([0], [0, 1]), also={"model.name": "../bases/deep"}),
    "adapter.freeze": Change(report, (None, ["0"]), also={"adapter.type": "bitfit"}),
    "adapter.rank_pattern": Change(report, ({}, {"query": 2})),
    "adapter.alpha_pattern": Change(losses, ({}, {"query": 99.0})),
    "adapter.bias": Change(report, ("none", "all")),
    "adapter.train_modules": Change(report, ([], ["pooler"]), also={"model.name": "../bases/bert"}),
    "adapter.ensure_weight_tying": Change(
        losses, (True, False), "text",
        also={"adapter.train_modules": ["embed_tokens", "lm_head"]},
    ),
    # ------------------------------------------------------------------------------------ train
    "train.epochs": Change(report, (1.0, 0.5), also={"train.max_steps": None}),
    "train.max_steps": Change(report, (2, 3)),
    "train.max_hours": Change(message, (None, 1e-9)),
    "train.micro_batch_size": Change(order, (2, 3)),
    "train.gradient_accumulation_steps": Change(order, (1, 2)),
    "train.examples_per_step": Change(order, (2, 4)),
    "train.optimizer.type": Change(adapter, ("adamw", "sgd")),
    "train.optimizer.learning_rate": Change(adapter, (0.01, 0.02)),
    "train.optimizer.weight_decay": Change(adapter, (0.0, 0.5)),
    "train.optimizer.betas": Change(adapter, ([0.9, 0.999], [0.5, 0.9])),
    "train.optimizer.eps": Change(adapter, (1e-8, 1e-2)),
    "train.optimizer.momentum": Change(adapter, (0.0, 0.9), also={"train.optimizer.type": "sgd"}),
    "train.optimizer.layer_decay": Change(adapter, (None, 0.1)),
    "train.optimizer.lora_plus_ratio": Change(adapter, (None, 16.0)),
    "train.optimizer.groups.head.learning_rate": Change(adapter, (None, 0.1)),
    "train.optimizer.groups.head.weight_decay": Change(adapter, (None, 0.9)),
    "train.optimizer.groups.adapter.learning_rate": Change(adapter, (None, 0.1)),
    "train.optimizer.groups.adapter.weight_decay": Change(adapter, (None, 0.9)),
    "train.optimizer.groups.modules.learning_rate": Change(
        adapter, ({}, {"query": {"learning_rate": 0.1}}), key="train.optimizer.groups.modules"),
    "train.optimizer.groups.modules.weight_decay": Change(
        adapter, ({}, {"query": {"weight_decay": 0.9}}), key="train.optimizer.groups.modules"),
    "train.optimizer.groups.layers.learning_rate": Change(
        adapter, ({}, {"0-1": {"learning_rate": 0.1}}), also={"model.name": "../bases/deep"},
        key="train.optimizer.groups.layers"),
    "train.optimizer.groups.layers.weight_decay": Change(
        adapter, ({}, {"0-1": {"weight_decay": 0.9}}), also={"model.name": "../bases/deep"},
        key="train.optimizer.groups.layers"),
    "train.scheduler.type": Change(losses, ("linear", "cosine"), also={"train.max_steps": 3}),
    "train.scheduler.warmup_steps": Change(losses, (0, 2)),
    "train.scheduler.warmup_ratio": Change(losses, (None, 0.5)),
    "train.precision": Change(losses, ("fp32", "bf16")),
    "train.distill.teacher": Change(report, (..., "../bases/adapter")),
    "train.distill.revision": Change(report, ("main", "v2"), also=TAUGHT),
    "train.distill.temperature": Change(losses, (1.0, 4.0), also=TAUGHT),
    "train.distill.weight": Change(losses, (0.2, 0.8), also=TAUGHT),
    "train.kernels": Change(report, ("fused", "reference")),
    "train.max_grad_norm": Change(adapter, (None, 1e-3), also={"train.optimizer.type": "sgd"}),
    "train.gradient_checkpointing": Change(lambda left: left.used["forward"], (False, True)),
    "train.packing": Change(data, (False, True), "text", {"task.max_length": 32}),
    "train.group_by_length": Change(order, (False, True)),
    "train.workers": Change(lambda left: left.used["workers"], (0, 1)),
    "train.seed": Change(order, (0, 1)),
    "train.log_every_steps": Change(losses, (1, 9), also={"train.max_steps": 3}),
    "train.trackers": Change(files, ([], ["tensorboard"])),
    # --------------------------------------------------------------------------------- evaluate
    "evaluate.every_steps": Change(losses, (1, 2)),
    "evaluate.metrics": Change(results, (["accuracy"], ["f1"])),
    "evaluate.best.metric": Change(best, ("loss", "accuracy"), also=MANY),
    "evaluate.best.mode": Change(
        best, ("min", "max"), also=MANY | {"evaluate.best.metric": "loss"}),
    "evaluate.early_stopping.patience": Change(report, (1, 5),
        also=MANY | {"evaluate.early_stopping.min_delta": 99.0}),
    "evaluate.early_stopping.min_delta": Change(report, (0.0, 99.0),
        also=MANY | {"evaluate.early_stopping.patience": 1}),
    "evaluate.micro_batch_size": Change(lambda left: left.used["evaluated"], (1, 4)),
    "evaluate.samples": Change(report, (0, 2), "text"),
    "evaluate.baseline": Change(results, (False, True)),
    "evaluate.baselines": Change(report, ([], ["majority"])),
    "evaluate.generation.max_rows": Change(
        predictions, (None, 2), "pair", {"evaluate.metrics": ["exact_match"]}),
    **{
        f"evaluate.drawing.{key}": Change(answer, settings, "drawing", {}, drawn)
        for key, settings in {
            "steps": (1, 2), "guidance_scale": (7.5, 1.0), "negative_prompt": (None, "a plot"),
            "seed": (0, 1),
        }.items()
    },
    "evaluate.generation.num_beams": Change(answer, (1, 4), "text", command=said),
    "evaluate.generation.length_penalty": Change(
        message, (1.0, 9.0), "text", {"evaluate.generation.num_beams": 1}
    ),
    "evaluate.generation.no_repeat_ngram_size": Change(answer, (0, 1), "text", command=said),
    "evaluate.generation.max_new_tokens": Change(answer, (2, 9), "pair", command=said),
    "evaluate.generation.temperature": Change(answer, (0.0, 5.0), "pair", command=said),
    "evaluate.generation.top_p": Change(
        answer, (1.0, 0.001), "pair", {"evaluate.generation.temperature": 5.0}, command=said),
    # ------------------------------------------------------------------------------- checkpoint
    "checkpoint.every_steps": Change(files, (1, 3), also={"checkpoint.keep": 9}),
    "checkpoint.every_minutes": Change(
        files, (None, 1e-9), also={"checkpoint.keep": 9, "checkpoint.every_steps": 3}),
    "checkpoint.keep": Change(files, (1, 3),
        also={"checkpoint.every_steps": 1, "train.max_steps": 6}),
    "checkpoint.mirror": Change(answer, (None, "mirror"), command=mirrored),
    "checkpoint.allow_changes": Change(message, (False, True), command=resumed),
    "output_dir": Change(lambda left: sorted(p.name for p in left.out.parent.glob("out*")),
        ("out", "out_too")),
}  # fmt: skip


ALONE = {"data.train": ..., "data.validation": ...}
CHANGES["data.mix.weight"] = Change(
    order,
    tuple(
        {"a": {"train": "./train.jsonl", "weight": 1}, "b": {"train": "./dev.jsonl", "weight": w}}
        for w in (1, 9)
    ),  # type: ignore[arg-type]
    also=ALONE, key="data.mix",
)  # fmt: skip
# rows for the test split are drawn in the same way
CHANGES |= {
    key.replace("validation", "test"): dataclasses.replace(
        change, also={name.replace("validation", "test"): v for name, v in change.also.items()}
    )
    for key, change in CHANGES.items()
    if key.startswith("data.validation.")
}


def test_no_key_is_missing() -> None:
    assert sorted(set(keys())) == sorted(CHANGES)


# ------------------------------------------------------------------------------------ the runs


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of base models, and of an adapter of the first."""
    top = tmp_path_factory.mktemp("keys")
    folder = top / "bases"
    tiny.save_encoder(folder / "encoder", layers=1)
    tiny.save_encoder(folder / "deep")
    tiny.save_encoder(folder / "other", seed=1, layers=1)
    tiny.save_encoder(folder / "bert", kind="bert", layers=1)
    tiny.save_llama(folder / "llama")
    tiny.save_encoder_decoder(folder / "bart")
    tiny_pictures.save("vit", folder / "vit")
    tiny_detectors.save("yolos", folder / "yolos")
    tiny_speech.save(folder / "whisper", languages=True)
    tiny_synthesis.save(folder / "speecht5")
    tiny_synthesis.save_vocoder(folder / "vocoder")
    tiny_embedders.save(folder / "embedder")
    tiny_diffusion.save(folder / "diffusion")
    tiny_diffusion.save(folder / "sd3", "sd3")
    tiny_diffusion.save(folder / "flux", "flux")
    world = World(top / "first", folder)
    write(world, "labels")
    flags = ["--set", "adapter.rank=3", "--set", "train.max_steps=1"]
    assert world.lora("train", "recipe.yaml", "-o", "../bases/adapter", *flags).code == 0
    return folder


def write(world: World, kind: str, without: Collection[str] = ()) -> None:
    """Write the recipe of a kind without some keys, and all files that recipes here name."""
    recipe: Settings = copy.deepcopy(COMMON | KINDS[kind])
    for key in without:
        section, _, name = key.partition(".")
        recipe.get(section, {}).pop(name, None)
    world.write("recipe.yaml", tiny.yaml_of(recipe))
    for i in range(40):
        if kind in ("pictures", "scenes", "drawing", "flow", "flux"):
            world.write(f"shots/{i}.png", tiny_pictures.encoded(tiny_pictures.picture(i)))
        if kind in ("speech", "synthesis"):  # the last is longer than the model hears at once
            seconds = 1.5 if i == 39 else 0.2
            world.write(f"sounds/{i}.wav", tiny_speech.encoded(tiny_speech.sound(i, seconds)))
    if kind == "drawing":
        world.write("views/0.png", tiny_pictures.encoded(tiny_pictures.picture(50)))
    if kind == "synthesis":
        np.save(world.folder / "me.npy", tiny_synthesis.speaker(5))
    world.write("chat.jinja", CHAT)
    world.write("other.jinja", CHAT.replace("</s>", "!</s>"))
    near = [*TRAIN, {**TRAIN[1], "text": f"{TRAIN[1]['text']} so"}]
    marked = [*TRAIN, {**TRAIN[0], "text": "a film", "label": "-"}]
    tokens = [{**row, "text": f"{row['text']} </s> yes"} for row in TRAIN]
    rows = {
        "marked": marked,
        "tokens": tokens,
        "train": TRAIN,
        "dev": DEV,
        "twice": TRAIN * 2,
        "near": near,
        "long": [*DEV, {**DEV[0], "sound": "sounds/39.wav"}],
    }
    for name, found in rows.items():
        world.write(f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in found))
    world.write("broken.jsonl", "".join(json.dumps(row) + "\n" for row in TRAIN) + "{\n")
    table = "".join(f"{row['text']} caf\u00e9,{row['label']}\n" for row in TRAIN)
    for name in ("train.csv", "rows.dat"):
        world.write(name, "text,label\n" + table)
    world.write("quoted.csv", "text,label\n" + '"a, b",good\nwhat,bad\n' * 4)
    world.write("thousands.csv", "text,number\n" + 'a film,"2,301"\na plot,812\n' * 4)
    world.write("fast.txt", "__label__good a film\n__label__bad a plot\n" * 4)
    world.write("lines.txt", "".join(f"{row['text']}\n" for row in TRAIN))


class Used:
    """Counts what leaves no trace in files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts = {"forward": 0, "workers": 0, "evaluated": 0}
        forward, loader, predict = (
            RobertaSelfAttention.forward,
            torch.utils.data.DataLoader.__init__,
            SequenceClassification.predict,
        )

        def passing(this: Any, *arguments: Any, **options: Any) -> Any:
            self.counts["forward"] += 1
            return forward(this, *arguments, **options)

        def loading(this: Any, *arguments: Any, **options: Any) -> None:
            self.counts["workers"] = max(self.counts["workers"], options.get("num_workers", 0))
            loader(this, *arguments, **options)

        def predicting(this: Any, model: Any, batch: Any) -> Any:
            self.counts["evaluated"] = max(self.counts["evaluated"], len(batch.rows))
            return predict(this, model, batch)

        monkeypatch.setattr(RobertaSelfAttention, "forward", passing)
        monkeypatch.setattr(torch.utils.data.DataLoader, "__init__", loading)
        monkeypatch.setattr(SequenceClassification, "predict", predicting)


def of_the_hub(name: str, config: Any = None, **options: Any) -> datasets.Dataset:
    """Stand for `datasets.load_dataset`: each name, configuration and revision has its own rows."""
    first = sum(map(ord, f"{name}{config}{options['revision']}")) % len(TRAIN)
    rows = [{"text": row["text"], "label": row["label"]} for row in TRAIN]
    return datasets.Dataset.from_list(rows[first:] + rows[:first])


def flags(settings: Settings) -> list[str]:
    return [
        part
        for key, value in settings.items() if value is not ...
        for part in ("--set", f"{key}={json.dumps(value, ensure_ascii=False)}")
    ]  # fmt: skip


LEFT: dict[str, Left] = {}
"""What commands left, by what they were and the whole recipe: many keys have the same default."""


def left_by(change: Change, name: str, value: Any, bases: Path) -> Left:
    """Run a command with a key set to a value, unless it has been run with just this recipe."""
    world = World(bases.parent / f"run{len(LEFT)}", bases)
    settings = {**change.also, name: value}
    write(world, change.kind, [key for key, value in settings.items() if value is ...])
    options = flags(settings) + ([] if name == "output_dir" else ["-o", "out"])
    run = change.command or train
    try:
        whole = world.load("recipe.yaml", *flags(settings)[1::2])
        same = f"{run.__name__} {whole.model_dump_json()}".replace(str(world.folder), ".")
    except LoraError:
        same = f"{run.__name__} {change.kind} {options}"
    if same in LEFT:
        shutil.rmtree(world.folder)
        return LEFT[same]
    AcceleratorState._reset_state()  # the run before may have had another precision
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", of_the_hub)
        used = Used(patch)
        printed = run(world, options)
    LEFT[same] = Left(printed, world.folder / "out", used.counts)
    return LEFT[same]


@pytest.mark.parametrize("key", CHANGES)
@pytest.mark.slow_after(1)
def test_a_key_changes_something(key: str, bases: Path) -> None:
    change = CHANGES[key]
    section, _, rest = key.partition(".")
    of_task = section in TASKS
    name = change.key or (f"task.{rest}" if of_task else key)
    found = []
    for value in change.settings:
        left = left_by(change, name, value, bases)
        if change.watch is not message:
            assert left.printed.code == 0, left.printed.err
        found.append(change.watch(left))
    assert "Traceback" not in str(found)
    assert found[0] != found[1]
