"""Generate invalid recipes, each of which must be loaded or rejected with a place and a hint.

usage: scripts/fuzz [NUMBER OF CASES] [SEED]        (the suite runs 500 in test_recipes.py)
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from lora_cli.errors import LoraError, Problem, nearest, printable
from lora_cli.recipe import dump_recipe, load_recipe, recipe_schema

ROOT = Path(__file__).parents[2]
CONFIGS = {file.name: file.read_text("utf-8") for file in sorted((ROOT / "configs").glob("*.yaml"))}
TREES = [yaml.safe_load(text) for text in CONFIGS.values()]
MEGABYTES = 256  # that loading a recipe may add to the memory of the process
SECONDS = 4.0  # of processor time
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.",
             "shutil.", "os.remove", "os.rename", "os.mkdir", "ctypes.", "pickle.")  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A recipe's bytes and the `--set` flags given with it."""

    raw: bytes
    flags: tuple[str, ...] = ()


# ------------------------------------------------------------------------------- what is written

KEYS = sorted({name for node in [recipe_schema(), *recipe_schema()["$defs"].values()]
               for name in node.get("properties", {})})  # fmt: skip
PATHS = [
    "model.name", "task.labels", "task.class_weights", "data.validation", "data.format.encoding",
    "adapter.target_modules", "adapter.rank", "train", "train.optimizer.learning_rate",
    "train.optimizer.groups.layers", "train.seed", "evaluate.metrics", "output_dir",
]  # fmt: skip
ATTACKS = [
    "!!python/object/apply:os.system [touch pwned]",
    "!!python/object/new:subprocess.Popen [[touch, pwned]]",
    "!!python/object/apply:builtins.exec ['open(\"pwned\", \"w\")']",
    "!!python/name:os.system", "!!python/module:antigravity", "!!python/tuple [1, 2]",
    "!!binary aGk=", "!!set {a, b}", "!!timestamp 2020-01-01", "!!omap [a: 1]", "!local x",
    "!<tag:yaml.org,2002:int> x", "!!int x", "!!float []", "!!null x", "!!str {a: 1}", "!!merge <<",
]  # fmt: skip
SCALARS = [
    "1e-4", "2E5", "1e999", "-1e999", ".inf", "-.INF", ".nan", "no", "yes", "on", "off", "Y", "~",
    "null", "NULL", "true", "False", "0", "-1", "007", "0o17", "0o9", "0x1F", "0b1", "1_000", "+1.",
    ".5", "1.5.2", "12:30:45", "2020-01-01", "=", "''", '""', "' '", "[]", "{}", "[[]]", "[~]",
    "[{}]", "{a: b}", "{? a}", "- x", "a: b", "a #b", "@x", "%x", "`x`", "*x", "&x", "&x y", "|",
    ">-", "?", "'", '"', '"\\ud800"', '"\\ud83d\\ude00"', '"\\0"', '"\\x07"', '"\\UFFFFFFFF"',
    '"\\u202e"', '"\\q"', "1" * 99, "1" * 101, "9" * 5000, "0." + "3" * 5000, str(2**63 - 1),
    str(2**63), "a" * 5000, "[" * 400 + "]" * 400, "{a: " * 100 + "1" + "}" * 100, "[" * 3000, "..",
    "---", "...", "/", "~nobody/x", "../../etc/passwd", "train[:80%]", "train[5:", "x.csv", "😀",
    "package:", "שלום", "\u200b", "\u2028", "\x85", "\ufeff", "\x00", "\x1b[31m", "\t", "\r",
    "utf-7", "rot13", "idna",
]  # fmt: skip
SOUND = [
    "train.epochs=1e-4", "task.max_length=0x20", "adapter.layers=0-3", "adapter.layers=[0, 1]",
    "adapter.target_modules=no", "adapter.target_modules=[on, 1e-4x]", "adapter.alpha=1e5",
    "model.name=~nobody/x", "model.revision='1e-4'", "data.validation=x.csv[:10%]",
    "data.validation={fraction: .1, from: train}", "adapter.rank_pattern={a.b: 3, 'x: y': 4}",
    "train.optimizer.groups.layers={0-5: {learning_rate: 1e-5}}", "train.max_grad_norm=~",
    "output_dir='a\\b'", 'output_dir="a\\tb\\nc\\x85d"', "output_dir=😀", "evaluate.metrics=[]",
    "evaluate.best={}", "data.format={delimiter: '\t', columns: ['1', 'true', '~']}",
    "train.optimizer.betas=[0, 5e-1]", "data.split_seed=4294967295", "adapter.use_rslora=TRUE",
]  # fmt: skip
FRAGMENTS = [
    "model:", "task:", "data:", "adapter:", "train:", "\n", "\n  ", "\n\t", "  ", ": ", "- ", "? ",
    "{", "}", "[", "]", ",", "#", "---\n", "...\n", "%YAML 1.1\n", "%YAML 9.9\n", "%TAG ! tag:x:\n",
    "<<: *a", "&a ", "*a", "<<: {rank: 3}", "\ufeff", "\x00", "\udc80", "\r\n", "\r", "\x85", "\\",
    "name: m", "type: causal_lm", "path: rows.csv", "rank: 8", "rank: 8\nrank: 9",
    *ATTACKS, *SCALARS[:40],
]  # fmt: skip
word = st.sampled_from([*KEYS, "rnk", "learning_rat", "", "0", "a.b", "é", "<<", "__class__"])
scalar = st.sampled_from(SCALARS + ATTACKS) | st.text(max_size=20)
value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | word,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(word, inner, max_size=4),
    max_leaves=12,
)


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def bomb(draw: st.DrawFn) -> str:
    """Return nested aliases, or one that contains itself."""
    width, depth = draw(st.integers(2, 12)), draw(st.integers(2, 14))
    if draw(st.booleans()):
        return f"model: &a [{', '.join(['*a'] * width)}]\n"
    lines = ["a0: &a0 [x]"]
    for i in range(1, depth):
        ones = ", ".join([f"*a{i - 1}"] * width)
        merged = f"&a{i} {{<<: [{ones}]}}" if draw(st.booleans()) else f"&a{i} [{ones}]"
        lines.append(f"a{i}: {merged}")
    return "\n".join(lines) + "\n"


@st.composite
def junk(draw: st.DrawFn) -> Case:
    """Return bytes, text, and pieces of YAML in any order."""
    match draw(st.integers(0, 4)):
        case 0:
            return Case(draw(st.binary(max_size=200)))
        case 1:
            text = draw(st.text(st.characters(exclude_categories=[]), max_size=200))
            return Case(text.encode("utf-8", "surrogatepass"))
        case 2:
            codec = draw(st.sampled_from(["utf-16", "utf-32", "utf-8-sig", "cp932", "latin-1"]))
            return Case(draw(st.sampled_from(list(CONFIGS.values()))).encode(codec, "replace"))
        case 3:
            return Case(encoded(bomb(draw)))
        case _:
            pieces = draw(st.lists(st.sampled_from(FRAGMENTS), max_size=25))
            return Case(encoded("".join(pieces)))


def leaves(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every key and item of a tree."""
    items = node.items() if isinstance(node, dict) else ()
    items = enumerate(node) if isinstance(node, list) else items
    for key, child in items:
        yield (*path, key)
        yield from leaves(child, (*path, key))


def copied(node: Any) -> Any:
    return json.loads(json.dumps(node))


@st.composite
def wrong_types(draw: st.DrawFn) -> Case:
    """The structure of a recipe with values of other kinds, as JSON, which is YAML."""
    tree = copied(draw(st.sampled_from(TREES)))
    paths = list(leaves(tree))
    for path in draw(st.lists(st.sampled_from(paths), min_size=1, max_size=3)):
        node = tree
        try:
            for part in path[:-1]:
                node = node[part]
            node[path[-1]] = draw(value)
        except (KeyError, TypeError, IndexError):  # an earlier change took it away
            continue
    return Case(json.dumps(tree, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass"))


def change_line(draw: st.DrawFn, lines: list[str], i: int) -> None:
    key, colon, rest = lines[i].partition(":")
    match draw(st.integers(0, 7)):
        case 0:
            del lines[i : i + draw(st.integers(1, 3))]
        case 1:
            lines.insert(i, draw(st.sampled_from(lines)))
        case 2 if colon:  # another value
            lines[i] = f"{key}: {draw(scalar)}\n"
        case 3 if colon:  # another name
            at = draw(st.integers(0, len(key)))
            other = draw(word) if draw(st.booleans()) else key[:at] + key[at + 1 :]
            lines[i] = f"{other}:{rest}"
        case 4:
            lines[i] = draw(st.sampled_from(["  ", "    ", "\t", ""])) + lines[i].lstrip()
        case 5:
            other = draw(st.integers(0, len(lines) - 1))
            lines[i], lines[other] = lines[other], lines[i]
        case 6:
            at = draw(st.integers(0, len(lines[i])))
            odd = draw(st.sampled_from(FRAGMENTS))
            lines[i] = lines[i][:at] + odd + lines[i][at:]
        case _:
            lines[i] = draw(st.sampled_from(["", "#", "---\n", "adapter: "])) + lines[i]


@st.composite
def mutated(draw: st.DrawFn) -> Case:
    """The project's own recipes with keys renamed, values replaced, lines moved or lost."""
    lines = draw(st.sampled_from(list(CONFIGS.values()))).splitlines(keepends=True)
    for _ in range(draw(st.integers(1, 4))):
        if lines:
            change_line(draw, lines, draw(st.integers(0, len(lines) - 1)))
    if draw(st.booleans()):
        lines.append(f"{draw(word)}: {draw(scalar)}\n")
    raw = bytearray(encoded("".join(lines)))
    if raw and draw(st.integers(0, 9)) == 0:
        raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
    return Case(bytes(raw))


@st.composite
def flagged(draw: st.DrawFn) -> Case:
    """A whole recipe with odd `--set` flags."""
    flags = []
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(PATHS) | st.lists(word, min_size=1, max_size=4).map(".".join))
        match draw(st.integers(0, 8)):
            case 6 | 7 | 8:
                flags.append(draw(st.sampled_from(SOUND)))
            case 0:
                flags.append(draw(st.text(st.characters(exclude_categories=[]), max_size=30)))
            case 1:
                flags.append(f"{key}={json.dumps(draw(value))}")
            case _:
                flags.append(f"{key}={draw(scalar)}")
    return Case(encoded(draw(st.sampled_from(list(CONFIGS.values())))), tuple(flags))


cases = st.one_of(junk(), wrong_types(), mutated(), flagged())


# ------------------------------------------------------------------------------- what must hold

_watched: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is None:
        return
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if writes or event.startswith(FORBIDDEN):
        _watched.append(f"{event} {arguments}")


sys.addaudithook(_audit)


@contextmanager
def no_code_runs() -> Iterator[None]:
    """Refuse that code in a recipe runs, or that its reading writes: by Python's audit events."""
    global _watched
    _watched = []
    try:
        yield
        assert _watched == [], _watched
    finally:
        _watched = None


@contextmanager
def bounded() -> Iterator[None]:
    """Let a block add no more than some memory to the process, and take only some time."""
    statm = Path("/proc/self/statm")  # where there is none, memory is not bounded
    before = resource.getrlimit(resource.RLIMIT_AS)
    if statm.exists():
        pages = int(statm.read_text().split()[0])
        most = pages * resource.getpagesize() + MEGABYTES * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    start = time.process_time()
    try:
        yield
        assert time.process_time() - start < SECONDS
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def load_or_reject(case: Case, file: Path) -> str:
    """Read a recipe and return what came of it, having checked that it came well.

    Raises:
        AssertionError: If an error says too little, something ran, or a recipe that loads is not
            the same when it is written and read again.
    """
    file.write_bytes(case.raw)
    try:
        with no_code_runs(), bounded():
            recipe = load_recipe(file, case.flags)
        rejected = None
    except LoraError as error:
        rejected = error
    if rejected is not None:
        assert rejected.exit_code == 2
        assert rejected.problems
        for problem in rejected.problems:
            check_problem(problem, file, case)
        return kind_of(rejected.problems[0])
    again = file.with_name("again.yaml")
    dumped = dump_recipe(recipe)
    again.write_text(dumped, encoding="utf-8", newline="")
    loaded = load_recipe(again)
    assert loaded.model_dump() == recipe.model_dump()
    assert dump_recipe(loaded) == dumped
    return "read"


def check_problem(problem: Problem, file: Path, case: Case) -> None:
    """Check that a problem has a place that exists, and that its text reads well."""
    text = str(problem)
    lines = text.split("\n")
    assert len(lines) == 3, repr(text)  # what, where and how to fix it, a line each
    assert all(line.isprintable() and len(line) <= 1020 for line in lines), repr(text)
    at = problem.at or ""
    flagged = [flag for flag in case.flags if f"--set {flag}" in at]
    place = re.search(re.escape(str(file)) + r":(\d+)", at)
    assert flagged or place, f"no place: {problem!r}"
    if place:
        ends = re.findall(r"\r\n|[\r\n\x85\u2028\u2029]", case.raw.decode("utf-8", "replace"))
        assert 1 <= int(place[1]) <= len(ends) + 1, problem
    if match := re.fullmatch(r"unknown key `(.*)`", problem.what, re.DOTALL):
        listed = (
            r"known keys here: (?P<here>.+)|it is not for `type: .*\(known keys: (?P<these>.+)\)"
        )
        meant = re.fullmatch(rf"did you mean `([^`]+)`\?|{listed}", problem.hint or "")
        assert meant, problem
        known = meant["here"] or meant["these"]
        here = known.split(", ") if known else [meant[1].rsplit(".", 1)[-1]]
        assert set(here) <= set(KEYS), problem
        assert not meant["here"] or nearest(match[1], here) is None, problem


def kind_of(problem: Problem) -> str:
    """Return a problem without what is particular to it."""
    return re.sub(r"`[^`]*`|U\+\w+|\d[\d,]*", "…", printable(problem.what))[:70]


def main(count: int, number: int) -> int:
    """Run so many cases and print what came of them."""
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # where an attack would leave its mark

        @seed(number)
        @settings(
            max_examples=count, deadline=None, database=None, derandomize=False,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=cases)
        def run(case: Case) -> None:
            nonlocal slowest
            began = time.process_time()
            outcomes[load_or_reject(case, Path("recipe.yaml"))] += 1
            slowest = max(slowest, time.process_time() - began)
            assert not Path("pwned").exists()

        run()
        os.chdir(ROOT)
    for name, times in outcomes.most_common():
        sys.stdout.write(f"{times:7,}  {name}\n")
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    sys.stdout.write(
        f"{outcomes.total():7,}  cases in {time.time() - start:.0f} s; slowest {slowest:.2f} s; "
        f"at most {used} MB; seed {number}\n"
    )
    return 0


if __name__ == "__main__":
    arguments = [int(argument) for argument in sys.argv[1:]]
    sys.exit(main(arguments[0] if arguments else 10_000, arguments[1] if arguments[1:] else 0))
