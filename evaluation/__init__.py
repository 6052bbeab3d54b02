"""Scores as pure functions, and exact re-ranking."""
