"""Tests of the GPU statistics of a run, with a stand-in for NVIDIA's library, without a GPU."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from runs import lines

from lora_cli.recipe import load_recipe
from lora_cli.reporting import write_page
from lora_cli.training import gpu_monitor, train
from lora_cli.training.gpu_monitor import MIN_SAMPLES, GpuMonitor
from lora_cli.training.train_state import TrainState

GIB = 2**30


class NotSupported(Exception):
    """NVML's own error."""


class Card(SimpleNamespace):
    """The stand-in's values for a GPU; `whole` is the card of a MIG partition."""

    busy: int | None = 40
    used: int = 3 * GIB
    heat: int | None = 61
    reasons: int = 0
    whole: Card | None = None


class Nvml(ModuleType):
    """A stand-in for `pynvml`, with GPUs by UUID."""

    NVMLError = NotSupported

    def __init__(self, cards: dict[str, Card]) -> None:
        super().__init__("pynvml")
        self.cards, self.asked, self.is_down = cards, threading.Event(), False

    def nvmlInit(self) -> None:
        if self.is_down:
            raise NotSupported("driver not loaded")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Card:
        if uuid not in self.cards:
            raise NotSupported("not found")
        return self.cards[uuid]

    def nvmlDeviceIsMigDeviceHandle(self, card: Card) -> int:
        return int(card.whole is not None)

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, card: Card) -> Card:
        assert card.whole is not None
        return card.whole

    def nvmlDeviceGetUtilizationRates(self, card: Card) -> Any:
        self.asked.set()
        return SimpleNamespace(gpu=self.known(card.busy))

    def nvmlDeviceGetMemoryInfo(self, card: Card) -> Any:
        return SimpleNamespace(used=card.used)

    def nvmlDeviceGetTemperature(self, card: Card, sensor: int) -> int:
        assert sensor == 0
        return self.known(card.heat)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, card: Card) -> int:
        return card.reasons

    def known(self, value: int | None) -> int:
        if value is None:
            raise NotSupported("not supported")
        return value


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that installs the stand-in, with GPUs in torch's order."""

    def put(cards: dict[str, Card], uuids: tuple[str, ...] = ("a", "b")) -> Nvml:
        nvml = Nvml(cards)
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=uuids[i])
        )
        return nvml

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return put


def test_a_line_of_the_log_has_the_statistics_since_the_last(install: Any) -> None:
    card = Card(busy=40)
    install({"GPU-a": card})
    monitor = GpuMonitor([0])
    monitor.sample()
    card.busy, card.heat, card.used = 80, 70, 5 * GIB
    monitor.sample()
    assert monitor.record() == {
        "gpu_utilization_percent": 60.0, "gpu_memory_bytes": 5 * GIB, "gpu_temperature_c": 70,
    }  # fmt: skip
    assert monitor.record() == {}
    card.busy, card.heat = 90, 65
    monitor.sample()
    assert monitor.record()["gpu_utilization_percent"] == 90.0
    assert monitor.summary() == {
        "gpu_utilization_percent": 70.0, "gpu_memory_bytes": 5 * GIB, "gpu_temperature_c": 70,
    }  # fmt: skip


def test_torch_and_nvml_may_number_gpus_differently(install: Any) -> None:
    install({"GPU-b": Card(busy=10), "GPU-a": Card(busy=99)}, ("a", "b"))
    first, second = GpuMonitor([0]), GpuMonitor([1])
    for monitor in (first, second):
        monitor.sample()
    assert first.record()["gpu_utilization_percent"] == 99.0
    assert second.record()["gpu_utilization_percent"] == 10.0


def test_several_gpus_give_the_mean_utilisation_and_maximum_temperature(install: Any) -> None:
    install({"GPU-a": Card(busy=100, heat=50), "GPU-b": Card(busy=20, heat=83, used=7 * GIB)})
    monitor = GpuMonitor([0, 1])
    monitor.sample()
    assert monitor.record() == {
        "gpu_utilization_percent": 60.0, "gpu_memory_bytes": 7 * GIB, "gpu_temperature_c": 83,
    }  # fmt: skip


@pytest.mark.parametrize("shown", ["MIG-1", "GPU-x,MIG-1", ""])
def test_a_mig_partition_has_its_memory_and_the_card_s_temperature(
    shown: str, install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Card(heat=55, used=70 * GIB, reasons=0x20)
    part = Card(busy=None, heat=None, used=2 * GIB, whole=card)
    install({"MIG-1": part, "GPU-x": Card()}, ("x", "1") if "," in shown else ("1",))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    monitor = GpuMonitor([shown.count(",")])
    monitor.sample()
    assert monitor.record() == {"gpu_memory_bytes": 2 * GIB, "gpu_temperature_c": 55}
    assert monitor.summary()["gpu_slowed_percent"] == {"heat": 100.0}


def test_reasons_for_lower_clocks_are_counted(install: Any) -> None:
    card = Card(reasons=0x01)  # idling is not a slowdown
    install({"GPU-a": card})
    monitor = GpuMonitor([0])
    for card.reasons in (0x01, 0x04, 0x40, 0x60):
        monitor.sample()
    assert monitor.summary()["gpu_slowed_percent"] == {"heat": 50.0, "power limit": 25.0}


@pytest.mark.parametrize("missing", ["library", "driver", "gpu", "cpu"])
def test_nothing_is_reported_if_nothing_can_be_measured(
    missing: str, install: Any, monkeypatch: pytest.MonkeyPatch, recwarn: Any
) -> None:
    nvml = install({} if missing == "gpu" else {"GPU-a": Card()})
    nvml.is_down = missing == "driver"
    if missing == "library":
        monkeypatch.setitem(sys.modules, "pynvml", None)
    monitor = GpuMonitor([] if missing == "cpu" else [0])
    with monitor:
        assert not monitor._thread.is_alive()
    assert (monitor.record(), monitor.summary(), monitor.new_notes()) == ({}, {}, [])
    assert not recwarn.list


def test_a_thread_samples_only_during_training(
    install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_monitor, "INTERVAL_S", 0.001)
    nvml = install({"GPU-a": Card()})
    idle, seen = threading.Event(), threading.Event()

    def is_training() -> bool:
        seen.set()
        return not idle.is_set()

    with GpuMonitor([0], is_training) as monitor:
        assert nvml.asked.wait(60)
        idle.set()
    assert not monitor._thread.is_alive()
    assert monitor.summary()["gpu_utilization_percent"] == 40.0
    nvml.asked.clear()
    seen.clear()
    with GpuMonitor([0], is_training):
        assert seen.wait(60)
    assert not nvml.asked.is_set()


def steps_of(waits: list[float], now: list[float]) -> Iterator[Any]:
    for wait in waits:
        now[0] += wait
        yield None


def monitor_after(
    waits: list[float], monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> GpuMonitor:
    """Return the monitor of a run whose steps take 0.5 s besides waiting for batches."""
    now, state = [0.0], TrainState()
    monkeypatch.setattr(gpu_monitor.time, "perf_counter", lambda: now[0])
    train = SimpleNamespace(
        log_every_steps=10, gradient_accumulation_steps=1, kernels="auto", workers=0,
        micro_batch_size=8,
    )  # fmt: skip
    task = SimpleNamespace(
        recipe=SimpleNamespace(train=train, data=SimpleNamespace(streaming=False)),
        waits_for_device=False,
    )
    accelerator = SimpleNamespace(
        is_main_process=True, device=torch.device("cuda", 0), num_processes=1, scaler=None
    )
    for key, value in changes.items():
        for owner in (train, task.recipe.data, task, accelerator):
            if hasattr(owner, key):
                setattr(owner, key, value)
    stop: Any = SimpleNamespace(activity="training")
    monitor = GpuMonitor.of_run(task, accelerator, stop)  # type: ignore[arg-type]  # stand-ins
    for _ in monitor.timed(steps_of(waits, now), state):
        monitor.sample()
        now[0] += 0.5
        state.seconds = now[0]
    return monitor


@pytest.mark.parametrize(
    ("waits", "changes", "words"),
    [
        ([9.0] + [0.5] * 40, {}, "the run waits 49 % of it for batches: prepare them in more "
         "processes: `--set train.workers=4`"),
        ([0.5] * 40, {"workers": 8}, "`--set train.workers=16`"),
        ([0.5] * 40, {"streaming": True}, "`--set data.streaming=false` encodes"),
        ([9.0] + [0.01] * 40, {}, "Python starts its work more slowly than it is done: try "
         "larger micro-batches (`--set train.micro_batch_size=N`), or compiled layers"),
        ([0.0] * 40, {"gradient_accumulation_steps": 4, "kernels": "fused"},
         "try larger, and fewer, micro-batches (`--set train.gradient_accumulation_steps=1`)"),
        ([0.0] * 40, {"scaler": object()}, "to check fp16's loss scale"),
        ([0.0] * 40, {"log_every_steps": 1}, "`--set train.log_every_steps=10`"),
        ([0.0] * 40, {"waits_for_device": True}, "for what the CPU decides"),
    ],
)  # fmt: skip
def test_an_idle_gpu_is_reported_with_the_cause(
    waits: list[float], changes: dict[str, Any], words: str, install: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    install({"GPU-a": Card(busy=40)})
    monitor = monitor_after(waits, monkeypatch, **changes)
    (news,) = monitor.new_notes()
    assert news.startswith("note: the GPU works 40 % of the time; ")
    assert words in news
    assert monitor.new_notes() == []  # once
    assert monitor.summary()["gpu_use"] in news


def test_a_busy_gpu_and_the_first_seconds_are_not_reported(
    install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    install({"GPU-a": Card(busy=71)})
    assert monitor_after([0.5] * 40, monkeypatch).new_notes() == []
    install({"GPU-a": Card(busy=0)})
    assert monitor_after([0.5] * (MIN_SAMPLES - 1), monkeypatch).new_notes() == []
    assert monitor_after([0.5] * MIN_SAMPLES, monkeypatch).new_notes() != []


def test_the_log_the_progress_line_and_the_report_show_the_statistics(
    tmp_path: Path, install: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    install({"GPU-a": Card(busy=40)})
    one = GpuMonitor([0])
    monkeypatch.setattr(one, "sample", lambda ask=one.sample: [ask() for _ in range(MIN_SAMPLES)])
    monkeypatch.setattr(one, "record", lambda take=one.record: (one.sample(), take())[1])
    monkeypatch.setattr(GpuMonitor, "of_run", lambda *_: one)
    monkeypatch.setattr(GpuMonitor, "_watch", lambda _: None)
    base = tiny.save_encoder(tmp_path / "base")
    train(load_recipe(tiny.recipe(base, tmp_path, train={"max_steps": 2, "log_every_steps": 1})))
    printed = capsys.readouterr().err
    assert "GiB  GPU 40 %, 61 °C" in printed
    assert printed.count("note: the GPU works 40 % of the time") == 1
    out = tmp_path / "out"
    logged = [line for line in lines(out / "metrics.jsonl") if "loss" in line]
    assert [line["gpu_temperature_c"] for line in logged] == [61, 61]
    ran = json.loads((out / "report.json").read_text(encoding="utf-8"))["training"]
    assert (ran["gpu_utilization_percent"], ran["gpu_memory_bytes"]) == (40.0, 3 * GIB)
    write_page(out)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "GPU in use" in page
    assert "at most 61 °C" in page
