"""Lowering a program for CUDA where no GPU is."""

import contextlib

import jax


def lowered_for_cuda(function, *arguments):
    """What a jitted function of these shapes gives, as shapes, and its program for an H100, as text."""
    with _h100():
        traced = jax.jit(function).trace(*arguments)
        return traced.out_info, traced.lower(lowering_platforms=("cuda",)).as_text()


def _h100():
    """What tells Pallas the kind of device from jax 0.11 on; before that, it did not ask."""
    if jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    return use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device))
