"""Several devices, simulated on the CPU: they have to be there before JAX begins, so each test has a process for it."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from models.config import config_to_hf
from models.weights import ledger

ROOT = Path(__file__).resolve().parents[2]
FLAGS = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"


def run(*command: str) -> str:
    environment = os.environ | {"XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
    return done.stdout


def test_eight_devices_are_as_good_as_one():
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/models/on_eight_devices.py")


_PEAK = textwrap.dedent("""
    import sys
    from pathlib import Path
    import jax
    from models.config import read_config
    from models.placement import Placement, make_mesh
    from models.weights import load_params

    def kilobytes(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(field)).split()[1])

    def load(directory):
        config = read_config(Path(directory) / "config.json")
        return load_params(Path(directory), config, "bfloat16", Placement.of(config, make_mesh("model=8")))[0]

    load(sys.argv[1])  # what the runtime takes for itself belongs to the baseline
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = kilobytes("VmRSS")
    params = load(sys.argv[2])
    held = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
    print((kilobytes("VmHWM") - before) * 1024 - held)
""")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_takes_little_host_memory_in_addition_to_what_the_devices_hold(tiny_config, tmp_path):
    """At most 1.5 times a device's share, and the largest tensor (simulated devices hold it in the host)."""
    paths = []
    for name, hidden in (("small", 16), ("large", 512)):
        sizes = {"hidden_size": hidden, "vocab_size": 4096, "intermediate_size": 4 * hidden, "num_heads": 8}
        config = dataclasses.replace(tiny_config, head_dim=hidden // 8, num_kv_heads=8, num_experts=16, **sizes)
        tensors = {name: np.full(entry.shape, 0.5, jnp.bfloat16) for name, entry in ledger(config).items()}
        paths.append(tmp_path / name)
        paths[-1].mkdir()
        save_file(tensors, paths[-1] / "model.safetensors")
        (paths[-1] / "config.json").write_text(json.dumps(config_to_hf(config, "bfloat16")))
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert 200e6 < total < 300e6
    added = float(run("-c", _PEAK, *map(str, paths)))
    assert added <= 1.5 * total / 8 + max(tensor.nbytes for tensor in tensors.values())
