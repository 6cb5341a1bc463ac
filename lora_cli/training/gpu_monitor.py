"""Monitor the GPUs of a training run: utilisation, memory, temperature, and why they are idle.

A thread queries NVIDIA's library NVML (`pip install 'lora-cli[monitoring]'`) once a second. The
driver answers, so no step waits and the device is not synchronised. Without the library, or a GPU
that it supports, nothing is measured or reported.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator

from lora_cli.tasks.contract import Task
from lora_cli.training.batches import PlannedStep
from lora_cli.training.stop_request import TRAINING, StopRequest
from lora_cli.training.train_state import TrainState

INTERVAL_S = 1.0  # the driver's own utilisation is a mean over up to a second
LOW_PERCENT = 70.0  # a lower utilisation is reported
MIN_SAMPLES = 30  # the first steps of a run are not representative
MAX_WAITING_SHARE = 0.2  # of the time in steps; above it, slow batches are reported as the cause
HINT_WORKERS = 4
SLOWDOWN_BITS = {  # bits of NVML's reasons for reduced clocks
    0x20: "heat", 0x40: "heat", 0x04: "power limit", 0x80: "power limit", 0x08: "hardware slowdown",
}  # fmt: skip


@dataclass
class Use:
    """Statistics of the GPUs over some time; only sums and maxima are kept."""

    samples: int = 0
    busy: float = 0.0
    """Sum of the utilisation in percent, a mean over the GPUs."""
    measured: int = 0
    """The number of samples with a known utilisation."""
    memory_bytes: int = 0
    """The maximum memory use of a GPU, including other processes."""
    temperature_c: int = 0
    """The maximum temperature."""
    slowed: Counter[str] = field(default_factory=Counter)
    """The number of samples in which the clock of a GPU was reduced, by reason."""

    @property
    def utilization(self) -> float | None:
        """Mean utilisation in percent, or None if it is unknown."""
        return round(self.busy / self.measured, 1) if self.measured else None

    @property
    def facts(self) -> dict[str, Any]:
        """The known values, for a line of the log."""
        known = {
            "gpu_utilization_percent": self.utilization,
            "gpu_memory_bytes": self.memory_bytes or None,
            "gpu_temperature_c": self.temperature_c or None,
        }
        return {name: value for name, value in known.items() if value is not None}


class GpuMonitor:
    """Monitors GPUs from a thread within the context, while `is_training` returns true.

    Args:
        devices: Torch's indices of the GPUs; may be empty.
        is_training: Whether the run is in its steps, and not in an evaluation or a checkpoint.
        advice: What to do if the GPU is idle, but batches are ready in time.
        batch_advice: What to do if the GPU is idle because batches are late.
    """

    def __init__(
        self,
        devices: list[int],
        is_training: Callable[[], bool] = lambda: True,
        advice: str = "",
        batch_advice: str = "",
    ) -> None:
        self._is_training, self._advice, self._batch_advice = is_training, advice, batch_advice
        self._nvml = _nvml() if devices else None
        handles = [_gpu(self._nvml, device) for device in devices] if self._nvml else []
        self._gpus = [gpu for gpu in handles if gpu is not None]
        self._recent, self._all = Use(), Use()
        self._waited_s = 0.0
        self._trained_s: Callable[[], float] = lambda: 0.0
        self._was_reported = False
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="gpu-monitor", daemon=True)

    @classmethod
    def of_run(cls, task: Task, accelerator: Accelerator, stop: StopRequest) -> GpuMonitor:
        """Return the monitor of a run; the main process monitors the GPUs of its machine."""
        devices: list[int] = []
        if accelerator.is_main_process and accelerator.device.type == "cuda":
            n_local = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
            is_alone = accelerator.num_processes == 1
            devices = [accelerator.device.index or 0] if is_alone else list(range(n_local))
        advice = (_advice(task, accelerator), _batch_advice(task))
        return cls(devices, lambda: stop.activity == TRAINING, *advice)

    def __enter__(self) -> GpuMonitor:
        if self._gpus:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._nvml is not None:
            _query(self._nvml, "nvmlShutdown")

    def _watch(self) -> None:
        while not self._ended.wait(INTERVAL_S):
            if self._is_training():
                self.sample()

    def sample(self) -> None:
        """Take a sample of all GPUs."""
        busy, memory, heat = [], [], []
        slowed: set[str] = set()
        for gpu, card in self._gpus:
            busy += _query(self._nvml, "nvmlDeviceGetUtilizationRates", gpu)
            memory += _query(self._nvml, "nvmlDeviceGetMemoryInfo", gpu)
            heat += _query(self._nvml, "nvmlDeviceGetTemperature", card, 0)  # of its processor
            reasons = _query(self._nvml, "nvmlDeviceGetCurrentClocksThrottleReasons", card)
            slowed |= {name for bit, name in SLOWDOWN_BITS.items() if any(bit & r for r in reasons)}
        with self._lock:
            for use in (self._recent, self._all):
                use.samples += 1
                use.measured += bool(busy)
                use.busy += sum(rates.gpu for rates in busy) / max(len(busy), 1)
                use.memory_bytes = max([use.memory_bytes, *(int(rates.used) for rates in memory)])
                use.temperature_c = max([use.temperature_c, *map(int, heat)])
                use.slowed.update(slowed)

    def timed(self, steps: Iterator[PlannedStep], state: TrainState) -> Iterator[PlannedStep]:
        """Yield steps, and measure how long the loop waits for each step except the first."""
        self._trained_s = lambda: state.seconds - seconds_before
        seconds_before, is_first = state.seconds, True
        while True:
            began = time.perf_counter()
            try:
                step = next(steps)
            except StopIteration:
                return
            waited = time.perf_counter() - began
            seconds_before += waited if is_first else 0.0
            self._waited_s += 0.0 if is_first else waited
            is_first = False
            yield step

    def record(self) -> dict[str, Any]:
        """Return the statistics since the last call, for a line of the log."""
        with self._lock:
            recent, self._recent = self._recent, Use()
        return recent.facts

    def new_notes(self) -> list[str]:
        """Return a note on why the GPUs are idle, once, as soon as it is known."""
        if self._was_reported or self._all.measured < MIN_SAMPLES or (cause := self.cause) is None:
            return []
        self._was_reported = True
        return [f"note: {cause}"]

    @property
    def cause(self) -> str | None:
        """Why the utilisation is low, and what to do; None if it is not low."""
        used = self._all.utilization
        if used is None or used >= LOW_PERCENT:
            return None
        share = self._waited_s / max(self._trained_s(), 1e-9)
        works = f"the GPU works {used:.0f} % of the time"
        if share >= MAX_WAITING_SHARE:
            waits = f"the run waits {100 * share:.0f} % of it for batches"
            return f"{works}; {waits}: {self._batch_advice}"
        return f"{works}; {self._advice}"

    def summary(self) -> dict[str, Any]:
        """Return the statistics since the run was started or resumed, for the report."""
        use = self._all
        if not use.samples:
            return {}
        slowed = {name: round(100 * n / use.samples, 1) for name, n in sorted(use.slowed.items())}
        cause = self.cause if use.measured >= MIN_SAMPLES else None
        facts = use.facts | ({"gpu_slowed_percent": slowed} if slowed else {})
        return facts | ({"gpu_use": cause} if cause else {})


def _nvml() -> Any:
    """Return NVIDIA's library, initialised, or None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an outdated package of the same name emits a warning
        try:
            import pynvml

            pynvml.nvmlInit()
        except Exception:  # not installed, no driver, or an unsupported one
            return None
    return pynvml


def _gpu(nvml: Any, device: int) -> tuple[Any, Any] | None:
    """Return NVML's handles of a GPU and of its card, or None.

    Torch may number GPUs in another order than NVML, and only counts those in
    CUDA_VISIBLE_DEVICES, so a GPU is found by its UUID. The temperature of a MIG partition is that
    of its card.
    """
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = [shown[device].strip()] if device < len(shown) else []
    names = [name for name in names if name.startswith("MIG-")]
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    names += [f"{kind}-{uuid}" for kind in ("GPU", "MIG") if uuid is not None]
    for name in names:
        for gpu in _query(nvml, "nvmlDeviceGetHandleByUUID", name):
            is_part = _query(nvml, "nvmlDeviceIsMigDeviceHandle", gpu) == [1]
            function = "nvmlDeviceGetDeviceHandleFromMigDeviceHandle"
            cards = _query(nvml, function, gpu) if is_part else []
            return gpu, (cards or [gpu])[0]
    return None


def _query(nvml: Any, function: str, *arguments: Any) -> list[Any]:
    """Call a function of NVML; return a list with its result, empty if it is not supported."""
    try:
        return [getattr(nvml, function)(*arguments)]
    except (nvml.NVMLError, AttributeError):
        return []


def _advice(task: Task, accelerator: Accelerator) -> str:
    """Return what slows down steps whose batches are ready, and what to do."""
    train = task.recipe.train
    if accelerator.scaler is not None:
        way = "`--set train.precision=bf16` needs none, where the GPU has it"
        return f"the run waits for it in each step, to check fp16's loss scale: {way}"
    if train.log_every_steps == 1:
        way = "`--set train.log_every_steps=10`"
        return f"the run waits for it in each step, whose loss it logs: {way}"
    if task.waits_for_device:
        way = "larger micro-batches: `--set train.micro_batch_size=N`"
        return f"the run waits for it in each micro-batch, for what the CPU decides: {way}"
    ways = ["larger micro-batches (`--set train.micro_batch_size=N`)"]
    if train.gradient_accumulation_steps > 1:
        ways = ["larger, and fewer, micro-batches (`--set train.gradient_accumulation_steps=1`)"]
    ways += ["compiled layers (`--set train.kernels=fused`)"] * (train.kernels != "fused")
    return f"Python starts its work more slowly than it is done: try {', or '.join(ways)}"


def _batch_advice(task: Task) -> str:
    """Return how to get batches faster."""
    if task.recipe.data.streaming:
        return "`--set data.streaming=false` encodes the rows once, before the first step"
    workers = max(HINT_WORKERS, 2 * task.recipe.train.workers)
    return f"prepare them in more processes: `--set train.workers={workers}`"
