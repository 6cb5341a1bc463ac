"""A training run, the same for every task and every type of adapter.

`train` reads the data and builds a `Run`. `Run.train` measures the model before training, makes the
steps, and measures the best adapter. `Run._make_steps` is the loop; between two steps,
`Run._after_step` evaluates, saves and stops.
"""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from lora_cli.accelerator import start_accelerator
from lora_cli.adapters.attach import training_mode
from lora_cli.adapters.describe_trained import trained_facts
from lora_cli.adapters.parameter_targets import frozen_experts_note
from lora_cli.environment import reject_mpi
from lora_cli.evaluation.probe import take_probe, write_probe
from lora_cli.evaluation.thumbnails import write_thumbnails
from lora_cli.preprocessing.cached_frozen_outputs import with_cached_frozen_outputs
from lora_cli.preprocessing.cached_hidden_states import with_cached_hidden_states
from lora_cli.preprocessing.data_gate import pass_gate
from lora_cli.preprocessing.encode import load_data
from lora_cli.recipe import Learned, Recipe
from lora_cli.tasks import build_training_task
from lora_cli.tasks.contract import Task
from lora_cli.tasks.examples import Encoded
from lora_cli.training.bad_numbers import reject_bad_parameters, reject_bad_steps
from lora_cli.training.batches import Batches
from lora_cli.training.checkpoints import adopt_adapter, clear_leftovers, optimizer_bytes
from lora_cli.training.choose_engine import choose_engine
from lora_cli.training.early_stopping import Judge
from lora_cli.training.fit_into_memory import fit_into_memory
from lora_cli.training.gpu_monitor import GpuMonitor
from lora_cli.training.launch import explain_errors, main_process_first
from lora_cli.training.learning_rate import learning_rate_factor, set_learning_rate
from lora_cli.training.load_trainable_model import load_trainable_model
from lora_cli.training.mirror import open_mirror
from lora_cli.training.optimizers import build_optimizer
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
from lora_cli.training.rank_agreement import require_same_recipe, require_same_start
from lora_cli.training.rank_watch import watching
from lora_cli.training.run_evaluations import Evaluations
from lora_cli.training.run_log import RunLog
from lora_cli.training.save_and_resume import Saver
from lora_cli.training.seeds import seed_everything
from lora_cli.training.step import train_step
from lora_cli.training.step_log import StepLog, trained_line
from lora_cli.training.stop_request import TRAINING, Stopping, StopRequest
from lora_cli.training.train_state import TrainState, machine_facts, memory_facts, recipe_facts
from lora_cli.unexpected_errors import phase


def train(recipe: Recipe, resume: bool = False, learned: Learned | None = None) -> dict[str, Any]:
    """Train as the recipe says, and write the output folder.

    Args:
        recipe: The checked recipe.
        resume: Continue from the newest checkpoint in the output folder, if there is one.
        learned: Receives what the run learns from the data, such as the labels.

    Returns:
        The report, as in `report.json`. If the run is already complete, its report is returned.
    """
    started, learned = time.monotonic(), Learned() if learned is None else learned
    reject_mpi()
    accelerator = start_accelerator(recipe)
    is_main = accelerator.is_main_process
    with watching(accelerator), ExitStack() as resources:
        require_same_recipe(recipe, resume, accelerator)
        task = build_training_task(recipe, learned)
        # the main process reads and encodes the rows, and the others find them in its cache
        with main_process_first(accelerator):
            if is_main:
                open_mirror(recipe, resume)
            if resume:
                adopt_adapter(recipe, learned)
            finished = finished_report(learned.completed(recipe), resume)
            if is_main and finished is None:
                resources.enter_context(locked_output(recipe, resume))
                clear_leftovers(recipe.output_path)
            task.load_processor()
            if is_main and finished is None:
                task.complete_data(accelerator.device)
            data = load_data(task)
            if finished is not None:
                reject_other_rows(task.completed_recipe, finished, data)
                if is_main:
                    warn_of_other_versions(finished)
                return finished
            findings = pass_gate(task, data) if is_main else None
        stop = StopRequest(recipe, accelerator, started)
        with explain_errors(recipe, learned, accelerator, stop):
            run = Run(task, data, accelerator, stop)
            if findings is not None:
                run.report["data"] = findings.add_to(run.report["data"])
            if resume:
                run.resume()
            require_same_start(recipe, run.state, run.model, accelerator)
            run.train()
            return finish(run.recipe, run.report, accelerator)


@dataclass(frozen=True)
class Due:
    """Actions that are due after a step."""

    evaluate: bool
    """Measure the validation split."""
    draw: bool
    """Generate images for the recipe's sample prompts, if the task is text-to-image."""
    save: bool
    """Write a checkpoint."""
    stop: int
    """Why the run has to stop: a signal's number or `HOURS_ARE_OVER`; 0 if it continues."""


class Run:
    """The parts of a training run, its state, and its three phases: before, the steps, after.

    Args:
        task: The task, with its processor loaded.
        data: The encoded splits by name. There is no `train` if its rows are streamed.
        accelerator: The device, the precision and the processes.
        stop: Tells whether a signal or the time limit asks the run to stop.
    """

    def __init__(
        self,
        task: Task,
        data: dict[str, Encoded],
        accelerator: Accelerator,
        stop: StopRequest,
    ) -> None:
        self.task, self.data, self.accelerator, self.stop = task, data, accelerator, stop
        self.model, head, base = load_trainable_model(task, data, accelerator)
        self.learned = task.learned
        self.recipe = recipe = task.completed_recipe  # now with the labels and the adapter section
        self.folder = recipe.output_path
        self.in_full = list(dict.fromkeys([*head, *recipe.adapter.train_modules]))
        with main_process_first(accelerator):
            self.data = with_cached_frozen_outputs(task, self.model, data, accelerator)
            self.data = with_cached_hidden_states(task, self.model, self.data, accelerator)
        frozen = frozen_experts_note(self.model, recipe)
        self.notes = [*filter(None, [task.length_note, frozen]), *task.notes]
        self.optimizer = build_optimizer(self.model, recipe, self.in_full)
        self.saver = Saver(
            recipe,
            self.model,
            self.optimizer,
            self.in_full,
            base,
            save_processor=self._save_processor_and_probe,
            accelerator=accelerator,
            facts=task.base_facts,
            learned=self.learned,
        )
        self.prepared_optimizer = accelerator.prepare_optimizer(self.optimizer)
        self.batches = Batches(task, self.data.get("train"), accelerator)
        self.total_steps = self.batches.total_steps
        hashes = {name: split.rows.content_sha256() for name, split in data.items()}
        machine = machine_facts(accelerator) | task.teacher_identity
        self.state = TrainState(recipe=recipe_facts(recipe), data=hashes, machine=machine)
        self.report = start_report(recipe, task, data, hashes, self.model, accelerator)
        self.report["parameters"] |= trained_facts(self.model, recipe, self.optimizer.param_groups)
        self.evaluations = Evaluations(task, self.model, self.data, accelerator, stop)
        self.judge, self.gpu = Judge(recipe, task), GpuMonitor.of_run(task, accelerator, stop)
        self.metrics_after_last_step: dict[str, float] | None = None  # on validation
        self.save_pending = False  # a checkpoint is due, but the last steps were bad

    def resume(self) -> None:
        """Continue from the newest complete checkpoint, if there is one."""
        self.state = self.saver.resume(self.state, self.total_steps, self.notes.append)

    def train(self) -> None:
        """Run all steps, or stop early, and measure the best adapter."""
        self.saver.begin(self.state, self.notes.append)
        needed = optimizer_bytes(self.model, self.recipe)
        parts = (self.model, self.task, self.batches, self.accelerator, needed)
        self.notes += fit_into_memory(*parts, begins=self.state.step == 0)
        self.state.memory = memory_facts(self.recipe, self.learned)
        with self._open_log() as self.log, self.stop, self.gpu:
            for note in self.notes:
                self.log.say(note)
            try:
                if self.state.step == 0:
                    self._measure_before()
                self._reevaluate_best()
                self._make_steps()
                self._measure_best()
            except Stopping as stopping:
                what = f"stopped while {self.stop.activity}; there was nothing new to save"
                raise self.stop.error(what, stopping.by) from None

    # -------------------------------------------------------------------------------- the loop

    def _make_steps(self) -> None:
        """Run the loop: set the learning rate, make and log a step; evaluate, save, stop if due."""
        recipe, state, accelerator = self.recipe, self.state, self.accelerator
        self.stop.activity, self.stop.at_once = TRAINING, False
        training_mode(self.model, self.task.frozen_layers)
        optimizer, batches = self.prepared_optimizer, self.batches
        engine = choose_engine(self.model, self.task, optimizer, accelerator, batches)
        self.steps = StepLog(self.log, state, self.task, batches, accelerator, self.gpu)
        if state.evaluation_due:  # the run was interrupted before this evaluation, or during it
            self._after_step()
        for planned in self.gpu.timed(batches.steps(state.step), state):
            if state.stopped_early:
                break
            began = time.monotonic()
            # randomness depends only on the step's number, so no random state is saved
            seed_everything(recipe.train.seed, planned.number, accelerator.process_index)
            factor = learning_rate_factor(recipe.train.scheduler, planned.number, self.total_steps)
            learning_rate = set_learning_rate(self.optimizer, factor)
            micro_batches = [batch.to(accelerator.device) for batch in planned.batches]
            with phase(f"training, in step {planned.number}"):
                result = train_step(engine, micro_batches)
            self.steps.add(planned, result, learning_rate)
            self.stop.stepped(time.monotonic() - began)
            self._after_step()
        self.report["kernels"] = engine.facts

    def _after_step(self) -> None:
        """Evaluate, save and stop, if due."""
        due, state = self._due(), self.state
        if not (due.evaluate or due.draw or due.save or due.stop or self.save_pending):
            return
        self.steps.count_seconds()
        self.steps.check_numbers()
        reject_bad_parameters(self.model, state.step, self.recipe)
        save = due.save or state.evaluation_due
        state.evaluation_due = due.evaluate
        stop = due.stop or (self._evaluate() if due.evaluate else 0)
        if due.draw and not stop:
            self.evaluations.draw(state.step)
        if save or stop or state.stopped_early or self.save_pending:
            self._save_unless_bad()
        if stop and not self.save_pending:
            raise self.stop.error(f"stopped at step {state.step}; everything is saved", stop)
        self.steps.restart_clock()

    def _due(self) -> Due:
        """Return the actions that are due after this step; all processes get the same answer."""
        recipe, is_last = self.recipe, self.state.step == self.total_steps
        evaluation = is_last or self._is_time(recipe.evaluate.every_steps)
        requests = self.stop.poll()
        return Due(
            evaluate=evaluation and "validation" in self.data,
            draw=evaluation and not is_last and bool(recipe.task.sample_prompts),
            save=is_last or requests.checkpoint or self._is_time(recipe.checkpoint.every_steps),
            stop=requests.stop,
        )

    def _is_time(self, every_steps: int | None) -> bool:
        """Return whether this step ends an interval; None stands for an epoch."""
        interval = every_steps or self.batches.steps_per_epoch or self.total_steps
        return self.state.step % interval == 0

    def _evaluate(self) -> int:
        """Measure validation, and publish the adapter if it is the best so far.

        Returns:
            0, or the reason why the evaluation was interrupted, which is then still due.
        """
        state, epoch = self.state, self.batches.epoch_of(self.state.step)
        self.stop.activity = "evaluating"
        is_last = state.step == self.total_steps
        try:
            metrics = self.evaluations.metrics("validation", write_predictions=is_last)
        except Stopping as stopping:
            return stopping.by
        self.evaluations.sample(state, state.step)
        self.stop.activity = TRAINING
        state.evaluation_due = False
        self.metrics_after_last_step = metrics if is_last else None
        if math.isfinite(metrics["loss"]):  # the weights are good, even if the last steps were bad
            self.steps.unlogged.bad_streak = []
        improved = self.judge.improved(metrics, state, epoch)
        self.log.evaluated(state.step, epoch, metrics, "  (best)" if improved else "")
        if warning := self.judge.warning(metrics, state.step):
            self.log.say(warning)
        if improved:
            self.saver.publish(state)
        training_mode(self.model, self.task.frozen_layers)
        return 0

    def _save_unless_bad(self) -> None:
        """Write a checkpoint, unless the last steps were bad.

        It is then pending until a good step, or a finite loss on validation, shows that the weights
        are good.
        """
        bad_streak, state = self.steps.unlogged.bad_streak, self.state
        if state.step == self.total_steps or state.stopped_early:
            reject_bad_steps(bad_streak, self.recipe, limit=1)
        self.save_pending = bool(bad_streak)
        if self.save_pending:
            return
        self.steps.unlogged.save_to_state()
        self.stop.activity = "saving"
        began, state.logs = time.monotonic(), self.log.flush()
        self.saver.save(state, self.log.say)
        self.stop.saved(time.monotonic() - began)
        self.stop.activity = TRAINING

    # -------------------------------------------------------- before the first step, after the last

    def _open_log(self) -> RunLog:
        return RunLog(
            self.folder if self.accelerator.is_main_process else None,
            self.total_steps,
            self.state.step,
            self.state.logs,
            self.recipe.train.trackers,
            f"{self.recipe.task.type} {self.folder.name}",
            self.task.unit,
        )

    def _measure_before(self) -> None:
        """Measure the model before training, for comparison with later measurements."""
        if not self.recipe.evaluate.baseline:
            return
        self.stop.activity, self.stop.at_once = "measuring the base, before the first step", True
        before = self.state.before
        for name in ("validation", "test"):
            if name in self.data:
                before[name] = self.evaluations.metrics(name, strict_loss=True)
        self.evaluations.sample(self.state, "before")
        self.evaluations.draw(0)
        if "validation" in before:
            self.judge.value_of(before["validation"])  # raises if the metric is unknown
            self.log.evaluated(0, 0.0, before["validation"], "  (before training)")

    def _reevaluate_best(self) -> None:
        """Measure the best adapter again if a resumed run selects by another metric or other rows.

        Otherwise, later adapters would be compared with a value that is not comparable.
        """
        state, judge, best = self.state, self.judge, self.state.best
        if best is None or "validation" not in self.data:
            return
        if judge.used_metric_of(best) and not self.saver.evaluation_changed:
            return
        which = f"the best adapter so far (step {best['step']}, by `{best['metric']}`)"
        self.log.say(f"{which} is measured anew, by `{judge.metric}`")
        self.stop.activity, self.stop.at_once = "measuring the best adapter so far", True
        self.saver.restore_best(state)
        metrics = self.evaluations.metrics("validation")
        state.best, state.without_improvement = judge.best_of(metrics, best), 0
        if best["step"] != state.step:
            self.saver.load_newest(state)
            state.evaluation_due = True  # the newest adapter is evaluated again too

    def _measure_best(self) -> None:
        """Measure validation and test with the best adapter, and complete the report."""
        self.stop.activity, self.stop.at_once = "measuring the best adapter", True
        state = self.state
        if state.best is None and "validation" in self.data:
            self.evaluations.metrics("validation", strict_loss=True)  # raises if it is not finite
        self.saver.restore_best(state)
        after: dict[str, dict[str, float]] = {}
        if self.metrics_after_last_step and state.best and state.best["step"] == self.total_steps:
            after["validation"] = self.metrics_after_last_step  # the last adapter is the best
        for name in ("validation", "test"):
            if name in self.data and name not in after:
                after[name] = self.evaluations.metrics(name, write_predictions=True)
        if self.accelerator.is_main_process:
            write_thumbnails(self.folder / "predictions", self.task, self.data)
            compare_with_peft(self.report, self.model, self.recipe, self.in_full, self.log.say)
        self.evaluations.sample(state, "after")
        self.evaluations.draw(None)
        epochs = self.batches.epoch_of(state.step)
        add_results(self.report, state, after, epochs, self.accelerator.device)
        if self.saver.base is not None:
            self.report["base"] = self.saver.base.facts
        if note := self.batches.note:
            self.log.say(note)
        self.report["training"] |= self.gpu.summary()
        self.log.say(trained_line(state, self.data.get("train")))

    def _save_processor_and_probe(self, folder: Path, facts: dict[str, Any] | None = None) -> None:
        """Write the other files of an adapter folder: the processor, and the probe."""
        self.task.save_processor(folder, facts)
        if (probe := take_probe(self.task, self.model, self.accelerator)) is not None:
            write_probe(folder, probe)
