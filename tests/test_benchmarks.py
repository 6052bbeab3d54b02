"""The benchmarks of ranking run, and both ways agree; how fast they are no test says."""

import json
import os
import subprocess
import sys

import pytest
from tiny import ROOT

KEYS = {"ratio", "seconds", "flops", "mfu", "peak_memory_bytes", "max_abs_difference", "device", "versions"}


@pytest.mark.parametrize("name", ["rerank", "vqa_rank"])
def test_the_last_line_has_the_figures(name):
    done = subprocess.run(
        [sys.executable, f"benchmarks/{name}.py", "--scale", "tiny", "--device", "cpu"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() >= KEYS and found["benchmark"] == name
    assert found["max_abs_difference"] <= 1e-5 and 0 < found["flops"] < found["plain_flops"]
