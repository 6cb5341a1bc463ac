"""The parts of the text embedding task: rows, losses, search, and proposals for `lora init`."""
