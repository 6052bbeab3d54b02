"""SIMLA from Python and from the command line, without a task script.

    import simla

    model = simla.load("checkpoint.pth")
    model.match("photo.jpg", ["a dog on a sofa", "a cat"])      # two probabilities
    model.search("photos/", "two dogs")                         # the best images of a folder

The same from a shell: python -m simla match photo.jpg "a dog on a sofa" --checkpoint checkpoint.pth
"""

if __name__ == "__main__":
    from simla.engine.before_imports import prepare

    prepare()

from simla.__main__ import main
from simla.engine.launch import run_script
from simla.heat import Grounding
from simla.index import Hit, Index
from simla.loading import load
from simla.model import Simla
from simla.utils import UserError

__all__ = ["Grounding", "Hit", "Index", "Simla", "UserError", "load"]


def run() -> None:
    """The command `simla`."""
    run_script(main)


if __name__ == "__main__":
    run()
