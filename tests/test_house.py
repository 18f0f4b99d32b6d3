"""What holds of the project as a whole: which way imports point, and that the documents name what is there."""

import ast
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


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_architecture_names_every_file_in_its_own_words(folder):
    _, _, listed = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition(f"### `{folder}/`\n")
    listed, _, _ = listed.partition("###")
    lines = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        if path.name != "__init__.py":
            said = str(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))).split("\n\n")[0]
            lines.append(f"- `{path.relative_to(ROOT / folder).as_posix()}`: " + said.replace("\n", " "))
    assert [line for line in listed.split("\n") if line] == lines


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    links = re.findall(r"\]\(([^)#\s]+)", document.read_text(encoding="utf-8"))
    gone = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert not gone


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_and_modules_that_documents_name_exist(document):
    text = document.read_text(encoding="utf-8")
    scripts = re.findall(r"(?:experiments|tests|models|varjax|analysis|profiling|tuning)/[\w/]+\.(?:py|json)\b", text)
    modules = re.findall(r"python -m ((?:varjax|models|analysis|profiling|tuning|experiments)[\w.]*\w)", text)
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
