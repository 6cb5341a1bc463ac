"""Low-rank adapters: the layers, how they are attached to a model, and their folder on disk."""
