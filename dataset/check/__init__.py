"""Looks for what is wrong with the annotation files and images of a config: `python -m simla.dataset.check`."""
