"""PEFT's adapter format: the one room that knows the names of its files, keys and tensors."""
