"""What a command does before its other imports, which take seconds: a script calls `prepare` first, where it
is the one that was started.
"""

import os
import signal
import sys


def _leave(number: int, _) -> None:
    os._exit(128 + number)


def prepare() -> None:
    """Ctrl-C ends the command without a traceback, until `imported` is called. A standard stream that was
    closed (`>&-`) becomes /dev/null: a file opened later would get its number, and what libraries print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123, as long as the process
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored, as after `&`
        signal.signal(signal.SIGINT, _leave)


def imported() -> None:
    """Make Ctrl-C a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
