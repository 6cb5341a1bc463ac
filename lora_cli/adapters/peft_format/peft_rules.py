"""PEFT's rules for which modules it adapts and which it trains in full, given a configuration.

Reimplemented from PEFT 0.21 and tested against it, so that saved adapters can be checked without
PEFT. Its rules differ from those of a recipe: `modules_to_save` matches the ends of names, even in
the middle of a word; some layers of Mamba models are rejected; and in models whose experts are
stored as one tensor, all modules with the former names of experts' layers are taken for experts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lora_cli.adapters.lora import LoRALayer
from lora_cli.adapters.lora_parameter import innermost
from lora_cli.adapters.match_names import inside, matches
from lora_cli.adapters.parameter_targets import Place, places_of
from lora_cli.adapters.peft_format.peft_types import PEFT_TYPES
from lora_cli.adapters.peft_format.tensor_names import adapted_modules
from lora_cli.adapters.targets import rejected_in_mamba
from lora_cli.adapters.token_rows import TokenRows

HEADS = ("classifier", "score")  # PEFT trains them in full for classification
CLASSIFYING = ("SEQ_CLS", "TOKEN_CLS")
# names of an expert's layers in older checkpoints, by transformers' family of the model
EXPERTS = {
    "mixtral": ("gate", "w1", "w3", "w2"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}
# layers of which a model reads attributes that PEFT's layers lack, such as the stride
READ_ATTRIBUTES = {"whisper": ["encoder.conv1", "encoder.conv2", "encoder.embed_positions"]}
SHOWN = 3


@dataclass
class PeftReading:
    """How PEFT interprets a configuration."""

    adapted: set[str] = field(default_factory=set)
    """Names of the modules that get low-rank matrices."""
    copied: set[str] = field(default_factory=set)
    """Names of the modules of which PEFT trains a copy."""
    errors: list[str] = field(default_factory=list)
    """The reasons why PEFT raises an error."""
    experts: set[str] = field(default_factory=set)
    """Names of the modules that PEFT takes for experts, and does not adapt."""


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a base model by each of their names, without adapter layers."""
    named = list(model.named_modules(remove_duplicate=False))
    layers = tuple(f"{name}." for name, m in named if isinstance(m, LoRALayer | TokenRows))
    return {
        name: module.base if isinstance(module, TokenRows) else innermost(module)
        for name, module in named
        if name and not (layers and name.startswith(layers))
    }


def peft_reading(model: nn.Module, config: dict[str, Any]) -> PeftReading:
    """Return which modules of a model PEFT adapts and copies for a configuration.

    Args:
        model: The base model, with or without an adapter; may be on the meta device.
        config: The contents of `adapter_config.json`; `target_modules` is a list or an expression.
    """
    reading = PeftReading()
    modules = base_modules(model)
    copied = modules_to_save(config)
    targets, expert_names = config.get("target_modules") or [], _expert_names(model)
    if isinstance(targets, list):
        for_experts = [t for t in targets if _ends_in(t, expert_names)]
        targets = [target for target in targets if target not in for_experts]
        reading.experts = {n for n in modules if for_experts and matches(for_experts, n)}
    for name, module in modules.items():
        if any(inside(name, top) for top in copied) or not matches(targets, name):
            continue
        if rejected_in_mamba(model, name):
            what = f"in a Mamba model it adapts no `{name.rpartition('.')[2]}`"
            reading.errors.append(what)
        elif matches(READ_ATTRIBUTES.get(_model_type(model), []), name):
            reading.errors.append(f"the model reads more of `{name}` than PEFT's layers have")
        elif not isinstance(module, PEFT_TYPES[config["peft_type"]].supported):
            kind = type(module).__name__
            reading.errors.append(f"`{name}` is a {kind}, which it does not adapt")
        reading.adapted.add(name)
    reading.copied = copied_modules(modules, config)
    return reading


def _model_type(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", ""))


def modules_to_save(config: dict[str, Any]) -> list[str]:
    """Return the entries of `modules_to_save`, and those that PEFT adds for classification."""
    heads = HEADS if config.get("task_type") in CLASSIFYING else ()
    return [*(config.get("modules_to_save") or []), *heads]


def copied_modules(names: Iterable[str], config: dict[str, Any]) -> set[str]:
    """Return the modules that PEFT copies: those whose names, as strings, end in an entry."""
    entries = tuple(modules_to_save(config))
    return {name for name in names if name.endswith(entries)}


def parameter_layers(model: nn.Module, entries: Collection[str] | None) -> dict[str, Place]:
    """Return the adapted parameters by the names of their layers in PEFT.

    Args:
        model: The base model, with or without an adapter.
        entries: The configuration's `target_parameters`.
    """
    by_module: dict[str, list[Place]] = {}
    for place in places_of(model, entries or []):
        by_module.setdefault(place[0], []).append(place)
    return {
        name + ".base_layer" * depth: place
        for name, places in by_module.items()
        for depth, place in enumerate(reversed(places))
    }


def _ends_in(name: str, last_names: tuple[str, ...]) -> bool:
    return name.rpartition(".")[2] in last_names


def _expert_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the layers that PEFT takes for parts of experts in a model."""
    model_type = _model_type(model)
    try:
        from transformers import conversion_mapping

        if conversion_mapping.get_checkpoint_conversion_mapping(model_type) is None:
            return ()
        families = conversion_mapping._MODEL_TO_CONVERSION_PATTERN
    except (ImportError, AttributeError):  # in another version of transformers
        return ()
    return EXPERTS.get("mixtral" if model_type == "mixtral" else families.get(model_type, ""), ())


# ------------------------------------------------------------------------------------- differences


def peft_differences(
    model: nn.Module, config: dict[str, Any], tensors: Collection[str]
) -> list[str]:
    """Return the ways in which PEFT would read an adapter differently, each with a remedy.

    Args:
        model: The base model, with or without the adapter; may be on the meta device.
        config: The configuration that is saved with the adapter.
        tensors: Names of the adapter's tensors, without PEFT's prefix.
    """
    if not PEFT_TYPES[config["peft_type"]].supported:
        return []
    reading, modules = peft_reading(model, config), base_modules(model)
    if reading.errors:
        without = "leave such modules out with `adapter.exclude_modules`"
        return [f"PEFT would reject this adapter: {e}; {without}" for e in set(reading.errors)]
    ours = adapted_modules(tensors)
    ours -= parameter_layers(model, config.get("target_parameters")).keys()
    messages = _lost_experts(reading, ours)
    if lost := sorted(ours - reading.adapted - reading.experts):
        messages.append(
            f"PEFT would not adapt {listed(lost)}: by its name, it would train it in full; "
            "leave it out with `adapter.exclude_modules`"
        )
    if more := sorted(reading.adapted - ours):
        messages.append(
            f"PEFT would adapt {listed(more)} too, whose name ends like another's; add it to "
            "`adapter.target_modules`"
        )
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    more = sorted(
        module
        for module in reading.copied
        if any(name not in tensors for name in parameters if name.startswith(f"{module}."))
    )
    if more:
        messages.append(
            f"PEFT would look for weights of {listed(more)} too, whose name ends like another's; "
            "add it to `adapter.train_modules`"
        )
    for name in sorted(ours):
        if difference := convolution_difference(modules[name], config):
            messages.append(
                f"the convolution `{name}` {difference}: leave such modules out with "
                "`adapter.exclude_modules`"
            )
            break
    return messages


def convolution_difference(module: nn.Module, config: dict[str, Any]) -> str:
    """Return how PEFT's update of a convolution differs from the base, or an empty string.

    PEFT applies the base's stride and padding to the update, but not its padding mode nor, for
    LoRA, its dilation.
    """
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return ""
    if module.padding_mode != "zeros":
        return f"pads with `{module.padding_mode}`, and PEFT's update of it with zeros"
    if config["peft_type"] == "LORA" and any(
        d > 1 and size > 1 for d, size in zip(module.dilation, module.kernel_size, strict=True)
    ):
        return f"has a dilation of {max(module.dilation)}, and PEFT's update of it has none"
    return ""


def _lost_experts(reading: PeftReading, ours: set[str]) -> list[str]:
    """Return a message about adapted modules that PEFT takes for parts of experts, if any."""
    lost = sorted(reading.experts & ours)
    if not lost:
        return []
    ends = sorted({name.rpartition(".")[2] for name in lost})
    names = sorted({".".join(name.split(".")[-2:]) for name in lost})
    return [
        f"PEFT would not adapt {listed(lost)}, {len(lost)} of {len(ours)} modules: in models of "
        f"this type it takes {_words(ends)} for parts of the experts; to use the adapter in PEFT, "
        f"train without them: `--set 'adapter.exclude_modules=[{', '.join(names)}]'`, or merge it"
    ]


def _words(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def listed(names: list[str]) -> str:
    """Return the first few names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return _words(names[:SHOWN]) + more


def full_names(names: Iterable[str], entries: Iterable[str]) -> list[str]:
    """Return the full names of the modules that entries match; only the outermost of nested ones.

    Full names are needed because PEFT matches any ending: `norm` would match `input_layernorm`.
    """
    names = list(names)
    chosen: list[str] = []
    for entry in entries:
        chosen += [entry] if entry in names else [n for n in names if matches([entry], n)]
    return [
        name
        for name in dict.fromkeys(chosen)
        if not any(name.startswith(f"{other}.") for other in chosen)
    ]
