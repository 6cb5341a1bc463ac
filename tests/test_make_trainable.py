from __future__ import annotations

import itertools
import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import peft
import pytest
import tiny
import torch
from closeness import assert_close
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from typer.testing import CliRunner

from lora_cli.adapters.attach import lora_layers, trainable_parameters
from lora_cli.adapters.make_trainable import _trained_in_full, make_trainable
from lora_cli.cli.app import app
from lora_cli.errors import IntegrityError, LoraError
from lora_cli.evaluation.evaluate_adapter import evaluate_adapter
from lora_cli.evaluation.open_adapter import open_adapter
from lora_cli.recipe import Recipe, load_recipe
from lora_cli.tasks import build_task
from lora_cli.tasks.contract import Task
from lora_cli.training import run as training_run
from lora_cli.training import train

IDS = torch.arange(20).reshape(2, 10) + 5


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {"encoder": tiny.save_encoder(folder / "e"), "llama": tiny.save_llama(folder / "l")}


@pytest.fixture
def base(bases: dict[str, Path]) -> Path:
    return bases["encoder"]


OLD = {"rank": 3, "alpha": 5, "use_rslora": True, "target_modules": ["query", "output.dense"]}


def recipe_file(base: Path, folder: Path, **sections: Any) -> Path:
    folder.mkdir(exist_ok=True)
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(tiny.CORPUS)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")
    sections["train"] = {
        "max_steps": 4, "optimizer": {"type": "adamw", "learning_rate": 0.01},
        **sections.get("train", {}),
    }  # fmt: skip
    data = {"train": "rows.jsonl", "validation": "rows.jsonl", "check": {"max_overlap": 1.0}}
    return tiny.recipe(base, folder, data=data, **sections)


def trained(base: Path, folder: Path, **sections: Any) -> Path:
    """Return the output folder of a run; one that was trained before is copied."""
    key = ("trained", str(base), json.dumps(sections, sort_keys=True))
    tiny.saved_once(
        folder, key, lambda place: train(load_recipe(recipe_file(base, place, **sections)))
    )
    return folder / "out"


def started(recipe: Recipe) -> tuple[Task, nn.Module]:
    task = build_task(recipe)
    task.load_processor()
    torch.manual_seed(77)
    model, new = task.load_model(torch.device("cpu"))
    make_trainable(model, recipe, new, learned=task.learned)
    return task, model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=IDS).logits
    return result


def only_from(path: Path, old: Path | str, **adapter: Any) -> Recipe:
    """Return the recipe with nothing but `from` in its adapter section, and what is given."""
    section = json.dumps({"from": str(old), **adapter})
    return load_recipe(path, [f"adapter={section}"])


@pytest.mark.parametrize(
    ("kind", "adapter"),
    [
        ("encoder", OLD),
        ("encoder", {"rank": 2, "bias": "all", "train_modules": ["embeddings.LayerNorm"]}),
        ("encoder", {"rank_pattern": {"query": 6}, "alpha_pattern": {"value": 3.5}}),
        ("encoder", {"type": "none"}),
        ("encoder", {"type": "bitfit"}),
        ("llama", {"rank": 2, "target_modules": "all-linear", "exclude_modules": ["q_proj"]}),
    ],
)
@pytest.mark.slow
def test_step_0_is_the_old_adapter_bit_for_bit(
    bases: dict[str, Path], tmp_path: Path, kind: str, adapter: dict[str, Any]
) -> None:
    old = trained(bases[kind], tmp_path / "old", adapter=adapter)
    _, before, _ = open_adapter(old, load_recipe(old / "recipe.yaml"))
    path = recipe_file(bases[kind], tmp_path / "new")
    recipe = only_from(path, old)
    task, model = started(recipe)
    assert torch.equal(logits(model), logits(before))
    assert not torch.equal(logits(model), logits(tiny.enliven(before)))
    # it is trained as the old one was, head included
    train_old = load_recipe(old / "recipe.yaml")
    _, like = started(train_old)
    assert list(trainable_parameters(model)) == list(trainable_parameters(like))
    for name, layer in lora_layers(model).items():
        assert layer.scaling == lora_layers(like)[name].scaling
    # attached by what was learnt of the recipe, the parameters are the same
    _, again = started(task.completed_recipe.with_values({"adapter.from_": None}))
    shapes = [{n: p.shape for n, p in trainable_parameters(m).items()} for m in (model, again)]
    assert shapes[0] == shapes[1]


def test_training_goes_on_and_the_recipe_records_it(base: Path, tmp_path: Path) -> None:
    old = trained(base, tmp_path / "old", adapter=OLD)
    path = recipe_file(base, tmp_path / "new")
    report = train(only_from(path, old, dropout=0.1))
    first = json.loads((old / "report.json").read_text())["metrics"]["after"]["validation"]
    assert report["metrics"]["before"]["validation"] == pytest.approx(first, rel=1e-6)
    assert report["metrics"]["after"]["validation"]["loss"] != first["loss"]
    assert report["adapter"]["from"] == str(old)
    new = tmp_path / "new" / "out"
    spec = load_recipe(new / "recipe.yaml").adapter
    assert (spec.from_, spec.rank, spec.alpha, spec.use_rslora) == (str(old), 3, 5.0, True)
    assert spec.dropout == 0.1
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in (old, new)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(not torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


@pytest.mark.slow
def test_resume_does_not_need_the_old_folder(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = trained(base, tmp_path / "old", adapter=OLD)
    path = recipe_file(
        base, tmp_path / "new", train={"max_steps": 6}, checkpoint={"every_steps": 3}
    )
    sets = [f"adapter={json.dumps({'from': str(old), 'target_modules': OLD['target_modules']})}"]

    def load(name: str) -> Recipe:
        return load_recipe(path, [*sets, f"output_dir={tmp_path / name}"])

    train(load("whole"))
    real, calls = training_run.train_step, itertools.count(1)

    def pull(*arguments: Any) -> Any:
        if next(calls) > 4:
            raise RuntimeError("plug")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training_run, "train_step", pull)
        with pytest.raises(RuntimeError, match="plug"):
            train(load("cut"))
    shutil.rmtree(old)
    train(load("cut"), resume=True)
    name = "adapter_model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert train(load("cut"), resume=True)["metrics"]  # it is complete
    other = load("cut").with_values({"adapter.from_": "/elsewhere"})
    with pytest.raises(LoraError, match=r"adapter.from: .*old/out.*, the recipe now says"):
        train(other, resume=True)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"rank": 8}, "`rank` is 8 in the recipe and 3 in the adapter"),
        ({"alpha": 16.0}, "`alpha` is 16.0 in the recipe and 5.0 in the adapter"),
        ({"use_rslora": False}, "`use_rslora` is False in the recipe and True in the adapter"),
        ({"type": "bitfit"}, "`type` is bitfit in the recipe and lora in the adapter"),
        ({"bias": "all"}, "`bias` is all in the recipe and none in the adapter"),
        ({"train_modules": ["embeddings.LayerNorm"]}, "`train_modules` is"),
        ({"target_modules": ["query"]}, "only the adapter has `roberta.encoder.layer.0"),
        ({"target_modules": "all-linear"}, "only the recipe has `roberta.encoder.layer.0"),
        ({"layers": [0]}, "only the adapter has `roberta.encoder.layer.1"),
        ({"rank": 8, "alpha": 1.0}, "(?s)`rank` is 8.*`alpha` is 1.0"),
    ],
)
@pytest.mark.slow_after(2)
def test_a_recipe_that_says_otherwise_is_refused(
    base: Path, tmp_path: Path, adapter: dict[str, Any], message: str
) -> None:
    old = trained(base, tmp_path / "old", adapter=OLD, train={"max_steps": 1})
    path = recipe_file(base, tmp_path / "new")
    with pytest.raises(LoraError, match=message):
        started(only_from(path, old, **adapter))
    started(only_from(path, old, rank=3, alpha=5.0, target_modules=["output.dense", "query"]))


def test_other_labels_are_refused(base: Path, tmp_path: Path) -> None:
    old = trained(base, tmp_path / "old", train={"max_steps": 1})
    path = recipe_file(base, tmp_path / "new", task={"labels": ["good", "bad"]})
    with pytest.raises(LoraError, match=r"\['good', 'bad'\] in the recipe and \['bad', 'good'\]"):
        train(only_from(path, old))


def test_an_adapter_of_peft(base: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=4, lora_alpha=6, target_modules=["query", "value"],
        rank_pattern={"value": 2},
    )  # fmt: skip
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_config.json"
    file.write_text(file.read_text().replace('"value": 2', '"value": 2, "nothing": 7'))
    path = recipe_file(base, tmp_path / "new")
    recipe = only_from(path, tmp_path / "peft")
    task, ours = started(recipe)
    assert_close(logits(ours), logits(model.eval()))
    assert task.completed_recipe.adapter.rank_pattern == {"value": 2}
    assert len(lora_layers(ours)) == 4
    heads = [name for name in trainable_parameters(ours) if ".lora_" not in name]
    assert heads
    assert all(name.startswith("classifier.") for name in heads)
    train(only_from(path, tmp_path / "peft"))


@pytest.mark.parametrize("in_full", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
@pytest.mark.slow
def test_each_side_of_a_tie_is_trained_further_and_resumed(
    bases: dict[str, Path], tmp_path: Path, in_full: list[str]
) -> None:
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=in_full
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the model's weights are tied
        theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(bases["llama"]), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    theirs.save_pretrained(tmp_path / "peft")
    sections: dict[str, Any] = {"checkpoint": {"every_steps": 1}, "train": {"max_steps": 2}}
    path = recipe_file(bases["llama"], tmp_path / "new", **sections)
    recipe = only_from(path, tmp_path / "peft")
    task, ours = started(recipe)
    assert_close(logits(ours), logits(theirs.eval()))
    assert task.completed_recipe.adapter.ensure_weight_tying is False
    names = {name for name in trainable_parameters(ours) if ".lora_" not in name}
    assert {name.split(".")[-2] for name in names} == set(in_full)

    train(only_from(path, tmp_path / "peft"))
    out = tmp_path / "new" / "out"
    trained_once = (out / "adapter_model.safetensors").read_bytes()
    for name in ("report.json", "checkpoints/step-000002"):
        (shutil.rmtree if (out / name).is_dir() else Path.unlink)(out / name)
    train(only_from(path, tmp_path / "peft"), resume=True)
    assert (out / "adapter_model.safetensors").read_bytes() == trained_once
    _, ours, _ = open_adapter(out, load_recipe(out / "recipe.yaml"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(bases["llama"])
        again = peft.PeftModel.from_pretrained(base, out)
    assert_close(logits(ours), logits(again.eval()))


def test_an_alpha_that_cannot_learn_is_named(base: Path, tmp_path: Path) -> None:
    old = trained(base, tmp_path / "old", adapter=OLD, train={"max_steps": 1})
    for name in ("manifest.json", "recipe.yaml"):
        (old / name).unlink()
    file = old / "adapter_config.json"
    file.write_text(file.read_text().replace('"lora_alpha": 5', '"lora_alpha": -3'))
    with pytest.raises(LoraError, match=r"`alpha` of the adapter of `adapter\.from` is -3"):
        started(only_from(recipe_file(base, tmp_path / "new"), old))


def test_parts_of_a_head_are_no_modules_besides_the_head() -> None:
    model = nn.ModuleDict({
        "classifier": nn.ModuleDict({"dense": nn.Linear(2, 2), "out_proj": nn.Linear(2, 2)}),
        "norm": nn.LayerNorm(2),
    })  # fmt: skip
    saved: Any = SimpleNamespace(
        config={"modules_to_save": ["dense", "out_proj", "norm"]},
        tensors={f"{name}.weight": p for name, p in (
            ("classifier.dense", torch.ones(2, 2)), ("classifier.out_proj", torch.ones(2, 2)),
            ("norm", torch.ones(2)),
        )},
    )  # fmt: skip
    assert _trained_in_full(model, saved, ["classifier"])[0] == ["norm"]
    found = _trained_in_full(model, saved, [])[0]
    assert sorted(found) == ["classifier.dense", "classifier.out_proj", "norm"]


def test_modules_in_full_may_be_written_shorter(base: Path, tmp_path: Path) -> None:
    adapter = {"rank": 2, "train_modules": ["embeddings.LayerNorm"]}
    old = trained(base, tmp_path / "old", adapter=adapter, train={"max_steps": 1})
    started(only_from(recipe_file(base, tmp_path / "new"), old, **adapter))


@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.slow
def test_biases_that_come_from_an_adapter_train_in_bf16(
    base: Path, tmp_path: Path, bias: str
) -> None:
    sections = {"adapter": {"rank": 2, "bias": bias}, "train": {"precision": "bf16"}}
    old = trained(base, tmp_path / "old", **sections)
    before = load_file(old / "adapter_model.safetensors")
    recipe = only_from(recipe_file(base, tmp_path / "new", train={"precision": "bf16"}), old)
    report = train(recipe)
    new = tmp_path / "new" / "out"
    assert load_recipe(new / "recipe.yaml").adapter.bias == bias
    first = json.loads((old / "report.json").read_text())["metrics"]["after"]["validation"]
    assert report["metrics"]["before"]["validation"] == first
    after = load_file(new / "adapter_model.safetensors")
    biases = [name for name in after if name.endswith(".base_layer.bias")]
    assert biases
    assert all(not torch.equal(before[name], after[name]) for name in biases)
    found = evaluate_adapter(new, load_recipe(new / "recipe.yaml"))
    assert found["validation"] == pytest.approx(report["metrics"]["after"]["validation"], rel=1e-6)


def test_a_damaged_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    old = trained(base, tmp_path / "old", train={"max_steps": 1})
    file = old / "adapter_model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    path = recipe_file(base, tmp_path / "new")
    with pytest.raises(IntegrityError, match="not the file that was written"):
        train(only_from(path, old))


def test_the_commands_that_only_look(base: Path, tmp_path: Path) -> None:
    old = trained(base, tmp_path / "old", adapter=OLD, train={"max_steps": 1})
    path = recipe_file(base, tmp_path / "new", adapter={"from": "../old/out"})
    assert load_recipe(path).adapter.from_ == str(tmp_path / "new" / ".." / "old" / "out")
    options = ["--set", f"adapter={json.dumps({'from': str(old)})}"]
    counts = [
        json.loads(CliRunner().invoke(app, ["params", str(p), *more, "--json"]).stdout)
        for p, more in ((path, options), (tmp_path / "old" / "recipe.yaml", []))
    ]
    assert counts[0] == counts[1]
    good = CliRunner().invoke(app, ["validate", str(path), *options])
    assert good.exception is None
    wrong = CliRunner().invoke(app, ["validate", str(path), *options, "--set", "adapter.rank=9"])
    assert "`rank` is 9 in the recipe and 3" in str(wrong.exception)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["adapter={from: a, type: full}"], "and `type: full` has none"),
        (["adapter={from: a}", "evaluate.baselines=[base]"], "the old adapter, and not `base`"),
    ],
)
def test_starts_that_cannot_be(base: Path, tmp_path: Path, sets: list[str], message: str) -> None:
    with pytest.raises(LoraError, match=message):
        load_recipe(recipe_file(base, tmp_path), sets)
