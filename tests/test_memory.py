"""What a training step keeps: the inputs and one state a chunk between the passes, and memory linear in T at its peak."""

import jax
import jax.numpy as jnp
import numpy as np

import kda_jax as kda

from .common import FLAGS

BATCH, HEADS, VALUE_HEADS, DIM, CHUNK = 1, 1, 2, 64, 64
FLOAT = 4  # bytes


def _inputs(tokens: int):
    f = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    q = f(BATCH, tokens, HEADS, DIM)
    v = f(BATCH, tokens, VALUE_HEADS, DIM)
    gate = kda.Softplus(f(VALUE_HEADS), f(VALUE_HEADS, DIM))
    state = f(BATCH, VALUE_HEADS, DIM, DIM)
    return {"q": q, "k": q, "v": v, "g": v, "beta": f(BATCH, tokens, VALUE_HEADS), "gate": gate, "initial_state": state}


def _forward(inputs, **options):
    return kda.chunk(**inputs, **FLAGS, chunk_size=CHUNK, **options)


def _loss(inputs):
    o, state = _forward(inputs)
    return jnp.sum(o * o) + jnp.sum(state * state)


def _peak(tokens: int) -> int:
    """Bytes of a training step beyond its arguments and results."""
    compiled = jax.jit(jax.value_and_grad(_loss)).lower(_inputs(tokens)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_peak_is_linear_in_tokens_and_far_below_a_state_a_token():
    lengths = np.asarray([1024, 2048, 4096])
    # In floats a token and value head.
    per_token = np.asarray([_peak(tokens) for tokens in lengths]) / lengths / FLOAT / VALUE_HEADS / BATCH
    assert per_token.max() < 1.1 * per_token.min()
    # What a token may cost: tensors as wide as an input (inputs in chunk order, activations, outputs, their cotangents), two
    # C x C products a token's share of which is C wide, and its share of the chunk's state.
    wide, products, state = 24 * DIM, 4 * CHUNK, DIM * DIM / CHUNK
    assert per_token.max() < wide + products + state
    assert per_token.max() < DIM * DIM / 2  # a state a token would be DIM * DIM


def test_residuals_are_the_inputs_and_one_state_a_chunk():
    tokens = 300
    inputs = _inputs(tokens)
    arrays = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), inputs)
    _, pull = jax.vjp(_forward, arrays)
    kept = sorted(x.shape for x in jax.tree.leaves(pull))
    states = (BATCH, -(-tokens // CHUNK), VALUE_HEADS, DIM, DIM)
    assert kept == sorted([*(x.shape for x in jax.tree.leaves(inputs)), states])


def test_saved_intermediates_are_what_is_documented():
    """6 K + 6 chunk_size bytes a token and value head in half precision, and less than a tenth of that beside."""
    tokens = 4 * CHUNK

    def kept(save):
        pull = jax.eval_shape(
            lambda inputs: jax.vjp(lambda x: _forward(x, save_intermediates=save), inputs)[1], _inputs(tokens)
        )
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pull))

    documented = tokens * VALUE_HEADS * (6 * DIM + 6 * CHUNK)
    assert documented <= kept(True) - kept(False) < 1.1 * documented
