"""Fetch a Mixtral, OLMoE or Qwen3-MoE checkpoint from the Hugging Face hub, or check one that is here already.

Only safetensors, JSON and tokenizer.model are fetched. The directory appears when everything in it has been verified;
an interrupted download is taken up again by the same command.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from analysis.command import path_argument, program
from analysis.report.output import DIRECTORY, Output, lock
from models.download import Remote, Verified, check_disk, download, look_up, verify


@program
def main(arguments: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--model", metavar="OWNER/NAME", help="repository on the hub, such as mistralai/Mixtral-8x7B-v0.1"
    )
    what.add_argument(
        "--verify_only",
        type=path_argument,
        metavar="DIR",
        help="check a directory that is here: files, tensors, index, tokenizer, and hashes if this script fetched it; "
        "needs no network",
    )
    parser.add_argument(
        "--revision", default=None, help="branch, tag or commit of the repository; none: its main branch"
    )
    parser.add_argument(
        "--output", type=path_argument, default=None, metavar="DIR", help="where it is to be; none: checkpoints/NAME"
    )
    parser.add_argument("--dry_run", action="store_true", help="say what would be fetched and whether it fits, no more")
    args = parser.parse_args(arguments)

    if args.verify_only is not None:
        report(verify(args.verify_only))
        return
    remote = look_up(args.model, args.revision)
    output = args.output or Path("checkpoints") / remote.repo.split("/")[-1]
    Output.of(output, "model", DIRECTORY)  # refuses a file
    show(remote)
    print(f"{check_disk(remote, output) / 1e9:,.1f} GB are free where {output} is to be")
    if args.dry_run:
        print("dry run: nothing was fetched")
        return
    with lock(output.with_name(f".{output.name}.lock"), str(output)):
        verified = download(remote, output)
    report(verified)


def show(remote: Remote) -> None:
    print(f"{remote.repo}, commit {remote.commit}")
    for file in remote.files:
        print(f"  {file.name:<40}{file.size / 1e6:>12,.1f} MB")
    print(f"  {f'{len(remote.files)} files':<40}{remote.size / 1e6:>12,.1f} MB")


def report(verified: Verified) -> None:
    print(
        f"{verified.tensors:,} tensors, {verified.parameters:,} parameters, {verified.bytes / 1e9:,.2f} GB in "
        f"{verified.files} file(s): every one there, with its shape, in its place"
    )
    if verified.hashed:
        print(f"{verified.hashed} files: contents as the hub states")
    else:
        print("contents were not compared: no hashes are known of a directory that this script did not fetch")
    if verified.tokenizer is None:
        print("no tokenizer: put the model's tokenizer.json or tokenizer.model there before using it on text")
    print(f"{verified.directory} is ready: use it with --model {shlex.quote(str(verified.directory))}")


if __name__ == "__main__":
    main()
