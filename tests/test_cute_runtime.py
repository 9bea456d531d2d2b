"""CuTe's runtime library: found, checked, or an error that says what to do."""

import pathlib
import subprocess
import sys

import pytest

from kda_jax.cute import runtime
from kda_jax.cute.runtime import RuntimeLibraryError


def test_an_installed_one_is_found(monkeypatch):
    pytest.importorskip("nvidia_cutlass_dsl")
    monkeypatch.delenv("KDA_CUTE_RUNTIME", raising=False)
    assert runtime.find().name == runtime.LIBRARY


def test_a_named_one_comes_first(monkeypatch, tmp_path):
    (tmp_path / "mine.so").touch()
    monkeypatch.setenv("KDA_CUTE_RUNTIME", str(tmp_path / "mine.so"))
    assert runtime.find() == tmp_path / "mine.so"


def test_a_path_to_nothing_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("KDA_CUTE_RUNTIME", str(tmp_path / "none.so"))
    with pytest.raises(RuntimeLibraryError, match=r"KDA_CUTE_RUNTIME is .*none.so; it must be the path of"):
        runtime.find()


def test_without_one_it_says_what_to_install(monkeypatch):
    monkeypatch.delenv("KDA_CUTE_RUNTIME", raising=False)
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeLibraryError, match=r"pip install 'kda-jax\[cute\]'.*KDA_CUTE_RUNTIME"):
        runtime.find()


def test_a_file_that_is_no_library_is_refused(tmp_path):
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(RuntimeLibraryError, match=r"text\.so"):
        runtime.load(tmp_path / "text.so")


def test_a_library_of_another_protocol_is_refused():
    import _ctypes

    with pytest.raises(RuntimeLibraryError, match=r"has no CuteDSLRT_NvJaxCutlassCallInstantiate_v2.* 4\.8 or later"):
        runtime.load(pathlib.Path(_ctypes.__file__))


def test_the_installed_one_speaks_the_protocol():
    """In a process of its own: a library is not unloaded."""
    pytest.importorskip("nvidia_cutlass_dsl")
    code = "from kda_jax.cute import runtime; print(runtime.load(runtime.find()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if "libcuda" in done.stderr:
        pytest.skip("the library wants a driver")
    assert "CDLL" in done.stdout, done.stderr
