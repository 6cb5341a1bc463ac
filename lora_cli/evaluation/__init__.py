"""Use a trained adapter: evaluate it, compare it with another, predict, converse."""
