"""Measure the speed and memory of `lora train` beside PEFT, PEFT with Liger, and Unsloth.

usage:
  python scripts/speed.py NAME … | all  [--work DIR] [--table FILE] [--sides ours,peft,…]
      [--steps N] [--repeat 1] [--cap GIB] [--limit SECONDS] [--warm] [--tiny] [--make-only]

NAME is a row of the table ROWS in speed_rows.py. For each row, a model with random weights, the
rows of data and the recipe are written to DIR/NAME, and every side trains on them in turn, each
time in a new process: the same rows in the same order, with the same rank, optimizer and precision.
Rows with the same base share its folder. The table is written to the end of FILE after each run, so
that nothing is lost with a killed process, and printed after each row:

- tokens (without padding) or examples a second: the median of the lines of the log after the first
  quarter of the steps, in the best repetition;
- the peak of the allocated GPU memory (on a CPU: of the process's memory);
- the seconds from the start of the process to the end of the first and of the last step, with the
  compilers' caches empty (`--warm`: as they are); `≈`: how long 300 steps would take at that rate;
- the mean loss of the second half of the steps. Initial weights and dropout differ between sides.

Sides: ours (`lora train` with `train.kernels: fused`, as `auto` does in long runs), offload (with
`train.gradient_checkpointing: offload`), auto (as `lora train` does in so short a run), peft, liger
and unsloth. `--cap` limits the GPU memory of a process. `--limit` ends a process that takes longer.
`--tiny` replaces the models, rows and batches by tiny ones, to try this script on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from speed_rows import ROWS, Row, make

SCRIPTS = Path(__file__).resolve().parent
SIDES = {
    "ours": "`lora train`",
    "offload": "`lora train`, `offload`",
    "auto": "`lora train`, not compiled (`auto`)",
    "peft": "PEFT + Trainer",
    "liger": "PEFT + Trainer + Liger",
    "unsloth": "Unsloth + Trainer",
}
OVERRIDES = {
    "ours": [],
    "offload": ["--set", "train.gradient_checkpointing=offload"],
    "auto": ["--set", "train.kernels=auto"],
}
PACKAGES = {"peft": ["peft"], "liger": ["peft", "liger_kernel"], "unsloth": ["unsloth"]}


def limit_memory(gib: float) -> None:
    """Let this process have so many GiB of the GPU's memory; 0 is no limit."""
    if gib:
        import torch

        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total))


def environment(caches: Path | None = None) -> dict[str, str]:
    """Return the environment of a process, with folders for what compilers cache."""
    paths = (str(SCRIPTS), str(SCRIPTS.parent), os.environ.get("PYTHONPATH"))
    changes = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "UNSLOTH_DISABLE_STATISTICS": "1",  # it would wait for the network
    }
    if caches is not None:
        changes["TORCHINDUCTOR_CACHE_DIR"] = str(caches / "inductor")
        changes["TRITON_CACHE_DIR"] = str(caches / "triton")
    return os.environ | changes


@dataclass
class Measured:
    """A side's figures in one repetition; `failure` says why there are none."""

    rate: float = 0.0
    peak_gib: float = 0.0
    first_s: float = 0.0
    last_s: float = 0.0
    loss: float = 0.0
    seconds_per_step: float = 0.0
    failure: str = ""


def measure(side: str, row: Row, folder: Path, args: argparse.Namespace, cold: bool) -> Measured:
    """Train in a process of its own, and return what it took."""
    needed = PACKAGES.get(side, []) + ["bitsandbytes"] * (
        side in PACKAGES and row.quantization == "nf4"
    )
    if missing := [name for name in needed if not find_spec(name)]:
        return Measured(failure=f"not installed: {', '.join(missing)}")
    out, caches = folder / "out", None if args.warm else folder / f"caches-{side}"
    if cold and caches is not None:
        shutil.rmtree(caches, ignore_errors=True)
    shutil.rmtree(out, ignore_errors=True)
    if side in PACKAGES:
        code = f"import speed_peers; speed_peers.train({side!r}, {str(folder)!r})"
        more = []
    else:
        code = "from lora_cli.cli.app import main; main()"
        more = ["train", str(folder / "recipe.json"), "-o", str(out), *OVERRIDES[side]]
    code = f"import speed; speed.limit_memory({args.cap}); {code}"
    if side == "unsloth":  # which wants to be imported first
        code = f"import unsloth; {code}"
    seconds, failure = run([sys.executable, "-c", code, *more], folder, side, caches, args.limit)
    if not failure:
        try:
            return figures(row, folder, out, seconds, check_order=side not in PACKAGES)
        except ValueError as error:
            failure = str(error)
    return Measured(failure=failure)


def run(
    command: list[str], folder: Path, side: str, caches: Path | None, limit: float
) -> tuple[dict[int, float], str]:
    """Run a command.

    Returns:
        The seconds from its start to each step that it reported, and why it failed, if it did.
    """
    seconds: dict[int, float] = {}
    last, start = deque[str](maxlen=60), time.monotonic()
    # in a folder of its own, since Unsloth writes code into the current one
    with (
        (folder / f"{side}.log").open("w") as log,
        subprocess.Popen(
            command,
            cwd=folder,
            env=environment(caches),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        ) as process,
    ):
        timer = threading.Timer(limit, process.kill)
        timer.start()
        assert process.stderr is not None
        try:
            for line in process.stderr:
                log.write(line)
                last.append(line.strip())
                if step := re.match(r"step +(\d+)/\d+ +loss", line):
                    seconds.setdefault(int(step[1]), time.monotonic() - start)
            code = process.wait()
        finally:
            timer.cancel()
            process.kill()
    if not code:
        return seconds, ""
    if time.monotonic() - start >= limit:
        return seconds, f"stopped after {limit:.0f} s"
    return seconds, failure_in([line for line in last if line] or [f"exit status {code}"])


def failure_in(lines: Sequence[str]) -> str:
    """Return the line that says why a process failed, of the last lines that it wrote."""
    if any(
        re.search(r"OutOfMemoryError|out of memory|memory is full while", line) for line in lines
    ):
        return "out of memory"
    errors = [line for line in lines if line.startswith("error:")]  # with a hint below
    return "failed: " + (errors or lines)[-1][:160].replace("|", "/")


def figures(
    row: Row, folder: Path, out: Path, seconds: dict[int, float], check_order: bool
) -> Measured:
    """Return the figures of a run from its log.

    Raises:
        ValueError: If it trained on other rows or tokens than planned.
    """
    order = json.loads((folder / "order.json").read_text())
    steps, step_size = len(order["tokens"]), row.batch * row.accumulate
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    if check_order:
        samples = map(json.loads, (out / "samples.jsonl").read_text().splitlines())
        if [sample["examples"] for sample in samples] != order["examples"]:
            raise ValueError("failed: the examples were not trained in the planned order")
    before = 0
    for line in lines:
        planned = sum(order["tokens"][before : line["step"]]) / step_size / (line["step"] - before)
        counted = line["tokens_per_s"] / line["examples_per_s"]  # tokens of an example, both
        rounding = 0.005 / line["examples_per_s"]  # which is logged with two decimals
        if abs(counted / planned - 1) > 0.01 + rounding:
            raise ValueError(f"failed: {counted:.1f} tokens an example, but {planned:.1f} planned")
        before = line["step"]
    if before != steps:
        raise ValueError(f"failed: it ended at step {before} of {steps}")
    rate = "tokens_per_s" if row.is_llama else "examples_per_s"
    rated = [line for line in lines if line["step"] > steps // 4]
    per_step = step_size * (row.length if row.is_llama else 1)
    median = statistics.median(line[rate] for line in rated)
    losses = [line["loss"] for line in lines if line["step"] > steps // 2]
    peak = json.loads((out / "report.json").read_text())["training"]["peak_memory_bytes"]
    return Measured(
        median, peak / 2**30, seconds[1], seconds[steps], statistics.mean(losses), per_step / median
    )


# -------------------------------------------------------------------------------------- the table


def machine() -> str:
    """Return the name of the card, today's date, and the versions of the packages."""
    code = """if True:
        import importlib.metadata as metadata, torch
        print(torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU")
        print(f"torch {torch.__version__}")
        for name in ("transformers", "peft", "bitsandbytes", "liger-kernel", "unsloth"):
            try:
                print(name, metadata.version(name))
            except metadata.PackageNotFoundError:
                pass"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    card, *versions = done.stdout.splitlines()
    return f"{card}, {time.strftime('%Y-%m-%d')}; {', '.join(versions)}"


HEAD = """| work | with | speed | peak | first step | last step | 300 steps | loss |
|---|---|---|---|---|---|---|---|"""


def table_line(name: str, row: Row, side: str, repeats: Sequence[Measured], steps: int) -> str:
    """Return a line of the Markdown table: the best rate, and the times of the first repetition."""
    good = [measured for measured in repeats if not measured.failure]
    start = f"| `{name}`: {row} | {SIDES[side]} |"
    if not good:
        return f"{start} {repeats[-1].failure} | | | | | |"
    best, first = max(good, key=lambda measured: measured.rate), good[0]
    rest = max(0, 300 - steps) * best.seconds_per_step
    whole = f"≈ {first.last_s + rest:.0f} s" if steps != 300 else f"{first.last_s:.0f} s"
    cells = [
        f"{best.rate:,.0f} {'tokens' if row.is_llama else 'examples'}/s",
        f"{best.peak_gib:.1f} GiB",
        f"{first.first_s:.1f} s",
        f"{first.last_s:.1f} s ({steps})",
        whole if steps <= 300 else "",
        f"{first.loss:.4f}",
    ]
    return f"{start} {' | '.join(cells)} |"


def speed(args: argparse.Namespace) -> None:
    """Measure every row with every side in turn, and write the table after each run."""
    work = Path(args.work or tempfile.mkdtemp(prefix="lora-speed-")).resolve()
    file = Path(args.table).resolve() if args.table else None
    before = file.read_text() if file and file.exists() else ""
    lines = [f"\n{machine()}\n", HEAD]
    print(lines[0])
    for name in ROWS if args.names == ["all"] else args.names:
        row = ROWS[name].tiny() if args.tiny else ROWS[name]
        steps = args.steps or (20 if row.is_llama else 300)
        make(row, work / name, steps)
        if args.make_only:
            print(work / name / "recipe.json")
            continue
        found: dict[str, list[Measured]] = {}
        of_row: list[str] = []
        for repeat in range(args.repeat):
            for side in (side for side in args.sides.split(",") if side in row.sides):
                measured = measure(side, row, work / name, args, cold=repeat == 0)
                print(table_line(name, row, side, [measured], steps), file=sys.stderr, flush=True)
                found.setdefault(side, []).append(measured)
                of_row = [table_line(name, row, s, found[s], steps) for s in found]
                if file:
                    file.write_text("\n".join([before, *lines, *of_row, ""]))
        lines += of_row
        print("\n".join([HEAD, *of_row, ""]), flush=True)
        shutil.rmtree(work / name / "out", ignore_errors=True)
    if not args.work:
        shutil.rmtree(work)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", choices=["all", *ROWS], metavar="NAME")
    parser.add_argument("--work", default="")
    parser.add_argument("--table", default="")
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--cap", type=float, default=0.0)
    parser.add_argument("--limit", type=float, default=900.0)
    for flag in ("--warm", "--tiny", "--make-only"):
        parser.add_argument(flag, action="store_true")
    args = parser.parse_args(arguments)
    if unknown := set(args.sides.split(",")) - set(SIDES):
        parser.error(f"--sides: {', '.join(sorted(unknown))}; there are {', '.join(SIDES)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and end the process that trains
    speed(args)


if __name__ == "__main__":
    main()
