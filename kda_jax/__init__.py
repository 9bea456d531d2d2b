"""Kimi Delta Attention (KDA) for JAX: chunkwise training and prefill, jitted decode and speculative (MTP) decode."""

from kda_jax import q8_0 as q8_0
from kda_jax._chunk import chunk as chunk
from kda_jax._decode import decode as decode
from kda_jax._decode_mtp import decode_mtp as decode_mtp
from kda_jax._flush import flush as flush
from kda_jax._flush import flush_layers as flush_layers
from kda_jax._gates import LowerBound as LowerBound
from kda_jax._gates import Softplus as Softplus
from kda_jax._target import cuda_target as cuda_target
from kda_jax._update import Update as Update
from kda_jax._verify import verify as verify
from kda_jax._version import __version__ as __version__
