"""Add the older names of rotary embedding settings to a saved config.json.

transformers 5 saves `rope_parameters`. transformers 4, mlx-lm and others read `rope_theta` and
`rope_scaling`, as in most published models, and silently use default values if these are missing.
So a saved model has both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_cli.files import write_json


def add_older_names(folder: Path, base: dict[str, Any]) -> None:
    """Add the older names to the config.json of a folder that `save_pretrained` wrote.

    Args:
        folder: The folder of the saved model.
        base: The config.json of its base model, whose names are kept; may be empty.
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
    if "rope_theta" in rope:  # otherwise kinds of layers differ, which has no older name
        result.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
            result["rope_scaling"] = result.get("rope_scaling") or scaling
    return result
