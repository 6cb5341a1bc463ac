"""Base models: load them, identify them, and explain why one cannot be loaded."""
