"""SIMLA from Python and from the command line, without a task script.

    import simla

    model = simla.load("checkpoint.pth")
    model.match("photo.jpg", ["a dog on a sofa", "a cat"])      # two probabilities
    model.search("photos/", "two dogs")                         # the best images of a folder

The same from a shell: python simla.py match photo.jpg "a dog on a sofa" --checkpoint checkpoint.pth
"""

if __name__ == "__main__":
    from before_imports import prepare

    prepare()

from inference.command_line import main
from inference.heat import Grounding
from inference.index import Hit, Index
from inference.loading import load
from inference.model import Simla
from launch import run_script
from utils import UserError

__all__ = ["Grounding", "Hit", "Index", "Simla", "UserError", "load"]


def run() -> None:
    """The command `simla`."""
    run_script(main)


if __name__ == "__main__":
    run()
