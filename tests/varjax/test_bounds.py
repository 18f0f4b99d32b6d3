import dataclasses
import math

import numpy as np
import pytest

from analysis.report.provenance import write_json
from varjax.bounds import ConfidenceSequence, begin, documents_needed, interval, p_value, update, upper_bound
from varjax.checksums import read_json

REPEATS = 500
ALLOWED = 0.05 + 3 * math.sqrt(0.05 * 0.95 / REPEATS)  # three standard errors above the nominal share


def student_bound(values):
    """The textbook's upper 95 % bound; 1.66 is Student's quantile at 100 degrees of freedom."""
    return values.mean() + 1.66 * values.std(ddof=1) / math.sqrt(len(values))


def disasters(rng, size):
    """0, and 1 once in a hundred: a sample of 100 misses it more than every third time."""
    return (rng.random(size) < 0.01).astype(float)


def test_the_bound_is_the_least_mean_that_a_bettor_written_as_a_loop_refutes():
    x = np.random.default_rng(0).beta(1, 4, 60)
    taken = x[np.random.default_rng(5).permutation(60)]

    def refutes(m):
        capital, mean, squares = 1.0, 0.5, 0.25
        for seen, value in enumerate(taken):
            bet = min(math.sqrt(2 * math.log(20) / (60 * squares / (seen + 1))), 0.9 / (1 - m))
            capital *= 1 + bet * (m - value)
            if capital >= 20:
                return True
            mean = (mean * (seen + 1) + value) / (seen + 2)
            squares += (value - mean) ** 2
        return False

    bound = upper_bound(x, 0, 1, seed=5)
    assert refutes(bound + 1e-9) and not refutes(bound - 1e-9)
    assert all(refutes(m) for m in np.linspace(bound + 1e-9, 0.999, 50))


@pytest.mark.parametrize("size", [30, 300, 3000])
def test_constant_data_leave_only_what_the_sample_size_costs(size):
    excess = upper_bound(np.full(size, 0.3), 0, 1) - 0.3
    cost = math.log(20) * 0.7 / (0.9 * size)  # to first order: every bet as large as allowed
    assert 0.9 * cost < excess < 3 * cost


def test_betting_is_narrower_than_hoeffding_on_quiet_data():
    x = np.random.default_rng(1).normal(0.4, 0.02, 400)
    assert x.mean() < upper_bound(x, 0, 1) < x.mean() + math.sqrt(math.log(20) / 800)


def test_units_do_not_matter():
    x = np.random.default_rng(2).beta(2, 3, 100)
    assert upper_bound(20 * x - 5, -5, 15, 0.9) == pytest.approx(20 * upper_bound(x, 0, 1, 0.9) - 5)


def test_the_bound_fails_no_more_often_than_it_says_where_the_textbook_s_does():
    rng = np.random.default_rng(3)
    samples = [disasters(rng, 100) for _ in range(REPEATS)]
    assert np.mean([upper_bound(x, 0, 1) < 0.01 for x in samples]) <= ALLOWED
    assert np.mean([student_bound(x) < 0.01 for x in samples]) > 0.3


def test_the_bound_is_not_slack_where_the_sample_tells_much():
    rng = np.random.default_rng(4)
    failed = np.mean([upper_bound(rng.random(200), 0, 1) < 0.5 for _ in range(REPEATS)])
    assert 0.005 < failed <= ALLOWED


def test_observations_sorted_by_kind_do_no_harm():
    rng = np.random.default_rng(5)
    failed = 0
    for _ in range(REPEATS):
        bad = int((rng.random(200) < 0.5).sum())
        x = np.r_[rng.uniform(0, 0.2, 200 - bad), rng.uniform(0.8, 1, bad)]  # taken as they come: refuted half-way
        failed += upper_bound(x, 0, 1) < 0.5
    assert failed / REPEATS <= ALLOWED


def test_p_is_at_most_alpha_exactly_where_the_bound_is_at_most_the_limit():
    rng = np.random.default_rng(6)
    verdicts = set()
    for _ in range(50):
        level = rng.uniform(0.5, 0.99)
        x = rng.beta(1, 5, int(rng.integers(2, 80)))
        bound = upper_bound(x, 0, 1, level)
        for limit in (*rng.uniform(0, 1, 4), bound - 1e-9, bound + 1e-9):
            rejected = p_value(x, limit, 0, 1, level) <= 1 - level
            assert rejected == (bound <= limit)
            verdicts.add(rejected)
    assert verdicts == {True, False}


def test_p_is_valid_at_every_level_whatever_level_it_is_tuned_to():
    rng = np.random.default_rng(7)
    p = np.array([p_value(rng.beta(1, 3, 100), 0.25, 0, 1, level=0.99) for _ in range(REPEATS)])
    for alpha in (0.01, 0.05, 0.2, 0.5):
        assert np.mean(p <= alpha) <= alpha + 3 * math.sqrt(alpha / REPEATS)
    assert p_value(rng.beta(1, 3, 100), 1, 0, 1) == 0 == p_value(np.ones(100), 1.1, 0, 1)  # no mean can pass 1
    assert p_value(np.ones(100), 1, 0, 1) == 1  # a mean of 1 is likely enough


def test_documents_needed_are_about_what_half_of_fresh_samples_need():
    rng = np.random.default_rng(8)
    target = 0.28
    needed = documents_needed(rng.beta(1, 3, 20_000), 0, 1, 0.95, target)

    def share(size):
        return np.mean([upper_bound(rng.beta(1, 3, int(size)), 0, 1) <= target for _ in range(200)])

    assert share(needed / 2) < 0.4 < share(needed) < 0.85 < share(2 * needed)


def test_documents_needed_for_constant_data_and_for_a_mean_above_the_target():
    constant = np.full(10, 0.2)
    assert documents_needed(constant, 0, 1, 0.95, 0.25) == math.ceil(math.log(20) / math.log1p(0.9 * 0.05 / 0.75))
    assert documents_needed(constant, 0, 1, 0.95, 0.2) is None
    assert documents_needed(constant, 0, 1, 0.95, 1) == 1


@pytest.mark.parametrize("side", ["both", "upper", "lower"])
def test_a_sequence_covers_at_all_times_at_once_where_the_textbook_s_interval_does_not(side):
    rng = np.random.default_rng(9)
    missed = student = 0
    for _ in range(200):
        x = rng.beta(1, 3, 400)
        sequence = begin(0, 1, side=side)
        for first in range(0, 400, 20):
            sequence = update(sequence, x[first : first + 20])
        lower, upper = interval(sequence)  # those of all times intersected
        missed += not lower <= 0.25 <= upper
        student += any(student_bound(x[:end]) < 0.25 for end in range(20, 401, 20))
    assert missed / 200 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200)
    assert student / 200 > 0.12


def test_one_by_one_gives_the_same_capital_as_all_at_once_and_no_wider_an_interval():
    x = np.random.default_rng(10).beta(2, 5, 150)
    whole, single = update(begin(0, 1), x), begin(0, 1)
    for value in x:
        single = update(single, value)
    np.testing.assert_allclose(single.log_capital, whole.log_capital, atol=1e-9)
    assert whole.lower <= single.lower < single.upper <= whole.upper
    assert single.count == 150 and single.total == pytest.approx(x.sum())


def test_a_sequence_s_bound_is_that_of_its_bets_without_the_grid_of_means():
    x = np.random.default_rng(11).beta(2, 5, 300)
    fractions = 0.9 * 0.5 ** np.arange(10)[:, None]

    def log_capital(m):
        logs = np.log1p(fractions * ((1 - x) / (1 - m) - 1)).sum(axis=1)
        return np.logaddexp.reduce(logs) - math.log(10)

    _, upper = interval(update(begin(0, 1, side="upper"), x))
    assert log_capital(upper) >= math.log(20)  # never below the exact bound
    assert log_capital(upper - 0.001) < math.log(20)


def test_a_sequence_is_wider_than_the_bound_of_a_fixed_sample_and_narrows():
    x = np.random.default_rng(12).beta(1, 3, 4000)
    early, late = (interval(update(begin(0, 1, side="upper"), x[:size]))[1] for size in (400, 4000))
    assert upper_bound(x, 0, 1) < late < early
    assert late - x.mean() < 3 * (upper_bound(x, 0, 1) - x.mean())


def test_a_lower_bound_is_the_upper_bound_of_the_mirrored_observations_and_one_side_alone_is_tighter():
    x = np.random.default_rng(13).beta(1, 3, 200)
    lower, upper = interval(update(begin(0, 1), x))
    mirrored = interval(update(begin(-1, 0), -x))
    assert mirrored == pytest.approx((-upper, -lower))
    assert interval(update(begin(0, 1, side="upper"), x))[1] < upper
    assert interval(update(begin(0, 1, side="lower"), x))[0] > lower
    assert interval(update(begin(0, 1, side="lower"), x))[1] == 1


def test_bounds_pass_each_other_when_the_mean_moves():
    rng = np.random.default_rng(14)
    sequence = update(begin(0, 1), rng.uniform(0, 0.2, 300))
    lower, upper = interval(update(sequence, rng.uniform(0.8, 1, 300)))
    assert lower > upper


def test_a_sequence_goes_through_a_file_and_on(tmp_path):
    x = np.random.default_rng(15).random(60)
    sequence = update(begin(0, 1), x[:30])
    write_json(tmp_path / "sequence.json", sequence)
    again = ConfidenceSequence(**read_json(tmp_path / "sequence.json", ""))
    assert interval(update(again, x[30:])) == interval(update(sequence, x[30:]))
    assert update(sequence, []).count == 30
    assert [field.name for field in dataclasses.fields(again)][:4] == ["low", "high", "level", "side"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: upper_bound([0.5, 1.5], 0, 1), "1.5 is outside"),
        (lambda: upper_bound([0.5, math.nan], 0, 1), "nan is outside"),
        (lambda: upper_bound([0.5], 0, 1), "two or more"),
        (lambda: upper_bound([0.5, 0.5], 1, 0), "low below high"),
        (lambda: upper_bound([0.5, 0.5], 0, 1, 95), "between 0 and 1"),
        (lambda: begin(0, 1, side="left"), "upper"),
        (lambda: update(begin(0, 1), [2]), "2.0 is outside"),
    ],
)
def test_what_cannot_be_bounded_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
