"""Begins and ends every command: closed streams, Ctrl-C, errors in one sentence, output that is lost."""

import argparse
import errno
import logging
import os
import select
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from simla.utils import UserError

GOES_ON = "interrupted; the same command goes on from here"


def prepare() -> None:
    """Let Ctrl-C end the command without a traceback until `run_command` is called; scripts call this before
    their imports, which take seconds. A standard stream that was closed (`>&-`) becomes /dev/null: a file
    opened later would get its number, and what libraries print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123, as long as the process
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored, as after `&`
        signal.signal(signal.SIGINT, _leave_at_signal)


def _leave_at_signal(number: int, _) -> None:
    os._exit(128 + number)


def leave(code: int, message: str = "") -> NoReturn:
    """End this process at once, with a word on standard error."""
    with suppress(OSError):  # nobody is there to be told
        if message:
            print(message, file=sys.stderr, flush=True)
    with suppress(OSError):
        if sys.stdout is not None:
            sys.stdout.flush()
    os._exit(code)


def run_command(
    main: Callable[[], object], interrupted: str = "interrupted", end: Callable[..., NoReturn] = leave
) -> None:
    """Run a command, of whose `main` a number is the exit code; `end` ends the process in place of `leave`.

    A UserError ends it as one sentence and exit code 1, without a traceback; Ctrl-C with the word
    `interrupted` and the shell's code 130; a reader of its output that has left (`| head`) with the shell's
    code 141 and no word; output or a file that finds no room with one sentence and exit code 1; any other
    exception with its traceback. What the terminal's encoding lacks is printed as its number. A line of the
    log that cannot be written costs the line, not the command.
    """
    prepare()
    if signal.getsignal(signal.SIGINT) is _leave_at_signal:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.stdout is None:
        end(1, message="error: the standard output is closed; send it to a file or /dev/null")
    sys.stdout.reconfigure(errors="backslashreplace")
    logging.raiseExceptions = False
    try:
        code = main()
    except UserError as error:
        end(1, message=f"error: {error}")
    except KeyboardInterrupt:
        if end is not leave:
            end(128 + signal.SIGINT, message=interrupted)
        print(interrupted, file=sys.stderr)
        sys.exit(128 + signal.SIGINT)  # not at once: pools of processes give back what they hold
    except SystemExit:  # of argparse, which may have printed its help
        _end_where_output_is_lost(end)
        raise
    except OSError as error:
        _end_where_output_is_lost(end)
        if isinstance(error, BrokenPipeError) and _reader_has_left():
            end(128 + signal.SIGPIPE)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = error.filename or "the output or a file"
            end(1, message=f"error: {what} could not be written ({error.strerror})")
        raise
    _end_where_output_is_lost(end)
    if isinstance(code, int) and code:  # a task script returns its scores
        sys.exit(code)


def whole_number(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """Return the `type` of a flag that takes whole numbers in this range."""

    def read(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"expected a number from {least} to {most}, got {text!r}")
        return int(text)

    return read


def _reader_has_left() -> bool:
    """Return whether standard output or error is a pipe that nobody reads."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _end_where_output_is_lost(end: Callable[..., NoReturn]) -> None:
    """End the process where what it has printed cannot be written."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            end(128 + signal.SIGPIPE)
        except OSError as error:
            end(1, message=f"error: the output could not be written ({error.strerror})")
