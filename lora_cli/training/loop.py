"""The training loop: step, evaluate, save, stop; the same for every task and adapter type."""

from __future__ import annotations

import math
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_cli.adapters.attach import attach, trainable_parameters, training_mode
from lora_cli.errors import InterruptedRun, LoraError, NumericsError
from lora_cli.evaluation import MIXED_PRECISION, best_by, evaluate
from lora_cli.recipe import Recipe
from lora_cli.tasks import Batch, Encoded, Task, build_task
from lora_cli.tasks.base import load_data
from lora_cli.training.batches import Batches
from lora_cli.training.optim import build_optimizer, learning_rate_factor, set_learning_rate
from lora_cli.training.progress import RunLog, clock, peak_memory_bytes
from lora_cli.training.result import finish, open_output, start_report
from lora_cli.training.signals import StopSignals
from lora_cli.training.state import (
    TrainState,
    load_checkpoint,
    publish_adapter,
    recipe_facts,
    refuse_changes,
    restore_checkpoint,
    restore_published,
    save_checkpoint,
)
from lora_cli.training.step import StepResult, train_step


def train(recipe: Recipe, resume: bool = False) -> dict[str, Any]:
    """Train as the recipe says, and write the output folder.

    Args:
        recipe: The checked recipe.
        resume: Go on from the newest checkpoint in the output folder, if there is one.

    Returns:
        The report, as in `report.json`; of the earlier run, if that is complete.
    """
    accelerator = start_accelerator(recipe)
    done = open_output(recipe, resume, accelerator)
    if done is not None:
        return done
    task = build_task(recipe)
    with accelerator.main_process_first():  # which reads and encodes; the others find its cache
        task.load_processor()
        data = load_data(task)
    seed_everything(recipe.train.seed)
    model, new = task.load_model(accelerator.device)
    attach(model, recipe, new)
    in_full = list(dict.fromkeys([*new, *recipe.adapter.train_modules]))
    run = Run(recipe, task, data, model, in_full, accelerator)
    if resume:
        run.resume()
    run.train()
    return finish(run.folder, recipe, run.report, accelerator)


def start_accelerator(recipe: Recipe) -> Accelerator:
    """Return Accelerate's view of the devices and processes.

    Raises:
        LoraError: If the precision needs a GPU, or processes were started that do not see each
            other.
    """
    if recipe.train.precision == "fp16" and not torch.cuda.is_available():
        raise LoraError(
            "fp16 needs a GPU",
            recipe.at("train.precision"),
            "use `--set train.precision=fp32`, or bf16",
        )
    accelerator = Accelerator(mixed_precision=MIXED_PRECISION[recipe.train.precision])
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise LoraError(
            f"WORLD_SIZE is {launched}, but {accelerator.num_processes} process is seen",
            hint="on a CPU start with `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu "
            "--num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no "
            "-m lora_cli train RECIPE`",
        )
    return accelerator


def seed_everything(*seed: int) -> None:
    """Seed torch's generators with a mix of the numbers."""
    torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1))


class Run:
    """A run of training: its parts, its state, and what happens between two steps."""

    def __init__(
        self,
        recipe: Recipe,
        task: Task,
        data: dict[str, Encoded],
        model: nn.Module,
        in_full: list[str],
        accelerator: Accelerator,
    ) -> None:
        self.recipe, self.task, self.data, self.model = recipe, task, data, model
        self.in_full, self.accelerator = in_full, accelerator
        self.folder = recipe.output_path
        if recipe.train.gradient_checkpointing:
            assert isinstance(model, PreTrainedModel)
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = build_optimizer(model, recipe)
        self.prepared = accelerator.prepare_optimizer(self.optimizer)
        self.batches = Batches(task, data.get("train"), accelerator)
        self.total_steps = self.batches.total_steps
        hashes = {name: split.rows.content_sha256() for name, split in data.items()}
        self.state = TrainState(recipe=recipe_facts(recipe), data=hashes)
        self.report = start_report(recipe, task, data, hashes, model, accelerator)
        self.metric, self.mode = best_by(recipe, task)

    def resume(self) -> None:
        """Go on from the newest whole checkpoint, if there is one."""
        found = load_checkpoint(self.folder)
        if found is None:
            return
        folder, state = found
        refuse_changes(state, self.recipe, self.state.data)
        restore_checkpoint(folder, state, self.model, self.optimizer)
        if self.accelerator.scaler is not None and state.scaler is not None:
            self.accelerator.scaler.load_state_dict(state.scaler)
        self.state = state

    def train(self) -> None:
        """Train to the end, or until validation ceases to improve, then evaluate the best."""
        recipe, state = self.recipe, self.state
        with self._log() as self.log, StopSignals() as self.signals:
            if state.step == 0:
                self._measure_before()
            training_mode(self.model)
            self._since_log, self._clock = _Window(state), time.perf_counter()
            for step, examples, batches in self.batches.steps(state.step):
                if state.stopped_early:
                    break
                self._step(step, examples, batches)
                last = step == self.total_steps
                if self._due(step, recipe.evaluate.every_steps) or last:
                    self._evaluate()
                if last or state.stopped_early or self._due(step, recipe.checkpoint.every_steps):
                    self._save()
                self._stop_if_asked()
                self._clock = time.perf_counter()  # evaluations and checkpoints are not counted
            self._measure_best()

    def _log(self) -> RunLog:
        main = self.accelerator.is_main_process
        name = f"{self.recipe.task.type} {self.folder.name}"
        return RunLog(
            self.folder if main else None,
            self.total_steps,
            self.state.step,
            self.recipe.train.trackers,
            name,
        )

    # ------------------------------------------------------------------------------ a step

    def _step(self, step: int, examples: list[int], batches: list[Batch]) -> None:
        recipe, state = self.recipe, self.state
        # The noise of a step depends on its number alone, so a resumed run needs no saved state.
        seed_everything(recipe.train.seed, step, self.accelerator.process_index)
        factor = learning_rate_factor(recipe.train.scheduler, step, self.total_steps)
        rate = set_learning_rate(self.optimizer, factor)
        moved = [batch.to(self.accelerator.device) for batch in batches]
        result = train_step(
            self.model,
            self.task,
            self.prepared,
            moved,
            self.accelerator,
            recipe.train.max_grad_norm,
        )
        self._since_log.add(result)
        state.skipped_steps += int(self.prepared.step_was_skipped)
        state.step = step
        state.examples += len(examples)
        state.tokens += sum(batch.n_tokens for batch in batches) * self.accelerator.num_processes
        self._count_seconds()
        self.log.sample(step, examples)
        self.log.advance(step)
        if step == 1:
            self._warn_of_idle_parameters()
        if step % recipe.train.log_every_steps == 0 or step in (1, self.total_steps):
            self._log_step(rate)

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self.state.seconds += now - self._clock
        self._clock = now

    def _warn_of_idle_parameters(self) -> None:
        """Name trained parameters that the first step left without gradient: they cannot learn."""
        idle = [
            name
            for name, parameter in trainable_parameters(self.model).items()
            if parameter not in self.optimizer.state
        ]
        if idle and self.optimizer.state:
            self.log.say(
                f"warning: {len(idle)} trained parameters take no part in the model's "
                f"forward pass, `{idle[0]}` among them; leave them out with "
                "adapter.exclude_modules"
            )

    def _log_step(self, rate: float) -> None:
        state, measured = self.state, self._since_log.record(self.state)
        if not math.isfinite(measured["loss"]):
            raise NumericsError(
                f"the loss is {measured['loss']} in steps {self._since_log.start.step + 1} to "
                f"{state.step}",
                self.recipe.at("train.optimizer.learning_rate"),
                "lower the learning rate, lengthen the warm-up, or use bf16 or fp32; "
                "the last checkpoint is good",
            )
        left = (self.total_steps - state.step) * measured["seconds_per_step"]
        record = {
            "step": state.step,
            "epoch": self._epoch,
            **measured,
            "learning_rate": rate,
            "memory_bytes": peak_memory_bytes(self.accelerator.device),
        }
        self.log.trained(record, left)
        self._since_log = _Window(state)

    @property
    def _epoch(self) -> float:
        return round(self.batches.epoch_of(self.state.step), 4)

    def _due(self, step: int, every_steps: int | None) -> bool:
        """Return whether something is due that happens every so many steps, or every epoch."""
        return step % (every_steps or self.batches.steps_per_epoch or self.total_steps) == 0

    # ----------------------------------------------------------------------- between steps

    def _measure_before(self) -> None:
        """Measure the model before training: what every later number is compared with."""
        if not self.recipe.evaluate.baseline:
            return
        for name in ("validation", "test"):
            if name in self.data:
                self.state.before[name] = self._metrics(name)
        if "validation" in self.state.before:
            self.log.evaluated(0, 0.0, self.state.before["validation"], "  (before training)")

    def _metrics(self, split: str, predictions: Path | None = None) -> dict[str, float]:
        return evaluate(self.model, self.task, self.data[split], self.accelerator, predictions)

    def _evaluate(self) -> None:
        """Measure validation; keep the adapter if it is the best, stop if none has been so long."""
        state = self.state
        if "validation" not in self.data:
            return
        metrics = self._metrics("validation")
        value = metrics.get(self.metric)
        if value is None:
            raise LoraError(
                f"there is no metric `{self.metric}`",
                self.recipe.at("evaluate.best.metric"),
                f"validation gives {', '.join(metrics)}",
            )
        stopping = self.recipe.evaluate.early_stopping
        sign = 1 if self.mode == "max" else -1
        best = state.best["value"] if state.best else -sign * math.inf
        margin = stopping.min_delta if stopping else 0.0
        improved = math.isfinite(value) and sign * (value - best) > margin
        if improved:
            state.best = {
                "metric": self.metric,
                "mode": self.mode,
                "value": value,
                "step": state.step,
                "epoch": self._epoch,
            }
        state.without_improvement = 0 if improved else state.without_improvement + 1
        state.stopped_early = bool(stopping and state.without_improvement >= stopping.patience)
        self.log.evaluated(state.step, self._epoch, metrics, "  (best)" if improved else "")
        if improved:
            self._publish()
        training_mode(self.model)

    def _publish(self) -> None:
        """Put the adapter as it is now into the output folder."""
        if self.accelerator.is_main_process:
            publish_adapter(self.folder, self.model, self.recipe, self.in_full, self.task.tokenizer)
        self.accelerator.wait_for_everyone()

    def _save(self) -> None:
        """Write a checkpoint; one of a model that has gone bad is never written."""
        if not math.isfinite(self._since_log.record(self.state)["loss"]):
            raise NumericsError(
                f"the loss is not finite at step {self.state.step}",
                hint="the last checkpoint is good; lower the learning rate",
            )
        if self.accelerator.scaler is not None:
            self.state.scaler = self.accelerator.scaler.state_dict()
        self.log.flush()
        if self.accelerator.is_main_process:
            save_checkpoint(
                self.folder, self.state, self.model, self.optimizer, self.recipe, self.in_full
            )
        self.accelerator.wait_for_everyone()

    def _measure_best(self) -> None:
        """Measure validation and test with the best adapter, and complete the report."""
        if self.state.best is None:  # no validation: the last is all there is
            self._publish()
        elif self.state.best["step"] != self.state.step:
            restore_published(self.folder, self.model, self.recipe)
        after = {}
        for name in ("validation", "test"):
            if name in self.data:
                file = self.folder / "predictions" / f"{name}.jsonl"
                file.parent.mkdir(exist_ok=True)
                after[name] = self._metrics(name, file)
        state, seconds = self.state, max(self.state.seconds, 1e-9)
        self.report["metrics"] = {"before": state.before, "after": after}
        if state.best is not None:
            self.report["best"] = state.best
        self.report["training"] |= {
            "steps": state.step,
            "epochs": self._epoch,
            "seconds": round(state.seconds, 2),
            "examples_per_s": round(state.examples / seconds, 2),
            "tokens_per_s": round(state.tokens / seconds, 1),
            "peak_memory_bytes": peak_memory_bytes(self.accelerator.device),
            "stopped_early": state.stopped_early,
            "skipped_steps": state.skipped_steps,
        }
        self.log.say(f"trained {state.step} steps in {clock(state.seconds)}")

    def _stop_if_asked(self) -> None:
        """Save and leave, if a signal asked for it; all processes together."""
        asked = self.signals.received
        if self.accelerator.num_processes > 1:
            asked = max(gather_object([asked]))
        if asked:
            self._save()
            raise InterruptedRun(
                f"stopped at step {self.state.step}; everything is saved",
                asked,
                "go on with `--resume`",
            )


class _Window:
    """The steps since the last line of the log; losses are added up on the device."""

    def __init__(self, state: TrainState) -> None:
        self.start = replace(state)
        self.loss: Tensor | float = 0.0
        self.norm: Tensor | float = 0.0

    def add(self, result: StepResult) -> None:
        self.loss = self.loss + result.loss
        self.norm = result.grad_norm

    def record(self, state: TrainState) -> dict[str, float]:
        """Return loss, gradient norm and speed; waits for the device."""
        steps = max(state.step - self.start.step, 1)
        loss, norm = float(self.loss) / steps, float(self.norm)
        seconds = max(state.seconds - self.start.seconds, 1e-9)
        return {
            "loss": loss,
            "grad_norm": norm,
            "examples_per_s": round((state.examples - self.start.examples) / seconds, 2),
            "tokens_per_s": round((state.tokens - self.start.tokens) / seconds, 1),
            "seconds_per_step": round(seconds / steps, 4),
        }
