"""Copy the tokenizer or processor of an adapter to an exported adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from lora_cli.files import MANIFEST

# files that are written anew, or that describe a training run
NOT_COPIED = {
    "adapter_config.json", "adapter_model.safetensors", "base.json", "computation.json",
    "recipe.yaml", "README.md", "probe.json", "combine.json",
}  # fmt: skip
# files of tokenizers and processors, for folders without a manifest
PROCESSOR_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.*",
    "merges.txt", "spiece.model", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip


def copy_processor(source: Path, target: Path) -> None:
    """Copy the tokenizer or processor from one folder into another."""
    if (source / MANIFEST).is_file():
        listed = json.loads((source / MANIFEST).read_text(encoding="utf-8"))["files"]
        files = [source / name for name in listed if name not in NOT_COPIED and "/" not in name]
    else:
        files = [file for pattern in PROCESSOR_FILES for file in sorted(source.glob(pattern))]
    for file in files:
        if file.is_file():
            shutil.copyfile(file, target / file.name)
