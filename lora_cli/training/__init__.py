"""Training: the loop, the optimizers and schedules, the saved state, and the display."""

from lora_cli.training.baselines import train
from lora_cli.training.launch import end_processes

__all__ = ["train", "end_processes"]
