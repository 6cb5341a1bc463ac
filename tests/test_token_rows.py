"""Trained rows of embeddings, for new and existing tokens, compared with PEFT and plain torch."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import tiny_translators as translators
import torch
from closeness import assert_close, assert_different
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from lora_cli.adapters.attach import attach, disabled, remove_layers, trainable_parameters
from lora_cli.adapters.load_adapter import load_adapter
from lora_cli.adapters.merge_layers import merge
from lora_cli.adapters.merge_proof import expected_weights
from lora_cli.adapters.peft_format.adapter_folder import (
    differences_in_peft,
    read_adapter,
    read_tensors,
    restore,
    save_adapter,
)
from lora_cli.adapters.token_rows import embedding_names, sharing
from lora_cli.errors import LoraError
from lora_cli.recipe import load_recipe
from lora_cli.tasks import build_task

IDS = [9, 5, 30]
BASES = {
    "tied": lambda: tiny.llama(tied=True),
    "untied": lambda: tiny.llama(tied=False),
    "gpt2": tiny.gpt2,
    "encoder": tiny.encoder,
}
TARGETS = {"gpt2": ["c_attn"], "encoder": ["query"]}


def recipe(kind: str) -> Any:
    task = "sequence_classification" if kind == "encoder" else "causal_lm"
    return tiny.recipe_of(task, rank=2, target_modules=TARGETS.get(kind, ["q_proj"]))


def outputs(model: nn.Module, first: int = 0) -> Tensor:
    """Return what a model makes of tokens of which some are trained."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(4, 200, (3, 7), generator=generator)
    ids[:, ::2] = torch.tensor([9, 5, 30])[:, None]
    with torch.no_grad():
        return model.eval()(input_ids=ids[first:]).logits


def adapted(base: nn.Module, kind: str) -> nn.Module:
    model = copy.deepcopy(base)
    torch.manual_seed(0)
    attach(model, recipe(kind), ["classifier"] if kind == "encoder" else [], token_ids=IDS)
    return model


def in_peft(base: nn.Module, folder: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder))


def proves(*what: str) -> pytest.MarkDecorator:
    return pytest.mark.proves(
        *what,
        variant="rows of tokens",
        layer=lambda kind, **_: "tied Embedding" if kind in ("tied", "gpt2") else "Embedding",
        against="PEFT",
    )


@proves("write", "merge")
@pytest.mark.parametrize("kind", BASES)
def test_rows_are_trained_saved_and_merged_as_peft_has_them(kind: str, tmp_path: Path) -> None:
    base = BASES[kind]()
    head = ["classifier"] if kind == "encoder" else []
    before, model = outputs(base), adapted(base, kind)
    assert torch.equal(outputs(model), before)
    rows = [name for name in trainable_parameters(model) if name.endswith(".rows")]
    assert len(rows) == (2 if kind == "untied" else 1)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.normal_(std=0.3)
    found = outputs(model)
    assert_different(found, before)
    if kind != "encoder":
        with disabled(model):
            assert torch.equal(outputs(model), before)

    save_adapter(tmp_path, model, recipe(kind), head)
    assert not differences_in_peft(model, recipe(kind), head, tmp_path)
    assert_close(outputs(in_peft(base, tmp_path)), found, 1e-5)
    again = copy.deepcopy(base)
    load_adapter(again, read_adapter(tmp_path), head)
    assert torch.equal(outputs(again), found)
    fresh = adapted(base, kind)
    restore(fresh, read_tensors(tmp_path))
    assert torch.equal(outputs(fresh), found)

    saved = read_adapter(tmp_path)
    expected = expected_weights(base, saved.tensors, saved.config)
    assert not merge(again)  # what is tied stays tied
    assert expected.disagreement(again) is None
    assert_close(outputs(again), found, 1e-5)
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in base.named_parameters()]
    embedding = again.get_input_embeddings().weight
    others = [i for i in range(len(embedding)) if i not in IDS]
    assert torch.equal(embedding[others], base.get_input_embeddings().weight[others])
    if kind == "untied":
        assert torch.equal(again.lm_head.weight[others], base.lm_head.weight[others])
    remove_layers(model)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in base.named_parameters()]


def by_peft(base: nn.Module, kind: str, folder: Path, indices: Any) -> nn.Module:
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=TARGETS.get(kind, ["q_proj"]),
        trainable_token_indices=indices,
        task_type="SEQ_CLS" if kind == "encoder" else "CAUSAL_LM",
    )  # fmt: skip
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.3)
        model.save_pretrained(folder)
    return model


@pytest.mark.slow_after(4)
@proves("read", "merge")
@pytest.mark.parametrize(
    ("kind", "indices"),
    [
        ("tied", IDS),
        ("untied", IDS),
        ("gpt2", IDS),
        ("encoder", IDS),
        ("tied", {"embed_tokens": IDS}),
        ("tied", {"embed_tokens": IDS, "lm_head": IDS}),
        ("tied", {"embed_tokens": IDS, "lm_head": [5]}),
        ("tied", {"lm_head": IDS}),
        ("untied", {"embed_tokens": IDS, "lm_head": [5, 40]}),
        ("encoder", {"word_embeddings": IDS, "position_embeddings": [1]}),
    ],
)
def test_what_peft_trained_is_read_and_merged(kind: str, indices: Any, tmp_path: Path) -> None:
    base = BASES[kind]()
    theirs = outputs(by_peft(base, kind, tmp_path, indices))
    model = copy.deepcopy(base)
    load_adapter(model, read_adapter(tmp_path), ["classifier"] if kind == "encoder" else [])
    assert_different(theirs, outputs(base))
    assert_close(outputs(model), theirs, 1e-5)
    saved = read_adapter(tmp_path)
    expected = expected_weights(base, saved.tensors, saved.config)
    merge(model)
    assert expected.disagreement(model) is None
    assert_close(outputs(model), theirs, 1e-5)


@proves("train")
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_gradients_and_twenty_steps_are_those_of_peft(kind: str, tmp_path: Path) -> None:
    base = BASES[kind]()
    ours = adapted(base, kind)
    save_adapter(tmp_path, ours, recipe(kind), [])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(
            copy.deepcopy(base), str(tmp_path), is_trainable=True
        )

    def losses(model: nn.Module) -> list[float]:
        model.double()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)
        found = []
        for step in range(20):
            ids = torch.tensor([[9, 50 + step % 3, 5, 60, 30, 9, 51]])
            optimizer.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            found.append(float(loss.detach()))
            optimizer.step()
        return found

    mine = losses(ours)
    assert mine[-1] < 0.9 * mine[0]
    assert mine == pytest.approx(losses(theirs), rel=1e-6)


class Odd(nn.Module):
    """A model with an embedding, and with what its methods call the output layer."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)
        self.get_input_embeddings = lambda: self.embedding
        self.get_output_embeddings = output


def test_only_modules_of_the_model_with_weights_have_rows_of_tokens() -> None:
    def none() -> Any:
        raise NotImplementedError

    elsewhere = nn.Linear(3, 5)
    assert embedding_names(Odd(lambda: elsewhere)) == ["embedding"]
    assert embedding_names(Odd(lambda: None)) == ["embedding"]
    assert embedding_names(Odd(none)) == ["embedding"]
    model = Odd(lambda: model.head)
    assert embedding_names(model) == ["embedding", "head"]
    model.head.weight = model.embedding.weight
    assert embedding_names(model) == ["embedding"]
    assert sharing(model, "embedding") == ["embedding", "head"]
    model.again = model.embedding  # the same module in another place
    assert sharing(model, "embedding") == ["embedding", "head", "again"]
    model.head = nn.Identity()
    assert embedding_names(model) == ["embedding"]
    assert embedding_names(nn.Linear(2, 2)) == []


def test_merged_weights_are_not_trained() -> None:
    base = tiny.llama()
    model = adapted(base, "tied")
    merge(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())


# ------------------------------------------------------------------------------------- new tokens


def opened(folder: Path, base: Path, **sections: Any) -> tuple[Any, nn.Module]:
    task = build_task(load_recipe(tiny.recipe(base, folder, **sections)))
    task.load_processor()
    return task, task.load_model(torch.device("cpu"))[0]


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_get_the_mean_and_nothing_else_changes(tied: bool, tmp_path: Path) -> None:
    base = tiny.save_llama(tmp_path / "base", tied=tied)
    _, plain = opened(tmp_path, base)
    sections = {"model": {"name": str(base), "add_tokens": ["<a>", "<b>"]}}
    task, model = opened(tmp_path, base, **sections)
    size = plain.config.vocab_size
    assert task.tokenizer.tokenize("x<a><b>")[-2:] == ["<a>", "<b>"]
    assert task.learned.token_ids == [size, size + 1]
    assert model.config.vocab_size == size + 2
    for name, parameter in model.named_parameters():
        old = plain.get_parameter(name).detach()
        assert torch.equal(parameter[: len(old)], old)
        if len(parameter) > len(old):
            for row in parameter[size:]:
                assert_close(row.detach(), old.double().mean(0).float(), 1e-6)
    state = torch.get_rng_state()
    _, again = opened(tmp_path, base, **sections)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    empty = task.empty_model()[0]
    assert empty.get_input_embeddings().weight.shape[0] == size + 2


@pytest.mark.parametrize("kind", ["bart", "t5", "nllb", "marian"])
def test_an_encoder_decoder_gets_new_tokens(kind: str, tmp_path: Path) -> None:
    base = translators.save(tmp_path / "base", kind)
    columns = {"source_column": "text", "target_column": "label"}
    task = {"type": "seq2seq_lm", **columns, **translators.languages(kind)}
    model = {"name": str(base), "add_tokens": ["<a>", "<b>"]}
    opened_task, ours = opened(tmp_path, base, task=task, model=model)
    ids = opened_task.learned.token_ids
    tokenizer = AutoTokenizer.from_pretrained(base)
    plain = AutoModelForSeq2SeqLM.from_pretrained(base)
    tokenizer.add_tokens(["<a>", "<b>"])
    assert ids == tokenizer.convert_tokens_to_ids(["<a>", "<b>"])
    before = plain.get_input_embeddings().weight.detach().clone()
    plain.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    mean = before[: min(ids)].mean(0)
    with torch.no_grad():
        for module in (plain.get_input_embeddings(), plain.get_output_embeddings()):
            module.weight[ids] = mean
    source = torch.tensor([[5, ids[0], 9, ids[1], 2]])
    with torch.no_grad():
        options = {"input_ids": source, "decoder_input_ids": source.flip(1)}
        found, wanted = ours.eval()(**options).logits, plain.eval()(**options).logits
    assert_close(found, wanted, 1e-5)
    empty = opened_task.empty_model()[0]  # has no values to draw rows from
    assert empty.get_input_embeddings().weight.shape == ours.get_input_embeddings().weight.shape


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bart", "mbart", "nllb", "pegasus", "led", "marian", "t5"])
@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_leave_what_the_model_says_of_old_ones(
    kind: str, tied: bool, tmp_path: Path
) -> None:
    base = translators.save(tmp_path / "base", kind)
    config = AutoConfig.from_pretrained(base, tie_word_embeddings=tied)
    plain = tiny.enliven(AutoModelForSeq2SeqLM.from_config(config))
    plain.save_pretrained(base)
    plain = AutoModelForSeq2SeqLM.from_pretrained(base).eval()
    ids = torch.tensor([[5, 8, 9, 2]])
    options = {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    wanted = plain(**options).logits
    columns = {"source_column": "text", "target_column": "label"}
    task = {"type": "seq2seq_lm", **columns, **translators.languages(kind)}
    sections = {"task": task, "model": {"name": str(base), "add_tokens": ["<a>", "<b>"]}}
    embeddings = {m.weight for m in plain.modules() if isinstance(m, nn.Embedding)}
    words = {w for w in embeddings if len(w) == config.vocab_size}
    if len(words) > 1:  # the encoder and the decoder have embeddings of their own
        with pytest.raises(LoraError, match=r"encoder.embed_tokens` by `.*shared`"):
            opened(tmp_path, base, **sections)
        return
    _, ours = opened(tmp_path, base, **sections)
    found = ours.eval()(**options).logits
    assert found.shape[-1] == wanted.shape[-1] + 2
    assert_close(found[..., :-2], wanted, 1e-6)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"adapter": {"train_tokens": ["warm and funny"]}}, "is no token: the tokenizer splits it"),
        ({"adapter": {"train_tokens": ["<s>", "<s>"]}}, "`<s>` is written twice"),
        ({"adapter": {"train_tokens": ["<s>", 0]}}, "`0` and `<s>` are the same token"),
        ({"adapter": {"train_tokens": [100_000]}}, "there is no token 100000"),
        ({"model": {"add_tokens": ["<a>", "<a>"]}}, "`<a>` is written twice"),
        ({"model": {"add_tokens": [" <a>"]}}, "white space"),
    ],
)
def test_a_wrong_token_is_an_error(sections: Any, message: str, tmp_path: Path) -> None:
    base = tiny.save_llama(tmp_path / "base")
    with pytest.raises(LoraError, match=message):
        opened(tmp_path, base, **sections)


def test_a_token_of_the_vocabulary_may_be_named(tmp_path: Path) -> None:
    base = tiny.save_llama(tmp_path / "base")
    adapter = {"train_tokens": ["</s>", "war", 7]}
    model = {"name": str(base), "add_tokens": ["<s>", "<new>"]}
    task, _ = opened(tmp_path, base, adapter=adapter, model=model)
    tokenizer = AutoTokenizer.from_pretrained(base)
    known = [tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "</s>")]
    assert {*known, 7, len(tokenizer)} <= set(task.learned.token_ids)
    assert len(task.learned.token_ids) == 5


def test_rows_beyond_the_vocabulary_are_named(tmp_path: Path) -> None:
    base = tiny.llama()
    by_peft(base, "tied", tmp_path, IDS)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    size = base.config.vocab_size
    file.write_text(json.dumps({**config, "trainable_token_indices": [5, 9, size]}))
    with pytest.raises(LoraError, match=f"the row of the token {size}"):
        load_adapter(copy.deepcopy(base), read_adapter(tmp_path), [])
    file.write_text(json.dumps({**config, "trainable_token_indices": None}))
    with pytest.raises(LoraError, match="does not say of which tokens"):
        load_adapter(copy.deepcopy(base), read_adapter(tmp_path), [])
