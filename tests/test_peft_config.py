"""Which values the keys of `adapter_config.json` may have, and the errors for others."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch

from lora_cli.adapters.peft_format import peft_config
from lora_cli.adapters.peft_format.peft_config import (
    CHECKS,
    LYCORIS_CHECKS,
    adapter_type,
    check_config,
)
from lora_cli.errors import IntegrityError, LoraError

WHERE = "adapter/adapter_config.json"
NAN, INF = float("nan"), float("inf")
RANKS = [1, 2, 10**9], [0, -1, 1.0, "8", True, None, [1]]
ALPHAS = (
    [0, -3, 0.5, 1, 3e38, -3e38, 10**30],
    [NAN, INF, -INF, 3.1e38, 10**39, True, None, "8", [1]],
)
FLAGS = [None, True, False], [0, 1, "true", [], {}]
TEXTS = [None, "", "main"], [0, False, ["main"], {}]
NAMES = [None, [], ["query"], ["a", "b"]], [0, True, {"a": 1}, [1], ["a", None]]
EXPRESSIONS = [*NAMES[0], "all-linear", r".*\.(q|v)"], [*NAMES[1], "(", "*"]


def pattern(of: tuple[list[Any], list[Any]]) -> tuple[list[Any], list[Any]]:
    """Return which dictionaries are good, from the numbers that are."""
    good, bad = of
    patterns = [None, {}, *({"query": value} for value in good), {"a": good[0], "b.*": good[1]}]
    spoilt = [{"query": value} for value in bad] + [{"a": good[0], "b": bad[0]}, {"(": good[0]}]
    return patterns, [*spoilt, [], "query", 4]


VALUES: dict[str, tuple[list[Any], list[Any]]] = {
    "r": RANKS,
    "lora_alpha": ALPHAS,
    "lora_dropout": ([0, 0.0, 0.3, 1, 1.0], [-0.1, 1.01, 2, NAN, None, True, "0.1"]),
    "rank_pattern": pattern(RANKS),
    "alpha_pattern": pattern(ALPHAS),
    "use_rslora": FLAGS,
    "fan_in_fan_out": FLAGS,
    "ensure_weight_tying": FLAGS,
    "bias": ([None, "none", "all", "lora_only"], ["some", "", True, 0, []]),
    "target_modules": EXPRESSIONS,
    "exclude_modules": EXPRESSIONS,
    "modules_to_save": (NAMES[0], [*NAMES[1], "classifier"]),
    "target_parameters": (NAMES[0], [*NAMES[1], "experts.gate_up_proj"]),
    "trainable_token_indices": (
        [None, [], [0, 7], {"embed_tokens": [1]}],
        [
            "7",
            7,
            True,
            [3, 3],
            [-1],
            [1.0],
            [True],
            ["a"],
            {"embed_tokens": 1},
            {"embed_tokens": [-1]},
        ],
    ),
    "layers_to_transform": ([None, 3, 0, [], [0, 1]], ["3", True, 1.0, [1, "2"], [True], {}]),
    "layers_pattern": ([*NAMES[0], "layers", "h"], NAMES[1]),
    "task_type": TEXTS,
    "base_model_name_or_path": TEXTS,
    "revision": TEXTS,
    **dict.fromkeys(peft_config.TYPE_KEYS, FLAGS),
}
LYCORIS = {
    "alpha": ALPHAS,
    "use_effective_conv2d": FLAGS,
    "decompose_both": FLAGS,
    "decompose_factor": (
        [-1, 0, 4, 2**31, -(2**31)], [2**31 + 1, -(2**31) - 1, 2**32, 1.0, True, None, "4"]
    ),
}  # fmt: skip


def config(kind: str = "LORA", **values: Any) -> dict[str, Any]:
    return {"peft_type": kind, **values}


def test_the_values_of_every_key_are_tried() -> None:
    assert VALUES.keys() == CHECKS.keys()
    assert LYCORIS.keys() == LYCORIS_CHECKS.keys()


@pytest.mark.parametrize("key", [*VALUES, *LYCORIS])
def test_only_valid_values_are_accepted(key: str) -> None:
    kind, (good, bad) = ("LOKR", LYCORIS[key]) if key in LYCORIS else ("LORA", VALUES[key])
    for value in good:
        check_config(config(kind, **{key: value}), WHERE)
    for value in bad:
        with pytest.raises(IntegrityError) as caught:
            check_config(config(kind, **{key: value}), WHERE)
        (problem,) = caught.value.problems
        assert problem.what.startswith(f"`{key}` "), value
        is_number_as_text = isinstance(value, str) and key in peft_config.NUMBERS
        shown = json.dumps(value)
        said = f"has to be a number, and is the text {shown}" if is_number_as_text else ""
        assert problem.what == f"`{key}` {said or f'cannot be {shown}'}"
    check_config(config(kind), WHERE)  # all keys are optional


def test_an_alpha_fits_into_float32() -> None:
    assert torch.isfinite(torch.tensor(3e38, dtype=torch.float32))
    assert torch.isinf(torch.tensor(3.5e38, dtype=torch.float64).float())


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_initialisations_that_keep_the_base_are_accepted(init: Any) -> None:
    check_config(config(init_lora_weights=init), WHERE)


def test_other_initialisations_are_rejected() -> None:
    for init in ("pissa", "olora", "corda", "loftq", ""):
        with pytest.raises(LoraError, match="changed the weights of the base too") as caught:
            check_config(config(init_lora_weights=init), WHERE)
        assert not isinstance(caught.value, IntegrityError)
    for init in (1, 0.5, ["gaussian"], {}):
        with pytest.raises(IntegrityError, match="`init_lora_weights` cannot be"):
            check_config(config(init_lora_weights=init), WHERE)


@pytest.mark.parametrize("key", peft_config.VARIANTS)
def test_a_variant_must_be_off_unless_it_identifies_a_supported_type(key: str) -> None:
    for off in (None, False, [], {}, ""):
        if key not in peft_config.TYPE_KEYS:
            check_config(config(**{key: off}), WHERE)
    if key in peft_config.TYPE_KEYS:
        check_config(config(**{key: True}), WHERE)
        return
    for on in (True, 1, 0, ["a"], {"a": 1}, "yes"):
        with pytest.raises(LoraError) as caught:
            check_config(config(**{key: on}), WHERE)
        (problem,) = caught.value.problems
        assert problem.what == f"adapters with `{key}` cannot be read"
        merges = peft_config.VARIANTS[key] == peft_config.MERGE_IN_PEFT
        assert (problem.hint or "").endswith("again without it") is merges


def test_a_type_of_adapter_is_identified_by_its_key() -> None:
    assert adapter_type(config()) == "lora"
    assert adapter_type(config(use_dora=True)) == "dora"
    assert adapter_type(config(use_dora=False)) == "lora"


@pytest.mark.parametrize("kind", ["LORA", "LOHA", "LOKR"])
def test_keys_that_are_not_known_must_be_off(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    for off in (None, False, [], {}, ""):
        check_config(config(kind, newer_key=off), WHERE)
        said = capsys.readouterr().err
        assert "has keys that this tool does not know, and ignores: `newer_key`\n" in said
    for on in (True, 0, 0.5, "yes", ["a"], {"a": 1}):
        with pytest.raises(LoraError, match=r"the key `newer_key` .* is not known"):
            check_config(config(kind, newer_key=on), WHERE)
    check_config(config(kind, unsloth_version="1", license="mit", peft_version="0.21"), WHERE)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("count", [1, 8, 9, 12])
def test_the_first_of_many_unknown_keys_are_named(
    count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"newer_{i:02}" for i in range(count)]
    check_config(config(**dict.fromkeys(names)), WHERE)
    said = capsys.readouterr().err
    assert [name for name in names if f"`{name}`" in said] == names[:8]
    assert ("more" in said) is (count > 8)
    assert count <= 8 or f" and {count - 8} more\n" in said
    with pytest.raises(LoraError) as caught:
        check_config(config(**dict.fromkeys(names, 1)), WHERE)
    assert len(caught.value.problems) == min(count, 8)


@pytest.mark.parametrize("kind", ["LORA", "LOKR"])
def test_idle_keys_are_ignored(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    idle = (
        peft_config.IDLE
        if kind == "LORA"
        else peft_config.LYCORIS_IDLE | peft_config.LYCORIS_COMMON
    )
    values: dict[str, Any] = {key: {"a": 1} for key in sorted(idle - CHECKS.keys() - {"peft_type"})}
    check_config(config(kind, **values), WHERE)
    assert capsys.readouterr().err == ""


def test_keys_of_another_type_are_not_known() -> None:
    for kind, key in itertools.chain(
        (("LORA", key) for key in ("decompose_factor", "alpha")),
        (("LOKR", key) for key in ("use_rslora", "lora_bias_of_mine")),
    ):
        with pytest.raises(LoraError, match=f"the key `{key}` .* is not known"):
            check_config(config(kind, **{key: 4 if kind == "LORA" else True}), WHERE)


def test_other_types_of_adapter_are_named() -> None:
    for kind in ("IA3", "lora", None, 3, {}, ["LORA"]):
        with pytest.raises(LoraError, match="is not a type of adapter that this tool reads"):
            check_config({"peft_type": kind}, WHERE)
