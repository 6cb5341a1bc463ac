"""mlx-lm: `adapters.safetensors` with transposed matrices, and a configuration of its own.

Its scale is the factor of B A itself, not alpha. Modules are listed by their full names, so that
mlx-lm adapts no others.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from safetensors.torch import load_file, save_file

from lora_cli.errors import Problem
from lora_cli.export.low_rank_pairs import with_equal_ranks
from lora_cli.export.reader import (
    MERGE,
    Source,
    needs_plain_lora,
    require_same_outputs,
    scale_changes,
)
from lora_cli.export.source_files import copy_processor
from lora_cli.files import umask_mode, write_json
from lora_cli.models.base_model import config_as_written

MLX_FILE, MLX_CONFIG = "adapters.safetensors", "adapter_config.json"
# models whose modules have the same names in mlx-lm and transformers
MODEL_TYPES = ("gemma2", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
# mlx-lm's defaults if config.json has no top-level `rope_theta`; qwen3 reads it from either place
ROPE_THETA = {**dict.fromkeys(MODEL_TYPES, 10_000.0), "qwen2": 1_000_000.0}


class Mlx:
    """mlx-lm, on Apple computers."""

    def problems(self, source: Source) -> list[Problem]:
        """Reject adapters that are not plain LoRA, and models with other module names in mlx-lm."""
        at, problems = str(source.saved.path), needs_plain_lora(source, "mlx-lm")
        if source.saved.parts:  # each part has its own model type
            return problems
        kind = source.task.config.model_type
        if kind not in MODEL_TYPES:
            what = f"adapters of `{kind}` models cannot be exported for mlx-lm"
            return [Problem(what, at, MERGE), *problems]
        if source.parts is not None and source.is_tied:
            for name, pair in source.parts.pairs.items():
                if pair.is_embedding or name.endswith("lm_head"):
                    what = f"mlx-lm adapts `{name}` and the other end of the model as one"
                    problems.append(Problem(what, at, MERGE))
        return problems

    def changes(self, source: Source) -> list[str]:
        """Return what is folded, and which settings of the base mlx-lm would not find."""
        return [*scale_changes(source), *_unread_rope_settings(source)]

    def write(self, source: Source, folder: Path) -> None:
        """Write the two files, and the tokenizer."""
        pairs, tensors = with_equal_ranks(source.lora.pairs), {}
        for name, pair in pairs.items():
            tensors[f"{name}.lora_a"] = pair.a.T.contiguous()
            tensors[f"{name}.lora_b"] = pair.b.T.contiguous()
        save_file(tensors, folder / MLX_FILE, metadata={"format": "mlx"})
        umask_mode(folder / MLX_FILE)
        rank = next(iter(pairs.values())).rank
        parameters = {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(pairs)}
        layers = source.task.config.num_hidden_layers
        config = {"fine_tune_type": "lora", "num_layers": layers, "lora_parameters": parameters}
        write_json(folder / MLX_CONFIG, {"model": source.base_name, **config})
        copy_processor(source.saved.path, folder)

    def check(self, source: Source, folder: Path) -> list[str]:
        """Apply the file by mlx-lm's rule, y + scale * (x A) B, and compare the outputs."""
        config = json.loads((folder / MLX_CONFIG).read_text(encoding="utf-8"))["lora_parameters"]
        tensors = load_file(folder / MLX_FILE)
        updates = {
            name: config["scale"] * (tensors[f"{name}.lora_a"] @ tensors[f"{name}.lora_b"]).T
            for name in config["keys"]
        }
        difference = require_same_outputs(source, updates, "mlx-lm")
        return [f"read by mlx-lm's rule: outputs differ by {difference:.1e}"]

    def usage(self, source: Source, to: Path) -> str:
        """Return the command that runs it."""
        return (
            "With mlx-lm:\n\n```bash\n"
            f"mlx_lm.generate --model {shlex.quote(source.base_name)} --adapter-path . "
            "--prompt 'some text'\n```"
        )


def _unread_rope_settings(source: Source) -> list[str]:
    """Return notes on settings of the base's rotary embeddings that mlx-lm does not read.

    transformers 5 writes them inside `rope_parameters`; mlx-lm reads `rope_theta` and
    `rope_scaling`, as older versions wrote them, and otherwise uses its own defaults.
    """
    config, lines = source.task.config, []
    rope = getattr(config, "rope_parameters", None) or {}
    if config.model_type == "qwen3" or not rope:
        return []
    written = config_as_written(source.task.recipe)
    theta, default = rope.get("rope_theta"), ROPE_THETA[config.model_type]
    if "rope_theta" not in written and theta not in (None, default):
        lines.append(
            f"mlx-lm computes positions with {default:g} where this base has {theta:g}: write "
            f'`"rope_theta": {theta:g}` into its config.json, by itself'
        )
    kind = rope.get("rope_type", "default")
    if kind != "default" and not written.get("rope_scaling"):
        lines.append(
            f"mlx-lm does not see that this base scales its positions (`{kind}`): write what "
            "`rope_parameters` holds as `rope_scaling` into its config.json too"
        )
    return lines
