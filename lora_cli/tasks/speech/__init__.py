"""What tasks that hear speech share: recordings and transcripts."""
