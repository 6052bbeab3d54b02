"""Prints every key of every config, as docs/config.md has them: python -m simla.configs"""

from simla.configs.schema import reference

if __name__ == "__main__":
    print(reference())
