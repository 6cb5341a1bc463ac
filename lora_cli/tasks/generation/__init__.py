"""What tasks that write text share: prompts, generation, the loss of tokens."""
