"""Code shared by the tasks that read text: tokens, lengths, padding, packing."""
