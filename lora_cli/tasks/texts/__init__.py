"""What tasks that read text share: tokens, lengths, padding, several texts in a row."""
