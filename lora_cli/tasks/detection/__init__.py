"""What finding objects in pictures needs: boxes, their labels and loss."""
