"""Several processes, on one machine or on many, that run one program over all their devices together.

Every process is given the same arguments and reads the same files; `jax.distributed` joins them, the model and its
batches are divided over all devices (`--mesh`), and each process computes every result. The first one prints and
writes.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import jax

from varjax.errors import InputError

AUTO = "auto"
NOTICED_AFTER = 20  # seconds without a sign of life after which a process counts as gone


def add_hosts(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="join --num_processes processes to one program over all their devices (docs/scaling.md): where the first "
        f"one listens; {AUTO!r}: SLURM, MPI or Kubernetes know that and the numbers",
    )
    made.add_argument("--num_processes", type=int, default=1, help="how many there are")
    made.add_argument("--process_id", type=int, default=0, help="which of them this one is, from 0")


def join(args: argparse.Namespace) -> None:
    """Join the other processes, if the arguments say so. All but the first are silent from then on, but for errors.

    Raises:
        InputError: the arguments do not go together.
    """
    if args.coordinator is None:
        return
    given: dict[str, Any] = {}
    if args.coordinator != AUTO:
        last = args.num_processes - 1
        if not 0 <= args.process_id <= last:
            raise InputError(f"process {args.process_id} of {last + 1}: expected a process from 0 to {last}")
        given = {"coordinator_address": args.coordinator, "num_processes": last + 1, "process_id": args.process_id}
    jax.distributed.initialize(**given, heartbeat_timeout_seconds=NOTICED_AFTER, shutdown_timeout_seconds=NOTICED_AFTER)
    if jax.process_index() > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)
