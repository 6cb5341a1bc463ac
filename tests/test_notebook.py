"""`docs/lora_from_scratch.ipynb` runs, and its stored outputs are those of its code."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "lora_from_scratch.ipynb"
NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?")
ABSOLUTE_PATH = re.compile(r"(?<![\w./:])/(?:[\w.-]+/)+|\b[A-Za-z]:\\")


@pytest.fixture(scope="module")
def cells() -> list[dict[str, Any]]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


@pytest.fixture(scope="module")
def code(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [cell for cell in cells if cell["cell_type"] == "code"]


def stored_text(cell: dict[str, Any]) -> str:
    return "".join("".join(o["text"]) for o in cell["outputs"] if o["output_type"] == "stream")


def nearly_equal(new: str, old: str) -> bool:
    """Within 15 % or two units of the last digit; a count such as 8,192 exactly."""
    if "," in old:
        return new == old
    unit = 10.0 ** -len(old.partition(".")[2])
    return float(new) == pytest.approx(float(old), rel=0.15, abs=2.01 * unit)


def test_the_stored_outputs_are_complete_clean_and_small(code: list[dict[str, Any]]) -> None:
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    pictures = [o["data"]["image/png"] for o in outputs if o["output_type"] == "display_data"]
    assert {o["output_type"] for o in outputs} == {"stream", "display_data"}  # so no error
    assert {o["name"] for o in outputs if o["output_type"] == "stream"} == {"stdout"}
    assert len(pictures) == 5
    assert max(len(picture) * 3 // 4 for picture in pictures) < 60_000
    assert NOTEBOOK.stat().st_size < 500_000
    for cell in code:
        assert not ABSOLUTE_PATH.search(stored_text(cell) + "".join(cell["source"])), cell["id"]


def test_every_file_the_text_names_exists(cells: list[dict[str, Any]]) -> None:
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    names = re.findall(r"`((?:lora_cli|tests|configs)/[\w/.]+)`", text)
    assert len(names) >= 7
    assert [name for name in names if not (NOTEBOOK.parents[1] / name).is_file()] == []


@pytest.mark.slow
def test_the_code_prints_what_is_stored(
    code: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text must be equal; numbers within 15 %: another processor rounds otherwise as it trains."""
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    namespace: dict[str, Any] = {"__name__": "notebook"}
    with matplotlib.rc_context():
        for cell in code:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("".join(cell["source"]), cell["id"], "exec"), namespace)
            drawn = len(plt.get_fignums())
            plt.close("all")
            assert drawn == sum(o["output_type"] == "display_data" for o in cell["outputs"])
            now, stored = printed.getvalue(), stored_text(cell)
            assert NUMBER.sub("#", now).split() == NUMBER.sub("#", stored).split(), cell["id"]
            pairs = zip(NUMBER.findall(now), NUMBER.findall(stored), strict=True)
            assert [pair for pair in pairs if not nearly_equal(*pair)] == [], cell["id"]

    named = namespace.__getitem__
    assert named("gradient_both_zero") == 0
    assert named("gradient_a_step_0") == 0 < named("gradient_a_step_1")
    assert named("gradient_b_step_0") > 0
    assert named("loss_both_random") > named("base_loss")
    final, best = named("final"), named("best_possible")
    assert all(final[rank] == pytest.approx(best[rank], rel=0.05) for rank in (1, 2, 3))
    assert final[3] > 20 * final[named("TRUE_RANK")]
    assert named("alpha_is_b_rate") < 1e-6
    assert named("slope_lora") == pytest.approx(-1, abs=0.1)
    assert named("slope_rslora") == pytest.approx(0, abs=0.1)
    assert named("merge_difference") < 1e-5
    assert named("loss_loaded") > 100 * named("loss_unscaled")
    assert named("loss_careful_loaded") == named("loss_careful")
    assert named("loss_accident_loaded") > 10 * named("loss_accident")
    assert not list(tmp_path.iterdir())  # it writes no file
