"""Download a Mixture-of-Experts checkpoint from the Hugging Face hub, or verify one that is already on disk.

Only safetensors, JSON and tokenizer.model are downloaded. The directory appears once everything in it is verified;
rerun the same command to resume an interrupted download.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from analysis.command import HelpFormatter, path_argument, program
from analysis.report.output import DIRECTORY, Output, lock
from models.download import Remote, Verified, check_disk, download, look_up, verify


@program
def main(arguments: Sequence[str] | None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--model", metavar="OWNER/NAME", help="repository on the hub, such as mistralai/Mixtral-8x7B-v0.1"
    )
    what.add_argument(
        "--verify_only",
        type=path_argument,
        metavar="DIR",
        help="local directory to verify without network access: files, tensors, index, tokenizer, and also hashes if "
        "this script downloaded it",
    )
    parser.add_argument("--revision", help="branch, tag or commit of the repository (default: its main branch)")
    parser.add_argument(
        "--output", type=path_argument, metavar="DIR", help="directory to write to (default: checkpoints/NAME)"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="only print what would be downloaded and whether it fits on the disk"
    )
    args = parser.parse_args(arguments)

    if args.verify_only is not None:
        _report(verify(args.verify_only))
        return
    remote = look_up(args.model, args.revision)
    output = args.output or Path("checkpoints") / remote.repo.split("/")[-1]
    Output.of(output, "model", DIRECTORY)  # refuses a file
    _show(remote)
    print(f"{check_disk(remote, output) / 1e9:,.1f} GB are free at {output}")
    if args.dry_run:
        print("dry run: nothing was downloaded")
        return
    with lock(output.with_name(f".{output.name}.lock"), str(output)):
        verified = download(remote, output)
    _report(verified)


def _show(remote: Remote) -> None:
    print(f"{remote.repo}, commit {remote.commit}")
    for file in remote.files:
        print(f"  {file.name:<40}{file.size / 1e6:>12,.1f} MB")
    print(f"  {f'{len(remote.files)} files':<40}{remote.size / 1e6:>12,.1f} MB")


def _report(verified: Verified) -> None:
    print(
        f"{verified.tensors:,} tensors, {verified.parameters:,} parameters, {verified.bytes / 1e9:,.2f} GB in "
        f"{verified.files} file(s): all present, with the expected shapes"
    )
    if verified.hashed:
        print(f"{verified.hashed} files: contents as published on the hub")
    else:
        print("contents were not compared: no hashes are known of a directory that this script did not download")
    if verified.tokenizer is None:
        print("no tokenizer: put the model's tokenizer.json or tokenizer.model there before using it on text")
    print(f"{verified.directory} is ready: use it with --model {shlex.quote(str(verified.directory))}")


if __name__ == "__main__":
    main()
