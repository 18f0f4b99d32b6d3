"""What a user installs: a wheel holds the core alone, which runs with jax and numpy and nothing else."""

import importlib.metadata
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "bring_your_own_model.py"
REQUIRED = ("jax", "jaxlib", "numpy", "ml_dtypes", "opt_einsum", "scipy")  # the core's requirements and theirs


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with what the wheel installs, and links to jax and numpy: all that a bare interpreter finds."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("varjax", "models", "analysis"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import setuptools.build_meta as backend; backend.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(folder)
    gained = {path.name for path in folder.iterdir()}
    assert gained == {"varjax", wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"}
    for name in REQUIRED:
        for file in importlib.metadata.files(name) or ():
            top = folder / file.parts[0]
            if ".." not in file.parts and not top.exists():
                top.symlink_to(Path(str(file.locate())).parents[len(file.parts) - 1] / file.parts[0])
    return folder


def run_bare(folder: Path, code: str) -> str:
    """What a bare interpreter prints that finds nothing but what is in the folder."""
    code = f"import sys; sys.path.append({str(folder)!r})\n{code}"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_runs_on_a_bare_installation(installed):
    printed = run_bare(installed, f"import runpy; runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')")
    assert printed.startswith("experts per token: 1.00 of 2; relative error of the layer's output: 0.1")


def test_readers_say_what_to_install(installed):
    code = """
import numpy as np, varjax
from varjax import answersfile, statsfile
stats = varjax.RoutingStats.empty(np.zeros((1, 1), np.int32), (1,), 1, 2)
for work, given in ((statsfile.write, ("s.parquet", stats, {})), (answersfile.read, (__file__,))):
    try:
        work(*given)
    except varjax.InputError as error:
        print(error)
"""
    printed = run_bare(installed, f"__file__ = {__file__!r}\n{code}")
    assert printed == "".join(
        f"{name} is not installed; install it: pip install 'varjax[analysis]'\n" for name in ("pyarrow", "safetensors")
    )


def test_importing_the_core_imports_jax_and_numpy_alone():
    code = """
import sys, time, jax, numpy
before, start = set(sys.modules), time.perf_counter()
import varjax
took = time.perf_counter() - start
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
assert took < 1, took  # 0.05 s on an idle machine
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {"jax", "numpy", "varjax"}


def test_an_editable_installation_is_an_entry_for_the_checkout():
    """So `models`, `analysis` and the other folders can be imported from it, though a wheel holds `varjax` alone."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["package-dir"] == {"": "."} and settings["packages"]["find"]["include"] == ["varjax*"]
