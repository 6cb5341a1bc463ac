"""Combined adapters equal PEFT's combination of the same adapters, or running both together."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path
from typing import Any

import adapter_folders
import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from typer.testing import CliRunner

from lora_cli.cli.app import app
from lora_cli.errors import LoraError
from lora_cli.export.combine import CombineResult, combine_adapters
from lora_cli.export.combine_methods import Method, module_seed
from lora_cli.export.combine_names import METHODS, PRUNING
from lora_cli.export.low_rank_pairs import Pair, squared_norms
from lora_cli.export.merge import merge_adapter

IDS = torch.arange(5, 65).reshape(4, 15)
WEIGHTS = [0.7, -0.4]


def llama_pair(top: Path, one: Any = None, other: Any = None) -> tuple[Path, Path, Path]:
    """Return a base and two adapters of it, of different ranks and scales."""
    base = tiny.save_llama(top / "base", tied=False)
    one = {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "down_proj"], **(one or {})}
    other = {"rank": 4, "alpha": 6, "target_modules": ["q_proj", "down_proj"], **(other or {})}
    a = adapter_folders.make(top, "a", base, 1, adapter=one)
    b = adapter_folders.make(top, "b", base, 2, adapter=other)
    return base, a, b


def combine(a: Path, b: Path, to: Path, method: str, **options: Any) -> CombineResult:
    weights = options.pop("weights", WEIGHTS)
    head = options.pop("head", None)
    return combine_adapters([a, b], to, Method(method, **options), weights, head)


def in_peft(base: Path, *adapters: Path) -> PeftModel:
    """Return the base in PEFT with adapters, named by their folders."""
    kind = json.loads((base / "config.json").read_text())["architectures"][0]
    auto = AutoModelForSequenceClassification if "Sequence" in kind else AutoModelForCausalLM
    model = auto.from_pretrained(base)
    first, *others = adapters
    model = PeftModel.from_pretrained(model, str(first), adapter_name=first.name)
    for folder in others:
        model.load_adapter(str(folder), adapter_name=folder.name)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, adapter: str | None = None) -> Tensor:
    if adapter is not None:
        model.set_adapter(adapter)
    return model(IDS).logits


def together(model: PeftModel) -> Tensor:
    """Return PEFT's outputs with both adapters active."""
    model.base_model.set_adapter(["a", "b"])
    return logits(model)


def close(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow_after(2)
def test_each_method_gives_peft_s_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    # one module for random entries, since PEFT draws them in the order of the model's modules
    only = {"target_modules": ["layers.1.mlp.down_proj"]} if method.startswith("dare") else {}
    base, a, b = llama_pair(tmp_path, only, only)
    density = 0.5 if method in PRUNING else None
    result = combine(a, b, tmp_path / "c", method, **({"density": density} if density else {}))
    model = in_peft(base, a, b, tmp_path / "c")
    generator = torch.Generator().manual_seed(module_seed(0, "model.layers.1.mlp.down_proj"))
    draw = functools.partial(torch.bernoulli, generator=generator)
    monkeypatch.setattr(torch, "bernoulli", draw)
    model.add_weighted_adapter(["a", "b"], WEIGHTS, "expected", method, density=density)
    expected = logits(model, "expected")
    assert close(logits(model, "c"), expected)
    assert not close(logits(model, "a"), expected)
    assert result.rank == (8 if method == "cat" else 4)


@pytest.mark.parametrize("method", ["cat", "svd", "ties_svd", "dare_linear_svd"])
@pytest.mark.parametrize("kind", ["gpt2", "embedding", "rslora", "pattern", "other modules"])
@pytest.mark.slow_after(1)
def test_other_layers_ranks_and_scales(tmp_path: Path, method: str, kind: str) -> None:
    one, other = {
        "gpt2": ({"target_modules": ["c_attn", "c_proj"]}, {"target_modules": ["c_attn"]}),
        "embedding": ({"target_modules": ["embed_tokens"]}, {"target_modules": ["embed_tokens"]}),
        "rslora": ({"use_rslora": True, "rank": 6}, {"use_rslora": True}),
        "pattern": ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3.0}}, {"rank": 3}),
        "other modules": ({"target_modules": ["v_proj"]}, {"target_modules": ["q_proj"]}),
    }[kind]  # fmt: skip
    base, a, b = llama_pair(tmp_path, one, other) if kind != "gpt2" else gpt2_pair(tmp_path)
    options: Any = {"density": 0.5} if method in PRUNING else {}
    if method != "cat":
        options["rank"] = 16
    if method in ("cat", "svd"):  # at full rank: exactly both
        combine(a, b, tmp_path / "c", method, weights=None, **options)
        model = in_peft(base, a, b, tmp_path / "c")
        assert close(logits(model, "c"), together(model))
    else:
        combine(a, b, tmp_path / "c", method, **options)
    if method == "ties_svd" and kind not in ("pattern", "rslora"):  # PEFT scales those wrongly
        model = in_peft(base, a, b, tmp_path / "c")
        model.add_weighted_adapter(
            ["a", "b"], WEIGHTS, "expected", method, svd_rank=16, density=0.5
        )
        assert close(logits(model, "c"), logits(model, "expected"))
    again = tmp_path / "again"
    weights = None if method in ("cat", "svd") else WEIGHTS
    combine(a, b, again, method, weights=weights, **options)
    name = "adapter_model.safetensors"
    assert (again / name).read_bytes() == (tmp_path / "c" / name).read_bytes()


@pytest.mark.parametrize("method", ["svd", "ties_svd"])
def test_the_rank_of_a_decomposition_is_the_largest_of_all_modules(
    tmp_path: Path, method: str
) -> None:
    small = {"rank_pattern": {"layers.0.self_attn.q_proj": 2}}
    base, a, b = llama_pair(tmp_path, small, small)
    density = 0.5 if method in PRUNING else None
    combine(a, b, tmp_path / "c", method, **({"density": density} if density else {}))
    model = in_peft(base, a, b, tmp_path / "c")
    model.add_weighted_adapter(["a", "b"], WEIGHTS, "expected", method, density=density)
    assert close(logits(model, "c"), logits(model, "expected"))


def gpt2_pair(top: Path) -> tuple[Path, Path, Path]:
    base = tiny.save_gpt2(top / "base")
    adapter = {"rank": 4, "target_modules": ["c_attn", "c_proj"]}
    a = adapter_folders.make(top, "a", base, 1, adapter=adapter)
    return base, a, adapter_folders.make(top, "b", base, 2, adapter=adapter)


def test_concatenation_equals_both_adapters_together(tmp_path: Path) -> None:
    base, a, b = llama_pair(tmp_path, {}, {"rank": 3, "target_modules": ["v_proj", "q_proj"]})
    result = combine(a, b, tmp_path / "c", "cat", weights=None)
    assert result.distance < 1e-6
    model = in_peft(base, a, b)
    both = together(model)
    assert close(logits(in_peft(base, tmp_path / "c")), both)
    merge_adapter(None, tmp_path / "c", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert close(logits(merged), both)


def test_linear_with_the_same_a_equals_both_adapters_together(tmp_path: Path) -> None:
    base, a, b = llama_pair(tmp_path)
    give_a_of(a, b)
    result = combine(a, b, tmp_path / "c", "linear")
    assert (result.distance < 1e-6, result.rank) == (True, 4)
    model = in_peft(base, a, b, tmp_path / "c")
    model.add_weighted_adapter(["a", "b"], WEIGHTS, "sum", "cat")
    assert close(logits(model, "c"), logits(model, "sum"))


def give_a_of(a: Path, b: Path) -> None:
    """Replace the matrices A of an adapter by those of another."""
    ours, theirs = (load_file(x / "adapter_model.safetensors") for x in (a, b))
    theirs |= {name: tensor for name, tensor in ours.items() if "lora_A" in name}
    save_file(theirs, b / "adapter_model.safetensors", metadata={"format": "pt"})
    (b / "manifest.json").unlink()


@pytest.mark.parametrize("method", ["linear", "svd", "ties"])
def test_the_distance_is_that_of_the_weights(tmp_path: Path, method: str) -> None:
    base, a, b = llama_pair(tmp_path)
    options: Any = {"density": 0.5} if method == "ties" else {}
    found = combine(a, b, tmp_path / "c", method, **options).distance
    plain = AutoModelForCausalLM.from_pretrained(base).state_dict()
    model = in_peft(base, a, b, tmp_path / "c")
    model.add_weighted_adapter(["a", "b"], WEIGHTS, "sum", "cat")
    updates = {}
    for name in ("c", "sum"):
        model.set_adapter(name)
        model.merge_adapter([name])
        state = {
            n.replace(".base_layer", ""): t for n, t in model.get_base_model().state_dict().items()
        }
        updates[name] = torch.cat([(state[n].double() - t).flatten() for n, t in plain.items()])
        model.unmerge_adapter()
    expected = float((updates["c"] - updates["sum"]).norm() / updates["sum"].norm())
    assert found == pytest.approx(expected, rel=1e-3)


# ---------------------------------------------------------------------------------- the folder


@pytest.mark.slow
def test_every_command_reads_the_folder(tmp_path: Path) -> None:
    base = tiny.save_encoder(tmp_path / "base")
    a, b = (adapter_folders.make(tmp_path, name, base, seed) for seed, name in enumerate("ab"))
    run = CliRunner().invoke(
        app, ["combine", str(a), str(b), "--to", str(tmp_path / "c"), "--head", str(b)]
    )
    assert run.exit_code == 0, run.output
    assert "as if all were applied together" in run.output
    for arguments in (
        ["eval", "--adapter", str(tmp_path / "c"), "--split", "train"],
        ["predict", "--adapter", str(tmp_path / "c"), "a film"],
        ["merge", "--adapter", str(tmp_path / "c"), "--to", str(tmp_path / "merged")],
        ["combine", str(tmp_path / "c"), str(b), "--to", str(tmp_path / "d")],
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, (arguments, result.output, result.exception)
    facts = json.loads((tmp_path / "c" / "combine.json").read_text())
    assert [one["weight"] for one in facts["adapters"]] == [1.0, 1.0]
    card = (tmp_path / "c" / "README.md").read_text()
    assert facts["adapters"][1]["sha256"] in card
    head = "base_model.model.classifier.dense.weight"
    tensors = [load_file(x / "adapter_model.safetensors") for x in (b, tmp_path / "c")]
    assert torch.equal(tensors[0][head], tensors[1][head])


def test_a_folder_of_peft_can_be_combined(tmp_path: Path) -> None:
    base, a, b = llama_pair(tmp_path)
    for folder in (a, b):
        for name in ("recipe.yaml", "computation.json", "manifest.json", "base.json"):
            (folder / name).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the base could not be verified
        combine(a, b, tmp_path / "c", "cat")
    model = in_peft(base, a, b, tmp_path / "c")
    model.add_weighted_adapter(["a", "b"], WEIGHTS, "sum", "cat")
    assert close(logits(model, "c"), logits(model, "sum"))
    assert not (tmp_path / "c" / "recipe.yaml").exists()


# -------------------------------------------------------------------------------- what must agree


def classifiers(top: Path, one: Any = None, other: Any = None) -> tuple[Path, Path]:
    base = tiny.save_encoder(top / "base")
    a = adapter_folders.make(top, "a", base, 1, **(one or {}))
    return a, adapter_folders.make(top, "b", base, 2, **(other or {}))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"task": {"labels": ["good", "bad"]}}, "task.labels"),
        ({"task": {"labels": ["bad", "good", "fair"]}}, "task.labels"),
        ({"adapter": {"type": "dora"}}, "type `dora`"),
        ({"adapter": {"type": "none"}}, "type `none`"),
        ({"adapter": {"bias": "all"}}, "biases"),
        ({"adapter": {"bias": "lora_only"}}, "biases"),
        ({}, "are not averaged"),
        ({"adapter": {"train_modules": ["word_embeddings"]}}, "are not averaged"),
    ],
)
@pytest.mark.slow_after(2)
def test_incompatible_adapters_are_rejected(tmp_path: Path, other: Any, said: str) -> None:
    a, b = classifiers(tmp_path, None, other)
    with pytest.raises(LoraError) as caught:
        combine(a, b, tmp_path / "c", "cat")
    assert said in str(caught.value)
    assert all(problem.hint for problem in caught.value.problems)
    assert not (tmp_path / "c").exists()


def test_another_base_is_rejected(tmp_path: Path) -> None:
    folders = []
    for seed in (1, 2):
        base = tiny.save_llama(tmp_path / f"base{seed}", seed=seed)
        folders.append(adapter_folders.make(tmp_path, f"a{seed}", base, adapter={"rank": 2}))
    with pytest.raises(LoraError, match="is not the base of"):
        combine(*folders, tmp_path / "c", "cat")


@pytest.mark.parametrize(("revision", "is_same"), [("main", True), (None, True), ("v2", False)])
def test_another_revision_is_another_base(
    revision: str | None, is_same: bool, tmp_path: Path
) -> None:
    _, a, b = llama_pair(tmp_path)
    for folder in (a, b):  # as PEFT writes it
        for name in ("recipe.yaml", "computation.json", "manifest.json", "base.json"):
            (folder / name).unlink()
    edit_config(b, revision=revision)
    edit_config(a, revision=None)
    if is_same:
        combine(a, b, tmp_path / "c", "cat")
        return
    with pytest.raises(LoraError, match="@v2`, and"):
        combine(a, b, tmp_path / "c", "cat")


def edit_config(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_another_task_is_rejected(tmp_path: Path) -> None:
    base = tiny.save_encoder(tmp_path / "base")
    a = adapter_folders.make(tmp_path, "a", base)
    task = {
        "type": "token_classification",
        "tokens_column": "w",
        "tags_column": "t",
        "labels": ["O", "B-X", "I-X"],
    }
    b = adapter_folders.make(tmp_path, "b", base, task=task)
    with pytest.raises(LoraError, match="TOKEN_CLS"):
        combine(a, b, tmp_path / "c", "cat")


def test_equal_heads_need_no_choice(tmp_path: Path) -> None:
    a, b = classifiers(tmp_path)
    ours, theirs = (load_file(x / "adapter_model.safetensors") for x in (a, b))
    theirs |= {name: tensor for name, tensor in ours.items() if "classifier" in name}
    save_file(theirs, b / "adapter_model.safetensors", metadata={"format": "pt"})
    (b / "manifest.json").unlink()
    combine(a, b, tmp_path / "c", "cat")
    found = load_file(tmp_path / "c" / "adapter_model.safetensors")
    heads = {name: tensor for name, tensor in ours.items() if "classifier" in name}
    assert heads
    assert all(torch.equal(found[name], tensor) for name, tensor in heads.items())


def test_squared_norms_are_those_of_the_updates_written_out() -> None:
    generator = torch.Generator().manual_seed(1)
    pairs = [
        (weight, Pair(*(torch.randn(*size, generator=generator) for size in sizes), scale))
        for weight, scale, sizes in ((0.5, 3.0, ((2, 5), (4, 2))), (-2.0, 0.7, ((3, 5), (4, 3))))
    ]
    updates = [w * pair.scale * pair.b.double() @ pair.a.double() for w, pair in pairs]
    expected = [sum(updates).square().sum(), updates[0].square().sum()]
    assert squared_norms(pairs) == pytest.approx([float(norm) for norm in expected], rel=1e-9)


def test_other_ranks_are_rejected_where_matrices_are_added(tmp_path: Path) -> None:
    _, a, b = llama_pair(tmp_path, {}, {"rank": 2})
    with pytest.raises(LoraError, match="adds matrices of one rank"):
        combine(a, b, tmp_path / "c", "linear")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a"], "only one adapter"),
        (["a", "b", "--method", "tie"], "did you mean `ties`"),
        (["a", "b", "--method", "ties"], "--density 0.5"),
        (["a", "b", "--density", "0.5"], "keeps all entries"),
        (["a", "b", "--method", "ties", "--density", "1.5"], "cannot be 1.5"),
        (["a", "b", "--rank", "4"], "follows from the adapters"),
        (["a", "b", "--method", "svd", "--rank", "0"], "cannot be 0"),
        (["a", "b", "--weights", "1"], "1 number for 2 adapters"),
        (["a", "b", "--weights", "1,x"], "not a list of numbers"),
        (["a", "b", "--weights", "1,inf"], "not a list of numbers"),
        (["a", "b"], "there is no folder a"),
    ],
)
def test_wrong_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["combine", *arguments, "--to", "c"])
    assert isinstance(result.exception, LoraError)
    assert said in str(result.exception)
