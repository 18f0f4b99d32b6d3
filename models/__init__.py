"""Decoders with experts (Mixtral, OLMoE, Qwen3-MoE) in Flax: load a checkpoint, run it, generate from it, save it."""

from models.config import ConfigError, MoEConfig
from models.generation import Sampling
from models.model import Model, load_model
from models.placement import MeshError, make_mesh
from models.weights import CheckpointError

__all__ = [
    "CheckpointError",
    "ConfigError",
    "MeshError",
    "MoEConfig",
    "Model",
    "Sampling",
    "load_model",
    "make_mesh",
]
