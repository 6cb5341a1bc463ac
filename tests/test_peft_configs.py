"""Adapters of random configurations, from PEFT to here and back: the same outputs, or a clear no.

A few examples run with the suite. A thousand, with the counts of what came of them:

    LORA_PEFT_EXAMPLES=1000 pytest tests/test_peft_configs.py -s
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import peft_configs
import pytest
import tiny
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from peft_configs import (
    ARCHITECTURES,
    TOLERANCE,
    base_of,
    configs,
    difference,
    read_by_peft,
    recipes,
    whole_configs,
)

from lora_cli.adapters.attach import attach
from lora_cli.adapters.load_adapter import load_adapter
from lora_cli.adapters.merge_layers import merge
from lora_cli.adapters.peft_format.adapter_folder import (
    CONFIG_FILE,
    differences_in_peft,
    read_adapter,
    save_adapter,
)
from lora_cli.adapters.peft_format.peft_config import VARIANTS
from lora_cli.errors import LoraError

EXAMPLES = int(os.environ.get("LORA_PEFT_EXAMPLES", "25"))
COUNTS: Counter[str] = Counter()
# reasons that a message may give for rejecting an adapter of PEFT
REASONS = [
    *VARIANTS,
    "DoRA does not fit",  # a grouped convolution
    "ensure_weight_tying",
    "init_lora_weights",
    "both adapted and trained in full",  # `modules_to_save` matches a part of a target's name
    "no adapter fits",  # an embedding that scales what it looks up
    "PEFT's update of it",  # of a convolution that pads by reflection, or has a dilation
    "num_batches_tracked",  # batch normalisation in `modules_to_save`
    "cannot be divided among",  # ranks and groups of a convolution
]
given_freely = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=EXAMPLES <= 25,
    database=None,
    phases=[Phase.generate],  # a configuration is short enough to read without shrinking
    report_multiple_bugs=False,
)


@pytest.fixture(scope="module", autouse=True)
def counts() -> Iterator[None]:
    yield
    if EXAMPLES > 25:
        for what, count in sorted(COUNTS.items()):
            print(f"{count:6}  {what}")  # noqa: T201 - the counts are what it is run for


@given_freely
@given(data=st.data())
@pytest.mark.slow
def test_what_peft_saves_is_read_here_as_peft_reads_it(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    name = data.draw(st.sampled_from(sorted(ARCHITECTURES)))
    config = data.draw(configs(name))
    folder = _empty(tmp_path_factory)
    trained = peft_configs.save_by_peft(folder, base_of(name), config)
    theirs = read_by_peft(folder, base_of(name)) if trained is not None else None
    assume(theirs is not None)
    ours = copy.deepcopy(base_of(name))
    reason = _reason(lambda: load_adapter(ours, read_adapter(folder), []))
    if reason is not None:
        assert any(known in reason for known in REASONS), f"{reason}\n{config}"
        COUNTS[f"{name}: rejected by {next(r for r in REASONS if r in reason)}"] += 1
        return
    if difference(trained, theirs) > TOLERANCE:  # it forgets the output layer: with
        COUNTS[f"{name}: PEFT reads another"] += 1  # `ensure_weight_tying`, in GPT-2 and T5
        theirs = trained
    assert difference(ours.eval(), theirs) <= TOLERANCE, config
    COUNTS[f"{name}: equal"] += 1
    if (reason := _reason(lambda: merge(ours))) is not None:
        assert "spans all channels" in reason
        return
    assert difference(ours, theirs) <= TOLERANCE, config
    COUNTS[f"{name}: merged equal"] += 1


@given_freely
@given(data=st.data())
@pytest.mark.slow
def test_loha_and_lokr_of_peft_are_read_here_as_peft_reads_them(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    name = data.draw(st.sampled_from(sorted(ARCHITECTURES)))
    kind, config = data.draw(whole_configs(name))
    folder = _empty(tmp_path_factory)
    of_kind = {"LOHA": peft.LoHaConfig, "LOKR": peft.LoKrConfig}[kind]
    trained = peft_configs.save_by_peft(folder, base_of(name), config, kind=of_kind)
    theirs = read_by_peft(folder, base_of(name)) if trained is not None else None
    assume(theirs is not None)
    ours = copy.deepcopy(base_of(name))
    reason = _reason(lambda: load_adapter(ours, read_adapter(folder), []))
    if reason is not None:
        assert any(known in reason for known in REASONS), f"{reason}\n{config}"
        COUNTS[f"{kind}, {name}: rejected by {next(r for r in REASONS if r in reason)}"] += 1
        return
    assert difference(ours.eval(), theirs) <= TOLERANCE, config
    merge(ours)
    assert difference(ours, theirs) <= TOLERANCE, config
    COUNTS[f"{kind}, {name}: equal, and merged equal"] += 1


@given_freely
@given(data=st.data())
@pytest.mark.slow
def test_peft_reads_saved_adapters_or_a_warning_says_why_not(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    name = data.draw(st.sampled_from(sorted(ARCHITECTURES)))
    adapter = data.draw(recipes(name))
    model, recipe = copy.deepcopy(base_of(name)), tiny.recipe_of("causal_lm", **adapter)
    assume(_reason(lambda: attach(model, recipe)) is None)  # not names that match nothing
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    folder = _empty(tmp_path_factory)
    save_adapter(folder, model.eval(), recipe, recipe.adapter.train_modules)
    _without_task(folder)
    said = differences_in_peft(model, recipe, recipe.adapter.train_modules, folder)
    theirs = read_by_peft(folder, base_of(name))
    same = theirs is not None and difference(model, theirs) <= TOLERANCE
    assert same != bool(said), f"{said}\n{adapter}"
    COUNTS[f"{name}: written here, {'said to differ' if said else 'equal in PEFT'}"] += 1


def _without_task(folder: Path) -> None:
    """Take the task out of a configuration, as no task of PEFT fits every architecture here."""
    file = folder / CONFIG_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), "task_type": None}))


def _reason(run: Callable[[], object]) -> str | None:
    """Return why something is rejected, or None if it is not."""
    try:
        run()
    except LoraError as error:
        return str(error)
    return None


def _empty(factory: pytest.TempPathFactory) -> Path:
    folder = factory.getbasetemp() / "adapter"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder
