"""One installed name: `simla`, beside a user's own `utils`, `config`, `models` and `dataset`."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from test_house import FOLDERS, SCRIPTS, tracked
from tiny import ROOT

BUILD = "from setuptools import build_meta; import sys; build_meta.{}(sys.argv[1])"
THEIRS = {
    "utils.py": "NAME = 'my utils'\n",
    "config.py": "NAME = 'my config'\n",
    "models/__init__.py": "NAME = 'my models'\n",
    "dataset/__init__.py": "NAME = 'my dataset'\n",
}
USE_THEIRS = """
import config, dataset, models, utils
names = [module.NAME for module in (utils, config, models, dataset)]
assert names == ["my utils", "my config", "my models", "my dataset"], names
"""
USE_OURS = """
import simla
assert "torch" not in sys.modules, "import simla takes no time"
assert callable(simla.load)
from simla.models.bert import BertModel
from simla.configs.schema import PRETRAIN
import simla.checkpoint.load, simla.dataset.text, simla.engine.launch, simla.evaluation.rerank
files = {name: getattr(module, "__file__", None) or "" for name, module in sys.modules.items()}
ours = {name for name, file in files.items() if file.startswith(sys.argv[2:][0])}
assert ours and all(name.split(".")[0] == "simla" for name in ours), ours
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A copy of the files that a clone has, links as links."""
    folder = tmp_path_factory.mktemp("clone")
    for path in tracked():
        if path.parts[0] not in ("tests", "docs", "benchmarks"):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, folder / path, follow_symlinks=False)
    return folder


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request, clone, tmp_path_factory) -> tuple[str, Path, Path]:
    """The kind of install, the folder of installed packages, and where its modules lie."""
    site = tmp_path_factory.mktemp("site")
    build = BUILD.format("build_" + request.param)
    command = [sys.executable, "-c", build, str(site)]
    done = subprocess.run(command, cwd=clone, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    (wheel,) = site.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    wheel.unlink()
    return request.param, site, site if request.param == "wheel" else clone


def run(code: str, site: Path, *arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    start = "import site, sys; site.addsitedir(sys.argv[1])\n"
    command = [sys.executable, "-c", start + code, str(site), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, encoding="utf-8", timeout=120)


@pytest.mark.parametrize("order", ["theirs first", "ours first"])
def test_simla_is_imported_beside_modules_of_the_users_own(installed, order, tmp_path):
    _, site, modules = installed
    for name, text in THEIRS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    code = USE_THEIRS + USE_OURS + USE_THEIRS if order == "theirs first" else USE_OURS + USE_THEIRS
    done = run(code, site, modules, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_nothing_but_simla_is_installed(installed, tmp_path):
    _, site, _ = installed
    names = sorted({*SCRIPTS, *FOLDERS, "utils"} - {"simla"})
    code = "from importlib.util import find_spec; print([n for n in sys.argv[2:] if find_spec(n)])"
    done = run(code, site, *names, cwd=tmp_path)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_configs_are_installed(installed):
    kind, site, modules = installed
    folder = modules / ("simla/configs" if kind == "wheel" else "configs")
    expected = {p.relative_to("configs") for p in tracked() if p.parts[0] == "configs" and p.suffix != ".py"}
    assert expected == {p.relative_to(folder) for p in folder.rglob("*.[yj]*")} and len(expected) > 5
    assert not any(path.is_symlink() for path in site.rglob("*"))


def test_an_installed_wheel_searches_with_a_checkpoint(installed, tmp_path):
    kind, site, _ = installed
    if kind == "editable":
        return
    from api_data import make_checkpoints

    tiny = make_checkpoints(tmp_path)
    photos = sorted((tiny.data / "images").glob("*"))[:1] or [next(tiny.data.rglob("*.jpg"))]
    command = [
        "search",
        str(photos[0].parent),
        "a red dog",
        "--checkpoint",
        str(tiny.checkpoints["pretrain"]),
    ]
    code = "sys.argv[1:] = sys.argv[2:]; from simla.__main__ import run; run()"
    done = run(code, site, *command, "--json", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["results"]
