"""Parse PEFT's names of the tensors that an adapter adds: `<module>.<kind>_<parameter>`."""

from __future__ import annotations

import re
from collections.abc import Iterable

KINDS = r"(?:lora|hada|lokr)"
ADDED = re.compile(rf"(.+)\.({KINDS}_\w+?)(?:\.default)?(?:\.weight)?")
"""Groups: the module, and the parameter. Older versions of PEFT and raw state dicts add the
adapter's name: `lora_A.default.weight`."""


PREFIX = "base_model.model."
WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def without_prefix(name: str) -> str:
    """Return a tensor's name without PEFT's prefix, and without the names of torch's wrappers."""
    name = WRAPPERS.sub("", name)
    while name.startswith((PREFIX, f"module.{PREFIX}")):
        name = name.removeprefix("module.").removeprefix(PREFIX)
    return name


def adapted_module(name: str) -> str | None:
    """Return the module that a tensor adapts; None if the tensor is a full parameter."""
    match = re.search(rf"\.{KINDS}_", name)
    return name[: match.start()] if match else None


def adapted_modules(names: Iterable[str]) -> set[str]:
    """Return the modules that the tensors adapt."""
    return {module for name in names if (module := adapted_module(name)) is not None}
