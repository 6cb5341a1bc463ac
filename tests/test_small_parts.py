"""Small functions of adapters, merging, metrics and tasks, value by value."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from peft.tuners.lokr.layer import factorization
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import Llama4TextConfig
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.pytorch_utils import Conv1D

from lora_cli.adapters import initialise
from lora_cli.adapters.initialise import loftq, olora, orthogonal, pissa
from lora_cli.adapters.lokr import LoKrLayer, factorised
from lora_cli.adapters.merge_proof import _parameter_name
from lora_cli.adapters.residual_lora import ResidualLoRALinear
from lora_cli.adapters.variants import LORA_LAYERS, layer_for
from lora_cli.adapters.whole_update import WholeUpdate, core_shape, has_wide_kernel, weight_shape
from lora_cli.errors import LoraError
from lora_cli.export import merge as merging
from lora_cli.export import merge_quantized
from lora_cli.export.merge_quantized import Candidate, TrainedModel, better_candidate, in_words
from lora_cli.metrics import MetricContext
from lora_cli.metrics import builtin_metrics as metrics
from lora_cli.metrics.metric_set import MetricSet
from lora_cli.models.quantized_linear import QuantizedLinear
from lora_cli.recipe import load_recipe
from lora_cli.tasks import build_task
from lora_cli.training import checkpoints

# ----------------------------------------------------------------------------------- adapters


def test_sizes_are_factorised_as_in_peft() -> None:
    for size in (1, 2, 4, 7, 8, 10, 12, 36, 64, 96, 250, 360, 768):
        for factor in (-1, 1, 2, 3, 4, 6, 8, 12, 16, 100):
            assert factorised(size, factor) == factorization(size, factor), (size, factor)


def test_the_factors_of_lokr_are_full_if_the_rank_is_half_of_their_size() -> None:
    base = nn.Linear(64, 36)  # 36 = 6 x 6 outputs, and 64 = 8 x 8 inputs
    assert LoKrLayer.shapes(base, 4) == {"lokr_w1": (6, 8), "lokr_w2": (6, 8)}
    assert LoKrLayer.shapes(base, 3) == {
        "lokr_w1": (6, 8), "lokr_w2_a": (6, 3), "lokr_w2_b": (3, 8)
    }  # fmt: skip
    both = {"decompose_both": True}
    assert LoKrLayer.configured_shapes(base, 3, both) == {
        "lokr_w1_a": (6, 3), "lokr_w1_b": (3, 8), "lokr_w2_a": (6, 3), "lokr_w2_b": (3, 8),
    }  # fmt: skip
    assert LoKrLayer.configured_shapes(base, 4, both) == {"lokr_w1": (6, 8), "lokr_w2": (6, 8)}
    assert LoKrLayer.configured_shapes(base, 1, {"decompose_factor": 2}) == {
        "lokr_w1": (2, 2), "lokr_w2_a": (18, 1), "lokr_w2_b": (1, 32)
    }  # fmt: skip
    wide = nn.Conv2d(64, 36, (3, 5))
    assert LoKrLayer.shapes(wide, 3) == {
        "lokr_w1": (6, 8), "lokr_w2_a": (6, 3), "lokr_w2_b": (3, 120)
    }  # fmt: skip
    assert LoKrLayer.configured_shapes(wide, 3, {"use_effective_conv2d": True}) == {
        "lokr_w1": (6, 8), "lokr_t2": (3, 3, 3, 5), "lokr_w2_a": (3, 6), "lokr_w2_b": (3, 8),
    }  # fmt: skip


def test_the_rank_of_lokr_is_read_from_a_low_rank_factor() -> None:
    first, last, whole = torch.zeros(3, 8), torch.zeros(5, 9), torch.zeros(6, 8)
    assert LoKrLayer.rank_of({"lokr_w1_b": first, "lokr_w2": whole}) == 3
    assert LoKrLayer.rank_of({"lokr_w1": whole, "lokr_w2_b": last}) == 5
    assert LoKrLayer.rank_of({"lokr_w1": whole, "lokr_w2": whole}) is None  # which no rank shows
    assert LoKrLayer.rank_of({"lokr_w1_b": torch.zeros(())}) is None  # damaged: it has no rows


def test_shapes_of_weights_and_which_layers_support_loha_and_lokr() -> None:
    grouped, line = nn.Conv2d(8, 6, (3, 5), groups=2), nn.Conv1d(4, 6, 3)
    assert weight_shape(nn.Linear(3, 5)) == (5, 3)
    assert weight_shape(grouped) == (6, 4, 3, 5) == tuple(grouped.weight.shape)
    assert core_shape(grouped, 7) == (7, 7, 3, 5)
    assert core_shape(line, 7) == (7, 7, 3, 1)
    layers = (nn.Linear(2, 2), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, (1, 2)), line)
    assert [has_wide_kernel(layer) for layer in layers] == [False, False, True, True]
    assert all(WholeUpdate.fits(layer) for layer in layers)
    quantized = QuantizedLinear(2, 2, None, "int8")
    assert WholeUpdate.fits(quantized)
    quantized.transposed = True
    for other in (quantized, nn.Embedding(2, 2), NonDynamicallyQuantizableLinear(2, 2)):
        assert not WholeUpdate.fits(other)


def test_a_layer_with_another_forward_than_its_class_gets_no_adapter() -> None:
    x = torch.randn(2, 4)
    router = Llama4Router(Llama4TextConfig(hidden_size=4, num_local_experts=3))
    standardised = WeightStandardizedConv2d(2, 2, 1, padding=0)
    for base in (router, standardised):
        assert layer_for(base, LORA_LAYERS) is None
        assert not WholeUpdate.fits(base)
    assert isinstance(router(x), tuple)
    # the same in other words
    falcon = FalconLinear(4, 3)
    torch.testing.assert_close(falcon(x), nn.functional.linear(x, falcon.weight, falcon.bias))
    for base in (falcon, Conv1D(3, 4), nn.Conv1d(2, 2, 1), QuantizedLinear(2, 2, None, "int8")):
        assert layer_for(base, LORA_LAYERS) is not None


def test_a_residual_layer_is_saved_with_twice_the_rank() -> None:
    base = nn.Linear(7, 5)
    assert ResidualLoRALinear.peft_shapes(base, 3) == {"lora_A": (6, 7), "lora_B": (5, 6)}
    layer = ResidualLoRALinear(base, 3, 6.0)
    assert (layer.saved_rank, layer.saved_alpha) == (6, 12.0)
    assert layer.initial_A.abs().sum() == layer.initial_B.abs().sum() == 0
    a, b = torch.randn(3, 7), torch.randn(5, 3)
    layer.start_at(a, b)
    x = torch.randn(4, 7)
    torch.testing.assert_close(layer(x), base(x))
    with torch.no_grad():
        layer.lora_A.add_(1.0)
    expected = base(x) + 2.0 * x @ (b @ (a + 1) - b @ a).T
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.delta_weight(), 2.0 * (b @ (a + 1) - b @ a))
    torch.testing.assert_close(layer.to_peft("lora_B"), torch.cat([b, -b], 1))


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_initial_values_from_a_part_of_the_weight(shape: tuple[int, int]) -> None:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(drawn, full_matrices=False)
    s = torch.tensor([9.0, 5.0, 1.0, 0.5, 0.2, 0.1], dtype=torch.float64)
    w0 = ((u * s) @ vh).float()
    best = (u[:, :2] * s[:2]) @ vh[:2]
    for n_iterations in (None, 16):
        torch.manual_seed(0)
        a, b = pissa(w0, 2, 4.0, n_iterations)
        assert (a.shape, b.shape) == ((2, shape[1]), (shape[0], 2))
        torch.testing.assert_close(4.0 * b @ a, best.float(), rtol=0, atol=2e-3)
    codes = (w0 * 2).round() / 2
    a, b = loftq(w0, codes, 2, 4.0)
    u, s, vh = torch.linalg.svd((w0 - codes).double(), full_matrices=False)
    torch.testing.assert_close(4.0 * b @ a, ((u[:, :2] * s[:2]) @ vh[:2]).float())
    a, b = olora(w0, 2)
    q, r = torch.linalg.qr(w0)
    assert torch.equal(b @ a, q[:, :2] @ r[:2])
    a, b = orthogonal(shape[1], shape[0], 4)
    assert (a.shape, b.shape) == ((4, shape[1]), (shape[0], 4))
    torch.testing.assert_close(b @ a, torch.zeros(shape), rtol=0, atol=1e-6)
    assert torch.linalg.matrix_rank(a) == torch.linalg.matrix_rank(b) == 2
    assert 0.02 < float(a.std()) < 0.2


def test_which_layers_an_initialisation_applies_to() -> None:
    loft: Any = SimpleNamespace(init="loftq")
    pissa_: Any = SimpleNamespace(init="pissa")
    quantized, plain = QuantizedLinear(2, 2, None, "int8"), nn.Linear(2, 2)
    assert initialise._for(loft) == "quantised linear layers"
    assert initialise._for(pissa_) == "linear layers"
    assert [initialise._applies_to(layer, loft) for layer in (quantized, plain)] == [True, False]
    assert initialise._applies_to(plain, pissa_)
    assert not initialise._applies_to(nn.Embedding(2, 2), pissa_)


def test_which_parameter_a_tensor_of_peft_belongs_to() -> None:
    parameters: Any = {"a.weight": 1, "b.default.weight": 1}
    for name, place in (
        ("a.weight", "a.weight"), ("a.base_layer.weight", "a.weight"),
        ("a.modules_to_save.weight", "a.weight"),
        ("a.modules_to_save.default.weight", "a.weight"),
        ("b.modules_to_save.default.weight", "b.default.weight"),
        ("c.modules_to_save.weight", "c.modules_to_save.weight"),
    ):  # fmt: skip
        assert _parameter_name(name, parameters) == place


@pytest.mark.parametrize("init", ["eva", "default"])
def test_only_eva_takes_its_ranks_from_a_checkpoint(
    init: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe: Any = SimpleNamespace(
        output_path=tmp_path, adapter=SimpleNamespace(init=init, from_=None)
    )
    learned: Any = SimpleNamespace(in_checkpoint=False, ranks=None, adapter=None)
    checkpoints.adopt_adapter(recipe, learned)
    assert not learned.in_checkpoint
    monkeypatch.setattr(checkpoints, "peek_state", lambda _: SimpleNamespace(recipe={}))
    monkeypatch.setattr(checkpoints, "_ranks", lambda _: {"a": 3})
    checkpoints.adopt_adapter(recipe, learned)
    assert learned.in_checkpoint
    assert learned.ranks == ({"a": 3} if init == "eva" else None)
    assert learned.adapter is None


# ----------------------------------------------------------------------------------- merging


def candidate(base: str, difference: float, value: float | None) -> Candidate:
    return Candidate(base, difference, value)


def test_the_better_of_two_merges() -> None:
    none = TrainedModel({}, torch.zeros(1))
    near, far = candidate("dequantised", 0.1, None), candidate("original", 0.2, None)
    assert better_candidate([far, near], none) is near
    found = TrainedModel({}, torch.zeros(1))
    found.metric, found.value = "accuracy", 0.75
    low, high = candidate("dequantised", 0.1, 0.5), candidate("original", 0.2, 0.7501)
    assert better_candidate([low, high], found) is high
    assert in_words([low, high], high, found) == [
        "trained, on the quantised base: accuracy 0.7500",
        "merged into the dequantised base: accuracy 0.5000 (-0.2500), outputs differ by 1.0e-01",
        "merged into the original base: accuracy 0.7501 (+0.0001), outputs differ by 2.0e-01"
        "  <- written",
    ]
    found.lower_is_better = True
    assert better_candidate([low, high], found) is low
    assert in_words([near], near, none) == [
        "merged into the dequantised base: outputs differ by 1.0e-01  <- written"
    ]


def test_both_merges_are_measured_in_float32_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    task: Any = SimpleNamespace(
        recipe=SimpleNamespace(with_values=lambda values: values), fit_to_model=seen.append
    )
    model = nn.Linear(1, 1)
    monkeypatch.setattr(
        merge_quantized, "start_accelerator", lambda recipe, cpu: seen.append((recipe, cpu))
    )
    monkeypatch.setattr(merge_quantized, "evaluate", lambda *_: {"f1": 0.5, "accuracy": 0.25})
    trained = TrainedModel({}, torch.zeros(1))
    rows: Any = object()
    for given, metric in ((None, None), (rows, None), (None, "f1")):
        trained.rows, trained.metric = given, metric
        assert merge_quantized.metric_of(trained, task, model) is None
    assert seen == []
    trained.rows, trained.metric = rows, "f1"
    assert merge_quantized.metric_of(trained, task, model) == 0.5
    assert seen == [({"train.precision": "fp32", "model.dtype": None}, True), model]


@pytest.mark.parametrize(
    ("has_rows", "streaming", "mode"),
    [(True, False, "min"), (True, False, "max"), (True, True, "max"), (False, False, "max")],
)
def test_a_quantised_base_is_measured_on_rows_that_are_not_streamed(
    has_rows: bool, streaming: bool, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(QuantizedLinear(3, 2, None, "int8"), QuantizedLinear(3, 2, None, "int8"))
    drawn = [torch.randn(2, 3), torch.randn(2, 3)]
    for layer, weight in zip(model, drawn, strict=True):
        layer.set_weight(weight)
    model[1].transposed = True
    data = SimpleNamespace(has=lambda _: has_rows, streaming=streaming)
    task: Any = SimpleNamespace(
        recipe=SimpleNamespace(data=data), drawn=[], load_model=lambda _: (model, []),
        probe=dict, probed=lambda *_: torch.tensor([4.0]),
    )  # fmt: skip
    monkeypatch.setattr(merge_quantized, "load_adapter", lambda *_, drawn: None)
    monkeypatch.setattr(merge_quantized, "load_data", lambda *_: {"validation": "rows"})
    monkeypatch.setattr(merge_quantized, "best_by", lambda *_: ("f1", mode))
    monkeypatch.setattr(merge_quantized, "metric_of", lambda *_: 0.75)
    saved: Any = None
    found = merge_quantized.measure_trained(task, saved)
    # as the checkpoint stores them: GPT-2's layers are the other way round
    assert [tuple(weight.shape) for weight in found.weights.values()] == [(2, 3), (3, 2)]
    for weight, expected in zip(found.weights.values(), (drawn[0], drawn[1].T), strict=True):
        torch.testing.assert_close(weight, expected, rtol=0, atol=0.03)  # as 8 bits can say it
    assert found.outputs == 4.0
    if has_rows and not streaming:
        expected = ("rows", "f1", 0.75, mode == "min")
    else:
        expected = (None, None, None, False)
    assert (found.rows, found.metric, found.value, found.lower_is_better) == expected


def test_a_merge_needs_memory_for_the_model_in_float32_and_as_stored(
    tmp_path: Path,
) -> None:
    tensors = {"a": torch.zeros(2, 3, dtype=torch.float16), "b": torch.zeros(5)}
    files = [tmp_path / f"{name}.safetensors" for name in tensors]
    for file, (name, tensor) in zip(files, tensors.items(), strict=True):
        save_file({name: tensor}, file)
    # 6 numbers of 2 bytes and 5 of 4, and all of them in 4 bytes
    assert merging._bytes_in_memory(files) == 4 * 11 + 2 * 6 + 4 * 5 + merging.ROOM


def test_a_probe_is_cast_to_the_dtype_of_a_merged_model_without_gradients() -> None:
    probe = {"ids": torch.tensor([3]), "pixels": torch.ones(1)}
    seen: dict[str, torch.dtype] = {}

    def probed(_: Any, given: Any) -> torch.Tensor:
        seen.update({name: tensor.dtype for name, tensor in given.items()})
        return torch.zeros(1)

    task: Any = SimpleNamespace(probe=lambda: probe, probed=probed)
    model = nn.Linear(1, 1).bfloat16()
    merging._outputs(task, model)
    assert seen == {"ids": torch.int64, "pixels": torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("best", "written"), [(0, "dequantised"), (1, "original")])
def test_both_bases_of_a_quantised_model_are_merged_and_the_better_is_written(
    best: int, written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"a": torch.ones(1)}
    trained = TrainedModel(weights, torch.tensor([2.0]))
    trained.metric, trained.value = "f1", 0.5
    task: Any = SimpleNamespace(recipe=SimpleNamespace(model=SimpleNamespace(quantization="nf4")))
    values = iter([0.9, 0.1] if best == 0 else [0.1, 0.9])
    merged_with: list[Any] = []

    def merged(plain: Any, given: Any, numbers: Any) -> Any:
        merged_with.append(numbers)
        return SimpleNamespace(outputs=torch.tensor([2.5]), model=None, weights=numbers)

    monkeypatch.setattr(merging, "measure_trained", lambda *_: trained)
    monkeypatch.setattr(merging, "_without_quantization", lambda _: task)
    monkeypatch.setattr(merging, "_merged", merged)
    monkeypatch.setattr(merging, "metric_of", lambda *_: next(values))
    monkeypatch.setattr(
        merging, "_write", lambda merged, *_: SimpleNamespace(numbers=merged.weights)
    )
    result: Any = merging._merge(task, SimpleNamespace(joint=None), Path("to"))  # type: ignore[arg-type]
    assert merging.BASES == ("dequantised", "original")
    assert merged_with[:2] == [weights, {}]
    assert result.numbers == (weights if best == 0 else {})
    assert result.choice[1 + best].startswith(f"merged into the {written} base: f1 0.9")
    assert result.choice[1 + best].endswith("<- written")


@pytest.mark.parametrize(
    ("needed", "available", "low", "said"),
    [
        (5, 5, False, ""), (5, 4, False, "the model in float32 would take "), (5, 9, False, ""),
        (1, 9, True, "`--low-memory` merges tensor by tensor"),
    ],
)  # fmt: skip
def test_a_model_that_does_not_fit_is_merged_in_pieces(
    needed: int, available: int, low: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "checkpoint_files", lambda _: [])
    monkeypatch.setattr(merging, "_bytes_in_memory", lambda _: needed * 2**30)
    monkeypatch.setattr(merging.machine_memory, "available_bytes", lambda: available * 2**30)
    recipe: Any = None
    found = merging._reason_for_pieces(recipe, low)
    assert found.startswith(said)
    assert bool(found) == bool(said)

    def unknown(_: Any) -> Any:
        raise LoraError("of several parts")

    monkeypatch.setattr(merging, "checkpoint_files", unknown)
    monkeypatch.setattr(merging.machine_memory, "available_bytes", lambda: 0)
    assert merging._reason_for_pieces(recipe, False) == ""


# ----------------------------------------------------------------------------------- metrics


def test_scores_of_one_of_several_labels_and_of_constant_answers() -> None:
    one = MetricContext(1, True, ("a",))
    p, r = [[1], [1], [0], [0], [1]], [[1], [0], [1], [0], [1]]
    scores = [
        metrics._precision_recall_f1(p, r, one, score, "")
        for score in ("precision", "recall", "f1")
    ]
    assert scores == pytest.approx([2 / 3, 2 / 3, 2 / 3])
    p = [[1], [1], [1], [0], [1]]
    scores = [
        metrics._precision_recall_f1(p, r, one, score, "")
        for score in ("precision", "recall", "f1")
    ]
    assert scores == pytest.approx([3 / 4, 1.0, 6 / 7])
    two = MetricContext(2, False, ("a", "b"))
    for answers, labels in (([1, 1, 1], [0, 1, 0]), ([0, 1, 0], [1, 1, 1])):
        assert metrics._matthews(answers, labels, two) == 0.0
    assert metrics._matthews([0, 1, 1], [0, 1, 1], two) == pytest.approx(1.0)


def test_which_metrics_were_fed_no_row() -> None:
    found = MetricSet(["accuracy", "f1"], "label", MetricContext(2, False, ("a", "b")))
    assert found.without_rows == ["accuracy", "f1"]
    found.add_batch("label", [0, 1], [0, 1])
    assert found.without_rows == []


# ------------------------------------------------------------------------------ language models


def causal(tmp_path: Path, **task: Any) -> Any:
    base = tiny.save_gpt2(tmp_path / "base")
    path = tiny.recipe(base, tmp_path, task={"type": "causal_lm", "text_column": "text", **task})
    made = build_task(load_recipe(path))
    made.load_processor()
    return made


def test_the_first_token_is_never_marked_as_trained(tmp_path: Path) -> None:
    task = causal(tmp_path)
    ids = task.tokenizer("great fun", add_special_tokens=False)["input_ids"]
    _, text = task.shown({"input_ids": ids, "labels": ids}, False)
    first, rest = (str(task.tokenizer.decode(part)) for part in (ids[:1], ids[1:]))
    assert text == f"{first}\u27e6{rest}\u27e7"
    _, text = task.shown({"input_ids": ids, "labels": [-100] * len(ids)}, False)
    assert text == first + rest


@pytest.mark.parametrize(("length", "counts"), [(999, (7, 64)), (8, (4, 8)), (3, (2, 3))])
def test_a_decoder_is_tried_on_texts_of_two_lengths(
    length: int, counts: tuple[int, int], tmp_path: Path
) -> None:
    short, long = causal(tmp_path).trial_examples(length)
    assert (len(short["input_ids"]), len(long["input_ids"])) == counts
    assert long["input_ids"][: counts[0]] == short["input_ids"]
    for example in (short, long):
        assert example["labels"] == example["input_ids"]
        assert example["row"] == 0


def test_a_batch_of_texts(tmp_path: Path) -> None:
    task = causal(tmp_path)
    batch = task.collate(
        [
            {"row": 2, "input_ids": [5, 6, 7], "labels": [5, -100, 7]},
            {"row": 7, "input_ids": [8, 9], "labels": [8, 9]},
        ]
    )
    assert batch.rows == [2, 7]
    assert batch.cost == 5
    assert batch.items["loss"].tolist() == [1.0, 1.0]
    assert batch.targets["labels"].tolist() == [[-100, -100, 7], [-100, 9, -100]]
    assert batch.targets["positions"].tolist() == [1, 3]  # of what predicts them
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7], [8, 9, task.pad]]
    packs = [
        {"row": 2, "input_ids": [5, 6, 7], "labels": [5, 6, 7], "position_ids": [0, 1, 0]},
        {"row": 7, "input_ids": [8], "labels": [8], "position_ids": [0]},
    ]
    packed = task.collate(packs)
    assert packed.inputs["position_ids"].tolist() == [[0, 1, 0], [0, 0, 1]]
    assert "attention_mask" not in packed.inputs


def test_an_adapter_s_own_template_is_kept_unless_another_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_cli.tasks import causal_lm

    task = causal(tmp_path)
    known: list[Any] = [None]
    monkeypatch.setattr(causal_lm, "read_computation", lambda _: known[0])
    said = [False]
    task.recipe = SimpleNamespace(is_overridden=lambda key: said[0])
    for folder, computation, overridden, keeps in (
        (None, {}, False, False), (tmp_path, None, False, False), (tmp_path, {}, False, True),
        (tmp_path, {}, True, False),
    ):  # fmt: skip
        task.trained_in, known[0], said[0] = folder, computation, overridden
        assert task._keeps_template() is keeps
