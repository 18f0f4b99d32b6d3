"""The embedded corpus: the docstrings of the packages that varjax needs. Each is a document, each package a domain.

Nothing has to be downloaded or licensed. The sources are parsed, never imported. Only the distributions named here
count, so that the corpus does not depend on what else is installed; with other versions of them some documents change,
which `analysis.text.corpus.corpus_hash` reveals.

Copies would leak training text into held-out text (model files in particular repeat each other), so a docstring is left
out if more than half of its lines have occurred before.
"""

import ast
import hashlib
import inspect
import json
import logging
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from varjax.files import replacing, user_cache
from varjax.progress import progress_bar

DISTRIBUTIONS = (
    "absl-py", "alembic", "click", "datasets", "etils", "flax", "fonttools", "fsspec", "httpcore2", "httpx2",
    "huggingface-hub", "humanize", "jax", "jaxlib", "kiwisolver", "mako", "markdown-it-py", "matplotlib",
    "ml-dtypes", "multiprocess", "numpy", "opt-einsum", "optax", "optuna", "orbax-checkpoint", "packaging",
    "pandas", "pillow", "protobuf", "pyarrow", "pygments", "pyparsing", "python-dateutil", "pyyaml", "rich",
    "safetensors", "scipy", "sentencepiece", "sqlalchemy", "tensorstore", "tokenizers", "tqdm",
    "transformers", "treescope", "typer",
)  # fmt: skip
"""The distributions whose docstrings make the corpus, besides the standard library; missing ones are left out."""

MIN_CHARS = 200  # shorter docstrings say too little to be a document

_FORMAT = 2  # raise it when the rules below change, so that caches are rebuilt
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "_vendor", "__pycache__"}
_MIN_LINE = 20  # characters; shorter lines ("Parameters", "-------") recur everywhere and do not indicate a copy
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_STATEMENTS = (ast.stmt, ast.excepthandler, ast.match_case)

Row = tuple[str, str]  # text, group

logger = logging.getLogger(__name__)


def rows() -> Iterator[Row]:
    """Read the corpus in the order of the texts' hashes, so that any first n documents are a random sample.

    The first call parses some 4,000 files (about a minute) and keeps the result in the user's cache folder
    (`$XDG_CACHE_HOME/varjax`, else `~/.cache/varjax`) under a name that contains a hash of the versions.

    Returns:
        Text and group of every document.
    """
    cache = _cache_file()
    if cache.is_file():
        kept = _kept(cache)
        if kept is not None:
            return iter(kept)
        logger.warning("%s was damaged after it was written; the embedded corpus is parsed again", cache)
    found = sorted(_extract(), key=lambda row: text_hash(row[0]))
    save(found, cache)
    return iter(found)


def text_hash(text: str) -> str:
    """Hash a text, which gives a document its id.

    Args:
        text: any text.

    Returns:
        SHA-256 of its UTF-8, 64 hexadecimal digits.
    """
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _extract() -> Iterator[Row]:
    """Text and group of every document, parsed from the sources, in order of package, path and line."""
    seen_lines: set[str] = set()
    files = [*_standard_library(), *(file for name in DISTRIBUTIONS for file in _distribution(name))]
    for path, group in progress_bar(files, desc="embedded corpus", unit="file", leave=False):
        for text in _docstrings(path):
            if len(text) < MIN_CHARS:
                continue
            lines = {line.strip() for line in text.splitlines() if len(line.strip()) >= _MIN_LINE}
            copied = len(lines & seen_lines) > len(lines) / 2
            seen_lines |= lines
            if lines and not copied:
                yield text, group


def _standard_library() -> Iterator[tuple[Path, str]]:
    root = sysconfig.get_paths()["stdlib"]
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _SKIPPED_FOLDERS)
        for name in sorted(names):
            if name.endswith(".py"):
                yield Path(folder, name), "python"


def _distribution(name: str) -> Iterator[tuple[Path, str]]:
    """The distribution's own source files, by its installation record; group: the top-level package."""
    try:
        recorded = metadata.files(name) or []
    except metadata.PackageNotFoundError:
        return
    for file in sorted(recorded, key=lambda one: one.parts):
        inside = file.suffix == ".py" and ".." not in file.parts
        if inside and _SKIPPED_FOLDERS.isdisjoint(file.parts):
            yield Path(str(file.locate())), file.parts[0].removesuffix(".py")


def _docstrings(path: Path) -> Iterator[str]:
    """The cleaned docstrings of one source file, in order of line; none if it cannot be read or parsed."""
    try:
        source = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escape sequences
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError):
        return
    pending: list[ast.AST] = [tree]
    while pending:  # depth first; expressions contain no docstrings, and skipping them saves most of the time
        node = pending.pop()
        if isinstance(node, _DOCUMENTED):
            text = ast.get_docstring(node, clean=False)
            if text:
                yield inspect.cleandoc(text)
        children = [child for child in ast.iter_child_nodes(node) if isinstance(child, _STATEMENTS)]
        pending.extend(reversed(children))


def _cache_file() -> Path:
    versions: dict[str, str | None] = {"format": str(_FORMAT), "python": sys.version.split()[0]}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    key = hashlib.sha256(json.dumps(versions, sort_keys=True).encode()).hexdigest()[:16]
    return user_cache() / f"embedded-{key}.jsonl"


def _kept(path: Path) -> list[Row] | None:
    """Read what `save` wrote; None: the file was damaged. Its first line is the SHA-256 of the others."""
    digest, _, rows = path.read_bytes().partition(b"\n")
    if digest != hashlib.sha256(rows).hexdigest().encode():
        return None
    return [(row["text"], row["group"]) for row in map(json.loads, rows.split(b"\n")[:-1])]


def save(found: list[Row], path: Path) -> None:
    """Cache the corpus. A failure costs only the time to parse it again, so it is a warning.

    Args:
        found: text and group of every document.
        path: the cache file.
    """
    try:
        rows = "".join(json.dumps({"group": group, "text": text}) + "\n" for text, group in found).encode()
        with replacing(path, of_this_machine=True) as temporary:
            temporary.write_bytes(hashlib.sha256(rows).hexdigest().encode() + b"\n" + rows)
    except OSError as error:
        logger.warning("%s: the embedded corpus is not cached (%s) and will be parsed again", path, error)
