"""The policy and table that come with the reference model save experts at a bounded loss."""

import numpy as np
import pytest

from analysis.text.encoded_corpus import EncodedCorpus
from models import load_model
from models.model import REFERENCE
from varjax import VARConfig, VARModel, load_table
from varjax.tablefiles import saved_files

SIZE = sum((REFERENCE / name).stat().st_size for name in ("routing_stats.parquet", "routing_stats.answers.safetensors"))


@pytest.fixture(scope="module")
def model():
    return load_model("reference")


def test_the_policy_saves_experts_at_a_bounded_loss(model):
    config = VARConfig.load(REFERENCE / "policy.var_config.json")
    table = load_table(model, config, REFERENCE / "routing_stats.parquet")
    var_model = VARModel(model, config, table)
    documents = [one.ids for one in EncodedCorpus("embedded", "test", 60, model.tokenizer, model.config)]
    ids = np.stack([one[:64] for one in documents if len(one) >= 64][:16])
    out, state = var_model(ids, var_model.init(len(ids)))

    def loss(logits):
        logits = np.asarray(logits, np.float64)[:, :-1]
        chosen = np.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0]
        return float(np.mean(np.logaddexp.reduce(logits, axis=-1) - chosen))

    counted = var_model.report(state)
    assert counted["experts_per_token"] < 1.75 and counted["tiers"]["fast"] > 0.3
    assert loss(out.logits) - loss(model(ids).logits) < 0.03  # nats per token, on documents that chose nothing


def test_the_policy_names_its_table_wherever_the_checkout_is():
    files = saved_files(REFERENCE / "policy.var_config.json")
    assert files.routing_stats == str(REFERENCE / "routing_stats.parquet")
    assert files.answers == str(REFERENCE / "routing_stats.answers.safetensors")
    assert SIZE < 8 * 2**20
