"""The version of the formats of this tool's own files: recipe, cache, manifests, computation.json.

A file without `format` is of version 1, from before it was written down.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lora_cli.errors import LoraError

FORMAT = 1
NEWER = "it was written by a newer lora: upgrade, `pip install --upgrade lora-cli`"


def require_format(values: Mapping[str, Any], at: str, hint: str = NEWER) -> None:
    """Reject values of a format that this version does not know.

    Args:
        values: What was read.
        at: Where it was read.
        hint: What to do about it.

    Raises:
        LoraError: If their `format` is there and is not 1.
    """
    found = values.get("format", FORMAT)
    if found != FORMAT or type(found) is not int:  # `true` and 1.0 are equal to 1
        shown = json.dumps(found, ensure_ascii=False, default=str)[:60]
        raise LoraError(f"`format` is {shown}, and this lora reads {FORMAT}", at, hint)
