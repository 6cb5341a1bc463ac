"""The shared parts of tasks with labels: classes, tags of entities, classification heads."""
