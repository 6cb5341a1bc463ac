"""The reference pages are those that the code writes, and links in the docs lead somewhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", ["recipe.md", "commands.md"])
def test_the_reference_is_up_to_date(name: str) -> None:
    import docs

    written = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert written == docs.pages()[name], "run `python scripts/docs.py`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_recipe_keys_named_in_the_docs_exist(page: Path) -> None:
    from lora_cli.recipe.explain import _all_keys

    keys = set(_all_keys())
    sections = "model|task|data|adapter|train|evaluate|checkpoint"
    for key in re.findall(rf"`((?:{sections})\.[a-z_.]+)[`:]", page.read_text(encoding="utf-8")):
        assert key in keys, key
