"""Models, tokenizers and adapter folders that are not what they should be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
from cases import CASES, Case, case
from safetensors.torch import load_file, save_file
from transformers import AlbertConfig, AlbertForSequenceClassification, MambaConfig
from world import Printed, World

from lora_cli.files import write_manifest


def _config(**changes: Any) -> Callable[[World], Printed]:
    """Return what validates a recipe on a copy of the encoder with other keys in config.json."""

    def run(world: World) -> Printed:
        folder = world.folder / "base"
        shutil.copytree(world.bases / "encoder", folder)
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return world.lora("validate", world.recipe(model={"name": "./base"}))

    return run


for _name, _changes in {
    "no attention heads": {"num_attention_heads": 0},
    "more layers than any model has": {"num_hidden_layers": 10**7},
    "an activation that there is not": {"hidden_act": "gelo"},
    "a word for a number": {"hidden_size": "32"},
    "a list for a table": {"id2label": ["bad", "good"]},
    "an architecture that is not known": {"model_type": "robberta"},
    "an embedding smaller than the tokenizer": {"vocab_size": 100},
    "a padding token beyond the embedding": {"pad_token_id": 99999},
}.items():
    CASES.append(Case("Models", f"config.json with {_name}", _config(**_changes)))


def _generation_config(text: str) -> Callable[[World], Printed]:
    def run(world: World) -> Printed:
        shutil.copytree(world.bases / "llama", world.folder / "base")
        (world.folder / "base/generation_config.json").write_text(text)
        task = {"type": "causal_lm", "text_column": "text"}
        return world.lora("validate", world.recipe(model={"name": "./base"}, task=task))

    return run


def _packed_with_longrope(world: World) -> Printed:
    shutil.copytree(world.bases / "llama", world.folder / "base")
    file = world.folder / "base/config.json"
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 16, "factor": 8.0}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "rope_theta": 10000.0}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_parameters": rope}))
    recipe = world.recipe("llama", model={"name": "./base"}, train={"packing": True})
    return world.lora("train", recipe, "-o", "out")


CASES.append(Case("Models", "packing where a long text changes the others", _packed_with_longrope))


for _name, _text in {
    "a word that is no choice": '{"early_stopping": "maybe"}',
    "a mode of caching that there is not": '{"cache_implementation": "quick"}',
    "a word for a number": '{"max_new_tokens": "many"}',
    "a list": "[]",
    "half a file": '{"do_sample": tr',
    "an end that is no token": '{"eos_token_id": 99999}',
}.items():
    CASES.append(Case("Models", f"generation_config.json with {_name}", _generation_config(_text)))


def _tokenizer(text: str) -> Callable[[World], Printed]:
    def run(world: World) -> Printed:
        shutil.copytree(world.bases / "encoder", world.folder / "base")
        (world.folder / "base/tokenizer.json").write_text(text)
        return world.lora("validate", world.recipe(model={"name": "./base"}))

    return run


CASES.append(Case("Models", "tokenizer.json that holds nothing", _tokenizer("{}")))


@case("Models", "config.json of a decoder with no attention heads")
def _no_heads(world: World) -> Printed:
    file = shutil.copytree(world.bases / "llama", world.folder / "base") / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_attention_heads": 0}))
    task = {"type": "causal_lm", "text_column": "text"}
    return world.lora("validate", world.recipe(model={"name": "./base"}, task=task))


@case("Models", "a checkpoint without the head that the task needs")
def _other_architecture(world: World) -> Printed:
    base = shutil.copytree(world.bases / "encoder", world.folder / "base")
    tiny.encoder(None, "bert").save_pretrained(base)
    task = {"type": "causal_lm", "text_column": "text"}
    return world.lora("train", world.recipe(model={"name": "./base"}, task=task))


@case("Models", "train on a config.json of what cannot be built")
def _cannot_be_built(world: World) -> Printed:
    file = shutil.copytree(world.bases / "encoder", world.folder / "base") / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_dropout_prob": 2}))
    return world.lora("train", world.recipe(model={"name": "./base"}))


@case("Models", "a draft with a tokenizer.json that holds nothing")
def _draft_without_tokenizer(world: World) -> Printed:
    shutil.copytree(world.bases / "encoder", world.folder / "base")
    (world.folder / "base/tokenizer.json").write_text("{}")
    world.write("rows.csv", "text,label\na film,good\na bore,bad\n")
    return world.lora("init", "rows.csv", "--model", "./base")


@case("Models", "a draft for a base that cannot classify")
def _draft_of_mamba(world: World) -> Printed:
    MambaConfig().save_pretrained(world.folder / "base")
    tiny.tokenizer("llama").save_pretrained(world.folder / "base")
    rows = "".join(f"a film of {i} hours,good\na bore of {i} days,bad\n" for i in range(9))
    world.write("rows.csv", f"text,label\n{rows}")
    return world.lora("init", "rows.csv", "--model", "./base")


@case("Models", "a weight that is not a number")
def _nan(world: World) -> Printed:
    folder = world.folder / "base"
    shutil.copytree(world.bases / "encoder", folder)
    tensors = load_file(folder / "model.safetensors")
    next(t for name, t in tensors.items() if name.endswith("query.weight"))[0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return world.lora("train", world.recipe(model={"name": "./base"}))


@case("Models", "an encoder-decoder for a language model")
def _wrong_kind(world: World) -> Printed:
    tiny.save_encoder_decoder(world.folder / "base", "t5")
    task = {"type": "causal_lm", "text_column": "text"}
    return world.lora("validate", world.recipe(model={"name": "./base"}, task=task))


@case("Models", "an encoder for a language model")
def _encoder(world: World) -> Printed:
    task = {"type": "causal_lm", "text_column": "text"}
    return world.lora("train", world.recipe(task=task))


@case("Models", "gradient checkpointing where there is none")
def _checkpointing(world: World) -> Printed:
    config = AlbertConfig(
        vocab_size=tiny.vocabulary(), embedding_size=8, hidden_size=8, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=8, max_position_embeddings=40,
    )  # fmt: skip
    AlbertForSequenceClassification(config).save_pretrained(world.folder / "base")
    tiny.tokenizer().save_pretrained(world.folder / "base")
    train = {"gradient_checkpointing": True}
    adapter = {"target_modules": "all-linear"}
    return world.lora(
        "validate", world.recipe(model={"name": "./base"}, train=train, adapter=adapter)
    )


@case("Labels", "an end-of-text token in a text of an encoder-decoder")
def _end(world: World) -> Printed:
    tiny.save_encoder_decoder(world.folder / "base")
    world.write("rows.csv", "text,label\nwarm,good\na </s> b,bad\ndull,bad\n")
    return world.lora("validate", world.recipe(model={"name": "./base"}))


@case("Models", "an encoder-decoder whose tokenizer does not end a text")
def _no_end(world: World) -> Printed:
    tiny.save_encoder_decoder(world.folder / "base")
    tiny.tokenizer("llama").save_pretrained(world.folder / "base")
    return world.lora("validate", world.recipe(model={"name": "./base"}))


# -------------------------------------------------------------------------- the adapter's folder


@case("Adapters", "whose recipe was edited")
def _edited(world: World) -> Printed:
    file = world.folder / world.trained() / "recipe.yaml"
    file.write_text(file.read_text().replace("- bad\n  - good", "- good\n  - bad"))
    return world.lora("predict", "--adapter", "trained", "a warm film")


def _computation(change: Callable[[Path], None]) -> Callable[[World], Printed]:
    def run(world: World) -> Printed:
        folder = world.folder / world.trained()
        change(folder)
        write_manifest(folder)
        return world.lora("predict", "--adapter", "trained", "a warm film")

    return run


def _set(folder: Path, *path: str, value: Any) -> None:
    file = folder / "computation.json"
    whole = part = json.loads(file.read_text())
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    file.write_text(json.dumps(whole))


def _forget_tokenizer(folder: Path) -> None:
    _set(folder, "base", "tokenizer", value="another")
    _set(folder, "base", "tokenizer_copy", value="another")


for _name, _change in {
    "whose computation.json is cut": lambda f: (f / "computation.json").write_text('{"format"'),
    "whose computation.json is of a later version": lambda f: _set(f, "format", value=99),
    "of a base with another config.json": lambda f: _set(
        f, "base", "config", "num_attention_heads", value=2
    ),
    "of a base with another tokenizer": _forget_tokenizer,
}.items():
    CASES.append(Case("Adapters", _name, _computation(_change)))


# --------------------------------------------------------------------------- where A and B start


def _start(**adapter: Any) -> Callable[[World], Printed]:
    return lambda world: world.lora("validate", world.recipe(adapter=adapter))


for _name, _adapter in {
    "a rank that no weight has": {"init": "pissa", "rank": 64},
    "an odd rank": {"init": "orthogonal", "rank": 3},
    "an embedding alone": {"init": "olora", "rank": 2, "target_modules": ["word_embeddings"]},
}.items():
    CASES.append(Case("Models", f"a start for {_name}", _start(**_adapter)))


@case("Models", "fused kernels for a model that sees the other texts of a row")
def _(world: World) -> Printed:
    task = {"type": "sequence_classification", "text_column": "text", "max_length": ...}
    return world.lora(
        "train", world.recipe("llama", task=task, train={"kernels": "fused"}), "--set",
        "task.pad_token=<pad>")  # fmt: skip
