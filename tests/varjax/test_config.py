"""Round trips, inheritance, presets, and errors that name the field, the value and what is allowed."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from varjax.config import PRESETS, LayerPolicy, VARConfig
from varjax.tablefiles import TableFiles, named_files

numbers = st.floats(0.001, 1e6, allow_nan=False)
shares = st.floats(0.001, 1.0)
orders = st.lists(st.integers(0, 4), min_size=1, max_size=4).map(tuple)


@st.composite
def policies(draw) -> LayerPolicy:
    residual = draw(st.booleans())
    looked_at, tolerance = draw(orders), draw(st.none() | numbers) if residual else None
    return LayerPolicy(
        experts_kept=draw(st.integers(0, 8) if 0 in looked_at and tolerance is None else st.none() | st.integers(0, 8)),
        use_answers=residual,
        ngram_orders=looked_at,
        choice_from=draw(st.sampled_from(["gate", "table"])),
        weights_from=draw(st.sampled_from(["gate", "table"])),
        gate_ratio=draw(st.none() | shares),
        gate_mass=draw(st.none() | shares),
        tolerance=tolerance,
        renormalize=draw(st.booleans()) and not residual,
        frequency_threshold=draw(st.none() | st.integers(1, 500)),
        entropy_threshold=draw(st.none() | numbers),
    )


configs = st.builds(
    VARConfig,
    frequency_threshold=st.integers(1, 500),
    entropy_threshold=numbers,
    confidence_threshold=shares,
    cache_size=st.integers(0, 5000),
    cache_ttl_seconds=numbers,
    context_window_size=st.integers(1, 8),
    enable_var=st.booleans(),
    mass_threshold=shares,
    answer_shrinkage=numbers,
    answer_dtype=st.sampled_from(["float32", "bfloat16", "int8"]),
    default=st.none() | policies(),
    layers=st.dictionaries(st.integers(0, 47), st.none() | policies(), max_size=4),
    cache_layers=st.none() | st.lists(st.integers(0, 47), max_size=4).map(tuple),
)


@given(configs)
def test_json_round_trip(config):
    again = VARConfig.from_json(config.to_json())
    assert again == config
    assert hash(again) == hash(config)
    assert again.to_json() == config.to_json()


def test_save_and_load_leave_one_file(tmp_path):
    config = VARConfig.preset("aggressive", layers={3: LayerPolicy(experts_kept=0), 1: None})
    config.save(tmp_path / "runs" / "config.json")
    assert VARConfig.load(tmp_path / "runs" / "config.json") == config
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["config.json"]


def test_layers_inherit_thresholds_and_may_stay_open():
    config = VARConfig(
        frequency_threshold=7, entropy_threshold=0.2, layers={2: LayerPolicy(frequency_threshold=9), 0: None}
    )
    assert config.policy(0) is None
    assert (config.policy(1).frequency_threshold, config.policy(1).entropy_threshold) == (7, 0.2)
    assert (config.policy(2).frequency_threshold, config.policy(2).entropy_threshold) == (9, 0.2)


def test_the_cache_serves_listed_layers_that_are_not_left_open():
    config = VARConfig(layers={0: None}, cache_layers=(0, 2))
    assert [config.caches(layer) for layer in range(4)] == [False, False, True, False]
    assert [VARConfig(layers={0: None}).caches(layer) for layer in range(2)] == [False, True]
    assert not VARConfig(cache_size=0).caches(0)


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    config = VARConfig.preset(name, cache_size=10)
    assert config.cache_size == 10
    assert (config.frequency_threshold, config.entropy_threshold, config.confidence_threshold) == {
        "conservative": (100, 0.3, 0.9),
        "balanced": (50, 0.5, 0.8),
        "aggressive": (25, 0.7, 0.7),
    }[name]
    assert VARConfig() == VARConfig.preset("balanced")


def test_numpy_numbers_are_taken_and_stored_plainly():
    config = VARConfig(cache_size=np.int64(5), entropy_threshold=np.float32(0.5), frequency_threshold=np.int32(3))
    assert VARConfig.from_json(config.to_json()) == config
    assert (type(config.cache_size), type(config.entropy_threshold)) == (int, float)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("frequency_threshold", 0, "integer of at least 1"),
        ("frequency_threshold", 50.0, "integer of at least 1"),
        ("entropy_threshold", -0.1, "finite number of at least 0"),
        ("entropy_threshold", float("nan"), "finite number"),
        ("confidence_threshold", 1.5, "at least 0 and at most 1"),
        ("cache_size", True, "integer of at least 0"),
        ("cache_ttl_seconds", float("inf"), "finite number"),
        ("context_window_size", "4", "integer of at least 1"),
        ("enable_var", 1, "True or False"),
        ("mass_threshold", 0.0, "above 0 and at most 1"),
        ("answer_dtype", "float16", "'float32' or 'bfloat16' or 'int8'"),
        ("default", {}, "a LayerPolicy or None"),
        ("layers", {"0": None}, "layer numbers"),
        ("layers", ((0, None), (0, None)), "each once"),
        ("layers", 5, "layer numbers"),
        ("cache_layers", (-1,), "tuple of integers of at least 0 or None"),
    ],
)
def test_a_bad_field_is_named_with_its_value_and_range(field, value, expected):
    with pytest.raises(ValueError) as error:
        VARConfig(**{field: value})
    assert f"{field}={value!r}" in str(error.value)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"experts_kept": -1}, "experts_kept=-1"),
        (
            {"experts_kept": None, "ngram_orders": (0, 1)},
            "experts_kept=None: expected an integer, or a tolerance, with order 0",
        ),
        ({"renormalize": True}, "renormalize=True"),
        ({"ngram_orders": ()}, "ngram_orders=()"),
        ({"ngram_orders": (-1,)}, "ngram_orders=(-1,)"),
        ({"choice_from": "cache"}, "choice_from='cache'"),
        ({"weights_from": "cache"}, "weights_from='cache'"),
        ({"gate_ratio": 0.0}, "gate_ratio=0.0"),
        ({"gate_mass": 0.0}, "gate_mass=0.0"),
        ({"gate_mass": 1.5}, "gate_mass=1.5"),
        ({"tolerance": 0.0}, "tolerance=0.0"),
        ({"tolerance": 0.1, "use_answers": False}, "tolerance=0.1: expected None with use_answers=False"),
    ],
)
def test_a_bad_policy_is_refused(fields, named):
    with pytest.raises(ValueError, match="LayerPolicy: ") as error:
        LayerPolicy(**fields)
    assert named in str(error.value)


def test_kept_may_stay_open():
    assert LayerPolicy(experts_kept=None).experts_kept is None  # as many as reach the mass threshold
    assert LayerPolicy(experts_kept=None, tolerance=0.1, ngram_orders=[0]).ngram_orders == (0,)


def test_all_faults_come_in_one_error():
    with pytest.raises(ValueError) as error:
        VARConfig(cache_size=-1, mass_threshold=2.0, enable_var="yes")
    assert all(name in str(error.value) for name in ("cache_size", "mass_threshold", "enable_var"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"cache_sise": 5}', "did you mean 'cache_size'"),
        (
            '{"layers": {"2": {"keep": 1}}}',
            r"layers\[2\]: LayerPolicy has no field 'keep'; did you mean 'experts_kept'",
        ),
        ('{"layers": {"two": null}}', "layer numbers"),
        ('{"default": 5}', "default: expected an object"),
        ("[]", "JSON object"),
        ("{", "not valid JSON"),
    ],
)
def test_bad_json_is_explained_and_the_file_named(tmp_path, text, expected):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=expected) as error:
        VARConfig.load(path)
    assert str(path) in str(error.value)


def test_unknown_override_and_preset():
    with pytest.raises(ValueError, match="did you mean 'cache_size'"):
        VARConfig.preset("balanced", cachesize=5)
    with pytest.raises(ValueError, match="conservative, balanced, aggressive"):
        VARConfig.preset("bold")


def test_every_field_is_in_the_json():
    assert set(json.loads(VARConfig().to_json())) == {f.name for f in dataclasses.fields(VARConfig)}


def test_the_digest_tells_settings_and_tables_apart():
    config, other = VARConfig(), VARConfig(default=LayerPolicy(experts_kept=0))
    assert config.digest() == VARConfig().digest()
    assert len({config.digest(), other.digest(), config.digest("table"), config.digest("other table")}) == 4


def test_the_fields_of_earlier_versions_are_read():
    old = {
        "default": {"kept": 0, "residual": True, "orders": [1, 2], "renormalise": False},
        "layers": {"1": {"kept": 2, "residual": False}},
        "residual_shrinkage": 3.0,
        "routing_stats": "stats.parquet",
        "residuals": "stats.residuals.safetensors",
        "max_quality_degradation": 0.01,
    }
    assert VARConfig.from_json(json.dumps(old)) == VARConfig(
        default=LayerPolicy(experts_kept=0, ngram_orders=(1, 2)),
        layers={1: LayerPolicy(experts_kept=2, use_answers=False)},
        answer_shrinkage=3.0,
    )
    assert named_files(old) == TableFiles("stats.parquet", "stats.residuals.safetensors")


def test_a_limit_of_an_earlier_version_is_not_lost_in_silence():
    with pytest.warns(UserWarning, match=r"max_quality_degradation=0\.002 is no setting any more .* \(--limit\)"):
        assert VARConfig.from_json('{"cache_size": 7, "max_quality_degradation": 0.002}') == VARConfig(cache_size=7)


def test_a_field_under_its_old_name_is_read_only_where_nothing_contradicts_it():
    with pytest.raises(ValueError, match="default: LayerPolicy: 'kept' is the former name of 'experts_kept'; remove"):
        VARConfig.from_json('{"default": {"kept": 0, "experts_kept": 1}}')
    with pytest.raises(ValueError, match="VARConfig has no field 'kept'"):  # as it is called in the file
        VARConfig.from_json('{"kept": 0}')
    with pytest.raises(ValueError, match="layers\\[1\\]: LayerPolicy has no field 'routing_stats'"):
        VARConfig.from_json('{"layers": {"1": {"routing_stats": "stats.parquet"}}}')


def test_a_setting_that_was_removed_or_renamed_says_what_takes_its_place():
    with pytest.raises(ValueError, match=r"no field 'routing_stats'; pass the file to varjax\.load_table"):
        VARConfig.preset("balanced", routing_stats="stats.parquet")
    with pytest.raises(ValueError, match="no field 'residual_shrinkage'; did you mean 'answer_shrinkage'"):
        VARConfig.preset("balanced", residual_shrinkage=1.0)


def test_a_config_that_was_saved_is_verified_and_one_by_hand_is_not(tmp_path):
    path = tmp_path / "config.json"
    VARConfig(cache_size=7).save(path)
    assert VARConfig.load(path) == VARConfig(cache_size=7) == VARConfig.from_json(path.read_text())
    path.write_text(json.dumps(json.loads(path.read_text())))  # another form of the same is no damage
    assert VARConfig.load(path) == VARConfig(cache_size=7)
    edited = path.read_text().replace('"cache_size": 7', '"cache_size": 8')
    path.write_text(edited)
    with pytest.raises(ValueError, match=r'config\.json: it was damaged or edited .* remove its field "checksum"'):
        VARConfig.load(path)
    path.write_text(json.dumps({name: value for name, value in json.loads(edited).items() if name != "checksum"}))
    assert VARConfig.load(path) == VARConfig(cache_size=8)
    path.write_text('{"cache_size": 9}')
    assert VARConfig.load(path) == VARConfig(cache_size=9)
