"""Tiny bases that embed texts, with the files that sentence-transformers keeps beside a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny

OLD = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken", "max": "max_tokens"}


def save(
    folder: Path,
    pooling: str = "mean",
    normalize: bool = True,
    prompts: dict[str, str] | None = None,
    decoder: bool = False,
    **config: Any,
) -> Path:
    """Save a tiny encoder, or a decoder, as an early sentence-transformers would have."""
    (tiny.save_llama if decoder else tiny.save_encoder)(folder)
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "",
         "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]  # fmt: skip
    write(folder / "modules.json", modules)
    (folder / "1_Pooling").mkdir()
    modes = {f"pooling_mode_{OLD[kind]}": kind == pooling for kind in OLD}
    write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 32, **modes, **config})
    if prompts is not None:
        write(folder / "config_sentence_transformers.json", {"prompts": prompts})
    return folder


def write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value), encoding="utf-8")
