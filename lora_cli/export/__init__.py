"""What becomes of a trained adapter: a stand-alone model."""
