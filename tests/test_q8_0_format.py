"""kda.q8_0: the format, bit for bit against GGUF's own package."""

import inspect

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kda_jax import q8_0
from kda_jax._q8_0_format import blocks, quantize_blocks
from kda_jax.testing import oracle_q8_0

from .common import assert_equal
from .quantised import draw

Q8_0 = gguf.GGMLQuantizationType.Q8_0


def of_gguf(w):
    """GGUF's bytes and numbers. It warns of the scales that float16 has no number for."""
    with np.errstate(all="ignore"):
        packed = gguf.quants.quantize(w, Q8_0)
        return packed, gguf.quants.dequantize(packed, Q8_0)


def normal(magnitude):
    return np.asarray(draw(17, 320), np.float32) * np.float32(magnitude)


def ties():
    """Blocks with a scale of 1 and numbers half way between two integers."""
    w = np.arange(-127, 128, dtype=np.float32)[: 7 * 32].reshape(7, 32) + np.float32(0.5)
    w[:, 0] = 127
    return np.clip(w, -127, 127)


WEIGHTS = {
    "random": normal(1),
    "zero": np.zeros((3, 64), np.float32),
    "ties": ties(),
    "subnormal-scale": normal(1e-5),  # in float16
    "zero-scale": normal(1e-9),
    "tiny": normal(1e-35),
    "scale-is-largest": normal(1.5e6),
    "huge": normal(5e37),  # an infinite scale in float16
    "all-magnitudes": normal(1) * np.float32(10) ** np.random.default_rng(3).integers(-30, 8, (17, 320)).astype(np.float32),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("jit", [False, True])
def test_the_format_is_ggufs_bit_for_bit(name, jit):
    w = WEIGHTS[name]
    packed, numbers = of_gguf(w)
    quantised = (jax.jit(q8_0.quantize) if jit else q8_0.quantize)(w)
    np.testing.assert_array_equal(q8_0.to_gguf(quantised), packed)
    np.testing.assert_array_equal(q8_0.dequantize(quantised), numbers)
    assert_equal(q8_0.from_gguf(packed), quantised)


@pytest.mark.parametrize("magnitude", [1, 1e-35, 1e-36, 1e37])
def test_activations_keep_a_float32_scale(magnitude):
    """Exactly: XLA's product with the reciprocal of 127 would differ from the quotient in the last bit."""
    x = draw(1000, 96) * np.float32(magnitude)
    scales, values = jax.jit(lambda x: quantize_blocks(blocks(x)))(x)
    expected = oracle_q8_0.quantize(x)
    assert_equal((scales, values), (expected[0], expected[1].astype(np.int8)))


def test_blocks_of_next_to_nothing_are_zero():
    """There 1 / scale overflows in GGUF's package too, or the result is multiplied by a scale of zero."""
    quantised = q8_0.quantize(normal(1e-38))
    assert not quantised.values.any()
    assert not quantised.scales.any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_of_other_dtypes_are_quantised_as_their_float32(dtype):
    w = draw(5, 64, dtype=dtype)
    quantised = q8_0.quantize(w)
    assert_equal(quantised, q8_0.quantize(w.astype(jnp.float32)))
    assert_equal(q8_0.dequantize(quantised, dtype), q8_0.dequantize(quantised).astype(dtype))


def test_gguf_bytes():
    packed, _ = of_gguf(normal(1))
    array = np.random.default_rng(0).integers(0, 256, packed.shape, dtype=np.uint8)  # any bytes, NaN scales among them
    for data in (array, array.tobytes(), array.ravel()):
        w = q8_0.from_gguf(data, shape=(17, 320))
        assert (w.shape, w.scales.shape, w.scales.dtype, w.values.dtype) == ((17, 320), (17, 10), "float16", "int8")
        np.testing.assert_array_equal(q8_0.to_gguf(w), array)


def test_a_short_last_block():
    """It is the block with zeros behind it, and is stored without them."""
    w = draw(7, 100)
    short, full = q8_0.quantize(w), q8_0.quantize(jnp.pad(w, ((0, 0), (0, 28))))
    assert (short.shape, short.scales.shape) == ((7, 100), (7, 4))
    assert_equal((short.scales, short.values), (full.scales, full.values[:, :100]))
    assert_equal(q8_0.dequantize(short), q8_0.dequantize(full)[:, :100])


W = q8_0.quantize(draw(3, 100))
ERRORS = [
    ("quantize", {"w": np.zeros(3, "float32")}, ValueError, r"w has shape \(3,\), 1 axes; it must be \[OUT, IN\]"),
    ("quantize", {"w": np.zeros((3, 4), "int8")}, TypeError, "w has dtype int8; it must be float32, bfloat16 or float16"),
    ("dequantize", {"w": W, "dtype": "int8"}, TypeError, "dtype is int8; it must be a floating one"),
    ("to_gguf", {"w": W}, ValueError, r"w has shape \(3, 100\) with input size IN=100; .* multiple of 32"),
    ("from_gguf", {"data": np.zeros((3, 34))}, TypeError, "data has dtype float64; it must be bytes or uint8"),
    ("from_gguf", {"data": b"0" * 34}, ValueError, r"shape \(34,\); without shape it must be \[OUT, BLOCKS \* 34\]"),
    ("from_gguf", {"data": b"0" * 34, "shape": (1, 40)}, ValueError, r"shape is \(1, 40\); .* IN a multiple of 32"),
    ("from_gguf", {"data": b"0" * 35, "shape": (1, 32)}, ValueError, r"data has 35 bytes; .* it must have 34"),
]


@pytest.mark.parametrize(("name", "arguments", "error", "message"), ERRORS)
def test_errors_name_the_argument(name, arguments, error, message):
    with pytest.raises(error, match=f"^q8_0.{name}: .*{message}"):
        getattr(q8_0, name)(**arguments)


@pytest.mark.parametrize(
    "name", ["Weight", "quantize", "dequantize", "from_gguf", "to_gguf", "matmul", "matmul_pair", "matmul_hc_expand"]
)
def test_public_names_are_documented(name):
    x = getattr(q8_0, name)
    doc = inspect.getdoc(x)
    parameters = inspect.signature(x).parameters
    assert all(parameter in doc for parameter in parameters)
    if inspect.isfunction(x):
        assert all(f"{section}:" in doc for section in ("Args", "Returns", "Raises"))
