"""Print the progress of a run, and write its log files and trackers."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lora_cli.errors import LoraError, counted
from lora_cli.files import write_atomically
from lora_cli.redaction import redacted
from lora_cli.reporting.report import strict

GIB = 2**30


def rate_key(unit: str) -> str:
    """Return the key of the speed in logs and reports: `tokens_per_s`, `pictures_per_s`."""
    return f"{unit}s_per_s"


class RunLog:
    """The display on stderr, `metrics.jsonl`, `samples.jsonl`, and trackers.

    Args:
        folder: The output folder; None for a process that neither prints nor writes.
        total_steps: The number of steps of the run.
        step: The number of steps done.
        sizes: The size in bytes of each log file at that step; later content is cut off.
        trackers: `tensorboard`, `trackio`.
        name: The name of the run, for trackers.
        unit: The unit for the speed, besides examples.
    """

    def __init__(
        self,
        folder: Path | None,
        total_steps: int,
        step: int,
        sizes: dict[str, int],
        trackers: Sequence[str],
        name: str,
        unit: str = "token",
    ) -> None:
        self.unit = unit
        self.console = Console(stderr=True, highlight=False, quiet=folder is None)
        self.metrics: TextIO | None = None
        self.samples: TextIO | None = None
        self.trackers: list[Any] = []
        if folder is not None:
            self.trackers = [_tracker(tracker, folder, name, step) for tracker in trackers]
            self.metrics = self._open(folder / "metrics.jsonl", sizes)
            self.samples = self._open(folder / "samples.jsonl", sizes)
        self.total_steps = total_steps
        self.live = self.console.is_terminal and not self.console.quiet
        self.bar = Progress(
            TextColumn("[bold]train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.live,
            transient=True,
        )
        self.row = self.bar.add_task("train", total=total_steps, completed=step, text="")

    def __enter__(self) -> RunLog:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()
        for file in (self.metrics, self.samples):
            if file is not None:
                file.close()
        for tracker in self.trackers:
            tracker.close()

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(redacted(text), markup=False, soft_wrap=True)

    def warn_of_idle(self, parameters: list[str]) -> None:
        """Warn about trained parameters without a gradient in the first step: they do not learn."""
        if parameters:
            self.say(
                f"warning: {len(parameters)} trained parameters take no part in the model's "
                f"forward pass, `{parameters[0]}` among them; leave them out with "
                "adapter.exclude_modules"
            )

    def sample(self, step: int, examples: list[int]) -> None:
        """Write the examples of a step to `samples.jsonl`."""
        if self.samples is not None:
            self.samples.write(json.dumps({"step": step, "examples": examples}) + "\n")

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        self.bar.update(self.row, completed=step)

    def _units_of(self, record: dict[str, Any]) -> str:
        """Return the speed in the task's unit; empty if each example counts as one."""
        rate, name = record[rate_key(self.unit)], "tok" if self.unit == "token" else f"{self.unit}s"
        is_same = abs(rate - record["examples_per_s"]) <= 0.1  # they are rounded differently
        return "" if is_same else f"{rate:,.0f} {name}/s  "

    def trained(self, record: dict[str, Any], seconds_left: float) -> None:
        """Log a record of training."""
        self._write(record)
        terms = [f"{k[5:]} {v:.4f}" for k, v in record.items() if k.startswith("loss_")]
        parts = f"({', '.join(terms)})  " if terms else ""
        text = (
            f"loss {record['loss']:.4f}  {parts}lr {record['learning_rate']:.2e}  "
            f"{record['examples_per_s']:.1f} ex/s  {self._units_of(record)}"
            f"{record['memory_bytes'] / GIB:.1f} GiB{_gpu_of(record)}"
        )
        self.bar.update(self.row, text=text)
        if not self.live:
            self.say(
                f"step {record['step']:>6}/{self.total_steps}  {text}  {clock(seconds_left)} left"
            )

    def evaluated(self, step: int, epoch: float, metrics: dict[str, float], note: str) -> None:
        """Log an evaluation."""
        self._write({"step": step, "epoch": epoch, "validation": metrics})
        # for each mixed set, only print the loss; metrics.jsonl has all metrics
        shown_metrics = {k: v for k, v in metrics.items() if "/" not in k or k.endswith("/loss")}
        shown = "  ".join(f"{name} {value:.4f}" for name, value in shown_metrics.items())
        self.say(f"step {step:>6}/{self.total_steps}  validation: {shown}{note}")

    def flush(self) -> dict[str, int]:
        """Flush the logs to disk, before a checkpoint refers to them.

        Returns:
            The size in bytes of each log file, by its name.
        """
        sizes = {}
        for file in (self.metrics, self.samples):
            if file is not None:
                file.flush()
                os.fsync(file.fileno())
                sizes[Path(file.name).name] = os.fstat(file.fileno()).st_size
        return sizes

    def _open(self, path: Path, sizes: dict[str, int]) -> TextIO:
        """Open a log for appending, and truncate it to its size at the checkpoint."""
        size = sizes.get(path.name, 0)
        if path.is_symlink():  # truncating would change a file elsewhere
            hint = "put the file itself in its place, or remove the link"
            raise LoraError(f"`{path.name}` is a link", str(path.parent), hint)
        if path.exists():
            os.truncate(path, size)
        return path.open("a", encoding="utf-8")

    def _write(self, record: dict[str, Any]) -> None:
        if self.metrics is None:
            return
        self.metrics.write(json.dumps(strict(record)) + "\n")
        self.metrics.flush()
        for tracker in self.trackers:
            tracker.log(record)


def repair_logs(folder: Path, sizes: dict[str, int], step: int) -> list[str]:
    """Remove invalid lines from the logs of a run that is resumed.

    The content before the checkpoint's size may have been truncated, edited or deleted since. Later
    content is cut off when the log is opened.

    Args:
        folder: The output folder.
        sizes: The size in bytes of each log at the checkpoint; updated to the repaired sizes.
        step: The step of the checkpoint.

    Returns:
        A message for each log that has lost lines.
    """
    losses = []
    for name, size in sizes.items():
        path = folder / name
        if path.is_symlink() or not size:
            continue  # links are rejected when the log is opened
        raw = path.read_bytes()[:size] if path.exists() else b""
        lines = raw.splitlines(keepends=True)
        valid = [line for line in lines if line.endswith(b"\n") and _is_record(line, step)]
        if len(raw) == size and valid == lines:
            continue
        if not path.exists():
            losses.append(f"{path} is gone, and with it the lines of {counted(step, 'step')}")
        else:
            losses.append(f"{path} was cut or edited; it keeps {counted(len(valid), 'whole line')}")
        write_atomically(path, b"".join(valid))
        sizes[name] = path.stat().st_size
    return losses


def _is_record(line: bytes, step: int) -> bool:
    """Return whether a line of a log is a valid record, up to a step."""
    try:
        record = json.loads(line)
    except ValueError:  # includes UnicodeDecodeError
        return False
    return isinstance(record, dict) and record.get("step") in range(step + 1)


class _TensorBoard:
    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # hide records beyond the checkpoint
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, record: dict[str, Any]) -> None:
        step = record["step"]
        for name, value in _scalars(record):
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _Trackio:
    def __init__(self, name: str) -> None:
        import trackio

        self.run = trackio.init(project="lora", name=name)

    def log(self, record: dict[str, Any]) -> None:
        self.run.log(dict(_scalars(record)), step=record["step"])

    def close(self) -> None:
        self.run.finish()


def _scalars(record: dict[str, Any]) -> list[tuple[str, float]]:
    values = []
    for key, value in record.items():
        if isinstance(value, dict):
            values += [(f"{key}/{name}", number) for name, number in value.items()]
        elif key not in ("step", "epoch"):
            values.append((f"train/{key}", value))
    return values


def _tracker(kind: str, folder: Path, name: str, step: int) -> Any:
    try:
        return _TensorBoard(folder, step) if kind == "tensorboard" else _Trackio(name)
    except ImportError as error:
        raise LoraError(
            f"`{kind}` is not installed", "train.trackers", "pip install 'lora-cli[tracking]'"
        ) from error


def _gpu_of(record: dict[str, Any]) -> str:
    """Return the utilisation and temperature of the GPU as text, if they are known."""
    busy, heat = record.get("gpu_utilization_percent"), record.get("gpu_temperature_c")
    parts = [f"{busy:.0f} %"] if busy is not None else []
    parts += [f"{heat:.0f} °C"] if heat is not None else []
    return f"  GPU {', '.join(parts)}" if parts else ""


def clock(seconds: float) -> str:
    """Format a duration as 1:02:03 or 2:03."""
    minutes, seconds_left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds_left:02d}" if hours else f"{minutes}:{seconds_left:02d}"


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
