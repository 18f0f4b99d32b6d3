"""What is compared runs the same experts, and the table says by how much the maps slow it down."""

import numpy as np
import pytest

from benchmarks.answers import line, var_models
from profiling.calls import planned
from profiling.costs import Mix


def test_all_kinds_run_the_same_experts(saved_model, documents):
    ids = [document.ids for document in documents[:20]]
    sides = var_models(saved_model, ids, keys=10, rank=5)
    assert list(sides) == ["no answers", "constant", "affine"]
    text, seen = ids[0][None, :12], {}
    for name, side in sides.items():
        out, _ = side(text, side.init())
        used = np.asarray(out.routing.experts) < saved_model.config.num_experts
        assert (used[:, :, 1:].sum(-1) == 1).all() and used[:, :, 0].all()  # the first token is left to the router
        mix = planned(Mix.plain(saved_model.config, 12), saved_model.config, side.table, 12, orders=2)
        seen[name] = (side.table.answers is not None, mix.answer_rank, np.asarray(out.logits))
    assert [one[:2] for one in seen.values()] == [(False, 0), (True, 0), (True, 5)]
    assert 0 < np.abs(seen["affine"][2] - seen["constant"][2]).max() < 0.1


def test_the_share_is_paired_and_less_one():
    rounds = np.array([1.0, 4.0, 2.0, 1.5, 3.0])
    said = line("decode, 1 x 1", {"no answers": rounds / 1.25, "constant": rounds, "affine": 1.04 * rounds}, 10)
    assert said.split()[:4] == ["decode,", "1", "x", "1"] and "200.000 ms" in said
    assert "1.250 [1.250, 1.250]" in said and "+4.0% [+4.0%, +4.0%]" in said
    with pytest.raises(KeyError):
        line("", {"constant": rounds}, 1)
