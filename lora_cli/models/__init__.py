"""Base models: how they are loaded, what identifies them, and why one cannot be loaded."""
