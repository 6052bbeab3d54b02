"""SIMLA from Python and from the command line, without a task script.

    import simla

    model = simla.load("checkpoint.pth")
    model.match("photo.jpg", ["a dog on a sofa", "a cat"])      # two probabilities
    model.search("photos/", "two dogs")                         # the best images of a folder

The same from a shell: simla match photo.jpg "a dog on a sofa" --checkpoint checkpoint.pth

Every module of the project is in this package: `simla.models.bert` is models/bert.py of the folder above, to
which a link in this one leads.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simla.heat import Grounding
    from simla.index import Hit, Index
    from simla.loading import load
    from simla.model import Simla
    from simla.utils import UserError

__all__ = ["Grounding", "Hit", "Index", "Simla", "UserError", "load"]

if not Path(__file__).with_name("models").is_dir():  # a checkout without links has small files in their place
    __path__.insert(0, str(Path(__file__).resolve().parents[1]))

_HOMES = dict(zip(__all__, ("heat", "index", "index", "model", "utils", "loading"), strict=True))


def __getattr__(name: str) -> object:
    """Return what this package offers, imported when it is first asked for: torch takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'simla' has no attribute {name!r}")
    globals()[name] = getattr(import_module(f"simla.{_HOMES[name]}"), name)
    return globals()[name]
