"""Parts of text-to-image training: captions, noise schedules, image generation."""
