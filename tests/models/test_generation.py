"""Generation: what is sampled, when a text ends, what is compiled, and which inputs are refused."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import Sampling, generation
from models.generation import GenerationDefaults, _choose, _first, _next, generate
from models.kv_cache import roomy
from models.model import PlainStep
from varjax.errors import InputError

PROMPT = np.array([[3, 4, 5], [6, 7, 8]])
END, OTHER_END, FILL = 2, 9, 0


def drawn(logits, sampling, count=4000) -> np.ndarray:
    """Share of each token among `count` draws from one row of logits."""
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    tokens = jax.jit(_choose, static_argnums=2)(rows, jax.random.key(0), sampling)
    return np.bincount(tokens, minlength=len(logits)) / count


LOGITS = np.log([0.05, 0.4, 0.1, 0.25, 0.2])


@pytest.mark.parametrize(
    ("sampling", "probs"),
    [
        (Sampling(), [0, 1, 0, 0, 0]),
        (Sampling(temperature=1.0), [0.05, 0.4, 0.1, 0.25, 0.2]),
        (Sampling(temperature=0.5), np.array([0.05, 0.4, 0.1, 0.25, 0.2]) ** 2 / 0.275),
        (Sampling(temperature=1.0, top_k=2), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        (Sampling(temperature=1.0, top_k=99), [0.05, 0.4, 0.1, 0.25, 0.2]),
        (Sampling(temperature=1.0, top_p=0.7), [0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85]),
        (Sampling(temperature=1.0, top_p=0.01), [0, 1, 0, 0, 0]),
        (Sampling(temperature=1.0, top_p=1.0), [0.05, 0.4, 0.1, 0.25, 0.2]),
        # the nucleus is taken of what top_k left: 0.4 / 0.65 reaches 0.6 alone
        (Sampling(temperature=1.0, top_k=2, top_p=0.6), [0, 1, 0, 0, 0]),
    ],
)
def test_sampling_follows_the_stated_distribution(sampling, probs):
    shares = drawn(LOGITS, sampling)
    np.testing.assert_allclose(shares, probs, atol=0.035)  # over 4 standard errors
    assert (shares[np.asarray(probs) == 0] == 0).all()


@pytest.mark.parametrize(
    "fault",
    [
        *({"temperature": value} for value in (-1.0, np.nan, np.inf, "0.5", True, None)),
        *({"top_k": value} for value in (0, -5, 2.5, np.nan, "3", True)),
        *({"top_p": value} for value in (0.0, 1.5, np.nan, "0.5", True)),
        *({"seed": value} for value in (-1, 0.5, None, True, 2**32, 2**64)),
    ],
    ids=str,
)
def test_impossible_sampling_is_refused_by_name(fault):
    with pytest.raises(ValueError, match=next(iter(fault))):
        Sampling(**fault)


def test_generation_is_reproducible_by_seed_and_compiles_once(tiny_model):
    def run(seed: int, prompt=PROMPT):
        sampling = Sampling(temperature=1.0, seed=seed)
        return tiny_model.generate(prompt, 12, sampling=sampling)[0]

    def compiled():
        return _first._cache_size(), _next._cache_size()

    first = run(0)
    before = compiled()  # one prefill, one loop for all tokens
    assert (first.shape, first.dtype) == ((2, 15), np.int32)
    np.testing.assert_array_equal(first[:, :3], PROMPT)
    np.testing.assert_array_equal(run(0), first)
    assert (run(1) != first).any()
    run(0, PROMPT + 1)
    tiny_model.generate(PROMPT, 5, sampling=Sampling(temperature=1.0))
    assert compiled() == before


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scripted:
    """A step that says these tokens, one per call and row, and counts its calls in the carry."""

    tokens: jax.Array

    def __call__(self, kv, carry, ids, mask, now):
        return jax.nn.one_hot(self.tokens[:, carry], 11), kv, carry + 1


def scripted(*tokens_of_rows):
    return Scripted(jnp.asarray(tokens_of_rows))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Watching:
    """A step that notes the mask of each call after the first, and what the clock said, in the carry."""

    step: PlainStep

    def __call__(self, kv, carry, ids, mask, now):
        logits, kv, _ = self.step(kv, None, ids, mask, now)
        calls, masks, moments = carry
        if ids.shape[1] == 1:
            masks = masks.at[calls].set(mask[:, 0])
        return logits, kv, (calls + 1, masks, moments.at[calls].set(now))


def continued(step, steps, ends=(END, OTHER_END)):
    mask = jnp.ones(PROMPT.shape, bool)
    found = []
    for several in (1, 2, 16):
        tokens, calls = generate(
            step, None, jnp.int32(0), jnp.asarray(PROMPT), mask, steps, Sampling(), ends, FILL, np.int32, several
        )
        found.append((tokens[:, PROMPT.shape[1] :].tolist(), int(calls)))
    assert found[0] == found[1] == found[2]
    return found[0]


def test_a_text_ends_with_any_end_id_and_is_filled():
    step = scripted([5, END, 5, 5, 5], [7, 7, 7, OTHER_END, 7])
    assert continued(step, 5) == ([[5, END, FILL, FILL], [7, 7, 7, OTHER_END]], 4)  # all ended: no fifth call
    assert continued(step, 3) == ([[5, END, FILL], [7, 7, 7]], 3)


def test_without_end_ids_every_token_is_generated():
    assert continued(scripted([END, 5], [5, END]), 2, ends=()) == ([[END, 5], [5, END]], 2)


@pytest.mark.parametrize(("pad", "fill"), [(1, 1), (None, END)])
def test_a_model_fills_with_its_padding_id_or_else_its_end_id(tiny_model, pad, fill):
    config = dataclasses.replace(tiny_model.config, eos_token_id=(END, OTHER_END), pad_token_id=pad)
    model = dataclasses.replace(tiny_model, config=config)
    tokens, calls = model.generate(PROMPT, 4, step=scripted([END, 5, 5], [5, 5, OTHER_END]), carry=jnp.int32(0))
    np.testing.assert_array_equal(tokens[:, 3:], [[END, fill, fill], [5, 5, OTHER_END]])
    assert calls == 3


@pytest.mark.parametrize(("ends", "fill"), [((99, END), END), ((END, 99), END)])
def test_an_end_id_without_an_embedding_fills_nothing(tiny_model, ends, fill):
    model = dataclasses.replace(tiny_model, generation_defaults=GenerationDefaults(None, ends, None))
    tokens, _ = model.generate(PROMPT, 4, step=scripted([END, 5, 5], [5, 5, END]), carry=jnp.int32(0))
    np.testing.assert_array_equal(tokens[:, 3:], [[END, fill, fill], [5, 5, END]])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"input_ids": [3, 4]}, r"shape \(2,\) and dtype int64; expected integers \[B, T\]"),
        ({"input_ids": [[0.5]]}, "dtype float64; expected integers"),
        ({"input_ids": np.zeros((1, 0), int)}, "not empty"),
        ({"input_ids": [[3, 61]]}, "holds 3 to 61; expected ids from 0 to 60"),
        ({"input_ids": [[-1, 3]]}, "holds -1 to 3; expected ids from 0 to 60"),
        ({"input_ids": [[3, 4]], "attention_mask": [[1]]}, r"attention_mask has shape \(1, 1\).*\(1, 2\)"),
        ({"input_ids": [[3, 4]], "attention_mask": [[1, 0]]}, "ends in padding; pad on the left"),
        ({"input_ids": [[3, 4], [5]]}, "input_ids has rows of different lengths"),
        ({"input_ids": [[3, 4]], "attention_mask": [[1, 1], [1]]}, "attention_mask has rows of different lengths"),
        ({"input_ids": [[3, 4]], "attention_mask": [[0.0, -1e9]]}, "other values than 1 for real tokens and 0"),
        ({"input_ids": [[3, 4]], "attention_mask": [[1, np.nan]]}, "other values than 1 for real tokens and 0"),
        *(
            (
                {"input_ids": [[3, 4]], "max_new_tokens": new},
                f"max_new_tokens={new!r}; expected an integer of at least 1",
            )
            for new in (0, -1, -100, 2.5, True, None)
        ),
    ],
)
def test_bad_inputs_are_refused(tiny_model, arguments, named):
    with pytest.raises(ValueError, match=named):
        tiny_model.generate(**({"max_new_tokens": 1} | arguments))


@pytest.mark.parametrize(("batch", "capacity"), [(0, 4), (1, 0), (1, -98), (1, 2.5), (True, 4)])
def test_a_cache_without_room_is_refused(tiny_model, batch, capacity):
    with pytest.raises(InputError, match="expected an integer of at least 1"):
        tiny_model.empty_cache(batch, capacity)


def test_padding_may_have_an_id_without_an_embedding(tiny_model):
    """Of a `[PAD]` that was added to the tokenizer: the mask says that nobody reads it, and it comes back."""
    ids, mask = np.array([[61, 99, 5, 6], [3, 4, 5, 6]]), [[0, 0, 1, 1], [1, 1, 1, 1]]
    tokens, _ = tiny_model.generate(ids, 6, attention_mask=mask)
    known = tiny_model.generate(np.where(ids > 60, 0, ids), 6, attention_mask=mask)[0]
    np.testing.assert_array_equal(tokens, np.concatenate([ids, known[:, 4:]], axis=1))
    assert tokens.dtype == np.int32
    with pytest.raises(InputError, match="holds 3 to 99; expected ids from 0 to 60"):
        tiny_model.generate(ids, 6, attention_mask=[[0, 1, 1, 1], [1, 1, 1, 1]])


def test_the_checkpoints_end_ids_go_before_those_of_its_config(tiny_model):
    config = dataclasses.replace(tiny_model.config, eos_token_id=5, pad_token_id=6)
    defaults = GenerationDefaults(1, (END, OTHER_END), 99, Sampling(temperature=5.0))  # no embedding has id 99
    model = dataclasses.replace(tiny_model, config=config, generation_defaults=defaults)
    tokens, _ = model.generate(PROMPT, 4, step=scripted([5, END, 5, 5], [7, 7, OTHER_END, 7]), carry=jnp.int32(0))
    np.testing.assert_array_equal(tokens[:, 3:], [[5, END, END], [7, 7, OTHER_END]])
    assert model.special_token_ids == (1, 2, 5, 6, 9, 99)


def test_what_a_checkpoint_recommends_is_used_only_if_asked_for(tiny_model):
    hot = GenerationDefaults(None, (), None, Sampling(temperature=9.0))
    model = dataclasses.replace(tiny_model, generation_defaults=hot)
    np.testing.assert_array_equal(model.generate(PROMPT, 8)[0], tiny_model.generate(PROMPT, 8)[0])
    assert (model.generate(PROMPT, 8, sampling=model.generation.sampling)[0] != tiny_model.generate(PROMPT, 8)[0]).any()


def test_texts_of_different_lengths_go_on_as_each_alone(make_model, padded_texts):
    """Left padding, and texts that end early, leave the others alone and run nothing."""
    model = make_model(eos_token_id=END)
    ids, mask = padded_texts("left")
    ends = int(model.generate(ids[:1], 1)[0][0, -1])  # so that the first text ends at once, and the others later
    model = make_model(eos_token_id=ends)
    watched = (jnp.int32(0), jnp.zeros((12, 3), bool), jnp.zeros(12, jnp.int32))
    watching = Watching(PlainStep(model.params, model.network))
    together, (calls, masks, _) = model.generate(ids, 12, attention_mask=mask, step=watching, carry=watched)
    assert calls > 2 and masks[1:, 1:].any() and not masks[:, 0].any()
    for row in range(3):
        text = ids[row : row + 1, mask[row].astype(bool)]
        alone, _ = model.generate(text, 12)
        new = together[row, ids.shape[1] :]
        np.testing.assert_array_equal(new[: alone.shape[1] - text.shape[1]], alone[0, text.shape[1] :])
        assert (new[alone.shape[1] - text.shape[1] :] == ends).all()  # without a padding id, the end id fills


@pytest.mark.parametrize("several", [1, 5, 16])
def test_the_number_of_tokens_per_dispatch_changes_nothing_but_the_dispatches(make_model, padded_texts, several):
    model = make_model()
    ids, mask = padded_texts("left")
    times, step = iter(range(100)), Watching(PlainStep(model.params, model.network))
    watched = (jnp.int32(0), jnp.zeros((12, 3), bool), jnp.zeros(12, jnp.int32))
    options = {"attention_mask": mask, "sampling": Sampling(temperature=1.0, seed=3)}
    expected = model.generate(ids, 12, **options)[0]
    again, (calls, _, moments) = model.generate(
        ids,
        12,
        step=step,
        carry=watched,
        clock=lambda: np.int32(next(times)),
        tokens_per_dispatch=several,
        **options,
    )
    np.testing.assert_array_equal(again, expected)
    assert calls == 12 and moments.tolist() == list(range(12))  # each step is told a time of its own


def test_rows_of_padding_without_an_end_are_filled_to_the_last_token(tiny_model):
    tokens, _ = tiny_model.generate(np.zeros((2, 3), int), 5, attention_mask=np.zeros((2, 3), int))
    assert not tiny_model.generation.end_ids and tokens.tolist() == [[0] * 8] * 2


def test_a_dispatch_makes_several_tokens(tiny_model, monkeypatch):
    dispatched = []
    for name, program in (("_first", _first), ("_next", _next)):
        counted = partial(lambda run, *given, **named: (dispatched.append(run), run(*given, **named))[1], program)
        monkeypatch.setattr(generation, name, counted)
    tiny_model.generate(PROMPT, 65)
    assert dispatched == [_first] + [_next] * 4


def test_capacities_have_few_sizes_and_enough_room():
    capacities = [roomy(positions) for positions in range(1, 5000)]
    assert all(0 <= room - need <= max(need / 4, 63) for need, room in enumerate(capacities, start=1))
    assert len(set(capacities)) < 30


def test_a_row_of_padding_fills_a_batch_and_changes_nothing(tiny_model):
    ids = np.concatenate([PROMPT, np.zeros_like(PROMPT[:1])])
    mask = np.array([[1, 1, 1], [1, 1, 1], [0, 0, 0]])
    tokens, _ = tiny_model.generate(ids, 5, attention_mask=mask)
    np.testing.assert_array_equal(tokens[:2], tiny_model.generate(PROMPT, 5)[0])
    assert tiny_model.config.pad_token_id is None and not tiny_model.config.eos_token_ids
    assert (tokens[2] == 0).all()  # what fills where the model names no id


def test_a_seed_for_each_text_draws_it_alike_in_any_batch(tiny_model):
    def drawn(rows, seeds):
        return tiny_model.generate(PROMPT[rows], 8, sampling=Sampling(temperature=1.0, seed=seeds))[0].tolist()

    together = drawn([0, 1], (5, 6))
    assert [*drawn([0], (5,)), *drawn([1], (6,))] == together == drawn([1, 0], (6, 5))[::-1]
    assert drawn([0, 1], (7, 8)) != together
    with pytest.raises(ValueError, match="1 seeds for 2 texts"):
        drawn([0, 1], (5,))
