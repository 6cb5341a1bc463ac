"""What tasks that see pictures share."""
