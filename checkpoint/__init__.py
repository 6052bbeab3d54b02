"""Checkpoint files: written whole, read without running code, mapped from one task's names to another's."""
