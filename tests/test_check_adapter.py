"""An adapter that is damaged or does not fit its base is rejected with the reasons."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from test_adapter_folder import (
    P,
    assert_same_outputs,
    edit_config,
    edit_tensors,
    loaded,
    refusal,
    saved,
    saved_by_peft,
)
from torch import Tensor, nn

from lora_cli.adapters.check_adapter import (
    LARGER,
    RESIZED,
    _hint_for_experts,
    check_parameters,
)
from lora_cli.adapters.peft_format.adapter_folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    read_adapter,
)
from lora_cli.adapters.peft_format.peft_config import (
    CHECKED_KEYS,
    CHECKS,
    IDLE,
    TYPE_KEYS,
    VARIANTS,
)
from lora_cli.errors import IntegrityError, LoraError
from lora_cli.files import MANIFEST, write_manifest


@pytest.fixture
def base() -> nn.Module:
    return tiny.encoder()


@pytest.fixture
def folder(base: nn.Module, tmp_path: Path) -> Path:
    """An adapter on query and value of both layers, with its head."""
    saved(tmp_path / "a", base, ["classifier"], rank=4, target_modules=["query", "value"])
    return tmp_path / "a"


QUERY = "bert.encoder.layer.0.attention.self.query"
VALUE = "bert.encoder.layer.1.attention.self.value"


def test_the_unchanged_folder_is_accepted(base: nn.Module, folder: Path) -> None:
    loaded(base, folder, ["classifier"])


@pytest.mark.parametrize("rank", [3, 8])
def test_where_a_configuration_names_no_rank_the_tensors_have_it(
    rank: int, base: nn.Module, tmp_path: Path
) -> None:
    saved_by_peft(tmp_path / "a", base, r=rank, target_modules=["query"], use_rslora=True)
    expected = loaded(base, tmp_path / "a")
    file = tmp_path / "a" / CONFIG_FILE
    config = json.loads(file.read_text())
    del config["r"]
    file.write_text(json.dumps(config))
    assert_same_outputs(loaded(base, tmp_path / "a"), expected)


@pytest.mark.parametrize(
    ("remove", "named"),
    [
        ([f"{P}{QUERY}.lora_A.weight"], f"`{QUERY}` has only lora_B"),
        ([f"{P}{VALUE}.lora_B.weight"], f"`{VALUE}` has only lora_A"),
        ([f"{P}{VALUE}.lora_A.weight", f"{P}{VALUE}.lora_B.weight"], f"`{VALUE}`"),
        ([f"{P}classifier.bias"], "`classifier.bias` is missing"),
    ],
    ids=["A", "B", "a pair", "head"],
)
@pytest.mark.parametrize("new", [["classifier"], []], ids=["new head", "old head"])
def test_a_missing_tensor_is_refused(
    remove: list[str], named: str, new: list[str], base: nn.Module, folder: Path
) -> None:
    edit_tensors(folder, lambda tensors: [tensors.pop(name) for name in remove])
    text = refusal(base, folder, new)
    assert named in text
    assert str(folder) in text
    alone = any(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in remove)
    hint = "do not belong together" if alone and len(remove) == 1 else "is this the base model"
    assert hint in text


def test_missing_tensors_of_a_nested_head_are_reported(tmp_path: Path) -> None:
    base = tiny.encoder(kind="roberta")
    config = {"target_modules": ["query"], "modules_to_save": ["classifier"]}
    saved_by_peft(tmp_path / "a", base, **config)
    edit_tensors(tmp_path / "a", lambda t: t.pop(f"{P}classifier.dense.weight"))
    said = "`classifier.dense.weight` is missing: the configuration says that it is trained"
    assert said in refusal(base, tmp_path / "a")


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_a_missing_bias_is_refused(bias: str, base: nn.Module, tmp_path: Path) -> None:
    saved(tmp_path / "a", base, ["classifier"], target_modules=["query"], bias=bias)
    edit_tensors(tmp_path / "a", lambda t: t.pop(f"{P}{QUERY}.base_layer.bias"))
    assert f"`{QUERY}.bias` is missing" in refusal(base, tmp_path / "a")


def test_a_module_that_the_new_head_holds_must_be_there_whatever_the_configuration_says(
    base: nn.Module, tmp_path: Path
) -> None:
    saved(tmp_path / "a", base, [], target_modules=["query"])
    loaded(base, tmp_path / "a")
    text = refusal(base, tmp_path / "a", ["classifier"])
    assert (
        "`classifier.weight` is missing: the base's checkpoint does not hold it, nor the adapter"
        in text
    )
    assert "modules_to_save=['classifier']" in text
    assert "is this the base" not in text
    assert "`classifier.bias` is missing" in text


@pytest.mark.parametrize(
    ("name", "shape", "named"),
    [
        ("bert.nothing.lora_A.weight", (4, 32), "`bert.nothing` has only lora_A"),
        ("bert.nothing.weight", (4, 32), "the model has no parameter `bert.nothing.weight`"),
        (f"{QUERY}.lora_C.weight", (4, 32), "lora_C.weight` is of a kind that"),
        (f"{QUERY}.lora_B.bias", (32,), "lora_B.bias` is of a kind that"),
        (f"{QUERY}.lora_magnitude_vector", (32,), "does not belong to an adapter of type `lora`"),
        (f"{QUERY}.lora_gate", (32,), "lora_gate` is of a kind that"),
        (f"{QUERY}.modules_to_save.lora_A.weight", (4, 32), "both adapted and trained in full"),
        (f"{QUERY}.original_module.lora_A.weight", (4, 32), "both adapted and trained in full"),
    ],
)
def test_an_additional_tensor_is_refused(
    name: str, shape: tuple[int, ...], named: str, base: nn.Module, folder: Path
) -> None:
    edit_tensors(folder, lambda t: t.update({P + name: torch.ones(shape)}))
    assert named in refusal(base, folder, ["classifier"])


def test_a_renamed_tensor_is_refused(base: nn.Module, folder: Path) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        for matrix in ("lora_A", "lora_B"):
            tensor = tensors.pop(f"{P}{QUERY}.{matrix}.weight")
            tensors[f"{P}{QUERY}x.{matrix}.weight"] = tensor

    edit_tensors(folder, rename)
    text = refusal(base, folder)
    assert f"the adapter is for `{QUERY}x`, which in the model is not there" in text
    assert f"`{QUERY}`" in text  # and what is missing because of it


def test_an_adapter_for_a_module_that_takes_none_is_refused(base: nn.Module, folder: Path) -> None:
    norm = "bert.embeddings.LayerNorm"
    pair = {f"{P}{norm}.lora_{k}.weight": torch.ones(2, 2) for k in "AB"}
    edit_tensors(folder, lambda t: t.update(pair))
    assert f"`{norm}`, which in the model is a LayerNorm" in refusal(base, folder)


@pytest.mark.parametrize(
    ("name", "shape", "named"),
    [
        (f"{QUERY}.lora_A.weight", (4, 31), rf"lora_A of `{QUERY}` is (4, 31), the model needs"),
        (f"{QUERY}.lora_B.weight", (32, 5), rf"lora_B of `{QUERY}` is (32, 5), the model needs"),
        (f"{QUERY}.lora_A.weight", (128,), f"lora_A of `{QUERY}`"),
        (f"{QUERY}.lora_A.weight", (), f"`{QUERY}`"),
        ("classifier.weight", (3, 32), "`classifier.weight` is (3, 32) in the adapter and (2, 32)"),
    ],
)
def test_a_wrong_shape_is_refused(
    name: str, shape: tuple[int, ...], named: str, base: nn.Module, folder: Path
) -> None:
    edit_tensors(folder, lambda t: t.update({P + name: torch.ones(shape)}))
    if shape == (128,):
        edit_config(folder, rank_pattern={"layer.0.attention.self.query": 128})
    assert named in refusal(base, folder, ["classifier"])


def test_embeddings_of_more_tokens_are_said_to_be_of_a_larger_vocabulary() -> None:
    parameters = {name: nn.Parameter(torch.zeros(5, 2)) for name in ("words.weight", "x.weight")}
    for name, shape, hint in (
        ("words.weight", (6, 2), LARGER), ("words.weight", (5, 3), None),
        ("words.weight", (4, 2), None), ("x.weight", (6, 2), None),
    ):  # fmt: skip
        (found,) = check_parameters({name: torch.zeros(shape)}, {}, parameters, [], ["words"])
        assert (found.hint, str(shape) in found.what) == (hint, True)


@pytest.mark.parametrize("rows", [6, 8, 5])
def test_larger_embeddings_that_cannot_be_read_are_to_be_merged_in_peft(rows: int) -> None:
    parameters = {"words.weight": nn.Parameter(torch.zeros(5, 2))}
    tensor = torch.zeros(rows, 2)
    if rows == 5:  # the model has the new rows, with other values
        parameters["words.weight"].data = torch.zeros(200, 2)
        tensor = torch.cat([torch.zeros(150, 2), torch.ones(50, 2)])
    frozen = {"words.weight": tensor}
    (found,) = check_parameters({}, frozen, parameters, [], ["words"], ["words"])
    assert f"resize_token_embeddings({len(tensor)})" in str(found.hint)
    (found,) = check_parameters(frozen, {}, parameters, [], ["words"]) or [None]
    expected = {6: LARGER, 8: RESIZED.format(8), 5: None}[rows]
    assert (None if found is None else found.hint) == expected


@pytest.mark.parametrize(("dimensions", "is_said"), [(2, False), (3, True), (4, False)])
def test_single_experts_are_explained_where_the_model_holds_them_as_one_tensor(
    dimensions: int, is_said: bool
) -> None:
    experts = nn.ParameterDict({"down_proj": torch.zeros([1] * dimensions)})
    for name, is_expert in (("mlp.experts.3.w1", True), ("mlp.gate", False), ("experts.3", False)):
        found = _hint_for_experts(name, {"mlp.experts": experts})
        assert (found is not None) == (is_said and is_expert)


def test_experts_that_are_modules_of_their_own_are_not_said_to_be_one_tensor() -> None:
    experts = nn.ModuleList([nn.Conv1d(1, 1, 1)])
    assert [p.ndim for p in experts.parameters()] == [3, 1]
    assert _hint_for_experts("mlp.experts.3.w1", {"mlp.experts": experts}) is None


def test_a_rank_that_the_configuration_denies_is_refused(base: nn.Module, folder: Path) -> None:
    edit_config(folder, r=8)
    text = refusal(base, folder)
    assert f"`{QUERY}` has rank 4, its configuration says 8" in text
    assert text.count("configuration says") == 4


def test_a_rank_that_the_groups_do_not_divide_is_refused(tmp_path: Path) -> None:
    base = tiny.ConvNet()
    saved(tmp_path / "a", base, [], rank=4, target_modules=["stem", "grouped"])

    def narrow(tensors: dict[str, Tensor]) -> None:
        tensors[f"{P}grouped.lora_A.weight"] = torch.ones(3, 8, 3, 3)
        tensors[f"{P}grouped.lora_B.weight"] = torch.ones(8, 1, 1, 1)

    edit_tensors(tmp_path / "a", narrow)
    edit_config(tmp_path / "a", rank_pattern={"grouped": 3})
    assert "rank 3 cannot be divided among the 2 groups" in refusal(base, tmp_path / "a")


def test_problems_are_reported_together_up_to_a_limit(base: nn.Module, folder: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors.pop(f"{P}{QUERY}.lora_A.weight")
        tensors[f"{P}classifier.weight"] = torch.ones(3, 32)
        tensors[f"{P}strange.weight"] = torch.ones(3)

    edit_tensors(folder, spoil)
    text = refusal(base, folder)
    for name in (QUERY, "classifier.weight", "strange.weight"):
        assert f"`{name}`" in text
    edit_tensors(folder, lambda t: t.update({f"s{i}.weight": torch.ones(1) for i in range(20)}))
    text = refusal(base, folder)
    assert text.count("error:") == 9
    assert re.search(r"and \d+ more like these", text)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_tensor_with_nan_or_infinity_is_refused(
    value: float, base: nn.Module, folder: Path
) -> None:
    edit_tensors(folder, lambda t: t[f"{P}{QUERY}.lora_A.weight"][1].fill_(value))
    assert f"`{QUERY}.lora_A.weight` contains NaN or infinity" in refusal(base, folder)


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.file,))


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_a_pickle_is_refused_unread(
    name: str, base: nn.Module, folder: Path, tmp_path: Path
) -> None:
    sprung = tmp_path / "sprung"
    (folder / WEIGHTS_FILE).unlink()
    (folder / name).write_bytes(pickle.dumps(Trap(sprung)))
    text = refusal(base, folder, kind=LoraError)
    assert f"`{name}` is a pickle, which can run code when it is read" in text
    assert not sprung.exists()
    pickle.loads((folder / name).read_bytes())
    assert sprung.exists()  # unpickling would have created it


def test_a_flipped_byte_is_found_by_the_manifest(base: nn.Module, folder: Path) -> None:
    assert read_adapter(folder).verified is False
    write_manifest(folder)
    assert read_adapter(folder).verified is True
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        whole = (folder / name).read_bytes()
        damaged = bytearray(whole)
        damaged[-20] ^= 1
        (folder / name).write_bytes(damaged)
        assert f"`{name}` is not the file that was written" in refusal(base, folder)
        (folder / name).write_bytes(whole)
    read_adapter(folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    assert set(manifest["files"]) == {WEIGHTS_FILE, CONFIG_FILE}


def test_a_cut_file_is_refused_without_a_manifest(base: nn.Module, folder: Path) -> None:
    whole = (folder / WEIGHTS_FILE).read_bytes()
    for end in (0, 4, 100, len(whole) - 1):
        (folder / WEIGHTS_FILE).write_bytes(whole[:end])
        assert "not a whole safetensors file" in refusal(base, folder)


@pytest.mark.parametrize(
    ("text", "kind", "named"),
    [
        ("{", IntegrityError, "not valid JSON"),
        ("[]", IntegrityError, "not a JSON object"),
        ("{}", LoraError, "`None` is not a type of adapter"),
        ('{"peft_type": "IA3"}', LoraError, "`IA3` is not a type of adapter"),
        ('{"peft_type": "LORA", "r": "four"}', IntegrityError, "`r`"),
        ('{"peft_type": "LORA", "lora_alpha": null}', IntegrityError, "`lora_alpha`"),
        ('{"peft_type": "LORA", "rank_pattern": [4]}', IntegrityError, "`rank_pattern`"),
        ('{"peft_type": "LORA", "alpha_pattern": {"q": "x"}}', IntegrityError, "`alpha_pattern`"),
        ('{"peft_type": "LORA", "rank_pattern": {"(": 4}}', IntegrityError, "`rank_pattern`"),
        ('{"peft_type": "LORA", "target_modules": "("}', IntegrityError, "`target_modules`"),
    ],
)
def test_a_broken_configuration_is_refused(
    text: str, kind: type, named: str, base: nn.Module, folder: Path
) -> None:
    (folder / CONFIG_FILE).write_text(text)
    message = refusal(base, folder, kind=kind)
    assert named in message
    assert str(folder / CONFIG_FILE) in message


def test_a_folder_without_an_adapter_is_refused(base: nn.Module, folder: Path) -> None:
    (folder / CONFIG_FILE).unlink()
    assert f"there is no {CONFIG_FILE}" in refusal(base, folder, kind=LoraError)
    (folder / WEIGHTS_FILE).unlink()
    said = refusal(base, folder, kind=LoraError)
    assert f"this folder is not an adapter: it has no {WEIGHTS_FILE}" in said
    shutil.rmtree(folder)
    assert f"there is no folder {folder}" in refusal(base, folder, kind=LoraError)


def test_every_key_of_peft_has_a_meaning() -> None:
    ours = {*CHECKS, *VARIANTS, *IDLE, *CHECKED_KEYS}
    assert not {field.name for field in dataclasses.fields(peft.LoraConfig)} - ours


NUMBERS = ["NaN", "Infinity", "-Infinity", "1e999", "1e300", "1" + "0" * 400, "true", '"8"', "[8]"]


@pytest.mark.slow_after(12)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("lora_alpha", value) for value in NUMBERS),
        *(("r", value) for value in ["0", "-4", "4.0", "NaN", "true", "1e999", "null"]),
        *(("lora_dropout", value) for value in ["NaN", "-0.1", "1.5", "Infinity", '"0"']),
        *(("rank_pattern", f'{{"query": {v}}}') for v in ["0", "-1", "2.0", "true", "NaN"]),
        *(("alpha_pattern", f'{{"query": {value}}}') for value in NUMBERS),
        ("use_rslora", '"yes"'), ("use_rslora", "1"), ("bias", '"some"'),
        ("modules_to_save", '"classifier"'), ("target_modules", "[1]"),
        ("layers_to_transform", '"0"'), ("layers_to_transform", "[true]"),
    ],
)  # fmt: skip
def test_a_value_that_makes_no_sense_is_rejected_by_its_key(
    key: str, value: str, base: nn.Module, folder: Path
) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    text = json.dumps({**config, key: "HERE"}).replace('"HERE"', value)
    (folder / CONFIG_FILE).write_text(text)
    with pytest.raises(IntegrityError, match=f"`{key}` (cannot be|has to be)") as caught:
        read_adapter(folder)
    assert len(str(caught.value)) < 400


def test_values_that_peft_takes_are_read(base: nn.Module, folder: Path) -> None:
    for alpha in (0, -3, 2.5, 1000):
        edit_config(folder, lora_alpha=alpha)
        assert loaded(base, folder, ["classifier"])


def test_unknown_keys_are_named(
    base: nn.Module, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_config(folder, some_list=[], some_text="", use_other=False, other=None)
    edit_config(folder, notes="trained on a Monday", unsloth_fixed=True, torch_dtype="float32")
    read_adapter(folder)
    text = capsys.readouterr().err
    assert "`other`, `some_list`, `some_text`, `use_other`" in text
    assert "notes" not in text
    for value in (True, {"a": 1}, [1], 16, 0.5, 0, "mean"):
        edit_config(folder, use_other=value)
        assert "the key `use_other` (" in refusal(base, folder, kind=LoraError)


@pytest.mark.parametrize("key", ["r", "lora_alpha", "lora_dropout"])
def test_a_number_written_as_text_is_reported_as_text(
    key: str, base: nn.Module, folder: Path
) -> None:
    edit_config(folder, **{key: "8"})
    assert f'`{key}` has to be a number, and is the text "8"' in refusal(base, folder)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"init_lora_weights": "pissa"}, "`pissa`"),
        ({"init_lora_weights": "olora"}, "`olora`"),
    ],
    ids=lambda value: str(value),
)
def test_adapters_that_change_more_than_this_tool_knows_are_refused(
    config: dict[str, Any], named: str, base: nn.Module, tmp_path: Path
) -> None:
    saved_by_peft(tmp_path / "a", base, r=4, target_modules=["query"], **config)
    text = refusal(base, tmp_path / "a", kind=LoraError)
    assert named in text
    assert str(tmp_path / "a" / CONFIG_FILE) in text


@pytest.mark.parametrize("key", sorted(VARIANTS.keys() - TYPE_KEYS))
def test_variants_that_tensors_do_not_show_are_refused(
    key: str, base: nn.Module, folder: Path
) -> None:
    edit_config(folder, **{key: [7]})
    assert f"adapters with `{key}` cannot be read" in refusal(base, folder, kind=LoraError)
    edit_config(folder, **{key: None})
    read_adapter(folder)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "mica"])
def test_the_initialisation_of_a_does_not_matter(
    init: Any, base: nn.Module, tmp_path: Path
) -> None:
    config = {"r": 4, "target_modules": ["query"], "init_lora_weights": init}
    theirs = saved_by_peft(tmp_path / "a", base, **config)
    assert_same_outputs(loaded(base, tmp_path / "a"), theirs)


def test_an_adapter_of_another_base_is_refused(folder: Path) -> None:
    text = refusal(tiny.gpt2(), folder)
    assert f"the adapter is for `{QUERY}`, which in the model is not there" in text
