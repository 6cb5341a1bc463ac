"""What a trained adapter is worth and what it says: evaluate, compare, predict, converse."""
