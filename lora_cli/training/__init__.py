"""Training: the loop, optimizers, learning-rate schedules, checkpoints, and logging."""

from lora_cli.accelerator import end_processes
from lora_cli.training.baselines import train

__all__ = ["train", "end_processes"]
