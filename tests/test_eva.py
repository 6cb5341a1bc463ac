"""EVA: PEFT's starts and ranks on the same batches, and the run that finds them."""

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
from test_initialise import SAME, assert_trains_alike, logits, our_pairs, ours, peft_pairs
from torch import Tensor, nn

from lora_cli.adapters.attach import lora_layers
from lora_cli.adapters.eva import Components, find_starts, start_at
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
    start_at(model, starts, tiny.recipe_of("causal_lm", **adapter).adapter)
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

    # the folder says the ranks, so that both tools read it
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
    assert bool(part.found.all())


def test_batches_with_too_few_tokens_wait_for_the_next() -> None:
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
    start_at(model, starts, spec)
    assert lora_layers(model).keys() == starts.keys() - set(without)
    for name in without:
        assert type(model.get_submodule(name)) is nn.Linear
        assert not model.get_submodule(name).bias.requires_grad
    assert torch.equal(logits(model), logits(base))


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
    recipe = load_recipe(tmp_path / "out/recipe.yaml")  # says what was asked for, to repeat it
    assert (recipe.adapter.rank, recipe.adapter.rank_pattern) == (6, {})
