"""CuTe DSL's runtime library: the code behind XLA's custom call. Nothing else of CuTe is needed to run a compiled kernel."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import pathlib
from typing import Any

import jax

from kda_jax._operands import Unavailable

LIBRARY = "libcute_dsl_runtime.so"
TARGET = "CuteDSLRT_NvJaxCutlassCall_v2"
_STATE = "CuteDSLRT_NvJaxCutlassCallTypes_v2"
_STAGES = {stage: f"CuteDSLRT_NvJaxCutlassCall{stage.title()}_v2" for stage in ("instantiate", "prepare", "execute")}
_STATE_PARTS = {
    "type_id": "CuteDSLRT_NvJaxCutlassCallStateTypeId_v2",
    "type_info": "CuteDSLRT_NvJaxCutlassCallStateTypeInfo_v2",
}


class RuntimeLibraryError(Unavailable):
    """The library is missing, or of a version that speaks another protocol."""


def find() -> pathlib.Path:
    """KDA_CUTE_RUNTIME, else the one of the installed nvidia-cutlass-dsl.

    Raises:
      RuntimeLibraryError: there is none.
    """
    if given := os.environ.get("KDA_CUTE_RUNTIME"):
        if not pathlib.Path(given).is_file():
            raise RuntimeLibraryError(f"KDA_CUTE_RUNTIME is {given}; it must be the path of {LIBRARY}, and there is no file")
        return pathlib.Path(given)
    package = importlib.util.find_spec("nvidia_cutlass_dsl")
    for root in (package.submodule_search_locations or ()) if package else ():
        for folder in ("cu13", "cu12"):
            if (path := pathlib.Path(root) / folder / "lib" / LIBRARY).is_file():
                return path
    raise RuntimeLibraryError(
        f"there is no {LIBRARY}: pip install 'kda-jax[cute]', or give the path of a copy in KDA_CUTE_RUNTIME"
    )


def load(path: pathlib.Path) -> ctypes.CDLL:
    """Raises RuntimeLibraryError for a file that is no library, or lacks the protocol that the kernels are compiled for."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise RuntimeLibraryError(f"{path}: {error}") from error
    if missing := [name for name in (*_STAGES.values(), *_STATE_PARTS.values()) if not hasattr(library, name)]:
        raise RuntimeLibraryError(f"{path}: has no {', '.join(missing)}; it must be of nvidia-cutlass-dsl 4.8 or later")
    return library


@functools.cache
def register() -> None:
    """Makes the custom call's target known to XLA."""
    library = load(find())

    def function(name: str) -> Any:
        found = getattr(library, name)
        found.restype = ctypes.c_void_p
        return found

    state: Any = {part: jax.ffi.pycapsule(function(name)()) for part, name in _STATE_PARTS.items()}
    jax.ffi.register_ffi_type(_STATE, state, platform="CUDA")
    stages = {stage: jax.ffi.pycapsule(function(name)) for stage, name in _STAGES.items()}
    jax.ffi.register_ffi_target(TARGET, stages, platform="CUDA")
