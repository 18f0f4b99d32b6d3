"""What holds of the project as a whole: which way imports point, and that the documents name what is there."""

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("varjax", "models", "analysis", "profiling", "tuning", "experiments")  # each may import those before it
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports, wherever it does."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_downwards_only(folder):
    above = FOLDERS[FOLDERS.index(folder) + 1 :]
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name in imported(path)
        if name.split(".")[0] in (*above, "tests")
    ]
    assert not wrong


def raised(node: ast.Raise) -> str:
    """The name of the class that is raised."""
    error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
    return error.id if isinstance(error, ast.Name) else ""


@pytest.mark.parametrize("folder", FOLDERS)
def test_bad_input_is_refused_with_errors_of_our_own(folder):
    """A library's ValueError is a fault in the program: it must not look like what varjax refuses."""
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Raise) and raised(node) in ("ValueError", "Exception", "RuntimeError")
    ]
    # A section's verdict is written in the program, so a wrong one is a fault in it.
    assert [one for one in wrong if not one.startswith("analysis/report/report.py")] == []


BROAD = {"BaseException", "Exception", "ValueError", "RuntimeError", "ArithmeticError", "TypeError", "InputError"}
ENDS = {"exit", "error"}  # `sys.exit`, and argparse's own way to stop
MAY_GO_ON = {
    "analysis/command.py": "JAX without a device, which the user asked for, raises what it likes; it becomes a message",
    "analysis/text/embedded.py": "other people's sources that do not parse hold no document",
}


@pytest.mark.parametrize("folder", ("analysis", "profiling", "tuning", "experiments"))
def test_no_fault_becomes_a_result(folder):
    """Who catches a broad class of errors raises again or ends the program; only NotTestableError becomes a finding."""
    wrong = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ExceptHandler) or name in MAY_GO_ON:
                continue
            caught = {one.id for one in ast.walk(node.type) if isinstance(one, ast.Name)} if node.type else BROAD
            inside = list(ast.walk(node))
            ends = any(isinstance(one, ast.Raise) for one in inside) or any(
                isinstance(one, ast.Call) and isinstance(one.func, ast.Attribute) and one.func.attr in ENDS
                for one in inside
            )
            if caught & BROAD and not ends:
                wrong.append(f"{name}:{node.lineno} catches {', '.join(sorted(caught & BROAD))}")
    assert not wrong


def test_bars_are_drawn_in_one_place():
    """`varjax.progress` decides where a bar is drawn, so that no log file is filled with them."""
    users = [
        path.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        if any(name.split(".")[0] == "tqdm" for name in imported(path))
    ]
    assert users == ["varjax/progress.py"]


def test_importing_varjax_loads_little():
    """Whoever imports the routers into code of their own gets JAX, and no other framework with it."""
    heavy = {"flax", "optuna", "torch", "transformers", "datasets", "pandas", "matplotlib", "models"}
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, varjax; print(*{name.partition('.')[0] for name in sys.modules})"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert "jax" in loaded and heavy.isdisjoint(loaded)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    links = re.findall(r"\]\(([^)#\s]+)", document.read_text(encoding="utf-8"))
    gone = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert not gone


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_and_modules_that_documents_name_exist(document):
    text = document.read_text(encoding="utf-8")
    scripts = re.findall(
        r"(?:benchmarks|experiments|tests|models|varjax|analysis|profiling|tuning)/[\w/]+\.(?:py|json)\b", text
    )
    modules = re.findall(
        r"python -m ((?:benchmarks|varjax|models|analysis|profiling|tuning|experiments)[\w.]*\w)", text
    )
    missing = [name for name in scripts if not (ROOT / name).exists()]
    missing += [name for name in modules if not (ROOT / (name.replace(".", "/") + ".py")).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_in_documents_is_python_and_imports_what_is_there(document):
    for block in re.findall(r"^```python\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in FOLDERS:
                module = __import__(str(node.module), fromlist=["*"])
                assert all(hasattr(module, alias.name) for alias in node.names)


def module_graph() -> dict[str, set[str]]:
    """Every module of the project and the project's modules that it imports, wherever it does."""
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
    }
    graph: dict[str, set[str]] = {name: set() for name in paths}
    for name, path in paths.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                # `from package import module` imports the module, anything else the package itself.
                found = (f"{node.module}.{alias.name}" for alias in node.names)
                graph[name] |= {one if one in paths else str(node.module) for one in found}
            elif isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names}
        graph[name] &= paths.keys() - {name}
    return graph


def test_no_modules_import_each_other():
    list(graphlib.TopologicalSorter(module_graph()).static_order())  # raises CycleError naming the modules


def test_imports_between_subfolders_point_one_way():
    """Of a folder's subfolders and of the files next to them, none imports what imports it."""

    def place(module: str) -> str:
        return ".".join(module.split(".")[:2])

    graph: dict[str, set[str]] = {}
    for module, imports in module_graph().items():
        graph.setdefault(place(module), set()).update({place(one) for one in imports} - {place(module)})
    list(graphlib.TopologicalSorter(graph).static_order())
