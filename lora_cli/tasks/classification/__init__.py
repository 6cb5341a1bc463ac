"""What tasks with labels share: classes, tags, heads."""
