"""A task type proposes itself for a table: `lora init` needs no change for a new one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import tiny
import tiny_diffusion
from drafting import labelled, lines, table

from lora_cli.data.column_kinds import describe_column
from lora_cli.errors import LoraError
from lora_cli.recipe import TASKS, Recipe, TaskSpec
from lora_cli.recipe.spec.task_section import TaskSection
from lora_cli.recipe_draft import choose_task, draft, draft_recipe, media_rows
from lora_cli.recipe_draft.base_model_info import Base, describe_base
from lora_cli.tasks import build_task, task_types
from lora_cli.tasks.contract import Task
from lora_cli.tasks.proposal import BaseFacts, Certainty, Proposal, Table

WORDS = "one two three four five six seven eight nine ten".split()  # noqa: SIM905 - shorter
PAIRS = [(f"{a} {b}", f"{b} {a} and {a} {b}") for a in WORDS for b in WORDS]


class PairsSpec(TaskSection):
    """A task with two text columns, each with its own maximum length."""

    type: Literal["pairs"] = "pairs"
    source_column: str = "source"
    target_column: str = "target"
    max_source_length: int = 8
    max_target_length: int = 8

    @property
    def input_columns_by_key(self) -> dict[str, str]:
        return {"task.source_column": self.source_column}


class RecordingsSpec(TaskSection):
    """A task that reads folders of audio."""

    type: Literal["recordings"] = "recordings"
    audio_column: str = "audio"

    @property
    def media_columns(self) -> dict[str, Any]:
        return {self.audio_column: "audio"}


class Pairs(Task):
    @staticmethod
    def propose(table: Table, base: BaseFacts) -> Proposal | None:
        if len(table.columns) != 2 or base.model_type is None:
            return None
        source, target = (column.name for column in table.columns)
        keys = {"type": "pairs", "source_column": source, "target_column": target}
        why = {"": f"`{source}` and `{target}`", "source_column": "the first column"}
        limits = {"max_source_length": [source], "max_target_length": [target]}
        certain = Certainty.BY_FORM
        return Proposal(keys, why, [source, target], limits=limits, certainty=certain)


class Recordings(Task):
    @staticmethod
    def propose(table: Table, base: BaseFacts) -> Proposal | None:
        if table.media != "audio":
            return None
        column = table.columns[0].name
        keys = {"type": "recordings", "audio_column": column}
        return Proposal(keys, {"": "sound"}, [column], certainty=Certainty.ONLY)


@pytest.fixture
def two_more_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register both tasks like their specs and their cases in the `match` would."""

    class WithMore(Recipe):
        task: TaskSpec | PairsSpec | RecordingsSpec  # type: ignore[assignment]

    kinds = [*task_types(), Pairs, Recordings]
    monkeypatch.setitem(TASKS, "pairs", PairsSpec)
    monkeypatch.setitem(TASKS, "recordings", RecordingsSpec)
    monkeypatch.setattr(choose_task, "task_types", lambda: kinds)
    monkeypatch.setattr(draft, "Recipe", WithMore)
    monkeypatch.setattr("lora_cli.recipe_draft.data_folder.Recipe", WithMore)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_encoder(tmp_path_factory.mktemp("bases") / "encoder")


def drafted(base: Path, folder: Path, content: str, **given: Any) -> Any:
    (folder / "rows.csv").write_text(content, encoding="utf-8")
    return draft_recipe(folder / "rows.csv", str(base), folder / "recipe.yaml", **given)


@pytest.mark.usefixtures("two_more_types")
@pytest.mark.parametrize("header", [("de", "en"), None])
def test_a_new_task_is_drafted_with_its_columns_and_lengths(
    header: tuple[str, str] | None, base: Path, tmp_path: Path
) -> None:
    result = drafted(base, tmp_path, table(header, PAIRS))
    names = header or ("source", "target")
    assert result.values["task"] == {
        "type": "pairs",
        "source_column": names[0],
        "target_column": names[1],
        "max_source_length": 32,
        "max_target_length": 32,
    }
    said = dict(result.findings)
    assert said["task"] == f"pairs: `{names[0]}` and `{names[1]}`"
    assert said["source"] == f"`{names[0]}`, the first column"
    assert said["max target length"].startswith("32, ")
    if header is None:
        assert result.values["data"]["format"]["columns"] == ["source", "target"]
    assert result.values["data"]["validation"] == {"from": "train", "fraction": 0.2}


@pytest.mark.usefixtures("two_more_types")
def test_lengths_of_a_new_task_are_reduced_to_fit_into_memory(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [("word " * 400 + str(i), "word " * 100 + str(i)) for i in range(20)]
    whole = drafted(base, tmp_path, table(("de", "en"), rows)).values["task"]
    lengths = [whole["max_source_length"], whole["max_target_length"]]
    monkeypatch.setattr("lora_cli.recipe_draft.memory_budget.MIN_LENGTH", 8)
    monkeypatch.setattr("lora_cli.recipe_draft.memory_budget.OVERHEAD_BYTES", 2**30)
    shape = draft.describe_base(str(base)).shape
    assert shape is not None
    monkeypatch.setattr(
        "lora_cli.recipe_draft.memory_budget.needed_bytes",
        lambda shape, fit: 2**30 * fit.length / sum(lengths) * 2,
    )
    cut = drafted(base, tmp_path, table(("de", "en"), rows), memory=1).values["task"]
    assert [cut["max_source_length"], cut["max_target_length"]] == [n // 4 for n in lengths]


@pytest.mark.usefixtures("two_more_types")
def test_a_folder_of_audio_is_drafted_by_the_task_that_reads_it(base: Path, tmp_path: Path) -> None:
    for i in range(10):
        (tmp_path / "sound").mkdir(exist_ok=True)
        (tmp_path / "sound" / f"{i}.wav").write_bytes(b"RIFF")
    result = draft_recipe(tmp_path / "sound", str(base), tmp_path / "recipe.yaml")
    assert result.values["task"] == {"type": "recordings", "audio_column": "audio"}
    assert result.values["data"]["path"] == "sound"
    assert result.values["data"]["validation"] == {"from": "train", "fraction": 0.2}
    assert "10 recordings" in dict(result.findings)["file"]


@pytest.mark.usefixtures("two_more_types")
def test_a_new_task_changes_no_other_draft(base: Path, tmp_path: Path) -> None:
    rows = [(i, *row) for i, row in enumerate(labelled(40, ["good", "bad"]))]
    result = drafted(base, tmp_path, table(("id", "text", "label"), rows))
    assert result.values["task"]["type"] == "sequence_classification"


def table_of(rows: list[dict[str, Any]], **given: Any) -> Table:
    return Table([describe_column(name, rows) for name in rows[0]], rows, "rows.csv", **given)


@pytest.mark.parametrize("seen", [(0, 1), (1, 0)])
def test_the_most_certain_proposal_is_chosen(
    seen: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of equally certain proposals, choose one without an error, otherwise the first."""

    def kind(name: str, certainty: Certainty, error: LoraError | None = None) -> type[Task]:
        result = Proposal({"type": name}, {}, ["text"], certainty=certainty, error=error)
        return type(name, (Task,), {"propose": staticmethod(lambda table, base: result)})

    def choose(*kinds: type[Task]) -> str:
        ordered = [kinds[i] for i in seen]
        monkeypatch.setattr(choose_task, "task_types", lambda: ordered)
        chosen = choose_task.choose_task(table_of([{"text": "a b c", "more": 1}]), Base("base"))
        return str(chosen.keys["type"])

    error = LoraError("not so", "rows.csv")
    assert choose(kind("a", Certainty.LIKELY), kind("b", Certainty.NAMED)) == "b"
    assert choose(kind("a", Certainty.ONLY, error), kind("b", Certainty.ONLY)) == "b"
    assert choose(kind("a", Certainty.UNCLEAR, error), kind("b", Certainty.LIKELY)) == "b"
    with pytest.raises(LoraError, match="not so"):
        choose(kind("a", Certainty.NAMED, error), kind("b", Certainty.LIKELY))
    same = choose(kind("a", Certainty.NAMED), kind("b", Certainty.NAMED))
    assert same == ("a", "b")[seen[0]]


def test_every_task_type_proposes_itself_for_its_tables(base: Path) -> None:
    assert all(kind.propose is not Task.propose for kind in task_types())
    for name, kind in zip(TASKS, task_types(), strict=True):
        values = {"model": {"name": str(base)}, "task": {"type": name}, "data": {"path": "a.csv"}}
        assert type(build_task(Recipe.model_validate(values))) is kind


def test_a_diffusion_model_is_recognised_by_its_pipeline(tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    tiny_diffusion.save(folder)
    assert describe_base(str(folder)).model_type == "StableDiffusionPipeline"
    for content in ("{}", "[]", "{", '{"_class_name": 3}'):
        (folder / "model_index.json").write_text(content, encoding="utf-8")
        with pytest.raises(LoraError, match="cannot read the model"):
            describe_base(str(folder))


def test_rows_that_no_task_supports_are_rejected(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose_task, "task_types", lambda: [Task])
    with pytest.raises(LoraError, match="no task reads such rows"):
        drafted(base, tmp_path, lines([{"text": "a b"}, {"text": "c d"}]))


def test_words_and_tags_without_a_header_keep_their_rows(base: Path, tmp_path: Path) -> None:
    """The columns get new names, but errors in rows are still found by their old names."""
    rows = [('["the", "film"]', '["O", "B-ART"]') for _ in range(12)]
    result = drafted(base, tmp_path, table(None, rows), label="column_2")
    assert result.values["task"]["type"] == "token_classification"
    assert result.values["data"].get("on_bad_row") is None
    assert media_rows.UNITS.keys() == {"image", "audio"}
