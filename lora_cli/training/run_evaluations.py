"""Evaluate the model of a run: metrics of splits, sample answers, and sample images."""

from __future__ import annotations

from accelerate import Accelerator
from torch import nn

from lora_cli.evaluation.draw_samples import draw_samples
from lora_cli.evaluation.evaluate_split import evaluate
from lora_cli.evaluation.samples import add_samples
from lora_cli.tasks.contract import Task
from lora_cli.tasks.examples import Encoded
from lora_cli.training.stop_request import StopRequest
from lora_cli.training.train_state import TrainState


class Evaluations:
    """Evaluates the model of a run in its current state.

    Args:
        task: The task, with the complete recipe.
        model: The model with its adapter.
        data: The encoded splits by name.
        accelerator: The device, the precision and the processes.
        stop: Interrupts an evaluation if the run has to stop.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        data: dict[str, Encoded],
        accelerator: Accelerator,
        stop: StopRequest,
    ) -> None:
        self.task, self.model, self.data = task, model, data
        self.accelerator, self.stop = accelerator, stop
        self.folder = task.recipe.output_path

    def metrics(
        self, split: str, write_predictions: bool = False, strict_loss: bool = False
    ) -> dict[str, float]:
        """Return the metrics of a split.

        Args:
            split: `validation` or `test`.
            write_predictions: Write the predictions to `predictions/` in the output folder.
            strict_loss: Raise an error if the loss is NaN or infinite.

        Raises:
            Stopping: If the run has to stop.
        """
        file = None
        if write_predictions:
            (self.folder / "predictions").mkdir(exist_ok=True)
            file = self.folder / "predictions" / f"{split}.jsonl"
        return evaluate(
            self.model,
            self.task,
            self.data[split],
            self.accelerator,
            file,
            stop=self.stop,
            strict_loss=strict_loss,
        )

    def sample(self, state: TrainState, when: str | int) -> None:
        """Add the model's answers to a few validation rows to the state of the run.

        Args:
            state: The state of the run.
            when: `before` training, the step, or `after` training.
        """
        split = self.data.get("validation")
        add_samples(self.model, self.task, split, self.accelerator, state.samples, when, state.best)

    def draw(self, step: int | None) -> None:
        """Generate images for the recipe's sample prompts, if the task is text-to-image.

        Args:
            step: The number of steps so far; None for the best adapter.
        """
        draw_samples(self.model, self.task, self.accelerator, self.folder, step)
