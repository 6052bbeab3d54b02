"""Python processes that start in no time: a server imports the packages, once for all tests, and forks each.

`Popen` and `run` stand for those of subprocess. What they start is otherwise a process like any other: it has
the arguments, environment, folder, output and signals it is given, imports this project's modules itself,
runs its script as __main__ and ends as `_end` says. torch's launcher, started so, starts its ranks so. The
server has one thread and has touched no GPU, or a fork would not be safe. Elsewhere than on Linux subprocess
does the work.

As a script (`warm.py FOLDER/PID`) this is the server, until the process PID has ended; see `_server`.
"""

import atexit
import fcntl
import gc
import importlib
import io
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

ADDRESS = "SIMLA_TESTS_SERVER"  # variable: FOLDER/PID, the server's socket; PID is the process it serves
PACKAGES = (
    *("torch.distributed.launcher.api", "torch.utils.data", "timm.optim", "timm.scheduler", "transformers"),
    *("cv2", "PIL.JpegImagePlugin", "PIL.PngImagePlugin", "ruamel.yaml", "safetensors.torch"),
)
FLAGS = ("-u",)  # of Python; the only one there is use for


# ---- the tests' side ----


def _server() -> str:
    """Its address; the first to ask starts it."""
    path = Path(os.environ[ADDRESS])
    path.parent.mkdir(exist_ok=True)
    log = path.with_suffix(".log")
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            with log.open("w") as output:
                environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
                starting = subprocess.Popen(
                    [sys.executable, __file__, str(path)],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            while not path.exists():
                if starting.poll() is not None:
                    raise RuntimeError(f"the server of the tests did not start: {log.read_text()}")
                time.sleep(0.05)
    return str(path)


class Popen:
    """As subprocess.Popen, for a command [sys.executable, script or "-m" module, ...]; stdout and stderr are
    files. The process leads a session of its own.
    """

    def __init__(self, args, cwd=None, env=None, stdout=None, stderr=None, start_new_session=True):
        self.args, self.returncode = list(map(str, args)), None
        program, *rest = self.args
        if program != sys.executable or not start_new_session:
            raise ValueError(f"only a command of this Python, in a session of its own, not {self.args}")
        request = {
            "args": rest,
            "cwd": str(cwd or Path.cwd()),
            "env": dict(os.environ if env is None else env),
        }
        self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.connection.connect(_server())
        files = [1 if stdout is None else stdout.fileno(), 2 if stderr is None else stderr.fileno()]
        socket.send_fds(self.connection, [json.dumps(request).encode()], files)
        self.pid = int(self.connection.recv(100))

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self.connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = int(self.connection.recv(100))
            self.connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(args, cwd=None, env=None, timeout: float | None = None) -> subprocess.CompletedProcess:
    """As subprocess.run with capture_output and text."""
    if sys.platform != "linux":
        return subprocess.run(args, cwd=cwd, env=env, timeout=timeout, capture_output=True, text=True)
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as stdout,
        tempfile.TemporaryFile("w+", encoding="utf-8") as stderr,
    ):
        process = Popen(args, cwd=cwd, env=env, stdout=stdout, stderr=stderr)
        try:
            process.wait(timeout)
        finally:
            process.kill()
        printed = [(file.seek(0), file.read())[1] for file in (stdout, stderr)]
    return subprocess.CompletedProcess(process.args, process.returncode, *printed)


def environment(process: int) -> list[str]:
    """NAME=value, as a living process began; OSError for one that has ended, or another user's."""
    record = _record(process)
    if record is None or not record.exists():  # not of the server
        record = Path(f"/proc/{process}/environ")
    return record.read_bytes().decode(errors="replace").split("\0")


# ---- the server's side ----


def _record(process: int) -> Path | None:
    """The file with the environment of a process of the server, as /proc shows the server's own for it."""
    return Path(os.environ[ADDRESS]).with_name(f"{process}.environ") if ADDRESS in os.environ else None


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def serve(path: Path) -> Callable[[], None] | None:
    """None when nobody can ask any more. In a forked process: what that one is there for."""
    for package in PACKAGES:
        importlib.import_module(package)
    from transformers import BertTokenizer  # noqa: F401  transformers imports it when it is named

    if len(list(Path("/proc/self/task").iterdir())) > 1:
        raise RuntimeError("one of the packages starts threads: a fork of this process is not safe")
    gc.freeze()  # no collection in a forked process need look at these objects, and copy their pages
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those forked here
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"{path}.new")
        listener.listen(50)
        Path(f"{path}.new").rename(path)  # now it can be found
        while _is_alive(int(path.name)):
            if not select.select([listener], [], [], 1)[0]:
                continue
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                return _start(connection)
            connection.close()
    shutil.rmtree(path.parent, ignore_errors=True)
    return None


def _start(connection: socket.socket) -> Callable[[], None]:
    """Forks the process that is asked for, in which it returns; here it waits for that one's end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request, files, *_ = socket.recv_fds(connection, 2**20, 2)
    request, (wait, begin) = json.loads(request), os.pipe()
    process = os.fork()
    if process == 0:
        connection.close()
        os.close(begin)
        if not os.read(wait, 1):
            os._exit(1)
        os.close(wait)
        return partial(_work, request, files)
    for file in (wait, *files):
        os.close(file)
    record = _record(process)
    record.write_text("\0".join(f"{name}={value}" for name, value in request["env"].items()))
    with suppress(BrokenPipeError):  # who asked was killed: then it never began
        connection.send(str(process).encode())
        os.write(begin, b"!")
    os.close(begin)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    record.unlink(missing_ok=True)
    with suppress(BrokenPipeError):
        connection.send(str(code).encode())
    os._exit(0)


def _work(request: dict, files: list[int]) -> None:
    """What Python does with the command line, in the process that it is for."""
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    for number, file in enumerate(files, 1):
        os.dup2(file, number)
        os.close(file)
    args = request["args"]
    unbuffered = args[0] in FLAGS
    args = args[unbuffered:]
    sys.stdout = io.TextIOWrapper(open(1, "wb", closefd=False), encoding="utf-8", write_through=unbuffered)  # noqa: SIM115
    sys.stderr = io.TextIOWrapper(
        open(2, "wb", buffering=0, closefd=False),  # noqa: SIM115
        encoding="utf-8",
        errors="backslashreplace",
        write_through=True,
    )
    is_module = args[0] == "-m"
    folder = request["cwd"] if is_module else str(Path(args[0]).resolve().parent)
    given = request["env"].get("PYTHONPATH", "")
    sys.path[:1] = [folder, *filter(None, given.split(os.pathsep))]  # in place of this file's folder
    if not is_module:
        sys.argv = args
        runpy.run_path(args[0], run_name="__main__")
        return
    if args[1].startswith("torch.distributed."):
        from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

        subprocess_handler.Popen = Popen
    sys.argv = args[1:]
    runpy.run_module(args[1], run_name="__main__", alter_sys=True)


def _end(work: Callable[[], None]) -> None:
    """Does the work and ends as Python does, but for freeing memory: that would copy the server's, and take a
    second.
    """
    code = 0
    try:
        work()
    except SystemExit as end:
        code = end.code
        if not isinstance(code, int | None):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    work = serve(Path(sys.argv[1]))
    if work:
        _end(work)
