"""What can be found of an entry: bits that add up in its flags."""

from enum import IntFlag


class Cause(IntFlag):
    """In the order of the report. Those before TEXT_CUT are problems, the others notes."""

    WRONG_ENTRY = 1 << 0
    EMPTY_TEXT = 1 << 1
    MISSING = 1 << 2
    UNREADABLE = 1 << 3
    EMPTY_FILE = 1 << 4
    NOT_IMAGE = 1 << 5
    TRUNCATED = 1 << 6
    DAMAGED = 1 << 7
    TINY = 1 << 8
    OVERLAP = 1 << 9
    TEXT_CUT = 1 << 10
    SAME_CONTENT = 1 << 11
    ALIKE = 1 << 12
    ALIKE_EVALUATION = 1 << 13
    ONE_COLOUR = 1 << 14


NO_PIXELS = (
    Cause.MISSING | Cause.UNREADABLE | Cause.EMPTY_FILE | Cause.NOT_IMAGE | Cause.TRUNCATED | Cause.DAMAGED
)
PROBLEMS = Cause.WRONG_ENTRY | Cause.EMPTY_TEXT | NO_PIXELS | Cause.TINY | Cause.OVERLAP
NAMES = {
    Cause.WRONG_ENTRY: "wrong entry",
    Cause.EMPTY_TEXT: "empty text",
    Cause.MISSING: "no such image",
    Cause.UNREADABLE: "image cannot be read",
    Cause.EMPTY_FILE: "empty image file",
    Cause.NOT_IMAGE: "not an image",
    Cause.TRUNCATED: "truncated image",
    Cause.DAMAGED: "damaged image",
    Cause.TINY: "tiny image",
    Cause.OVERLAP: "image of an evaluation split",
    Cause.TEXT_CUT: "text is cut",
    Cause.SAME_CONTENT: "same content as another file",
    Cause.ALIKE: "looks like another image",
    Cause.ALIKE_EVALUATION: "looks like an evaluation image",
    Cause.ONE_COLOUR: "image of one colour",
}
