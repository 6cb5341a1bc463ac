"""Data: where rows come from, which are held out, and in which order they are seen."""
