"""Every error message: raised before anything is traced further, it names the call, the argument, what it got and what it
must be."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kda_jax as kda
from kda_jax.testing.cases import Case

from .common import arrays

CASE = Case("valid", batch=2, tokens=4, heads=2, value_heads=4, k_dim=8, v_dim=16)
CALLS = {
    "kda.chunk": (kda.chunk, arrays(CASE, "chunk")),
    "kda.decode": (kda.decode, arrays(CASE, "decode")),
    "kda.decode_mtp": (kda.decode_mtp, arrays(CASE, "draft")),
    "kda.verify": (kda.verify, arrays(CASE, "draft")),
}
_DRAFT = arrays(CASE, "draft")
_UPDATE = kda.Update(_DRAFT["v"], _DRAFT["k"], _DRAFT["g"])
CALLS["kda.flush"] = (kda.flush, {"state": _DRAFT["state"], "update": _UPDATE, "num_accepted": [1, 4]})
CALLS["kda.flush_layers"] = (
    kda.flush_layers,
    {"states": _DRAFT["state"][None], "updates": jax.tree.map(lambda x: x[None], _UPDATE), "num_accepted": [1, 4]},
)
CHUNK, DECODE, MTP, VERIFY, FLUSH, LAYERS = ([name] for name in CALLS)
POOLS = [*DECODE, *MTP, *VERIFY]
TOKENS = [*CHUNK, *POOLS]


def zeros(*shape, dtype="float32"):
    return np.zeros(shape, dtype)


def update(**changes):
    return kda.Update(**{name: getattr(_UPDATE, name) for name in "ukg"} | changes)


def rejects(calls, error, message, **changes):
    """One row of the table: what every call of ``calls`` says of ``changes`` to its valid arguments; " ... " is any text."""
    return [pytest.param(call, changes, error, message, id=f"{call}-{message}") for call in calls]


def check(call, changes, error, message, run=lambda f, given: f(**given)):
    function, valid = CALLS[call]
    pattern = ".*".join(map(re.escape, message.split(" ... ")))
    with pytest.raises(error, match=f"^{re.escape(call)}: .*{pattern}"):
        run(function, valid | changes)


def test_the_valid_calls_are_valid():
    for function, valid in CALLS.values():
        for x in jax.tree.leaves(function(**valid)):
            assert jnp.isfinite(x).all()


TYPES = [
    *rejects(TOKENS, TypeError, "q is a list ... must be an array [ ... H, K]", q=[1.0]),
    *rejects(TOKENS, TypeError, "beta is a float ... must be an array [", beta=0.5),
]

SHAPES = [
    *rejects(
        TOKENS, TypeError, "v has dtype int32 ... must be bfloat16, float16, float32 or float64", v=zeros(2, dtype="int32")
    ),
    *rejects(
        POOLS, TypeError, "state has dtype float16 ... must be float32, bfloat16 or float64", state=zeros(1, dtype="float16")
    ),
    *rejects(TOKENS, ValueError, "k has shape (2, 8), 2 axes ... must be [", k=zeros(2, 8)),
    *rejects(POOLS, ValueError, "state has shape (2, 4, 16), 3 axes ... must be [P, HV, V, K]", state=zeros(2, 4, 16)),
    *rejects(POOLS, ValueError, "state ... value head dimension V=8 ... V must be 16, as in v", state=zeros(2, 4, 8, 8)),
    *rejects(POOLS, ValueError, "state ... head dimension K=16 ... K must be 8, as in q", state=zeros(2, 4, 16, 16)),
    *rejects(POOLS, ValueError, "state ... value head count HV=2 ... HV must be 4, as in v", state=zeros(2, 2, 16, 8)),
    *rejects(DECODE, ValueError, "k [N, H, K] ... head dimension K=4 ... K must be 8, as in q", k=zeros(2, 2, 4)),
    *rejects(DECODE, ValueError, "k [N, H, K] ... head count H=1 ... H must be 2, as in q", k=zeros(2, 1, 8)),
    *rejects(DECODE, ValueError, "g [N, HV, K] ... row count N=3 ... N must be 2, as in q", g=zeros(3, 4, 8)),
    *rejects(
        DECODE,
        ValueError,
        "v has head count HV=3 ... multiple of the head count H=2",
        v=zeros(2, 3, 16),
        g=zeros(2, 3, 8),
        beta=zeros(2, 3),
    ),
    *rejects(
        CHUNK,
        ValueError,
        "v has head count HV=3 ... multiple of the head count H=2",
        v=zeros(2, 4, 3, 16),
        g=zeros(2, 4, 3, 8),
        beta=zeros(2, 4, 3),
    ),
    *rejects(CHUNK, ValueError, "k [B, T, H, K] ... token count T=3 ... T must be 4, as in q", k=zeros(2, 3, 2, 8)),
    *rejects(CHUNK, ValueError, "v [B, T, HV, V] ... batch size B=1 ... B must be 2, as in q", v=zeros(1, 4, 4, 16)),
    *rejects(CHUNK, ValueError, "q [B, T, H, K] ... token count T=0 ... must be at least 1", q=zeros(2, 0, 2, 8)),
    *rejects(
        CHUNK, ValueError, "initial_state ... sequence count S=1 ... S must be 2, as in q", initial_state=zeros(1, 4, 16, 8)
    ),
    *rejects(DECODE, ValueError, "q [N, H, K] ... head count H=0 ... must be at least 1", q=zeros(2, 0, 8)),
]

OPTIONS = [
    *rejects(TOKENS, TypeError, "gate is a str ... must be None ... kda.Softplus or kda.LowerBound", gate="softplus"),
    *rejects(TOKENS, TypeError, "gate.A_log is a float ... must be an array [HV]", gate=kda.Softplus(0.0)),
    *rejects(
        TOKENS, ValueError, "gate.A_log ... value head count HV=2 ... HV must be 4, as in v", gate=kda.Softplus(zeros(2))
    ),
    *rejects(TOKENS, ValueError, "gate.dt_bias has shape (4,) ... [HV, K]", gate=kda.LowerBound(zeros(4), zeros(4))),
    *rejects(TOKENS, TypeError, "qk_l2norm is 1 ... must be True or False", qk_l2norm=1),
    *rejects(TOKENS, TypeError, "beta_sigmoid is None ... must be True or False", beta_sigmoid=None),
    *rejects(TOKENS, TypeError, "allow_neg_eigval is 'yes' ... must be True or False", allow_neg_eigval="yes"),
    *rejects(TOKENS, ValueError, "allow_neg_eigval is True with beta_sigmoid False ... must be True", allow_neg_eigval=True),
    *rejects(TOKENS, TypeError, "scale is '1' ... must be None ... finite Python number", scale="1"),
    *rejects(TOKENS, TypeError, "scale is inf ... must be None ... finite Python number", scale=float("inf")),
    *rejects(
        [*TOKENS, *FLUSH],
        ValueError,
        "implementation is 'cuda' ... None or one of 'xla' ... 'triton'",
        implementation="cuda",
    ),
    *rejects(
        [*CHUNK, *MTP, *VERIFY, *FLUSH],
        NotImplementedError,
        "implementation is 'pallas' ... does not have ... None or one of ... 'xla'",
        implementation="pallas",
    ),
    *rejects(VERIFY, TypeError, "with_update is 0 ... must be True or False", with_update=0),
    *rejects(CHUNK, ValueError, "chunk_size is 48 ... must be 16, 32, 64 or 128", chunk_size=48),
    *rejects(CHUNK, ValueError, "chunk_size is '64' ... must be 16, 32, 64 or 128", chunk_size="64"),
    *rejects(CHUNK, ValueError, "chunk_size is 64.0 ... must be 16, 32, 64 or 128", chunk_size=64.0),
]

INDICES = [
    *rejects(
        [*POOLS, *FLUSH], ValueError, "state has slot count P=3 for N=2 rows ... must be equal", state=zeros(3, 4, 16, 8)
    ),
    *rejects([*POOLS, *FLUSH], ValueError, "state_indices names slot 1 2 times ... a slot of its own", state_indices=[1, 1]),
    *rejects(
        [*POOLS, *FLUSH], TypeError, "state_indices has dtype float64 ... must hold integers", state_indices=[0.0, 1.0]
    ),
    *rejects([*POOLS, *FLUSH], ValueError, "state_indices ... row count N=3 ... N must be 2", state_indices=[0, 1, -1]),
    *rejects(
        [*POOLS, *FLUSH], ValueError, "state_indices has shape (2, 1), 2 axes ... must be [N]", state_indices=[[0], [1]]
    ),
    *rejects(MTP, ValueError, "state_indices is None with num_accepted given ... must then be [N, T]", num_accepted=[1, 1]),
    *rejects(
        MTP, ValueError, "state_indices has shape (2,), 1 axes ... must be [N, T]", num_accepted=[1, 1], state_indices=[0, 1]
    ),
    *rejects(
        MTP,
        ValueError,
        "num_accepted is [0, 1] ... must lie in [1, T=4]",
        num_accepted=[0, 1],
        state_indices=-np.ones((2, 4), int),
    ),
    *rejects(
        MTP,
        ValueError,
        "num_accepted is [5, 5] ... must lie in [1, T=4]",
        num_accepted=5,
        state_indices=-np.ones((2, 4), int),
    ),
    *rejects(FLUSH, ValueError, "num_accepted is [-1, 4] ... must lie in [0, T=4]", num_accepted=[-1, 4]),
    *rejects(FLUSH, ValueError, "num_accepted is [5, 5] ... must lie in [0, T=4]", num_accepted=5),
    *rejects(FLUSH, TypeError, "num_accepted has dtype float64 ... must hold integers", num_accepted=1.5),
    *rejects(FLUSH, ValueError, "num_accepted ... row count N=3 ... N must be 2", num_accepted=[1, 2, 3]),
]

ONE = {name: x[:1] for name, x in CALLS["kda.chunk"][1].items() if name != "gate"}
TWO = {"initial_state": CALLS["kda.chunk"][1]["initial_state"]}
START = "must have two offsets or more, start at 0, not decrease, and end at most at T=4"
PACKED = [
    *rejects(CHUNK, ValueError, "q has batch size B=2 with cu_seqlens given ... need B = 1", cu_seqlens=[0, 4]),
    *rejects(
        CHUNK,
        TypeError,
        "cu_seqlens has dtype float64 ... must hold integers",
        **ONE,
        cu_seqlens=[0.0, 4.0],
    ),
    *rejects(CHUNK, ValueError, f"cu_seqlens is [1, 4] ... {START}", **ONE, cu_seqlens=[1, 4]),
    *rejects(CHUNK, ValueError, f"cu_seqlens is [0, 3, 2] ... {START}", **ONE, cu_seqlens=[0, 3, 2]),
    *rejects(CHUNK, ValueError, f"cu_seqlens is [0, 5] ... {START}", **ONE, cu_seqlens=[0, 5]),
    *rejects(CHUNK, ValueError, f"cu_seqlens is [0] ... {START}", **ONE, cu_seqlens=[0]),
    *rejects(
        CHUNK,
        ValueError,
        "initial_state ... sequence count S=2 ... S must be 1, as in cu_seqlens",
        **ONE | TWO,
        cu_seqlens=[0, 4],
    ),
]

UPDATES = [
    *rejects(FLUSH, TypeError, "update is a tuple ... must be the kda.Update", update=(1, 2, 3)),
    *rejects(FLUSH, TypeError, "update.u is a list ... must be an array [N, T, HV, V]", update=update(u=[1.0])),
    *rejects(
        FLUSH,
        TypeError,
        "update.k has dtype bfloat16 ... must be float32 or float64",
        update=update(k=jnp.zeros(1, "bfloat16")),
    ),
    *rejects(
        FLUSH, ValueError, "update.g ... token count T=3 ... T must be 4, as in update.u", update=update(g=zeros(2, 3, 4, 8))
    ),
    *rejects(FLUSH, ValueError, "state ... head dimension K=16 ... K must be 8, as in update.k", state=zeros(2, 4, 16, 16)),
    *rejects(FLUSH, ValueError, "head count HV=4 ... multiple of the head count H=3", update=update(k=zeros(2, 4, 3, 8))),
    *rejects(LAYERS, TypeError, "updates is a list ... must be a kda.Update", updates=[_UPDATE]),
    *rejects(LAYERS, TypeError, "states is a list ... must be an array [L, P, HV, V, K]", states=[1]),
    *rejects(LAYERS, ValueError, "updates.u has shape (2, 4, 4, 16), 4 axes ... must be [L, N, T, HV, V]", updates=_UPDATE),
    *rejects(
        LAYERS, ValueError, "updates.u ... layer count L=1 ... L must be 2, as in states", states=zeros(2, 2, 4, 16, 8)
    ),
    *rejects(LAYERS, ValueError, "num_accepted is [1, 5] ... must lie in [0, T=4]", num_accepted=[1, 5]),
    *rejects(LAYERS, NotImplementedError, "implementation is 'pallas' ... does not have", implementation="pallas"),
]


@pytest.mark.parametrize(("call", "changes", "error", "message"), [*TYPES, *SHAPES, *OPTIONS, *INDICES, *PACKED, *UPDATES])
def test_message(call, changes, error, message):
    check(call, changes, error, message)


@pytest.mark.parametrize(("call", "changes", "error", "message"), SHAPES)
def test_the_same_under_jit(call, changes, error, message):
    check(call, changes, error, message, run=lambda f, given: jax.jit(lambda given: f(**given))(given))


@pytest.mark.parametrize("lower_bound", [0.0, -5.5, 1.0, float("nan")])
def test_lower_bound(lower_bound):
    with pytest.raises(ValueError, match=rf"LowerBound: lower_bound is {lower_bound}; it must lie in \[-5, 0\)"):
        kda.LowerBound(zeros(4), None, lower_bound)


@pytest.mark.parametrize("call", POOLS)
def test_a_traced_scale_is_rejected(call):
    function, valid = CALLS[call]
    with pytest.raises(TypeError, match=r"scale is .*it must be None \(K \*\* -0.5\) or a finite Python number"):
        jax.jit(lambda scale: function(**valid, scale=scale))(1.0)


def test_indices_beyond_int32_are_padding():
    """An index outside [0, P) is padding; it may not wrap around into the pool."""
    function, valid = CALLS["kda.decode"]
    o, pool = function(**valid, state_indices=np.asarray([2**32, 1]))
    assert not o[0].any()
    np.testing.assert_array_equal(pool[0], valid["state"][0])
