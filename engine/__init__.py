"""The machine of every run: start, training steps, signals, checkpoints, logs, dry runs, curves."""
