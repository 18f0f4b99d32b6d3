"""VAR around a Mixture-of-Experts layer of your own. It needs nothing but jax, numpy and varjax.

The layer asks `varjax.resolve` which experts to run; everything else happens outside of it.
"""

import jax
import jax.numpy as jnp
import numpy as np

import varjax

VOCABULARY, HIDDEN, EXPERTS, TOP_K, ORDERS = 50, 32, 8, 2, (1, 2)


def moe_layer(params, ids, plan=None):
    """One layer in plain JAX: its output [B, T, D], gate, routing and weighted expert outputs [B, T, K, D]."""
    previous = jnp.pad(ids, ((0, 0), (1, 0)))[:, :-1]
    x = params["embed"][ids] + params["embed"][previous] / 2  # a hidden state: the token and what came before it
    gate = jax.nn.softmax(x @ params["gate"], axis=-1)
    routing, dropped = varjax.resolve(gate, TOP_K, plan)  # which experts run, and what stands in for the others
    outputs = jnp.tanh(jnp.einsum("btd,btkdf->btkf", x, params["experts"][routing.experts]))
    outputs *= routing.weights[..., None]
    answered = 0 if plan is None else plan.answers.total(dropped)
    return outputs.sum(axis=-2) + answered, gate, routing, outputs


def main(use_answers=True):
    """Print and return the experts per token and the relative error of the layer's output on unseen texts."""
    rng = np.random.default_rng(0)
    shapes = {"embed": (VOCABULARY, HIDDEN), "gate": (HIDDEN, EXPERTS), "experts": (EXPERTS, HIDDEN, HIDDEN)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) / 3 for name, shape in shapes.items()}
    zipf = 1 / np.arange(1, VOCABULARY + 1)
    texts = rng.choice(VOCABULARY, p=zipf / zipf.sum(), size=(96, 64)).astype(np.int32)
    known, unseen = texts[:64], jnp.asarray(texts[64:])

    # 1. Count contexts, and collect what the router and the experts do at the frequent ones. Axes of layers come first.
    keys = varjax.count_contexts(known, ORDERS, min_count=4).keys
    stats = varjax.RoutingStats.empty(keys, ORDERS, num_layers=1, num_experts=EXPERTS)
    answers = varjax.Answers.empty(keys, (0,), EXPERTS, HIDDEN)
    _, gate, routing, outputs = jax.tree.map(lambda leaf: leaf[None], moe_layer(params, known))
    find, mask = varjax.keys.find_rows, jnp.ones(known.shape, bool)
    rows = find(varjax.keys.KeyIndex.build(stats.keys), known, ORDERS)
    stats = varjax.stats.absorb(varjax.stats.update(varjax.stats.init(stats), rows, gate, mask), stats)
    rows = find(varjax.keys.KeyIndex.build(answers.keys), known, answers.ngram_orders)
    sums = varjax.answers.update(varjax.answers.init(answers), rows, outputs, routing, mask)
    answers = varjax.answers.absorb(sums, answers)

    # 2. A table: where it knows the context one expert runs, and an answer stands in for the other.
    policy = varjax.LayerPolicy(experts_kept=1, use_answers=use_answers, ngram_orders=ORDERS)
    config = varjax.VARConfig(frequency_threshold=4, entropy_threshold=3.0, default=policy)
    table = varjax.build_table(config, stats, answers, top_k=TOP_K)

    # 3. Plan all layers from the token ids, run, and let the cached tier learn.
    settings, state = varjax.Settings.of(config, 1), varjax.init(table, config, batch_size=len(unseen))
    plan = varjax.plan(table, state, unseen, 0.0, settings)
    y, gate, routing, _ = jax.tree.map(lambda leaf: leaf[None], moe_layer(params, unseen, plan.layer(0)))
    state = varjax.commit(state, plan, unseen, routing, gate, 0.0, settings)

    full = moe_layer(params, unseen)[0]
    experts, error = (routing.experts < EXPERTS).sum(-1).mean(), jnp.linalg.norm(y - full) / jnp.linalg.norm(full)
    print(f"experts per token: {experts:.2f} of {TOP_K}; relative error of the layer's output: {error:.3f}")
    return float(experts), float(error)


if __name__ == "__main__":
    main()
