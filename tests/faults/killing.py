"""Kills runs for real, again and again, and looks whether the result is that of a run left alone.

A process that has imported everything and computed nothing (`Nursery`) forks the runs, so that
each starts in a moment. Beside a run, a process of its own waits for the time to send it a signal:
some time after the start, or after it began to save, to evaluate, or to make a step.

usage: python tests/faults/killing.py [KILLS (200)] [SEED (0)]
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import itertools
import json
import logging
import os
import pkgutil
import random
import resource
import select
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

Json = dict[str, Any]
STEPS = 15
IMPORTED = (  # what a run imports, some of it late
    "lora_cli.training", "datasets", "evaluate", "matplotlib.figure", "sklearn.metrics",
    "matplotlib.backends.backend_agg", "transformers.models.llama.modeling_llama",
    "transformers.models.roberta.modeling_roberta", "lora_cli.tasks.causal_lm",
    "lora_cli.tasks.sequence_classification", "lora_cli.data.chat_formats",
    "lora_cli.data.text_columns", "lora_cli.data.unsupported_rows", "rich._emoji_codes",
    "torch.profiler._cupti_monitor", "encodings.utf_8_sig", "encodings.utf_32_le",
)  # fmt: skip

# fmt: off
RUNS: dict[str, Json] = {
    "accumulation, dropout": {
        "adapter": {"dropout": 0.3}, "train": {"gradient_accumulation_steps": 2}},
    "workers, length grouping": {
        "train": {"workers": 2, "group_by_length": True},
        "checkpoint": {"every_steps": 2, "keep": 1}},
    "packing, dropout": {
        "base": "llama", "task": {"max_length": 48},
        "adapter": {"dropout": 0.2, "target_modules": "all-linear"},
        "train": {"packing": True, "micro_batch_size": 1, "gradient_accumulation_steps": 2}},
    "packing, workers, checkpoints at once": {
        "base": "llama", "task": {"max_length": 48},
        "train": {"packing": True, "workers": 2, "micro_batch_size": 1},
        "checkpoint": {"every_steps": 1}},
    "full, early stopping": {
        "adapter": {"type": "full"},
        "evaluate": {"every_steps": 2, "best": {"metric": "loss"},
                     "early_stopping": {"patience": 9}}},
    "streaming, momentum": {
        "data": {"train": "train.jsonl", "validation": "validation.jsonl", "streaming": True},
        "train": {"optimizer": {"type": "sgd", "learning_rate": 0.1, "momentum": 0.9}}},
    "two processes": {"processes": 2, "adapter": {"dropout": 0.3}},
    "two processes, workers, accumulation": {
        "processes": 2, "train": {"workers": 1, "gradient_accumulation_steps": 2}},
}
# fmt: on


class Whole(NamedTuple):
    """A run that was left alone."""

    recipe: Path
    out: Path
    processes: int
    seconds: float


@dataclass
class Kill:
    """When a run is sent a signal: so many seconds after something has begun."""

    seconds: float
    at: str = "start"
    """`start`, or one of `MOMENTS`."""
    times: int = 1
    """Which save, evaluation or step of the run, counted from 1."""
    signal: int = signal.SIGKILL
    again: float | None = None
    """Seconds after which the signal is sent once more."""
    group: bool = False
    """Whether the processes that it has started get it too."""
    note: str = ""
    """File that is made when the signal has been sent."""
    rank: int = 0
    """Which of the processes gets it."""
    alone: bool = False
    """Whether the others are left to end by themselves when this one is killed."""


MOMENTS = {  # what is called then
    "load": "lora_cli.training.load_trainable_model.make_trainable",
    "step": "lora_cli.training.run.train_step",
    "evaluate": "lora_cli.training.run_evaluations.evaluate",
    "publish": "lora_cli.training.save_and_resume.publish_adapter",
    "save": "lora_cli.training.save_and_resume.save_checkpoint",
    "finish": "lora_cli.training.run.finish",
    "upload": "fsspec.implementations.local.LocalFileSystem.put_file",
    "restore": "lora_cli.training.mirror._move",
}


@dataclass
class Outcome:
    """What became of a run that was killed."""

    kills: int = 0
    in_saves: int = 0
    too_late: int = 0
    """Kills that found the run complete."""
    differences: list[str] = field(default_factory=list)


def write_recipe(folder: Path, name: str) -> tuple[Path, int]:
    """Write the rows and the recipe of one of `RUNS`; return it, and its number of processes."""
    import tiny

    sections = dict(RUNS[name])
    processes = sections.pop("processes", 1)
    kind = sections.pop("base", "encoder")
    base = folder / kind
    if not base.exists():
        (tiny.save_llama if kind == "llama" else tiny.save_encoder)(base)
    texts = [f"{text} {end}" for end in ("then", "but so", "and so on") for text in tiny.CORPUS]
    for split, part in {
        "train": texts[:11],
        "validation": texts[11:16],
        "test": texts[16:],
    }.items():
        rows = [json.dumps({"text": t, "label": i % 2}) + "\n" for i, t in enumerate(part)]
        (folder / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")
    data = {split: f"{split}.jsonl" for split in ("train", "validation", "test")}
    often = {"data": data, "evaluate": {"every_steps": 5}, "checkpoint": {"every_steps": 3}}
    sections = often | sections
    sections["train"] = {
        "max_steps": STEPS, "micro_batch_size": 2, "log_every_steps": 2,
        "optimizer": {"type": "adamw", "learning_rate": 0.01}, **sections.get("train", {}),
    }  # fmt: skip
    path = tiny.recipe(base, folder, **sections)
    target = folder / f"{list(RUNS).index(name)}.yaml"
    path.rename(target)
    return target, processes


# ------------------------------------------------------------------------------- forking the runs


class Nursery:
    """Forks runs from a process that has imported `lora_cli` and computed nothing."""

    def __enter__(self) -> Nursery:
        """Import what a run imports, and fork; before that this process should compute nothing."""
        for module in IMPORTED:
            with contextlib.suppress(ModuleNotFoundError):  # of another version of a library
                importlib.import_module(module)
        from transformers import conversion_mapping

        # a thousand patterns, which each run would compile again: a sixth of its time
        conversion_mapping.get_checkpoint_conversion_mapping("llama")
        asked, ask = os.pipe()
        told, tell = os.pipe()
        self.process = os.fork()
        if self.process == 0:
            try:
                nursery(asked, tell)
            finally:
                os._exit(1)
        os.close(asked)
        os.close(tell)
        self.requests, self.answers = os.fdopen(ask, "w"), os.fdopen(told)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.requests.close()  # which ends it
        self.answers.close()
        os.waitpid(self.process, 0)

    def run(
        self,
        recipe: Path,
        out: Path,
        processes: int = 1,
        kill: Kill | None = None,
        sets: Sequence[str] = (),
        resume: bool = True,
        limits: Sequence[tuple[int, int]] = (),
        squeeze: tuple[str, int] | None = None,
        others: Sequence[str] = (),
        ignored: Sequence[int] = (),
        threads: int = 1,
    ) -> list[int]:
        """Run `lora train RECIPE -o OUT --resume`; return how each of its processes ended.

        Args:
            recipe: The recipe.
            out: The output folder; `OUT.0.log` gets what the first process says.
            processes: How many form the run. When one is killed, all are.
            kill: What signal the first gets, and when.
            sets: Overrides of the recipe.
            resume: Whether `--resume` is given.
            limits: Resources and how much of each the system allows.
            squeeze: One of `MOMENTS`, and bytes of memory that may be taken from then on.
            others: Further overrides, of all processes but the first.
            ignored: Signals that the run finds ignored, as under `nohup`.
            threads: How many threads compute.

        Returns:
            Exit codes; a negative number is a signal.
        """
        return self._ask(
            recipe=str(recipe), out=str(out), processes=processes, sets=list(sets),
            kill=kill and asdict(kill), resume=resume, limits=list(limits), squeeze=squeeze,
            others=list(others), ignored=list(ignored), threads=threads,
        )  # fmt: skip

    def command(
        self,
        arguments: Sequence[str],
        out: Path,
        kill: Kill | None = None,
        pipe: Path | None = None,
    ) -> int:
        """Run `lora ARGUMENTS` as a shell starts it, and return its exit code.

        Args:
            arguments: The command line after `lora`.
            out: `OUT.0.out` gets what is written to stdout, and `OUT.0.log` what is to stderr.
            kill: What signal the command gets, and when.
            pipe: A named pipe that gets both instead.
        """
        (code,) = self._ask(
            arguments=list(arguments), out=str(out), processes=1, kill=kill and asdict(kill),
            limits=[], squeeze=None, ignored=[], threads=1, pipe=pipe and str(pipe),
        )  # fmt: skip
        return code

    def _ask(self, **request: Any) -> list[int]:
        self.requests.write(json.dumps(request) + "\n")
        self.requests.flush()
        answer: list[int] = json.loads(self.answers.readline())
        return answer


def nursery(asked: int, tell: int) -> None:
    """Fork a run for each line that is asked, and answer how it ended.

    Args:
        asked: A file descriptor to read from.
        tell: A file descriptor to write to.
    """
    _forget_the_parent(asked, tell)
    from lora_cli.cli.options import quiet_libraries
    from lora_cli.training import mirror

    mirror.PAUSE_S = 0.05  # nobody here waits for a store that is away for seconds
    quiet_libraries()
    gc.collect()
    gc.freeze()  # a run that collects garbage would write to, and so copy, every page from here
    for line in os.fdopen(asked):
        request = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        children = []
        for rank in range(request["processes"]):
            child = os.fork()
            if child == 0:
                _run(request, rank, port)
            children.append(child)
        ends = _wait_for(children, spare=bool((request["kill"] or {}).get("alone")))
        os.write(tell, json.dumps(ends).encode() + b"\n")


def _forget_the_parent(*used: int) -> None:
    """Leave streams, files, log handlers and filters of warnings to the process before the fork."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1):
        os.dup2(null, number)
    faulthandler.disable()  # it would write into a file that is closed here
    for number in map(int, os.listdir("/proc/self/fd")):
        if number > 2 and number not in used:
            with suppress(OSError):
                os.close(number)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, errors="backslashreplace")  # noqa: SIM115
    sys.argv = ["lora"]
    logging.getLogger().handlers.clear()
    warnings.resetwarnings()
    warnings.simplefilter("ignore", DeprecationWarning)
    os.environ |= {"ACCELERATE_USE_CPU": "true", "TOKENIZERS_PARALLELISM": "false",
                   "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # fmt: skip


def _wait_for(children: list[int], spare: bool = False) -> list[int]:
    """Return how processes ended; when one is killed the others are too, as by a launcher."""
    ends: dict[int, int] = {}
    while len(ends) < len(children):
        child, status = os.waitpid(-1, 0)
        if child in children:
            ends[child] = os.waitstatus_to_exitcode(status)
            if ends[child] < 0 and not spare:
                for other in set(children) - set(ends):
                    os.kill(other, signal.SIGKILL)
    return [ends[child] for child in children]


def _run(request: Json, rank: int, port: str) -> None:
    """Train in this process, which a process of its own kills at the moment that is asked for."""
    log = os.open(request["out"] + f".{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdin.close()
    import torch

    torch.set_num_threads(request["threads"])
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    if request["processes"] > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(request["processes"]),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
    for which, amount in request["limits"]:
        resource.setrlimit(which, (amount, amount))
    if request["kill"] is not None and rank == request["kill"]["rank"]:
        _await_death(Kill(**request["kill"]))
    if request["squeeze"] is not None:
        at, amount = request["squeeze"]
        _when(at, lambda: _squeeze(amount))
    code = 1
    try:
        code = _command(request) if "arguments" in request else _train(request, rank)
    except BaseException:
        import traceback

        os.write(log, traceback.format_exc().encode())
    finally:
        os._exit(code)


def _train(request: Json, rank: int) -> int:
    """Train, and return the exit code."""
    from lora_cli.errors import LoraError
    from lora_cli.recipe import load_recipe
    from lora_cli.training import train

    sets = [f"output_dir={request['out']}", *request["sets"]]
    sets += request["others"] if rank else []
    try:
        train(load_recipe(Path(request["recipe"]), sets), resume=request["resume"])
    except SystemExit as error:
        return int(error.code or 0)
    except LoraError as error:
        os.write(2, f"{error}\n".encode())
        return error.exit_code
    return 0


def _command(request: Json) -> int:
    """Run the command line with streams of its own, and return the exit code."""
    from lora_cli.cli.app import main

    pipe = request["pipe"]
    place = pipe or request["out"] + ".0.out"
    output = os.open(place, os.O_WRONLY | (0 if pipe else os.O_CREAT | os.O_TRUNC))
    for number in (1, 2) if pipe else (1,):
        os.dup2(output, number)
    os.close(output)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    sys.argv = ["lora", *request["arguments"]]
    try:
        main()
    except SystemExit as error:
        sys.stdout.flush()
        sys.stderr.flush()
        return int(error.code or 0)
    return 0


def _await_death(kill: Kill) -> None:
    """Fork the process that sends this one the signal."""
    told, tell = os.pipe()
    if os.fork() == 0:
        os.close(tell)
        for _ in range(kill.times if kill.at != "start" else 0):
            if not os.read(told, 1):
                os._exit(0)  # the run ended before
        for seconds in (kill.seconds, kill.again):
            if seconds is not None:
                _wait_until_over(told, seconds)
                for pid in [os.getppid()] if not kill.group else _family(os.getppid()):
                    os.kill(pid, kill.signal)
                if kill.note:
                    Path(kill.note).touch()
        os._exit(0)
    # `told` stays open here, so that it can be told of what happens after the signal too
    if kill.at != "start":
        exactly = itertools.count(1)

        def announce() -> None:
            number = next(exactly)
            os.write(tell, b".")
            if number == kill.times and kill.signal == signal.SIGKILL and not kill.seconds:
                signal.pause()  # here, and not a moment later

        _when(kill.at, announce)


def _when(at: str, then: Callable[[], Any]) -> None:
    """Let something happen whenever one of `MOMENTS` has come."""
    path, _, name = MOMENTS[at].rpartition(".")
    place = pkgutil.resolve_name(path)
    real = getattr(place, name)

    def announced(*arguments: Any, **named: Any) -> Any:
        then()
        return real(*arguments, **named)

    setattr(place, name, announced)


def _squeeze(amount: int) -> None:
    """Let this process take no more memory than so many bytes, from the first call on."""
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + amount
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _family(pid: int) -> list[int]:
    """Return a process and those that it has started, but this one."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(int(child) for child in children if int(child) != os.getpid())]


def _wait_until_over(told: int, seconds: float) -> None:
    """Wait, and end this process if the run that it watches ends meanwhile."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if select.select([told], [], [], left)[0] and not os.read(told, 1):
            os._exit(0)


# ------------------------------------------------------------------------------- judging the runs


def measure(nest: Nursery, folder: Path, name: str) -> Whole:
    """Run one of `RUNS` unharmed, as `folder/whole`."""
    recipe, processes = write_recipe(folder, name)
    began = time.monotonic()
    ends = nest.run(recipe, folder / "whole", processes)
    assert ends == [0] * processes, (folder / "whole.0.log").read_text()[-3000:]
    return Whole(recipe, folder / "whole", processes, time.monotonic() - began)


def torment(
    nest: Nursery, folder: Path, whole: Whole, kills: int, chance: random.Random
) -> Outcome:
    """Kill a run so many times, half of them in a save; let it end; compare the results."""
    from runs import differences

    outcome = Outcome()
    recipe, _, processes, seconds = whole
    out, number = folder / "cut-0", 0
    while outcome.kills < kills or not (out / "report.json").exists():
        kill = None
        if outcome.kills < kills:
            if chance.random() < 0.5:
                kill = Kill(chance.uniform(0, 0.03), "save", chance.randint(1, 4))
            else:
                kill = Kill(chance.uniform(0, 0.9 * seconds))
        ends = nest.run(recipe, out, processes, kill)
        killed = -signal.SIGKILL in ends
        outcome.kills += killed
        outcome.in_saves += killed and kill is not None and kill.at == "save"
        if not killed:
            outcome.too_late += kill is not None
            if ends != [0] * processes:
                text = Path(f"{out}.0.log").read_text()[-3000:]
                outcome.differences.append(f"ended with {ends}\n{text}")
                return outcome
            outcome.differences += differences(whole.out, out)
            number += 1
            out = folder / f"cut-{number}"
            if outcome.kills >= kills:
                return outcome
    return outcome


def main() -> None:
    """Kill runs of every kind, and print a line for each kind."""
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    chance, total, bad, began = random.Random(seed), 0, 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder, Nursery() as nest:
        for i, name in enumerate(RUNS):
            share = (kills * (i + 1)) // len(RUNS) - (kills * i) // len(RUNS)
            place = Path(folder) / str(i)
            place.mkdir()
            found = torment(nest, place, measure(nest, place, name), share, chance)
            total, bad = total + found.kills, bad + len(found.differences)
            counts = f"{found.kills:4} kills, {found.in_saves:4} in a save"
            say(f"{name:42} {counts}, {len(found.differences)} differences")
            for difference in found.differences:
                say(f"  {difference}")
    say(f"{total} kills, {bad} differences, {time.monotonic() - began:.0f} s, seed {seed}")
    sys.exit(1 if bad else 0)


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
