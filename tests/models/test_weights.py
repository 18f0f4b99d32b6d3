"""Checkpoints in and out: the published Mixtral's ledger, every fault named in one error, whole or nothing, memory."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from analysis.text.corpus import Document
from analysis.text.encoding import encode
from models import CheckpointError, ConfigError, load_model
from models.config import config_to_hf, read_config
from models.generation import GenerationDefaults, Sampling
from models.memory import check_memory, device_bytes, parameter_bytes
from models.parameters import init_params, param_shapes
from models.placement import ONE_DEVICE
from models.tokenizer import load_tokenizer, save_tokenizer, train_bpe
from models.weights import ledger, load_params, save_params
from profiling.published import PUBLISHED
from varjax import VARConfig, VARModel, checksums
from varjax.errors import InputError

HEAD, NORM, QUERIES = "lm_head.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.3.w2.weight"


@pytest.fixture(scope="session")
def tiny_params(tiny_config):
    return init_params(tiny_config, jax.random.key(0))


@pytest.fixture
def checkpoint(tiny_config, tiny_params, tmp_path):
    """A good checkpoint in one file, for a test to spoil."""
    save_params(tmp_path / "checkpoint", tiny_params, tiny_config)
    return tmp_path / "checkpoint"


def edit(directory, name="model.safetensors", **changes) -> None:
    """Replace tensors of a weight file; None takes one away. Dots in names are written as in `HEAD` above."""
    tensors = load_file(directory / name) | changes
    save_file({key: value for key, value in tensors.items() if value is not None}, directory / name)


def edit_config(directory, **changes) -> None:
    fields = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(fields))


def same(left, right) -> bool:
    return jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), left, right))


# --- the published Mixtral -------------------------------------------------------------------------------------------


def test_the_published_mixtral_maps_one_to_one(shared_data):
    config = read_config(shared_data / "mixtral" / "config.json")
    published = {
        name: tuple(shape)
        for name, shape in json.loads((shared_data / "mixtral" / "tensor_shapes.json").read_text()).items()
    }
    entries = ledger(config)
    assert {name: entry.shape for name, entry in entries.items()} == published
    assert (len(published), sum(map(math.prod, published.values()))) == (995, 46_702_792_704)

    stored = [entry.shape[::-1] if entry.transposed else entry.shape for entry in entries.values()]
    assert stored == [leaf.shape for leaf in jax.tree.leaves(param_shapes(config))]  # one tensor for every leaf


@pytest.mark.parametrize(
    ("file", "tensors", "parameters"),
    [("olmoe_config.json", 3_219, 6_919_161_856), ("qwen3_moe_config.json", 18_867, 30_532_122_624)],
    ids=["OLMoE-1B-7B", "Qwen3-30B-A3B"],
)
def test_other_families_have_their_published_size(shared_data, file, tensors, parameters):
    entries = ledger(read_config(shared_data / file))
    assert (len(entries), sum(math.prod(entry.shape) for entry in entries.values())) == (tensors, parameters)


# --- there and back --------------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(checkpoint, tiny_config, tiny_params):
    assert read_config(checkpoint / "config.json") == tiny_config
    params, _ = load_params(checkpoint, tiny_config)
    assert jax.tree.structure(params) == jax.tree.structure(tiny_params)
    assert same(params, tiny_params)


def test_the_fingerprint_knows_the_model_and_nothing_else(checkpoint, tiny_config, tiny_params, tmp_path):
    def fingerprint(directory=checkpoint, config=tiny_config, dtype=jnp.float32) -> str:
        return load_params(directory, config, dtype)[1]

    original = fingerprint()
    assert fingerprint(dtype=jnp.bfloat16) == original
    save_params(tmp_path / "sharded", tiny_params, tiny_config, shard_bytes=4_000)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    assert fingerprint(tmp_path / "sharded") == original
    assert fingerprint(config=dataclasses.replace(tiny_config, initializer_range=0.02)) == original

    for maths in ({"top_k": 1}, {"clip_qkv": 1.0}, {"normalize_top_k": False}):
        assert fingerprint(config=dataclasses.replace(tiny_config, **maths)) != original
    last_value = np.asarray(load_file(checkpoint / "model.safetensors")[EXPERT]).copy()
    last_value[-1, -1] += 1e-3
    edit(checkpoint, **{EXPERT: last_value})
    assert fingerprint() != original


def test_fingerprints_stay_as_they_were_published(tiny_config, tmp_path):
    """Statistics and tables name the fingerprint of their model."""
    config = dataclasses.replace(tiny_config, family="olmoe", query_key_norm="projection", normalize_top_k=False)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), param_shapes(config))
    save_params(tmp_path, zeros, config)
    assert load_params(tmp_path, config)[1].startswith("a818f32d060675cc")


def test_a_smaller_checkpoint_replaces_a_sharded_one(tiny_config, tiny_params, tmp_path):
    save_params(tmp_path, jax.tree.map(jnp.zeros_like, tiny_params), tiny_config, shard_bytes=4_000)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 3}')
    save_params(tmp_path, tiny_params, tiny_config)
    assert not (tmp_path / "generation_config.json").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert same(load_params(tmp_path, tiny_config)[0], tiny_params)


def test_a_saved_model_keeps_what_its_checkpoint_says_of_generation(tiny_config, tiny_params, tmp_path):
    """Its end ids may be only in generation_config.json."""
    said = GenerationDefaults(None, (5, 9), 3, Sampling(0.5, top_p=0.9))
    save_params(tmp_path, tiny_params, tiny_config, generation=said)
    assert load_model(tmp_path).generation == said
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [5, 9]
    assert read_config(tmp_path / "config.json") == tiny_config

    save_params(tmp_path, tiny_params, tiny_config, generation=GenerationDefaults.of(tiny_config))
    assert not (tmp_path / "generation_config.json").exists()  # the config says it
    assert load_model(tmp_path).generation == GenerationDefaults.of(tiny_config)


def test_an_interrupted_save_leaves_what_was_there(checkpoint, tiny_config, tiny_params, monkeypatch):
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    calls = []

    def full_disk(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 3:
            raise OSError("No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr("safetensors.numpy.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_params(checkpoint, jax.tree.map(jnp.zeros_like, tiny_params), tiny_config, shard_bytes=4_000)
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


# --- faults ----------------------------------------------------------------------------------------------------------


def truncate(directory) -> None:
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[: len(content) // 2])


def not_finite(value, dtype):
    def spoil(directory):
        tensor = np.ones(16, dtype)
        tensor[7] = value
        edit(directory, **{NORM: tensor})

    return spoil


def write_index(content: str):
    return lambda directory: (directory / "model.safetensors.index.json").write_text(content)


def repeat_in_a_second_file(directory) -> None:
    save_file({NORM: np.ones(16, np.float32)}, directory / "b.safetensors")
    weight_map = {HEAD: "model.safetensors", NORM: "b.safetensors"}
    write_index(json.dumps({"weight_map": weight_map}))(directory)


WEIGHT_FAULTS = {
    "missing": (lambda d: edit(d, **{HEAD: None}), [f"missing {HEAD}", "fetch the checkpoint again"]),
    "surplus": (lambda d: edit(d, extra=np.ones(2)), ["surplus extra in model.safetensors"]),
    "misshapen": (
        lambda d: edit(d, **{QUERIES: np.ones((16, 24), np.float32)}),
        [QUERIES, "model.safetensors", "(16, 24)", "expected (24, 16)"],
    ),
    "quantized": (lambda d: edit(d, **{NORM: np.ones(16, np.int8)}), [NORM, "stored as I8", "expected one of F32"]),
    "several": (
        lambda d: edit(d, extra=np.ones(2), **{HEAD: None, NORM: np.ones(3, np.float32), EXPERT: None}),
        [f"missing {HEAD}", f"missing {EXPERT}", "surplus extra", f"{NORM} in model.safetensors has shape (3,)"],
    ),
    "repeated": (repeat_in_a_second_file, [f"{NORM} is in b.safetensors and again in model.safetensors"]),
    "truncated": (truncate, ["model.safetensors", "do not match their checksum", "fetch or save the file again"]),
    "truncated-without-checksum": (
        lambda d: (edit(d), truncate(d)),
        ["model.safetensors", "truncated", "fetch the file again"],
    ),
    "not-a-number": (not_finite(np.nan, np.float32), ["model.safetensors", NORM, "NaN or infinite"]),
    "infinite": (not_finite(-np.inf, np.float32), ["model.safetensors", NORM, "NaN or infinite"]),
    "not-a-number-bf16": (not_finite(np.nan, jnp.bfloat16), [NORM, "NaN or infinite"]),
    "infinite-f16": (not_finite(np.inf, np.float16), [NORM, "NaN or infinite"]),
    "no-file": (lambda d: (d / "model.safetensors").unlink(), ["missing: model.safetensors", "fetch"]),
    "missing-shards": (
        write_index('{"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}'),
        ["missing: x.safetensors, y.safetensors", "fetch"],
    ),
    "index-not-json": (write_index("{"), ["model.safetensors.index.json is not valid JSON", "fetch the file again"]),
    "index-without-map": (write_index("{}"), ["model.safetensors.index.json", "weight_map"]),
    "index-a-list": (write_index('{"weight_map": ["x"]}'), ["model.safetensors.index.json", "weight_map"]),
    "index-leads-outside": (write_index('{"weight_map": {"a": "../x"}}'), ["index.json", "outside the directory"]),
}


@pytest.mark.parametrize(("spoil", "named"), WEIGHT_FAULTS.values(), ids=WEIGHT_FAULTS.keys())
def test_weight_faults_are_named(checkpoint, spoil, named):
    spoil(checkpoint)
    with pytest.raises(CheckpointError) as caught:
        load_model(checkpoint)
    for words in (str(checkpoint), *named):
        assert words in str(caught.value)


EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def tied(tiny_config, tiny_params, tmp_path):
    """A good checkpoint whose head is its embedding, and the embedding."""
    decoder = {name: value for name, value in tiny_params["decoder"].items() if name != "head"}
    config = dataclasses.replace(tiny_config, tie_word_embeddings=True)
    save_params(tmp_path / "tied", tiny_params | {"decoder": decoder}, config)
    return tmp_path / "tied", load_file(tmp_path / "tied" / "model.safetensors")[EMBEDDING]


@pytest.mark.parametrize("changes", [{}, {EMBEDDING: None}], ids=["both", "the head alone"])
def test_a_tied_checkpoint_may_store_its_head(tied, changes):
    directory, embedding = tied
    before = load_model(directory)
    edit(directory, **{HEAD: embedding} | changes)
    after = load_model(directory)
    assert after.fingerprint == before.fingerprint and same(after.params, before.params)


def test_a_tied_checkpoint_with_another_head_is_refused(tied):
    directory, embedding = tied
    for head, named in (
        (
            embedding + np.eye(*embedding.shape, dtype=np.float32) * 1e-6,
            "says tie_word_embeddings true; set it to false",
        ),
        (embedding[:-1], r"lm_head\.weight in model\.safetensors has shape \(60, 16\), expected \(61, 16\)"),
    ):
        edit(directory, **{HEAD: np.ascontiguousarray(head)})
        with pytest.raises(CheckpointError, match=named) as caught:
            load_model(directory)
        assert str(caught.value).count("\n") == 1  # one fault


def test_of_a_checkpoint_without_a_head_the_field_is_named_that_would_tie_it(checkpoint):
    edit(checkpoint, **{HEAD: None})
    with pytest.raises(
        CheckpointError, match=r"missing lm_head\.weight \(if the head shares the embedding's weights, set tie_word_emb"
    ):
        load_model(checkpoint)


@pytest.mark.parametrize(
    ("field", "named"),
    [
        ({"num_hidden_layers": 9_000}, "says num_hidden_layers 9000, the weight files hold 2 layers"),
        ({"num_local_experts": 90_000}, r"says 90000 experts per layer, but .*gate\.weight in model\.s.* has 4;"),
    ],
)
def test_a_config_of_more_than_there_is_costs_no_time(checkpoint, field, named):
    """A ledger with that many tensors would take hours."""
    edit_config(checkpoint, **field)
    with pytest.raises(CheckpointError, match=named):
        load_model(checkpoint)


def test_damage_is_not_blamed_on_the_config(checkpoint, monkeypatch):
    """The header names another layer and fewer experts, which the checksum tells from another config."""
    path, read = checkpoint / "model.safetensors", []
    content = path.read_bytes()
    for good, bad in ((b"model.layers.1.", b"model.layers.0."), (b'"shape":[4,16]', b'"shape":[2,32]')):
        assert content.count(good)
        path.write_bytes(content.replace(good, bad, 1))
        with pytest.raises(CheckpointError, match=r"model\.safetensors: was damaged or edited") as caught:
            load_model(checkpoint)
        assert "config.json" not in str(caught.value)
    path.write_bytes(content)
    verify = checksums.verify
    monkeypatch.setattr(
        checksums, "verify", lambda file, *given, **named: read.append(file) or verify(file, *given, **named)
    )
    load_params(checkpoint, read_config(checkpoint / "config.json"))
    assert read == [path]  # once: it takes as long as reading the weights


def stack(directory) -> None:
    """Store the experts of layer 0 as transformers 5 does."""
    of = "model.layers.0.block_sparse_moe.experts.{}.{}.weight"
    tensors = load_file(directory / "model.safetensors")
    w1, w2, w3 = (np.stack([tensors[of.format(i, name)] for i in range(4)]) for name in ("w1", "w2", "w3"))
    stacked = {"gate_up_proj": np.concatenate([w1, w3], axis=1), "down_proj": w2}
    single = dict.fromkeys(of.format(i, name) for i in range(4) for name in ("w1", "w2", "w3"))
    edit(directory, **{f"model.layers.0.mlp.experts.{name}": value for name, value in stacked.items()} | single)


def test_layouts_may_differ_from_layer_to_layer_but_nothing_may_be_there_twice(checkpoint, tiny_config):
    before = load_params(checkpoint, tiny_config)
    expert = load_file(checkpoint / "model.safetensors")["model.layers.0.block_sparse_moe.experts.2.w3.weight"]
    stack(checkpoint)
    after = load_params(checkpoint, tiny_config)
    assert after[1] == before[1] and same(after[0], before[0])
    edit(checkpoint, **{"model.layers.0.block_sparse_moe.experts.2.w3.weight": expert})
    with pytest.raises(CheckpointError, match=r"experts\.2\.w3\.weight is in model\.safetensors and again in model"):
        load_params(checkpoint, tiny_config)
    edit(checkpoint, **{"model.layers.0.mlp.experts.gate_up_proj": np.ones((4, 24, 16), np.float32)})
    with pytest.raises(CheckpointError, match=r"gate_up_proj in .* has shape \(4, 24, 16\), expected \(4, 48, 16\)"):
        load_params(checkpoint, tiny_config)


CONFIG_FAULTS = {
    "architecture": ({"model_type": "llama"}, ["model_type is 'llama'", "'mixtral'"]),
    "missing-fields": ({"vocab_size": None, "num_local_experts": None}, ["vocab_size, num_local_experts", "add them"]),
    "partial-rope": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        ["partial_rotary_factor is 0.5"],
    ),
    "activation": ({"hidden_act": "gelu"}, ["hidden_act is 'gelu'", "'silu'"]),
    "more-chosen-than-there": ({"num_experts_per_tok": 9}, ["num_experts_per_tok is 9", "num_local_experts is 4"]),
    "heads": ({"num_key_value_heads": 3}, ["num_key_value_heads is 3", "divisor", "num_attention_heads 4"]),
    "odd-head": ({"head_dim": 5}, ["head_dim is 5", "even"]),
    "several": (
        {"hidden_size": 0, "sliding_window": "all", "rms_norm_eps": -1.0, "rope_parameters": {"rope_theta": "big"}},
        ["hidden_size is 0", "sliding_window is 'all'", "rms_norm_eps is -1.0", "rope_theta is 'big'", "restore"],
    ),
}


@pytest.mark.parametrize(("changes", "named"), CONFIG_FAULTS.values(), ids=CONFIG_FAULTS.keys())
def test_config_faults_are_named(checkpoint, changes, named):
    edit_config(checkpoint, **changes)
    with pytest.raises(ConfigError) as caught:
        load_model(checkpoint)
    for words in (str(checkpoint / "config.json"), *named):
        assert words in str(caught.value)


QWEN3_MOE = {"model_type": "qwen3_moe", "moe_intermediate_size": 24, "num_experts": 4, "num_hidden_layers": 3}
FAMILY_FAULTS = {
    "window-of-no-meaning": (
        {"model_type": "olmoe", "num_experts": 4, "sliding_window": 8},
        ["sliding_window is 8", "only None"],
    ),
    "dense-size": (
        QWEN3_MOE | {"mlp_only_layers": [0], "intermediate_size": None},
        ["intermediate_size is missing", "1 layers without"],
    ),
    "no-experts": (QWEN3_MOE | {"mlp_only_layers": [0, 1, 2]}, ["none of the 3 layers has experts"]),
    "missing": ({"model_type": "qwen3_moe"}, ["moe_intermediate_size", "add them"]),
}


@pytest.mark.parametrize(("changes", "named"), FAMILY_FAULTS.values(), ids=FAMILY_FAULTS.keys())
def test_config_faults_of_other_families_are_named(checkpoint, changes, named):
    test_config_faults_are_named(checkpoint, changes, named)


@pytest.mark.parametrize(
    "field", [{"clip_qkv": 1.0}, {"normalize_top_k": False}, {"dense_layers": (2,), "dense_size": 8}]
)
def test_what_a_format_cannot_say_is_not_saved_in_it(tiny_config, tiny_params, tmp_path, field):
    with pytest.raises(ValueError, match="the mixtral format"):
        save_params(tmp_path, tiny_params, dataclasses.replace(tiny_config, **field))
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_of_another_model_is_refused(checkpoint):
    save_tokenizer(train_bpe(["some text"], vocab_size=300), checkpoint)
    with pytest.raises(CheckpointError, match=r"tokenizer has \d+ entries but config\.json says vocab_size 61"):
        load_model(checkpoint)


def test_a_padding_token_beyond_the_embeddings_is_refused_only_where_it_is_used(model_directory, tmp_path):
    shutil.copytree(model_directory, tmp_path, dirs_exist_ok=True)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert (model.config.vocab_size, model.tokenizer.pad_token_id) == (300, 300)

    texts = model.tokenizer(["the router", "the router finds a table"], padding=True, padding_side="left")
    assert texts.input_ids[0][0] == 300
    together, _ = model.generate(texts.input_ids, 5, attention_mask=texts.attention_mask)
    alone, _ = model.generate([model.tokenizer("the router").input_ids], 5)
    np.testing.assert_array_equal(together[0, -alone.shape[1] :], alone[0])
    np.testing.assert_array_equal(together[:, : len(texts.input_ids[0])], texts.input_ids)
    switched_off = VARModel(model, VARConfig(enable_var=False))
    tokens, _ = switched_off.generate(texts.input_ids, None, 5, attention_mask=texts.attention_mask)
    np.testing.assert_array_equal(tokens, together)

    used = model.tokenizer("the [PAD] router").input_ids
    with pytest.raises(InputError, match="to 300; expected ids from 0 to 299"):
        model([used])
    with pytest.raises(InputError, match="gives id 300 but the model's vocab_size is 300"):
        encode([Document("the [PAD] router", "")], model.tokenizer, model.config)


@pytest.mark.parametrize("name", ["/nowhere", "no-such-directory", "a/b/c"])
def test_what_is_neither_directory_nor_hub_id_is_refused(name):
    with pytest.raises(FileNotFoundError, match=r"neither a directory nor a hub id \(owner/name\)"):
        load_model(name)


def test_a_hub_id_out_of_reach_is_named():
    with pytest.raises(FileNotFoundError, match=r"no-such-owner/no-such-model is not a local directory and could not"):
        load_model("no-such-owner/no-such-model")


@pytest.mark.parametrize(("option", "choices"), [({"dtype": "int8"}, "bfloat16"), ({"implementation": "x"}, "blocks")])
def test_an_unknown_option_is_answered_with_the_choices(checkpoint, option, choices):
    with pytest.raises(ValueError, match=choices):
        load_model(checkpoint, **option)


@pytest.mark.parametrize(
    ("named", "asked", "loaded"),
    [
        ({"dtype": "bfloat16"}, None, "bfloat16"),
        ({"torch_dtype": "bfloat16"}, None, "bfloat16"),
        ({"dtype": None, "torch_dtype": "bfloat16"}, None, "bfloat16"),
        ({"dtype": "float32"}, None, "float32"),
        ({"dtype": "float16"}, None, "float32"),  # bfloat16 would round its numbers
        ({}, None, "float32"),
        ({"dtype": "bfloat16"}, "float32", "float32"),
    ],
)
def test_parameters_have_the_dtype_that_the_checkpoint_names(checkpoint, named, asked, loaded):
    path = checkpoint / "config.json"
    fields = {name: value for name, value in json.loads(path.read_text()).items() if "dtype" not in name}
    path.write_text(json.dumps(fields | named))
    assert load_model(checkpoint, asked).dtype == loaded


def test_a_saved_checkpoint_names_the_dtype_of_its_parameters(tiny_params, tiny_config, tmp_path):
    """Whatever the dtype of the file: the reference model computes in float32 and takes half of that on disk."""
    save_params(tmp_path, tiny_params, tiny_config, dtype="bfloat16")
    assert load_model(tmp_path).dtype == "float32"
    assert load_model("reference").dtype == "float32"


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "gigabytes", "sizes", "advice"),
    [
        (
            "bfloat16",
            80,
            "93.4 GB on each device in bfloat16.*80.0 GB",
            r"2 devices with mesh model=2 \(46.7 GB on each\)",
        ),
        ("float32", 100, "186.8 GB.*100.0 GB", r"dtype bfloat16 \(93.4 GB\) or 2 devices with mesh model=2 \(93.4 GB"),
        ("bfloat16", 2, "93.4 GB.*2.0 GB", "a device with more memory"),
    ],
)
def test_the_error_for_a_small_device_names_what_fits(dtype, gigabytes, sizes, advice):
    with pytest.raises(InputError, match=f"{sizes}; what fits: {advice}"):
        check_memory(PUBLISHED["mixtral-8x7b"], dtype, ONE_DEVICE, gigabytes * 10**9)
    check_memory(PUBLISHED["mixtral-8x7b"], dtype, ONE_DEVICE, 187 * 10**9)


def test_a_model_that_is_too_large_is_refused_before_its_weights_are_read(checkpoint, monkeypatch):
    monkeypatch.setattr("models.weights._to_device", None)  # what every tensor goes through
    monkeypatch.setattr("models.weights.device_bytes", lambda device: 10**4)
    with pytest.raises(InputError, match=r"the parameters take .* but the smallest device has 0\.0 GB; what fits: "):
        load_model(checkpoint)


def test_the_bytes_of_the_parameters_are_those_that_are_loaded(checkpoint):
    for dtype in ("float32", "bfloat16"):
        model = load_model(checkpoint, dtype)
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
        assert parameter_bytes(model.config, dtype, ONE_DEVICE) == held <= device_bytes(jax.devices()[0])


_PEAK = textwrap.dedent("""
    import sys
    from pathlib import Path
    import jax, jax.numpy as jnp
    from models.config import read_config
    from models.weights import load_params

    def kilobytes(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(field)).split()[1])

    def load(directory, dtype):
        return load_params(Path(directory), read_config(Path(directory) / "config.json"), jnp.dtype(dtype))[0]

    for dtype in ("bfloat16", "float32"):
        load(sys.argv[1], dtype)  # what the runtime takes for itself belongs to the baseline
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = kilobytes("VmRSS")
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(load(sys.argv[2], dtype)))
        print((kilobytes("VmHWM") - before) * 1024 / size)
""")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_takes_at_most_1_4_times_the_parameters_of_host_memory(checkpoint, tiny_config, tmp_path):
    sizes = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 2048, "head_dim": 128, "num_experts": 16}
    config = dataclasses.replace(tiny_config, **sizes)
    tensors = {name: np.full(entry.shape, 0.5, jnp.bfloat16) for name, entry in ledger(config).items()}
    assert 200e6 < sum(tensor.nbytes for tensor in tensors.values()) < 300e6
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config, "bfloat16")))
    command = [sys.executable, "-c", _PEAK, checkpoint, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert max(map(float, done.stdout.split())) <= 1.4
