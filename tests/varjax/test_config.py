"""Round trips, inheritance, presets, and errors that name the field, the value and what is allowed."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from varjax import answersfile, statsfile
from varjax.answers import Answers
from varjax.config import PRESETS, LayerPolicy, VARConfig
from varjax.stats import RoutingStats

numbers = st.floats(0.001, 1e6, allow_nan=False)
shares = st.floats(0.001, 1.0)
orders = st.lists(st.integers(0, 4), min_size=1, max_size=4).map(tuple)


@st.composite
def policies(draw) -> LayerPolicy:
    residual = draw(st.booleans())
    looked_at, tolerance = draw(orders), draw(st.none() | numbers) if residual else None
    return LayerPolicy(
        experts_kept=draw(st.integers(0, 8) if 0 in looked_at and tolerance is None else st.none() | st.integers(0, 8)),
        residual=residual,
        orders=looked_at,
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
    routing_stats=st.none() | st.text(min_size=1),
    residuals=st.none() | st.text(min_size=1),
    enable_var=st.booleans(),
    max_quality_degradation=numbers,
    mass_threshold=shares,
    residual_shrinkage=numbers,
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
    config = VARConfig.aggressive(layers={3: LayerPolicy(experts_kept=0), 1: None})
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
    assert config == getattr(VARConfig, name)(cache_size=10)
    assert (config.frequency_threshold, config.entropy_threshold, config.confidence_threshold) == {
        "conservative": (100, 0.3, 0.9),
        "balanced": (50, 0.5, 0.8),
        "aggressive": (25, 0.7, 0.7),
    }[name]
    assert VARConfig() == VARConfig.balanced()


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
        ("routing_stats", 3, "a path or None"),
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
            {"experts_kept": None, "orders": (0, 1)},
            "experts_kept=None: expected an integer, or a tolerance, where orders hold 0",
        ),
        ({"renormalize": True}, "renormalize=True"),
        ({"orders": ()}, "orders=()"),
        ({"orders": (-1,)}, "orders=(-1,)"),
        ({"choice_from": "cache"}, "choice_from='cache'"),
        ({"weights_from": "cache"}, "weights_from='cache'"),
        ({"gate_ratio": 0.0}, "gate_ratio=0.0"),
        ({"gate_mass": 0.0}, "gate_mass=0.0"),
        ({"gate_mass": 1.5}, "gate_mass=1.5"),
        ({"tolerance": 0.0}, "tolerance=0.0"),
        ({"tolerance": 0.1, "residual": False}, "tolerance=0.1: expected None with residual=False"),
    ],
)
def test_a_bad_policy_is_refused(fields, named):
    with pytest.raises(ValueError, match="LayerPolicy: ") as error:
        LayerPolicy(**fields)
    assert named in str(error.value)


def test_kept_may_stay_open():
    assert LayerPolicy(experts_kept=None).experts_kept is None  # as many as reach the mass threshold
    assert LayerPolicy(experts_kept=None, tolerance=0.1, orders=[0]).orders == (0,)


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
            r"layers\[2\]: LayerPolicy has no field 'keep'; did you mean 'kept'",
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
        VARConfig.balanced(cachesize=5)
    with pytest.raises(ValueError, match="conservative, balanced, aggressive"):
        VARConfig.preset("bold")


def test_from_routing_stats_finds_the_residual_rows_beside_it(tmp_path):
    stats = tmp_path / "routing_stats.parquet"
    with pytest.raises(FileNotFoundError, match="collect routing statistics first"):
        VARConfig.from_routing_stats(stats)
    stats.write_bytes(b"not a table")
    with pytest.raises(ValueError, match="not a Parquet file"):
        VARConfig.from_routing_stats(stats)

    stats.write_bytes(b"PAR1....PAR1")
    without = VARConfig.from_routing_stats(stats, cache_size=3)
    assert (without.routing_stats, without.residuals, without.cache_size) == (str(stats), None, 3)
    assert without.default == LayerPolicy(experts_kept=None, residual=False)

    rows = tmp_path / "routing_stats.residuals.safetensors"
    rows.write_bytes(b"")
    with_rows = VARConfig.from_routing_stats(stats)
    assert with_rows.residuals == str(rows)
    assert with_rows.default == LayerPolicy()
    assert VARConfig.from_routing_stats(stats, residuals="other").residuals == "other"
    assert VARConfig.from_routing_stats(stats, residuals=None) == dataclasses.replace(without, cache_size=1000)


def test_every_field_is_in_the_json():
    assert set(json.loads(VARConfig().to_json())) == {f.name for f in dataclasses.fields(VARConfig)}


def test_the_digest_tells_settings_apart_but_not_folders():
    here = VARConfig(routing_stats="a.parquet", residuals="a.safetensors")
    assert here.digest() == dataclasses.replace(here, routing_stats="b.parquet").digest()
    assert here.digest() != dataclasses.replace(here, default=LayerPolicy(experts_kept=0)).digest()


def test_the_digest_tells_files_apart_by_what_they_hold(tmp_path):
    def hashed(name, content):
        (tmp_path / name).write_bytes(content)
        return VARConfig(routing_stats="a.parquet", residuals=str(tmp_path / name)).digest()

    assert hashed("a.safetensors", b"answers") == hashed("b.safetensors", b"answers")
    assert hashed("a.safetensors", b"answers") != hashed("a.safetensors", b"other answers")


def test_other_files_are_taken_but_answers_that_a_config_names_stay_its_own(tmp_path):
    stats, beside, own = tmp_path / "s.parquet", tmp_path / "s.residuals.safetensors", tmp_path / "own.safetensors"
    statsfile.write(stats, some_stats(3), {})
    some = Answers.empty(np.zeros((1, 1), np.int32), (0,), 2, 4)
    answersfile.write(beside, some, {"statistics": statsfile.identity(stats)})
    config = VARConfig(residuals=str(own), cache_size=7)
    assert config.at(stats) == dataclasses.replace(config, routing_stats=str(stats), residuals=str(beside))
    shutil.copy(beside, own)
    assert config.at(stats).residuals == str(own)
    assert config.at(stats, beside).residuals == str(beside)


def test_answers_of_other_statistics_are_refused(tmp_path):
    """Of other texts, seen in their counts, or of another model."""
    stats, own = tmp_path / "s.parquet", tmp_path / "own.safetensors"
    some = Answers.empty(np.zeros((1, 1), np.int32), (0,), 2, 4)
    statsfile.write(stats, some_stats(3), {"fingerprint": "abc"})
    answersfile.write(own, some, {"statistics": statsfile.identity(stats)})
    config = VARConfig(residuals=str(own))
    assert config.at(stats).residuals == str(own)
    for count, fingerprint in ((4, "abc"), (3, "def")):
        statsfile.write(stats, some_stats(count), {"fingerprint": fingerprint})
        with pytest.raises(ValueError, match=r"own\.safetensors: these answers belong to other statistics, "):
            config.at(stats)
        with pytest.raises(ValueError, match="give the statistics that the answers were collected with"):
            config.at(stats, own)
    answersfile.write(own, some, {})
    with pytest.raises(ValueError, match="these answers name no statistics"):
        config.at(stats)


def some_stats(count: int) -> RoutingStats:
    """One key that was seen so often."""
    stats = RoutingStats.empty(np.zeros((1, 1), np.int32), (1,), 1, 2)
    half = dataclasses.replace(stats.entropy, **{name: np.full((1, 1), 0.5) for name in ("mean", "min", "max")})
    counted = {"count": np.full((1, 1), count), "top1_counts": np.full((1, 1, 2), [count, 0])}
    return dataclasses.replace(stats, **counted, entropy=half, confidence=half, sum_probs=np.full((1, 1, 2), count / 2))


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
