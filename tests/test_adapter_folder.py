"""Adapter folders: PEFT reads folders that this tool saved, and the reverse."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from closeness import assert_close, assert_different
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_cli.adapters.attach import attach, lora_layers, trainable_parameters
from lora_cli.adapters.load_adapter import load_adapter
from lora_cli.adapters.merge_layers import merge
from lora_cli.adapters.merge_proof import expected_weights
from lora_cli.adapters.peft_format.adapter_folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    read_adapter,
    read_tensors,
    restore,
    save_adapter,
)
from lora_cli.errors import IntegrityError, LoraError

pytestmark = [
    # PEFT's warnings to its own users
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Could not identify embedding layer"),
]

P = "base_model.model."  # before each name in PEFT's files

# ------------------------------------------------------------------------------------- helpers


@pytest.fixture
def base() -> nn.Module:
    return tiny.encoder()


def outputs(model: nn.Module) -> Tensor:
    """Return a model's outputs on a fixed input."""
    generator = torch.Generator().manual_seed(5)
    plain = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    with torch.no_grad():
        if isinstance(plain, tiny.ConvNet):
            return plain(torch.randn(4, 3, 12, 12, generator=generator))
        ids = torch.randint(4, 200, (4, 9), generator=generator)
        return plain(input_ids=ids).logits


def assert_same_outputs(one: nn.Module, other: nn.Module) -> None:
    assert_close(outputs(one), outputs(other))


def assert_others(one: nn.Module, other: nn.Module) -> None:
    assert_different(outputs(one), outputs(other))


def stir(model: nn.Module) -> nn.Module:
    """Randomise all trained parameters, as if they had been trained."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.25)
    return model.eval()


def trained(base: nn.Module, in_full: list[str], **adapter: Any) -> tuple[nn.Module, Any]:
    """Return a copy of the base with a non-zero adapter, and its recipe."""
    model, recipe = copy.deepcopy(base), tiny.recipe_of(**adapter)
    attach(model, recipe, in_full)
    return stir(model), recipe


def saved(folder: Path, base: nn.Module, in_full: list[str], **adapter: Any) -> nn.Module:
    """Save an adapter like the tool does, and return the adapted model."""
    model, recipe = trained(base, in_full, **adapter)
    folder.mkdir()
    save_adapter(folder, model, recipe, in_full)
    return model


def loaded(base: nn.Module, folder: Path, new: list[str] | None = None) -> nn.Module:
    model = copy.deepcopy(base)
    load_adapter(model, read_adapter(folder), new or [])
    return model.eval()


def loaded_by_peft(base: nn.Module, folder: Path) -> nn.Module:
    if isinstance(base, tiny.ConvNet):  # no task type of PEFT fits it
        edit_config(folder, task_type=None)
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def saved_by_peft(folder: Path, base: nn.Module, **config: Any) -> nn.Module:
    with warnings.catch_warnings():
        model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(lora_alpha=6, **config))
        stir(model).save_pretrained(folder)
    return model


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def snapshot(model: nn.Module) -> dict[str, tuple[Tensor, torch.dtype, bool, type]]:
    return {
        name: (value.clone(), value.dtype, p.requires_grad, type(model.get_submodule(owner)))
        for name, value in model.state_dict().items()
        for owner, _, last in [name.rpartition(".")]
        for p in [getattr(model.get_submodule(owner), last)]
    }


def refusal(
    base: nn.Module, folder: Path, new: list[str] | None = None, kind: type = IntegrityError
) -> str:
    """Return the error of loading a folder, after checking that the model is unchanged."""
    model = copy.deepcopy(base)
    before = snapshot(model)
    with pytest.raises(LoraError) as caught:
        load_adapter(model, read_adapter(folder), new or [])
    assert type(caught.value) is kind
    after = snapshot(model)
    assert list(after) == list(before)
    for name, (value, *facts) in before.items():
        assert torch.equal(after[name][0], value), name
        assert after[name][1:] == tuple(facts), name
    assert not lora_layers(model)
    return str(caught.value)


# ------------------------------------------------------------------------- here, PEFT, and back


@dataclass
class Case:
    """An adapter as both tools describe it."""

    build: Callable[[], nn.Module]
    ours: dict[str, Any]
    theirs: dict[str, Any]
    in_full: list[str] = field(default_factory=list)
    variant: str = "lora"
    layer: str | tuple[str, ...] = "Linear"


LINEAR = Case(
    tiny.encoder,
    {"rank": 4, "target_modules": ["query", "value"]},
    {
        "r": 4,
        "target_modules": ["query", "value"],
        "modules_to_save": ["classifier"],
        "task_type": "SEQ_CLS",
    },
    ["classifier"],
)


def like_linear(ours: dict[str, Any], theirs: dict[str, Any], variant: str = "lora") -> Case:
    return Case(LINEAR.build, LINEAR.ours | ours, LINEAR.theirs | theirs, LINEAR.in_full, variant)


LM = {"task_type": "CAUSAL_LM"}
PATTERNS = {
    "rank_pattern": {"value": 2, r"layer\.1\..*query": 6},
    "alpha_pattern": {"query": 3.5, "bert.encoder.layer.0.attention.self.value": 9.0},
}
CASES = {
    "linear": LINEAR,
    "rsLoRA": like_linear({"use_rslora": True}, {"use_rslora": True}, "rslora"),
    "patterns": like_linear(PATTERNS, PATTERNS, "patterns"),
    "patterns and rsLoRA": like_linear(
        PATTERNS | {"use_rslora": True}, PATTERNS | {"use_rslora": True}, "patterns"
    ),
    "bias lora_only": like_linear(
        {"bias": "lora_only"}, {"bias": "lora_only"}, "bias of adapted modules"
    ),
    "bias all": like_linear({"bias": "all"}, {"bias": "all"}, "all biases"),
    "regular expression": like_linear(
        {"target_modules": r".*layer\.\d\.(output|intermediate)\.dense"},
        {"target_modules": r".*layer\.\d\.(output|intermediate)\.dense"},
    ),
    "more modules in full": Case(
        LINEAR.build,
        LINEAR.ours | {"train_modules": ["pooler"]},
        LINEAR.theirs | {"modules_to_save": ["classifier", "bert.pooler"]},
        ["bert.pooler", "classifier"],
    ),
    "a suffix that the head has too": Case(
        lambda: tiny.encoder(kind="roberta"),
        {"rank": 4, "target_modules": ["dense"]},
        LINEAR.theirs | {"target_modules": ["dense"]},
        ["classifier"],
    ),
    "all-linear": Case(
        lambda: tiny.llama(tied=False),
        {"rank": 4, "target_modules": "all-linear"},
        {"r": 4, "target_modules": "all-linear", **LM},
    ),
    "layers": Case(
        lambda: tiny.llama(tied=False),
        {"rank": 4, "target_modules": ["q_proj", "up_proj"], "layers": [1]},
        {"r": 4, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], **LM},
    ),
    "exclude": Case(
        lambda: tiny.llama(tied=False),
        {"rank": 4, "target_modules": ["q_proj"], "exclude_modules": ["0.self_attn.q_proj"]},
        {"r": 4, "target_modules": ["q_proj"], "exclude_modules": ["0.self_attn.q_proj"], **LM},
    ),
    "Conv1D of GPT-2": Case(
        tiny.gpt2,
        {"rank": 4, "target_modules": ["c_attn", "mlp.c_proj"]},
        {"r": 4, "target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True, **LM},
        layer="Conv1D",
    ),
    "embedding": Case(
        lambda: tiny.llama(tied=False),
        {"rank": 4, "target_modules": ["embed_tokens", "q_proj"]},
        {"r": 4, "target_modules": ["embed_tokens", "q_proj"], **LM},
        layer=("Embedding", "Linear"),
    ),
    "tied embedding": Case(
        lambda: tiny.llama(tied=True),
        {"rank": 4, "target_modules": ["embed_tokens"]},
        {"r": 4, "target_modules": ["embed_tokens"], **LM},
        layer="tied Embedding",
    ),
    "embedding of an encoder": like_linear(
        {"target_modules": ["word_embeddings", "key"]},
        {"target_modules": ["word_embeddings", "key"]},
    ),
    "convolutions": Case(
        tiny.ConvNet,
        {"rank": 4, "target_modules": ["stem", "point", "line"]},
        {"r": 4, "target_modules": ["stem", "point", "line"], "modules_to_save": ["classifier"]},
        ["classifier"],
        layer=("Conv2d", "Conv1d"),
    ),
    "grouped convolution": Case(
        tiny.ConvNet,
        {"rank": 4, "target_modules": ["grouped"], "bias": "lora_only"},
        {"r": 4, "target_modules": ["grouped"], "bias": "lora_only"},
        variant="bias of adapted modules",
        layer="grouped Conv2d",
    ),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def proves(what: str) -> pytest.MarkDecorator:
    return pytest.mark.proves(
        what,
        variant=lambda case: case.variant,
        layer=lambda case: case.layer,
        against="PEFT",
    )


@proves("write")
@each_case
@pytest.mark.slow_after(8)
def test_peft_reads_what_is_saved_here(case: Case, tmp_path: Path) -> None:
    base = case.build()
    model = saved(tmp_path / "a", base, case.in_full, **case.ours)
    assert_others(model, base)
    assert_same_outputs(loaded_by_peft(base, tmp_path / "a"), model)


@proves("read")
@each_case
@pytest.mark.slow_after(7)
def test_what_peft_saves_is_read_here(case: Case, tmp_path: Path) -> None:
    base = case.build()
    model = saved_by_peft(tmp_path / "a", base, **case.theirs)
    assert_others(model, base)
    ours = loaded(base, tmp_path / "a", case.in_full)
    assert_same_outputs(ours, model)
    assert not trainable_parameters(ours)


@pytest.mark.slow_after(6)
@each_case
def test_the_names_and_shapes_are_those_of_peft(case: Case, tmp_path: Path) -> None:
    base = case.build()
    saved(tmp_path / "ours", base, case.in_full, **case.ours)
    saved_by_peft(tmp_path / "theirs", base, **case.theirs)

    def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
        tensors = load_file(folder / WEIGHTS_FILE)
        return {name: tuple(t.shape) for name, t in tensors.items()}

    ours, theirs = shapes(tmp_path / "ours"), shapes(tmp_path / "theirs")
    # PEFT adds the frozen embedding, and with `bias: all` two more copies of the head's bias
    extra = {n for n in theirs if re.search(r"base_layer.weight|original_mod|modules_to_save", n)}
    assert ours == {name: shape for name, shape in theirs.items() if name not in extra}


@each_case
def test_restoring_a_copy_puts_the_saved_adapter_back(case: Case, tmp_path: Path) -> None:
    base = case.build()
    model = saved(tmp_path / "a", base, case.in_full, **case.ours)
    before = {name: p.clone() for name, p in trainable_parameters(model).items()}
    stir(model)
    restore(model, read_tensors(tmp_path / "a"))
    assert all(torch.equal(p, before[name]) for name, p in trainable_parameters(model).items())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target_modules": ["q_proj"]}, True),
        ({"target_modules": r".*\.q_proj"}, True),
        ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]}, True),
        ({"target_modules": ["q_proj", "v_proj"]}, False),
        ({"target_modules": r".*\.[qv]_proj"}, False),
    ],
)
def test_modules_that_the_configuration_does_not_name_get_a_warning(
    changes: dict[str, Any], said: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny.llama()
    saved_by_peft(tmp_path, copy.deepcopy(base), target_modules=["q_proj", "v_proj"], r=2)
    edit_config(tmp_path, **changes)
    ours = loaded(copy.deepcopy(base), tmp_path)
    printed = capsys.readouterr().err
    assert ("`model.layers.0.self_attn.v_proj` and 1 more module," in printed) == said
    theirs = loaded_by_peft(copy.deepcopy(base), tmp_path)
    (assert_others if said else assert_same_outputs)(ours, theirs)


@pytest.mark.parametrize("kind", ["none", "bitfit"])
def test_peft_rejects_baselines_without_layers(kind: str, tmp_path: Path) -> None:
    base = tiny.encoder()
    saved(tmp_path / "a", base, ["classifier"], type=kind)
    with pytest.raises(Exception, match=r"HEAD_ONLY|BITFIT"):  # and not an empty adapter
        peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a")


# ------------------------------------------------------------------------------- how it is written


def test_the_configuration_has_exactly_these_keys(tmp_path: Path) -> None:
    saved(
        tmp_path / "a",
        tiny.encoder(),
        ["classifier"],
        rank=4,
        alpha=8.0,
        dropout=0.1,
        target_modules=["query", "value"],
        rank_pattern={"query": 2},
        alpha_pattern={"query": 3.0, "value": 2.5},
        bias="lora_only",
        use_rslora=True,
    )
    text = (tmp_path / "a" / CONFIG_FILE).read_text()
    assert json.loads(text) == {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": "base",
        "revision": "main",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "target_modules": ["query", "value"],
        "modules_to_save": ["classifier"],
        "bias": "lora_only",
        "fan_in_fan_out": False,
        "use_rslora": True,
        "use_dora": False,
        "rank_pattern": {"query": 2},
        "alpha_pattern": {"query": 3, "value": 2.5},
        "init_lora_weights": True,
        "inference_mode": True,
    }
    assert '"lora_alpha": 8,' in text  # an integer: older readers require it
    peft.LoraConfig.from_pretrained(tmp_path / "a")  # with warnings as errors: no unknown key


def test_modules_to_save_is_null_without_a_head_and_other_targets_get_full_names(
    tmp_path: Path,
) -> None:
    saved(tmp_path / "a", tiny.gpt2(), [], target_modules="all-linear", layers=[1])
    config = json.loads((tmp_path / "a" / CONFIG_FILE).read_text())
    assert config["modules_to_save"] is None  # vLLM rejects even an empty list
    assert config["fan_in_fan_out"] is True
    assert config["target_modules"] == [
        f"transformer.h.1.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc",
                                               "mlp.c_proj")
    ]  # fmt: skip


def test_the_header_and_the_dtype_are_what_readers_expect(tmp_path: Path) -> None:
    base = tiny.encoder().bfloat16()
    saved(tmp_path / "a", base, ["classifier"], target_modules=["query"])
    with safe_open(tmp_path / "a" / WEIGHTS_FILE, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        names = set(file.keys())
    assert all(name.startswith("base_model.model.") for name in names)
    assert {t.dtype for t in load_file(tmp_path / "a" / WEIGHTS_FILE).values()} == {torch.float32}
    # like every other file, not 0600 as safetensors creates them
    modes = {f.name: f.stat().st_mode & 0o777 for f in (tmp_path / "a").iterdir()}
    assert modes[WEIGHTS_FILE] == modes[CONFIG_FILE]


def test_a_module_that_is_named_base_keeps_its_name(tmp_path: Path) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleDict(
                {"base": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "base_2": nn.Linear(4, 2)}
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.inner["base_2"](self.inner["base"](x))

    base, x = Wrapped(), torch.randn(3, 4)
    adapter = {"rank": 2, "target_modules": ["base.1"], "train_modules": ["base.0"]}
    model = saved(tmp_path / "a", base, ["inner.base.0"], bias="lora_only", **adapter)
    edit_config(tmp_path / "a", task_type=None)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a")
    assert_close(theirs(x), model(x))
    assert torch.equal(loaded(base, tmp_path / "a")(x), model(x))


# ------------------------------------------------------------------------------------ tied weights


def test_a_tie_trained_in_full_is_saved_under_both_names(tmp_path: Path) -> None:
    base, both = tiny.llama(tied=True), ["model.embed_tokens", "lm_head"]
    adapter = {"target_modules": ["q_proj"], "train_modules": both}
    model = saved(tmp_path / "a", base, both, **adapter)
    names = set(load_file(tmp_path / "a" / WEIGHTS_FILE))
    assert {f"base_model.model.{name}.weight" for name in both} < names
    ours = loaded(base, tmp_path / "a")
    assert torch.equal(outputs(ours), outputs(model))
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert_same_outputs(loaded_by_peft(base, tmp_path / "a"), model)


TIED = {
    "llama embed_tokens": (lambda: tiny.llama(tied=True), ["embed_tokens"], ["q_proj"]),
    "llama lm_head": (lambda: tiny.llama(tied=True), ["lm_head"], ["q_proj"]),
    "llama both": (lambda: tiny.llama(tied=True), ["embed_tokens", "lm_head"], ["q_proj"]),
    "llama lm_head, adapted embedding": (
        lambda: tiny.llama(tied=True), ["lm_head"], ["embed_tokens"],
    ),
    "gpt2 wte": (tiny.gpt2, ["wte"], ["c_attn"]),
    "gpt2 lm_head": (tiny.gpt2, ["lm_head"], ["c_attn"]),
    "bart shared": (lambda: tiny.encoder_decoder("bart"), ["shared"], ["q_proj"]),
    "bart embed_tokens": (lambda: tiny.encoder_decoder("bart"), ["embed_tokens"], ["q_proj"]),
    "t5 shared": (lambda: tiny.encoder_decoder("t5"), ["shared"], ["q"]),
    "t5 lm_head": (lambda: tiny.encoder_decoder("t5"), ["lm_head"], ["q"]),
    "t5 encoder.embed_tokens": (
        lambda: tiny.encoder_decoder("t5"), ["encoder.embed_tokens"], ["q"],
    ),
    "t5 shared and lm_head": (lambda: tiny.encoder_decoder("t5"), ["shared", "lm_head"], ["q"]),
}  # fmt: skip


@pytest.mark.slow_after(4)
@pytest.mark.parametrize(("build", "in_full", "targets"), TIED.values(), ids=TIED.keys())
def test_one_tied_weight_in_modules_to_save_becomes_a_copy(
    build: Callable[[], nn.Module], in_full: list[str], targets: list[str], tmp_path: Path
) -> None:
    base, folder = build(), tmp_path / "a"
    config = {"fan_in_fan_out": targets == ["c_attn"], "modules_to_save": in_full}
    theirs = saved_by_peft(folder, base, target_modules=targets, **config)
    ours = loaded(base, folder)
    more = {"decoder_input_ids": torch.arange(4, 9)[None]} if base.config.is_encoder_decoder else {}

    def logits(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(input_ids=torch.arange(5, 14)[None], **more).logits

    assert_close(logits(ours), logits(theirs))
    if in_full != [
        "shared"
    ]:  # which no layer reads: the encoder and the decoder have modules of their own
        assert not torch.allclose(logits(ours), logits(base), atol=1e-2)
    expected = expected_weights(base, read_adapter(folder).tensors, read_adapter(folder).config)
    merge(ours)
    assert_close(logits(ours), logits(theirs))
    assert expected.disagreement(ours) is None


def test_equal_tied_weights_stay_tied(tmp_path: Path) -> None:
    base, both = tiny.llama(tied=True), ["embed_tokens", "lm_head"]
    theirs = saved_by_peft(
        tmp_path / "a",
        base,
        target_modules=["q_proj"],
        modules_to_save=both,
        ensure_weight_tying=True,
    )
    ours = loaded(base, tmp_path / "a")
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert_same_outputs(ours, theirs)


def test_a_copy_of_one_tied_weight_is_trained_and_loaded_as_in_peft(tmp_path: Path) -> None:
    base, folder = tiny.llama(tied=True), tmp_path / "a"
    adapter = {"target_modules": ["q_proj"], "train_modules": ["lm_head"]}
    model = saved(folder, base, [], **adapter, ensure_weight_tying=False)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert torch.equal(model.model.embed_tokens.weight, base.model.embed_tokens.weight)


def test_two_values_of_one_bias_are_rejected(base: nn.Module, tmp_path: Path) -> None:
    saved_by_peft(
        tmp_path / "a", base, target_modules=["query"], bias="all", modules_to_save=["classifier"]
    )
    edit_tensors(tmp_path / "a", lambda t: t.update(
        {f"{P}classifier.modules_to_save.bias": torch.ones(2)}
    ))  # fmt: skip
    assert "has two values in it" in refusal(base, tmp_path / "a")


@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_bias_all_with_a_nested_head(kind: str, tmp_path: Path) -> None:
    """PEFT 0.21 names the biases of a nested head with the adapter's name in them."""
    base = tiny.encoder(kind=kind)
    heads = {"roberta": ["classifier"], "bert": ["classifier", "pooler"]}[kind]
    config = {"target_modules": ["query"], "bias": "all", "modules_to_save": heads}
    theirs = saved_by_peft(tmp_path / "a", base, **config)
    if kind == "roberta":
        key = f"{P}classifier.modules_to_save.default.dense.bias"
        assert key in load_file(tmp_path / "a" / WEIGHTS_FILE)
    assert_same_outputs(loaded(base, tmp_path / "a", ["classifier"]), theirs)


# ---------------------------------------------------------------- what PEFT alone does, read here


def test_a_normalisation_trained_in_full_is_saved_with_its_statistics(tmp_path: Path) -> None:
    base = tiny.ConvNet()
    in_full = {"target_modules": ["stem"], "train_modules": ["norm"]}
    model = saved(tmp_path / "ours", base, ["norm", "classifier"], **in_full)
    assert_same_outputs(loaded_by_peft(base, tmp_path / "ours"), model)
    assert_same_outputs(loaded(base, tmp_path / "ours"), model)
    again, _ = trained(base, ["norm", "classifier"], **in_full)
    restore(stir(again), read_tensors(tmp_path / "ours"))
    assert_same_outputs(again, model)

    full = ["norm", "classifier"]
    theirs = saved_by_peft(tmp_path / "theirs", base, target_modules=["stem"], modules_to_save=full)
    assert_same_outputs(loaded(base, tmp_path / "theirs"), theirs)
    assert_others(theirs, base)

    def counted(tensors: dict[str, Tensor]) -> None:  # in training mode, with equal values
        tensors[f"{P}norm.num_batches_tracked"] += 3

    edit_tensors(tmp_path / "theirs", counted)
    assert_same_outputs(loaded(base, tmp_path / "theirs"), theirs)


def test_statistics_that_another_tool_trained_are_rejected(tmp_path: Path) -> None:
    base = tiny.ConvNet()
    saved_by_peft(tmp_path / "a", base, target_modules=["stem"], modules_to_save=["norm"])

    def moved(tensors: dict[str, Tensor]) -> None:
        tensors[f"{P}norm.running_mean"] += 0.5

    edit_tensors(tmp_path / "a", moved)
    message = refusal(base, tmp_path / "a")
    assert "the buffer `norm.running_mean` is not that of the base" in message
    assert "merge the adapter in PEFT" in message


def test_a_dense_a_of_a_grouped_convolution_is_used_but_not_merged(tmp_path: Path) -> None:
    base = tiny.ConvNet()
    theirs = saved_by_peft(tmp_path / "a", base, r=4, target_modules=["grouped", "stem"])
    a = load_file(tmp_path / "a" / WEIGHTS_FILE)["base_model.model.grouped.lora_A.weight"]
    assert torch.count_nonzero(a) == a.numel()
    assert a.shape == (4, 8, 3, 3)
    ours = loaded(base, tmp_path / "a")
    assert_same_outputs(ours, theirs)
    before = ours.state_dict()
    with pytest.raises(LoraError, match="cannot be merged"):
        merge(ours)
    assert list(ours.state_dict()) == list(before)
    # and it can be saved again
    (tmp_path / "b").mkdir()
    for layer in lora_layers(ours).values():
        layer.lora_A.requires_grad_(True)
        layer.lora_B.requires_grad_(True)
    recipe = tiny.recipe_of(rank=4, target_modules=["grouped", "stem"])
    save_adapter(tmp_path / "b", ours, recipe, [])
    assert_same_outputs(loaded_by_peft(base, tmp_path / "b"), theirs)


def test_an_adapter_read_here_can_be_merged(tmp_path: Path) -> None:
    base = tiny.llama(tied=False)
    theirs = saved_by_peft(tmp_path / "a", base, r=4, target_modules="all-linear", **LM)
    ours = loaded(base, tmp_path / "a")
    merge(ours)
    assert_same_outputs(ours, theirs)
    assert_same_outputs(ours, theirs.merge_and_unload())


def test_the_copy_of_a_base_weight_that_peft_writes_is_compared(tmp_path: Path) -> None:
    base = tiny.llama(tied=False)
    theirs = saved_by_peft(tmp_path / "a", base, r=4, target_modules=["embed_tokens"], **LM)
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    assert name in load_file(tmp_path / "a" / WEIGHTS_FILE)
    assert_same_outputs(loaded(base, tmp_path / "a"), theirs)
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.model.embed_tokens.weight[3, 3] += 0.01
    text = refusal(other, tmp_path / "a")
    assert "`model.embed_tokens.weight` of the base is not the one it was trained on" in text


@pytest.mark.parametrize("coarse", ["base", "file", "base's file"])
def test_the_base_weight_is_compared_in_the_coarser_dtype(coarse: str, tmp_path: Path) -> None:
    """The base in bfloat16 here and float32 there, or the reverse, is still the same base.

    A merge computes in float32, whatever the base's file holds.
    """
    base = tiny.llama(tied=False)
    saved_by_peft(tmp_path / "a", base, r=4, target_modules=["embed_tokens"], **LM)
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    if coarse == "base":
        base = base.bfloat16()
    elif coarse == "base's file":
        base = base.bfloat16().float()
    else:
        edit_tensors(tmp_path / "a", lambda t: t.update({name: t[name].bfloat16()}))
    before = base.model.embed_tokens.weight.clone()
    ours = loaded(base, tmp_path / "a")
    weight = lora_layers(ours)["model.embed_tokens"].base.weight
    assert weight.dtype == before.dtype  # the base is unchanged
    assert torch.equal(weight, before)
    outputs(ours)


def test_layers_pattern_of_peft_is_understood(tmp_path: Path) -> None:
    base = tiny.encoder()
    config = {"layers_to_transform": 1, "layers_pattern": "layer"}
    theirs = saved_by_peft(tmp_path / "a", base, r=4, target_modules=["query", "key"], **config)
    ours = loaded(base, tmp_path / "a")
    assert {name.split(".")[3] for name in lora_layers(ours)} == {"1"}
    assert_same_outputs(ours, theirs)


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_an_adapter_is_loaded_onto_a_bfloat16_base(bias: str, tmp_path: Path) -> None:
    base = tiny.encoder().bfloat16()
    model = saved(tmp_path / "a", base, ["classifier"], target_modules=["query"], bias=bias)
    ours = loaded(base, tmp_path / "a", ["classifier"])
    assert {n: p.dtype for n, p in ours.named_parameters()} == {
        n: p.dtype for n, p in model.named_parameters()
    }
    for autocast in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert torch.equal(outputs(ours), outputs(model))
