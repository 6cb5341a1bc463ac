"""The training loop: step, evaluate, save, stop; the same for every task and adapter type."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from lora_cli.accelerator import start_accelerator
from lora_cli.adapters.attach import training_mode
from lora_cli.adapters.describe_trained import trained_facts
from lora_cli.adapters.make_trainable import make_trainable
from lora_cli.adapters.parameter_targets import frozen_experts_note
from lora_cli.environment import reject_mpi
from lora_cli.evaluation.draw_samples import draw_samples
from lora_cli.evaluation.evaluate_split import evaluate
from lora_cli.evaluation.probe import take_probe, write_probe
from lora_cli.evaluation.samples import add_samples
from lora_cli.evaluation.thumbnails import write_thumbnails
from lora_cli.models.base_model import enable_gradient_checkpointing
from lora_cli.models.fingerprint import Fingerprint, fingerprint_of
from lora_cli.preprocessing.cached_frozen_outputs import with_frozen_outputs
from lora_cli.preprocessing.cached_hidden_states import with_entering_states
from lora_cli.preprocessing.data_gate import pass_gate
from lora_cli.preprocessing.encode import load_data
from lora_cli.recipe import Learned, Recipe
from lora_cli.tasks import build_training_task
from lora_cli.tasks.contract import Task
from lora_cli.tasks.examples import Encoded
from lora_cli.training.bad_numbers import reject_bad_parameters, reject_bad_scale, reject_bad_steps
from lora_cli.training.batches import Batches, PlannedStep
from lora_cli.training.checkpoints import adopt_adapter, clear_leftovers, optimizer_bytes
from lora_cli.training.choose_engine import choose_engine
from lora_cli.training.early_stopping import Judge
from lora_cli.training.gpu_monitor import GpuMonitor
from lora_cli.training.launch import explaining, main_process_first, seed_everything
from lora_cli.training.memory_and_disk import find_micro_batch, join_micro_batches
from lora_cli.training.mirror import open_mirror
from lora_cli.training.optimizers import build_optimizer, learning_rate_factor, set_learning_rate
from lora_cli.training.output_folder import (
    add_results,
    compare_with_peft,
    finish,
    finished_report,
    locked_output,
    reject_other_rows,
    start_report,
    warn_of_other_versions,
)
from lora_cli.training.progress import RunLog, peak_memory_bytes
from lora_cli.training.rank_agreement import require_same_recipe, require_same_start
from lora_cli.training.rank_watch import watching
from lora_cli.training.save_and_resume import Saver
from lora_cli.training.start_from_data import start_from_data
from lora_cli.training.step import StepResult, train_step
from lora_cli.training.stop_request import TRAINING, Stopping, StopRequest
from lora_cli.training.train_state import TrainState, machine_facts, memory_facts, recipe_facts
from lora_cli.training.unlogged_steps import Window, trained_line
from lora_cli.unexpected_errors import phase


def train(recipe: Recipe, resume: bool = False, learned: Learned | None = None) -> dict[str, Any]:
    """Train as the recipe says, and write the output folder.

    Args:
        recipe: The checked recipe.
        resume: Continue from the newest checkpoint in the output folder, if there is one.
        learned: Gets what the run learns, such as the labels.

    Returns:
        The report, as in `report.json`; of the earlier run, if that is complete.
    """
    started, learned = time.monotonic(), Learned() if learned is None else learned
    reject_mpi()
    accelerator = start_accelerator(recipe)
    with watching(accelerator), ExitStack() as resources:
        require_same_recipe(recipe, resume, accelerator)
        task = build_training_task(recipe, learned)
        with main_process_first(accelerator):  # it reads and encodes; the others find its cache
            if accelerator.is_main_process:
                open_mirror(recipe, resume)
            if resume:
                adopt_adapter(recipe, learned)
            done = finished_report(learned.completed(recipe), resume)
            if accelerator.is_main_process and done is None:
                resources.enter_context(locked_output(recipe, resume))
                clear_leftovers(recipe.output_path)
            task.load_processor()
            if accelerator.is_main_process and done is None:
                task.complete_data(accelerator.device)
            data = load_data(task)
            if done is not None:
                reject_other_rows(recipe, done, data)
                if accelerator.is_main_process:
                    warn_of_other_versions(done)
                return done
            findings = pass_gate(task, data) if accelerator.is_main_process else None
        stop = StopRequest(recipe, accelerator, started)
        with explaining(recipe, learned, accelerator, stop):
            run = Run(task, data, accelerator, stop)
            if findings is not None:
                run.report["data"] = findings.added_to(run.report["data"])
            if resume:
                run.resume()
            require_same_start(recipe, run.state, run.model, accelerator)
            run.train()
            return finish(run.recipe, run.report, accelerator)


class Run:
    """A run of training: its parts, its state, and what happens between two steps."""

    def __init__(
        self,
        task: Task,
        data: dict[str, Encoded],
        accelerator: Accelerator,
        stop: StopRequest,
    ) -> None:
        self.task, self.data, self.accelerator, self.stop = task, data, accelerator, stop
        self.model, new, base = self._load_model()
        self.learned = task.learned
        self.recipe = recipe = task.completed_recipe  # labels and adapter are known from here on
        self.folder = recipe.output_path
        self.in_full = list(dict.fromkeys([*new, *recipe.adapter.train_modules]))
        with main_process_first(accelerator):
            self.data = with_frozen_outputs(task, self.model, data, accelerator)
            self.data = with_entering_states(task, self.model, self.data, accelerator)
        frozen = frozen_experts_note(self.model, recipe)
        self.notes = [*filter(None, [task.length_note, frozen]), *task.notes]
        self.optimizer = build_optimizer(self.model, recipe, self.in_full)
        trained = (self.model, self.optimizer, self.in_full, base)
        kept = (self._save_beside, accelerator, task.base_facts, self.learned)
        self.saver = Saver(recipe, *trained, *kept)
        self.prepared = accelerator.prepare_optimizer(self.optimizer)
        self.batches = Batches(task, self.data.get("train"), accelerator)
        self.total_steps = self.batches.total_steps
        hashes = {name: split.rows.content_sha256() for name, split in data.items()}
        machine = machine_facts(accelerator) | task.teacher_identity
        self.state = TrainState(recipe=recipe_facts(recipe), data=hashes, machine=machine)
        self.report = start_report(recipe, task, data, hashes, self.model, accelerator)
        self.report["parameters"] |= trained_facts(self.model, recipe, self.optimizer.param_groups)
        self.judge, self.gpu = Judge(recipe, task), GpuMonitor.of_run(task, accelerator, stop)
        self.at_end: dict[str, float] | None = None  # validation after the last step
        self.save_pending = False  # a checkpoint is due, and the last steps were bad

    def _load_model(self) -> tuple[nn.Module, list[str], Fingerprint | None]:
        """Return the model, ready to be trained, the modules of its head, and its base."""
        recipe, task = self.task.recipe, self.task
        seed_everything(recipe.train.seed)
        model, new = task.load_model(self.accelerator.device)
        base = fingerprint_of(recipe, model, new)
        base = make_trainable(model, recipe, new, base, task.base_facts, task.learned, task.drawn)
        lengths = [int(split.lengths.max()) for split in self.data.values()]
        longest = max(lengths) if "train" in self.data else None
        with self.accelerator.autocast():
            task.fit_to_model(model, longest)
            task.try_training(model, longest)
            if recipe.train.packing:
                task.check_packing(model, self.data["train"])
        if recipe.adapter.init == "eva":
            start_from_data(model, task, self.data["train"], self.accelerator)
        if recipe.train.gradient_checkpointing:
            enable_gradient_checkpointing(model, recipe)
        return model, new, base

    def _save_beside(self, folder: Path, facts: dict[str, Any] | None = None) -> None:
        """Write what belongs beside an adapter: the processor, and what the adapter computes."""
        self.task.save_processor(folder, facts)
        if (probe := take_probe(self.task, self.model, self.accelerator)) is not None:
            write_probe(folder, probe)

    def resume(self) -> None:
        """Go on from the newest whole checkpoint, if there is one."""
        self.state = self.saver.resume(self.state, self.total_steps, self.notes.append)

    def _fit_memory(self) -> None:
        """Find the largest micro-batch that fits, where the recipe leaves that open."""
        train, needed = self.recipe.train, optimizer_bytes(self.model, self.recipe)
        if train.micro_batch_size == "auto" and self.state.step == 0:
            self.learned.micro_batch = find_micro_batch(
                self.model, self.task, self.batches, self.accelerator, needed
            )
            self.notes.append(f"micro-batches of {self.learned.micro_batch}, the largest that fit")
        elif self.state.step == 0 and self.data.get("train") is not None:
            self.learned.micro_batch = join_micro_batches(
                self.model, self.task, self.batches, self.accelerator, needed
            )
        self.state.memory = memory_facts(self.recipe, self.learned)

    def train(self) -> None:
        """Train to the end, or until validation ceases to improve, then evaluate the best."""
        self.saver.begin(self.state, self.notes.append)
        self._fit_memory()
        with self._log() as self.log, self.stop, self.gpu:
            for note in self.notes:
                self.log.say(note)
            try:
                if self.state.step == 0:
                    self._measure_before()
                self._make_steps()
                self._measure_best()
            except Stopping as stopping:
                what = f"stopped while {self.stop.activity}; there was nothing new to save"
                raise self.stop.error(what, stopping.by) from None

    def _make_steps(self) -> None:
        """The loop: set the learning rate, make a step, log it, evaluate, save, stop."""
        recipe, state, accelerator = self.recipe, self.state, self.accelerator
        self.stop.activity, self.stop.at_once = TRAINING, False
        training_mode(self.model, self.task.frozen_layers)
        engine = choose_engine(self.model, self.task, self.prepared, accelerator, self.batches)
        self.window = Window(state, accelerator.device)
        self._clock = time.perf_counter()
        if state.evaluation_due:  # the run was stopped before it, or in the middle
            self._evaluate_and_save()
        for planned in self.gpu.timed(self.batches.steps(state.step), state):
            if state.stopped_early:
                break
            began = time.monotonic()
            # a step's noise depends on its number alone, so a resumed run needs no saved state
            seed_everything(recipe.train.seed, planned.number, accelerator.process_index)
            factor = learning_rate_factor(recipe.train.scheduler, planned.number, self.total_steps)
            rate = set_learning_rate(self.optimizer, factor)
            batches = [batch.to(accelerator.device) for batch in planned.batches]
            with phase(f"training, in step {planned.number}"):
                result = train_step(engine, batches)
            self._record(planned, result, rate)
            self.stop.stepped(time.monotonic() - began)
            self._evaluate_and_save()
        self.report["kernels"] = engine.facts

    def _evaluate_and_save(self) -> None:
        """Evaluate, save and leave, where it is time after a step."""
        recipe, state = self.recipe, self.state
        last = state.step == self.total_steps
        due = last or self._due(recipe.evaluate.every_steps)
        evaluating = due and "validation" in self.data
        drawing = due and not last and bool(recipe.task.sample_prompts)
        asked = self.stop.poll()
        saving = last or asked.checkpoint or self._due(recipe.checkpoint.every_steps)
        if not (evaluating or drawing or saving or asked.stop or self.save_pending):
            return
        self._count_seconds()
        self._check_numbers()
        reject_bad_parameters(self.model, state.step, recipe)
        saving |= state.evaluation_due
        state.evaluation_due = evaluating
        stop = asked.stop or (self._evaluate() if evaluating else 0)
        if drawing and not stop:
            self._draw(state.step)
        if saving or stop or state.stopped_early or self.save_pending:
            # after a bad step this waits until another, or validation, vouches for the weights
            self.save_pending = bool(self.window.streak)
            if last or state.stopped_early:
                reject_bad_steps(self.window.streak, recipe, limit=1)
            if not self.save_pending:
                self._save()
        if stop and not self.save_pending:
            raise self.stop.error(f"stopped at step {state.step}; everything is saved", stop)
        self._clock = time.perf_counter()  # evaluations and checkpoints are not counted

    def _log(self) -> RunLog:
        return RunLog(
            self.folder if self.accelerator.is_main_process else None,
            self.total_steps,
            self.state.step,
            self.state.logs,
            self.recipe.train.trackers,
            f"{self.recipe.task.type} {self.folder.name}",
            self.task.unit,
        )

    # ------------------------------------------------------------------------------ the log

    def _record(self, planned: PlannedStep, result: StepResult, rate: float) -> None:
        """Count a step, and log it where that is due."""
        recipe, state = self.recipe, self.state
        self.window.add(planned, result)
        state.step = planned.number
        state.examples += len(planned.examples)
        state.tokens += planned.cost
        self.log.sample(state.step, planned.examples)
        self.log.advance(state.step)
        reject_bad_steps(self.window.streak, recipe)
        if state.step == 1:
            self.log.warn_of_idle(result.idle)
        is_due = state.step % recipe.train.log_every_steps == 0
        if is_due or state.step in (1, self.total_steps):
            self._log_step(rate)

    def _log_step(self, rate: float) -> None:
        self._count_seconds()
        self._check_numbers()
        state, measured = self.state, self.window.record(self.state, self.task)
        left = (self.total_steps - state.step) * measured["seconds_per_step"]
        record = {
            "step": state.step,
            "epoch": self._epoch,
            **measured,
            "learning_rate": rate,
            "memory_bytes": peak_memory_bytes(self.accelerator.device),
            **self.gpu.record(),
        }
        self.log.trained(record, left)
        for text in (*(bad.warning() for bad in self.window.bad), *self.gpu.news()):
            self.log.say(text)
        self.window.clear(state)
        self.window = Window(state, self.accelerator.device, self.window.streak)

    def _count_seconds(self) -> None:
        """Count the time in steps until now, when the device has done them."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)
        before, self._clock = self._clock, time.perf_counter()
        self.state.seconds += self._clock - before

    @property
    def _epoch(self) -> float:
        return round(self.batches.epoch_of(self.state.step), 4)

    # ------------------------------------------------------------------------ evaluations

    def _due(self, every_steps: int | None) -> bool:
        """Return whether something is due that happens every so many steps, or every epoch."""
        return (
            self.state.step % (every_steps or self.batches.steps_per_epoch or self.total_steps) == 0
        )

    def _check_numbers(self) -> None:
        """Wait for the device, and stop if too many steps were bad."""
        self.window.read()
        reject_bad_steps(self.window.streak, self.recipe)
        if self.accelerator.scaler is not None:
            scale = self.accelerator.scaler.get_scale()
            reject_bad_scale(scale, self.state.step, self.recipe)

    def _measure_before(self) -> None:
        """Measure the model before training: what every later number is compared with."""
        if not self.recipe.evaluate.baseline:
            return
        self.stop.activity, self.stop.at_once = "measuring the base, before the first step", True
        for name in ("validation", "test"):
            if name in self.data:
                self.state.before[name] = self._metrics(name, strict=True)
        self._sample("before")
        self._draw(0)
        if "validation" in self.state.before:
            self.judge.value(self.state.before["validation"])  # is there such a metric?
            self.log.evaluated(0, 0.0, self.state.before["validation"], "  (before training)")

    def _metrics(
        self, split: str, predictions: Path | None = None, strict: bool = False
    ) -> dict[str, float]:
        return evaluate(
            self.model,
            self.task,
            self.data[split],
            self.accelerator,
            predictions,
            stop=self.stop,
            strict_loss=strict,
        )

    def _predictions(self, split: str) -> Path:
        """Return the file for the predictions on a split, in a folder that exists."""
        (self.folder / "predictions").mkdir(exist_ok=True)
        return self.folder / "predictions" / f"{split}.jsonl"

    def _sample(self, when: str | int) -> None:
        split, state = self.data.get("validation"), self.state
        add_samples(self.model, self.task, split, self.accelerator, state.samples, when, state.best)

    def _draw(self, when: int | None) -> None:
        draw_samples(self.model, self.task, self.accelerator, self.folder, when)

    def _evaluate(self) -> int:
        """Measure validation; publish the adapter if it is the best so far.

        Returns:
            What broke the evaluation off, so that it is due still, or 0.
        """
        state = self.state
        self.stop.activity = "evaluating"
        at_end = state.step == self.total_steps
        try:
            metrics = self._metrics(
                "validation", self._predictions("validation") if at_end else None
            )
        except Stopping as stopping:
            return stopping.by
        self._sample(state.step)
        self.stop.activity = TRAINING
        state.evaluation_due = False
        self.at_end = metrics if at_end else None
        if math.isfinite(metrics["loss"]):
            self.window.streak = []
        improved = self.judge.improved(metrics, state, self._epoch)
        self.log.evaluated(state.step, self._epoch, metrics, "  (best)" if improved else "")
        if warning := self.judge.warning(metrics, state.step):
            self.log.say(warning)
        if improved:
            self.saver.publish(state)
        training_mode(self.model, self.task.frozen_layers)
        return 0

    def _save(self) -> None:
        """Write a checkpoint."""
        self.window.note(self.state)
        self.stop.activity = "saving"
        began, self.state.logs = time.monotonic(), self.log.flush()
        self.saver.save(self.state, self.log.say)
        self.stop.saved(time.monotonic() - began)
        self.stop.activity = TRAINING

    def _measure_best(self) -> None:
        """Measure validation and test with the best adapter, and complete the report."""
        self.stop.activity, self.stop.at_once = "measuring the best adapter", True
        if self.state.best is None and "validation" in self.data:
            self._metrics("validation", strict=True)  # is it that no loss was a number?
        self.saver.leave_best(self.state)
        after: dict[str, dict[str, float]] = {}
        best = self.state.best
        if self.at_end is not None and best is not None and best["step"] == self.total_steps:
            after["validation"] = self.at_end  # the best is what was evaluated last
        for name in ("validation", "test"):
            if name in self.data and name not in after:
                after[name] = self._metrics(name, self._predictions(name))
        if self.accelerator.is_main_process:
            write_thumbnails(self.folder / "predictions", self.task, self.data)
            compare_with_peft(self.report, self.model, self.recipe, self.in_full, self.log.say)
        self._sample("after")
        self._draw(None)
        add_results(self.report, self.state, after, self._epoch, self.accelerator.device)
        if self.saver.base is not None:
            self.report["base"] = self.saver.base.facts
        if note := self.batches.note:
            self.log.say(note)
        self.report["training"] |= self.gpu.summary()
        self.log.say(trained_line(self.state, self.data.get("train")))
