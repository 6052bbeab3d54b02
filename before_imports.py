"""What a command does before its other imports, which take seconds: a script imports this first, where it is
the one that was started.

Ctrl-C ends it without a traceback, until `imported` is called. A standard stream that was closed (`>&-`) is
/dev/null: a file opened later would get its number, and with it what libraries print.
"""

import os
import signal
import sys


def _leave(number: int, _) -> None:
    os._exit(128 + number)


def imported() -> None:
    """Make Ctrl-C a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def simla() -> None:
    """The installed command `simla`."""
    from simla import run

    run()


for _number in range(3):
    try:
        os.fstat(_number)
    except OSError:
        os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one
if sys.stderr is None:
    sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123, as long as the process
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored, as after `&`
    signal.signal(signal.SIGINT, _leave)
