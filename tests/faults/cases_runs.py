"""Faults of models, adapters, training, evaluation and prediction."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import tiny
import torch
from cases import CASES, Case, case
from safetensors.torch import load_file, save_file
from world import TABLE, Printed, World

from lora_cli.files import write_manifest

HELD_OUT = {"train": "./rows.csv", "validation": "./dev.csv"}


def _with(command: str, base: str = "encoder", *flags: str, **sections: Any) -> Any:
    return lambda world: world.lora(command, world.recipe(base, **sections), *flags)


def _lacking(package: str, run: Callable[[World], Printed]) -> Callable[[World], Printed]:
    """Return what runs without a package, whether it is installed or not."""

    def without(world: World) -> Printed:
        with mock.patch.dict(sys.modules, {package: None}):
            return run(world)

    return without


# ------------------------------------------------------------------- models, targets and metrics

PLAIN: dict[tuple[str, str], Any] = {
    ("Models", "no such folder"): _with("validate", model={"name": "../bases/encodre"}),
    ("Models", "a folder without a model"): _with("validate", model={"name": "."}),
    ("Models", "a package that is not installed"): _with(
        "validate", model={"name": "package:no_such_model/model"}
    ),
    ("Models", "a package and a way out of it"): _with(
        "validate", model={"name": "package:yaml/../torch"}
    ),
    ("Models", "a Hub id without a network"): _with("validate", model={"name": "nobody/nothing"}),
    ("Models", "a name that is no Hub id"): _with("validate", model={"name": "my model"}),
    ("Models", "fp16 without a GPU"): _with("train", train={"precision": "fp16"}),
    ("Models", "a quantised base that is trained in full"): _with(
        "validate",
        model={"name": "../bases/encoder", "quantization": "int8"},
        adapter={"type": "full"},
    ),
    ("Targets", "that match nothing"): _with(
        "validate", adapter={"target_modules": ["query", "valeu"]}
    ),
    ("Targets", "a name where an expression is read"): _with(
        "validate", adapter={"target_modules": "query"}
    ),
    ("Targets", "all linear layers in a list"): _with(
        "validate", adapter={"target_modules": ["all-linear"], "layers": []}
    ),
    ("Targets", "that cannot be adapted"): _with(
        "validate", adapter={"target_modules": ["LayerNorm"]}
    ),
    ("Targets", "no regular expression"): _with(
        "validate",
        adapter={"target_modules": "(query", "rank_pattern": {"(": 4}, "exclude_modules": "[a"},
    ),
    ("Targets", "an expression that would take years"): _with(
        "validate", adapter={"target_modules": "(.|..)+(?<=Q)"}
    ),
    ("Targets", "what matches nothing else"): _with(
        "validate",
        adapter={
            "layers": [0, 7], "train_modules": ["poler"], "alpha_pattern": {"qurey": 3},
            "exclude_modules": ["dense"],
        },
    ),
    ("Targets", "none is left"): _with("validate", adapter={
        "target_modules": ["query"], "exclude_modules": ["query"], "rank_pattern": {"query": 2}}),
    ("Targets", "all are trained in full"): _with(
        "validate", "llama", adapter={"train_modules": ["layers"]}
    ),
    ("Targets", "nothing is trained"): _with("validate", "llama", adapter={"type": "none"}),
    ("Targets", "half of tied weights"): _with(
        "validate", "llama", adapter={"train_modules": ["lm_head"]}
    ),
    ("Targets", "a group of layers without any"): _with(
        "train", train={"optimizer": {"groups": {"layers": {"7-9": {"learning_rate": 1e-3}}}}}
    ),
    ("Training", "rates for what is not trained"): _with("validate", train={"optimizer": {
        "groups": {"modules": {
            "valeu": {"learning_rate": 1e-3}, "embeddings": {"learning_rate": 1e-3}}}}}),
    ("Training", "smaller rates of no layers"): _with(
        "validate", adapter={"type": "none"}, train={"optimizer": {"layer_decay": 0.9}}
    ),
    ("Targets", "to be frozen, that are none"): _with("validate", adapter={
        "type": "full", "freeze": ["embedings", "0-9", "dropout", "out_proj"]}),
    ("Targets", "of which all is frozen"): _with(
        "validate", "llama", adapter={"type": "full", "freeze": ["model", "lm_head"]}
    ),
    ("Targets", "modules in full, without adapters"): _with(
        "validate", adapter={"type": "bitfit", "train_modules": ["poler"]}
    ),
    ("Metrics", "of another task, when training"): _with("train", evaluate={"metrics": ["bleu"]}),
    ("Training", "with a log that is not installed"): _lacking(
        "trackio", _with("train", train={"trackers": ["trackio"]})
    ),
    ("Training", "with a mirror that needs a package"): _with(
        "train", checkpoint={"mirror": "gdrive://folder"}
    ),
    ("Metrics", "unknown"): _with("validate", evaluate={"metrics": ["acuracy"]}),
    ("Metrics", "the loss"): _with("validate", evaluate={"metrics": ["accuracy", "loss"]}),
    ("Metrics", "of another task"): _with("validate", evaluate={"metrics": ["bleu"]}),
    ("Metrics", "of one label"): _with(
        "validate",
        task={"problem": "multi_label", "label_separator": ";"},
        evaluate={"metrics": ["matthews_correlation"]},
    ),
    ("Metrics", "a script that is not there"): _with("validate", evaluate={"metrics": ["./m.py"]}),
    ("Metrics", "a best that is not measured"): _with(
        "validate", evaluate={"metrics": ["f1"], "best": {"metric": "acuracy"}}
    ),
}  # fmt: skip
for (_area, _name), _run in PLAIN.items():
    CASES.append(Case(_area, _name, _run))

SCRIPT = """
import datasets
import evaluate
class M(evaluate.Metric):
    def _info(self):
        value = datasets.Value("int64")
        features = datasets.Features({NAMES: value, "references": value})
        return evaluate.MetricInfo(description="", citation="", features=features)
    def _compute(self, **rows):
        BODY
"""


def _script(command: str, names: str, body: str, **evaluate: Any) -> Callable[[World], Printed]:
    def run(world: World) -> Printed:
        world.write("mine.py", SCRIPT.replace("NAMES", names).replace("BODY", body))
        world.write("dev.csv", "text,label\nnew,good\nold,bad\n")
        world.write("rows.csv", TABLE)
        recipe = world.recipe(data=HELD_OUT, evaluate={"metrics": ["./mine.py"], **evaluate})
        return world.lora(command, recipe)

    return run


@case("Metrics", "unknown, and code of others may run")
def _unknown_metric(world: World) -> Printed:
    world.write("dev.csv", "text,label\nnew,good\nold,bad\n")
    world.write("rows.csv", TABLE)
    metrics = {"metrics": ["acuracy"]}
    trusted = {"trust_remote_code": True}
    return world.lora("train", world.recipe(data=HELD_OUT, model=trusted, evaluate=metrics))


BEST = {"best": {"metric": "mine", "mode": "max"}}
for _name, _run in {
    "a script that cannot be read": _script("validate", '"predictions"', "return )"),
    "a script for other columns": _script("validate", '"sources"', "return {}"),
    "a script that fails": _script("train", '"predictions"', "raise KeyError(3)"),
    "a script that gives another metric": _script(
        "train", '"predictions"', "return {'other': 1.0}", **BEST
    ),
    "whether less or more is better": _script(
        "validate", '"predictions"', "return {'mine': 1.0}", best={"metric": "mine"}
    ),
}.items():
    CASES.append(Case("Metrics", _name, _run))


@contextmanager
def _copied_base(world: World, base: str = "encoder") -> Iterator[Path]:
    folder = world.folder / "base"
    shutil.copytree(world.bases / base, folder)
    yield folder


def _base(change: Callable[[Path], None], base: str = "encoder") -> Callable[[World], Printed]:
    def run(world: World) -> Printed:
        with _copied_base(world, base) as folder:
            change(folder)
        return world.lora("train", world.recipe(base, model={"name": "./base"}))

    return run


def _edit(file: Path, **changes: Any) -> None:
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _drop_tensors(file: Path, part: str) -> None:
    kept = {name: tensor for name, tensor in load_file(file).items() if part not in name}
    save_file(kept, file, {"format": "pt"})


def _index(folder: Path, text: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)


def _link(file: Path) -> None:
    file.rename(file.parents[1] / file.name)
    file.symlink_to(Path("..") / file.name)


def _no_end(folder: Path) -> None:
    _edit(folder / "tokenizer_config.json", eos_token=...)
    (folder / "special_tokens_map.json").unlink(missing_ok=True)


for _name, _run in {
    "a configuration that is no JSON": _base(lambda f: _cut(f / "config.json")),
    "weights that are cut": _base(lambda f: _cut(f / "model.safetensors")),
    "weights of another shape": _base(lambda f: _edit(f / "config.json", intermediate_size=64)),
    "weights that lack a layer": _base(
        lambda f: _drop_tensors(f / "model.safetensors", "layer.1.")
    ),
    "no tokenizer": _base(lambda f: [p.unlink() for p in f.glob("tok*")] and None),
    "code of its own": _base(
        lambda f: _edit(f / "config.json", model_type="x", auto_map={"AutoConfig": "x.X"})
    ),
    "no end-of-text token": _base(_no_end, "llama"),
    "an adapter for a base": _base(lambda f: (f / CONFIG).write_text("{}") and None),
    "weights that are a pickle": _base(
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin") and None
    ),
    "an index that is no JSON": _base(lambda f: _index(f, "{")),
    "an index of files elsewhere": _base(
        lambda f: _index(f, '{"weight_map": {"a": "../x.safetensors"}}')
    ),
    "an index of files that are missing": _base(
        lambda f: _index(f, '{"weight_map": {"a": "x.safetensors"}}')
    ),
    "a link to elsewhere": _base(lambda f: _link(f / "config.json")),
}.items():
    CASES.append(Case("Models", _name, _run))


# ------------------------------------------------------------------------------------- adapters


def _adapter(change: Callable[[Path], None], *command: str) -> Callable[[World], Printed]:
    """Damage a trained adapter, which then has no manifest, and use it."""

    def run(world: World) -> Printed:
        folder = world.folder / world.trained()
        (folder / "manifest.json").unlink()
        change(folder)
        return world.lora(*(command or ("predict", "--adapter", "trained", "a film")))

    return run


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def _tensors(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    return lambda f: save_file(change(load_file(f / WEIGHTS)), f / WEIGHTS, {"format": "pt"})


def _of_first(part: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def changed(tensors: dict[str, Any]) -> dict[str, Any]:
        first = next(name for name in sorted(tensors) if part in name)
        return tensors | {first: change(tensors[first]).contiguous()}

    return _tensors(changed)


def _kronecker(folder: Path) -> None:
    """Make it a LoKr adapter that lacks one of its factors."""
    values = json.loads((folder / CONFIG).read_text())
    kept = ("task_type", "base_model_name_or_path", "modules_to_save")
    config = {"peft_type": "LOKR", "r": 4, **{key: values[key] for key in kept}}
    (folder / CONFIG).write_text(json.dumps(config))
    name = "base_model.model.roberta.encoder.layer.0.attention.self.query.lokr_w2"
    _drop_tensors(folder / WEIGHTS, "lora_")
    _tensors(lambda tensors: tensors | {name: torch.ones(8, 8)})(folder)


def _renamed(part: str, other: str) -> Callable[[Path], None]:
    return _tensors(lambda t: {name.replace(part, other): tensor for name, tensor in t.items()})


def _without(part: str) -> Callable[[Path], None]:
    return lambda f: _drop_tensors(f / WEIGHTS, part)


def _config(**changes: Any) -> Callable[[Path], None]:
    return lambda f: _edit(f / CONFIG, **changes)


ADAPTERS: dict[str, Callable[[Path], None]] = {
    "no weights": lambda f: (f / WEIGHTS).unlink(),
    "a pickle": lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin") and None,
    "no configuration": lambda f: (f / CONFIG).unlink(),
    "a configuration that is cut": lambda f: _cut(f / CONFIG),
    "a configuration that is a list": lambda f: (f / CONFIG).write_text("[]") and None,
    "another type of adapter": _config(peft_type="IA3"),
    "LoKr with one of its factors": _kronecker,
    "DoRA without magnitudes": _config(use_dora=True),
    "magnitudes without DoRA": _tensors(lambda t: t | {
        "base_model.model.roberta.encoder.layer.0.attention.self.query.lora_magnitude_vector":
            torch.ones(32)}),
    "an adapter that depends on tokens": _config(alora_invocation_tokens=[1]),
    "a base that was changed too": _config(init_lora_weights="pissa"),
    "an initialisation that is no name": _config(init_lora_weights=[1]),
    "layers that run several times": _config(layer_replication=[[0, 2], [1, 2]]),
    "a key of a newer version": _config(use_newer={"way": 1}),
    "a rank that is no number": _config(r="eight"),
    "an alpha that is no number": _config(lora_alpha=float("nan")),
    "an alpha that overflows": _config(lora_alpha=1e36),
    "a rank that a tie decides": _config(r=3, ensure_weight_tying=True),
    "weights that are cut": lambda f: _cut(f / WEIGHTS),
    "NaN": _of_first("lora_A", lambda t: t * float("nan")),
    "another rank": _of_first("lora_A", lambda t: t[:2]),
    "another shape": _of_first("lora_B", lambda t: t[:7]),
    "half of a pair": _without("0.attention.self.query.lora_A"),
    "fewer layers": _without("layer.1."),
    "more layers": _renamed("layer.1.", "layer.9."),
    "layers that cannot be adapted": _renamed("self.query.lora", "output.LayerNorm.lora"),
    "tensors of another kind": _renamed("lora_A", "lora_C"),
    "no head": _without("classifier"),
    "a head of other labels": _of_first("classifier.out_proj", lambda t: t.repeat(2, 1)
        if t.ndim == 2 else t.repeat(2)),
    "a module adapted and trained in full": _renamed(
        "0.attention.self.query.lora_A", "0.attention.self.query.original_module.lora_A"),
    "a bias of two values": _tensors(lambda t: t | {
        "base_model.model.classifier.modules_to_save.default.dense.bias": torch.ones(32)}),
    "single rows of an embedding": _tensors(lambda t: t | {
        "base_model.model.roberta.embeddings.word_embeddings.token_adapter.trainable_tokens_delta":
            torch.ones(2, 32)}),
    "whole numbers": _tensors(lambda t: t | {"steps": torch.ones(2, dtype=torch.int64)}),
    "a tensor twice": _tensors(lambda t: t | {
        n.removeprefix("base_model.model."): x.clone() for n, x in t.items()}),
    "a fingerprint that cannot be read": lambda f: _cut(f / "base.json"),
    "a link to elsewhere": lambda f: _link(f / CONFIG),
    "many faults": _tensors(lambda t: {
        n.replace("lora_A", "lora_C").replace("classifier.dense", "classifier.x"): x
        for n, x in t.items()}),
    "parts that are missing": _config(modules_to_save=["classifier", "embeddings"]),
    "an embedding of another base": _tensors(lambda t: t | {
        "base_model.model.roberta.embeddings.word_embeddings.base_layer.weight":
            torch.zeros(tiny.vocabulary(), 32)}),
    "more than the model has": _renamed("classifier.dense", "classifier.dnese"),
}  # fmt: skip


for _name, _change in ADAPTERS.items():
    CASES.append(Case("Adapters", _name, _adapter(_change)))


@case("Adapters", "no folder to merge")
def _(world: World) -> Printed:
    return world.lora("merge", "--base", "../bases/encoder", "--adapter", "nowhere", "--to", "to")


@case("Adapters", "files that were changed")
def _(world: World) -> Printed:
    folder = world.folder / world.trained()
    with (folder / WEIGHTS).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    (folder / "README.md").unlink()
    return world.lora("predict", "--adapter", "trained", "a film")


@case("Adapters", "a manifest that cannot be read")
def _(world: World) -> Printed:
    _cut(world.folder / world.trained() / "manifest.json")
    return world.lora("predict", "--adapter", "trained", "a film")


@case("Adapters", "a manifest that lacks a file")
def _(world: World) -> Printed:
    file = world.folder / world.trained() / "manifest.json"
    files = json.loads(file.read_text())["files"]
    del files[CONFIG]
    file.write_text(json.dumps({"files": files}))
    return world.lora("predict", "--adapter", "trained", "a film")


@case("Adapters", "a manifest of a later version")
def _(world: World) -> Printed:
    file = world.folder / world.trained() / "manifest.json"
    file.write_text(json.dumps({"format": 2, "files": []}))
    return world.lora("predict", "--adapter", "trained", "a film")


@case("Adapters", "another base of the same shapes")
def _(world: World) -> Printed:
    world.trained()
    tiny.save_encoder(world.folder / "other", seed=1)
    flags = ["--set", "model.name=other"]
    return world.lora("predict", "--adapter", "trained", *flags, "a film")


@case("Adapters", "a manifest that names another folder")
def _(world: World) -> Printed:
    file = world.folder / world.trained() / "manifest.json"
    files = json.loads(file.read_text())["files"]
    file.write_text(json.dumps({"files": files | {"../rows.csv": files[CONFIG]}}))
    return world.lora("predict", "--adapter", "trained", "a film")


# ------------------------------------------------------------------------------------- training


def _start(**adapter: Any) -> Callable[[World], Printed]:
    def run(world: World) -> Printed:
        world.trained()
        task = {"labels": ["bad", "good"]}
        return world.lora("train", world.recipe(
            adapter={"from": "./trained", **adapter}, task=task))  # fmt: skip

    return run


def _negative_alpha(world: World) -> Printed:
    folder = world.folder / world.trained()
    (folder / "manifest.json").unlink()
    _edit(folder / CONFIG, lora_alpha=-3)
    recipe = world.recipe(adapter={"from": "./trained"}, task={"labels": ["bad", "good"]})
    return world.lora("train", recipe)


def _decomposed(world: World) -> Printed:
    folder = world.folder / world.trained()
    (folder / "manifest.json").unlink()
    _kronecker(folder)
    _edit(folder / CONFIG, decompose_both=True)
    task = {"labels": ["bad", "good"]}
    return world.lora("train", world.recipe(adapter={"from": "./trained"}, task=task))


for _name, _run in {
    "of another rank and alpha": _start(rank=3, alpha=5),
    "of other targets": _start(target_modules=["key"]),
    "of factors that no recipe names": _decomposed,
    "whose alpha learns nothing": _negative_alpha,
    "that is not there": _with("train", adapter={"from": "./nowhere"}),
    "of the Hub, without a network": _with("train", adapter={"from": "nobody/nothing"}),
}.items():
    CASES.append(Case("Starting from an adapter", _name, _run))


@case("Starting from an adapter", "of other labels")
def _(world: World) -> Printed:
    world.trained()
    task = {"labels": ["good", "bad"]}
    return world.lora("train", world.recipe(adapter={"from": "./trained"}, task=task))


def _environment(**variables: str) -> Callable[[World], Printed]:
    """Train with these variables, which place the processes."""

    def run(world: World) -> Printed:
        with mock.patch.dict(os.environ, variables):
            return world.lora("train", world.recipe())

    return run


PLACED = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
for _name, _run in {
    "with a number of processes that is none": _environment(WORLD_SIZE="two"),
    "as one of two processes, of which little is known": _environment(WORLD_SIZE="2", RANK="1"),
    "as another process than the only one": _environment(LOCAL_RANK="3"),
    "as the third of two processes": _environment(RANK="2", LOCAL_RANK="2", **PLACED),
    "as one of several processes of MPI": _environment(OMPI_COMM_WORLD_SIZE="4"),
}.items():
    CASES.append(Case("Training", _name, _run))


@case("Training", "into a folder that is not empty")
def _(world: World) -> Printed:
    world.write("out/mine.txt", "mine")
    return world.lora("train", world.recipe())


@case("Training", "into a folder that holds no run")
def _(world: World) -> Printed:
    world.write("out/mine.txt", "mine")
    return world.lora("train", world.recipe(), "--resume")


@case("Training", "into a file")
def _(world: World) -> Printed:
    return world.lora("train", world.recipe(), "-o", world.write("mine.txt", "mine"))


@case("Training", "below a file")
def _(world: World) -> Printed:
    return world.lora("train", world.recipe(), "-o", world.write("mine.txt", "mine") + "/out")


@case("Training", "with numbers that go bad")
def _(world: World) -> Printed:
    optimizer = {"type": "sgd", "learning_rate": 1e38}
    train = {"max_steps": 4, "optimizer": optimizer, "max_grad_norm": None, "log_every_steps": 1}
    return world.lora("train", world.recipe(train=train, adapter={"alpha": 1e30}))


@case("Training", "on a base that yields NaN")
def _(world: World) -> Printed:
    shutil.copytree(world.bases / "encoder", world.folder / "broken")
    file = world.folder / "broken" / "model.safetensors"
    tensors = load_file(file)
    tensors["roberta.embeddings.LayerNorm.weight"].fill_(torch.nan)
    save_file(tensors, file, metadata={"format": "pt"})
    for name in ("rows.csv", "dev.csv"):
        world.write(name, TABLE)
    data = {**HELD_OUT, "check": {"max_overlap": 1.0}}
    return world.lora("train", world.recipe(model={"name": "./broken"}, data=data))


@case("Training", "with a disk that takes no more")
def _(world: World) -> Printed:
    recipe = world.recipe()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    world.lora("validate", recipe)  # the rows are read, and kept elsewhere
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        return world.lora("train", recipe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@case("Merging", "onto a disk that takes no more")
def _(world: World) -> Printed:
    adapter = world.trained()  # its files are larger
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        return world.lora("merge", "--adapter", adapter, "--to", "merged")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@case("Training", "until the hours are over")
def _(world: World) -> Printed:
    return world.lora("train", world.recipe(train={"max_hours": 1e-9, "max_steps": 50}))


@case("Training", "with a mirror that is none")
def _(world: World) -> Printed:
    return world.lora("train", world.recipe(checkpoint={"mirror": "nothing://there"}))


@case("Training", "again with another recipe and other rows")
def _(world: World) -> Printed:
    world.write("rows.csv", TABLE)
    world.lora("train", world.recipe(), "--set", "checkpoint.every_steps=1")
    (world.folder / "out" / "report.json").unlink()
    world.write("rows.csv", TABLE + "one more,good\n")
    return world.lora("train", "recipe.yaml", "--resume", "--set", "train.seed=1")


@case("Training", "again from checkpoints that are damaged")
def _(world: World) -> Printed:
    world.lora("train", world.recipe())
    (world.folder / "out" / "report.json").unlink()
    for step in (world.folder / "out" / "checkpoints").iterdir():
        _cut(step / "trainer.json")
        (step / CONFIG).unlink()
    return world.lora("train", "recipe.yaml", "--resume")


@case("Training", "into a folder that another process writes to")
def _(world: World) -> Printed:
    world.write("out/.lock", "")
    code = (
        "import fcntl, sys\n"
        "file = open('out/.lock', 'w')\n"
        "fcntl.lockf(file, fcntl.LOCK_EX)\n"
        "print('process 4711 on elsewhere', file=file, flush=True)\n"
        "print(flush=True)\n"
        "sys.stdin.read()\n"
    )
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=world.folder, stdin=pipe, stdout=pipe) as other:
        assert other.stdout is not None
        other.stdout.readline()
        return world.lora("train", world.recipe())


@case("Training", "again with another number of threads")
def _(world: World) -> Printed:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        world.lora("train", world.recipe())
        (world.folder / "out" / "report.json").unlink()
        torch.set_num_threads(2)
        return world.lora("train", "recipe.yaml", "--resume")
    finally:
        torch.set_num_threads(before)


@case("Training", "again from a checkpoint of another version")
def _(world: World) -> Printed:
    world.lora("train", world.recipe())
    (world.folder / "out" / "report.json").unlink()
    for step in (world.folder / "out" / "checkpoints").iterdir():
        _edit(step / "trainer.json", pace=3)
        write_manifest(step)
    return world.lora("train", "recipe.yaml", "--resume")


@case("Training", "again from a checkpoint under another name")
def _(world: World) -> Printed:
    world.lora("train", world.recipe())
    (world.folder / "out" / "report.json").unlink()
    for step in (world.folder / "out" / "checkpoints").iterdir():
        step.rename(step.with_name("step-000007"))
    return world.lora("train", "recipe.yaml", "--resume")


@case("Training", "again from checkpoints without a manifest")
def _(world: World) -> Printed:
    world.lora("train", world.recipe())
    (world.folder / "out" / "report.json").unlink()
    for step in (world.folder / "out" / "checkpoints").iterdir():
        (step / "manifest.json").unlink()
    return world.lora("train", "recipe.yaml", "--resume")


@case("Training", "again after the end, with fewer steps")
def _(world: World) -> Printed:
    world.lora("train", world.recipe())
    flags = ("--set", "train.max_steps=1", "--set", "checkpoint.allow_changes=true")
    return world.lora("train", "recipe.yaml", "--resume", *flags)


@case("Training", "again after the end, with other rows")
def _(world: World) -> Printed:
    world.lora("train", world.recipe())
    world.write("rows.csv", TABLE + "one more,good\n")
    return world.lora("train", "recipe.yaml", "--resume")


@case("Training", "again after the end, without checkpoints")
def _(world: World) -> Printed:
    world.lora("train", world.recipe())
    shutil.rmtree(world.folder / "out" / "checkpoints")
    flags = ("--set", "train.max_steps=4", "--set", "checkpoint.allow_changes=true")
    return world.lora("train", "recipe.yaml", "--resume", *flags)


@case("Training", "again after the end, with damaged checkpoints")
def _(world: World) -> Printed:
    world.lora("train", world.recipe())
    for file in world.folder.glob("out/checkpoints/*/trainer.json"):
        file.write_text("{")
    return world.lora("train", "recipe.yaml", "--resume", "--set", "train.max_steps=4")


@case("Training", "with the mirror of another run")
def _(world: World) -> Printed:
    mirror = ("--set", "checkpoint.mirror=mirror")
    world.lora("train", world.recipe(), *mirror)
    return world.lora(
        "train", "recipe.yaml", "--resume", *mirror, "-o", "new", "--set", "train.seed=1"
    )


@case("Training", "anew, with the mirror of a run")
def _(world: World) -> Printed:
    world.write("mirror/run.json", '{"recipe": {}, "data": {}}')
    return world.lora("train", world.recipe(checkpoint={"mirror": "./mirror"}))


@case("Training", "with a mirror of unknown recipe")
def _(world: World) -> Printed:
    world.write("mirror/run.json", "{")
    return world.lora("train", world.recipe(checkpoint={"mirror": "./mirror"}))


def _again(file: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """Go on from a checkpoint whose tensors, and whose manifest, were changed."""

    def run(world: World) -> Printed:
        world.lora("train", world.recipe())
        (world.folder / "out" / "report.json").unlink()
        for step in (world.folder / "out" / "checkpoints").iterdir():
            save_file(change(load_file(step / file)), step / file, {"format": "pt"})
            write_manifest(step)
        return world.lora("train", "recipe.yaml", "--resume")

    return run


for _name, _run in {
    "of an optimizer that was changed": _again(
        "optimizer.safetensors",
        lambda t: {n: x * 2 if n.endswith("exp_avg") else x for n, x in t.items()},
    ),
    "of an optimizer that lacks tensors": _again(
        "optimizer.safetensors", lambda t: {n: x for n, x in t.items() if "exp_avg_sq" not in n}
    ),
    "of weights that lack tensors": _again(
        WEIGHTS, lambda t: {n: x for n, x in t.items() if "layer.1." not in n}
    ),
}.items():
    CASES.append(Case("Training", f"again from a checkpoint {_name}", _run))


# ----------------------------------------------------------------- evaluation, merging, predicting

AGAINST = ("eval", "--adapter", "trained", "--against")
SIMPLE: dict[tuple[str, str], tuple[str, ...]] = {
    ("Evaluation", "of a split that is not there"): (
        "eval", "--adapter", "trained", "--split", "x"),
    ("Evaluation", "of a file that is not there"): ("eval", "--adapter", "trained", "--input", "x"),
    ("Evaluation", "of a device"): ("eval", "--adapter", "trained", "--input", "/dev/null"),
    ("Evaluation", "of a folder"): ("eval", "--adapter", "trained", "--input", "."),
    ("Evaluation", "against nothing"): (*AGAINST, "nowhere", "--input", "rows.csv"),
    ("Evaluation", "by a metric that is none"): (
        *AGAINST, "trained", "--metric", "acuracy", "--input", "rows.csv"),
    ("Evaluation", "in fp16 without a GPU"): (
        "eval", "--adapter", "trained", "--input", "rows.csv", "--set", "train.precision=fp16"),
    ("Evaluation", "of a split that is not there, against another"): (
        *AGAINST, "trained", "--split", "validation"),
    ("Prediction", "of a file that is not there"): (
        "predict", "--adapter", "trained", "--input", "x.csv", "--output", "y.csv"),
    ("Prediction", "over the file itself"): (
        "predict", "--adapter", "trained", "--input", "rows.csv", "--output", "rows.csv"),
    ("Prediction", "into a file of unknown kind"): (
        "predict", "--adapter", "trained", "--input", "rows.csv", "--output", "y.xlsx"),
    ("Prediction", "into a folder that is not there"): (
        "predict", "--adapter", "trained", "--input", "rows.csv", "--output", "no/y.csv"),
    ("Prediction", "of a file without rows"): (
        "predict", "--adapter", "trained", "--input", "empty.csv", "--output", "y.csv"),
    ("Prediction", "of a file without rows that can be read"): (
        "predict", "--adapter", "trained", "--input", "bad.jsonl", "--output", "y.csv"),
    ("Prediction", "into a folder"): (
        "predict", "--adapter", "trained", "--input", "rows.csv", "--output", "trained"),
    ("Prediction", "over another file"): (
        "predict", "--adapter", "trained", "--input", "rows.csv", "--output", "other.csv"),
    ("Prediction", "of JSON, into parquet"): (
        "predict", "--adapter", "trained", "--input", "good.jsonl", "--output", "y.parquet"),
    ("Prediction", "of a file without the column"): (
        "predict", "--adapter", "trained", "--input", "other.csv", "--output", "y.csv"),
    ("Merging", "into a folder that is not empty"): (
        "merge", "--base", "../bases/encoder", "--adapter", "trained", "--to", "trained"),
    ("Merging", "a whole model"): (
        "merge", "--base", "../bases/encoder", "--adapter", "whole", "--to", "to"),
}  # fmt: skip


def _simple(arguments: tuple[str, ...]) -> Callable[[World], Printed]:
    def run(world: World) -> Printed:
        world.trained()
        world.write("rows.csv", TABLE)
        world.write("empty.csv", "")
        world.write("bad.jsonl", "{\n")
        world.write("good.jsonl", '{"text": "a film"}\n')
        world.write("other.csv", "sentence\na\n")
        recipe = (world.folder / "trained" / "recipe.yaml").read_text()
        world.write("whole/recipe.yaml", recipe.replace("type: lora", "type: full"))
        return world.lora(*arguments)

    return run


for (_area, _name), _command in SIMPLE.items():
    CASES.append(Case(_area, _name, _simple(_command)))


def _old(old: str, new: str) -> Callable[[World], Printed]:
    def run(world: World) -> Printed:
        folder = world.folder / world.trained("old")
        world.trained()
        file = folder / "recipe.yaml"
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))
        world.write("rows.csv", TABLE)
        return world.lora(*AGAINST, "old", "--input", "rows.csv")

    return run


CASES.append(Case("Evaluation", "against another base", _old("bases/encoder", "bases/other")))
CASES.append(Case("Evaluation", "against other labels", _old("- bad\n  - good", "- no\n  - yes")))


@case("Evaluation", "worse than the old adapter")
def _(world: World) -> Printed:
    world.trained("old")
    folder = world.folder / world.trained()
    (folder / "manifest.json").unlink()
    _tensors(lambda t: {n: -x * 50 if "classifier" in n else x for n, x in t.items()})(folder)
    world.write("rows.csv", TABLE)
    return world.lora(*AGAINST, "old", "--input", "rows.csv", "--metric", "loss")


@case("Evaluation", "of a file, with labels that the Hub knows")
def _(world: World) -> Printed:
    world.trained()
    world.write("rows.csv", TABLE)
    recipe = world.recipe(data={"name": "nobody/nothing"})
    return world.lora("eval", "--adapter", "trained", "--recipe", recipe, "--input", "rows.csv")


@case("Evaluation", "of a file, with weights that the rows of the Hub give")
def _(world: World) -> Printed:
    world.trained()
    world.write("rows.csv", TABLE)
    task = {"labels": ["bad", "good"], "class_weights": "balanced"}
    recipe = world.recipe(data={"name": "nobody/nothing"}, task=task)
    return world.lora("eval", "--adapter", "trained", "--recipe", recipe, "--input", "rows.csv")


@case("Evaluation", "of a stream")
def _(world: World) -> Printed:
    world.trained()
    streaming = ("--set", "data.streaming=true")
    return world.lora("eval", "--adapter", "trained", "--split", "train", *streaming)


@case("Evaluation", "of labels that the adapter alone knows")
def _(world: World) -> Printed:
    world.trained()
    recipe = world.recipe(data={"path": "nowhere.csv"})
    return world.lora("predict", "--adapter", "trained", "--recipe", recipe, "a film")


def _predicting(
    source: str, content: str | bytes, target: str = "y.csv", **sections: Any
) -> Callable[[World], Printed]:
    def run(world: World) -> Printed:
        world.trained()
        world.write(source, content)
        world.write("old.csv", "mine")
        (world.folder / "full.csv").mkdir(exist_ok=True)
        more = []
        if sections:
            world.write("rows.csv", TABLE)
            recipe = world.recipe(task={"labels": ["bad", "good"]}, name="r.yaml", **sections)
            more = ["--recipe", recipe]
        files = ["--input", source, "--output", target]
        return world.lora("predict", "--adapter", "trained", *files, *more)

    return run


NAMELESS = {"path": "rows.csv", "format": {"header": False, "columns": ["text", "label"]}}
for _name, _run in {
    "over another file": _predicting("a.csv", TABLE, "old.csv"),
    "over a folder": _predicting("a.csv", TABLE, "full.csv"),
    "of JSON as parquet": _predicting("a.jsonl", '{"text": "a"}\n', "y.parquet"),
    "of an empty file": _predicting("a.csv", ""),
    "of rows that cannot be read": _predicting("a.jsonl", "{broken\n"),
    "of a parquet file that is cut": _predicting("a.parquet", b"PAR1" + bytes(99)),
    "of a gzip file that is cut": _predicting("a.csv.gz", b"\x1f\x8b\x08\x00abc"),
    "of a file with a header, where the recipe's has none": _predicting(
        "a.csv", "sentence,label\n" + "a fine film,good\n" * 9, data=NAMELESS
    ),
}.items():
    CASES.append(Case("Prediction", _name, _run))


@case("Prediction", "of one text where there are two")
def _(world: World) -> Printed:
    world.trained()
    recipe = world.recipe(task={"labels": ["bad", "good"], "text_pair_column": "other"})
    return world.lora("predict", "--adapter", "trained", "--recipe", recipe, "a film")


@case("Merging", "an adapter that does not say its task")
def _(world: World) -> Printed:
    folder = world.folder / world.trained()
    for name in ("manifest.json", "recipe.yaml"):
        (folder / name).unlink()
    _edit(folder / CONFIG, task_type=None)
    return world.lora("merge", "--base", "../bases/encoder", "--adapter", "trained", "--to", "to")


@case("Merging", "an adapter whose classifier is missing")
def _(world: World) -> Printed:
    folder = world.folder / world.trained()
    for name in ("manifest.json", "recipe.yaml"):
        (folder / name).unlink()
    _drop_tensors(folder / WEIGHTS, "classifier")
    return world.lora("merge", "--base", "../bases/encoder", "--adapter", "trained", "--to", "to")


@case("Merging", "weights that the base's dtype cannot hold")
def _(world: World) -> Printed:
    folder = world.folder / world.trained()
    (folder / "manifest.json").unlink()
    (folder / "base.json").unlink()  # the half is another base
    _tensors(lambda t: {n: x * 1e5 if "lora_" in n else x for n, x in t.items()})(folder)
    shutil.copytree(world.bases / "encoder", world.folder / "half")
    weights = load_file(world.folder / "half" / "model.safetensors")
    half = {name: tensor.half() for name, tensor in weights.items()}
    save_file(half, world.folder / "half" / "model.safetensors", {"format": "pt"})
    _edit(world.folder / "half" / "config.json", dtype="float16", torch_dtype=...)
    return world.lora("merge", "--base", "half", "--adapter", "trained", "--to", "to")


@case("Merging", "into a base that is quantised")
def _(world: World) -> Printed:
    world.trained()
    shutil.copytree(world.bases / "encoder", world.folder / "eight")
    _edit(world.folder / "eight" / "config.json", quantization_config={
        "quant_method": "bitsandbytes", "load_in_8bit": True})  # fmt: skip
    return world.lora("merge", "--base", "eight", "--adapter", "trained", "--to", "to")


@case("Merging", "into a folder that cannot be made")
def _(world: World) -> Printed:
    world.trained()
    world.write("file", "")
    return world.lora(
        "merge", "--base", "../bases/encoder", "--adapter", "trained", "--to", "file/to"
    )
