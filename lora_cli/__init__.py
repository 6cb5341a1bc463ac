"""Fine-tune pretrained models with low-rank adapters, from YAML recipes."""

__version__ = "0.1.0"
