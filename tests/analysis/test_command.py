"""The one way in which every program starts, reads its paths, and fails."""

import argparse
import ast
import errno
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import jax
import pytest

from analysis.command import name_argument, path_argument, program, run
from varjax.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = [
    path
    for folder in ("analysis", "profiling", "tuning", "experiments", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "__main__" in path.read_text(encoding="utf-8")
]


def raising(error: BaseException):
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_program_runs_under_the_one_wrapper(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (main,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    assert [ast.unparse(one) for one in main.decorator_list] == ["program"]
    assert ast.unparse(main.args) == "arguments: Sequence[str] | None"
    assert ast.unparse(tree.body[-1]) == "if __name__ == '__main__':\n    main()"
    handled = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)]
    assert not any("sys.exit" in one or "parser.error" in one for one in handled)


def test_the_programs_are_found():
    assert len(PROGRAMS) > 20


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (InputError("x.json: bad"), "error: x.json: bad"),
        (FileNotFoundError("x: no such file; make it"), "error: x: no such file; make it"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), "error: x: No such file or directory"),
        (OSError(errno.ENOSPC, "No space left", "x"), "error: x: No space left; free some space, then run the same "),
        (KeyboardInterrupt(), "interrupted"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"),
            "error: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nLower --batch_size or",
        ),
    ],
)
def test_bad_input_ends_with_one_message(error, message):
    with pytest.raises(SystemExit) as stop:
        run(raising(error))
    assert str(stop.value).startswith(message)


@pytest.mark.parametrize(
    "error",
    [
        *(ValueError("of NumPy"), AssertionError("a fault"), KeyError("x"), RuntimeError("y")),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Shared memory size limit exceeded"),
    ],
)
def test_a_fault_in_a_program_keeps_its_traceback(error):
    with pytest.raises(type(error)) as raised:
        run(raising(error))
    assert raised.value is error


def test_a_main_takes_its_arguments_from_its_caller_or_from_the_command_line(monkeypatch):
    seen = []

    @program
    def main(arguments):
        parser = argparse.ArgumentParser()
        parser.add_argument("--output", type=path_argument)
        seen.append(parser.parse_args(arguments).output)

    monkeypatch.setattr(sys, "argv", ["program", "--output", "of the command line"])
    main()
    main(["--output", "given"])
    assert seen == [Path("of the command line"), Path("given")]


def test_the_home_directory_is_meant_by_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert path_argument("~/runs/a.json") == Path("/home/someone/runs/a.json")
    assert name_argument("~/models/small") == "/home/someone/models/small"
    assert name_argument("mistralai/Mixtral-8x7B-v0.1") == "mistralai/Mixtral-8x7B-v0.1"
    with pytest.raises(argparse.ArgumentTypeError, match="empty"):
        path_argument("")


ROW = r"\('(\w+)', (\w+), "  # of a table of options: name and type


def test_no_program_takes_a_path_without_the_home_directory():
    """Every argument that is a path has `path_argument`, and every --model and --dataset `name_argument`."""
    plain = []
    for path in [*PROGRAMS, ROOT / "experiments" / "arguments.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            options = []
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".add_argument"):
                kind = next((ast.unparse(one.value) for one in node.keywords if one.arg == "type"), None)
                options = [(ast.unparse(node.args[0]), kind)]
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "add_options":
                tables = [ast.unparse(one) for one in node.args if isinstance(one, ast.Tuple)]
                options = [(f"'--{name}'", kind) for name, kind in (re.match(ROW, row).groups() for row in tables)]
            for named, kind in options:
                needs = any(word in named for word in ("output", "--model", "--dataset", "--foreign"))
                if kind == "Path" or (needs and kind not in ("path_argument", "name_argument")):
                    plain.append(f"{path.name}: {named}")
    assert plain == ["download_models.py: '--model'"]  # a name on the hub, and nothing else


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is not None, reason="JAX may find a CUDA device")
def test_a_platform_that_is_not_there_is_said():
    done = subprocess.run(
        [sys.executable, "-m", "profiling.ceilings"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cuda", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said == [done.stderr.splitlines()[-1]] and said[0].startswith("error: JAX_PLATFORMS=cuda: JAX finds no such")
    assert "Traceback" not in done.stderr


def test_a_program_takes_the_memory_of_a_gpu_and_keeps_what_it_compiles_unless_told_otherwise(tmp_path, monkeypatch):
    names = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size")
    before = [getattr(jax.config, name) for name in names]

    def set_up(folder: Path | None, **environment: str) -> tuple[str | None, str | None]:
        """The share of the memory and the folder of programs behind a run."""
        for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
            monkeypatch.setenv(name, "")  # so that it is restored
            monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        jax.config.update(names[0], folder and str(folder))
        run(lambda: None)
        return os.environ.get("XLA_CLIENT_MEM_FRACTION"), jax.config.jax_compilation_cache_dir

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        assert set_up(None) == ("0.95", str(tmp_path / "varjax" / "programs"))
        assert 0 < jax.config.jax_compilation_cache_max_size < 2**40
        with monkeypatch.context() as homeless:
            homeless.delenv("XDG_CACHE_HOME")
            homeless.setattr(Path, "home", Mock(side_effect=RuntimeError("Could not determine home directory.")))
            assert set_up(None) == ("0.95", None)
        monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
        assert set_up(None) == ("0.95", None)  # it cannot hold a folder
        own = tmp_path / "own"
        assert set_up(own, XLA_CLIENT_MEM_FRACTION="0.5") == ("0.5", str(own))
        assert set_up(own, XLA_PYTHON_CLIENT_MEM_FRACTION="0.5") == (None, str(own))
    finally:
        for name, value in zip(names, before, strict=True):
            jax.config.update(name, value)
