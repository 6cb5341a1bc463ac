"""Save a run while it trains, and resume it: checkpoints, the best adapter, the mirror."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from lora_cli.errors import IntegrityError, ResourceError, counted
from lora_cli.files import MANIFEST, sha256_of, verify_manifest
from lora_cli.models.base_facts import require_facts
from lora_cli.models.fingerprint import Fingerprint, read_fingerprint, require_base
from lora_cli.recipe import Learned, Recipe, read_computation
from lora_cli.training.checkpoints import (
    checkpoint_folder,
    load_checkpoint,
    require_space_for_checkpoints,
    restore_checkpoint,
    restore_parameters,
    save_checkpoint,
)
from lora_cli.training.mirror import Mirror, mirror_checkpoint
from lora_cli.training.output_folder import REPORT, require_output, write_recipe
from lora_cli.training.published_adapter import SaveProcessor, publish_adapter, restore_published
from lora_cli.training.rank_agreement import require_same_parameters
from lora_cli.training.run_log import repair_logs
from lora_cli.training.train_state import (
    TrainState,
    clear_changed_early_stop,
    evaluation_changed,
    memory_facts,
    reject_changes,
    reject_fewer_steps,
)


class Saver:
    """Writes checkpoints, the best adapter in the output folder, and the mirror of both.

    The main process writes, and the others wait for it.

    Args:
        recipe: Names the folders, and how many checkpoints to keep.
        model: The model with its adapter attached.
        optimizer: The optimizer of the trained parameters.
        in_full: The names of the modules that are trained in full.
        base: The fingerprint of the base, which is written next to the adapter.
        save_processor: Writes the tokenizer or other processor, and the probe, into a folder.
        accelerator: The processes, and the loss scale of fp16.
        facts: The facts of the base that affect outputs besides its tensors.
        learned: Receives the micro-batch size with which the run was started.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        in_full: list[str],
        base: Fingerprint | None,
        save_processor: SaveProcessor,
        accelerator: Accelerator,
        facts: dict[str, Any],
        learned: Learned,
    ) -> None:
        self.recipe, self.model, self.optimizer = recipe, model, optimizer
        self.in_full, self.save_processor, self.accelerator = in_full, save_processor, accelerator
        self.base, self.folder, self.facts = base, recipe.output_path, facts
        self.learned = learned
        self.evaluation_changed = False
        """Whether a resumed run evaluates in another way, so that metrics are not comparable."""

    def begin(self, state: TrainState, say: Callable[[str], None]) -> None:
        """Check that the disk has space and the mirror can be written, then write the recipe.

        Args:
            state: The state of the run.
            say: Called with a line about each incomplete log.
        """
        if not self.accelerator.is_main_process:
            return
        require_space_for_checkpoints(self.model, self.recipe)
        for loss in repair_logs(self.folder, state.logs, state.step):
            say(f"warning: {loss}")
            state.changes.append(f"after step {state.step}: {loss}")
        if self.recipe.checkpoint.mirror is not None:
            mirror = Mirror(self.recipe)
            mirror.check()
            mirror.claim(self.recipe, state)
        write_recipe(self.recipe)

    def resume(self, fresh: TrainState, total_steps: int, say: Callable[[str], None]) -> TrainState:
        """Load the newest complete checkpoint into the model, and return its state.

        Args:
            fresh: The state of a new run; the checkpoint must have the same recipe and data.
            total_steps: The number of steps of the run, by the recipe.
            say: Called with a line about each skipped checkpoint, and each change.
        """
        checkpoint = load_checkpoint(self.folder, say)
        if checkpoint is None:
            say(f"there is no checkpoint in {self.folder}: starting at the beginning")
            return fresh
        folder, state = checkpoint
        if self.recipe.train.micro_batch_size in ("auto", state.memory.get("asked")):
            self.learned.micro_batch = state.memory["micro_batch_size"]
        self.learned.checkpointing = state.memory.get("gradient_checkpointing")
        fresh.memory = memory_facts(self.recipe, self.learned)
        changes = reject_changes(state, self.recipe, fresh)
        reject_fewer_steps(state, total_steps, self.recipe)
        for change in changes:
            say(f"warning: {change}")
        if (self.folder / REPORT).exists():
            say(
                f"the run was complete after {counted(state.step, 'step')}; "
                "it goes on with what has changed"
            )
        if changes:  # when the run is resumed again, the changed recipe counts
            clear_changed_early_stop(state, fresh, say)
            self.evaluation_changed = evaluation_changed(state, fresh)
            state.recipe, state.data = fresh.recipe, fresh.data
            state.machine, state.memory = fresh.machine, fresh.memory
            state.changes += [f"after step {state.step}: {change}" for change in changes]
        run = f"the run {self.folder}"
        computation = read_computation(folder)
        if computation is None:
            say(f"warning: {run} is of an earlier version: its tokenizer is unverified")
        else:
            require_facts(computation["base"], self.facts, self.recipe, run, True, True)
        self.base = require_base(read_fingerprint(folder), self.base, self.recipe, run)
        restore_checkpoint(folder, state, self.model, self.optimizer)
        if self.accelerator.scaler is not None and state.scaler is not None:
            self.accelerator.scaler.load_state_dict(state.scaler)
        return state

    def save(self, state: TrainState, say: Callable[[str], None]) -> None:
        """Write a checkpoint, and copy it to the mirror.

        Args:
            state: The state of the run.
            say: Called with a line if the mirror could not be written; the run continues.

        Raises:
            NumericsError: If the processes no longer have the same parameters.
        """
        require_same_parameters(self.model, state.step, self.accelerator)
        if self.accelerator.scaler is not None:
            state.scaler = self.accelerator.scaler.state_dict()
        if self.accelerator.is_main_process:
            require_output(self.recipe)
            trained = (self.model, self.recipe, self.in_full, self.base)
            save_checkpoint(self.folder, state, self.optimizer, *trained, self.facts)
            if self.recipe.checkpoint.mirror is not None:
                try:
                    mirror_checkpoint(self.recipe, state.step, state.logs)
                except ResourceError as error:
                    say(f"warning: {error.problems[0].what}; the next checkpoint tries again")
        self.accelerator.wait_for_everyone()

    def publish(self, state: TrainState) -> None:
        """Write the current adapter into the output folder."""
        if self.accelerator.is_main_process:
            require_output(self.recipe)
            trained = (self.model, self.recipe, self.in_full, self.base)
            publish_adapter(self.folder, *trained, self.save_processor, self.facts)
        self.accelerator.wait_for_everyone()
        state.published = sha256_of(self.folder / MANIFEST)

    def restore_best(self, state: TrainState) -> None:
        """Put the best adapter, or the last if none was evaluated, into model and output folder.

        Raises:
            IntegrityError: If it is neither in the output folder nor among the checkpoints.
        """
        if state.best is None or state.best["step"] == state.step:
            if not self._has_published(state):
                self.publish(state)
            return
        if self._has_published(state):
            restore_published(self.folder, self.model, self.recipe)
            return
        best = checkpoint_folder(self.folder, state.best["step"])
        if not (best.is_dir() and verify_manifest(best)):
            raise IntegrityError(
                f"the adapter in {self.folder} is not that of step {state.best['step']}, "
                "which was the best",
                str(self.folder),
                "it was damaged or edited; start again in another folder with `-o DIR`",
            )
        restore_parameters(best, self.model)
        self.publish(state)

    def load_newest(self, state: TrainState) -> None:
        """Load the parameters of the newest checkpoint into the model."""
        restore_parameters(checkpoint_folder(self.folder, state.step), self.model)

    def _has_published(self, state: TrainState) -> bool:
        """Return whether the output folder has the adapter that was published last, undamaged."""
        manifest = self.folder / MANIFEST
        if not manifest.exists() or sha256_of(manifest) != state.published:
            return False
        try:
            return verify_manifest(self.folder)
        except IntegrityError:
            return False
