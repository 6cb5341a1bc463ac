"""Tests that a step does not depend on its split into micro-batches: sums, not means."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_cli.adapters.attach import attach, trainable_parameters, training_mode
from lora_cli.errors import LoraError
from lora_cli.recipe import Recipe
from lora_cli.tasks import build_task
from lora_cli.tasks.contract import Task
from lora_cli.tasks.examples import IGNORED, Batch, Example
from lora_cli.tasks.generation.causal_lm_encoders import FORMATS
from lora_cli.training.engine import Engine, sum_gradients
from lora_cli.training.step import StepResult, train_step

RATE = 0.5
TEXTS = ["a", "a warm and funny film", "dull", "great fun and a great cast , far too long"]
CLASSIFICATION = {"type": "sequence_classification", "labels": ["bad", "good", "mixed"]}
PAIRS = {"type": "causal_lm", "prompt_column": "prompt", "completion_column": "completion"}


@dataclass
class Case:
    """A model, its task, and the examples of one step."""

    task: Task
    model: nn.Module
    examples: list[Example]

    def batches(self, sizes: list[int]) -> list[Batch]:
        parts = itertools.accumulate(sizes, initial=0)
        return [self.task.collate(self.examples[a:b]) for a, b in itertools.pairwise(parts)]

    def step(self, sizes: list[int], **options: Any) -> tuple[dict[str, Tensor], float]:
        """Return the update of each parameter by one SGD step, divided by -rate, and the loss."""
        parameters = trainable_parameters(self.model)
        before = {name: p.detach().clone() for name, p in parameters.items()}
        accelerator = Accelerator()
        optimizer = accelerator.prepare_optimizer(torch.optim.SGD(parameters.values(), lr=RATE))
        batches = self.batches(sizes)
        result = train_step(
            Engine(self.model, self.task, optimizer, accelerator, **options), batches
        )
        moved = {name: (before[name] - p.detach()) / RATE for name, p in parameters.items()}
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(before[name])
        return moved, float(result.loss)

    def gradients(self, sizes: list[int], of_means: bool = False) -> dict[str, Tensor]:
        """Return the gradients of the summed losses over the items, or of the mean of means.

        They are computed in float64 (except the losses), so that the result does not depend on the
        order of additions, which differs between processors.
        """
        batches, model = self.batches(sizes), copy.deepcopy(self.model)
        total = sum(batch.n_items for batch in batches)
        for batch in batches:
            share = batch.n_items * len(batches) if of_means else total
            (self.task.loss(model, batch) / share).backward()
        parameters = trainable_parameters(model)
        return {name: p.grad for name, p in parameters.items() if p.grad is not None}


def case(base: nn.Module, kind: str, task: dict[str, Any], rows: list[dict[str, Any]]) -> Case:
    recipe = Recipe.model_validate(
        {
            "model": {"name": "base"},
            "task": task,
            "data": {"path": "rows.csv"},
            "adapter": {"rank": 2, "alpha": 2.0, "target_modules": "all-linear"},
        }
    )
    made = build_task(recipe)
    made.tokenizer, made.config = tiny.tokenizer(kind), base.config
    if task["type"] == "causal_lm":
        made.pad = made._pad_id()
        made.rows = FORMATS["pair"](made.spec, made.tokenizer, made.tokenizer, made.max_length)
    elif "class_weights" in task:
        made.reader.weights = torch.tensor([0.2, 1.0, 5.0])
    attach(base, recipe, ["classifier"] if hasattr(base, "classifier") else [])
    tiny.wake(base, std=0.1)
    training_mode(base.double())
    examples = [{**e, "row": i} for i, made_of in enumerate(made.encode(rows)) for e in made_of]
    return Case(made, base, examples)


@pytest.fixture(scope="module", params=["labels", "weighted", "pairs"])
def ragged(request: pytest.FixtureRequest) -> Case:
    """Seven examples whose lengths, weights and numbers of trained tokens differ much."""
    if request.param == "pairs":
        words = ["a", "warm", "and", "funny", "film"]
        rows = [
            {"prompt": "the plot is" * (i % 3 + 1), "completion": " ".join(words[: i % 5 + 1] * i)}
            for i in range(1, 8)
        ]
        return case(tiny.llama(), "llama", PAIRS, rows)
    extra = {"class_weights": {"bad": 0.2}} if request.param == "weighted" else {}
    rows = [{"text": TEXTS[i % 4] * (i % 3 + 1), "label": (i * i) % 3} for i in range(7)]
    return case(tiny.encoder(3), "encoder", CLASSIFICATION | extra, rows)


def splits(count: int = 7) -> st.SearchStrategy[list[int]]:
    """All splits of `count` examples, in order, into micro-batches."""
    return st.sets(st.integers(1, count - 1)).map(
        lambda cuts: [b - a for a, b in itertools.pairwise([0, *sorted(cuts), count])]
    )


def assert_close(
    found: dict[str, Tensor],
    wanted: dict[str, Tensor],
    tolerance: float,
    scales: dict[str, float] | None = None,
) -> None:
    """Compare each tensor within a tolerance of a scale: its largest entry, unless given."""
    assert found.keys() == wanted.keys()
    for name in scales or wanted:
        worst = float((found[name] - wanted[name]).abs().max())
        scale = scales[name] if scales else float(wanted[name].abs().max())
        assert worst <= tolerance * scale, (name, worst / scale)


@pytest.fixture
def scales(ragged: Case) -> dict[str, float]:
    """The largest entry of each gradient, were there no examples that cancel each other.

    Rounding is relative to what is added, not to what is left of it. (So queries and keys are left
    to the test in float64: attention weights sum to one, and what moves them cancels within a row.)
    """
    terms: dict[str, Tensor] = {}
    whole, sums = ragged.gradients([7]), {}
    total = sum(batch.n_items for batch in ragged.batches([7]))
    for batch in ragged.batches([1] * 7):
        (ragged.task.loss(ragged.model, batch) / total).backward()
        for name, parameter in trainable_parameters(ragged.model).items():
            terms[name] = terms.get(name, 0.0) + parameter.grad.abs()
            sums[name] = sums.get(name, 0.0) + parameter.grad
        ragged.model.zero_grad()
    assert_close(sums, whole, 1e-4)
    inner = [name for name in terms if ".query." in name or ".key." in name]
    return {name: float(term.max()) for name, term in terms.items() if name not in inner}


@pytest.fixture
def in_one(ragged: Case) -> tuple[dict[str, Tensor], float]:
    """The update and the loss of a step with all seven examples in one micro-batch."""
    return ragged.step([7])


@pytest.mark.slow_after(1)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(sizes=splits())
def test_a_step_does_not_depend_on_the_split(
    ragged: Case,
    in_one: tuple[dict[str, Tensor], float],
    scales: dict[str, float],
    sizes: list[int],
) -> None:
    whole, loss = in_one
    moved, cut_loss = ragged.step(sizes)
    for name in scales:
        allowed = 1e-6 * scales[name]
        assert float((moved[name] - whole[name]).abs().max()) <= allowed, name
    assert cut_loss == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("sizes", [[1] * 7, [1, 6], [2, 2, 3], [5, 1, 1]])
def test_splits_agree_exactly_in_float64(
    ragged: Case, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    to_float32 = torch.Tensor.float

    def keep_double(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else to_float32(tensor)

    monkeypatch.setattr(torch.Tensor, "float", keep_double)  # keep the losses in float64 too
    reader = getattr(ragged.task, "reader", None)
    if reader is not None and reader.weights is not None:
        monkeypatch.setattr(reader, "weights", reader.weights.double())
    exact = Case(ragged.task, ragged.model, ragged.examples)
    assert_close(exact.gradients(sizes), exact.gradients([7]), 1e-12)


def test_a_step_follows_the_gradient_of_the_mean_over_all_items(ragged: Case) -> None:
    moved, _ = ragged.step([3, 4])
    wanted = ragged.gradients([7])
    # (except the bias of a key, whose gradient is zero up to rounding)
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    scales = {name: float(g.abs().max()) + largest / 10 for name, g in wanted.items()}
    assert_close(moved, wanted, 1e-5, scales)


def test_the_mean_of_means_is_different_for_these_examples(ragged: Case) -> None:
    with pytest.raises(AssertionError):
        assert_close(ragged.gradients([1, 6], of_means=True), ragged.gradients([7]), 1e-2)


def test_reported_loss_is_the_mean_over_items(ragged: Case) -> None:
    with torch.no_grad():
        (batch,) = ragged.batches([7])
        wanted = float(ragged.task.loss(ragged.model, batch)) / batch.n_items
    assert ragged.step([2, 5])[1] == pytest.approx(wanted, rel=1e-6)


def test_gradients_are_clipped_by_their_total_norm(ragged: Case) -> None:
    free, _ = ragged.step([3, 4])
    length = float(torch.cat([t.flatten() for t in free.values()]).norm())
    clipped, _ = ragged.step([3, 4], max_grad_norm=length / 10)
    assert_close(clipped, {name: tensor / 10 for name, tensor in free.items()}, 1e-3)
    unclipped, _ = ragged.step([3, 4], max_grad_norm=length * 10)
    for name, tensor in free.items():
        torch.testing.assert_close(unclipped[name], tensor)


def test_the_gradient_norm_is_that_before_clipping(ragged: Case) -> None:
    gradients = ragged.gradients([7])
    parameters = trainable_parameters(ragged.model)
    accelerator = Accelerator()
    optimizer = accelerator.prepare_optimizer(torch.optim.SGD(parameters.values(), lr=0.0))
    batches = ragged.batches([7])
    result = train_step(Engine(ragged.model, ragged.task, optimizer, accelerator, 1e-3), batches)
    wanted = torch.cat([t.flatten() for t in gradients.values()]).norm()
    torch.testing.assert_close(result.grad_norm, wanted, rtol=1e-5, atol=0.0)
    assert result.idle == []
    assert all(
        p.grad is None for p in parameters.values()
    )  # nothing is carried over to the next step


def test_a_parameter_that_the_forward_pass_does_not_use_is_reported() -> None:
    made = case(tiny.encoder(3), "encoder", CLASSIFICATION, [{"text": "a", "label": 0}] * 2)
    made.model.extra = nn.Linear(2, 2)
    accelerator = Accelerator()
    optimizer = torch.optim.AdamW(made.model.parameters(), weight_decay=0.1)
    prepared = accelerator.prepare_optimizer(optimizer)
    before = made.model.extra.weight.detach().clone()
    result = train_step(Engine(made.model, made.task, prepared, accelerator), made.batches([2]))
    assert result.idle == ["extra.weight", "extra.bias"]
    assert torch.equal(made.model.extra.weight, before)


def test_a_model_that_uses_no_trained_parameter_is_an_error() -> None:
    made = case(tiny.encoder(3), "encoder", CLASSIFICATION, [{"text": "a", "label": 0}] * 2)
    made.model.requires_grad_(False)
    made.model.extra = nn.Linear(2, 2)
    accelerator = Accelerator()
    optimizer = accelerator.prepare_optimizer(torch.optim.AdamW(made.model.extra.parameters()))
    engine = Engine(made.model, made.task, optimizer, accelerator)
    with pytest.raises(LoraError, match=r"`extra\.weight` and 1 more, takes no part in") as caught:
        train_step(engine, made.batches([2]))
    assert caught.value.problems[0].at.startswith("adapter.target_modules")


class TwoProcesses:
    """A stand-in for Accelerate in one of two processes; `other` are the other's tensors."""

    scaler = None
    num_processes, process_index, is_main_process = 2, 0, True
    device = torch.device("cpu")

    def __init__(self, other: list[Tensor]) -> None:
        self.other, self.sent = other, []

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        assert reduction == "sum"
        other = self.other[len(self.sent)]
        assert (tensor.dtype, tensor.shape) == (
            other.dtype,
            other.shape,
        )  # otherwise they would hang
        self.sent.append(tensor.clone())
        return tensor + other

    autocast = staticmethod(lambda: torch.autocast("cpu", enabled=False))
    backward = staticmethod(lambda loss: loss.backward())
    clip_grad_norm_ = staticmethod(nn.utils.clip_grad_norm_)


def test_a_process_without_examples_makes_the_step_of_the_others(ragged: Case) -> None:
    gradients = ragged.gradients([7])
    n_items = sum(batch.n_items for batch in ragged.batches([7]))
    present = torch.tensor([float(n in gradients) for n in trainable_parameters(ragged.model)])
    flat = torch.cat([present, *(g.flatten() for g in gradients.values())])
    others = TwoProcesses([torch.tensor(n_items), torch.tensor([0.7]), flat])
    parameters = trainable_parameters(ragged.model)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.SGD(parameters.values(), lr=RATE)
    result = train_step(Engine(ragged.model, ragged.task, optimizer, others), [])
    assert float(result.loss) == pytest.approx(0.7)
    for name, gradient in gradients.items():
        moved = (before[name] - parameters[name].detach()) / RATE
        torch.testing.assert_close(moved, gradient, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(before[name])


def test_gradients_that_no_process_has_stay_none() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    used.grad = torch.tensor([1.0, 2.0])
    sum_gradients([used, unused], TwoProcesses([torch.tensor([1.0, 0.0, 10.0, 20.0, 0, 0, 0])]))
    assert used.grad.tolist() == [11.0, 22.0]
    assert unused.grad is None


def test_items_without_weight_change_nothing(ragged: Case) -> None:
    class Weightless(type(ragged.task)):
        def losses(self, model: nn.Module, output: Any, batch: Batch) -> dict[str, Tensor]:
            found = super().losses(model, output, batch)
            return {term: sums * 0.0 for term, sums in found.items()}

    ragged_batches = ragged.batches
    task = Weightless.__new__(Weightless)
    task.__dict__ = ragged.task.__dict__
    batches = ragged_batches([7])
    for batch in batches:
        batch.items["loss"].zero_()
    parameters = trainable_parameters(ragged.model)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    accelerator = Accelerator()
    optimizer = accelerator.prepare_optimizer(torch.optim.SGD(parameters.values(), lr=RATE))
    result = train_step(Engine(ragged.model, task, optimizer, accelerator, 1.0), batches)
    assert float(result.loss) == 0.0
    assert all(torch.equal(p, before[name]) for name, p in parameters.items())


# ------------------------------------------------------------------------------------- bad numbers

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


class Spoiled:
    """A task with some losses, or their gradients, replaced by a number."""

    def __init__(self, task: Task, loss: float | None = None, gradient: float | None = None):
        self.task, self.factor, self.gradient = task, loss, gradient

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def losses(self, model: nn.Module, output: Any, batch: Batch) -> dict[str, Tensor]:
        found = self.task.losses(model, output, batch)
        for sums in found.values() if self.gradient is not None else ():
            sums.register_hook(lambda grad: grad * self.gradient)
        factor = 1.0 if self.factor is None else self.factor
        return {term: sums * factor for term, sums in found.items()}


def copied(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return copies of the parameters and of the optimizer's state."""
    found = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            found += [p.detach().clone(), *(v.clone() for v in state.values() if v is not None)]
    return found


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "spoil", [{"loss": math.nan}, {"loss": math.inf}, {"gradient": math.nan}, {"loss": -math.inf}]
)
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.slow_after(7)
def test_a_bad_step_changes_nothing(kind: str, spoil: dict[str, float], first: bool) -> None:
    made = case(tiny.encoder(3), "encoder", CLASSIFICATION, [{"text": "a", "label": 0}] * 2)
    parameters = list(trainable_parameters(made.model).values())
    optimizer = OPTIMIZERS[kind](parameters)
    accelerator = Accelerator()
    prepared = accelerator.prepare_optimizer(optimizer)

    def step(task: Any) -> StepResult:
        return train_step(
            Engine(made.model, task, prepared, accelerator, 1.0), made.batches([1, 1])
        )

    if not first:
        assert not step(made.task).bad
    before = [p.detach().clone() for p in parameters] if first else copied(optimizer)
    result = step(Spoiled(made.task, **spoil))
    assert result.bad
    assert result.skipped
    after = [p.detach() for p in parameters] if first else copied(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None for p in parameters)
    # and the next step is as if there had been no bad one
    twin = case(tiny.encoder(3), "encoder", CLASSIFICATION, [{"text": "a", "label": 0}] * 2)
    others = list(trainable_parameters(twin.model).values())
    with torch.no_grad():
        for mine, theirs in zip(parameters, others, strict=True):
            theirs.copy_(mine)
    if first:
        made_by_twin = accelerator.prepare_optimizer(OPTIMIZERS[kind](others))
        train_step(
            Engine(twin.model, twin.task, made_by_twin, accelerator, 1.0), twin.batches([1, 1])
        )
        assert not step(made.task).skipped
        assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))


def test_a_micro_batch_without_trained_tokens_changes_nothing() -> None:
    rows = [{"prompt": "a", "completion": "b c d"}] * 3
    made = case(tiny.llama(), "llama", PAIRS, rows)
    masked, *others = made.batches([1, 1, 1])
    masked.targets["labels"].fill_(IGNORED)
    masked.targets["positions"] = masked.targets["positions"][:0]
    masked.items["loss"].zero_()
    loss = made.task.loss(made.model, masked)
    assert loss.item() == 0.0

    def moved(batches: list[Batch]) -> tuple[StepResult, list[Tensor]]:
        model = copy.deepcopy(made.model)
        accelerator = Accelerator()
        parameters = list(trainable_parameters(model).values())
        optimizer = accelerator.prepare_optimizer(torch.optim.SGD(parameters, lr=RATE))
        result = train_step(Engine(model, made.task, optimizer, accelerator), batches)
        return result, parameters

    with_it, ours = moved([masked, *others])
    without, theirs = moved(others)
    assert torch.equal(with_it.loss, without.loss)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    alone, same = moved([masked])
    assert not alone.bad
    assert float(alone.loss) == float(alone.grad_norm) == 0.0
    start = trainable_parameters(made.model).values()
    assert all(torch.equal(a, b) for a, b in zip(same, start, strict=True))


class TwoTerms:
    """A task whose loss has two terms with different weights and items."""

    loss_weights = train_loss_weights = {"squares": 2.0, "sum": 0.5}
    couples_examples = False

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch.inputs["x"])

    output = forward  # nothing is frozen

    def losses(self, model: nn.Module, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"squares": output.square().sum(-1), "sum": output.sum(-1)}


def test_each_term_is_divided_by_its_items_and_the_terms_are_added() -> None:
    torch.manual_seed(0)
    layer, other = (nn.Linear(3, 2) for _ in range(2))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, 3)
    counts = {"squares": torch.tensor([1.0, 2, 0, 3, 1]), "sum": torch.tensor([1.0, 1, 1, 0, 1])}
    batches = [
        Batch({"x": x[part]}, {}, {k: v[part] for k, v in counts.items()}, 1, [0])
        for part in (slice(0, 2), slice(2, 5))
    ]
    accelerator = Accelerator()
    optimizer = accelerator.prepare_optimizer(torch.optim.SGD(layer.parameters(), lr=RATE))
    task: Any = TwoTerms()
    result = train_step(Engine(layer, task, optimizer, accelerator), batches)
    y = other(x)
    expected = 2.0 * y.square().sum() / 7 + 0.5 * y.sum() / 4
    expected.backward()
    assert float(result.loss) == pytest.approx(expected.item(), rel=1e-6)
    assert {term: float(mean) for term, mean in result.terms.items()} == {
        "squares": pytest.approx(float(y.detach().square().sum()) / 7, rel=1e-6),
        "sum": pytest.approx(float(y.detach().sum()) / 4, rel=1e-6),
    }
    for ours, plain in zip(layer.parameters(), other.parameters(), strict=True):
        assert plain.grad is not None
        torch.testing.assert_close(ours, plain - RATE * plain.grad)


@pytest.mark.parametrize("waits", [True, False])
def test_the_report_describes_how_steps_are_computed(waits: bool) -> None:
    frozen = {"latents": "computed once"}
    task: Any = SimpleNamespace(waits_for_device=waits, layout="padded", frozen_facts=frozen)
    pause = ", waiting once a micro-batch for what the host decides" if waits else ""
    assert Engine(nn.Linear(1, 1), task, None, Accelerator()).facts == {
        "batches": "padded",
        "steps": f"plain autograd{pause}",
        "latents": "computed once",
    }
