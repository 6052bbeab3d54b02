"""The SIMLA models: one class per task over the same two encoders (vit.py, bert.py)."""
