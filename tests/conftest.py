import os
import tempfile
import uuid
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault(  # see warm.py; pytest's workers have it from pytest itself
    "SIMLA_TESTS_SERVER", str(Path(tempfile.gettempdir(), f"simla-{uuid.uuid4().hex[:8]}", str(os.getpid())))
)

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
