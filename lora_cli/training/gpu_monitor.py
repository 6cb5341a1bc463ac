"""What the GPUs do while a run trains: how busy, how full and how hot they are, and why if idle.

A thread asks NVIDIA's library NVML (`pip install 'lora-cli[monitoring]'`) once a second; the loop
never does. The answers come from the driver: no step waits for them, and the device is not
synchronised. Without the library, or a GPU that it knows, nothing is measured or said.
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
LOW_PERCENT = 70.0  # a GPU that is used less is worth a sentence
ENOUGH = 30  # samples: the first steps of a run are no measure
WAITING = 0.2  # of the time in steps: a run that waits so long for batches leaves the GPU idle
HINT_WORKERS = 4
SLOWED = {  # bits of NVML's reasons why the clocks are lower than they could be
    0x20: "heat", 0x40: "heat", 0x04: "power limit", 0x80: "power limit", 0x08: "hardware slowdown",
}  # fmt: skip


@dataclass
class Use:
    """What was seen of some GPUs in some seconds; sums, so that a long run needs no more memory."""

    samples: int = 0
    busy: float = 0.0
    """Sum of the utilisation in percent, a mean over the GPUs."""
    measured: int = 0
    """The samples in which it was known."""
    memory_bytes: int = 0
    """Most of a GPU's memory that was used at once, by all of its processes."""
    temperature_c: int = 0
    """The highest."""
    slowed: Counter[str] = field(default_factory=Counter)
    """In how many samples the clock of a GPU was lowered, by the reason."""

    @property
    def utilization(self) -> float | None:
        """Mean utilisation in percent, None if it is not known."""
        return round(self.busy / self.measured, 1) if self.measured else None

    @property
    def facts(self) -> dict[str, Any]:
        """What is known, for a line of the log."""
        known = {
            "gpu_utilization_percent": self.utilization,
            "gpu_memory_bytes": self.memory_bytes or None,
            "gpu_temperature_c": self.temperature_c or None,
        }
        return {name: value for name, value in known.items() if value is not None}


class GpuMonitor:
    """Within the context, watches GPUs from a thread, while `is_training` says so.

    Args:
        devices: Torch's numbers of the GPUs; may be none.
        is_training: Whether the run is in its steps, and not in an evaluation or a checkpoint.
        advice: The way out for a GPU that idles for want of faster steps, or one that is always
            waited for.
        batch_advice: The way out for a GPU that idles for want of batches.
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
        found = [_gpu(self._nvml, device) for device in devices] if self._nvml else []
        self._gpus = [gpu for gpu in found if gpu is not None]
        self._recent, self._all = Use(), Use()
        self._waited_s = 0.0
        self._trained_s: Callable[[], float] = lambda: 0.0
        self._said = False
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="gpu-monitor", daemon=True)

    @classmethod
    def of_run(cls, task: Task, accelerator: Accelerator, stop: StopRequest) -> GpuMonitor:
        """Return the monitor of a run: the main process watches the GPUs of its machine."""
        devices: list[int] = []
        if accelerator.is_main_process and accelerator.device.type == "cuda":
            n_local = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
            is_alone = accelerator.num_processes == 1
            devices = [accelerator.device.index or 0] if is_alone else list(range(n_local))
        ways = (_advice(task, accelerator), _batch_advice(task))
        return cls(devices, lambda: stop.activity == TRAINING, *ways)

    def __enter__(self) -> GpuMonitor:
        if self._gpus:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._nvml is not None:
            _asked(self._nvml, "nvmlShutdown")

    def _watch(self) -> None:
        while not self._ended.wait(INTERVAL_S):
            if self._is_training():
                self.sample()

    def sample(self) -> None:
        """Ask once what the GPUs do."""
        busy, memory, heat = [], [], []
        slowed: set[str] = set()
        for gpu, card in self._gpus:
            busy += _asked(self._nvml, "nvmlDeviceGetUtilizationRates", gpu)
            memory += _asked(self._nvml, "nvmlDeviceGetMemoryInfo", gpu)
            heat += _asked(self._nvml, "nvmlDeviceGetTemperature", card, 0)  # of its processor
            reasons = _asked(self._nvml, "nvmlDeviceGetCurrentClocksThrottleReasons", card)
            slowed |= {name for bit, name in SLOWED.items() if any(bit & r for r in reasons)}
        with self._lock:
            for use in (self._recent, self._all):
                use.samples += 1
                use.measured += bool(busy)
                use.busy += sum(one.gpu for one in busy) / max(len(busy), 1)
                use.memory_bytes = max([use.memory_bytes, *(int(one.used) for one in memory)])
                use.temperature_c = max([use.temperature_c, *map(int, heat)])
                use.slowed.update(slowed)

    def timed(self, steps: Iterator[PlannedStep], state: TrainState) -> Iterator[PlannedStep]:
        """Yield steps, and measure how long the loop waits for each but the first."""
        self._trained_s = lambda: state.seconds - before
        before, is_first = state.seconds, True
        while True:
            began = time.perf_counter()
            try:
                step = next(steps)
            except StopIteration:
                return
            waited = time.perf_counter() - began
            before += waited if is_first else 0.0
            self._waited_s += 0.0 if is_first else waited
            is_first = False
            yield step

    def record(self) -> dict[str, Any]:
        """Return what was seen since the last call, for a line of the log."""
        with self._lock:
            recent, self._recent = self._recent, Use()
        return recent.facts

    def news(self) -> list[str]:
        """Return why the GPUs idle, once it is known, and not again."""
        if self._said or self._all.measured < ENOUGH or (cause := self.cause) is None:
            return []
        self._said = True
        return [f"note: {cause}"]

    @property
    def cause(self) -> str | None:
        """Why the GPUs were little used, and the way out; None if they were not."""
        used = self._all.utilization
        if used is None or used >= LOW_PERCENT:
            return None
        share = self._waited_s / max(self._trained_s(), 1e-9)
        works = f"the GPU works {used:.0f} % of the time"
        if share >= WAITING:
            waits = f"the run waits {100 * share:.0f} % of it for batches"
            return f"{works}; {waits}: {self._batch_advice}"
        return f"{works}; {self._advice}"

    def summary(self) -> dict[str, Any]:
        """Return what was seen since the run was started or resumed, for the report."""
        use = self._all
        if not use.samples:
            return {}
        slowed = {name: round(100 * n / use.samples, 1) for name, n in sorted(use.slowed.items())}
        cause = self.cause if use.measured >= ENOUGH else None
        facts = use.facts | ({"gpu_slowed_percent": slowed} if slowed else {})
        return facts | ({"gpu_use": cause} if cause else {})


def _nvml() -> Any:
    """Return NVIDIA's library, ready to be asked, or None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an outdated package of the same name warns of itself
        try:
            import pynvml

            pynvml.nvmlInit()
        except Exception:  # not installed, no driver, or one that the library does not know
            return None
    return pynvml


def _gpu(nvml: Any, device: int) -> tuple[Any, Any] | None:
    """Return NVML's handles of one of torch's GPUs and of its card, or None.

    NVML counts all GPUs of the machine, in another order than torch may, and torch only those that
    CUDA_VISIBLE_DEVICES shows it. So a GPU is found by its UUID. If it is a part of one (MIG), the
    card knows the temperature.
    """
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = [shown[device].strip()] if device < len(shown) else []
    names = [name for name in names if name.startswith("MIG-")]
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    names += [f"{kind}-{uuid}" for kind in ("GPU", "MIG") if uuid is not None]
    for name in names:
        for gpu in _asked(nvml, "nvmlDeviceGetHandleByUUID", name):
            is_part = _asked(nvml, "nvmlDeviceIsMigDeviceHandle", gpu) == [1]
            whole = "nvmlDeviceGetDeviceHandleFromMigDeviceHandle"
            cards = _asked(nvml, whole, gpu) if is_part else []
            return gpu, (cards or [gpu])[0]
    return None


def _asked(nvml: Any, question: str, *about: Any) -> list[Any]:
    """Return NVML's answer; none if this GPU, or this version of the driver, has none."""
    try:
        return [getattr(nvml, question)(*about)]
    except (nvml.NVMLError, AttributeError):
        return []


def _advice(task: Task, accelerator: Accelerator) -> str:
    """Return what holds up steps that have their batches, and the way out."""
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
    """Return the way to get batches sooner."""
    if task.recipe.data.streaming:
        return "`--set data.streaming=false` encodes the rows once, before the first step"
    workers = max(HINT_WORKERS, 2 * task.recipe.train.workers)
    return f"prepare them in more processes: `--set train.workers={workers}`"
