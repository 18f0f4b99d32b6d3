"""`00_train_reference.py --config` as a user runs it: another shape, on a small corpus, in a folder of its own."""

import json
import math
from pathlib import Path

import jax
import pytest

from analysis.text import corpus
from analysis.text.corpus import load_documents
from models import load_model
from models.config import read_config
from models.parameters import init_params

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "00_train_reference.py"
SHIPPED = sorted((ROOT / "experiments" / "configs").glob("*.json"))
TINY = {
    "vocab_size": 270,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 16,
}


@pytest.fixture
def train(script, corpus_file, tmp_path, monkeypatch):
    """`train(fields, *arguments)`: with the config of such fields, in an empty folder, on `corpus_file`."""

    def run(fields: dict, *arguments: object) -> None:
        Path("tiny.json").write_text(json.dumps(TINY | fields))
        short = ("--batch_size", 2, "--length", 8, "--save_every", 1)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes inside Adam
            script(SCRIPT, "--config", "tiny.json", *short, *arguments)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(corpus, "load_documents", lambda _, split: load_documents(corpus_file, split=split))
    return run


def test_another_shape_is_trained_where_nothing_else_lies(train):
    fields = {"model_type": "olmoe", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    train(fields, "--steps", 2)
    model = load_model("checkpoints/tiny")
    assert model.config == read_config(Path("tiny.json"))
    assert {path.name for path in Path().iterdir()} == {"tiny.json", "checkpoints", "results"}
    card = json.loads(Path("checkpoints/tiny/card.json").read_text())
    assert card["fingerprint"] == model.fingerprint and card["training"]["steps"] == 2
    assert [len(row) for row in card["expert_load"]] == [4]
    told = Path("checkpoints/tiny/README.md").read_text()
    assert told.startswith("# tiny\n") and "transformers.OlmoeForCausalLM" in told and "4 experts of size 16" in told

    with pytest.raises(SystemExit, match=r"results/train_tiny holds .* a run with train\.steps = 2 \(here 3\)"):
        train(fields, "--steps", 3)


def test_ids_that_the_tokenizer_does_not_have_are_refused(train):
    with pytest.raises(SystemExit, match=r"eos_token_id are None and 50279, but those of the tokenizer in .* 1 and 2"):
        train({"model_type": "olmoe"})
    assert not Path("results").exists()


def sizes(params) -> list[tuple[int, ...]]:
    return [leaf.shape for leaf in jax.tree.leaves(params)]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_shapes_that_come_along_are_small_and_of_experts(path):
    config = read_config(path)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    total, experts = (
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(one)) for one in (shapes, shapes["experts"])
    )
    assert total < 50e6 and experts > total / 2
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, None)  # of the tokenizer it gets
