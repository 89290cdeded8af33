"""What `pip install` of a release gives: everything that is needed, and it works where the repository is not."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

from helpers import DEMO_MODEL, ROOT
from nanovllm import __version__
from nanovllm.kernels.cpu import load_kernels


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The sdist, and the wheel that is built from it; in a copy, since building writes beside the source."""
    pytest.importorskip("build")
    source, made = tmp_path_factory.mktemp("source") / "nanovllm", tmp_path_factory.mktemp("dist")
    others = ".*", "__pycache__", "*.egg-info", "build", "dist", "*.safetensors"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*others))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", made, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(made.glob("*.tar.gz")), next(made.glob("*.whl"))


def test_wheel_and_sdist_have_all_of_the_package(archives):
    wanted = {f"nanovllm/{file.relative_to(ROOT / 'nanovllm')}" for file in (ROOT / "nanovllm").rglob("*")
              if file.suffix in (".py", ".cpp", ".h", ".typed")}  # fmt: skip
    with tarfile.open(archives[0]) as sdist, zipfile.ZipFile(archives[1]) as wheel:
        in_sdist = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
        in_wheel = set(wheel.namelist())
    assert wanted | {"LICENSE", "README.md"} <= in_sdist and not any(name.startswith("tests") for name in in_sdist)
    assert {name for name in in_wheel if ".dist-info/" not in name} == wanted


def test_wheel_works_from_a_directory_of_its_own(archives, tmp_path):
    """Installed beside nothing of the repository: it compiles its kernels on first use, and answers."""
    site, cache = tmp_path / "site", tmp_path / "cache"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site, archives[1]]
    subprocess.run(install, check=True, capture_output=True)
    metadata = PathDistribution(next(site.glob("nanovllm-*.dist-info"))).metadata
    assert metadata["Version"] == __version__ and metadata["License-Expression"] == "MIT"
    assert "Typing :: Typed" in metadata.get_all("Classifier")

    environment = os.environ | {"PYTHONPATH": str(site), "XDG_CACHE_HOME": str(cache)}
    options = {"check": True, "capture_output": True, "text": True, "cwd": tmp_path, "env": environment}
    where = subprocess.run([sys.executable, "-c", "import nanovllm; print(nanovllm.__file__)"], **options)
    assert Path(where.stdout.strip()).is_relative_to(site)
    command = [sys.executable, site / "bin" / "nanovllm"]
    assert subprocess.run([*command, "--version"], **options).stdout == f"nanovllm {__version__}\n"
    question = ["generate", str(DEMO_MODEL), "what is 517 + 425?", "--chat", "--temperature", "0"]
    assert "517 + 425 = 942." in subprocess.run([*command, *question], **options).stdout
    assert bool([*cache.rglob("*.so")]) == (load_kernels() is not None)
