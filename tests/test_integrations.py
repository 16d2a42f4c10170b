"""What the integrations have in common: sentences about frameworks that are missing or too old, and about arguments."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import gradwatch
from gradwatch.errors import IntegrationError
from gradwatch.integrations.session import Session, Settings
from gradwatch.integrations.versions import framework

FOLDER = Path(gradwatch.__file__).parent / "integrations"
FRAMEWORKS = {
    "accelerate": ("accelerate", "pip install 'accelerate>=1.10'"),
    "huggingface": ("transformers", "pip install 'transformers>=5.0'"),
    "keras": ("keras", "pip install 'keras>=3.10'"),
    "lightning": ("lightning", "pip install 'lightning>=2.6'"),
}


def test_a_framework_that_is_missing_is_told_with_the_command_that_installs_it() -> None:
    """At import, as an ImportError and as an error of gradwatch."""
    with pytest.raises(IntegrationError, match=r"^nosuch is not installed.*: pip install 'nosuch>=2.0'$"):
        framework("nosuch.part", "2.0")
    with pytest.raises(ImportError):
        framework("nosuch", "2.0")


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_each_integration_says_so_if_its_framework_is_missing(name: str) -> None:
    """In a process in which it cannot be imported."""
    package, install = FRAMEWORKS[name]
    script = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(name=name)
sys.meta_path.insert(0, Blocked())
try:
    import gradwatch.integrations.{name}
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == f"{package} is not installed, which this integration is for: {install}\n"


def test_every_integration_is_in_that_test() -> None:
    """One file each, next to what they have in common."""
    assert {path.stem for path in FOLDER.glob("*.py")} - {"__init__", "session", "versions"} == set(FRAMEWORKS)


def test_a_framework_that_is_too_old_is_told() -> None:
    """With the version that is needed, which is compared by number."""
    found = version("pytest")
    with pytest.raises(IntegrationError, match=rf"^pytest {found} is installed; .* needs 100\.2 or newer: pip install"):
        framework("pytest", "100.2")
    framework("pytest", "2.10")


def test_a_framework_that_is_too_old_to_be_imported_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own error would say nothing of it."""
    (tmp_path / "oldone").mkdir()
    (tmp_path / "oldone" / "__init__.py").write_text("raise ImportError('something newer is there')")
    about = tmp_path / "oldone-1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.4\nName: oldone\nVersion: 1.2\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(IntegrationError, match=r"oldone 1\.2 is installed; this .* needs 5\.0 or newer: pip install"):
        framework("oldone", "5.0")


def test_a_framework_that_lacks_what_is_needed_is_told() -> None:
    """With the way that always works."""
    with pytest.raises(IntegrationError, match=r"has no pytest\.Trainer\.train, .* gradwatch\.attach\(model\)"):
        framework("pytest", "2", needs="Trainer.train")


def test_an_error_inside_a_framework_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is installed, but something that it needs is not."""
    (tmp_path / "halfthere.py").write_text("import nosuch\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(ModuleNotFoundError, match="No module named 'nosuch'"):
        framework("halfthere", "1")


def test_the_settings_are_the_arguments_of_attach() -> None:
    """Of a callback as of the function, without the model."""
    assert set(Settings.__annotations__) == set(inspect.signature(gradwatch.attach).parameters) - {"model"}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"stop_on": "damaged"}, "stop_on is 'damaged'; expected 'suspected', 'confirmed' or None"),
        ({"worst": -1}, "worst is -1; expected a number of layers"),
        ({"settings": {"clips": "norm"}}, "gradwatch.attach() has no argument 'clips'. Did you mean 'clip'?"),
        ({"settings": {"report": "live"}}, "report='live' draws where the trainer draws its own progress bar"),
        ({"settings": {"report": ["log", "live"]}}, "report='live' draws where the trainer draws"),
    ],
)
def test_a_wrong_argument_is_refused_before_training(wrong: dict[str, object], told: str) -> None:
    """When the callback is made."""
    given = {"stop_on": None, "worst": 5, "settings": {}} | wrong
    with pytest.raises(gradwatch.UsageError) as error:
        Session(**given)  # type: ignore[arg-type]
    assert told in str(error.value)
