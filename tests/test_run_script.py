"""How commands end when their output has no reader or no room, or Ctrl-C comes early: one line or none."""

import ast
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_house import SCRIPTS, modules
from tiny import ROOT, fork_script

from simla.engine.launch import run_script

SCRIPT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
if __name__ == "__main__":
    from simla.engine.command import prepare
    prepare()
import logging
import os
from pathlib import Path
from simla.engine.launch import run_script
def main():
    BODY
run_script(main)
"""
CLOSED = """
import os, sys
reader, writer = os.pipe()
os.dup2(writer, 1)
os.close(reader)
sys.stdout = open(1, "w", closefd=False)
"""
BIG = "'x' * 1_000_000"
FULL = "error: the output could not be written (No space left on device)\n"


def ask(tmp_path: Path, body: str, stdout: str) -> tuple[int, str]:
    """Runs a command that does `body`, its output going to a pipe without a reader, /dev/full or a file ->
    exit code, what stderr has.
    """
    script = tmp_path / "script.py"
    script.write_text(CLOSED * (stdout == "closed pipe") + SCRIPT.replace("BODY", body))
    output = Path("/dev/full" if stdout == "full disk" else tmp_path / "out")
    process = fork_script([script], output, tmp_path / "err")
    process.join(60)
    return process.exitcode, (tmp_path / "err").read_text("utf-8")


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full")
@pytest.mark.parametrize(
    ("body", "stdout", "code", "message"),
    [
        ("print('x')", "closed pipe", 141, ""),
        (f"print({BIG})", "closed pipe", 141, ""),
        ("print('x'); sys.exit(2)", "closed pipe", 141, ""),
        ("print('x')", "full disk", 1, FULL),
        (f"print({BIG})", "full disk", 1, FULL.replace("output", "output or a file")),
        (f"Path('/dev/full').write_text({BIG})", "file", 1, FULL.replace("output", "output or a file")),
        ("return 3", "file", 3, ""),
        ("os.kill(os.getpid(), 2)", "file", 130, "interrupted\n"),
    ],
)
def test_output_that_is_lost_is_one_line_or_none(tmp_path, body, stdout, code, message):
    assert ask(tmp_path, body, stdout) == (code, message)


@pytest.mark.parametrize("stdout", ["closed pipe", "full disk"])
def test_a_line_of_the_log_costs_the_line_not_the_run(tmp_path, stdout):
    done = str(tmp_path / "done")
    body = f"logging.basicConfig(stream=sys.stdout); logging.error({BIG}); Path({done!r}).touch()"
    _, errors = ask(tmp_path, body, stdout)
    assert Path(done).exists() and len(errors.splitlines()) <= 1


def test_another_broken_pipe_is_no_reader_that_left(tmp_path):
    code, errors = ask(tmp_path, "raise BrokenPipeError('of a worker')", "file")
    assert code == 1 and errors.endswith("BrokenPipeError: of a worker\n")


def test_a_closed_output_is_said_before_anything_is_computed(monkeypatch, capsys):
    monkeypatch.setattr("os._exit", sys.exit)
    monkeypatch.setattr("sys.stdout", None)
    with pytest.raises(SystemExit) as end:
        run_script(pytest.fail)
    assert end.value.code == 1
    assert capsys.readouterr().err == "error: the standard output is closed; send it to a file or /dev/null\n"


def test_before_the_imports(tmp_path):
    """A closed stream's number goes to no file, and Ctrl-C leaves no traceback."""
    program = (
        "import os, time; from simla.engine.command import prepare; prepare(); null = os.stat(os.devnull);"
        "same = [os.path.samestat(os.fstat(n), null) for n in (1, 2)];"
        f"open({str(tmp_path / 'ready')!r}, 'w').write(str(same)); time.sleep(60)"
    )
    command = ["sh", "-c", 'exec "$0" -c "$1" >&- 2>&-', sys.executable, program]
    process = subprocess.Popen(command, cwd=ROOT)
    while not (tmp_path / "ready").exists() or not (tmp_path / "ready").read_text():
        assert process.poll() is None
    assert (tmp_path / "ready").read_text() == "[True, True]"
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130


def test_a_program_that_imports_ours_keeps_its_own_ctrl_c():
    """As does pytest."""

    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_every_command_ends_so_and_scripts_prepare_for_it_before_their_imports():
    """All but the benchmarks."""
    files = [ROOT / path for path in (*modules().values(), *(Path(f"{name}.py") for name in SCRIPTS))]
    started = []
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        blocks = [
            node
            for node in tree.body
            if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        ]
        if not blocks:
            continue
        started.append(file.stem)
        if file.stem in SCRIPTS:
            assert tree.body[1] is blocks[0] and "prepare()" in ast.unparse(blocks[0]), file
        ends_with = r"run_script\(" if file.stem in SCRIPTS else r"run_command\(|\brun\("  # `run` calls it
        assert re.search(ends_with, ast.unparse(blocks[-1])), file
    assert {*SCRIPTS, "__main__", "curves", "pretrain", "all_tasks", "data"} <= {*started}
