"""EVA: initial matrices and ranks equal PEFT's on the same batches, and a run computes them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path

import peft
import pytest
import tiny
import torch
from closeness import assert_close, near
from peft.utils.incremental_pca import IncrementalPCA
from test_initialise import SAME, assert_trains_alike, logits, our_pairs, ours, peft_pairs
from torch import Tensor, nn

from lora_cli.adapters import eva
from lora_cli.adapters.attach import lora_layers
from lora_cli.adapters.eva import Components, find_starts, set_ranks, set_starts
from lora_cli.adapters.load_adapter import load_adapter
from lora_cli.adapters.peft_format.adapter_folder import read_adapter, save_adapter
from lora_cli.recipe import load_recipe
from lora_cli.training import train

pytestmark = pytest.mark.filterwarnings("ignore:lora with eva initialization")
MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "Linear": (tiny.encoder, ["query", "key", "value", "intermediate.dense", "output.dense"]),
    "Conv1D": (tiny.gpt2, ["c_attn", "c_proj", "c_fc"]),
}
Inputs = dict[str, Tensor]


def batches_of(count: int = 6, rows: int = 8, tokens: int = 16) -> list[Inputs]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(count):
        ids = torch.randint(4, 200, (rows, tokens), generator=generator)
        lengths = torch.randint(tokens // 2, tokens + 1, (rows, 1), generator=generator)
        found.append({"input_ids": ids, "attention_mask": (torch.arange(tokens) < lengths).long()})
    return found


def looks(model: nn.Module, batches: list[Inputs]) -> Iterator[Callable[[], Tensor]]:
    def look(batch: Inputs) -> Tensor:
        model(**batch)
        return batch["attention_mask"].bool()

    return (partial(look, batch) for batch in cycle(batches))


@pytest.mark.proves("train", "write", variant="eva", layer="{kind}", against="PEFT")
@pytest.mark.parametrize("rho", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.slow
def test_starts_ranks_and_training_are_those_of_peft(kind: str, rho: float, tmp_path: Path) -> None:
    build, targets = MODELS[kind]
    base, batches = build(), batches_of()
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, init_lora_weights="eva",
        rank_pattern={targets[0]: 6}, eva_config=peft.EvaConfig(rho=rho),
        fan_in_fan_out=kind == "Conv1D",
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    peft.initialize_lora_eva_weights(theirs, batches, show_progress_bar=False)

    adapter = {"rank": 4, "init": "eva", "eva_rho": rho, "target_modules": targets,
               "rank_pattern": {targets[0]: 6}}  # fmt: skip
    model = ours(base, **adapter)
    starts, changing = find_starts(model, looks(model, batches), rho)
    assert not changing
    set_starts(model, starts, tiny.recipe_of("causal_lm", **adapter).adapter)
    mine, others = our_pairs(model), peft_pairs(theirs)
    assert mine.keys() == others.keys()
    for name, (a, b) in others.items():
        assert_close(mine[name][0], a, SAME)
        assert torch.equal(mine[name][1], b)
    assert torch.equal(logits(model), logits(base))
    ranks = [layer.rank for layer in lora_layers(model).values()]
    assert sum(ranks) == sum(6 if targets[0] in name else 4 for name in starts)
    assert rho == 1 or set(ranks) - {4, 6}
    assert_trains_alike(model, theirs)

    # the folder contains the ranks, so that both tools read it
    save_adapter(tmp_path, model, tiny.recipe_of("causal_lm", **adapter), [])
    found = logits(model)
    again = copy.deepcopy(base)
    load_adapter(again, read_adapter(tmp_path), [])
    assert torch.equal(logits(again), found)
    config = peft.LoraConfig.from_pretrained(str(tmp_path))
    config.task_type = None
    read = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, config=config).eval()
    assert_close(logits(read), found)


def test_components_of_batches_are_those_of_all_rows() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 12, dtype=torch.float64) @ torch.diag(0.5 ** torch.arange(12.0)).double()
    x = x @ torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0] + 3
    part = Components(4)
    for i in range(0, 400, 25):
        part.add(x[i : i + 25])
    centred = x - x.mean(0)
    _, strengths, vectors = torch.linalg.svd(centred, full_matrices=False)
    assert part.vectors is not None
    assert_close((part.vectors.double() @ vectors[:4].T).abs(), torch.eye(4).double(), 1e-3)
    assert part.shares.tolist() == near((strengths[:4] ** 2 / (centred**2).sum()).tolist(), 1e-3)
    assert bool(part.converged.all())


@pytest.mark.parametrize(
    "count", [1, 3, 7]
)  # an approximate SVD for few of 12, an exact one for many
@pytest.mark.parametrize("rows", [9, 30])
def test_components_are_those_of_peft_batch_by_batch(count: int, rows: int) -> None:
    torch.manual_seed(1)
    mixed = torch.randn(12, 12) * 0.8 ** torch.arange(12.0)
    theirs = IncrementalPCA(n_components=count, lowrank=True, lowrank_seed=42)
    ours = Components(count)
    before: Tensor | None = None
    for _ in range(6):
        x = torch.randn(rows, 12) @ mixed + 2
        ours.add(x)
        theirs.partial_fit(x)
        assert ours.vectors is not None
        assert_close(ours.vectors.float(), theirs.components_.float(), 1e-4)
        assert_close(ours.shares.float(), theirs.explained_variance_ratio_.float(), 1e-4)
        if before is None:
            assert not ours.converged.any()
        else:
            alike = nn.functional.cosine_similarity(ours.vectors.double(), before.double())
            assert torch.equal(ours.converged, alike >= eva.CONVERGED)
        before = ours.vectors


def test_a_layer_gets_the_largest_rank_of_those_that_read_the_same() -> None:
    found = {name: Components(3) for name in ("a", "b")}
    found["a"].shares = torch.tensor([0.5, 0.2, 0.1])
    found["b"].shares = torch.tensor([0.6, 0.05, 0.04])
    leaders = {"a": "a", "x": "a", "b": "b"}
    for most, budget, expected in (
        ({"a": 1, "x": 3, "b": 3}, 5, {"a": 3, "b": 1, "x": 1}),
        ({"a": 3, "x": 1, "b": 3}, 5, {"a": 3, "b": 1, "x": 1}),
        ({"a": 3, "x": 3, "b": 0}, 2, {"a": 1, "b": 0, "x": 1}),
        ({"a": 3, "x": 0, "b": 1}, 3, {"a": 2, "b": 1, "x": 0}),
    ):
        assert eva._ranks(found, leaders, budget, most) == expected


def test_batches_with_too_few_tokens_are_joined_with_the_next() -> None:
    torch.manual_seed(0)
    x = torch.randn(60, 10)
    small, whole = Components(4), Components(4)
    for i in range(0, 60, 3):
        small.add(x[i : i + 3])
    for i in range(0, 60, 6):
        whole.add(x[i : i + 6])
    assert small.vectors is not None
    assert whole.vectors is not None
    assert torch.equal(small.vectors, whole.vectors)
    enough = Components(4)
    enough.add(x[:3])
    assert enough.vectors is None
    for rows in (x[:4], x[:1]):  # as many as are wanted, and one more than those that wait
        enough.add(rows)
        assert enough.vectors is not None
        enough = Components(4)
        enough.add(x[:3])


def test_a_module_may_lose_its_adapter_to_others() -> None:
    base = tiny.encoder()
    torch.manual_seed(0)
    with torch.no_grad():  # the inputs of one layer are all of one direction, the others' are not
        base.bert.encoder.layer[0].intermediate.dense.weight[:] = 0
        base.bert.encoder.layer[0].intermediate.dense.bias[:] = 0.3
    targets = ["intermediate.dense", "output.dense", "query"]
    adapter = {"rank": 1, "init": "eva", "eva_rho": 6.0, "target_modules": targets}
    model = ours(base, **adapter, bias="lora_only")
    spec = tiny.recipe_of("causal_lm", **adapter, bias="lora_only").adapter
    starts, _ = find_starts(model, looks(model, batches_of()), 6.0)
    without = [name for name, start in starts.items() if not len(start)]
    assert without
    set_starts(model, starts, spec)
    assert lora_layers(model).keys() == starts.keys() - set(without)
    for name in without:
        assert type(model.get_submodule(name)) is nn.Linear
        assert not model.get_submodule(name).bias.requires_grad
    assert torch.equal(logits(model), logits(base))


class Inner(nn.Module):
    """Layers whose inputs have other shapes than the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.pooled, self.heads = (nn.Linear(4, 2) for _ in range(3))

    def forward(self, x: Tensor) -> None:
        self.tokens(x)
        self.pooled(x[:, 0])
        self.heads(x[:, :2, None].expand(-1, -1, 3, -1))


@pytest.mark.parametrize("counted", [True, False])
def test_only_masked_in_tokens_are_used_if_the_mask_fits_the_inputs(counted: bool) -> None:
    model, x = Inner(), torch.randn(2, 3, 4)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    found: dict[str, Tensor] = {}

    def look() -> Tensor | None:
        model(x)
        return mask if counted else None

    layers = dict(model.named_children())
    eva._observe(layers, look, {name: partial(found.__setitem__, name) for name in layers})
    assert torch.equal(found["tokens"], x[mask] if counted else x.reshape(6, 4))
    assert torch.equal(found["pooled"], x[:, 0])
    assert torch.equal(found["heads"], x[:, :2, None].expand(-1, -1, 3, -1).reshape(12, 4))
    assert not any(layer._forward_pre_hooks for layer in layers.values())


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_modules_that_lose_their_adapter_treat_their_bias_as_the_recipe_says(bias: str) -> None:
    names = ["query", "key", "value"]
    adapter = {"rank": 2, "alpha": 6.0, "target_modules": names, "bias": bias}
    model, spec = ours(tiny.encoder(), **adapter), tiny.recipe_of(**adapter).adapter
    start = "bert.encoder.layer.0.attention.self"
    model.get_submodule(f"{start}.key").base.bias = None
    kept = lora_layers(model)[f"{start}.query"]
    set_ranks(model, {f"{start}.query": 2, f"{start}.value": 5}, spec)
    layers = lora_layers(model)
    assert {name: layer.rank for name, layer in layers.items()} == {
        f"{start}.query": 2, f"{start}.value": 5,
    }  # fmt: skip
    assert layers[f"{start}.query"] is kept  # its rank is the same
    assert layers[f"{start}.value"].scaling == kept.scaling
    for place, adapted in (("0.attention.self.value", True), ("1.attention.self.value", False)):
        module = model.get_submodule(f"bert.encoder.layer.{place}")
        assert module.bias.requires_grad == (bias == "all" or (bias == "lora_only" and adapted))


def test_a_run_starts_from_its_own_rows_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny.save_encoder(tmp_path / "base")
    adapter = {"rank": 6, "alpha": 12, "init": "eva", "target_modules": ["query", "value", "dense"],
               "eva_rho": 3.0}  # fmt: skip
    train(load_recipe(tiny.recipe(base, tmp_path, adapter=adapter)))
    assert "EVA: " in capsys.readouterr().err
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["alpha_pattern"].keys() == config["rank_pattern"].keys() != set()
    for name, rank in config["rank_pattern"].items():
        assert config["alpha_pattern"][name] / rank == pytest.approx(2.0)
    recipe = load_recipe(
        tmp_path / "out/recipe.yaml"
    )  # contains the requested settings, to repeat the run
    assert (recipe.adapter.rank, recipe.adapter.rank_pattern) == (6, {})
