"""Texts and labels of many languages go through `init`, the gate, training and its reports."""

from __future__ import annotations

import csv
import json
import unicodedata
from pathlib import Path

import pytest
import tiny
from drafting import Init, initialiser, save_bases
from languages import TEXTS

from lora_cli.evaluation.evaluate_adapter import definitions_of
from lora_cli.metrics import builtin_value
from lora_cli.preprocessing.data_gate import examine
from lora_cli.preprocessing.encode import load_data
from lora_cli.recipe import load_recipe
from lora_cli.tasks import build_task
from lora_cli.training import train

LABELS = {
    "Japanese": ("返品", "配送"), "Chinese": ("退货", "发货"), "Thai": ("คืนสินค้า", "จัดส่ง"),
    "Arabic": ("إرجاع", "شحن"), "Korean": ("반품", "배송"), "Hindi": ("वापसी", "डिलीवरी"),
}  # fmt: skip
# what is asked of each label, to be followed by a number
QUESTIONS = {
    "Japanese": ("商品を返品したい", "いつ届きますか"), "Chinese": ("我想退货", "什么时候发货"),
    "Thai": ("ต้องการคืนสินค้า", "จะจัดส่งเมื่อไร"), "Arabic": ("أريد إرجاع المنتج", "متى يصل الطلب"),
    "Korean": ("상품을 반품하고 싶어요", "언제 배송되나요"),
    "Hindi": ("सामान वापस करना है", "डिलीवरी कब होगी"),
}  # fmt: skip


def rows_of(language: str, count: int = 12) -> list[tuple[str, str]]:
    pairs = list(zip(QUESTIONS[language], LABELS[language], strict=True))
    return [(f"{text} {7 * i}", label) for i in range(count) for text, label in pairs]


def write_csv(path: Path, rows: list[tuple[str, str]], header: tuple[str, str]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_bases(tmp_path_factory.mktemp("bases"))


@pytest.mark.parametrize("language", LABELS)
def test_init_drafts_a_recipe_that_its_own_check_takes(
    language: str, tmp_path: Path, bases: dict[str, Path]
) -> None:
    init: Init = initialiser(tmp_path, bases)
    header = {"Japanese": ("本文", "種類"), "Korean": ("본문", "라벨")}.get(
        language, ("text", "label")
    )
    file = write_csv(tmp_path / "rows.csv", rows_of(language), header)
    task = init("rows.csv", file).task
    assert task.type == "sequence_classification"
    assert (task.text_column, task.label_column) == header
    assert set(task.labels or ()) == set(LABELS[language])


@pytest.mark.parametrize("language", LABELS)
def test_the_gate_finds_copies_and_label_variants(
    language: str, tmp_path: Path, bases: dict[str, Path]
) -> None:
    rows = rows_of(language)
    label = LABELS[language][0]
    write_csv(tmp_path / "train.csv", [*rows, (rows[0][0], f"{label}\u200b")], ("text", "label"))
    typed = unicodedata.normalize("NFD", rows[2][0]).replace("14", "１４") + " ！"
    write_csv(tmp_path / "dev.csv", [("x y z", label), (typed, label)], ("text", "label"))
    recipe = tiny.recipe(
        bases["encoder"], tmp_path, task={"labels": None},
        data={"train": "train.csv", "validation": "dev.csv"},
    )  # fmt: skip
    task = build_task(load_recipe(recipe))
    task.load_processor()
    findings = examine(task, load_data(task))
    assert findings.overlap["validation"]["train"].exact.rows == 1
    assert findings.splits["train"].duplicates.rows == 1
    (doubt,) = findings.splits["train"].label_doubts
    assert "differ in nothing but characters that cannot be seen" in doubt


def test_labels_of_all_languages_are_in_the_reports(
    tmp_path: Path, bases: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row for language in LABELS for row in rows_of(language, 2)]
    for name in ("train", "test"):
        moved = [(f"{name} {text}", label) for text, label in rows]
        write_csv(tmp_path / f"{name}.csv", moved, ("text", "label"))
    recipe = load_recipe(
        tiny.recipe(
            bases["encoder"],
            tmp_path,
            task={"labels": None},
            data={"train": "train.csv", "test": "test.csv"},
            train={"max_steps": 1},
        )
    )
    report = train(recipe)
    assert report["metric_definitions"] == definitions_of(load_recipe(tmp_path / "out/recipe.yaml"))
    assert "those of the 12 labels that occur" in report["metric_definitions"]["f1"]
    out = tmp_path / "out"
    page, card = ((out / name).read_text(encoding="utf-8") for name in ("report.html", "README.md"))
    for label in (label for pair in LABELS.values() for label in pair):
        assert label in page
        assert f"`{label}`" in card
    for text in (page, card):
        assert "macro average" in text
        assert "share of rows whose label is right" in text
    assert json.loads((out / "report.json").read_text())["metric_definitions"]["loss"]
    assert "\\u" not in capsys.readouterr().err


@pytest.mark.slow
def test_answers_of_all_languages_are_measured_and_end_on_whole_characters(
    tmp_path: Path, bases: dict[str, Path]
) -> None:
    rows = [{"q": text, "a": other} for text, other in TEXTS.values()]
    for name in ("train", "test"):
        lines = [json.dumps({**row, "q": f"{name}: {row['q'][:12]}"}) for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    recipe = load_recipe(
        tiny.recipe(
            bases["llama"],
            tmp_path,
            task={
                "type": "causal_lm",
                "text_column": None,
                "prompt_column": "q",
                "completion_column": "a",
                "max_length": 120,
            },
            data={"train": "train.jsonl", "test": "test.jsonl"},
            evaluate={
                "metrics": ["perplexity", "exact_match", "bleu", "rouge"],
                "generation": {"max_new_tokens": 5},
            },
            train={"max_steps": 1},
        )
    )
    report = train(recipe)
    out = tmp_path / "out"
    lines = (out / "predictions" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    said, wanted = zip(
        *((x["prediction"], x["reference"]) for x in map(json.loads, lines)), strict=True
    )
    assert not any(text.endswith("\ufffd") for text in (*said, *wanted))
    after = report["metrics"]["after"]["test"]
    for metric, result in (("bleu", "bleu"), ("rouge", "rougeL"), ("exact_match", "exact_match")):
        assert after[result] == pytest.approx(
            builtin_value(metric, result, list(said), list(wanted))
        )
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "sacrebleu&#x27;s tokenizer 13a, and one word for each letter of scripts" in page
    assert "not comparable" in page
