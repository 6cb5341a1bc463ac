"""Distillation: training with the outputs of a teacher."""
