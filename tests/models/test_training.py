"""Training: it learns, it resumes bit for bit, and the fast engine gives the gradients of the obvious one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.decoder import forward
from models.experts import get_engine
from models.parameters import init_params, prepare
from models.training import TrainConfig, _batch_of, pack, train_steps

REFERENCE = get_engine("reference")  # compiles quickest; that the others have its gradients is tested below
TRAIN = TrainConfig(steps=12, batch_size=4, length=16, learning_rate=2e-2, warmup_steps=2)


@pytest.fixture(scope="module", autouse=True)
def lenient_promotion():
    """optax mixes dtypes inside Adam."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def config(tiny_config):
    return dataclasses.replace(tiny_config, num_layers=1, num_experts=2, top_k=1, initializer_range=0.1)


@pytest.fixture(scope="module")
def rows():
    """A corpus with something to learn: each token is the last one's successor."""
    return pack([np.arange(start, start + 200) % 61 for start in range(0, 60, 7)], TRAIN.length)


@pytest.fixture(scope="module")
def uninterrupted(config, rows, lenient_promotion, tmp_path_factory):
    """Losses by step and the last parameters."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    losses = {}
    for step, state, info in train_steps(config, TRAIN, REFERENCE, rows, folder, save_every=5):
        losses[step], params = float(info.loss), state.params
    return losses, jax.device_get(params)


def test_the_loss_falls(uninterrupted):
    losses, _ = uninterrupted
    assert list(losses) == list(range(1, TRAIN.steps + 1))
    assert losses[1] == pytest.approx(np.log(61), abs=0.3)  # a random model knows nothing
    assert losses[TRAIN.steps] < losses[1] - 0.5


def test_a_killed_and_resumed_run_is_the_uninterrupted_one(config, rows, uninterrupted, tmp_path):
    losses, params = uninterrupted
    run = train_steps(config, TRAIN, REFERENCE, rows, tmp_path, save_every=5)
    for step, _, _ in run:
        if step == 8:
            run.close()  # killed; the last checkpoint is that of step 5
    again = {}
    for step, state, info in train_steps(config, TRAIN, REFERENCE, rows, tmp_path, save_every=5):
        again[step], resumed = float(info.loss), state.params
    assert again == {step: loss for step, loss in losses.items() if step > 5}
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed), params)
    assert list(train_steps(config, TRAIN, REFERENCE, rows, tmp_path)) == []  # nothing left to do


def test_the_blocks_engine_has_the_gradients_of_the_reference(tiny_config):
    config = dataclasses.replace(tiny_config, num_layers=1, num_experts=2)
    params = init_params(config, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, config.vocab_size)

    def gradients(engine):
        def loss(params):
            logits = forward(prepare(params, engine), tokens[:, :-1], config=config, engine=engine).logits
            picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
            return -picked.mean()

        return jax.jit(jax.grad(loss))(params)

    ours, reference = gradients(get_engine("blocks")), gradients(REFERENCE)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(reference["experts"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), ours, reference)


def test_rows_are_cut_from_the_joined_documents():
    packed = pack([np.arange(5), np.arange(5, 12)], length=4)
    np.testing.assert_array_equal(packed, [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]])
    with pytest.raises(ValueError, match="hold 3 tokens, fewer than one row of 5; add text"):
        pack([np.arange(3)], length=4)


def test_every_epoch_sees_every_row_once_in_another_order():
    rows = np.arange(10)[:, None]
    train = dataclasses.replace(TRAIN, batch_size=4)
    seen = np.concatenate([_batch_of(rows, step, train)[:, 0] for step in range(5)])  # 20 rows: two epochs
    np.testing.assert_array_equal(np.sort(seen[:10]), np.arange(10))
    np.testing.assert_array_equal(np.sort(seen[10:]), np.arange(10))
    assert (seen[:10] != seen[10:]).any()
    np.testing.assert_array_equal(_batch_of(rows, 3, train)[:, 0], seen[12:16])
