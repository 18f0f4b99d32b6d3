"""Decoders with experts (Mixtral, OLMoE, Qwen3-MoE) in Flax: load a checkpoint, run it, generate from it, save it.

    model = load_model("reference")
    tokens, _ = model.generate([[1, 5, 9]], max_new_tokens=20)

`models.download` fetches and verifies checkpoints, `models.training` trains one, `models.tokenizer` has the tokenizers.
"""

from models.config import ConfigError, MoEConfig, read_config
from models.decoder import Output
from models.experts import get_engine
from models.generation import GenerationDefaults, Sampling
from models.model import Model, load_model
from models.parameters import init_params, prepare
from models.placement import MeshError, make_mesh
from models.weights import CheckpointError, save_params

__all__ = [
    "CheckpointError",
    "ConfigError",
    "GenerationDefaults",
    "MeshError",
    "MoEConfig",
    "Model",
    "Output",
    "Sampling",
    "get_engine",
    "init_params",
    "load_model",
    "make_mesh",
    "prepare",
    "read_config",
    "save_params",
]
