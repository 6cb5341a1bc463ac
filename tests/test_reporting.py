from __future__ import annotations

import ast
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lora_cli.errors import IntegrityError, printable
from lora_cli.recipe import Recipe
from lora_cli.reporting import (
    fonts,
    plot_learning_curve,
    read_metrics_log,
    results_table,
    write_model_card,
    write_report,
)
from lora_cli.reporting.fonts import Fonts

HUB_ID = "FacebookAI/roberta-base"
CLASSIFY = {"type": "sequence_classification", "labels": ["no", "yes"]}
NAN = float("nan")


def recipe_of(
    task: dict[str, Any] | None = None, model: str = HUB_ID, **sections: dict[str, Any]
) -> Recipe:
    sections = {"data": {"path": "rows.csv"}, **sections}
    return Recipe.model_validate({"model": {"name": model}, "task": task or CLASSIFY, **sections})


def report_of(**changes: Any) -> dict[str, Any]:
    return {
        "lora_version": "0.1.0",
        "created": "2026-01-02T03:04:05+00:00",
        "command": "lora train configs/demo.yaml",
        "task": "sequence_classification",
        "base_model": HUB_ID,
        "adapter": {"type": "lora", "rank": 8, "alpha": 16},
        "parameters": {"total": 1000, "trainable": 7, "trainable_percent": 0.7},
        "data": {
            "train": {"rows": 800, "source": "a|b.csv", "sha256": "ab12", "labels": {"yes": 9}},
            "test": {"rows": 90, "source": "test.csv", "sha256": None, "skipped_rows": 2},
        },
        "metrics": {
            "before": {"test": {"loss": 1.5, "accuracy": 0.25}},
            "after": {
                "validation": {"loss": 0.5, "f1": 0.8, "accuracy": 0.86, "per_label": {"no": 1}},
                "test": {"loss": 0.6, "f1": NAN, "accuracy": 0.85, "perplexity": 1234.5},
            },
        },
        "best": {"metric": "accuracy", "mode": "max", "value": 0.86, "step": 30, "epoch": 2.0},
        "training": {"steps": 40, "seconds": 95.1, "device": "cpu", "peak_memory_bytes": None},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        **changes,
    }


def write_log(folder: Path, steps: int, every: int = 10, evaluate: int | None = 10) -> None:
    lines = []
    for step in range(steps + 1):
        fall = math.exp(-4 * step / max(steps, 1))
        if evaluate and step % evaluate == 0:
            metrics = {"loss": 0.5 + fall, "accuracy": 0.9 - 0.6 * fall, "f1": 0.85 - 0.6 * fall}
            lines.append({"step": step, "epoch": step / 20, "validation": metrics})
        if step and step % every == 0:
            loss = 0.3 + 1.3 * fall + 0.05 * math.sin(step)
            lines.append({"step": step, "loss": loss, "learning_rate": 1e-3 * (1 - step / steps)})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)


def card_of(folder: Path, recipe: Recipe, report: dict[str, Any]) -> tuple[dict[str, Any], str]:
    write_model_card(folder, recipe, report)
    _, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


def python_of(text: str) -> str | None:
    found = re.search(r"```python\n(.*?)\n```", text, re.DOTALL)
    return found[1] if found else None


def pixels_of(image: Path) -> np.ndarray:
    from matplotlib.image import imread

    return (imread(image)[..., :3] * 255).round().astype(int)


def has_color(pixels: np.ndarray, color: str) -> bool:
    rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return bool((pixels == rgb).all(-1).sum() > 50)


# ------------------------------------------------------------------------------ report and its log


def test_the_report_is_strict_json_with_null_for_what_is_not_finite(tmp_path: Path) -> None:
    def reject(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    metrics = {"a": NAN, "b": [math.inf, 1.5], "c": np.float32("-inf"), "é": np.int64(3)}
    report = {"metrics": metrics, "data": {"labels": {0: 4}, "path": Path("x/y")}}
    write_report(tmp_path, report)
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=reject) == {
        "metrics": {"a": None, "b": [None, 1.5], "c": None, "é": 3},
        "data": {"labels": {"0": 4}, "path": "x/y"},
    }
    assert '\n  "metrics"' in text
    assert "é" in text
    assert math.isnan(report["metrics"]["a"])  # the caller's report is not changed


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    write_report(tmp_path, {"metrics": {}})
    with pytest.raises(TypeError):
        write_report(tmp_path, {"metrics": {"a": object()}})
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]
    assert json.loads((tmp_path / "report.json").read_text()) == {"metrics": {}}


@pytest.mark.parametrize("torn", [b'{"step": 2, "lo', b"\xff\xfe", b"\0\0\0", b"12", b"\n\n"])
def test_a_torn_last_line_of_the_log_is_passed_over(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": NaN}\n' + torn)
    (line,) = read_metrics_log(path)
    assert line["step"] == 1
    assert math.isnan(line["loss"])


def test_a_log_without_newline_at_its_end_is_whole_and_no_log_is_empty(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    assert read_metrics_log(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]
    assert read_metrics_log(tmp_path / "none.jsonl") == []


def test_a_damaged_line_within_the_log_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    with pytest.raises(IntegrityError, match=r"metrics\.jsonl:2"):
        read_metrics_log(tmp_path / "metrics.jsonl")


# ------------------------------------------------------------------------------- table of results


def test_the_table_has_the_measured_columns_the_main_metric_first_and_the_loss_last() -> None:
    assert results_table(report_of()) == [
        ["metric", "validation after", "test before", "test after"],
        ["accuracy", "0.8600", "0.2500", "0.8500"],
        ["f1", "0.8000", "-", "-"],
        ["perplexity", "-", "-", "1,234.50"],
        ["loss", "0.5000", "1.5000", "0.6000"],
    ]


def test_the_table_of_nothing_is_its_header() -> None:
    assert results_table({"metrics": {}}) == [["metric"]]
    assert results_table({"metrics": {"before": None, "after": {"test": None}}}) == [["metric"]]


@pytest.mark.parametrize(
    ("value", "text"),
    [(3, "3"), (12000, "12,000"), (0.0, "0.0000"), (-0.5, "-0.5000"), (2e-05, "2e-05"),
     (123.456, "123.46"), (1.5e9, "1.5e+09"), (None, "-"), (math.inf, "-")],
)  # fmt: skip
def test_numbers_in_the_table(value: Any, text: str) -> None:
    assert results_table({"metrics": {"after": {"test": {"m": value}}}})[1] == ["m", text]


# ----------------------------------------------------------------------------- the learning curve


@pytest.mark.parametrize(
    ("steps", "every", "evaluate"), [(40, 10, 10), (1000, 1, 50), (60, 10, None), (10, 10, None),
                                     (5, 10, 5), (0, 10, 10)]
)  # fmt: skip
@pytest.mark.slow_after(1)
def test_the_curve_is_a_picture_of_1600_by_900(
    tmp_path: Path, steps: int, every: int, evaluate: int | None
) -> None:
    write_log(tmp_path, steps, every, evaluate)
    best = {} if evaluate is None else {"metric": "accuracy", "mode": "max", "step": steps}
    path = plot_learning_curve(tmp_path, report_of(best=best))
    pixels = pixels_of(path)
    assert path == tmp_path / "learning_curve.png"
    assert pixels.shape == (900, 1600, 3)
    assert len(np.unique(pixels @ [65536, 256, 1])) > 100  # colours
    left, right = pixels[170:790, :680], pixels[170:790, 860:]
    assert has_color(left, "#2f6db5") == (steps >= every)  # training
    assert has_color(left, "#d4572a") == (evaluate is not None)  # validation
    assert has_color(right, "#d4572a") == (evaluate is not None)  # its metric
    assert has_color(right, "#2f6db5") == (evaluate is None)  # the learning rate


def test_the_right_panel_is_the_learning_rate_where_the_loss_chooses(tmp_path: Path) -> None:
    write_log(tmp_path, 40)
    best = {"metric": "loss", "mode": "min", "step": 40}
    right = pixels_of(plot_learning_curve(tmp_path, report_of(best=best)))[170:790, 860:]
    assert has_color(right, "#2f6db5")
    assert not has_color(right, "#d4572a")


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("value", ["NaN", "null", "Infinity"])
@pytest.mark.slow_after(1)
def test_the_curve_of_a_run_that_went_bad(tmp_path: Path, value: str, every: int) -> None:
    lines = [
        f'{{"step": {i}, "loss": {value}, "learning_rate": {value}}}' for i in range(1, 40, every)
    ]
    lines.append(f'{{"step": 40, "validation": {{"loss": {value}, "accuracy": {value}}}}}')
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert pixels_of(plot_learning_curve(tmp_path, report_of())).shape == (900, 1600, 3)
    lines[1:1] = ['{"step": 1.5, "loss": 1.0}', '{"step": 41, "validation": {"accuracy": 0.5}}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    pixels = pixels_of(plot_learning_curve(tmp_path, report_of()))
    assert has_color(pixels[170:790, 860:], "#d4572a")


@pytest.mark.parametrize(
    "report",
    [
        {},
        {"best": {"metric": "f1", "step": None}, "base_model": None},
        {"base_model": "/models/a$b$c", "task": "unknown"},
    ],
)
@pytest.mark.slow_after(1)
def test_the_curve_of_little(tmp_path: Path, report: dict[str, Any]) -> None:
    assert pixels_of(plot_learning_curve(tmp_path, report)).shape == (900, 1600, 3)
    write_log(tmp_path, 40)
    assert pixels_of(plot_learning_curve(tmp_path, report)).shape == (900, 1600, 3)


def test_drawing_again_gives_the_same_file_and_leaves_the_style_alone(tmp_path: Path) -> None:
    import matplotlib

    style = dict(matplotlib.rcParams)
    write_log(tmp_path, 40)
    first = plot_learning_curve(tmp_path, report_of()).read_bytes()
    assert plot_learning_curve(tmp_path, report_of()).read_bytes() == first
    assert dict(matplotlib.rcParams) == style


# --------------------------------------------------------------------------------- the model card


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("name", ["日本語モデル", "모델", "模型 \U0001f600", "โมเดล", "\U00012000"])
def test_names_that_no_font_has_are_called_otherwise(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fonts, "_installed", dict)
    lines = [{"step": i, "validation": {"loss": 1.0, "類似度": i / 4}} for i in (0, 2)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    best = {"metric": "類似度", "step": 2, "mode": "max"}
    plot_learning_curve(tmp_path, report_of(best=best, base_model=f"/models/{name}"))
    said = capsys.readouterr().err
    assert f"`metric 1` is `類似度`, `base model` is `{name}`" in said


def test_a_font_that_has_the_letters_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    letters = {
        "Some Sans": frozenset("日本"),
        "Other Sans": frozenset("日本語"),
        "Third": frozenset("π"),
    }
    monkeypatch.setattr(fonts, "_installed", lambda: letters)
    assert fonts.fonts_for(["model", "é π"]) == Fonts(["DejaVu Sans"], frozenset())
    assert fonts.fonts_for(["日本語"]) == Fonts(["DejaVu Sans", "Other Sans"], frozenset())
    assert fonts.fonts_for(["日", "한국"]).lacking == {"한", "국"}


def test_the_font_that_has_a_box_for_every_letter_is_no_font_for_them() -> None:
    assert fonts._installed()
    assert not [name for name in fonts._installed() if name.startswith("Last Resort")]


def test_installed_fonts_draw_what_they_are_said_to_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = fonts.fonts_for(["日本語モデル"])
    if found.lacking:
        pytest.skip("no font with Japanese letters is installed")
    plot_learning_curve(tmp_path, report_of(base_model="/models/日本語モデル"))
    assert capsys.readouterr().err == ""


def test_the_card_of_an_adapter(tmp_path: Path) -> None:
    front, text = card_of(tmp_path, recipe_of(data={"name": "nyu-mll/glue"}), report_of())
    assert front == {
        "base_model": HUB_ID,
        "library_name": "peft",
        "pipeline_tag": "text-classification",
        "datasets": ["nyu-mll/glue"],
        "tags": ["lora", "lora-cli"],
    }
    assert f"LoRA adapter of [{HUB_ID}](https://huggingface.co/{HUB_ID})" in text
    assert "lora eval --adapter .\n" in text
    assert 'lora predict --adapter . "Some text"\n' in text
    assert "| accuracy | 0.8600 | 0.2500 | 0.8500 |" in text
    assert "| train | 800 |  | <code>a&#124;b.csv</code> | `ab12` |" in text
    assert "| test | 90 | 2 | `test.csv` |  |" in text
    assert "| `adapter.rank` | 8 |" in text
    assert "| `parameters.trainable` | 7 |" in text
    assert "](learning_curve.png)" in text
    assert "python 3.11.7, torch 2.13.0" in text
    assert "None" not in text


@pytest.mark.parametrize(
    ("kind", "library", "tags"),
    [("lora", "peft", ["lora", "lora-cli"]), ("full", "transformers", ["lora-cli"]),
     ("none", None, ["lora-cli"]), ("bitfit", None, ["bitfit", "lora-cli"])],
)  # fmt: skip
def test_the_card_of_each_adapter_type(
    tmp_path: Path, kind: str, library: str | None, tags: list[str]
) -> None:
    front, text = card_of(tmp_path, recipe_of(adapter={"type": kind}), report_of())
    assert front.get("library_name") == library
    assert front["tags"] == tags
    assert ("`adapter.rank`" in text) == (kind == "lora")
    code = python_of(text)
    assert (code is not None) == (library is not None)
    assert ("PeftModel.from_pretrained" in (code or "")) == (kind == "lora")
    ast.parse(code or "")


@pytest.mark.parametrize("model", ["/home/me/models/tiny", "package:tiny_models/bert", "../tiny"])
def test_a_base_that_is_not_on_the_hub_is_named_in_the_text_only(
    tmp_path: Path, model: str
) -> None:
    front, text = card_of(tmp_path, recipe_of(model=model), report_of())
    assert "base_model" not in front
    assert f"`{model}`" in text
    code = python_of(text)
    assert code is not None
    assert ("files('tiny_models') / 'bert'" in code) == model.startswith("package:")


@pytest.mark.parametrize(
    "report",
    [
        {"metrics": {}},
        {"metrics": {}, "data": {"train": None}},
        {"metrics": {}, "best": {"metric": None}, "command": None, "created": None},
    ],
)
def test_the_card_of_a_report_with_gaps(tmp_path: Path, report: dict[str, Any]) -> None:
    task = {"type": "sequence_classification"}
    _, text = card_of(tmp_path, recipe_of(task), report)
    assert "None" not in text
    assert python_of(text) is None  # the labels are not known
    write_model_card(tmp_path, recipe_of(), report)


def test_writing_the_card_again_gives_the_same_file(tmp_path: Path) -> None:
    once = card_of(tmp_path, recipe_of(), report_of())
    assert card_of(tmp_path, recipe_of(), report_of()) == once
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]


def test_labels_that_the_recipe_leaves_out_are_those_of_the_train_split_in_order(
    tmp_path: Path,
) -> None:
    data = {"train": {"labels": {10: 1, 9: 5, 2: 3}}}
    task = {"type": "sequence_classification"}
    _, text = card_of(tmp_path, recipe_of(task), report_of(data=data))
    assert "labels = ['2', '9', '10']" in text


HOSTILE = [
    "<img src=x onerror=alert(1)>", "a`b", "``` <script>x</script>", "]( http://x ) | b",
    "**bold**", "&lt;b&gt;", "a\n\n# heading\n\n| a |\n|---|",
    "\\| c", "![x](y)", "<!-- ", "`", "\u202ecba",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_of_the_data_is_markup_in_the_card(text: str, tmp_path: Path) -> None:
    """Labels, files, splits, metrics, commands and models are shown as they are."""
    from markdown_it import MarkdownIt

    task = {**CLASSIFY, "labels": [text, "good", "a ```` b"]}
    report = report_of(
        command=f"lora train '{text}'",
        data={"train": {"rows": 3, "source": text}, text: {"rows": 1}},
        metrics={"after": {"test": {text: 0.5, "loss": 1.0}}},
        best={"metric": text, "step": 1},
    )
    _, card = card_of(tmp_path, recipe_of(task, model=f"/models/{text}"), report)
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(card)
    inside = [child for token in tokens for child in token.children or []]
    assert {token.tag for token in tokens if token.type == "heading_open"} == {"h1", "h2"}
    assert sum(token.type == "heading_open" for token in tokens) == 5
    assert not [token for token in tokens if token.type == "html_block"]
    html = {child.content for child in inside if child.type == "html_inline"}
    assert html <= {"<code>", "</code>"}
    assert [c.attrGet("src") for c in inside if c.type == "image"] == ["learning_curve.png"]
    assert not [child for child in inside if child.type in ("link_open", "strong_open", "em_open")]
    widths = [len(row) for row in _rows_of(tokens)]
    assert sorted(set(widths)) == [2, 5]
    shown = "".join(child.content for child in inside)
    assert printable(text) in shown.replace("</code>", "").replace("<code>", "")


def _rows_of(tokens: list[Any]) -> list[list[Any]]:
    rows: list[list[Any]] = []
    for token in tokens:
        if token.type == "tr_open":
            rows.append([])
        elif token.type in ("td_open", "th_open"):
            rows[-1].append(token)
    return rows


CHAT = {"type": "causal_lm", "messages_column": "messages", "chat_template": "/x/chatml.jinja"}
SNIPPETS = {
    "pair": ({**CLASSIFY, "text_pair_column": "b"}, '"Some text", "Another text"'),
    "multi_label": ({**CLASSIFY, "problem": "multi_label"}, "if score > 0]"),
    "regression": (
        {"type": "sequence_classification", "problem": "regression"}, "num_labels=1)"),
    "padded": ({**CLASSIFY, "pad_token": "<pad>"}, "tokenizer.pad_token = '<pad>'"),
    "many labels": ({**CLASSIFY, "labels": [f"label '{i}'" for i in range(150)]}, "len(labels)"),
    "text": ({"type": "causal_lm"}, "tokenizer('Some text', "),
    "prompt": ({"type": "causal_lm", "prompt_column": "a", "completion_column": "b",
                "separator": "\n{"}, r"'Some text\n{'"),
    "chat": (CHAT, "open('chatml.jinja')"),
}  # fmt: skip


@pytest.mark.parametrize("case", SNIPPETS)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_python_of_each_task_parses(tmp_path: Path, case: str, kind: str) -> None:
    task, expected = SNIPPETS[case]
    front, text = card_of(tmp_path, recipe_of(task, adapter={"type": kind}), report_of())
    code = python_of(text)
    assert code is not None
    ast.parse(code)
    assert expected in code or (kind == "full" and "labels" in expected)
    generates = task["type"] == "causal_lm"
    assert ("AutoModelForCausalLM" in code) == generates
    assert front["pipeline_tag"] == ("text-generation" if generates else "text-classification")


@pytest.mark.parametrize("kind", ["classify", "generate", "full"])
def test_the_python_of_the_card_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    import peft
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "Some": 2, "text": 3}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    base, folder = tmp_path / "base", tmp_path / "out"
    if kind == "generate":
        size = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": 4}
        config = transformers.GPT2Config(**size, bos_token_id=0, eos_token_id=0, pad_token_id=1)
        model, adapted = transformers.GPT2LMHeadModel(config), ["c_attn"]
    else:
        size = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 4, "num_labels": 2}
        config = transformers.BertConfig(**size, num_hidden_layers=1, num_attention_heads=2,
                                         id2label={0: "no", 1: "yes"})  # fmt: skip
        model, adapted = transformers.BertForSequenceClassification(config), ["query"]
    for target in (base, folder) if kind == "full" else (base,):
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    if kind != "full":
        task_type = "CAUSAL_LM" if kind == "generate" else "SEQ_CLS"
        lora = peft.LoraConfig(task_type=task_type, target_modules=adapted,
                               fan_in_fan_out=kind == "generate")  # fmt: skip
        peft.get_peft_model(model, lora).save_pretrained(folder)
    task = {"type": "causal_lm"} if kind == "generate" else {**CLASSIFY, "max_length": 32}
    adapter = {"type": "full" if kind == "full" else "lora"}
    _, text = card_of(folder, recipe_of(task, str(base), adapter=adapter), report_of())
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(compile(python_of(text) or "", "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.endswith("\n")
    assert kind == "generate" or printed.strip() in ("no", "yes")


@pytest.mark.slow
def test_neither_torch_nor_pyplot_is_imported_and_matplotlib_only_to_draw(tmp_path: Path) -> None:
    code = """
import pathlib, sys
from lora_cli.reporting import plot_learning_curve
print({'torch', 'matplotlib', 'numpy'} & {*sys.modules})
plot_learning_curve(pathlib.Path(sys.argv[1]), {})
print({'torch', 'matplotlib.pyplot'} & {*sys.modules})
"""
    write_log(tmp_path, 40)
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["set()", "set()"]
