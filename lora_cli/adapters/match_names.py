"""Match module names with entries of a recipe: suffixes, regular expressions, layer numbers."""

from __future__ import annotations

import regex

from lora_cli.errors import LoraError
from lora_cli.patterns import regex_error

MAX_DIGITS = 15  # of a layer's number; no model has so many layers
TIME_LIMIT_S = 0.5  # for one expression and one name; most take a millionth of that


def layer_index(name: str) -> int | None:
    """Return the number of the layer that a module belongs to: 3 in `encoder.layer.3.output`."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def parse_layers(layers: str | list[int]) -> range | frozenset[int]:
    """Return the layer numbers of `0-5`, `7`, or a list."""
    if not isinstance(layers, str):
        return frozenset(layers)
    first, _, last = (number[:MAX_DIGITS] for number in layers.partition("-"))
    return range(int(first), int(last or first) + 1)


def matches(pattern: str | list[str], name: str) -> bool:
    """Return whether a name matches a regular expression or ends in one of several suffixes.

    An invalid expression matches nothing; `resolve_targets` reports it.

    Raises:
        LoraError: If matching takes too long, as with an expression of a malicious adapter.
    """
    if isinstance(pattern, str):
        return regex_error(pattern) is None and _fits(pattern, name)
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in pattern)


def _fits(expression: str, name: str, written: str | None = None) -> bool:
    """Return whether an expression matches the full name, using `regex` for its time limit.

    Raises:
        LoraError: If that takes longer than `TIME_LIMIT_S`.
    """
    try:
        return regex.fullmatch(expression, name, timeout=TIME_LIMIT_S) is not None
    except TimeoutError:
        raise LoraError(
            f"`{written or expression}` takes too long to match",
            f"module {name}",
            "an expression without a repetition inside a repetition; names need none: "
            "`[query, value]`",
        ) from None


def inside(name: str, top: str) -> bool:
    """Return whether module `name` is `top` or lies beneath it."""
    return name == top or name.startswith(f"{top}.") or f".{top}." in f".{name}."


def pattern_matches(pattern: str, name: str) -> bool:
    """Return whether an entry of `rank_pattern` or `alpha_pattern` matches a name."""
    anchored = rf"(.*\.)?({pattern})$"  # PEFT's rule for its patterns
    return not regex_error(pattern) and not regex_error(anchored) and _fits(anchored, name, pattern)


def first_match(patterns: dict[str, int] | dict[str, float], name: str, default: float) -> float:
    """Return the value of the first pattern that matches a name, or the default."""
    return next((v for pattern, v in patterns.items() if pattern_matches(pattern, name)), default)
