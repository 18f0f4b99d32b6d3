"""Decoders with experts (Mixtral, OLMoE, Qwen3-MoE) in Flax: load a checkpoint, run it, generate from it, save it."""

from models.config import ConfigError, MoEConfig
from models.generation import Sampling
from models.model import Model, load_model
from models.weights import CheckpointError

__all__ = ["CheckpointError", "ConfigError", "MoEConfig", "Model", "Sampling", "load_model"]
