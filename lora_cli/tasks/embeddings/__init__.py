"""What embeddings of texts need: their rows, losses and search."""
