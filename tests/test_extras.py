"""The command that an error names for a missing extra, run where the user stands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from gradwatch.__main__ import main
from gradwatch.text.extras import install_command

PACKAGE = Path(__file__).parent.parent / "gradwatch"
# what a wheel of gradwatch says of itself once it is installed
METADATA = """\
Metadata-Version: 2.4
Name: gradwatch
Version: 0.1.0
Requires-Dist: numpy>=1.26
Provides-Extra: export
Requires-Dist: pyarrow>=15; extra == 'export'
Provides-Extra: report
Requires-Dist: plotly>=6; extra == 'report'
Requires-Dist: jinja2>=3; extra == "report"
"""


def told(place: Path, folder: Path) -> str:
    """Return the command as the module in ``place`` tells it in a process that stands in ``folder``."""
    program = "from extras import install_command; print(install_command('report'))"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(place), str(place.parent.parent)]),
        "PATH": "/usr/bin:/bin",
    }
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def installed(folder: Path) -> Path:
    """Put the module into a folder as a package manager does; return the folder of the package."""
    (folder / "gradwatch" / "text").mkdir(parents=True)
    shutil.copy(PACKAGE / "text" / "extras.py", folder / "gradwatch" / "text")
    return folder / "gradwatch" / "text"


def test_in_a_clone_it_installs_the_extra_of_the_clone(tmp_path: Path) -> None:
    """By a dot where the user stands in it, else by its path, which may have blanks."""
    clone = tmp_path / "my clone"
    package = installed(clone)
    (clone / "pyproject.toml").write_text("[project]\n")
    pip = f"{sys.executable} -m pip install"
    assert told(package, clone) == f'{pip} -e ".[report]"'
    assert told(package, tmp_path) == f'{pip} -e "{clone}[report]"'


def test_of_a_wheel_it_installs_what_the_extra_consists_of(tmp_path: Path) -> None:
    """As the metadata beside the package say, whether or not an index has gradwatch."""
    package = installed(tmp_path / "site-packages")
    about = package.parent.parent / "gradwatch-0.1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(METADATA)
    assert told(package, tmp_path) == f'{sys.executable} -m pip install "plotly>=6" "jinja2>=3"'


def test_pip_on_the_path_is_called_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it is the one of this interpreter; an interpreter below the folder is named by the short way."""
    (tmp_path / "bin").mkdir()
    for name in ("pip", "python"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert install_command("report").startswith("bin/python -m pip install ")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert install_command("report").startswith("pip install ")


def test_the_command_line_says_the_version_that_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    """The build reads it from the package itself."""
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"gradwatch {metadata.version('gradwatch')}\n"


NOT_INSTALLED = """\
import importlib.metadata, torch, gradwatch
try:
    importlib.metadata.version("gradwatch")
except importlib.metadata.PackageNotFoundError:
    pass
else:
    raise SystemExit("it is installed")
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with gradwatch.attach(model, log="run", report=None):
    model(torch.ones(2)).backward()
    optimizer.step()
"""


def test_a_clone_that_is_not_installed_works(tmp_path: Path) -> None:
    """On the path of modules, as where a cluster has the clone and nobody may install."""
    clone = tmp_path / "clone" / "gradwatch"
    clone.parent.mkdir()
    clone.symlink_to(PACKAGE)
    libraries = tmp_path / "libraries"
    libraries.mkdir()
    for one in Path(str(metadata.distribution("torch").locate_file(""))).iterdir():
        if "gradwatch" not in one.name and one.suffix != ".pth":
            (libraries / one.name).symlink_to(one)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(clone.parent), str(libraries)])}
    run = [sys.executable, "-S", "-P"]
    subprocess.run([*run, "-c", NOT_INSTALLED], cwd=tmp_path, env=environment, check=True)
    told = [*run, "-m", "gradwatch", "report", "run", "--json"]
    done = subprocess.run(told, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert '"healthy"' in done.stdout
