import json
import sys

import jax
import numpy as np
import pytest

from analysis import audit_study
from analysis.audit_study import _passages, _perturbed, _random_texts, _renumbered, _until_drift, shuffled_answers
from analysis.evaluate.auditing import calibrate, calibrate_from, streams_of, tally_documents
from analysis.text.corpus import load_documents
from analysis.text.encoding import encode
from varjax import VARConfig, VARModel, answersfile, statsfile
from varjax.drift import Calibration, observe

READING = {"batch_size": 4, "max_length": 32, "progress": False}


@pytest.fixture(scope="module")
def texts(saved_model, even_corpus):
    """In random order: each begins with its number in the corpus."""
    every = encode(load_documents(even_corpus), saved_model.tokenizer, saved_model.config)
    return [every[index] for index in np.random.default_rng(0).permutation(len(every))]


@pytest.fixture(scope="module")
def calibration(small_var_model, texts) -> Calibration:
    return calibrate(small_var_model, texts[:50], share=0.5, **READING)


def observed(var_model: VARModel, some, share: float = 0.5) -> np.ndarray:
    return observe(tally_documents(var_model, some, share, seed=1, **READING)[0], streams_of(var_model))


def test_windows_of_a_document_add_up(small_var_model, texts):
    some, reading = texts[:10], READING | {"max_length": 16}
    sums, state = tally_documents(small_var_model, some, 1.0, **reading)
    np.testing.assert_array_equal(sums.tokens, [len(document.ids) for document in some])
    assert sums.tokens.min() > reading["max_length"] and sums.planned.shape == (10, 2, 2)
    np.testing.assert_array_equal(sums.audited, sums.planned)
    # The counters of the model counted the same.
    np.testing.assert_array_equal(sums.planned.sum(0), np.asarray(state.counters.tokens)[:, :2])
    np.testing.assert_array_equal(sums.agreed.sum(0), np.asarray(state.counters.agreements)[:, :2])


def test_a_document_is_audited_the_same_in_any_company(small_var_model, texts):
    some, reading = texts[:7], READING | {"max_length": 16, "seed": 3}
    together, _ = tally_documents(small_var_model, some, 0.5, **reading)
    backwards, _ = tally_documents(small_var_model, some[::-1], 0.5, **reading | {"batch_size": 1})
    assert 0 < together.audited.sum() < together.planned.sum()
    for name in ("tokens", "planned", "agreed", "audited"):
        np.testing.assert_array_equal(getattr(backwards, name)[::-1], getattr(together, name))
    np.testing.assert_allclose(backwards.error[::-1], together.error, atol=1e-4)
    other, _ = tally_documents(small_var_model, some, 0.5, **reading | {"seed": 4})
    assert (other.error != together.error).any()


def test_a_calibration_is_of_its_model_and_documents(small_var_model, calibration):
    assert calibration.fingerprint == small_var_model.model.fingerprint and calibration.texts == 50
    error, agreement, open_ = (value.mean for value in calibration.values[:3])
    assert 0 < error < 1 and 0 < agreement < 1 and 0 < open_ < 1


def test_quiet_on_held_out_documents_and_loud_under_faults(small_var_model, texts):
    model, config, table = small_var_model.model, small_var_model.config, small_var_model.table

    known, held_out = texts[:200], texts[200:]
    calibration = calibrate_from(observed(small_var_model, known), small_var_model, 0.5)
    assert not _until_drift(calibration, observed(small_var_model, held_out)).drifts

    rng = np.random.default_rng(0)
    wrong = {"error": shuffled_answers(table, rng), "agreement": _renumbered(table, rng)}
    for signal, faulty in wrong.items():
        monitor = _until_drift(calibration, observed(VARModel(model, config, table=faulty), held_out))
        assert {found.stream.signal for found in monitor.drifts} == {signal}
        assert monitor.texts < len(held_out)  # it stopped there
    other = _perturbed(model, 1.0, jax.random.key(0))
    monitor = _until_drift(calibration, observed(VARModel(other, config, table=table), held_out))
    assert "agreement" in {found.stream.signal for found in monitor.drifts}
    strange = _random_texts(held_out, model.config.vocab_size, seed=0)
    monitor = _until_drift(calibration, observed(small_var_model, strange))
    assert "open" in {found.stream.signal for found in monitor.drifts}


def test_shuffled_answers_are_the_same_answers(small_var_model):
    faulty = shuffled_answers(small_var_model.table, np.random.default_rng(0))
    for ours, theirs in zip(small_var_model.table.answers, faulty.answers, strict=True):
        assert (ours.answers != theirs.answers).any()
        np.testing.assert_array_equal(np.sort(ours.answers, axis=0), np.sort(theirs.answers, axis=0))
        np.testing.assert_array_equal(ours.entry, theirs.entry)


def test_renumbered_experts_all_move(small_var_model):
    before = np.asarray(small_var_model.table.routing.experts)
    after = np.asarray(_renumbered(small_var_model.table, np.random.default_rng(0)).routing.experts)
    used = before < 4
    assert (before[used] != after[used]).all() and (after[~used] == 4).all() and (after[used] < 4).all()


def test_passages_cut_documents_and_leave_the_rest_out(documents):
    some = documents[:5]
    cut = list(_passages(some, 8))
    assert {len(passage.ids) for passage in cut} == {8}
    assert len(cut) == sum(len(document.ids) // 8 for document in some)
    np.testing.assert_array_equal(cut[1].ids, some[0].ids[8:16])


def test_switched_off_there_is_nothing_to_audit(saved_model, documents):
    with pytest.raises(ValueError, match="VAR is switched off"):
        calibrate(VARModel(saved_model, VARConfig(enable_var=False)), documents[:4], **READING)


def test_the_study_writes_what_it_prints(
    saved_model, collected, model_directory, even_corpus, corpus_file, tmp_path, monkeypatch, capsys
):
    meta = {"fingerprint": saved_model.fingerprint, "model": "tiny"}
    statsfile.write(tmp_path / "routing_stats.parquet", collected.stats, meta)
    meta |= {"statistics": statsfile.identity(tmp_path / "routing_stats.parquet")}
    answersfile.write(tmp_path / "routing_stats.answers.safetensors", collected.answers, meta)
    command = f"audit_study --model {model_directory} --dataset {even_corpus} --foreign {corpus_file} --repeats 2"
    command += f" --max_length 32 --routing_stats {tmp_path}/routing_stats.parquet"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--output", str(tmp_path / "audit.json")])
    audit_study.main()

    result = json.loads((tmp_path / "audit.json").read_text())
    rows = {row["name"]: row for row in result["outcomes"]}
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows)
    assert {"same domain", "same domain, recalibrated", "answers shuffled", "random token ids", "sentences"} <= set(
        rows
    )
    assert rows["same domain"]["noticed"] == 0 and result["sections"]["audit"]["verdict"] == "PASS"
    assert rows["experts renumbered"]["agreement"] < rows["same domain"]["agreement"]
    assert rows["answers shuffled"]["error"] > rows["same domain"]["error"]
    assert 0 < result["expert_runs_per_token_and_layer"]["audit"] < result["expert_runs_per_token_and_layer"]["var"]
    assert Calibration.load(tmp_path / result["calibration_file"]).fingerprint == saved_model.fingerprint
