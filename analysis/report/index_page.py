"""Write an index page of all reports in and below a folder (`analysis.report.html`).

    python -m analysis.report.index_page results     # writes results/index.html

A run updates the index page of the directory that it writes to, but no page above it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from analysis.command import HelpFormatter, path_argument, program
from analysis.report.html import INDEX, is_foreign, write_index
from varjax.errors import InputError


@program
def main(arguments: Sequence[str] | None) -> None:
    """Write the page of all reports in a folder.

    Args:
        arguments: of the command line.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "folder", type=path_argument, help="directory whose reports are listed, including those in its subdirectories"
    )
    folder = parser.parse_args(arguments).folder
    if not folder.is_dir():
        raise InputError(f"{folder} is not a directory; give one that holds reports")
    if is_foreign(folder):
        raise InputError(f"{folder / INDEX} was not written by varjax; move it away first")
    write_index(folder)
    print(f"written to {folder / INDEX}")


if __name__ == "__main__":
    main()
