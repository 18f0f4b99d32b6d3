"""What the tests of models/ share: a tiny architecture and random models of it."""

import dataclasses

import jax
import numpy as np
import pytest

from models import Model, MoEConfig
from models.experts import get_engine
from models.parameters import init_params, prepare

TINY = MoEConfig(
    vocab_size=61,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    num_experts=4,
    top_k=2,
    rope_theta=1e4,
    eos_token_id=None,
    initializer_range=0.4,  # the usual 0.02 gives random logits so close together that rounding decides
)


# Fields in which other families differ, each with a layer without experts among its three.
FAMILY_FIELDS = {
    "olmoe": {
        "family": "olmoe",
        "query_key_norm": "projection",
        "clip_qkv": 1.0,
        "normalize_top_k": False,
        "dense_layers": (2,),
        "dense_size": 20,
    },
    "qwen3_moe": {
        "family": "qwen3_moe",
        "query_key_norm": "head",
        "attention_bias": True,
        "dense_layers": (0,),
        "dense_size": 20,
    },
}


@pytest.fixture(scope="session", params=FAMILY_FIELDS.values(), ids=FAMILY_FIELDS.keys())
def family_fields(request) -> dict:
    """Fields of `MoEConfig` that make TINY a model of another family."""
    return request.param


@pytest.fixture(scope="session")
def tiny_config() -> MoEConfig:
    return TINY


@pytest.fixture(scope="session")
def make_model():
    """`(**fields of the config) -> Model`: random, float32, without a tokenizer."""

    def make(**fields) -> Model:
        config, engine = dataclasses.replace(TINY, **fields), get_engine()
        params = prepare(init_params(config, jax.random.key(0)), engine)
        return Model(config, params, engine, name="tiny", fingerprint="")

    return make


@pytest.fixture(scope="session")
def tiny_model(make_model) -> Model:
    return make_model()


@pytest.fixture(scope="session")
def padded_texts():
    """`(side) -> ids, mask`, int32[3, 11] each: the same texts of 11, 8 and 2 tokens, padded with 0 on that side."""

    def make(side: str) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(1)
        ids, mask = np.zeros((3, 11), np.int32), np.zeros((3, 11), np.int32)
        for row, length in enumerate((11, 8, 2)):
            places = slice(11 - length, None) if side == "left" else slice(length)
            ids[row, places], mask[row, places] = rng.integers(3, TINY.vocab_size, length), 1
        return ids, mask

    return make
