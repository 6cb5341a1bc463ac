"""What every task owes: sums that no split changes, rows that see no other row, exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from calls import (
    N_ROWS,
    Opened,
    answers,
    drafted,
    merged,
    open_kind,
    outcomes,
    run,
    saved_and_loaded,
    stopped_copy,
    sums,
    with_model,
    write_kind,
)
from closeness import assert_close
from kinds import TASKS, model_type
from runs import assert_same_run

SPLITS = {
    "one by one": lambda examples: [[example] for example in examples],
    "the first alone": lambda examples: [examples[:1], examples[1:]],
    "every other": lambda examples: [examples[::2], examples[1::2]],
}


def proves(what: str) -> pytest.MarkDecorator:
    """Say what is tested of a kind, which is a parameter of the test or of its fixture."""

    def kind(name: str = "", opened: str = "", **_: str) -> str:
        return name or opened

    return pytest.mark.proves(
        what,
        task=lambda **given: TASKS[kind(**given)].task["type"],
        rows=kind,
        model=lambda **given: model_type(kind(**given)),
    )


def layer_of(name: str) -> str:
    """Return what the adapted layers of a kind's model are."""
    return "Conv1D" if model_type(name) == "gpt2" else "Linear"


@pytest.fixture(scope="module", params=TASKS)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    torch.manual_seed(0)
    return open_kind(TASKS[request.param], tmp_path_factory.mktemp("task"))


@proves("split")
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.slow_after(5)
def test_any_split_of_a_batch_gives_the_same_sums(opened: Opened, split: str) -> None:
    loss, n_items, gradients = sums(opened, opened.examples)
    assert loss > 0.0
    # one by one also out of their packs: in a pack none sees another
    examples = opened.single if split == "one by one" else opened.examples
    split_loss, split_items, split_gradients = sums(opened, *SPLITS[split](examples))
    assert split_items == pytest.approx(n_items, rel=1e-6)
    assert split_loss == pytest.approx(loss, rel=1e-5)
    assert split_gradients.keys() == gradients.keys()
    # losses are float32, and what they add up to may cancel: the scale is that of all gradients
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    assert scale > 0.0
    for name, gradient in gradients.items():
        assert float((split_gradients[name] - gradient).abs().max()) <= 1e-5 * scale, name


@proves("alone")
@pytest.mark.slow_after(11)
def test_an_example_is_the_same_alone_and_among_longer_ones(opened: Opened) -> None:
    together = outcomes(opened, opened.single)
    alone = outcomes(opened, opened.single, size=1)
    assert_close(together, alone)
    loss, n_items, _ = sums(opened, opened.single)
    if not opened.kind.draws_in_training:  # which an evaluation does not
        assert float(together[:, 0].sum()) == pytest.approx(loss, rel=1e-5)
    assert float(together[:, 1].sum()) == pytest.approx(n_items, rel=1e-6)


@proves("save")
@pytest.mark.slow_after(6)
def test_what_is_saved_is_loaded_again(opened: Opened, tmp_path: Path) -> None:
    again = saved_and_loaded(opened, tmp_path / "adapter")
    found, wanted = again.model.state_dict(), opened.model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert_close(outcomes(again, opened.single), outcomes(opened, opened.single))


@proves("merge")
def test_merged_equals_adapted(opened: Opened) -> None:
    found = outcomes(with_model(opened, merged(opened.model)), opened.single)
    assert_close(found, outcomes(opened, opened.single))


def test_a_model_is_probed_with_the_same_few_rows_every_time(opened: Opened) -> None:
    probe, again = opened.task.probe(), opened.task.probe()
    assert {len(tensor) for tensor in probe.values()} in ({2}, {4})
    assert probe.keys() == again.keys()
    assert all(torch.equal(probe[name], again[name]) for name in probe)


def test_a_model_of_texts_or_speech_is_tried_with_a_short_and_a_longer_example(
    opened: Opened,
) -> None:
    task: Any = opened.task
    if not hasattr(task, "trial_examples"):
        pytest.skip("pictures are all of one size")
    short, long = task.trial_examples(40)
    sizes = [task.output_length(one) for one in (short, long)]
    assert 0 < sizes[0] < sizes[1]


@proves("predict")
@pytest.mark.slow_after(5)
def test_predict_adds_the_same_columns_to_rows_alone_and_together(opened: Opened) -> None:
    kind = opened.kind
    rows = [
        {key: value for key, value in kind.row(i).items() if key not in kind.targets}
        for i in range(N_ROWS)
    ]
    together = answers(opened, rows)
    assert [tuple(row) for row in together] == [kind.answers] * len(rows)
    assert together == [answers(opened, [row])[0] for row in rows]


@proves("resume")
@pytest.mark.proves("resume", variant="lora", layer=lambda name: layer_of(name))
@pytest.mark.parametrize("name", [name for name, kind in TASKS.items() if kind.runs])
@pytest.mark.slow_after(1)
def test_a_run_that_was_stopped_is_resumed_exactly(name: str, tmp_path: Path) -> None:
    recipe = write_kind(TASKS[name], tmp_path)
    run(recipe, tmp_path / "whole")
    stopped_copy(tmp_path / "whole", tmp_path / "resumed")
    run(recipe, tmp_path / "resumed", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")


@proves("init")
@pytest.mark.parametrize("name", [name for name, kind in TASKS.items() if kind.drafted])
@pytest.mark.slow_after(4)
def test_init_writes_a_valid_recipe_for_its_rows(name: str, tmp_path: Path) -> None:
    assert drafted(TASKS[name], tmp_path) == TASKS[name].drafted
