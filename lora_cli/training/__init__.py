"""Training: the loop, the optimizers and schedules, the saved state, and the display."""

from lora_cli.accelerator import end_processes
from lora_cli.training.baselines import train

__all__ = ["train", "end_processes"]
