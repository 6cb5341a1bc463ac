"""Code shared by the tasks whose inputs are images."""
