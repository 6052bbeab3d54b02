"""The web page on which people ask trained checkpoints about their own images."""
