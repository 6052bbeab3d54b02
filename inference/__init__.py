"""A trained checkpoint as a Python object: what `import simla` and the command line `simla` are made of."""
