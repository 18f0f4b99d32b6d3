"""JSON files of a checkpoint that are wrong, contradictory or damaged: one error of ours, with file and field."""

import itertools
import json
import math
import shutil

import numpy as np
import pytest

from models import CheckpointError, ConfigError
from models.config import config_from_hf, config_to_hf, read_config
from models.download import RECORD, RemoteFile, _read_record
from models.families import COMMON_FIELDS, FAMILIES
from models.generation import GenerationDefaults, Sampling, generation_to_hf, read_generation
from models.tokenizer import load_tokenizer
from models.weights import INDEX_FILE, _tensor_files
from tests.damage import damaged
from varjax import checksums
from varjax.errors import InputError

# --- one type per field ----------------------------------------------------------------------------------------------

TOO_LARGE = 10**400
NO_NUMBERS = ["x", [1], {"a": 1}, True, math.nan, math.inf, TOO_LARGE]
NO_INTEGERS = [*NO_NUMBERS, 1.5, 2**31]
NO_SIZES = [*NO_INTEGERS, 0, -1]
NO_IDS = [*NO_INTEGERS, "2"]
WRONG = {
    **dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"), NO_SIZES),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "num_experts_per_tok"), NO_SIZES),
    "max_position_embeddings": [*NO_SIZES, None],
    "rms_norm_eps": [*NO_NUMBERS, None, 0, -1e-5],
    "rope_theta": [*NO_NUMBERS, 0, -1.0],
    "tie_word_embeddings": ["true", 1, None, []],
    "initializer_range": [*NO_NUMBERS, None, -0.1],
    "router_aux_loss_coef": [*NO_NUMBERS, None, -0.1],
    "bos_token_id": NO_IDS,
    "eos_token_id": [value for value in NO_IDS if value != [1]] + [[2, "3"], [2, None], [[2]]],
    "pad_token_id": NO_IDS,
}
WRONG_OF = {
    "mixtral": {"intermediate_size": NO_SIZES, "num_local_experts": NO_SIZES, "sliding_window": NO_SIZES},
    "olmoe": {
        "num_experts": NO_SIZES,
        "clip_qkv": [*NO_NUMBERS, 0, -1],
        "norm_topk_prob": ["yes", 1, None],
        "attention_bias": ["yes", 1, None],
    },
    "qwen3_moe": {
        "moe_intermediate_size": NO_SIZES,
        "norm_topk_prob": ["yes", 0, None],
        "attention_bias": ["yes", 1, None],
        "use_sliding_window": ["false", 1],
        "mlp_only_layers": [1, "0", [True], [1.5], [None]],
        "decoder_sparse_step": [*NO_SIZES, None],
    },
}


@pytest.fixture(scope="module")
def fields_of(tiny_config):
    """Family -> the fields of a good config.json."""
    shared = {ours: getattr(tiny_config, ours) for ours in ("vocab_size", "hidden_size", "head_dim")}
    good = config_to_hf(tiny_config, "float32")
    more = {"qwen3_moe": {"moe_intermediate_size": 24, "norm_topk_prob": True, "num_experts": 4}}
    others = {name: good | {"model_type": name, "num_experts": 4} | more.get(name, {}) for name in FAMILIES}
    assert all(shared.items() <= fields.items() for fields in others.values())
    return others | {"mixtral": good}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_value_of_a_wrong_type_is_named_with_its_field(fields_of, family):
    good, wrong = fields_of[family], WRONG | WRONG_OF[family]
    read = {*COMMON_FIELDS.values(), *FAMILIES[family].fields.values()} - {"num_experts", "num_local_experts"}
    assert read <= wrong.keys() | {"intermediate_size", "sliding_window"}  # none was forgotten
    for field, values in wrong.items():
        for value in values:
            with pytest.raises(ConfigError) as caught:
                config_from_hf(good | {field: value}, source="folder/config.json")
            assert "folder/config.json: " in str(caught.value) and field in str(caught.value), (field, value)
            assert len(str(caught.value)) < 400


ODD = [None, True, "", "x", [], ["mixtral"], {}, {"rope_theta": [1]}, -1, 0, 1.5, math.nan, -math.inf, TOO_LARGE]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_value_of_any_field_raises_another_error(fields_of, family):
    good = fields_of[family]
    unread = ("rope_scaling", "quantization_config", "compression_config", "partial_rotary_factor", "layer_types")
    for field, value in itertools.product([*good, *unread], ODD):
        fields = good | {field: value}
        try:
            assert config_from_hf(fields).vocab_size > 0
        except ConfigError:
            continue


def test_an_architecture_that_would_never_load_is_refused(fields_of):
    with pytest.raises(ConfigError, match="num_hidden_layers is 10001, expected a positive integer up to 10,000"):
        config_from_hf(fields_of["mixtral"] | {"num_hidden_layers": 10_001})
    with pytest.raises(ConfigError, match="expected at most 200,000 experts in all layers together"):
        config_from_hf(fields_of["mixtral"] | {"num_hidden_layers": 1000, "num_local_experts": 1000})


@pytest.mark.parametrize("method", ["fp8", "gptq", "mxfp4"])
def test_of_a_quantized_checkpoint_the_method_is_said_and_what_to_do(fields_of, method):
    quantized = {"modules_to_not_convert": [f"model.layers.{i}.mlp.gate" for i in range(200)], "quant_method": method}
    with pytest.raises(ConfigError) as caught:
        config_from_hf(fields_of["mixtral"] | {"quantization_config": quantized})
    message = str(caught.value)
    assert f"quant_method '{method}'" in message and "use the checkpoint that this one was made from" in message
    assert len(message) < 250


# --- two sources of one fact -----------------------------------------------------------------------------------------


def test_rotary_settings_are_used_as_transformers_uses_them_or_refused(fields_of):
    """All combinations of the three fields that state them; what is accepted must be what transformers computes."""
    transformers = pytest.importorskip("transformers")
    rope = [
        None,
        {},
        {"rope_type": "default"},
        {"type": "default", "rope_theta": 5e5},
        {"rope_type": "default", "rope_theta": 1e4},
        {"type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ]
    good = {key: value for key, value in fields_of["mixtral"].items() if not key.startswith("rope")}
    accepted, refused = 0, 0
    for scaling, parameters, theta in itertools.product(rope, rope, [None, 5e5]):
        stated = {"rope_scaling": scaling, "rope_parameters": parameters, "rope_theta": theta}
        stated = {name: value for name, value in stated.items() if value is not None}
        try:
            ours = config_from_hf(good | stated).rope_theta
        except ConfigError:
            refused += 1
            continue
        theirs = transformers.MixtralConfig(**json.loads(json.dumps(stated))).rope_parameters
        assert (theirs["rope_type"], theirs["rope_theta"]) == ("default", ours), stated
        accepted += 1
    assert accepted > 15 and refused > 60


@pytest.mark.parametrize(
    ("stated", "named"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, r"in rope_scaling, rope_type is 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"in rope_scaling, rope_type is 'linear'"),
        ({"rope_theta": 5e5}, r"rope_parameters\.rope_theta is 10000\.0 and rope_theta is 500000\.0.*trained with$"),
        ({"rope_scaling": {"type": "default", "rope_theta": 3.0}}, r"rope_scaling\.rope_theta is 3\.0"),
        ({"rope_theta": None, "rope_scaling": {"type": "default"}, "rope_parameters": {"rope_theta": 5.0}}, "is 5.0"),
    ],
)
def test_contradictory_rotary_settings_are_refused(fields_of, stated, named):
    with pytest.raises(ConfigError, match=named):
        config_from_hf(fields_of["mixtral"] | stated)


def test_a_fault_is_told_once(fields_of):
    wrong = {"rope_theta": "x", "rope_parameters": None}
    with pytest.raises(ConfigError) as caught:
        config_from_hf(fields_of["mixtral"] | wrong)
    assert str(caught.value) == (
        "config.json: rope_theta is 'x', expected a positive number; restore the file that belongs to the weights"
    )


def test_a_null_share_of_rotated_dimensions_is_none_given(fields_of):
    null = {"partial_rotary_factor": None}
    rope = {"rope_parameters": fields_of["mixtral"]["rope_parameters"] | null}
    assert config_from_hf(fields_of["mixtral"] | null | rope) == config_from_hf(fields_of["mixtral"])
    with pytest.raises(ConfigError, match=r"partial_rotary_factor is 0\.5; only 1\.0 is supported"):
        config_from_hf(fields_of["mixtral"] | {"partial_rotary_factor": 0.5})


def test_numbers_may_be_written_as_integers(fields_of):
    """They are floats in what the fingerprint hashes."""
    written = {"clip_qkv": 8, "rope_theta": 10_000, "rms_norm_eps": 1, "initializer_range": 0}
    config = config_from_hf(fields_of["olmoe"] | written | {"rope_parameters": None})
    numbers = (config.clip_qkv, config.rope_theta, config.rms_norm_eps, config.initializer_range)
    assert repr(numbers) == "(8.0, 10000.0, 1.0, 0.0)"


@pytest.mark.parametrize("family", FAMILIES)
def test_two_names_of_the_number_of_experts_must_agree(fields_of, family):
    """transformers knows both in each of these families, and the one that it reads last wins."""
    good = fields_of[family] | {"num_experts": 4, "num_local_experts": 4}
    for name in ("num_experts", "num_local_experts"):
        assert config_from_hf({key: value for key, value in good.items() if key != name}).num_experts == 4
        with pytest.raises(ConfigError, match=r"num_\w*experts is \d and num_\w*experts is \d, which is another name"):
            config_from_hf(good | {name: 2})


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_is_what_transformers_takes(fields_of, family):
    transformers = pytest.importorskip("transformers")
    required = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    required += ("num_attention_heads", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size")
    fields = {name: fields_of[family][name] for name in required if name in fields_of[family]}
    fields["num_attention_heads"] = 8
    ours = config_from_hf(fields)
    theirs = transformers.AutoConfig.for_model(family, **{k: v for k, v in fields.items() if k != "model_type"})
    names = {**COMMON_FIELDS, **FAMILIES[family].fields}
    for field in ("max_position_embeddings", "rms_norm_eps", "router_aux_loss_coef", "initializer_range"):
        assert getattr(ours, field) == getattr(theirs, names[field]), field
    for field in ("num_kv_heads", "sliding_window", "tie_word_embeddings", "normalize_top_k", "attention_bias"):
        if field in names:
            assert getattr(ours, field) == getattr(theirs, names[field]), field
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (
        theirs.bos_token_id,
        theirs.eos_token_id,
        theirs.pad_token_id,
    )


# --- generation_config.json ------------------------------------------------------------------------------------------

GENERATION = {
    "bos_token_id": 1,
    "eos_token_id": [2, 9],
    "pad_token_id": 0,
    "do_sample": True,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "repetition_penalty": 1.05,
    "min_length": 0,
}


ON_HUB = {"name": "a.safetensors", "size": 7, "sha256": "ab" * 32, "git_sha1": None}


@pytest.fixture
def folder(fields_of, model_directory, tmp_path):
    """A checkpoint's JSON files, without weights that anybody reads."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_directory / name, tmp_path)
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for name in shards:
        (tmp_path / name).write_bytes(b"")
    weight_map = {f"model.layers.{i}.weight": shards[i % 3] for i in range(9)}
    for name, content in {
        "config.json": fields_of["mixtral"],
        "generation_config.json": GENERATION,
        INDEX_FILE: {"metadata": {"total_size": 99}, "weight_map": weight_map},
    }.items():
        (tmp_path / name).write_text(json.dumps(content, indent=2))
    checksums.write_json(
        tmp_path / RECORD, {"repo": "a/b", "commit": "0" * 40, "files": [ON_HUB | {"name": shards[0]}]}
    )
    return tmp_path


def generation_of(folder) -> GenerationDefaults:
    return read_generation(folder, read_config(folder / "config.json"))


def test_generation_config_is_read_with_its_sampling(folder):
    found = generation_of(folder)
    expected = GenerationDefaults(1, (2, 9), 0, Sampling(0.6, 20, 0.95), ("repetition_penalty",))
    assert found == expected and found.token_ids == {0, 1, 2, 9}


@pytest.mark.parametrize(
    ("fields", "sampling"),
    [
        ({"temperature": 0.5, "top_k": 5}, Sampling()),  # nobody asked for sampling
        ({"do_sample": True}, Sampling(1.0, 50, None)),  # transformers' top_k where the file names none
        ({"do_sample": True, "top_k": 0, "top_p": None}, Sampling(1.0, None, None)),
        ({"do_sample": True, "top_k": -1}, Sampling(1.0, None, None)),
        ({"do_sample": True, "temperature": 0.0, "top_k": 5}, Sampling()),
        ({"do_sample": False, "temperature": 0}, Sampling()),
        ({"eos_token_id": -1, "bos_token_id": -1, "pad_token_id": -1}, Sampling()),
    ],
)
def test_sampling_has_transformers_defaults(folder, fields, sampling):
    (folder / "generation_config.json").write_text(json.dumps(fields))
    assert generation_of(folder) == GenerationDefaults(None, (), None, sampling)


def test_a_recommendation_out_of_range_is_listed_and_not_followed(folder):
    written = {"do_sample": True, "temperature": -0.5, "top_p": 1.5, "eos_token_id": [-1, 4], "min_p": 0.1}
    (folder / "generation_config.json").write_text(json.dumps(written))
    found = generation_of(folder)
    assert found == GenerationDefaults(None, (4,), None, Sampling(1.0, 50, None), ("temperature", "top_p", "min_p"))


@pytest.mark.parametrize(
    "found",
    [
        GenerationDefaults(1, (2, 9), 0),
        GenerationDefaults(None, (), None, Sampling(0.6, 20, 0.95)),
        GenerationDefaults(None, (7,), None, Sampling(1.0)),
    ],
)
def test_what_is_written_of_generation_is_read_again(folder, found):
    (folder / "generation_config.json").write_text(json.dumps(generation_to_hf(found)))
    assert generation_of(folder) == found


def test_without_generation_config_the_ids_are_those_of_config_json(folder, fields_of):
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text(json.dumps(fields_of["mixtral"] | {"eos_token_id": 7, "pad_token_id": -1}))
    assert generation_of(folder) == GenerationDefaults(1, (7,), None)


@pytest.mark.parametrize(
    ("family", "ids"),
    [("mixtral", (1, (2,), None)), ("olmoe", (None, (50279,), 1)), ("qwen3_moe", (None, (), None))],
)
def test_ids_that_no_file_names_are_those_of_the_family(folder, fields_of, family, ids):
    """As transformers takes them from the object that it makes of config.json."""
    transformers = pytest.importorskip("transformers")
    (folder / "generation_config.json").unlink()
    fields = {name: value for name, value in fields_of[family].items() if not name.endswith("token_id")}
    for change in ({}, {"eos_token_id": 7}, {"eos_token_id": None}, {"pad_token_id": 3, "do_sample": True}):
        (folder / "config.json").write_text(json.dumps(fields | change))
        theirs = transformers.GenerationConfig.from_model_config(transformers.AutoConfig.from_pretrained(folder))
        ours = generation_of(folder)
        assert (ours.begin_id, ours.pad_id) == (theirs.bos_token_id, theirs.pad_token_id)
        assert ours.end_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
        assert change or (ours.begin_id, ours.end_ids, ours.pad_id) == ids
        assert ours.sampling == (Sampling(1.0, 50) if "do_sample" in change else Sampling())


@pytest.mark.parametrize("written", [None, {}, {"eos_token_id": 5}, {"eos_token_id": [3, 4], "pad_token_id": 8}])
def test_the_ids_are_those_that_transformers_takes(folder, written):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    if written is None:
        (folder / "generation_config.json").unlink()
    else:
        (folder / "generation_config.json").write_text(json.dumps(written))
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.adjust_generation_fn(None, False, False, str(folder), None, False, None, True, None, None, "", False)
    theirs, ours = model.generation_config, generation_of(folder)
    ends = theirs.eos_token_id
    assert ours.end_ids == tuple(ends if isinstance(ends, list) else [] if ends is None else [ends])
    assert (ours.begin_id, ours.pad_id) == (theirs.bos_token_id, theirs.pad_token_id)


@pytest.mark.parametrize(
    "fields",
    [
        {"eos_token_id": "2"},
        {"eos_token_id": [2, 2.5]},
        {"bos_token_id": True},
        {"pad_token_id": [0]},
        {"temperature": "hot"},
        {"temperature": math.nan},
        {"top_k": 2.0},
        {"top_p": "0.9"},
        {"do_sample": "yes"},
    ],
)
def test_wrong_fields_of_generation_config_are_named(folder, fields):
    (folder / "generation_config.json").write_text(json.dumps(GENERATION | fields))
    with pytest.raises(ConfigError, match=rf"generation_config\.json: {next(iter(fields))} is .*, expected "):
        generation_of(folder)


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe{", b"[" * 100_000, b'{"vocab_size": ' + b"9" * 5000 + b"}", b"", b'{"a": "\x00"}', b"[1]"],
    ids=["not-utf-8", "too-deep", "too-many-digits", "empty", "control-character", "no-object"],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX_FILE, RECORD, "tokenizer_config.json"])
def test_what_is_no_json_object_is_named(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        READERS[name](folder)


def test_a_folder_in_the_place_of_a_file_is_named(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(ConfigError, match=r"config\.json cannot be read \(Is a directory\)"):
        read_config(folder / "config.json")


READERS = {
    "config.json": lambda folder: read_config(folder / "config.json"),
    "generation_config.json": generation_of,
    INDEX_FILE: _tensor_files,
    RECORD: _read_record,
    "tokenizer_config.json": lambda folder: load_tokenizer(folder)(["a text"]),
    "tokenizer.json": lambda folder: load_tokenizer(folder)(["a text"]),
}


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_an_error_that_names_it_or_is_read(folder, name):
    """300 kinds of damage; any exception but InputError fails the test. Many a flipped bit leaves a valid file."""
    good, rng, errors = (folder / name).read_bytes(), np.random.default_rng(0), 0
    for _ in range(300):
        (folder / name).write_bytes(damaged(good, rng, most=40))
        try:
            READERS[name](folder)
        except InputError as error:
            assert name in str(error)
            errors += 1
    assert errors > 100


@pytest.mark.parametrize("files", [None, {"0": ON_HUB}, ["a.safetensors"], [ON_HUB | {"etag": "ab"}], [{"size": 7}]])
def test_a_record_of_another_form_is_named(tmp_path, files):
    """The checksum is right, so only the form tells."""
    checksums.write_json(tmp_path / RECORD, {"repo": "a/b", "files": [ON_HUB]})
    assert _read_record(tmp_path) == (RemoteFile(**ON_HUB),)
    checksums.write_json(tmp_path / RECORD, {"repo": "a/b", "files": files})
    with pytest.raises(CheckpointError, match=rf"{RECORD} is damaged \(.*; delete it to verify without it"):
        _read_record(tmp_path)


# --- which files hold the weights ------------------------------------------------------------------------------------


def replace_weights(folder, *names) -> None:
    for path in folder.glob("*.safetensors"):
        path.unlink()
    for name in names:
        (folder / name).write_bytes(b"")


def test_shards_without_an_index_are_named(folder):
    (folder / INDEX_FILE).unlink()
    replace_weights(folder, *(f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)))
    with pytest.raises(CheckpointError) as caught:
        _tensor_files(folder)
    assert "there is model-00001-of-00005.safetensors, " in str(caught.value)
    assert f"model-00003-of-00005.safetensors and 2 more: if these are its shards, fetch {INDEX_FILE} too" in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)],
            "-00001-of-00002.safetensors, model-00002-of-00002.safetensors: ",
        ),
        (["model.safetensors"], "there is model.safetensors"),
        ([], "there is no weight file"),
    ],
)
def test_a_stale_index_is_named_with_what_is_there(folder, names, said):
    replace_weights(folder, *names)
    with pytest.raises(CheckpointError) as caught:
        _tensor_files(folder)
    assert said in str(caught.value) and "or the index if it belongs to another checkpoint" in str(caught.value)
    assert "missing: model-00001-of-00003.safetensors, model-00002-of-00003.safetensors, model-00003" in str(
        caught.value
    )


def test_an_index_next_to_a_single_file_of_another_checkpoint_is_refused(folder):
    """transformers reads the single file, the index says otherwise."""
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"and there is model\.safetensors too.*remove the one"):
        _tensor_files(folder)
