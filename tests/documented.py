"""The commands of README and docs, as a reader's shell would take them, in the order in which a reader meets them.

Commands are the lines of a fenced block without a language, or with `bash` or `sh`, and what stands between backticks
and begins with a program. A document is one shell: what it sets holds until its end, and nothing from another one does.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("python", "make", "pip", "tensorboard", "optuna-dashboard", "srun")

_INDEX = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
DOCUMENTS = [
    ROOT / "README.md",
    *(ROOT / "docs" / name for name in re.findall(r"\]\((\w+\.md)\)", _INDEX)),
    ROOT / "CONTRIBUTING.md",
]
_CODE = re.compile(r"^```(?P<language>\w*)\n(?P<block>.*?)^```$|`(?P<inline>[^`]+)`", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    """One command of a document."""

    document: str
    line: int
    words: tuple[str, ...]  # after the shell has read them: no quotes, no comments, variables replaced

    def __str__(self) -> str:
        return f"{self.document}:{self.line} {' '.join(self.words)}"


def commands() -> list[Command]:
    """Every command of every document."""
    return [command for document in DOCUMENTS for command in commands_of(document)]


def commands_of(document: Path) -> Iterator[Command]:
    """Those of one document, in order; raises ValueError for a line that is none, and a variable that is not set."""
    text = document.read_text(encoding="utf-8")
    known: dict[str, str] = {}
    for code in _CODE.finditer(text):
        for start, line in _lines(code):
            number = text.count("\n", 0, start) + 1
            words = shlex.split(_with(known, line, f"{document.name}:{number}"), comments=True)
            if len(words) == 1 and re.match(r"\w+=", words[0]):
                name, _, known[name] = words[0].partition("=")
            elif words and words[0] not in PROGRAMS:
                raise ValueError(f"{document.name}:{number}: {line!r} begins with none of {', '.join(PROGRAMS)}")
            elif words:
                yield Command(document.name, number, tuple(words))


def _lines(code: re.Match[str]) -> Iterator[tuple[int, str]]:
    """Where each line of shell code starts, and the line; what ends in a backslash goes on."""
    if code["inline"]:
        line = " ".join(code["inline"].split())
        if re.match(rf"(?:{'|'.join(PROGRAMS)}) ", line):
            yield code.start(), line
    elif code["language"] in ("", "bash", "sh"):
        for found in re.finditer(r"(?:.*\\\n)*.*\n", code["block"]):
            yield code.start("block") + found.start(), found[0].replace("\\\n", " ").strip()


def _with(known: dict[str, str], line: str, where: str) -> str:
    """The line with its variables replaced."""

    def value(variable: re.Match[str]) -> str:
        if variable[1] not in known:
            raise ValueError(f"{where}: ${variable[1]} is not set in this document")
        return known[variable[1]]

    return re.sub(r"\$(\w+)", value, line)
