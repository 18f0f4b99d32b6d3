"""The decoder against transformers, on random checkpoints that together use every feature of each family's format."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from models import Sampling, load_model
from models.config import read_config
from models.download import verify
from models.model import REFERENCE
from models.weights import INDEX_FILE, ledger, save_params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)  # the matrices are tiny; a second thread only waits

VOCAB, NEW = 61, 32
LOGITS, GATES = 2e-4, 1e-5  # largest difference allowed in float32


@dataclasses.dataclass(frozen=True)
class Case:
    layers: int
    hidden: int
    heads: tuple[int, int]  # of queries, of keys and values
    experts: tuple[int, int]  # all, and per token
    head_dim: int | None = None  # None: hidden / query heads
    theta: float = 1e6
    eps: float = 1e-5
    window: int | None = None
    tied: bool = False
    old_style: bool = False  # rope_theta and torch_dtype in config.json
    shard: str = "1GB"  # largest file
    family: str = "mixtral"
    more: dict = dataclasses.field(default_factory=dict)  # fields of the family's own


CASES = {
    "as-published": Case(1, 16, (4, 2), (4, 2), old_style=True),
    "every-head-its-own": Case(1, 16, (2, 2), (3, 1), theta=1e4, eps=1e-6),
    "one-key-head": Case(3, 16, (4, 1), (2, 1), head_dim=6, shard="6KB"),
    "window": Case(2, 24, (4, 2), (4, 2), window=4, theta=500.0, old_style=True),
    "window-beyond-the-prompt": Case(1, 16, (2, 1), (4, 4), head_dim=12, window=20, shard="6KB"),
    "tied": Case(1, 16, (4, 4), (4, 2), head_dim=2, tied=True, eps=1e-3),
    "tied-sharded-old": Case(1, 32, (4, 2), (5, 3), tied=True, old_style=True, shard="12KB"),
    "many-experts": Case(1, 16, (2, 2), (16, 4), head_dim=10, theta=1e5),
}


def olmoe(*shape, more=None, **fields) -> Case:
    return Case(*shape, family="olmoe", more=more or {}, **fields)


def qwen3_moe(*shape, more=None, **fields) -> Case:
    sizes = {"moe_intermediate_size": 24, "use_sliding_window": fields.get("window") is not None}
    return Case(*shape, family="qwen3_moe", more={**sizes, **(more or {})}, **fields)


CASES |= {
    "olmoe-as-published": olmoe(2, 16, (4, 4), (8, 4), theta=1e4, old_style=True),
    "olmoe-clipped": olmoe(1, 16, (2, 2), (4, 2), more={"clip_qkv": 0.7}),
    "olmoe-normalized": olmoe(2, 16, (4, 2), (4, 3), more={"norm_topk_prob": True}, shard="6KB"),
    "olmoe-biased": olmoe(1, 24, (4, 1), (4, 2), more={"attention_bias": True, "clip_qkv": 1.5}, eps=1e-3),
    "olmoe-tied": olmoe(1, 16, (2, 2), (3, 1), tied=True),
    "olmoe-one-head": olmoe(3, 16, (1, 1), (2, 2), theta=500.0),
    "qwen3-as-published": qwen3_moe(2, 16, (4, 2), (8, 4), head_dim=8, more={"norm_topk_prob": True}, old_style=True),
    "qwen3-first-layer-dense": qwen3_moe(3, 16, (2, 1), (4, 2), eps=1e-6, more={"mlp_only_layers": [0]}),
    "qwen3-every-second-dense": qwen3_moe(4, 16, (2, 2), (3, 2), more={"decoder_sparse_step": 2}, shard="6KB"),
    "qwen3-both-rules": qwen3_moe(
        4, 16, (2, 1), (3, 1), head_dim=12, more={"decoder_sparse_step": 2, "mlp_only_layers": [3]}, old_style=True
    ),
    "qwen3-window": qwen3_moe(2, 24, (4, 2), (4, 2), window=4, more={"mlp_only_layers": [1]}),
    "qwen3-biased-and-tied": qwen3_moe(1, 16, (4, 4), (4, 2), head_dim=2, tied=True, more={"attention_bias": True}),
}


@dataclasses.dataclass(frozen=True)
class Pair:
    """One checkpoint, opened on both sides."""

    case: Case
    theirs: "transformers.PreTrainedModel"
    directory: object


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def pair(request, tmp_path_factory) -> Pair:
    case = request.param
    torch.manual_seed(0)
    head_dim = {} if case.family == "olmoe" else {"head_dim": case.head_dim or case.hidden // case.heads[0]}
    config = transformers.AutoConfig.for_model(
        case.family,
        vocab_size=VOCAB,
        hidden_size=case.hidden,
        intermediate_size=40,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads[0],
        num_key_value_heads=case.heads[1],
        num_local_experts=case.experts[0],
        num_experts_per_tok=case.experts[1],
        rms_norm_eps=case.eps,
        rope_parameters={"rope_type": "default", "rope_theta": case.theta},
        **({} if case.family == "olmoe" else {"sliding_window": case.window}),
        tie_word_embeddings=case.tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **head_dim,
        **case.more,
        initializer_range=0.4,  # the usual 0.02 gives logits so close together that rounding decides
    )
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, tensor in theirs.named_parameters():
            if "norm" in name:  # all ones by default, which hides a norm in the wrong place
                tensor.uniform_(0.5, 1.5)
            if name.endswith("bias"):  # all zeros
                tensor.uniform_(-0.5, 0.5)
    directory = tmp_path_factory.mktemp("checkpoint")
    theirs.save_pretrained(directory, max_shard_size=case.shard)
    if case.old_style:
        file = directory / "config.json"
        fields = json.loads(file.read_text())
        fields["rope_theta"] = fields.pop("rope_parameters")["rope_theta"]
        fields["torch_dtype"] = fields.pop("dtype")
        if case.family == "qwen3_moe":
            fields["num_experts"] = fields.pop("num_local_experts")
        file.write_text(json.dumps(fields))
    return Pair(case, theirs, directory)


@pytest.fixture(scope="module")
def ours(pair):
    return load_model(pair.directory)


def logits_of(theirs, ids, mask) -> tuple[np.ndarray, np.ndarray]:
    """Logits [B, T, V] and gate probabilities [L, B, T, E] of transformers."""
    with torch.no_grad():
        out = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask), output_router_logits=True)
    gates = torch.stack(out.router_logits).float().softmax(-1)
    return out.logits.float().numpy(), gates.reshape(len(gates), *ids.shape, -1).numpy()


def test_the_config_is_read_as_written(pair):
    config, case = read_config(pair.directory / "config.json"), pair.case
    assert (config.rope_theta, config.rms_norm_eps) == (case.theta, case.eps)
    assert (config.num_kv_heads, config.sliding_window) == (case.heads[1], case.window)
    assert (config.family, config.depth) == (case.family, case.layers)
    assert (config.head_dim, config.tie_word_embeddings) == (pair.theirs.model.layers[0].self_attn.head_dim, case.tied)
    assert (pair.directory / "model.safetensors.index.json").exists() == (case.shard != "1GB")


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_and_gate_probabilities(pair, ours, padded_texts, side):
    ids, mask = padded_texts(side)
    logits, gates = logits_of(pair.theirs, ids, mask)
    out = ours(ids, mask)
    real = mask.astype(bool)
    np.testing.assert_allclose(np.asarray(out.logits)[real], logits[real], rtol=0, atol=LOGITS)
    np.testing.assert_allclose(np.asarray(out.router_probs)[:, real], gates[:, real], rtol=0, atol=GATES)


def test_greedy_tokens(pair, ours, padded_texts):
    ids, mask = padded_texts("left")
    with torch.no_grad():
        theirs = pair.theirs.generate(
            torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    tokens, _ = ours.generate(ids, NEW, attention_mask=mask)
    np.testing.assert_array_equal(tokens, theirs.numpy())


def test_transformers_opens_what_is_saved_here(pair, ours, padded_texts, tmp_path):
    save_params(tmp_path, ours.params, ours.config, shard_bytes=8_000)
    reopened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(reopened) is type(pair.theirs)
    ids, mask = padded_texts("left")
    for saved, original in zip(logits_of(reopened, ids, mask), logits_of(pair.theirs, ids, mask), strict=True):
        np.testing.assert_array_equal(saved, original)
    again = load_model(tmp_path)
    assert (again.config, again.fingerprint) == (ours.config, ours.fingerprint)


STACKED = ("one-key-head", "tied-sharded-old", "olmoe-as-published", "qwen3-both-rules")


@pytest.mark.parametrize("pair", [CASES[name] for name in STACKED], ids=STACKED, indirect=True)
def test_experts_that_are_stored_stacked_are_the_same_model(pair, ours, padded_texts, tmp_path):
    """As transformers 5 writes its own layout; sharded, so that the parts of a layer are in several files."""
    pair.theirs.save_pretrained(tmp_path, save_original_format=False, max_shard_size="6KB")
    stored = json.loads((tmp_path / INDEX_FILE).read_text())["weight_map"]
    assert sum("gate_up_proj" in name for name in stored) == ours.config.num_layers
    stacked = load_model(tmp_path)
    assert stacked.fingerprint == ours.fingerprint
    jax.tree.map(np.testing.assert_array_equal, stacked.params, ours.params)
    ids, mask = padded_texts("left")
    np.testing.assert_array_equal(stacked(ids, mask).logits, ours(ids, mask).logits)
    assert verify(tmp_path, progress=False).tensors == len(ledger(ours.config))


@pytest.mark.parametrize("pair", [CASES["as-published"]], ids=["as-published"], indirect=True)
def test_texts_end_where_generation_config_says(pair, ours, padded_texts, tmp_path):
    """The ids are only there; transformers' tokens, its padding behind the ends included."""
    ids, mask = padded_texts("left")
    plain = ours.generate(ids, NEW, attention_mask=mask)[0][:, ids.shape[1] :]
    ends = [int(plain[0, 2]), int(plain[1, 9])]
    pair.theirs.save_pretrained(tmp_path)
    recommended = {"eos_token_id": ends, "pad_token_id": 7, "do_sample": True, "temperature": 0.6, "top_k": 20}
    (tmp_path / "generation_config.json").write_text(json.dumps(recommended))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        options = {"attention_mask": torch.tensor(mask), "max_new_tokens": NEW, "do_sample": False}
        expected = theirs.generate(torch.tensor(ids), **options).numpy()
    model = load_model(tmp_path)
    np.testing.assert_array_equal(model.generate(ids, NEW, attention_mask=mask)[0], expected)
    assert (expected[0, ids.shape[1] + 3 :] == 7).all() and model.config.eos_token_id is None
    assert model.generation.sampling == Sampling(0.6, 20)


@pytest.mark.parametrize("pair", [CASES["as-published"], CASES["tied"]], ids=["as-published", "tied"], indirect=True)
def test_bfloat16_is_near_float32(pair, ours, padded_texts):
    """8 bits of mantissa: the RMS difference of the logits stays under a tenth of their spread in these tiny models."""
    ids, mask = padded_texts("left")
    rounded = load_model(pair.directory, dtype="bfloat16")
    out = rounded(ids, mask)
    exact = np.asarray(ours(ids, mask).logits)[mask.astype(bool)]
    error = np.asarray(out.logits)[mask.astype(bool)] - exact
    assert {leaf.dtype.name for leaf in jax.tree.leaves(rounded.params)} == {"bfloat16"}
    assert (out.logits.dtype, out.router_probs.dtype) == (np.float32, np.float32)
    assert np.sqrt(np.mean(error**2)) < 0.1 * exact.std()


@pytest.mark.skipif(not (REFERENCE / "model.safetensors").exists(), reason="the reference model is not trained yet")
def test_the_reference_model_opens_in_transformers():
    theirs = transformers.MixtralForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32).eval()
    ours = load_model("reference")
    ids = np.asarray([ours.tokenizer("The router chooses two experts for each token.").input_ids])
    logits, gates = logits_of(theirs, ids, np.ones_like(ids))
    out = ours(ids)
    np.testing.assert_allclose(np.asarray(out.logits), logits, rtol=0, atol=LOGITS)
    np.testing.assert_allclose(np.asarray(out.router_probs), gates, rtol=0, atol=GATES)
