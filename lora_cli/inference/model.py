"""What is known of the base model without loading it: its family, its size, its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli.errors import LoraError

SAMPLE = 2000  # rows whose length is measured


@dataclass(frozen=True)
class Base:
    """A base model, as far as it is at hand (a folder, a package, or the Hub's cache).

    Args:
        name: As the recipe names it.
        tokenizer: Its tokenizer, or None.
        can_write: It continues texts; True where that is not known.
        positions: Tokens that it can take, if that is known.
        hidden_size: Width of its layers, if that is known.
    """

    name: str
    tokenizer: Any = None
    can_write: bool = True
    positions: int | None = None
    hidden_size: int | None = None

    @property
    def lacks_template(self) -> bool:
        """Whether the tokenizer is known to have no chat template."""
        return self.tokenizer is not None and not getattr(self.tokenizer, "chat_template", None)

    def tokens(self, texts: Sequence[Sequence[str]]) -> list[int]:
        """Return the length of each row's texts in tokens, the special ones included."""
        total = [0] * len(texts)
        for column in zip(*texts, strict=True):
            encoded = self.tokenizer(list(column), verbose=False)["input_ids"]
            total = [a + len(ids) for a, ids in zip(total, encoded, strict=True)]
        return total


def look_at(name: str) -> Base:
    """Return what is known of a model; nothing is downloaded.

    Raises:
        LoraError: If the name is that of a folder or a package which is not there.
    """
    from transformers import AutoConfig, AutoTokenizer
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    from lora_cli.models import locate

    folder = Path(name).expanduser()
    local = folder.is_dir() or name.startswith((".", "/", "~"))
    source = locate(str(folder.absolute()) if local else name, "--model")
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError) as error:
        if local or name.startswith("package:"):
            what = str(error).strip().splitlines()[0]
            hint = "is the folder whole? Copy or download it again"
            raise LoraError(f"cannot read the model: {what}", "--model", hint) from error
        return Base(name)
    kind = config.model_type
    writes = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    encodes = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES or "ernie" in kind
    text_config = config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None) or None
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
        limit = min(limit or 1 << 30, int(tokenizer.model_max_length))
    except (OSError, ValueError):
        tokenizer = None
    return Base(
        name,
        tokenizer,
        writes and not encodes,
        None if limit == 1 << 30 else limit,
        getattr(text_config, "hidden_size", None),
    )
