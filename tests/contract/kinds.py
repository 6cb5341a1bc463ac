"""What the contract tests run over: a new task or a new adapter type is one entry here.

A `TaskKind` needs a base model, rows and the `task` section of a recipe; an `AdapterKind` needs the
`adapter` section, and a `Site` a model with layers that an adapter can replace.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny
import tiny_ctc
import tiny_detectors
import tiny_diffusion
import tiny_embedders
import tiny_experts
import tiny_pictures
import tiny_speech
import tiny_synthesis
import tiny_translators
from torch import nn

Json = dict[str, Any]
WORDS = "a warm and funny film , slow and dull but great in the end".split()  # noqa: SIM905
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

# --------------------------------------------------------------------------------------- tasks


@dataclass(frozen=True)
class TaskKind:
    """A task, or a form of its rows."""

    save_base: Callable[[Path], Path]
    """Saves a tiny base model in a folder, and returns the folder."""
    task: Json
    """The recipe's `task` section."""
    row: Callable[[int], Json]
    """Makes a row, different for each number; the lengths differ too."""
    answers: tuple[str, ...]
    """The columns that `lora predict` adds."""
    targets: tuple[str, ...] = ()
    """The columns that a row to be predicted does not have."""
    train: Json = field(default_factory=dict)
    """Keys of the recipe's `train` section."""
    runs: bool = True
    """A whole run is made of it; otherwise it trains as another kind does."""
    draws_in_training: bool = False
    """What an example holds of other rows is drawn in training alone."""
    drafted: Json | None = None
    """What `lora init` writes as `task` for such rows, besides `max_length`; None: another kind."""


@functools.cache
def model_type(name: str) -> str:
    """Return what `config.json` of a kind's base calls its architecture, diffusers its pipeline."""
    with tempfile.TemporaryDirectory() as folder:
        base = TASKS[name].save_base(Path(folder) / "base")
        key, file = "model_type", base / "config.json"
        if not file.exists():
            key, file = "_class_name", base / "model_index.json"
        return str(json.loads(file.read_text(encoding="utf-8"))[key])


def text(i: int) -> str:
    """Return a text of one to eleven words that no other number has."""
    return " ".join([*WORDS[: (7 * i) % 11], f"number {i}"])


def save_chat(folder: Path) -> Path:
    """Save a Llama whose tokenizer has a chat template."""
    tiny.save_llama(folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "chat_template": TEMPLATE}), encoding="utf-8")
    return folder


def conversation(i: int) -> list[Json]:
    turns = [text(3 * i + n) for n in range(2 + 2 * (i % 2))]
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns)]


@functools.cache
def pictures() -> Path:
    """Return a folder for the pictures of rows."""
    return Path(tempfile.mkdtemp(prefix="lora-pictures-"))


def pictured(i: int) -> Json:
    file = pictures() / f"{i}.png"
    kind = tiny_pictures.CLASSES[i % 2]
    tiny_pictures.picture(i, kind, 20 + i % 5, 14 + i % 3).save(file)
    return {"image": str(file), "label": kind}


def captioned(i: int) -> Json:
    file = pictures() / f"captioned{i}.png"
    kind = tiny_pictures.CLASSES[i % 2]
    tiny_pictures.picture(i, kind, 18 + i % 5, 17 + i % 3).save(file)
    return {"image": str(file), "text": f"{kind}, {text(i)}"}


DRAWING = {"type": "text_to_image", "resolution": tiny_diffusion.SIDE}


@functools.cache
def scenes() -> Path:
    """Return a folder for the pictures with boxes."""
    return Path(tempfile.mkdtemp(prefix="lora-scenes-"))


def with_boxes(i: int) -> Json:
    image, objects = tiny_detectors.scene(i)
    file = scenes() / f"{i}.png"
    image.save(file)
    return {"image": str(file), "objects": objects}


DETECTION = {"type": "object_detection", "labels": list(tiny_detectors.LABELS)}
PICTURES = {"type": "image_classification", "labels": list(tiny_pictures.CLASSES)}
BAD_GOOD = ["bad", "good"]
CLASSIFICATION = {"type": "sequence_classification", "labels": BAD_GOOD}
PROMPTS = {"type": "causal_lm", "prompt_column": "prompt", "completion_column": "completion"}
SCORES = ("prediction", "p_bad", "p_good")


def labelled(i: int) -> Json:
    return {"text": text(i), "label": BAD_GOOD[i % 2]}


def answered(i: int) -> Json:
    return {"prompt": text(i), "completion": f" {text(2 * i + 1)}"}


def tagged(i: int) -> Json:
    words = text(i).split()
    kind = ("PER", "LOC")[i % 2]
    return {"tokens": words, "tags": [f"B-{kind}", f"I-{kind}", *["O"] * len(words)][: len(words)]}


def with_spans(i: int) -> Json:
    words = text(i)
    end = words.rindex(" ")  # before the number
    return {
        "text": words,
        "spans": [
            {"start": end + 1, "end": len(words), "label": "NUMBER"},
            {"start": 0, "end": end, "label": "WORD"},
        ][: 1 + i % 2],
    }


def translated(i: int) -> Json:
    return {"en": text(i), "de": text(2 * i + 1)}


@functools.cache
def recordings() -> Path:
    """Return a folder for the recordings of rows."""
    return Path(tempfile.mkdtemp(prefix="lora-recordings-"))


def recorded(i: int) -> Json:
    file = recordings() / f"{i}.wav"
    tiny_speech.write(file, tiny_speech.sound(i, 0.2 + 0.05 * (i % 7)))
    return {"audio": str(file), "text": text(i)}


def recorded_in_letters(i: int) -> Json:
    file = recordings() / f"letters{i}.wav"
    tiny_speech.write(file, tiny_speech.sound(i, 0.5 + 0.05 * (i % 7)))
    return {"audio": str(file), "text": " ".join(text(i).split()[:3]).replace(",", "")}


def recorded_at_length(i: int) -> Json:
    file = recordings() / f"long{i}.flac"
    seconds = 1.4 if i >= 7 and i % 2 else 0.3  # those of train are short
    tiny_speech.write(file, tiny_speech.sound(i, seconds, 8_000), 8_000)
    return {"audio": str(file), "text": text(i)}


SPEECH = {"type": "speech_recognition"}
SYNTHESIS = {"type": "text_to_speech", "speaker_column": "speaker"}


def said(i: int) -> Json:
    return tiny_synthesis.row(i, recordings())


def said_by_one(i: int) -> Json:
    return {key: value for key, value in said(i).items() if key != "speaker"}


def paired(i: int) -> Json:
    return {"anchor": text(i), "positive": text(2 * i + 1)}


def with_negatives(i: int) -> Json:
    return {**paired(i), "negative": [text(3 * i + 40 + n) for n in range(i % 3)]}


EMBEDDING = {"type": "text_embedding"}
STEP = {"micro_batch_size": 2, "gradient_accumulation_steps": 4}  # compared with each other
TRANSLATION = {"type": "seq2seq_lm", "source_column": "en", "target_column": "de"}
NAMES = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
TASKS = {
    "classification": TaskKind(
        tiny.save_encoder, CLASSIFICATION, labelled, SCORES, ("label",),
        drafted=CLASSIFICATION,
    ),
    "weighted classification": TaskKind(
        tiny.save_encoder,
        {**CLASSIFICATION, "class_weights": {"bad": 0.2}, "label_smoothing": 0.1},
        labelled, SCORES, ("label",), runs=False,
    ),
    "classification by a decoder": TaskKind(
        tiny.save_llama, CLASSIFICATION, labelled, SCORES, ("label",), runs=False
    ),
    "several labels": TaskKind(
        tiny.save_encoder,
        {"type": "sequence_classification", "problem": "multi_label", "label_column": "labels"},
        lambda i: {"text": text(i), "labels": [n for n in ("dull", "warm") if i % (len(n) - 1)]},
        ("prediction", "p_dull", "p_warm"), ("labels",),
        drafted={"type": "sequence_classification", "problem": "multi_label",
                 "label_column": "labels", "labels": ["dull", "warm"]},
    ),
    "regression": TaskKind(
        tiny.save_encoder,
        {"type": "sequence_classification", "problem": "regression", "label_column": "score"},
        lambda i: {"text": text(i), "score": (i * 37 % 100) / 8},
        ("prediction",), ("score",),
        drafted={"type": "sequence_classification", "problem": "regression",
                 "label_column": "score"},
    ),
    "pairs of texts": TaskKind(
        tiny.save_encoder,
        {**CLASSIFICATION, "text_column": "premise", "text_pair_column": "hypothesis"},
        lambda i: {"premise": text(i), "hypothesis": text(2 * i + 1), "label": BAD_GOOD[i % 2]},
        SCORES, ("label",),
    ),
    "words with tags": TaskKind(
        tiny.save_encoder, {"type": "token_classification"}, tagged, ("prediction",), ("tags",),
        drafted={"type": "token_classification", "scheme": "iob2", "labels": NAMES},
    ),
    "words with tags in windows": TaskKind(
        tiny.save_llama, {"type": "token_classification", "scheme": "iob2", "max_length": 12},
        tagged, ("prediction",), ("tags",),
    ),
    "texts with spans": TaskKind(
        tiny.save_encoder,
        {"type": "token_classification", "text_column": "text", "spans_column": "spans"},
        with_spans, ("prediction",), ("spans",),
        drafted={"type": "token_classification", "text_column": "text", "spans_column": "spans",
                 "labels": ["O", "B-NUMBER", "I-NUMBER", "B-WORD", "I-WORD"]},
    ),
    "text": TaskKind(
        tiny.save_gpt2, {"type": "causal_lm", "text_column": "text"}, lambda i: {"text": text(i)},
        ("prediction",), drafted={"type": "causal_lm", "text_column": "text"},
    ),
    "prompts": TaskKind(
        tiny.save_llama, PROMPTS, answered, ("prediction",), ("completion",),
        drafted=PROMPTS,  # the completions begin with a space of their own
    ),
    "conversations": TaskKind(
        save_chat, {"type": "causal_lm", "messages_column": "messages"},
        lambda i: {"messages": conversation(i)}, ("prediction",),
        drafted={"type": "causal_lm", "messages_column": "messages"},
    ),
    "packed text": TaskKind(
        tiny.save_gpt2, {"type": "causal_lm", "text_column": "text", "max_length": 32},
        lambda i: {"text": text(i)}, ("prediction",), train={"packing": True}, runs=False,
    ),
    "pictures": TaskKind(
        lambda folder: tiny_pictures.save("vit", folder),
        {**PICTURES, "augmentation": {"crop": True, "flip": True}}, pictured,
        ("prediction", "p_dark", "p_light"), ("label",), drafted=PICTURES,
    ),
    "captioned pictures": TaskKind(
        tiny_diffusion.save, {**DRAWING, "caption_dropout": 0.2, "validation_draws": 2}, captioned,
        ("picture",), ("image",), drafted=DRAWING,
    ),
    "captioned pictures for a flow": TaskKind(
        lambda folder: tiny_diffusion.save(folder, "sd3"),
        {**DRAWING, "caption_dropout": 0.2, "validation_draws": 2}, captioned, ("picture",),
        ("image",), drafted=DRAWING,
    ),
    "pictures with boxes": TaskKind(
        lambda folder: tiny_detectors.save("yolos", folder),
        {**DETECTION, "augmentation": {"crop": True, "flip": True}}, with_boxes,
        ("prediction",), ("objects",), drafted={**DETECTION, "image_size": 64},
    ),
    "pictures with boxes on a canvas": TaskKind(
        lambda folder: tiny_detectors.save("detr", folder, auxiliary_loss=True),
        {**DETECTION, "image_size": 48}, with_boxes, ("prediction",), ("objects",), runs=False,
    ),
    "translation": TaskKind(
        lambda folder: tiny_translators.save(folder, "marian"), TRANSLATION, translated,
        ("prediction",), ("de",), drafted=TRANSLATION,
    ),
    "translation between languages": TaskKind(
        lambda folder: tiny_translators.save(folder, "nllb"),
        {**TRANSLATION, **tiny_translators.languages("nllb")}, translated, ("prediction",), ("de",),
        drafted={**TRANSLATION, **tiny_translators.languages("nllb")}, runs=False,
    ),
    "translation with several references": TaskKind(
        lambda folder: tiny_translators.save(folder, "t5"), TRANSLATION,
        lambda i: {"en": text(i), "de": [text(2 * i + 1), text(3 * i)][: 1 + i % 2]},
        ("prediction",), ("de",),
    ),
    "speech": TaskKind(
        tiny_speech.save, SPEECH, recorded, ("prediction",), ("text",), drafted=SPEECH,
    ),
    "speech of several languages": TaskKind(
        lambda folder: tiny_speech.save(folder, languages=True),
        {**SPEECH, "language": "de", "task": "translate"},
        recorded_at_length, ("prediction",), ("text",),
    ),
    "speech by letters": TaskKind(
        tiny_ctc.save, SPEECH, recorded_in_letters, ("prediction",), ("text",), drafted=SPEECH,
    ),
    "texts said aloud": TaskKind(
        tiny_synthesis.save, SYNTHESIS, said, ("spectrogram",), ("audio",), drafted=SYNTHESIS,
    ),
    "texts said aloud by one speaker": TaskKind(
        lambda folder: tiny_synthesis.save(folder, reduction_factor=3),
        {"type": "text_to_speech", "speaker_embedding": "zeros"}, said_by_one, ("spectrogram",),
        ("audio",), runs=False,
    ),
    "texts that belong together": TaskKind(
        tiny_embedders.save, EMBEDDING, paired, ("embedding",), ("positive",), train=STEP,
        drafted={**EMBEDDING, "positive_column": "positive"},
    ),
    "texts with wrong answers": TaskKind(
        lambda folder: tiny_embedders.save(folder, "last", False, decoder=True),
        {**EMBEDDING, "negative_columns": ["negative"], "symmetric": True},
        with_negatives, ("embedding",), ("positive", "negative"), train=STEP, runs=False,
        drafted={**EMBEDDING, "positive_column": "positive",
                 "negative_columns": ["negative"]},
    ),
    "pairs of texts with scores": TaskKind(
        lambda folder: tiny_embedders.save(folder, "cls"),
        {**EMBEDDING, "score_column": "score", "score_scale": 5.0},
        lambda i: {**paired(i), "score": (i * 37 % 50) / 10}, ("embedding",),
        ("positive", "score"), train=STEP,
    ),
    "pairs of texts and their cosines": TaskKind(
        tiny_embedders.save, {**EMBEDDING, "score_column": "score", "loss": "cosine"},
        lambda i: {**paired(i), "score": (i * 37 % 50) / 50}, ("embedding",),
        ("positive", "score"), runs=False,
    ),
    "texts by label": TaskKind(
        tiny_embedders.save,
        {**EMBEDDING, "anchor_column": "text", "label_column": "label"},
        labelled, ("embedding",), ("label",), train=STEP, draws_in_training=True,
    ),
    "packed prompts": TaskKind(
        tiny.save_llama, {**PROMPTS, "max_length": 128}, answered, ("prediction",), ("completion",),
        train={"packing": True},
    ),
}  # fmt: skip

# ------------------------------------------------------------------------------------ adapters


@dataclass(frozen=True)
class AdapterKind:
    """A way of training: an adapter, or a baseline without one."""

    adapter: Json
    """The recipe's `adapter` section, without `target_modules`."""
    bare: bool = True
    """Turned off, the model is its base: nothing outside the new matrices is trained."""
    has_folder: bool = True
    """It is saved as an adapter folder, not as a whole model."""
    runs: bool = True
    """A whole run is made with it; otherwise it trains as another type does, but for the layers."""
    not_on: tuple[str, ...] = ()
    """Sites whose layers it does not fit."""
    starts_exactly: bool = True
    """Step 0 is the base bit for bit, and not to rounding."""
    loads_exactly: bool = True
    """What is saved computes the same bit for bit when it is read, and not to rounding."""


NOT_WHOLE = ("Conv1D", "Embedding", "tied Embedding", "experts", "transposed experts")
NOT_LINEAR = (
    "Conv2d", "grouped Conv2d", "Conv1d", "Embedding", "tied Embedding", "experts",
    "transposed experts",
)  # fmt: skip
ADAPTERS = {
    "lora": AdapterKind({"rank": 4, "alpha": 6}, runs=False),
    "rslora": AdapterKind({"rank": 4, "alpha": 6, "use_rslora": True}, runs=False),
    "dropout": AdapterKind(
        {"rank": 4, "alpha": 6, "dropout": 0.3}, not_on=("experts", "transposed experts")
    ),
    "dora": AdapterKind(
        {"type": "dora", "rank": 4, "alpha": 6, "dropout": 0.2},
        not_on=("grouped Conv2d", "experts", "transposed experts"),
    ),
    "dora with patterns": AdapterKind(
        {
            "type": "dora",
            "rank": 4,
            "use_rslora": True,
            "bias": "lora_only",
            "rank_pattern": {".*[a-z]": 6},
            "alpha_pattern": {".*[a-z]": 3},
        },
        bare=False,
        runs=False,
        not_on=("grouped Conv2d", "experts", "transposed experts"),
    ),
    "patterns": AdapterKind(
        {"rank": 4, "alpha": 6, "rank_pattern": {".*[a-z]": 6}, "alpha_pattern": {".*[a-z]": 3}},
        runs=False,
    ),
    "bias of adapted modules": AdapterKind(
        {"rank": 4, "bias": "lora_only"}, bare=False, runs=False
    ),
    "all biases": AdapterKind({"rank": 4, "bias": "all"}, bare=False),
    "loha": AdapterKind(
        {"type": "loha", "rank": 4, "alpha": 6, "rank_pattern": {".*[a-z]": 3}},
        not_on=NOT_WHOLE,
    ),
    "lokr": AdapterKind({"type": "lokr", "rank": 2, "alpha": 6}, not_on=NOT_WHOLE),
    "pissa": AdapterKind(
        {"rank": 4, "alpha": 6, "init": "pissa"}, not_on=NOT_LINEAR, loads_exactly=False
    ),
    "olora with patterns": AdapterKind(
        {
            "rank": 4,
            "init": "olora",
            "use_rslora": True,
            "bias": "lora_only",
            "rank_pattern": {".*[a-z]": 6},
            "alpha_pattern": {".*[a-z]": 3},
        },
        bare=False,
        not_on=NOT_LINEAR,
        loads_exactly=False,
    ),
    "orthogonal": AdapterKind(
        {"rank": 4, "alpha": 6, "init": "orthogonal"},
        not_on=NOT_LINEAR,
        starts_exactly=False,
    ),
    # before a run, which has rows, it is as by default
    "eva": AdapterKind({"rank": 4, "alpha": 6, "init": "eva"}, not_on=NOT_LINEAR),
    "full": AdapterKind({"type": "full"}, bare=False, has_folder=False),
    "bitfit": AdapterKind({"type": "bitfit"}, bare=False),
    "head alone": AdapterKind({"type": "none"}, bare=False),
}


@dataclass(frozen=True)
class Site:
    """A model, and modules of one kind in it that an adapter can replace."""

    build: Callable[[], nn.Module]
    targets: list[str]
    head: list[str] = field(default_factory=list)
    """Modules that the task created, which are trained in full."""
    parameters: list[str] = field(default_factory=list)
    """Parameters that an adapter can replace."""


SITES = {
    "Linear": Site(lambda: tiny.encoder(layers=1), ["query", "dense"], ["classifier"]),
    "Conv1D": Site(lambda: tiny.gpt2(layers=1), ["c_attn", "c_proj", "c_fc"], ["transformer.ln_f"]),
    "Conv2d": Site(tiny.ConvNet, ["stem", "point", "dilated", "reflect"], ["classifier"]),
    "grouped Conv2d": Site(tiny.ConvNet, ["grouped"], ["classifier"]),
    "Conv1d": Site(tiny.ConvNet, ["line"], ["classifier"]),
    "Embedding": Site(lambda: tiny.llama(tied=False, layers=1), ["embed_tokens"], ["model.norm"]),
    "tied Embedding": Site(lambda: tiny.gpt2(layers=1), ["wte"], ["transformer.ln_f"]),
    "experts": Site(
        lambda: tiny_experts.model("mixtral", layers=1),
        ["o_proj"],
        ["model.norm"],
        tiny_experts.EXPERTS,
    ),
    "transposed experts": Site(
        lambda: tiny_experts.model("gpt_oss", layers=1), [], ["model.norm"], tiny_experts.EXPERTS
    ),
}
