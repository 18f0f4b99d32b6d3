"""Tables of bounded size: which answers can still be found, what they weigh, and what a study says of them."""

import dataclasses

import jax
import numpy as np
import pytest

from analysis.evaluate.points import Subject, score_point
from analysis.questions.table_size import QUESTION, SHARES, _shipped
from varjax.config import LayerPolicy, VARConfig
from varjax.keys import ANY
from varjax.routing import NO_ANSWER
from varjax.shrinkage import _worth, shrunk
from varjax.table import build_table

READING = {"batch_size": 20, "max_length": 16}


POLICY = LayerPolicy(experts_kept=0, ngram_orders=(1, 2), frequency_threshold=4, entropy_threshold=2.0)
"""Everything that is known may be dropped, whatever the error: bounds alone decide what runs."""


def of(model, collected) -> Subject:
    config = VARConfig(default=POLICY, cache_size=0)
    return Subject(model, *collected[:2], config, collected.held_out, samples=100, progress=False, **READING)


@pytest.fixture(scope="module")
def subject(saved_model, collected) -> Subject:
    return of(saved_model, collected)


@pytest.fixture(scope="module")
def affine_subject(saved_model, affine_collected) -> Subject:
    return of(saved_model, affine_collected)


def bounded(subject, bound: int | None, **options):
    config = dataclasses.replace(subject.config, answers_per_layer=bound)
    return build_table(config, subject.stats, subject.answers, top_k=2, **options)


@pytest.mark.parametrize("bound", [1, 7, 40])
def test_what_is_not_kept_falls_back_to_the_shorter_key_or_runs(subject, bound):
    """Against a dictionary: each key's own answer if it is among the most valuable, else that of its last id."""
    table = bounded(subject, bound, keep_shapes=True)
    keys, answers = subject.stats.keys.tolist(), subject.answers
    place = {tuple(key): row for row, key in enumerate(answers.keys.tolist())}
    whole = np.asarray(bounded(subject, None, keep_shapes=True).eligible)
    for layer in range(2):
        value = _worth(answers, layer, subject.config.answer_shrinkage)

        def own(key, expert, layer=layer):
            return answers.entry[layer, place[tuple(key)], expert]

        def said(key, expert, kept):
            for longest in (key, [ANY, key[1]]):
                if own(longest, expert) in kept:
                    return own(longest, expert)
            return NO_ANSWER

        eligible = [key for key, there in zip(keys, whole[layer, :-1], strict=True) if there]
        everything = set(range(len(value)))
        used = {said(key, expert, everything) for key in eligible for expert in range(4)} - {NO_ANSWER}
        kept = set(sorted(used, key=lambda one: -value[one])[:bound])
        expected = [[said(key, expert, kept) for expert in range(4)] for key in keys]
        np.testing.assert_array_equal(np.asarray(table.answers[layer].entry)[:-1], expected)
        assert kept < used and len(bounded(subject, bound).answers[layer].answers) == bound


def test_kept_answers_are_what_they_were(subject):
    """A smaller table is the larger one with holes: estimates still lean on all that was collected."""
    whole, small = bounded(subject, None), bounded(subject, 20)
    for ours, theirs in zip(small.answers, whole.answers, strict=True):
        rows, deviations = (
            {row.tobytes(): d for row, d in zip(np.asarray(one.answers), np.asarray(one.deviation), strict=True)}
            for one in (ours, theirs)
        )
        assert len(rows) == 20 and rows.items() <= deviations.items()


def test_shipped_and_fixed_shapes_give_the_same_losses(subject):
    config = dataclasses.replace(subject.config, answers_per_layer=20)
    small, fixed = (score_point(subject, config, bounded(subject, 20, keep_shapes=same)) for same in (False, True))
    np.testing.assert_allclose(small.nll, fixed.nll, rtol=1e-6)
    assert small.experts_per_token == fixed.experts_per_token


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("threshold", [4, 12, 10**6])
@pytest.mark.parametrize("kind", ["subject", "affine_subject"])
def test_the_size_is_that_of_the_table_built_without_what_is_never_looked_up(request, kind, dtype, threshold):
    """Some keys, fewer, and none; one layer left open."""
    subject = request.getfixturevalue(kind)
    policy = dataclasses.replace(subject.config.default, frequency_threshold=threshold)
    config = dataclasses.replace(subject.config, default=policy, answer_dtype=dtype, answers_per_layer=30)
    for given in (config, dataclasses.replace(config, layers={0: None})):
        fixed, small = (
            build_table(given, subject.stats, subject.answers, top_k=2, keep_shapes=same) for same in (True, False)
        )
        _, answer_bytes, affine_bytes, whole = _shipped(fixed)
        assert whole == nbytes(small)
        maps = [layer.affine for layer in small.answers]
        in_answers = [(layer.answers, layer.deviation, layer.scale) for layer in small.answers]
        assert affine_bytes == nbytes(maps) and answer_bytes == nbytes((in_answers, maps))
        assert (affine_bytes > 0) == (kind == "affine_subject")


def nbytes(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_a_bound_keeps_the_affine_answers_that_remove_the_most_error(affine_subject):
    """What an answer is worth, against all tokens: by how much its output differs from the shorter key's answer."""
    answers, width = affine_subject.answers, affine_subject.model.config.hidden_size
    x = np.random.default_rng(0).normal(size=(3, width))
    for layer in range(2):
        estimate, expert = shrunk(answers, layer, 1.0), answers.experts(layer)
        value, maps = _worth(answers, layer, 1.0), answers.maps
        for n in np.flatnonzero(answers.mass[layer] > 0)[::7]:
            one_map = maps.read[layer] @ maps.mix[layer, expert[n]] @ maps.write[layer]

            def said(m, one_map=one_map, estimate=estimate):
                return estimate.answers[m] + (x - estimate.inputs[m]) @ one_map

            away = said(n) - said(estimate.parent[n]) if estimate.parent[n] != NO_ANSWER else estimate.answers[n]
            squared = np.sum(np.square(away), axis=-1)
            np.testing.assert_allclose(answers.mass[layer, n] * squared, value[n], rtol=1e-3, atol=1e-6)
    small = bounded(affine_subject, 30)
    whole = bounded(affine_subject, None, keep_shapes=True)  # with the answers of order 0
    assert [len(layer.answers) for layer in small.answers] == [30, 30]
    for ours, theirs in zip(small.answers, whole.answers, strict=True):
        some, every = ({row.tobytes() for row in np.asarray(one.affine.center)} for one in (ours, theirs))
        assert ours.affine.center.shape == (30, 12) and some <= every
        np.testing.assert_array_equal(ours.affine.mix, theirs.affine.mix)


def test_smaller_tables_of_affine_answers_are_measured_and_their_maps_reported(affine_subject):
    (said,) = (answer := QUESTION.answer(affine_subject)).sections
    sizes = answer.result.sizes
    full = {size.answer_dtype: size for size in sizes if size.answers_per_layer is None}
    maps = {"float32": 4, "bfloat16": 2, "int8": 2}  # bytes of a number
    numbers = 2 * (2 * 24 * 12 + 4 * 12 * 12) + 12 * full["float32"].answers
    assert {name: size.affine_bytes for name, size in full.items()} == {
        name: bytes_ * numbers + 2 * 4 * 4 for name, bytes_ in maps.items()
    }
    assert sizes[0].affine_bytes < full["float32"].affine_bytes < full["float32"].answer_bytes
    share = full["float32"].affine_bytes / full["float32"].answer_bytes
    assert any(f"maps and centers take {full['float32'].affine_bytes / 1e6:.1f} of" in one for one in said.words)
    assert share in [row[4] for row in said.tables[0].rows]
    assert abs(full["int8"].measured.degradation.value - full["float32"].measured.degradation.value) < 0.01


def test_a_bound_must_be_a_number_of_answers():
    with pytest.raises(ValueError, match="answers_per_layer=0: expected an integer of at least 1 or None"):
        VARConfig(answers_per_layer=0)
    assert VARConfig.from_json(VARConfig(answers_per_layer=9).to_json()).answers_per_layer == 9


@pytest.fixture(scope="module")
def answered(subject):
    return QUESTION.answer(subject)


@pytest.fixture(scope="module")
def found(answered):
    return answered.result


def test_larger_tables_run_fewer_experts_and_smaller_types_take_fewer_bytes(subject, found):
    bounds = [size for size in found.sizes if size.answers_per_layer is not None]
    full = {size.answer_dtype: size for size in found.sizes if size.answers_per_layer is None}
    assert len(bounds) == len(SHARES)
    growing = [*bounds, full["float32"]]
    experts = [size.measured.experts_per_token for size in growing]
    assert experts == sorted(experts, reverse=True) and experts[-1] < experts[0] < 2
    sizes = [size.bytes for size in growing]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    number, width = full["float32"].answers, subject.model.config.hidden_size
    assert number == sum(len(layer.answers) for layer in bounded(subject, None).answers)
    expected = {"float32": 4 * width + 4, "bfloat16": 2 * width + 4, "int8": width + 8}  # deviation, scale
    assert {name: size.answer_bytes / number for name, size in full.items()} == expected
    assert len({size.measured.experts_per_token for size in full.values()}) == 1
    assert abs(full["int8"].measured.degradation.value - full["float32"].measured.degradation.value) < 0.01


def test_the_section_names_the_size_and_the_figure_shows_every_type(answered, found):
    (said,) = answered.sections
    full = next(size for size in found.sizes if size.answers_per_layer is None)
    assert said.verdict == "reported" and f"{full.answers:,} answers" in said.outcome
    assert len(said.tables[0].rows) == len(found.sizes)
    drawn = said.figures[0].draw()
    legend = drawn.axes[0].get_legend()
    assert [one.get_text() for one in legend.get_texts()] == ["float32", "bfloat16", "int8"]
