"""Looks for what is wrong with annotation files and images of a config: `python -m simla.dataset.check`."""
