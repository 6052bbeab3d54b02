"""Prints every key of every config, as docs/config.md has them: python -m simla.configs"""

from simla.configs.schema import reference
from simla.engine.command import run_command

if __name__ == "__main__":
    run_command(lambda: print(reference()))
