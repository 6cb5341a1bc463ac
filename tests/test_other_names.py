"""PEFT folders with module names of torch's wrappers, or of another layout of the model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
from closeness import assert_close, assert_different
from peft_configs import outputs
from safetensors.torch import load_file, save_file
from torch import nn

from lora_cli.adapters.load_adapter import load_adapter
from lora_cli.adapters.merge_layers import merge
from lora_cli.adapters.merge_proof import expected_weights
from lora_cli.adapters.peft_format.adapter_folder import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from lora_cli.adapters.peft_format.other_names import use_names_of
from lora_cli.errors import IntegrityError

B = "base_model.model."
Rename = Callable[[str], str]
NAMES: dict[str, Rename] = {
    "compiled": lambda n: n.replace(B, f"{B}_orig_mod."),
    "compiled blocks": lambda n: n.replace(".layers.", ".layers._orig_mod."),
    "compiled as a whole": lambda n: f"_orig_mod.{n}",
    "data parallel": lambda n: f"module.{n}",
    "data parallel inside": lambda n: n.replace(B, f"{B}module."),
    "both": lambda n: n.replace(B, f"{B}module._orig_mod."),
    "checkpointing": lambda n: n.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"),
    "sharded": lambda n: n.replace(".layers.0.", ".layers.0._fsdp_wrapped_module."),
    "without PEFT's prefix": lambda n: n.removeprefix(B),
    "PEFT's prefix twice": lambda n: B + n,
    "of a picture model": lambda n: n.replace(f"{B}model.", f"{B}language_model.model."),
    "of a newer picture model": lambda n: n.replace(f"{B}model.", f"{B}model.language_model."),
    "of the body alone": lambda n: n.replace(f"{B}model.", B),
}
CONFIG: dict[str, Any] = {
    "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "modules_to_save": ["norm"],
    "rank_pattern": {"model.layers.0.self_attn.q_proj": 2},
    "alpha_pattern": {"layers.1.mlp.down_proj": 20, r".*layers\.0.*": 3},
}  # fmt: skip


def folder_of(base: nn.Module, folder: Path, **more: Any) -> nn.Module:
    model = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(**{**copy.deepcopy(CONFIG), **more})
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model.eval()


def rename(folder: Path, to: Rename, in_config: bool = False) -> None:
    """Rename the tensors, and perhaps whole names in the configuration."""
    tensors = {to(name): tensor for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    file = folder / CONFIG_FILE
    config = json.loads(file.read_text())
    for key in ("rank_pattern", "alpha_pattern"):
        config[key] = {
            to(B + name).removeprefix(B) if in_config and name.startswith("model.") else name: value
            for name, value in config[key].items()
        }
    file.write_text(json.dumps(config))


@pytest.mark.slow_after(5)
@pytest.mark.parametrize("kind", NAMES)
def test_names_of_other_tools_and_versions_are_read_and_merged(kind: str, tmp_path: Path) -> None:
    base = tiny.llama(tied=False)
    theirs = folder_of(base, tmp_path)
    expected = outputs(theirs)
    rename(tmp_path, NAMES[kind], in_config=kind.startswith("of "))
    ours, saved = copy.deepcopy(base), read_adapter(tmp_path)
    use_names_of(ours, saved)
    proof = expected_weights(ours, saved.tensors, saved.config)
    load_adapter(ours, saved, [])
    assert_close(outputs(ours.eval()), expected, 1e-5)
    assert_different(expected, outputs(base))
    merge(ours)
    assert proof.disagreement(ours) is None
    assert_close(outputs(ours), expected, 1e-5)


def test_an_adapter_of_a_body_fits_a_model_with_a_head(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny.encoder()
    more = {"target_modules": ["query"], "modules_to_save": None, "rank_pattern": {}}
    theirs = folder_of(base, tmp_path, alpha_pattern={}, **more)
    rename(tmp_path, lambda n: n.replace(f"{B}bert.", B))  # as of `AutoModel`
    ours = copy.deepcopy(base)
    load_adapter(ours, read_adapter(tmp_path), [])
    assert_close(outputs(ours.eval()), outputs(theirs), 1e-5)
    assert "the model has `bert.encoder" in capsys.readouterr().err


def test_names_that_match_no_module_or_several_are_rejected(tmp_path: Path) -> None:
    base = tiny.encoder()
    more = {"target_modules": ["query"], "modules_to_save": None, "rank_pattern": {}}
    folder_of(base, tmp_path, alpha_pattern={}, **more)
    rename(tmp_path, lambda n: n.replace(f"{B}bert.", f"{B}electra."))
    with pytest.raises(IntegrityError, match=r"electra\.encoder"):
        load_adapter(base, read_adapter(tmp_path), [])

    two = nn.Module()
    two.model, two.language_model = nn.Module(), nn.Module()
    two.model.lin, two.language_model.lin = nn.Linear(4, 4), nn.Linear(4, 4)
    for file in tmp_path.iterdir():
        file.unlink()
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["lin"]}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    names = {"lora_A": (2, 4), "lora_B": (4, 2)}
    import torch

    tensors = {f"{B}module.lin.{n}.weight": torch.ones(s) for n, s in names.items()}
    save_file(tensors, tmp_path / WEIGHTS_FILE, metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match=r"module\.lin"):
        load_adapter(two, read_adapter(tmp_path), [])
