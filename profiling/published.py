"""The shapes of published checkpoints, from their config.json: what is asked about without loading anything.

mistralai/Mixtral-8x7B-v0.1, allenai/OLMoE-1B-7B-0924, Qwen/Qwen3-30B-A3B.
"""

from models.config import MoEConfig

MIXTRAL_8X7B = MoEConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    num_experts=8,
    top_k=2,
)
OLMOE_1B_7B = MoEConfig(
    family="olmoe",
    vocab_size=50304,
    hidden_size=2048,
    intermediate_size=1024,
    num_layers=16,
    num_heads=16,
    num_kv_heads=16,
    head_dim=128,
    num_experts=64,
    top_k=8,
    rope_theta=1e4,
    max_position_embeddings=4096,
    query_key_norm="projection",
    normalize_top_k=False,
    router_aux_loss_coef=0.01,
    bos_token_id=None,
    eos_token_id=50279,
    pad_token_id=1,
)
QWEN3_30B_A3B = MoEConfig(
    family="qwen3_moe",
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=768,
    num_layers=48,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    num_experts=128,
    top_k=8,
    rms_norm_eps=1e-6,
    max_position_embeddings=40960,
    query_key_norm="head",
    dense_size=6144,  # of layers without experts, of which it has none
    router_aux_loss_coef=0.001,
    bos_token_id=151643,
    eos_token_id=151645,
)
PUBLISHED = {"mixtral-8x7b": MIXTRAL_8X7B, "olmoe-1b-7b": OLMOE_1B_7B, "qwen3-30b-a3b": QWEN3_30B_A3B}
