"""The tests marked `optimized`, in a process whose programs are compiled as users' are.

A fused multiply-add may then be in one program and not in another.
"""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def test_what_is_equal_bit_for_bit_is_so_as_users_compile():
    marked = [str(path) for path in sorted(TESTS.rglob("test_*.py")) if "@pytest.mark.optimized" in path.read_text()]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "optimized", *marked],
        env=environment | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"},
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
