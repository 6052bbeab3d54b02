"""Causes for which entries are named: bits that add up in an entry's flags."""

from enum import IntFlag, auto


class Cause(IntFlag):
    """A cause, in the order of the report; those before TEXT_IS_CUT are problems, the others notes."""

    WRONG_ENTRY = auto()
    EMPTY_TEXT = auto()
    NO_SUCH_IMAGE = auto()
    IMAGE_CANNOT_BE_READ = auto()
    EMPTY_IMAGE_FILE = auto()
    NOT_AN_IMAGE = auto()
    TRUNCATED_IMAGE = auto()
    DAMAGED_IMAGE = auto()
    TINY_IMAGE = auto()
    IMAGE_OF_AN_EVALUATION_SPLIT = auto()
    TEXT_IS_CUT = auto()
    SAME_CONTENT_AS_ANOTHER_FILE = auto()
    LOOKS_LIKE_ANOTHER_IMAGE = auto()
    LOOKS_LIKE_AN_EVALUATION_IMAGE = auto()
    IMAGE_OF_ONE_COLOUR = auto()

    @property
    def label(self) -> str:
        return self.name.lower().replace("_", " ")


PROBLEMS = Cause(Cause.TEXT_IS_CUT - 1)
NO_PIXELS = Cause(Cause.TINY_IMAGE - Cause.NO_SUCH_IMAGE)  # all from the one to before the other
