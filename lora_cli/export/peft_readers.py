"""Readers of PEFT's format: PEFT itself, vLLM, and those that know less of it."""

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
    of_one_rank,
    peft_tensors_of,
    plain_config,
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

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what `--max-lora-rank` takes


class Peft:
    """PEFT: the two files as they are."""

    def problems(self, source: Source) -> list[Problem]:
        """Reject what PEFT has no type for."""
        if PEFT_TYPES[source.saved.config["peft_type"]].supported:
            return []
        what = f"PEFT has no adapters of type `{source.saved.type}`"
        return [Problem(what, str(source.saved.path), MERGE)]

    def changes(self, source: Source) -> list[str]:
        """Return nothing: PEFT reads all of it."""
        return []

    def write(self, source: Source, folder: Path) -> None:
        """Copy the adapter's two files and the tokenizer, without what this tool alone reads."""
        if source.saved.path.is_file():  # of another tool
            named = {PREFIX + name: tensor for name, tensor in source.saved.tensors.items()}
            config = {**source.saved.config, "base_model_name_or_path": source.base_name}
            write_adapter_files(folder, config, named, source.saved.parts)
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
        """Return nothing: the card has its own code for PEFT."""
        return ""


class Vllm:
    """vLLM: low-rank matrices alone, of one rank and one scale."""

    def problems(self, source: Source) -> list[Problem]:
        """Reject heads, biases, DoRA, convolutions, tasks without generation, and large ranks."""
        problems = needs_plain_lora(source, "vLLM")
        task_type, at = source.saved.config.get("task_type"), str(source.saved.path)
        config = getattr(source.task, "config", None)  # a base of several parts has none
        kind = str(getattr(config, "model_type", ""))
        # some models of speech have no type of task in PEFT
        is_of_language = task_type == "CAUSAL_LM" or kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if config is not None and (task_type not in (None, "CAUSAL_LM") or not is_of_language):
            found = task_type or kind
            what = f"vLLM loads adapters of language models, and this one is for `{found}`"
            problems.append(Problem(what, at, MERGE))
        if source.parts is not None and not problems:
            rank = max(pair.rank for pair in source.parts.pairs.values())
            if rank > VLLM_RANKS[-1]:
                what = f"the rank is {rank}, and vLLM takes {VLLM_RANKS[-1]} at the most"
                problems.append(Problem(what, at, MERGE))
        return problems

    def changes(self, source: Source) -> list[str]:
        """Return what is folded, and the rank that vLLM has to be started with."""
        lines = scale_changes(source)
        needed = _vllm_rank(source)
        if needed > 16:
            lines.append(f"vLLM takes ranks up to 16 unless started with --max-lora-rank {needed}")
        if any(pair.is_embedding for pair in source.lora.pairs.values()):
            lines.append("vLLM adapts embeddings of some models only, and says so when it loads")
        return lines

    def write(self, source: Source, folder: Path) -> None:
        """Write PEFT's two files, and the tokenizer."""
        write_plain(source, of_one_rank(source.lora.pairs), folder)

    def check(self, source: Source, folder: Path) -> list[str]:
        """Read the matrices with one scale for all, as vLLM does; then load them in PEFT."""
        return check_plain(source, folder, "vLLM")

    def usage(self, source: Source, to: Path) -> str:
        """Return the command that serves it."""
        options = f"--enable-lora --max-lora-rank {_vllm_rank(source)}"
        return (
            "With vLLM, whose name for the adapter is then `adapter`:\n\n```bash\n"
            f"vllm serve {shlex.quote(source.base_name)} {options} --lora-modules adapter=.\n```"
        )


class Plain:
    """Readers that take alpha / rank of `adapter_config.json` as the one scale, and no patterns."""

    def problems(self, source: Source) -> list[Problem]:
        """Reject what has no place in plain LoRA."""
        found = needs_plain_lora(source, "a plain reader", takes_parts=True)
        taken = ("in full", "convolutions")
        return [p for p in found if not any(words in p.what for words in taken)]

    def changes(self, source: Source) -> list[str]:
        """Return what is folded and added, and what most servers would not read."""
        lines = scale_changes(source)
        if missing := _missing(source):
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
        write_plain(source, of_one_rank(source.lora.pairs | _missing(source)), folder)

    def check(self, source: Source, folder: Path) -> list[str]:
        """Read the matrices with one scale for all; then load them in PEFT."""
        if source.lora.in_full:
            return [in_peft(source, folder)]
        return check_plain(source, folder, "a plain reader")

    def usage(self, source: Source, to: Path) -> str:
        """Return nothing: readers differ."""
        return ""


def write_plain(source: Source, pairs: dict[str, Pair], folder: Path) -> None:
    """Write pairs of one rank in PEFT's format, and the tokenizer."""
    in_full = source.saved.config.get("modules_to_save")
    config = plain_config(source.saved.config, pairs, in_full)
    tensors = peft_tensors_of(pairs, source.lora.in_full)
    write_adapter_files(folder, config, tensors, source.saved.parts)
    copy_processor(source.saved.path, folder)


def check_plain(source: Source, folder: Path, reader: str) -> list[str]:
    """Read a folder as programs do that know the matrices and one scale, and PEFT where it is."""
    updates = {}
    for part in source.saved.parts or ("",):
        config = json.loads((folder / part / CONFIG_FILE).read_text(encoding="utf-8"))
        scale, before = config["lora_alpha"] / config["r"], f"{part}." if part else ""
        with safe_open(folder / part / WEIGHTS_FILE, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dictionary
                if found := re.fullmatch(rf"{PREFIX}(.+)\.lora_(embedding_)?A(\.weight)?", name):
                    a, b = file.get_tensor(name), file.get_tensor(_name_of_b(name))
                    updates[before + found[1]] = scale * (b.flatten(1) @ a.flatten(1))
    difference = require_same_outputs(source, updates, reader)
    line = f"read with one scale, as {reader} does: outputs differ by {difference:.1e}"
    return [line, in_peft(source, folder)]


def in_peft(source: Source, folder: Path, for_peft: bool = False) -> str:
    """Load a folder in PEFT, and compare what it computes; say so where PEFT is not installed.

    Args:
        source: What was exported.
        folder: What was written.
        for_peft: Whether PEFT is the reader, which then has to read it as it was meant; else a line
            says that it would not.

    Raises:
        LoraError: If PEFT does not read it so, with every reason.
        IntegrityError: If it computes otherwise, for no reason that is known.
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
    """Return what PEFT makes of the task's probe with the adapter in a folder."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of PEFT, of its own ways
        from peft import PeftModel

        base, parts = source.base, source.saved.parts
        models: list[Any] = [  # of a part, PEFT puts its layers into the base itself
            PeftModel.from_pretrained(base.get_submodule(part), str(folder / part)).eval()
            for part in parts or ("",)
        ]
        try:
            adapted = base if parts else models[0]
            outputs: Tensor = source.task.probed(adapted, source.task.probe())
        finally:
            if source.saved.config["peft_type"] == "LORA":
                for model in models:  # of others, PEFT cannot unload a head
                    model.unload()
    return outputs


def _name_of_b(name: str) -> str:
    return re.sub(r"\.lora_(embedding_)?A(?=\.weight$|$)", r".lora_\1B", name)


def _vllm_rank(source: Source) -> int:
    rank = max(pair.rank for pair in source.lora.pairs.values())
    return next(allowed for allowed in VLLM_RANKS if allowed >= rank)


def _missing(source: Source) -> dict[str, Pair]:
    """Return zeros for each module of a type that other layers have adapted."""
    pairs = source.lora.pairs
    adapted = {_type_of(name): name for name in pairs}
    found = {}
    for name, module in source.base.named_modules():
        other = adapted.get(_type_of(name))
        if other is None or name in pairs:
            continue
        ours = getattr(module, "weight", None)  # `to_out.1` is a dropout, next to `to_out.0`
        theirs = source.base.get_submodule(other).weight
        assert isinstance(theirs, Tensor)
        if isinstance(ours, Tensor) and ours.shape == theirs.shape:
            like = pairs[other]
            zeros = (like.a.new_zeros(like.a.shape), like.b.new_zeros(like.b.shape))
            found[name] = Pair(*zeros, 1.0, like.is_embedding)
    return found


def _type_of(name: str) -> str:
    """Return a module's name with `*` for the numbers of layers."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _types(pairs: dict[str, Pair]) -> str:
    names = sorted({name.rpartition(".")[2] for name in pairs})
    return ", ".join(f"`{name}`" for name in names)
