"""PEFT's adapter format: only this package knows the names of its files, keys and tensors."""
