"""`adapter.from`: which settings come from the trained adapter, and which the recipe may set."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import tiny_experts
import torch
import yaml
from closeness import assert_close
from torch import nn
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

from lora_cli.adapters import make_trainable as module
from lora_cli.adapters.attach import lora_layers
from lora_cli.adapters.make_trainable import completed_section, make_trainable
from lora_cli.adapters.peft_format.adapter_folder import AdapterFolder, read_adapter
from lora_cli.adapters.token_rows import TokenRows
from lora_cli.errors import IntegrityError, LoraError
from lora_cli.export.merge import merge_adapter
from lora_cli.models.fingerprint import Fingerprint
from lora_cli.recipe import AdapterSpec, Learned, Recipe, load_recipe
from lora_cli.training import train

HEAD = ["classifier"]
IDS = torch.arange(20).reshape(2, 10) + 5
QUERIES = [f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)]
VALUES = [f"bert.encoder.layer.{i}.attention.self.value" for i in range(2)]


def of_peft(
    folder: Path, model: nn.Module | None = None, task: str = "SEQ_CLS", **config: Any
) -> tuple[AdapterFolder, nn.Module]:
    """Return a random adapter that PEFT saved, and PEFT's model with it."""
    kind: Any = config.pop("kind", peft.LoraConfig)
    base: Any = tiny.encoder(2) if model is None else model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that weights are tied
        theirs = peft.get_peft_model(base, kind(task_type=task, **config))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(folder)
    return read_adapter(folder), theirs.eval()


def recipe_from(folder: Path, task: str = "sequence_classification", **adapter: Any) -> Recipe:
    """Return a recipe whose adapter section names the folder and has only the given settings."""
    return Recipe.model_validate(
        {
            "model": {"name": "base"},
            "task": {"type": task},
            "data": {"path": "rows.csv"},
            "adapter": {"from": str(folder), **adapter},
        }
    )


def completed(
    saved: AdapterFolder, model: nn.Module | None = None, **adapter: Any
) -> tuple[AdapterSpec, nn.Module]:
    """Return the completed section, and the base."""
    base = tiny.encoder(2) if model is None else model
    head = HEAD if hasattr(base, "classifier") else []
    task = "sequence_classification" if head else "causal_lm"
    return completed_section(base, recipe_from(saved.path, task, **adapter), head, saved), base


def problems(saved: AdapterFolder, model: nn.Module | None = None, **adapter: Any) -> list[str]:
    """Return the messages about a section that contradicts the adapter."""
    with pytest.raises(LoraError) as caught:
        completed(saved, model, **adapter)
    return [f"{problem.at.partition(' ')[0]}: {problem.what}" for problem in caught.value.problems]


# ------------------------------------------------------------------------------- what it takes over


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({}, {"rank": 8, "alpha": 8.0, "use_rslora": False, "bias": "none"}),
        ({"r": 3, "lora_alpha": 5, "use_rslora": True}, {"rank": 3, "alpha": 5.0,
                                                         "use_rslora": True}),
        ({"r": 2, "lora_alpha": 7, "bias": "all"}, {"rank": 2, "alpha": 7.0, "bias": "all"}),
        ({"r": 2, "bias": "lora_only"}, {"rank": 2, "bias": "lora_only"}),
        ({"r": 2, "use_dora": True}, {"type": "dora", "rank": 2}),
        ({"rank_pattern": {"value": 6, "nothing": 7}, "alpha_pattern": {"query": 3, "no": 2}},
         {"rank_pattern": {"value": 6}, "alpha_pattern": {"query": 3.0}}),
        ({"kind": peft.LoHaConfig, "r": 3, "alpha": 5}, {"type": "loha", "rank": 3, "alpha": 5.0}),
        ({"kind": peft.LoKrConfig, "r": 2, "alpha": 9}, {"type": "lokr", "rank": 2, "alpha": 9.0}),
    ],
)  # fmt: skip
def test_the_configuration_comes_from_the_adapter(
    config: dict[str, Any], wanted: dict[str, Any], tmp_path: Path
) -> None:
    saved, theirs = of_peft(tmp_path, target_modules=["query", "value"], **config)
    spec, base = completed(saved)
    usual = {
        "type": "lora", "from_": str(tmp_path), "dropout": 0.0, "rank": 8, "use_rslora": False,
        "rank_pattern": {}, "alpha_pattern": {}, "bias": "none", "train_modules": [],
        "train_tokens": [], "ensure_weight_tying": True, "target_parameters": [],
    }  # fmt: skip
    found = spec.model_dump()
    assert {key: found[key] for key in usual | wanted} == usual | wanted
    assert sorted(spec.target_modules or []) == sorted(QUERIES + VALUES)
    # and the model that is trained further has PEFT's outputs
    make_trainable(base, recipe_from(tmp_path), HEAD)
    with torch.no_grad():
        assert_close(base.eval()(input_ids=IDS).logits, theirs(input_ids=IDS).logits)


def test_allowed_settings_of_the_section_are_kept(tmp_path: Path) -> None:
    saved, _ = of_peft(tmp_path, r=3, lora_alpha=5, target_modules=["query"])
    spec, base = completed(
        saved, dropout=0.25, rank=3, alpha=5.0, target_modules=["query"], exclude_modules=["value"]
    )
    assert (spec.dropout, spec.rank, spec.alpha) == (0.25, 3, 5.0)
    make_trainable(base, recipe_from(tmp_path, dropout=0.25), HEAD)
    layers = lora_layers(base)
    assert sorted(layers) == QUERIES
    assert {layer.dropout.p for layer in layers.values()} == {0.25}


def test_every_contradicting_key_is_reported_once(tmp_path: Path) -> None:
    saved, _ = of_peft(tmp_path, r=3, lora_alpha=5, target_modules=["query"])
    found = problems(saved, rank=4, alpha=6.0, bias="all", rank_pattern={"query": 2})
    assert sorted(line.split(" is ")[0] for line in found) == [
        f"adapter.{key}: `{key}`" for key in ("alpha", "bias", "rank", "rank_pattern")
    ]
    assert "adapter.rank: `rank` is 4 in the recipe and 3 in the adapter of `adapter.from`" in found


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"target_modules": ["value"]}, "adapter.target_modules: the recipe's targets are 2 "
         "modules, those of the adapter of `adapter.from` are 2 (query); only the adapter has "
         f"`{QUERIES[0]}`"),
        ({"target_modules": ["query", "value"]}, "adapter.target_modules: the recipe's targets are "
         "4 modules, those of the adapter of `adapter.from` are 2 (query); only the recipe has "
         f"`{VALUES[0]}`"),
        ({"layers": [0]}, "adapter.layers: the recipe's targets are 1 modules, those of the "
         f"adapter of `adapter.from` are 2 (query); only the adapter has `{QUERIES[1]}`"),
        ({"exclude_modules": ["layer.0.attention.self.query"]}, "adapter.exclude_modules: the "
         "recipe's targets are 1 modules, those of the adapter of `adapter.from` are 2 (query); "
         f"only the adapter has `{QUERIES[0]}`"),
    ],
)  # fmt: skip
def test_different_targets_are_reported(
    adapter: dict[str, Any], message: str, tmp_path: Path
) -> None:
    saved, _ = of_peft(tmp_path, target_modules=["query"])
    assert problems(saved, **adapter) == [message]


@pytest.mark.parametrize("adapter", [{"target_modules": "all-linear"}, {"layers": [0]}])
def test_targets_are_not_compared_for_an_adapter_without_layers(
    adapter: dict[str, Any], tmp_path: Path
) -> None:
    saved, _ = of_peft(tmp_path, target_modules=["query"])
    base = tiny.encoder(2)
    recipe = recipe_from(tmp_path, type="bitfit", **adapter)
    with pytest.raises(LoraError) as caught:
        completed_section(base, recipe, HEAD, saved)
    assert [problem.what[:6] for problem in caught.value.problems] == ["`type`"]


# ------------------------------------------------------------------------------ modules in full


def test_modules_in_full_are_taken_over_without_the_head(tmp_path: Path) -> None:
    saved, _ = of_peft(
        tmp_path, r=2, target_modules=["query"], modules_to_save=["classifier", "pooler.dense"]
    )
    spec, _ = completed(saved)
    assert spec.train_modules == ["bert.pooler.dense"]
    assert spec.ensure_weight_tying
    spec, _ = completed(saved, train_modules=["pooler.dense"])  # written shorter
    assert spec.train_modules == ["bert.pooler.dense"]
    (said,) = problems(saved, train_modules=["embeddings.LayerNorm"])
    assert said.startswith("adapter.train_modules: `train_modules` is ")
    (said,) = problems(saved, train_modules=["pooler.dense", "embeddings.LayerNorm"])
    assert said.startswith("adapter.train_modules: `train_modules` is ")


def test_modules_inside_the_head_belong_to_it(tmp_path: Path) -> None:
    saved, _ = of_peft(
        tmp_path, tiny.encoder(2, "roberta"), r=2, target_modules=["query"],
        modules_to_save=["classifier.dense", "embeddings.LayerNorm"],
    )  # fmt: skip
    spec, _ = completed(saved, tiny.encoder(2, "roberta"))
    assert spec.train_modules == ["roberta.embeddings.LayerNorm"]


def test_a_module_with_two_names_is_found_by_both() -> None:
    model = nn.Module()
    model.shared = model.embed = nn.Embedding(3, 2)
    saved = AdapterFolder(
        Path(), {"modules_to_save": ["embed"]}, {"embed.weight": torch.zeros(3, 2)}, False
    )
    assert module._trained_in_full(model, saved, []) == (["embed"], False)


def test_a_configuration_without_rank_and_alpha_has_peft_s_defaults(tmp_path: Path) -> None:
    saved, _ = of_peft(tmp_path, r=8, target_modules=["query"])
    for key in ("r", "lora_alpha", "bias", "use_rslora", "rank_pattern", "alpha_pattern"):
        del saved.config[key]
    spec, _ = completed(saved)
    assert (spec.rank, spec.alpha, spec.bias, spec.use_rslora) == (8, 8.0, "none", False)


def test_single_parameters_may_be_named_or_come_from_the_adapter(tmp_path: Path) -> None:
    saved, _ = of_peft(
        tmp_path, tiny_experts.model("mixtral"), "CAUSAL_LM", r=2, target_modules=["q_proj"],
        target_parameters=tiny_experts.EXPERTS,
    )  # fmt: skip
    wanted = [f"model.layers.{i}.{name}" for i in range(2) for name in tiny_experts.EXPERTS]
    for given in (
        {}, {"target_parameters": tiny_experts.EXPERTS}, {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "target_parameters": tiny_experts.EXPERTS},
    ):  # fmt: skip
        spec, _ = completed(saved, tiny_experts.model("mixtral"), **given)
        assert sorted(spec.target_parameters) == sorted(wanted)
    down = {"target_parameters": ["down_proj"]}
    (said,) = problems(saved, tiny_experts.model("mixtral"), **down)
    assert said.startswith("adapter.target_parameters: the recipe's targets are 4 modules, those")
    (said,) = problems(saved, tiny_experts.model("mixtral"), dropout=0.5)
    assert said.startswith("adapter.dropout: the adapter of `adapter.from` has single parameters")


@pytest.mark.parametrize(
    ("in_full", "tied"), [(["lm_head"], False), (["embed_tokens"], False), ([], True)]
)
def test_a_copy_of_one_tied_weight_is_taken_over(
    in_full: list[str], tied: bool, tmp_path: Path
) -> None:
    saved, theirs = of_peft(
        tmp_path, tiny.llama(), "CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=in_full
    )
    spec, base = completed(saved, tiny.llama())
    assert spec.ensure_weight_tying is tied
    assert [name.rpartition(".")[2] for name in spec.train_modules] == in_full
    make_trainable(base, recipe_from(tmp_path, "causal_lm"))
    with torch.no_grad():
        assert_close(base.eval()(input_ids=IDS).logits, theirs(input_ids=IDS).logits)


# ------------------------------------------------------------------------------ rows of tokens


def test_rows_of_tokens_are_taken_over_or_compared(tmp_path: Path) -> None:
    base = tiny.llama(tied=False)
    saved, _ = of_peft(
        tmp_path, base, "CAUSAL_LM", r=2, target_modules=["q_proj"],
        trainable_token_indices={"embed_tokens": [9, 7]},
    )  # fmt: skip

    def section(ids: list[int], **adapter: Any) -> list[int | str]:
        recipe = recipe_from(tmp_path, "causal_lm", **adapter)
        return completed_section(tiny.llama(tied=False), recipe, [], saved, ids).train_tokens

    assert section([]) == [7, 9]
    assert section([9]) == [7, 9]  # a new token's row is one of those
    assert section([7, 9], train_tokens=[9, 7]) == [7, 9]
    for ids, adapter, at, named in (
        ([7], {"train_tokens": [7]}, "adapter.train_tokens", "7"),
        ([7, 9, 11], {"train_tokens": [7, 9, 11]}, "adapter.train_tokens", "7, 9, 11"),
        ([11], {}, "model.add_tokens", "11"),
    ):
        with pytest.raises(LoraError) as caught:
            section(ids, **adapter)
        (problem,) = caught.value.problems
        assert problem.at.startswith(at)
        assert f"the rows of the tokens {named}, and the adapter" in problem.what
        assert "has those of 7, 9" in problem.what


def test_token_rows_are_rejected_if_the_adapter_has_none(tmp_path: Path) -> None:
    saved, _ = of_peft(
        tmp_path, tiny.llama(tied=False), "CAUSAL_LM", r=2, target_modules=["q_proj"]
    )
    recipe = recipe_from(tmp_path, "causal_lm", train_tokens=list(range(9)))
    with pytest.raises(LoraError) as caught:
        completed_section(tiny.llama(tied=False), recipe, [], saved, list(range(9)))
    assert "the tokens 0, 1, 2, 3, 4, 5, 6, 7, …, and" in caught.value.problems[0].what
    assert "`adapter.from` has none" in caught.value.problems[0].what
    recipe = recipe_from(tmp_path, "causal_lm")
    assert completed_section(tiny.llama(tied=False), recipe, [], saved).train_tokens == []


@pytest.mark.parametrize(("n", "said"), [(8, "0, 1, 2, 3, 4, 5, 6, 7"), (2, "0, 1"), (0, "")])
def test_up_to_eight_tokens_are_listed_in_ascending_order(n: int, said: str) -> None:
    assert module._listed(list(reversed(range(n)))) == said


def test_other_rows_in_the_output_layer_are_not_trained_further(tmp_path: Path) -> None:
    saved, _ = of_peft(
        tmp_path, tiny.llama(tied=False), "CAUSAL_LM", r=2, target_modules=["q_proj"],
        trainable_token_indices={"embed_tokens": [7], "lm_head": [8]},
    )  # fmt: skip
    (said,) = problems(saved, tiny.llama(tied=False))
    assert said.startswith("adapter.from: the adapter of `adapter.from` has rows of other tokens")


@pytest.mark.parametrize("tied", [True, False])
def test_the_rows_of_an_adapter_are_trained_in_every_embedding(tied: bool, tmp_path: Path) -> None:
    """PEFT may train only the input embedding's rows; a recipe always trains both."""
    _, theirs = of_peft(
        tmp_path, tiny.llama(tied), "CAUSAL_LM", r=2, target_modules=["q_proj"],
        trainable_token_indices=[9, 7],
    )  # fmt: skip
    base = tiny.llama(tied)
    learned = Learned()
    make_trainable(base, recipe_from(tmp_path, "causal_lm"), learned=learned)
    sides = [base.get_input_embeddings(), base.get_output_embeddings()]
    for side in sides:
        assert isinstance(side, TokenRows)
        assert side.token_ids == [7, 9]
    assert (sides[0].rows is sides[1].rows) == tied
    assert learned.adapter is not None
    assert learned.adapter.train_tokens == [7, 9]
    with torch.no_grad():
        assert_close(base.eval()(input_ids=IDS).logits, theirs(input_ids=IDS).logits)


# ------------------------------------------------------------------------------ what is not trained


def test_shapes_that_no_recipe_can_name_are_not_trained_further(tmp_path: Path) -> None:
    saved, _ = of_peft(
        tmp_path, kind=peft.LoKrConfig, r=2, target_modules=["query"], decompose_factor=4
    )
    (said,) = problems(saved)
    assert "`decompose_factor`: 4, for which no recipe has a key" in said


@pytest.mark.parametrize(
    ("config", "key"),
    [({"lora_alpha": 0}, "alpha"), ({"lora_alpha": -2}, "alpha")],
)
def test_an_alpha_that_cannot_be_trained_is_reported(
    config: dict[str, Any], key: str, tmp_path: Path
) -> None:
    saved, _ = of_peft(tmp_path, r=2, target_modules=["query"], **config)
    (said,) = problems(saved)
    assert said.startswith(f"adapter.from: `{key}` of the adapter of `adapter.from` is ")


def test_a_missing_folder_is_reported_with_similar_names(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    with pytest.raises(LoraError, match="there is no folder") as caught:
        module.find_adapter(recipe_from(tmp_path / "frist"))
    assert caught.value.problems[0].at.startswith("adapter.from")
    of_peft(tmp_path / "first", target_modules=["query"])
    assert module.find_adapter(recipe_from(tmp_path / "first")).path == tmp_path / "first"


# ------------------------------------------------------------------------------------ attaching


def test_a_base_without_weights_gets_only_layers(tmp_path: Path) -> None:
    of_peft(tmp_path, r=3, target_modules=["query"])
    weights = tiny.encoder(2)
    with torch.device("meta"):
        base = type(weights)(weights.config)
    learned = Learned()
    assert make_trainable(base, recipe_from(tmp_path), HEAD, learned=learned) is None
    assert sorted(lora_layers(base)) == QUERIES
    assert {layer.lora_A.shape[0] for layer in lora_layers(base).values()} == {3}
    assert learned.adapter is not None
    assert learned.adapter.rank == 3


def test_in_a_checkpoint_the_adapter_is_not_read(tmp_path: Path) -> None:
    base, learned = tiny.encoder(2), Learned(in_checkpoint=True)
    recipe = recipe_from(tmp_path / "gone", target_modules=["query"], rank=2)
    fingerprint = Fingerprint("base", "main", {"a": "1"})
    assert make_trainable(base, recipe, HEAD, fingerprint, learned=learned) is fingerprint
    assert sorted(lora_layers(base)) == QUERIES


def test_another_base_is_rejected_before_anything_is_attached(tmp_path: Path) -> None:
    of_peft(tmp_path, r=2, target_modules=["query"])
    base, recipe = tiny.encoder(2), recipe_from(tmp_path)
    ours, other = (Fingerprint("base", "main", {"a": value}) for value in "12")
    ours.write(tmp_path)
    with pytest.raises(IntegrityError):
        make_trainable(base, recipe, HEAD, other)
    assert lora_layers(base) == {}
    assert make_trainable(base, recipe, HEAD, ours) == ours
    assert sorted(lora_layers(base)) == QUERIES


@pytest.mark.parametrize("known", [True, False])
def test_different_base_facts_are_rejected_if_both_are_known(
    known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_peft(tmp_path, r=2, target_modules=["query"])
    recipe, asked = recipe_from(tmp_path), []
    monkeypatch.setattr(module, "read_computation", lambda _: {"base": {"a": 1}} if known else None)
    monkeypatch.setattr(module, "require_facts", lambda *given: asked.append(given))
    make_trainable(tiny.encoder(2), recipe, HEAD)
    assert asked == []
    make_trainable(tiny.encoder(2), recipe, HEAD, facts={"a": 2})
    expected = [({"a": 1}, {"a": 2}, recipe, f"the adapter {tmp_path}", True)]
    assert asked == (expected if known else [])


# ---------------------------------------------------- low-rank layers within the head of the base


def test_a_head_that_peft_adapts_stays_adapted(tmp_path: Path) -> None:
    # PEFT's `all-linear` leaves out only the last layer of a head, not DeBERTa's pooler
    config = DebertaV2Config(
        vocab_size=tiny.vocabulary(), pad_token_id=tiny.PAD, hidden_size=32, num_hidden_layers=1,
        num_attention_heads=4, intermediate_size=48, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, pooler_dropout=0.0, pooler_hidden_size=32,
    )  # fmt: skip
    config.id2label, config.label2id = {0: "bad", 1: "good"}, {"bad": 0, "good": 1}
    base = tmp_path / "base"
    tiny.enliven(DebertaV2ForSequenceClassification(config)).save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    model = DebertaV2ForSequenceClassification.from_pretrained(base)
    _, theirs = of_peft(tmp_path / "adapter", model, r=2, lora_alpha=4, target_modules="all-linear")
    inputs = tiny.tokenizer()(tiny.CORPUS, padding=True, return_tensors="pt")
    labels = torch.arange(len(tiny.CORPUS)) % 2
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    for _ in range(3):
        theirs(**inputs, labels=labels).loss.backward()
        with torch.no_grad():
            for parameter in trained:
                parameter -= 0.05 * parameter.grad
                parameter.grad = None
    path = tiny.recipe(
        base, tmp_path, adapter={}, data={"path": "rows.jsonl"},
        train={
            "max_steps": 2, "micro_batch_size": 8, "max_grad_norm": None,
            "optimizer": {"type": "sgd", "learning_rate": 0.05}, "scheduler": {"type": "constant"},
        },
    )  # fmt: skip
    values = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**values, "adapter": {"from": "adapter"}}))
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(tiny.CORPUS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(load_recipe(path))
    train(load_recipe(path, ["train.max_steps=3", "checkpoint.allow_changes=true"]), resume=True)
    again = DebertaV2ForSequenceClassification.from_pretrained(base)
    ours = peft.PeftModel.from_pretrained(again, str(tmp_path / "out")).eval()
    with torch.no_grad():
        assert_close(ours(**inputs).logits, theirs(**inputs).logits)
    merge_adapter(None, tmp_path / "out", tmp_path / "merged")
    merged = DebertaV2ForSequenceClassification.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert_close(merged(**inputs).logits, theirs(**inputs).logits)
