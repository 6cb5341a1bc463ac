"""Compares what two runs of training left: they are one run if all but the times is equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_cli.adapters.peft_format.adapter_folder import weight_files
from lora_cli.training.checkpoints import checkpoints

Json = dict[str, Any]
TIMES = {"logs", "seconds_per_step", "memory_bytes", "seconds"}


def lines(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            k: without_times(v)
            for k, v in value.items()
            if k not in TIMES and not k.endswith("_per_s") and not k.startswith("gpu_")
        }
    return value


def differences(a: Path, b: Path) -> list[str]:
    """Return what differs between the output folders of two complete runs, but for times."""
    found = []
    is_full = (a / "model.safetensors").exists()
    weights = ["model.safetensors"] if is_full else weight_files(a)
    newest = f"checkpoints/{checkpoints(a)[-1][1].name}"
    names = [*weights, "samples.jsonl", *(f"predictions/{n.name}" for n in a.glob("predictions/*"))]
    names += [f"{newest}/{name}" for name in (*weight_files(a / newest), "optimizer.safetensors")]
    for name in names:
        if not (b / name).exists():
            found.append(f"{name} is missing")
        elif (a / name).read_bytes() != (b / name).read_bytes():
            found.append(name)
    if found:
        return found
    metrics, states, reports = (
        [read(x) for x in (a, b)]
        for read in (
            lambda x: [without_times(r) for r in lines(x / "metrics.jsonl")],
            lambda x: without_times(json.loads((x / newest / "trainer.json").read_text())),
            lambda x: json.loads((x / "report.json").read_text()),
        )
    )
    if metrics[0] != metrics[1]:
        found.append("metrics.jsonl")
    if states[0] != states[1]:
        keys = [k for k in states[0] if states[0][k] != states[1].get(k)]
        found.append(f"trainer.json: {', '.join(keys)}")
    found += [
        f"report.json: {key}"
        for key in ("metrics", "best", "parameters", "samples")
        if reports[0].get(key) != reports[1].get(key)
    ]
    return found


def assert_same_run(a: Path, b: Path) -> None:
    """Fail if two runs left anything else than times."""
    assert differences(a, b) == []
