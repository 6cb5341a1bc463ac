"""What every adapter type owes on every kind of layer: a start at the base, saving, and merging."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calls import attached, loaded, merged, outputs, run, stir, stopped_copy, trained, turned_off
from calls import write_kind as write_task
from closeness import assert_close, assert_different
from kinds import ADAPTERS, SITES, TASKS
from runs import assert_same_run
from torch import nn


def on_sites(names: Iterable[str]) -> pytest.MarkDecorator:
    """Run a test for every adapter type on every site that it fits."""
    pairs = [(name, site) for name in names for site in SITES if site not in ADAPTERS[name].not_on]
    return pytest.mark.parametrize(("name", "site_name"), pairs)


def proved(name: str) -> tuple[str, ...]:
    """Return what is tested of an adapter type on every site."""
    saved = ("write", "read") if ADAPTERS[name].has_folder else ()
    return ("train", *saved, "merge")


@pytest.mark.proves(lambda name, **_: proved(name), variant="{name}", layer="{site_name}")
@on_sites(ADAPTERS)
@pytest.mark.slow_after(8)
def test_an_adapter_keeps_its_promises(name: str, site_name: str, tmp_path: Path) -> None:
    kind, site = ADAPTERS[name], SITES[site_name]
    base = site.build()
    wanted = outputs(base)
    model = attached(site, base, kind.adapter)

    # step 0 is the base model exactly, and a gradient reaches all that is trained, and only that
    assert_close(outputs(model), wanted)
    assert torch.equal(outputs(model), wanted) or not kind.starts_exactly
    assert trained(model)
    stir(model)
    outputs(model).square().sum().backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == set(trained(model))

    # training changes the outputs; saved and loaded they are the same, most bit for bit
    found = outputs(model)
    assert_different(found, wanted)
    if kind.has_folder:
        again = loaded(site, base, model, kind.adapter, tmp_path)
        assert_close(outputs(again), found)
        assert torch.equal(outputs(again), found) or not kind.loads_exactly
        assert not trained(again)
        assert set(again.state_dict()) == set(model.state_dict())

    # merged it computes the same, and is a model like the base
    plain = merged(model)
    assert_close(outputs(plain), found)
    assert parameter_names(plain) == parameter_names(base)


@on_sites(name for name, kind in ADAPTERS.items() if kind.bare)
@pytest.mark.slow_after(20)
def test_turned_off_it_is_the_base(name: str, site_name: str) -> None:
    site = replace(SITES[site_name], head=[])
    base = site.build()
    model = stir(attached(site, base, ADAPTERS[name].adapter))
    assert_different(outputs(model), outputs(base))
    with turned_off(model):
        assert torch.equal(outputs(model), outputs(base))


def parameter_names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


RESUMED = {name: kind.adapter for name, kind in ADAPTERS.items() if kind.runs}
RESUMED["rows of tokens"] = {"train_tokens": [5, 9]}
# one run of several keys
INCLUDED = {"olora with patterns": ["rslora", "patterns", "bias of adapted modules", "olora"]}


@pytest.mark.proves(
    "resume",
    variant=lambda name: [name, *INCLUDED.get(name, [])],
    layer=lambda name: "Embedding" if name == "rows of tokens" else "Linear",
)
@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.slow_after(1)
def test_a_run_of_any_type_is_resumed_exactly(name: str, tmp_path: Path) -> None:
    recipe = write_task(TASKS["classification"], tmp_path, RESUMED[name])
    run(recipe, tmp_path / "whole")
    stopped_copy(tmp_path / "whole", tmp_path / "resumed")
    run(recipe, tmp_path / "resumed", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")
