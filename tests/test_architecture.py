"""Who may import whom, what the hot path may not call, and that importing is light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gradwatch
from gradwatch import clips, reports
from tests.where import WHERE

PACKAGE = Path(gradwatch.__file__).parent
HOST = (
    "text",
    "records",
    "settings",
    "errors",
    "pipeline",
    "history",
    "rules",
    "verdict",
    "runlog",
    "reports",
    "page",
    "offline",
)
# who may know whom: each folder, or file at the root, and what it may import of the others, in type hints too
MAY_KNOW: dict[str, set[str]] = {
    "errors": {"records"},
    "text": set(),
    "cells": set(),
    "device": set(),
    "shutdown": set(),
    "version": set(),
    "settings": {"errors"},
    "records": {"text"},
    "history": {"errors", "records", "text"},
    "rules": {"errors", "history", "records", "settings", "text"},
    "verdict": {"history", "records", "rules", "settings", "text"},
    "clips": {"device", "errors", "history", "measure", "records", "settings"},
    "autoclip": {"clips", "errors", "history", "measure", "records", "settings", "text"},
    "reports": {"cells", "errors", "records", "shutdown", "text"},
    "runlog": {"autoclip", "errors", "history", "records", "reports", "rules", "text"},
    "pipeline": {"autoclip", "errors", "history", "records", "reports", "rules", "text", "verdict"},
    "offline": {"errors", "history", "pipeline", "records", "reports", "rules", "runlog", "text", "verdict"},
    "measure": {"device", "errors", "history", "records", "text"},
    "distributed": {"autoclip", "errors", "measure", "records", "rules"},
    "skipping": {"device", "errors", "measure"},
    "probe": {
        *("autoclip", "clips", "device", "distributed", "errors", "history"),
        *("measure", "records", "rules", "shutdown", "skipping", "text"),
    },
    "forensics": {"cells", "device", "errors", "measure", "probe", "records", "text"},
    "page": {"errors", "history", "records", "reports", "runlog", "text"},
    "monitor": {
        *("autoclip", "cells", "errors", "forensics", "history", "measure", "pipeline"),
        *("probe", "records", "reports", "rules", "runlog", "shutdown", "version"),
    },
    "attach": {
        *("autoclip", "cells", "clips", "device", "distributed", "errors", "forensics"),
        *("measure", "monitor", "probe", "records", "reports", "rules"),
    },
    "__init__": {
        *("attach", "autoclip", "clips", "errors", "forensics", "monitor"),
        *("records", "reports", "rules", "version"),
    },
    "integrations": {
        "attach",
        "autoclip",
        "cells",
        "clips",
        "errors",
        "monitor",
        "records",
        "reports",
        "rules",
        "text",
    },
    "commands": {
        *("__init__", "autoclip", "errors", "forensics", "history", "offline", "page"),
        *("records", "reports", "rules", "runlog", "text", "verdict"),
    },
    "__main__": {"__init__", "commands", "errors", "text"},
}
FILES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in PACKAGE.rglob("*.py")}


def imported(path: Path) -> set[str]:
    """Return the modules a file imports when it runs: not those for type checkers only."""
    tree = ast.parse(path.read_text())
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def room_of(name: str) -> str:
    """Return the folder that a file lies in, or its own name at the root."""
    return name.partition("/")[0]


def known(path: Path) -> set[str]:
    """Return the files of the package that a file imports, also inside functions and for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.module or "", alias.name) for alias in node.names}
    files = set()
    for module, name in found:
        parts = module.split(".")
        if parts[0] == "gradwatch":
            inside = "/".join([*parts[1:], name]) if name else "/".join(parts[1:])
            around = "/".join([*parts[1:], "__init__"])
            files.add(next(one for one in (inside, f"{inside}/__init__", "/".join(parts[1:]), around) if one in FILES))
    return files


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of files that lead back to themselves."""
    reach = {start: set(ends) for start, ends in arrows.items()}
    for middle in arrows:
        for ends in reach.values():
            if middle in ends:
                ends |= reach[middle]
    groups = {frozenset(end for end in ends if start in reach.get(end, ())) for start, ends in reach.items()}
    return sorted(sorted(group) for group in groups if group)


def test_who_knows_whom_is_written_down() -> None:
    """A file imports its own folder, and of the others those in the table."""
    strays = {
        (name, other)
        for name, path in FILES.items()
        for other in known(path)
        if room_of(other) != room_of(name) and room_of(other) not in MAY_KNOW[room_of(name)]
    }
    assert strays == set()


def test_the_table_says_no_more_than_is_so() -> None:
    """What nobody imports any more stands there no longer."""
    used = {(room_of(name), room_of(other)) for name, path in FILES.items() for other in known(path)}
    assert {(room, other) for room, others in MAY_KNOW.items() for other in others} - used == set()


# what is one thing to others is imported from the folder; a toolbox, such as measure, from the file that a reader should open
ONE_THING = ("verdict", "probe", "skipping", "page", "forensics", "records")


def test_what_is_one_thing_to_others_is_imported_from_its_folder() -> None:
    """Its `__init__` exports all that others use."""
    deep = {
        (name, other)
        for name, path in FILES.items()
        for other in known(path)
        if room_of(other) in ONE_THING and room_of(name) != room_of(other) and not other.endswith("/__init__")
    }
    assert deep == set()


def test_every_folder_says_what_lives_there() -> None:
    """In the first sentence of its `__init__`."""
    for path in PACKAGE.rglob("__init__.py"):
        sentence = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
        assert sentence.endswith((".", "`")), path
        assert len(sentence) > 40, path


def test_no_imports_go_in_circles() -> None:
    """Neither between files nor, in the table, between folders."""
    assert circles({name: known(path) - {name} for name, path in FILES.items()}) == []
    assert circles(MAY_KNOW) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c"]]


def test_the_host_half_imports_no_torch() -> None:
    """Not by way of others either: it loads in a process in which torch cannot be loaded."""
    script = """
import importlib, pathlib, sys, types

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
package = pathlib.Path(sys.argv[1])
top = types.ModuleType("gradwatch")  # whose own file loads the other half
top.__path__ = [str(package)]
sys.modules["gradwatch"] = top
loaded = 0
for path in package.rglob("*.py"):
    place = path.relative_to(package).with_suffix("").parts
    if place[0] in sys.argv[2:]:
        importlib.import_module(".".join(["gradwatch", *place]))
        loaded += 1
print(loaded)
try:
    importlib.import_module("gradwatch.measure.norms")
except ImportError:
    print("blocked")
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(PACKAGE), *HOST], capture_output=True, text=True, check=True, timeout=120
    )
    loaded, blocked = done.stdout.split()
    assert int(loaded) > 60
    assert blocked == "blocked"


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("reports/")])
def test_rich_is_loaded_only_where_something_is_shown(name: str) -> None:
    """At the top of no file outside the reports; inside functions it may be."""
    tops = {
        node.module.split(".")[0]
        for node in ast.parse(FILES[name].read_text()).body
        if isinstance(node, ast.ImportFrom) and node.module
    }
    assert "rich" not in tops


def test_three_files_register_hooks() -> None:
    """Three files to read when something hangs on a model or an optimizer.

    An accelerator's hooks are about its checkpoints, and those of `forensics/reached` are on stand-ins of weights.
    """
    registering = [
        name
        for name, path in FILES.items()
        if re.search(r"(?<!accelerator\.)register_", path.read_text().replace("atexit.register", ""))
    ]
    ours = ["forensics/capture", "probe/gradient_hooks", "probe/optimizer_hooks"]
    assert sorted(registering) == sorted([*ours, "forensics/reached"])


def test_one_file_replaces_torchs_attributes() -> None:
    """`setattr` on torch stands in one file."""
    assert [n for n, path in FILES.items() if "setattr(self._owner" in path.read_text()] == ["probe/patches"]


def place_of(name: str) -> str | None:
    """Return the line of the table that says where a module is tested: its own, or that of its folder."""
    return next((place for place in (name, f"{room_of(name)}/") if place in WHERE), None)


def test_each_module_is_tested_under_its_name_or_a_line_says_where() -> None:
    """Those of more than 40 lines; no line without a module that needs it, and every test file that a line names is there."""
    tests = {path.stem for path in Path(__file__).parent.rglob("test_*.py")}
    long = {name for name, path in FILES.items() if len(path.read_text().splitlines()) > 40}
    strays = {name for name in long if f"test_{name.rpartition('/')[2]}" not in tests}
    assert {name for name in strays if place_of(name) is None} == set()
    assert WHERE.keys() == {place_of(name) for name in strays}
    assert {name for names, _ in WHERE.values() for name in names} <= tests


def _assigned(node: ast.AST) -> list[ast.Attribute]:
    """Return the attributes that a statement assigns to."""
    targets = node.targets if isinstance(node, ast.Assign) else []
    targets = [node.target] if isinstance(node, (ast.AugAssign, ast.AnnAssign)) else targets
    parts = [part for target in targets for part in (target.elts if isinstance(target, ast.Tuple) else [target])]
    return [part for part in parts if isinstance(part, ast.Attribute)]


def written_from_outside(sources: dict[str, str]) -> set[tuple[str, str]]:
    """Return the file and the target of each assignment to an attribute that only a class of another file sets on itself.

    Records are left out: the fields of dataclasses and of named tuples are filled by whoever makes them.
    """
    own: dict[str, set[str]] = {}
    fields: set[str] = set()
    trees = {name: ast.parse(source) for name, source in sources.items()}
    for name, tree in trees.items():
        for made in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
            if any("dataclass" in ast.unparse(one) for one in made.decorator_list):
                fields |= {ast.unparse(one.target) for one in made.body if isinstance(one, ast.AnnAssign)}
            for target in (target for node in ast.walk(made) for target in _assigned(node)):
                if ast.unparse(target.value) == "self":
                    own.setdefault(target.attr, set()).add(name)
    return {
        (name, ast.unparse(target))
        for name, tree in trees.items()
        for node in ast.walk(tree)
        for target in _assigned(node)
        if ast.unparse(target.value) != "self"
        and name not in own.get(target.attr, {name})
        and target.attr not in fields
    }


def test_nobody_writes_into_another_objects_attributes() -> None:
    """What an object knows it is told by a call; only records are filled from outside."""
    assert written_from_outside({name: path.read_text() for name, path in FILES.items()}) == set()
    sources = {"a": "class A:\n    def __init__(self):\n        self.step = 0", "b": "def go(a):\n    a.step = 1"}
    assert written_from_outside(sources) == {("b", "a.step")}


# what is computed when it is first asked for, and kept
CACHES = {"history/losses.stuck", "history/ring.row", "measure/layers.home", "probe/patches.losses"}
QUESTION = re.compile(
    r"_?(is|has|was|are|may|can|needs|fits|holds|knows|keeps|stays|falls|waits|goes|rests|owns|writes|clips|acts)(_|$)"
)


def answers_that_change(sources: dict[str, str]) -> set[str]:
    """Return the properties, and the functions named like a question, that assign to an attribute."""
    return {
        f"{name}.{function.name}"
        for name, source in sources.items()
        for function in ast.walk(ast.parse(source))
        if isinstance(function, ast.FunctionDef)
        and (any("property" in ast.unparse(one) for one in function.decorator_list) or QUESTION.match(function.name))
        and any(_assigned(node) for node in ast.walk(function))
    }


def test_a_question_changes_nothing() -> None:
    """Nor does a property, but for what it keeps so as not to compute it again."""
    assert answers_that_change({name: path.read_text() for name, path in FILES.items()}) == CACHES
    assert answers_that_change({"a": "def is_due(self):\n    self.step += 1"}) == {"a.is_due"}


def on_devices() -> list[ast.FunctionDef]:
    """Return the functions whose tensors may lie on a device: those of a few files, and by their names everywhere."""
    return [
        node
        for name, path in FILES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        and (
            name in ("device", "measure/readback", "probe/deferred_rows", "probe/device_action", "probe/row_writer")
            or node.name.endswith(("_on", "_unread", "unread"))
        )
    ]


def assigned_elements(code: ast.AST) -> list[str]:
    """Return the targets of `tensor[...] = value` in a piece of code; what an object keeps in a dict of its own is none."""
    found = []
    for node in ast.walk(code):
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, (ast.AugAssign, ast.AnnAssign)) else targets
        elements = [ast.unparse(target) for target in targets if isinstance(target, ast.Subscript)]
        found += [element for element in elements if not element.startswith("self._kept[")]
    return found


def test_no_element_of_a_tensor_on_a_device_is_assigned_to() -> None:
    """A number that is assigned to an element is a copy that waits for the device; `fill_` and `copy_` do not."""
    assert len(on_devices()) > 40
    assert {function.name: found for function in on_devices() if (found := assigned_elements(function))} == {}
    assert assigned_elements(ast.parse("slot.singles[3] = 1.0\ndead[2] += 1")) == ["slot.singles[3]", "dead[2]"]


def copies_used_at_once(code: ast.AST) -> list[str]:
    """Return the asynchronous copies of a function that may be read before they have arrived.

    What `to` returns is at hand at once, so that it must be asynchronous towards CUDA alone. What `copy_` writes to must not
    occur again in the same function.
    """
    found = []
    for call in (node for node in ast.walk(code) if isinstance(node, ast.Call)):
        if not (isinstance(call.func, ast.Attribute) and call.func.attr in ("to", "copy_", "cuda")):
            continue
        asynchronous = [word.value for word in call.keywords if word.arg == "non_blocking"]
        asynchronous += [one for one in call.args if isinstance(one, ast.Constant) and one.value is True]
        if not asynchronous or ast.unparse(asynchronous[0]) == "False":
            continue
        if call.func.attr != "copy_":
            towards_cuda = isinstance(asynchronous[0], ast.Compare) and "== 'cuda'" in ast.unparse(asynchronous[0])
            found += [] if towards_cuda else [ast.unparse(call)]
            continue
        written = call.func.value
        while isinstance(written, ast.Subscript):
            written = written.value
        again = (node for node in ast.walk(code) if isinstance(node, (ast.Name, ast.Attribute)) and node is not written)
        found += [ast.unparse(call)] if any(ast.unparse(node) == ast.unparse(written) for node in again) else []
    return found


def test_no_asynchronous_copy_is_used_at_once() -> None:
    """One towards the CPU holds arbitrary numbers until its event has come: only the ring makes any, and reads them later."""
    functions = [
        (name, node)
        for name, path in FILES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    copying = [name for name, function in functions if "non_blocking" in ast.unparse(function)]
    assert sorted(copying) == ["device", "measure/readback"]
    assert [name for name, function in functions if copies_used_at_once(function)] == []
    for wrong in (
        "def f(x):\n    return x.to('cpu', non_blocking=True).item()",
        "def f(x, there):\n    return x.to(there, torch.float32, True)",
        "def f(x, there):\n    return x.to(there, non_blocking=there.type != 'cuda')",
        "def f(self, x):\n    self.host[2].copy_(x, non_blocking=True)\n    return self.host[2].numpy()",
    ):
        assert copies_used_at_once(ast.parse(wrong)), wrong
    right = "def f(self, x):\n    self.host[2].copy_(x, non_blocking=True)\n    self.event.record()"
    assert copies_used_at_once(ast.parse(right)) == []


def test_no_tensor_follows_the_default_device() -> None:
    """Whoever makes one says where: under `torch.set_default_device` it would go elsewhere."""
    makers = {"zeros", "ones", "empty", "full", "tensor", "as_tensor", "arange", "eye", "linspace", "rand", "randn"}
    found = []
    for name, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())) if name != "commands/demo_training" else ():
            call = node.func if isinstance(node, ast.Call) else None
            if isinstance(call, ast.Attribute) and ast.unparse(call.value) == "torch" and call.attr in makers:
                assert isinstance(node, ast.Call)
                found += [ast.unparse(node)] if "device" not in {keyword.arg for keyword in node.keywords} else []
    assert found == []


def test_a_reports_file_sees_snapshots_and_nothing_else() -> None:
    """No report imports the probe, the monitor or the pipeline."""
    for name, path in FILES.items():
        if name.startswith("reports/"):
            assert not imported(path) & {
                "gradwatch.probe",
                "gradwatch.monitor",
                "gradwatch.pipeline",
                "gradwatch.history",
            }


@pytest.mark.parametrize(
    ("folder", "known", "helpers"),
    [
        ("clips", clips.CLIPS, {"base"}),
        (
            "reports",
            reports.REPORTS,
            {
                *(
                    "base",
                    "card",
                    "desk",
                    "foot",
                    "line",
                    "names",
                    "notes",
                    "others",
                    "outbox",
                    "scalars",
                    "screen",
                    "sparkline",
                    "standing",
                    "streams",
                    "summary",
                    "tail",
                ),
                *("unsaid", "view", "watching"),
            },
        ),
    ],
)
def test_every_clip_and_report_file_is_exported(folder: str, known: dict[str, type | str], helpers: set[str]) -> None:
    """A new one is one file and one line; the line cannot be forgotten."""
    files = {path.stem for path in (PACKAGE / folder).glob("*.py")} - {"__init__"} - helpers
    modules = {one.partition(":")[0] if isinstance(one, str) else one.__module__ for one in known.values()}
    assert {module.rpartition(".")[2] for module in modules} == files


def test_importing_gradwatch_loads_neither_rich_nor_a_plotting_library() -> None:
    """Over torch it adds numpy and pydantic alone."""
    script = (
        "import torch, sys; before = set(sys.modules); import gradwatch; "
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    loaded = ast.literal_eval(done.stdout)
    assert "gradwatch" in loaded
    assert not {"rich", "matplotlib", "sklearn", "pandas", "tqdm"} & set(loaded)


def test_the_public_names_are_those_of_the_design() -> None:
    """Each can be had from the top."""
    for name in ("attach", "AutoClip", "ClipNorm", "ClipValue", "Monitor", "Incident", "Rule", "Report", "Snapshot"):
        assert hasattr(gradwatch, name)
    assert gradwatch.__all__ == sorted(gradwatch.__all__)


def test_what_is_drawn_is_made_of_lines_fit_to_be_printed() -> None:
    """Reports and commands take their text from `gradwatch.reports.line`; what a program wrote itself is drawn as it was."""
    drawing = [name for name in FILES if name.startswith(("reports/", "commands/", "page/"))]
    assert {name for name in drawing if "rich.text" in imported(FILES[name])} == {"reports/line"}
