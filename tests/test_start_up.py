"""Commands that compute nothing start without torch, transformers and timm, which take seconds."""

import subprocess
import sys

from tiny import ROOT

from simla.dataset.prepare import CONVERTERS

COMMANDS = [
    "simla",
    *("simla.checkpoint", "simla.configs", "simla.dataset.check", "simla.engine.curves", "simla.web"),
    *("simla.demo.data", "simla.demo.keywords", "simla.demo.pretrain", "simla.demo.all_tasks"),
    "simla.dataset.prepare",
    *(f"simla.dataset.prepare {name}" for name in CONVERTERS),
]
CODE = """
import contextlib, io, runpy, sys

for command in {commands}:
    module, *name = command.split()
    sys.argv = [module, *name, "--help"]
    out = io.TextIOWrapper(io.BytesIO())
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    heavy = {{"torch", "transformers", "timm", "torchvision"}} & set(sys.modules)
    assert not heavy, (command, heavy)
    assert out.tell() > 100, command
"""


def test_help_imports_no_torch():
    """All in one process: what one of them imports stays."""
    code = CODE.format(commands=COMMANDS)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
