"""llama.cpp: one GGUF file of low-rank matrices.

The names of the tensors are llama.cpp's, from the tables of its own `gguf` package. There is one
alpha for all modules, and the program scales by alpha / rank, so scales are folded into B. If its
models store the rows of query and key in a different order (Llama family), B is reordered too.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_cli.errors import LoraError, Problem, counted
from lora_cli.export.low_rank_pairs import with_equal_ranks
from lora_cli.export.reader import (
    Source,
    needs_plain_lora,
    require_same_outputs,
    scale_changes,
)
from lora_cli.files import umask_mode
from lora_cli.reporting.report import short_name

GGUF_FILE = "adapter.gguf"
# by `model_type`: llama.cpp's architecture, and whether it reorders the rows of query and key
ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "gemma2": ("gemma2", False),
    "phi3": ("phi3", False),
}
MERGE_FIRST = (
    "merge it into its base with `lora merge`, then use llama.cpp's `convert_hf_to_gguf.py`"
)


class LlamaCpp:
    """llama.cpp, and programs built on it."""

    def problems(self, source: Source) -> list[Problem]:
        """Reject adapters that are not plain LoRA, and unknown architectures."""
        at = str(source.saved.path)
        problems = [
            Problem(problem.what, problem.at, MERGE_FIRST)
            for problem in needs_plain_lora(source, "llama.cpp")
        ]
        if source.saved.parts:  # each part has its own model type
            return problems
        kind = source.task.config.model_type
        if kind not in ARCHITECTURES:
            what = f"adapters of `{kind}` models cannot be exported for llama.cpp"
            return [Problem(what, at, MERGE_FIRST), *problems]
        if problems:
            return problems
        for name, pair in source.lora.pairs.items():
            if source.is_tied and (pair.is_embedding or name.endswith("lm_head")):
                what = f"llama.cpp keeps one weight for `{name}` and the other end of the model"
                return [Problem(what, at, MERGE_FIRST)]
        if importlib.util.find_spec("gguf") is None:
            raise LoraError(
                "writing GGUF files needs the Python package `gguf`",
                "--for gguf",
                "install it: `pip install gguf`",
            )
        names = _Names(source)
        return [
            Problem(f"llama.cpp has no tensor for `{name}`", at, MERGE_FIRST)
            for name in source.lora.pairs
            if names.of(name) is None
        ]

    def changes(self, source: Source) -> list[str]:
        """Describe how scales and ranks are unified."""
        return scale_changes(source)

    def write(self, source: Source, folder: Path) -> None:
        """Write `adapter.gguf`."""
        import gguf

        names, pairs = _Names(source), with_equal_ranks(source.lora.pairs)
        writer = gguf.GGUFWriter(folder / GGUF_FILE, names.architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(_rank_of(pairs)))
        # local paths are private
        writer.add_name(f"{source.saved.path.name} for {short_name(source.base_name)}")
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        for name, pair in pairs.items():
            # an embedding looks up rows of A, so they are stored contiguously
            a = pair.a.T if pair.is_embedding else pair.a
            b = names.reordered(name, pair.b)
            writer.add_tensor(f"{names.of(name)}.lora_a", a.contiguous().numpy())
            writer.add_tensor(f"{names.of(name)}.lora_b", b.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        umask_mode(folder / GGUF_FILE)

    def check(self, source: Source, folder: Path) -> list[str]:
        """Read the file with llama.cpp's own package, and compare the outputs."""
        import gguf

        reader, names = gguf.GGUFReader(folder / GGUF_FILE), _Names(source)
        alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
        tensors = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
        updates = {}
        for name, pair in source.lora.pairs.items():
            a = tensors.pop(f"{names.of(name)}.lora_a")
            b = tensors.pop(f"{names.of(name)}.lora_b")
            a = a.T if pair.is_embedding else a
            updates[name] = alpha / b.shape[1] * names.in_order(name, b) @ a
        assert not tensors, "the file holds what the adapter does not"
        difference = require_same_outputs(source, updates, "llama.cpp")
        return [
            f"read by gguf's reader ({counted(len(reader.tensors), 'tensor')}, "
            f"architecture {names.architecture}): outputs differ by {difference:.1e}"
        ]

    def usage(self, source: Source, to: Path) -> str:
        """Return the command that runs it."""
        return (
            "With llama.cpp, whose `convert_hf_to_gguf.py` makes a GGUF file of the base's folder:"
            f"\n\n```bash\npython convert_hf_to_gguf.py {shlex.quote(source.base_name)} "
            f"--outfile base.gguf\nllama-cli -m base.gguf --lora {GGUF_FILE} -p 'some text'\n```"
        )


class _Names:
    """llama.cpp's tensor names and row orders for the modules of a base."""

    def __init__(self, source: Source) -> None:
        import gguf

        config: Any = source.task.config
        self.architecture, self.reorders = ARCHITECTURES[config.model_type]
        numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        self.heads = config.num_attention_heads
        self.key_heads = getattr(config, "num_key_value_heads", None) or self.heads
        self._table = gguf.get_tensor_name_map(numbers[self.architecture], config.num_hidden_layers)

    def of(self, module: str) -> str | None:
        """Return the name of a module's weight, or None if llama.cpp has no such tensor."""
        name = self._table.get_name(f"{module}.weight", try_suffixes=(".weight",))
        return None if name is None else str(name)

    def reordered(self, module: str, b: Tensor) -> Tensor:
        """Return B with its rows in llama.cpp's order, which interleaves each head's halves."""
        heads = self._reordered_heads(module)
        if heads is None:
            return b
        return b.reshape(heads, 2, -1, b.shape[1]).swapaxes(1, 2).reshape(b.shape)

    def in_order(self, module: str, b: Tensor) -> Tensor:
        """Return B with its rows in transformers' order."""
        heads = self._reordered_heads(module)
        if heads is None:
            return b
        return b.reshape(heads, -1, 2, b.shape[1]).swapaxes(1, 2).reshape(b.shape)

    def _reordered_heads(self, module: str) -> int | None:
        if not self.reorders or (match := re.search(r"\b(q|k)_proj$", module)) is None:
            return None
        return int(self.heads if match[1] == "q" else self.key_heads)


def _rank_of(pairs: dict[str, Any]) -> int:
    return int(next(iter(pairs.values())).rank)
