"""The end of a process before its time: what is being written is finished, run.json says how it ended."""

import signal
import threading
from typing import NoReturn

from simla.checkpoint.save import Saver
from simla.engine.command import leave
from simla.engine.run_record import RunRecord
from simla.utils import STOP_SIGNALS, signal_numbers

RESUMABLE = 75  # exit code of a run that was told to stop and can go on: EX_TEMPFAIL of sysexits.h


def end_process(code: int, status: str, message: str = "") -> NoReturn:
    """End this process at once, when what is being written is on the disk and run.json says how it ended."""
    if threading.current_thread() is threading.main_thread():
        for number in signal_numbers(STOP_SIGNALS):  # one that comes now would only cut this short
            signal.signal(number, signal.SIG_IGN)
    Saver.wait()
    if RunRecord.current:
        RunRecord.current.finish(status, message)
    leave(code, message)


def end_stopped(signal_name: str, message: str) -> NoReturn:
    """End this process after a stop signal, with the code of what can be resumed, or the shell's for the
    signal where nothing is trained.
    """
    is_training = RunRecord.current is not None and RunRecord.current.is_training
    end_process(RESUMABLE if is_training else 128 + signal.Signals[signal_name], "stopped", message)
