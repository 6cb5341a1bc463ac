"""What adapters and tasks owe on a base in 8 or 4 bits: to be those of the numbers it stands for.

The reference is the same model with plain layers, whose weights are what the codes stand for.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import cast

import pytest
import torch
from calls import (
    attached,
    loaded,
    merged,
    open_kind,
    outcomes,
    outputs,
    run,
    saved_and_loaded,
    stir,
    stopped_copy,
    sums,
    trained,
    write_kind,
)
from closeness import assert_close
from kinds import ADAPTERS, SITES, TASKS, model_type
from runs import assert_same_run
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_cli.models.quantized_linear import Format, QuantizedLinear

pytest.importorskip("bitsandbytes")
FORMATS: tuple[Format, ...] = ("int8", "nf4", "fp8")
# all weights of `full` are trained, and codes cannot be; LoHa and LoKr take no Conv1D
CASES = [
    (name, site, kind)
    for name, adapter in ADAPTERS.items()
    for site in ("Linear", "Conv1D")
    for kind in FORMATS
    if name != "full" and site not in adapter.not_on
]


def quantized_and_plain(site: str, kind: Format) -> tuple[nn.Module, nn.Module]:
    """Return a model of a site with quantised layers, and one with the numbers of their codes."""
    plain = SITES[site].build()
    model = copy.deepcopy(plain)
    kept = (*SITES[site].head, "lm_head")
    for name, layer in list(plain.named_modules()):
        if type(layer) not in (nn.Linear, Conv1D) or name.startswith(kept):
            continue
        transposed = isinstance(layer, Conv1D)
        weight = layer.weight.T if transposed else layer.weight
        n_out, n_in = weight.shape
        bias = copy.deepcopy(layer.bias)
        codes = QuantizedLinear(n_in, n_out, cast("nn.Parameter", bias), kind, transposed)
        codes.set_weight(layer.weight.detach())
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, codes)
        numbers = codes.dequantized()
        layer.weight.data = numbers.T.contiguous() if transposed else numbers
    return model, plain


@pytest.mark.proves(
    "train", "write", "read", "merge", variant="{name}", layer="{site_name}", base="{kind}"
)
@pytest.mark.parametrize(("name", "site_name", "kind"), CASES)
def test_an_adapter_is_that_of_the_dequantised_model(
    name: str, site_name: str, kind: Format, tmp_path: Path
) -> None:
    site, adapter = SITES[site_name], ADAPTERS[name].adapter
    base, plain = quantized_and_plain(site_name, kind)
    assert_close(outputs(base), outputs(plain))
    models = []
    for one in (base, plain):
        torch.manual_seed(0)
        model = attached(site, one, adapter)
        model.eval()
        assert_close(outputs(model), outputs(one))
        torch.manual_seed(1)
        models.append(stir(model))
    ours, wanted = models
    outputs(ours).square().sum().backward()
    outputs(wanted).square().sum().backward()
    gradients = {n: p.grad for n, p in trained(wanted).items()}
    assert gradients.keys() == trained(ours).keys()
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    for parameter, gradient in trained(ours).items():
        assert float((gradient.grad - gradients[parameter]).abs().max()) <= 5e-5 * scale
    found = outputs(ours)
    assert_close(found, outputs(wanted))

    for folder in ("quantised", "plain"):
        (tmp_path / folder).mkdir()
    again = loaded(site, base, ours, adapter, tmp_path / "quantised")
    assert_close(outputs(again), found)
    # as `lora merge` does it: onto the numbers that the codes stand for
    onto_plain = loaded(site, plain, ours, adapter, tmp_path / "plain")
    assert_close(outputs(merged(onto_plain)), found)


# a whole run of each task: as it trains on a plain base, it trains on a quantised one
PLACES = [
    (name, kind)
    for name, task in TASKS.items()
    # a base of several parts is not quantised
    if task.runs and "pack" not in name and not name.startswith("captioned")
    for kind in FORMATS
]


@pytest.mark.proves(
    "split", "alone", "save",
    task=lambda name, **_: TASKS[name].task["type"], rows="{name}",
    model=lambda name, **_: model_type(name), base="{kind}",
)  # fmt: skip
@pytest.mark.parametrize(("name", "kind"), PLACES)
def test_a_task_keeps_its_promises_on_a_quantised_base(
    name: str, kind: Format, tmp_path: Path
) -> None:
    opened = open_kind(TASKS[name], tmp_path, model={"quantization": kind})
    assert any(isinstance(module, QuantizedLinear) for module in opened.model.modules())
    loss, n_items, gradients = sums(opened, opened.examples)
    gradients = {parameter: gradient.clone() for parameter, gradient in gradients.items()}
    assert set(gradients) == set(trained(opened.model))
    split_loss, split_items, _ = sums(opened, opened.examples[:1], opened.examples[1:])
    assert split_loss == pytest.approx(loss, rel=1e-5)
    assert split_items == pytest.approx(n_items, rel=1e-6)
    together = outcomes(opened, opened.single)
    alone = outcomes(opened, opened.single, size=1)
    assert_close(together, alone)
    again = saved_and_loaded(opened, tmp_path / "adapter")
    assert_close(outcomes(again, opened.single), together)


@pytest.mark.proves(
    "resume", task="sequence_classification", rows="classification",
    model=lambda **_: model_type("classification"), base="{kind}",
)  # fmt: skip
@pytest.mark.proves("resume", variant="{name}", layer="Linear", base="{kind}")
@pytest.mark.parametrize(("name", "kind"), [("lora", "int8"), ("lora", "nf4"), ("loftq", "nf4")])
def test_a_run_on_a_quantised_base_is_resumed_exactly(
    name: str, kind: Format, tmp_path: Path
) -> None:
    adapter = {"init": "loftq"} if name == "loftq" else {}
    recipe = write_kind(TASKS["classification"], tmp_path, adapter, {"quantization": kind})
    run(recipe, tmp_path / "whole")
    stopped_copy(tmp_path / "whole", tmp_path / "resumed")
    run(recipe, tmp_path / "resumed", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")
