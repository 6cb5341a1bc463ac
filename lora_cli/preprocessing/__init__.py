"""Turn rows into examples: check, encode, cache, stream, and plan the steps."""
