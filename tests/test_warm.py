"""A process of warm.py is what subprocess would have started."""

import ast
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import warm
from tiny import ROOT

PROBE = """
import json, os, signal, sys, threading
import probed
found = {"argv": sys.argv, "name": __name__, "cwd": os.getcwd(), "env": dict(os.environ), "path": sys.path}
found["leads"] = os.getsid(0) == os.getpid() == os.getpgrp()
found |= {"threads": threading.active_count(), "fds": len(os.listdir("/proc/self/fd"))}
numbers = (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM)
found["signals"] = {number: str(signal.getsignal(number)) for number in numbers}
print(json.dumps(found))
print("an error", file=sys.stderr)
ending = sys.argv[1]
if ending == "raise":
    raise ValueError("the end")
if ending == "kill":
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(ending))
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "probe.py").write_text(PROBE)
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "probed.py").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    "command", [["scripts/probe.py"], ["-u", "scripts/probe.py"], ["-m", "scripts.probe"]]
)
@pytest.mark.parametrize("ending", ["0", "75", "raise", "kill"])
def test_it_is_started_and_ends_as_any(folder, command, ending):
    arguments = [sys.executable, *command, ending, "--flag", "a b"]
    given = {"cwd": folder, "env": os.environ | {"PYTHONPATH": str(folder / "modules"), "ONE": "1"}}
    plain = subprocess.run(arguments, **given, capture_output=True, text=True, start_new_session=True)
    ours = warm.run(arguments, **given)
    assert ours.returncode == plain.returncode
    (found, expected) = (json.loads(done.stdout) for done in (ours, plain))
    assert found == expected and expected["leads"]
    assert [done.stderr.startswith("an error\n") for done in (ours, plain)] == [True, True]
    assert ours.stderr.splitlines()[-1] == plain.stderr.splitlines()[-1]


def test_signals_reach_it_and_its_record_goes_with_it(tmp_path):
    (tmp_path / "sleeps.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(100)")
    with (tmp_path / "out.txt").open("w") as out:
        process = warm.Popen([sys.executable, "sleeps.py"], cwd=tmp_path, env={"MARK": "here"}, stdout=out)
    while (tmp_path / "out.txt").read_text() != "begun\n":
        time.sleep(0.01)
    assert process.poll() is None and warm.environment(process.pid) == ["MARK=here"]
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == process.poll() == -signal.SIGTERM
    with pytest.raises(OSError):
        warm.environment(process.pid)


def test_it_imports_this_projects_modules_itself(tmp_path):
    files = "[getattr(module, '__file__', None) or '' for module in list(sys.modules.values())]"
    code = f"import sys\nprint({files})"
    (tmp_path / "modules.py").write_text(code)
    files = ast.literal_eval(warm.run([sys.executable, "modules.py"], cwd=tmp_path).stdout)
    assert any("torch" in file for file in files)
    own = [path for path in ROOT.rglob("*.py") if ".venv" not in path.parts]
    assert {str(path) for path in own} & set(files) == {warm.__file__}
