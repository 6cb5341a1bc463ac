"""Parts of object detection: labels, the loss, augmentation, checks of the boxes."""
