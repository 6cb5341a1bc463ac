"""The shape of the code: small modules and functions, names of their own, tasks known to tasks."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_cli.recipe import TASKS

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "lora_cli").rglob("*.py"))
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 450, 60
# the specs of tasks, the tasks themselves with the one `match` that builds them
MAY_KNOW_TASKS = (ROOT / "lora_cli" / "tasks", ROOT / "lora_cli" / "recipe" / "spec")


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions_in(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


def task_classes() -> set[str]:
    """Return the names of the classes of tasks and of their specs."""
    found = {spec.__name__ for spec in TASKS.values()} | {"Task", "TaskSection"}
    classes = [
        node
        for path in (ROOT / "lora_cli" / "tasks").rglob("*.py")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ClassDef)
    ]
    while True:
        more = {c.name for c in classes if found & {ast.unparse(base) for base in c.bases}}
        if more <= found:
            return found
        found |= more


def questions_in(tree: ast.Module, classes: set[str]) -> Iterator[ast.AST]:
    """Yield where code asks which task it has: by a class, a pattern, or the name of a type."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            if classes & set(re.findall(r"\w+", ast.unparse(node.args[1]))):
                yield node
        elif isinstance(node, ast.MatchClass):
            if ast.unparse(node.cls).rpartition(".")[2] in classes:
                yield node
        elif isinstance(node, ast.Compare):
            words = [part for part in ast.walk(node) if isinstance(part, ast.Constant)]
            if any(word.value in TASKS for word in words if isinstance(word.value, str)):
                yield node


def names_in(tree: ast.Module) -> Iterator[ast.Constant]:
    """Yield the texts that are the name of a task type."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in TASKS:
            yield node


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_modules_and_functions_are_small(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{lines} lines"
    long = {name: n for name, n in functions_in(path) if n > MOST_LINES_OF_A_FUNCTION}
    assert long == {}


def test_no_two_modules_share_a_name() -> None:
    names = Counter(path.name for path in MODULES if path.name != "__init__.py")
    assert [name for name, count in names.items() if count > 1] == []


def test_only_tasks_know_which_task_it_is() -> None:
    classes = task_classes()
    assert {"CausalLM", "TokenClassification", "CausalLMSpec", "TextTask"} <= classes
    found = [
        f"{named(path)}:{node.lineno}: {ast.unparse(node)}"
        for path in MODULES
        if not any(path.is_relative_to(folder) for folder in MAY_KNOW_TASKS)
        for node in (*questions_in(tree_of(path), classes), *names_in(tree_of(path)))
    ]
    assert found == []


def test_one_match_builds_a_task() -> None:
    """In the room of tasks itself, only the function that builds them lists their types."""
    specs = {spec.__name__ for spec in TASKS.values()}
    asking = {
        named(path): [ast.unparse(node) for node in questions_in(tree_of(path), specs)]
        for path in (ROOT / "lora_cli" / "tasks").rglob("*.py")
    }
    assert {name for name, found in asking.items() if found} == {"lora_cli/tasks/__init__.py"}
    assert len(asking["lora_cli/tasks/__init__.py"]) == len(TASKS)


@pytest.mark.parametrize(
    ("code", "is_question"),
    [
        ("isinstance(task, CausalLM)", True),
        ("isinstance(task, (int, tasks.CausalLM))", True),
        ("issubclass(kind, CausalLM | None)", True),
        ("match task:\n    case CausalLM():\n        pass", True),
        ("match task:\n    case tasks.CausalLM():\n        pass", True),
        ("task.type == 'causal_lm'", True),
        ("recipe.task.type in ('causal_lm', 'other')", True),
        ("'causal_lm' != kind", True),
        ("isinstance(task, str)", False),
        ("task.type == other.type", False),
        ("facts['task'] = 'causal_lm'", False),
    ],
)
def test_the_questions_are_recognised(code: str, is_question: bool) -> None:
    assert bool(list(questions_in(ast.parse(code), {"CausalLM"}))) == is_question


def test_names_of_tasks_are_recognised() -> None:
    code = "task = {'type': 'causal_lm'}; USUAL = {'sequence_classification': 1}; x = 'a causal_lm'"
    found = [node.value for node in names_in(ast.parse(code))]
    assert found == ["causal_lm", "sequence_classification"]
