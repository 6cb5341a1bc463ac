"""Writes how a model turns its positions under the names that other readers look for.

transformers 5 saves `rope_parameters` in config.json. transformers 4, mlx-lm and others read
`rope_theta` and `rope_scaling`, as most published models have them, and without these they compute
with values of their own, without a word. So a saved model has both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_cli.files import write_json


def add_older_names(folder: Path, base: dict[str, Any]) -> None:
    """Add the older names to config.json of a folder that `save_pretrained` wrote.

    Args:
        folder: The saved model.
        base: What config.json of its base model says, whose names are kept; may be empty.
    """
    file = folder / "config.json"
    if file.exists():  # a model of several parts has none
        write_json(file, _with_older_names(json.loads(file.read_text(encoding="utf-8")), base))


def _with_older_names(saved: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    result = dict(saved)
    for name, value in base.items():
        if isinstance(value, dict) and isinstance(saved.get(name), dict):
            result[name] = _with_older_names(saved[name], value)
        elif name not in saved and ("rope" in name or "rotary" in name):
            result[name] = value
    if "torch_dtype" in base and "dtype" in saved:
        result["torch_dtype"] = saved["dtype"]
    rope = saved.get("rope_parameters") or {}
    if "rope_theta" in rope:  # else each kind of layer has its own, which older names do not say
        result.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
            result["rope_scaling"] = result.get("rope_scaling") or scaling
    return result
