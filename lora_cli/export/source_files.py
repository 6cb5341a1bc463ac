"""Files that an exported adapter takes over from the folder that it was made from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from lora_cli.files import MANIFEST

# what is written anew, or is of one training alone
OWN = {
    "adapter_config.json", "adapter_model.safetensors", "base.json", "computation.json",
    "recipe.yaml", "README.md", "probe.json", "combine.json",
}  # fmt: skip
# of folders without a manifest: what transformers writes for a tokenizer or another processor
PROCESSOR = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.*",
    "merges.txt", "spiece.model", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip


def copy_processor(source: Path, target: Path) -> None:
    """Copy the tokenizer, or what else turns rows into inputs, from one folder into another."""
    if (source / MANIFEST).is_file():
        listed = json.loads((source / MANIFEST).read_text(encoding="utf-8"))["files"]
        files = [source / name for name in listed if name not in OWN and "/" not in name]
    else:
        files = [file for pattern in PROCESSOR for file in sorted(source.glob(pattern))]
    for file in files:
        if file.is_file():
            shutil.copyfile(file, target / file.name)
