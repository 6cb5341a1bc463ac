"""Readers of PEFT's format: PEFT itself, vLLM, and programs that support only a part of it."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lora_cli.adapters.peft_format.adapter_folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    differences_in_peft,
    weight_files,
    write_adapter_files,
)
from lora_cli.adapters.peft_format.peft_types import PEFT_TYPES
from lora_cli.adapters.peft_format.tensor_names import PREFIX
from lora_cli.environment import installed_version
from lora_cli.errors import LoraError, Problem, counted
from lora_cli.export.low_rank_pairs import (
    Pair,
    peft_tensors_of,
    plain_config,
    with_equal_ranks,
)
from lora_cli.export.reader import (
    MERGE,
    Source,
    needs_plain_lora,
    require_close,
    require_same_outputs,
    scale_changes,
)
from lora_cli.export.source_files import copy_processor
from lora_cli.tensorfile import read_header

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # allowed values of `--max-lora-rank`


class Peft:
    """PEFT: the two files unchanged."""

    def problems(self, source: Source) -> list[Problem]:
        """Reject types that PEFT does not have."""
        if PEFT_TYPES[source.saved.config["peft_type"]].supported:
            return []
        what = f"PEFT has no adapters of type `{source.saved.type}`"
        return [Problem(what, str(source.saved.path), MERGE)]

    def changes(self, source: Source) -> list[str]:
        """Return nothing: PEFT reads everything."""
        return []

    def write(self, source: Source, folder: Path) -> None:
        """Copy the adapter's two files and the tokenizer, without files only for this tool."""
        if source.saved.path.is_file():  # another tool's file
            tensors = {PREFIX + name: tensor for name, tensor in source.saved.tensors.items()}
            config = {**source.saved.config, "base_model_name_or_path": source.base_name}
            write_adapter_files(folder, config, tensors, source.saved.parts)
            return
        for part in source.saved.parts or ("",):
            (folder / part).mkdir(exist_ok=True)
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                shutil.copyfile(source.saved.path / part / name, folder / part / name)
        copy_processor(source.saved.path, folder)

    def check(self, source: Source, folder: Path) -> list[str]:
        """Load the folder in PEFT, and compare the outputs."""
        return [in_peft(source, folder, for_peft=True)]

    def usage(self, source: Source, to: Path) -> str:
        """Return nothing: the card already shows code for PEFT."""
        return ""


class Vllm:
    """vLLM: only low-rank matrices, all with the same rank and scale."""

    def problems(self, source: Source) -> list[Problem]:
        """Reject heads, biases, DoRA, convolutions, tasks without generation, and large ranks."""
        problems = needs_plain_lora(source, "vLLM")
        task_type, at = source.saved.config.get("task_type"), str(source.saved.path)
        config = getattr(source.task, "config", None)  # None for a base with several parts
        kind = str(getattr(config, "model_type", ""))
        # some speech models have no task type in PEFT
        is_of_language = task_type == "CAUSAL_LM" or kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if config is not None and (task_type not in (None, "CAUSAL_LM") or not is_of_language):
            use = task_type or kind
            what = f"vLLM loads adapters of language models, and this one is for `{use}`"
            problems.append(Problem(what, at, MERGE))
        if source.parts is not None and not problems:
            rank = max(pair.rank for pair in source.parts.pairs.values())
            if rank > VLLM_RANKS[-1]:
                what = f"the rank is {rank}, and vLLM takes {VLLM_RANKS[-1]} at the most"
                problems.append(Problem(what, at, MERGE))
        return problems

    def changes(self, source: Source) -> list[str]:
        """Return what is folded, and the rank with which vLLM has to be started."""
        lines = scale_changes(source)
        needed = _vllm_rank(source)
        if needed > 16:
            lines.append(f"vLLM takes ranks up to 16 unless started with --max-lora-rank {needed}")
        if any(pair.is_embedding for pair in source.lora.pairs.values()):
            lines.append("vLLM adapts embeddings of some models only, and says so when it loads")
        return lines

    def write(self, source: Source, folder: Path) -> None:
        """Write PEFT's two files, and the tokenizer."""
        write_plain(source, with_equal_ranks(source.lora.pairs), folder)

    def check(self, source: Source, folder: Path) -> list[str]:
        """Read the matrices with one scale for all, like vLLM; then load them in PEFT."""
        return check_plain(source, folder, "vLLM")

    def usage(self, source: Source, to: Path) -> str:
        """Return the command that serves it."""
        options = f"--enable-lora --max-lora-rank {_vllm_rank(source)}"
        return (
            "With vLLM, whose name for the adapter is then `adapter`:\n\n```bash\n"
            f"vllm serve {shlex.quote(source.base_name)} {options} --lora-modules adapter=.\n```"
        )


class Plain:
    """Readers that scale all modules by alpha / rank and ignore patterns."""

    def problems(self, source: Source) -> list[Problem]:
        """Reject adapters that plain LoRA cannot express."""
        problems = needs_plain_lora(source, "a plain reader", takes_parts=True)
        accepted = ("in full", "convolutions")
        return [p for p in problems if not any(words in p.what for words in accepted)]

    def changes(self, source: Source) -> list[str]:
        """Return what is folded and added, and what most servers would ignore."""
        lines = scale_changes(source)
        if missing := _zero_updates(source):
            lines.append(
                f"{_types(missing)} is adapted in some layers only; the others get zeros, since "
                "TGI and LoRAX leave out a type of module that a layer lacks"
            )
        if source.lora.in_full:
            lines.append(
                "modules trained in full are kept for PEFT; vLLM, SGLang, TGI and LoRAX do not "
                "read them"
            )
        return lines

    def write(self, source: Source, folder: Path) -> None:
        """Write PEFT's two files, and the tokenizer."""
        write_plain(source, with_equal_ranks(source.lora.pairs | _zero_updates(source)), folder)

    def check(self, source: Source, folder: Path) -> list[str]:
        """Read the matrices with one scale for all; then load them in PEFT."""
        if source.lora.in_full:
            return [in_peft(source, folder)]
        return check_plain(source, folder, "a plain reader")

    def usage(self, source: Source, to: Path) -> str:
        """Return nothing: usage differs between readers."""
        return ""


def write_plain(source: Source, pairs: dict[str, Pair], folder: Path) -> None:
    """Write pairs of one rank in PEFT's format, and the tokenizer."""
    in_full = source.saved.config.get("modules_to_save")
    config = plain_config(source.saved.config, pairs, in_full)
    tensors = peft_tensors_of(pairs, source.lora.in_full)
    write_adapter_files(folder, config, tensors, source.saved.parts)
    copy_processor(source.saved.path, folder)


def check_plain(source: Source, folder: Path, reader: str) -> list[str]:
    """Read a folder with one scale for all matrices, and with PEFT if it is installed."""
    updates = {}
    for part in source.saved.parts or ("",):
        config = json.loads((folder / part / CONFIG_FILE).read_text(encoding="utf-8"))
        scale, prefix = config["lora_alpha"] / config["r"], f"{part}." if part else ""
        with safe_open(folder / part / WEIGHTS_FILE, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is not a dictionary
                if match := re.fullmatch(rf"{PREFIX}(.+)\.lora_(embedding_)?A(\.weight)?", name):
                    a, b = file.get_tensor(name), file.get_tensor(_name_of_b(name))
                    updates[prefix + match[1]] = scale * (b.flatten(1) @ a.flatten(1))
    difference = require_same_outputs(source, updates, reader)
    line = f"read with one scale, as {reader} does: outputs differ by {difference:.1e}"
    return [line, in_peft(source, folder)]


def in_peft(source: Source, folder: Path, for_peft: bool = False) -> str:
    """Load a folder in PEFT and compare the outputs; return the result as a line.

    Args:
        source: The exported adapter.
        folder: The folder that was written.
        for_peft: Whether the export is for PEFT, which then has to read it correctly; otherwise
            known differences are only mentioned in the line.

    Raises:
        LoraError: If PEFT reads it differently for known reasons, with all reasons.
        IntegrityError: If the outputs differ for unknown reasons.
    """
    if importlib.util.find_spec("peft") is None:
        count = sum(len(read_header(folder / name)) for name in weight_files(folder))
        written = counted(count, "tensor")
        return f"PEFT is not installed, so it was not loaded there ({written} written)"
    reasons = differences_in_peft(source.base, source.task.recipe, [], folder)
    try:
        difference = require_close(_outputs_in_peft(source, folder), source.outputs, "PEFT")
    except Exception as error:
        if not reasons:
            raise
        if for_peft:
            at = str(source.saved.path)
            raise LoraError([Problem(reason, at, MERGE) for reason in reasons]) from error
        return f"not compared with PEFT: {'; '.join(reasons)}"
    return f"loaded in PEFT {installed_version('peft')}: outputs differ by {difference:.1e}"


def _outputs_in_peft(source: Source, folder: Path) -> Tensor:
    """Return the outputs on the task's probe with the adapter loaded in PEFT."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # PEFT warns about its own behaviour
        from peft import PeftModel

        base, parts = source.base, source.saved.parts
        models: list[Any] = [  # for a part, PEFT adds its layers to the base in place
            PeftModel.from_pretrained(base.get_submodule(part), str(folder / part)).eval()
            for part in parts or ("",)
        ]
        try:
            adapted = base if parts else models[0]
            outputs: Tensor = source.task.probed(adapted, source.task.probe())
        finally:
            if source.saved.config["peft_type"] == "LORA":
                for model in models:  # PEFT cannot unload the heads of other types
                    model.unload()
    return outputs


def _name_of_b(name: str) -> str:
    return re.sub(r"\.lora_(embedding_)?A(?=\.weight$|$)", r".lora_\1B", name)


def _vllm_rank(source: Source) -> int:
    rank = max(pair.rank for pair in source.lora.pairs.values())
    return next(allowed for allowed in VLLM_RANKS if allowed >= rank)


def _zero_updates(source: Source) -> dict[str, Pair]:
    """Return zero updates for modules of the same type as adapted modules in other layers."""
    pairs = source.lora.pairs
    adapted = {_type_of(name): name for name in pairs}
    zero_pairs = {}
    for name, module in source.base.named_modules():
        other = adapted.get(_type_of(name))
        if other is None or name in pairs:
            continue
        weight = getattr(module, "weight", None)  # e.g. the dropout `to_out.1` next to `to_out.0`
        adapted_weight = source.base.get_submodule(other).weight
        assert isinstance(adapted_weight, Tensor)
        if isinstance(weight, Tensor) and weight.shape == adapted_weight.shape:
            template = pairs[other]
            zeros = (template.a.new_zeros(template.a.shape), template.b.new_zeros(template.b.shape))
            zero_pairs[name] = Pair(*zeros, 1.0, template.is_embedding)
    return zero_pairs


def _type_of(name: str) -> str:
    """Return a module's name with layer numbers replaced by `*`."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _types(pairs: dict[str, Pair]) -> str:
    names = sorted({name.rpartition(".")[2] for name in pairs})
    return ", ".join(f"`{name}`" for name in names)
