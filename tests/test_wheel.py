"""The package as pip installs it: a wheel in an environment of its own, beside what it depends on."""

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
# The checkout is not on the path of what is started here.
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    ran("-m", "build", "--wheel", "--no-isolation", "--outdir", folder, PROJECT)
    (path,) = folder.glob("*.whl")
    return path


def ran(*words, python=sys.executable, cwd=None):
    command = [str(python), *map(str, words)]
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_every_file_of_the_package(wheel):
    files = {
        path for path in (PROJECT / "src").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {path.relative_to(PROJECT / "src").as_posix() for path in files} == {
        name for name in inside if ".dist-info/" not in name
    }


def test_the_installed_wheel_runs(wheel, tmp_path):
    """Its command, a command that reads its data, and the imports and data of the README's example."""
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    ran("-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    # what the package depends on; the .pth files there, of the checkout among them, are not read
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = python.with_name("sparsemem")
    assert "Teach a model in the browser." in ran("--help", python=command, cwd=tmp_path)
    planned = ran("compare", "demo", "--dry-run", python=command, cwd=tmp_path)
    assert "learn" in planned
    (imports,) = re.findall(r"^from sparsemem import .*$", (PROJECT / "README.md").read_text(), re.MULTILINE)
    program = f"{imports}\nimport sparsemem\nprint(sparsemem.__file__, sparsemem.__version__)"
    where, version = ran("-c", program, python=python, cwd=tmp_path).split()
    assert Path(where).is_relative_to(site)
    assert f"-{version}-" in wheel.name
