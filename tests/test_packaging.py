"""What is installed: the wheel, the editable install, and what the base import pulls in."""

import inspect
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import kda_jax as kda

ROOT = Path(__file__).parent.parent


def _python(code: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)


def _packages() -> set[str]:
    """The packages that the folders with Python files stand for."""
    found = set()
    for top, name in (("kda_jax", "kda_jax"), ("kernels", "kda_jax.kernels")):
        for file in (ROOT / top).rglob("*.py"):
            found.add(".".join((name, *file.parent.relative_to(ROOT / top).parts)))
    return found


def test_every_folder_with_python_files_is_a_listed_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(settings["packages"]) == _packages()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> list[str]:
    """The names in a wheel built from a copy of the sources, with the build tools that are installed."""
    pytest.importorskip("setuptools", minversion="77")
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("kda_jax", "kernels"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, folder / "source"]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path).namelist()


def test_wheel_holds_one_top_level_package(wheel):
    tops = {name.split("/")[0] for name in wheel if ".dist-info/" not in name}
    assert tops == {"kda_jax"}


def test_wheel_holds_every_module_and_the_type_marker(wheel):
    expected = {f"kda_jax/{file.relative_to(ROOT / 'kda_jax')}" for file in (ROOT / "kda_jax").rglob("*.py")}
    expected |= {f"kda_jax/kernels/{file.relative_to(ROOT / 'kernels')}" for file in (ROOT / "kernels").rglob("*.py")}
    assert expected | {"kda_jax/py.typed"} <= set(wheel)


def test_kernels_are_importable_from_anywhere_and_under_one_name(tmp_path):
    found = _python("import kda_jax.kernels; print(kda_jax.kernels.__name__)", tmp_path)
    assert (found.stdout.strip(), found.returncode) == ("kda_jax.kernels", 0), found.stderr
    assert "ModuleNotFoundError" in _python("import kernels", tmp_path).stderr


def test_base_import_pulls_in_jax_and_numpy_alone(tmp_path):
    code = "import sys, kda_jax; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = _python(code, tmp_path).stdout.split()
    assert "kda_jax" in loaded
    assert not {"flax", "optax", "orbax", "matplotlib", "tqdm", "hypothesis", "pytest"} & set(loaded)


@pytest.mark.parametrize("name", ["oracle", "oracle_q8_0", "tolerances"])
def test_oracle_and_tolerances_need_numpy_alone(name, tmp_path):
    code = f"import sys, runpy; runpy.run_path({str(ROOT / 'kda_jax' / 'testing' / name)!r} + '.py'); print(*sys.modules)"
    found = _python(code, tmp_path)
    assert found.returncode == 0, found.stderr
    assert "jax" not in found.stdout.split()


@pytest.mark.parametrize("name", [name for name in dir(kda) if not name.startswith("_")])
def test_public_names_are_documented(name):
    x = getattr(kda, name)
    if inspect.ismodule(x):  # a subpackage that something else imported
        return
    doc = inspect.getdoc(x)
    assert doc
    if inspect.isfunction(x):
        for parameter in inspect.signature(x).parameters:
            assert parameter in doc
        assert all(f"{section}:" in doc for section in ("Args", "Returns", "Raises"))
