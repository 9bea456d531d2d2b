"""Compiled CuTe kernels as files: built without a GPU, found at lowering, damaged, written by several at once."""

import collections
import concurrent.futures
import dataclasses
import functools
import json
import pathlib
import re
import subprocess
import time

import jax
import jax.numpy as jnp
import pytest

import kda_jax as kda
from kda_jax._operands import FlushOperands, FlushSpec, PoolOperands, Spec, VerifySpec
from kda_jax.cute import artifact, compiler, decode, elf, flush, store, verify
from kda_jax.cute.__main__ import MANIFEST, build, every_kernel
from kda_jax.cute.artifact import DamagedArtifactError, Kernel
from kda_jax.cute.call import ARCHITECTURES

from .common import DECODE, DECODE_MTP, DECODE_MTP_PAGED, FLUSH, VERIFY, on_cute, stack

CAPABILITIES = {"sm_90a": "9.0", "sm_100a": "10.0"}
CHOICES = {"K": 128, "V": 128, "STATE": "float32", "GATE": "softplus", "TOKEN": "bfloat16"}
OF_DECODE = CHOICES | {"FORM": "decode"}
KERNEL = Kernel("decode", tuple(OF_DECODE.items()), "sm_90a")
FIGURES = {"dsl": "4.8.1", "registers": 72, "stack": 0, "shared": 65568}


def of_decode(choices):
    source = pytest.importorskip("kda_jax.kernels.cute.decode")
    return [(32, source.at_once(choices["FORM"]))]


def of_verify(choices):
    """Its kernels for more than 8 tokens, which has most of everything else, and for fewer."""
    source = pytest.importorskip("kda_jax.kernels.cute.verify")
    K, V, STATE, TOKEN = (choices[name] for name in ("K", "V", "STATE", "TOKEN"))
    long = source.verify_long
    found = [(sum(long.warps_of(V, STATE)) * 32, long.at_once(K, V, STATE, TOKEN))]
    forms = [(source.TILES[STATE], source.at_once(K, STATE, TOKEN))]
    if source.wide_too(K, choices["UPDATE"]):
        forms.append((2 * source.TILES[STATE], source.at_once(K, STATE, TOKEN)))
    forms.append((source.FEW_PARTS * source.few_tiles(choices["UPDATE"]), 1))
    for tiles, at_once in forms:
        warps = V // (tiles * 8) + source.ways_of(K)
        found.append((warps * 32, at_once))
    return found


def of_flush(choices):
    source = pytest.importorskip("kda_jax.kernels.cute.flush")
    return [(128, source.AT_ONCE[choices["STATE"]]), (128, source.FEW_AT_ONCE)]


def spills(kernel):
    """For more than 8 tokens, and on Blackwell alone, where it was not run."""
    choices = {"K": 128, "STATE": "bfloat16", "GATE": "softplus", "TOKEN": "bfloat16", "UPDATE": True}
    return (kernel.name, kernel.arch) == ("verify", "sm_100a") and choices.items() <= dict(kernel.choices).items()


# Of each of its kernels the threads of a program, and the programs that are to share a multiprocessor.
RESIDENT = {
    "decode": of_decode,
    "verify": of_verify,
    "flush": of_flush,
}


# One gate each, but for those that are looked up: what a gate adds is the same code for every architecture.
GATES_OF_SM_100A = {
    (128, "bfloat16"): ("softplus",),
    (128, "float32"): ("none",),
    (64, "bfloat16"): ("none", "softplus", "lower_bound"),
    (64, "float32"): ("lower_bound",),
}


def kernels_to_build():
    """Every kernel for sm_90a, and for sm_100a those of these gates."""
    for kernel in every_kernel(list(ARCHITECTURES.values())):
        of = dict(kernel.choices)
        if kernel.arch == "sm_90a" or "GATE" not in of or of["GATE"] in GATES_OF_SM_100A[of["K"], of["TOKEN"]]:
            yield kernel


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A store built from nothing."""
    pytest.importorskip("cutlass")
    folder = tmp_path_factory.mktemp("store")
    kernels = list(kernels_to_build())
    assert build(kernels, folder, processes=2) == kernels
    return folder


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """No store but an empty cache, and nothing fetched before."""
    monkeypatch.setenv("KDA_CUTE_CACHE", str(tmp_path))
    monkeypatch.delenv("KDA_CUTE_STORE", raising=False)
    monkeypatch.setattr(store, "PACKAGED", tmp_path / "none")
    store._fetch.cache_clear()
    yield tmp_path
    store._fetch.cache_clear()


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(store, "can_compile", lambda: False)


def made(module=b"\x7fELF and more", kernel=KERNEL):
    return artifact.Artifact(kernel, module, FIGURES)


def test_manifest_says_what_was_built(built):
    entries = json.loads((built / MANIFEST).read_text())
    kernels = list(kernels_to_build())
    assert [entry["file"] for entry in entries] == [kernel.filename for kernel in kernels]
    for kernel, entry in zip(kernels, entries, strict=True):
        assert entry["choices"] == dict(kernel.choices)
        assert entry["source"] == artifact.source_digest()
        assert entry["dsl"].startswith("4.")
        assert entry["stack"] <= (8 if spills(kernel) else 0), kernel
        assert entry["registers"] > 0
        resident = RESIDENT[kernel.name](dict(kernel.choices))
        # Each of its kernels has registers for as many programs: those with the most for the fewest threads.
        of_each = sorted(elf.taken(artifact.read(kernel, built).module, elf.REGISTERS))
        threads = sorted((threads * at_once for threads, at_once in resident), reverse=True)
        assert all(x * y <= 65536 for x, y in zip(of_each, threads, strict=True)), (kernel, of_each, threads)
        assert resident[0][1] * (entry["shared"] + 1024) <= 228 << 10
        (cubin,) = elf.cubins(artifact.read(kernel, built).module)
        assert elf.architecture(cubin) == int(kernel.arch.removeprefix("sm_").removesuffix("a"))


def disassembly(kernel, folder, scratch):
    triton = pytest.importorskip("triton")
    nvdisasm = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    (cubin,) = elf.cubins(artifact.read(kernel, folder).module)
    (scratch / "cubin").write_bytes(cubin)
    return subprocess.run([nvdisasm, "-c", scratch / "cubin"], capture_output=True, text=True, check=True).stdout


def instructions(kernel, folder, scratch):
    """How many there are of each in the GPU's code."""
    return counted(disassembly(kernel, folder, scratch))


def counted(text):
    return collections.Counter(word for word in text.replace(";", " ").split() if word[0].isupper())


@pytest.mark.parametrize("arch", CAPABILITIES)
def test_flush_is_a_few_copies_and_sums(built, tmp_path, arch):
    """Bulk copies of three arrays of tokens, first and later ones, and of the state; a row is stored at once. In the kernel
    for few heads warps have half the rows, and the loop over tokens takes four at a time, then what is left."""
    for choices in flush.every_choice():
        text = disassembly(Kernel("flush", tuple(choices.items()), arch), built, tmp_path)
        bits = choices["K"] // 32 * {"float32": 32, "bfloat16": 16}[choices["STATE"]]
        rows = {"float32": 8, "bfloat16": 16}[choices["STATE"]]  # of a warp
        stores, sums = "STG.E" if bits == 32 else f"STG.E.{bits}", "FFMA2" if arch == "sm_100a" else "FFMA"
        of_many, of_few = sorted(map(counted, text.split(".section\t.text.")[1:]), key=lambda counts: -counts[stores])
        row = choices["K"] // 32 // (2 if arch == "sm_100a" else 1)  # a lane's sums of it, in pairs or not
        assert (of_many[stores], of_few[stores]) == (rows, rows // 2)
        assert of_many[sums] == (1 + 1) * rows * row  # of a token, and with the state
        assert of_few[sums] in [(4 + left + 1) * rows // 2 * row for left in (1, 3)]
        for counts in (of_many, of_few):
            assert counts["UBLKCP.S.G"] == 3 + 3 + 1
            assert counts["FFMA"] == 0 or arch == "sm_90a"
            assert not any(name.startswith("F2F.") for name in counts)


@pytest.mark.parametrize("arch", CAPABILITIES)
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_verify_multiplies_on_tensor_cores(built, tmp_path, state_dtype, arch):
    """The products of halves, of every 16 of K, for keys and queries of 8 and of 16 tokens; then those over tokens."""
    source = pytest.importorskip("kda_jax.kernels.cute.verify")
    choices = CHOICES | {"STATE": state_dtype, "UPDATE": False}
    counts = instructions(Kernel("verify", tuple(choices.items()), arch), built, tmp_path)
    # Eights of rows of a warp, of all forms.
    of_few, of_many = (1 + 2) * source.TILES[state_dtype] + source.few_tiles(False), source.verify_long.TILES
    halves = {"float32": 3, "bfloat16": 2}[state_dtype]
    # Of more than 8 tokens the later ones are also multiplied with the earlier keys, three products of halves.
    assert counts["HMMA.16816.F32.BF16"] == 128 // 16 * (halves * (of_few + 2 * of_many) + 3)
    assert counts["HMMA.1688.F32.TF32"] == 3 * (of_few + 3 * of_many + 1)
    assert counts["UBLKCP.S.G"] == 4 * 2  # of four kernels, the first head's state and each next one's
    # No conversion of a single number: those are slow.
    assert not any(name.startswith("F2F.") for name in counts)


@pytest.mark.parametrize("arch", CAPABILITIES)
def test_verify_reads_states_as_the_first_to_be_evicted(built, tmp_path, arch):
    """Each request of a state names a policy of the L2 cache, which is a descriptor behind its size."""
    choices = CHOICES | {"STATE": "bfloat16", "UPDATE": False}
    text = disassembly(Kernel("verify", tuple(choices.items()), arch), built, tmp_path)
    requests = [line for line in text.splitlines() if "UBLKCP.S.G" in line]
    assert requests
    assert all(line.count(", desc[") == 1 for line in requests), requests
    assert "0x12f00000" in text  # evict_first, in the upper word


@pytest.mark.parametrize("arch", CAPABILITIES)
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_decode_has_its_state_by_one_copy(built, tmp_path, state_dtype, arch):
    """And one back; bfloat16 numbers are multiplied as they are and rounded in pairs. On Blackwell a lane's 64 numbers of a
    bfloat16 state, or 32 of a float32 one, decay and take the token's key in pairs."""
    for form in decode.FORMS:
        choices = OF_DECODE | {"STATE": state_dtype, "FORM": form}
        counts = instructions(Kernel("decode", tuple(choices.items()), arch), built, tmp_path)
        assert counts["UBLKCP.S.G"] == counts["UBLKCP.G.S"] == 1
        assert counts["HMMA.16816.F32.BF16"] == (128 // 16 if state_dtype == "bfloat16" else 0)
        pairs = {"bfloat16": 32, "float32": 16}[state_dtype] if arch == "sm_100a" else 0
        assert (counts["FMUL2"], counts["FFMA2"]) == (pairs, pairs)
        assert not any(name.startswith("F2F.") for name in counts)


def test_a_second_build_compiles_what_is_missing(built, monkeypatch):
    kernels = list(kernels_to_build())
    taken = kernels[3]
    (built / taken.filename).unlink()
    assert build(kernels, built, processes=1) == [taken]
    monkeypatch.setattr(compiler, "compile_all", lambda kernels, processes: [])
    assert build(kernels, built, processes=1) == []


array = jax.ShapeDtypeStruct


def pool(slots=5):
    return array((slots, 4, 128, 128), jnp.float32)


def decode_call(n, slots):
    f32, bf16 = jnp.float32, jnp.bfloat16
    token = [array((n, 2, 128), bf16)] * 2 + [array((n, 4, 128), bf16)] * 2 + [array((n, 4), bf16)]
    gate = array((4,), f32), array((4, 128), f32)
    args = PoolOperands(*token, *gate, pool(slots), array((n,), jnp.int32))
    return decode.decode, args, Spec("softplus", None, True, True, False, 0.1, None)


def decode_mtp_call(n, slots):
    _, args, spec = decode_call(n, slots)
    tokens = {name: array((n, n + 2, *getattr(args, name).shape[1:]), jnp.bfloat16) for name in ("q", "k", "v", "g", "beta")}
    return decode.decode_mtp, args._replace(**tokens), spec


def verify_call(n, slots):
    _, args, spec = decode_mtp_call(n, slots)
    return verify.verify, args, VerifySpec(**dataclasses.asdict(spec), with_update=True)


def flush_call(n, slots):
    update = [array((n, n % 5 + 1, heads, 128), jnp.float32) for heads in (4, 2, 4)]
    counts = array((n,), jnp.int32)
    return flush.flush, FlushOperands(*update, pool(slots), None, counts), FlushSpec(None)


def lowered(capability, function, args):
    """The text of a program for a GPU that is not there."""
    check = jax.export.DisabledSafetyCheck.custom_call("CuteDSLRT_NvJaxCutlassCall_v2")
    with kda.cuda_target(capability):
        run = jax.jit(lambda args: function(args))
        return jax.export.export(run, platforms=["cuda"], disabled_checks=[check])(args).mlir_module()


CALLS = {
    "decode": (decode_call, OF_DECODE),
    "decode_mtp": (decode_mtp_call, OF_DECODE | {"FORM": "decode_mtp"}),
    "verify": (verify_call, CHOICES | {"UPDATE": True}),
    "flush": (flush_call, {"K": 128, "V": 128, "STATE": "float32"}),
}


def as_mlir_prints(byte):
    """Of a string attribute."""
    if chr(byte) == "\\":
        return "\\\\"
    return chr(byte) if 32 <= byte < 127 and chr(byte) != '"' else f"\\{byte:02X}"


SIZES = {
    "decode": ((3, 5), (7, 9)),
    "decode_mtp": ((3, 5), (7, 9)),
    "verify": ((3, 5), (7, 9)),
    "flush": ((256, 5), (300, 9)),
}
IN_PLACE = {
    "decode": [str(PoolOperands._fields.index("state"))],
    "decode_mtp": [],
    "verify": [],
    "flush": [str(FlushOperands._fields.index("state"))],
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("arch", CAPABILITIES)
def test_programs_find_their_kernel_in_the_store(built, empty, no_compiler, monkeypatch, arch, name):
    """One object for every number of rows, tokens and slots; the pool is written in place."""
    monkeypatch.setenv("KDA_CUTE_STORE", str(built))
    call, choices = CALLS[name]
    kernel = "decode" if "FORM" in choices else name
    key = artifact.read(Kernel(kernel, tuple(choices.items()), arch), built).key
    escaped = "".join(map(as_mlir_prints, key))
    for sizes in SIZES[name]:
        function, args, spec = call(*sizes)
        text = lowered(CAPABILITIES[arch], functools.partial(function, spec=spec), args)
        assert text.count("@CuteDSLRT_NvJaxCutlassCall_v2") == 1
        assert re.findall(r"output_operand_alias<.*?operand_index = (\d+)", text) == IN_PLACE[name]
        assert f'key = "{escaped}"' in text


@pytest.mark.parametrize("call", [DECODE, DECODE_MTP, DECODE_MTP_PAGED, VERIFY, FLUSH], ids=str)
@pytest.mark.parametrize("arch", CAPABILITIES)
def test_a_call_by_name_is_one_custom_call(built, empty, no_compiler, monkeypatch, arch, call):
    """Vmapped too."""
    monkeypatch.setenv("KDA_CUTE_STORE", str(built))
    dtype = "float32" if call is FLUSH else "bfloat16"
    call = on_cute(call)
    instances = [call.draw(seed, k_dim=64, dtype=dtype) for seed in range(2)]
    for run, given in ((call, instances[0]), (jax.vmap(call), stack(instances))):
        assert lowered(CAPABILITIES[arch], run, given).count("@CuteDSLRT_NvJaxCutlassCall_v2") == 1


def test_without_store_or_compiler_it_says_what_to_install(empty, no_compiler):
    said = r"\(K=128.*pip install 'kda-jax\[cute\]'.*--arch sm_90a.*KDA_CUTE_STORE"
    with pytest.raises(store.UnavailableError, match=said):
        store.fetch(KERNEL)
    call = on_cute(DECODE)
    with pytest.raises(NotImplementedError, match=rf"^kda.decode: implementation is 'cute', which .*{said}"):
        lowered("9.0", call, call.draw(0, k_dim=128, dtype="bfloat16"))


def test_without_any_store_one_reason_is_that_of_all_kernels(empty, no_compiler, monkeypatch):
    monkeypatch.setenv("KDA_CUTE_CACHE", str(empty / "none"))
    reasons = set()
    for kernel in every_kernel(["sm_90a"]):
        with pytest.raises(store.UnavailableError, match=r"^no CuTe kernel is compiled: pip install") as raised:
            store.fetch(kernel)
        reasons.add(str(raised.value))
    assert len(reasons) == 1


def test_forms_of_decode_are_there_together_or_not_at_all(empty, no_compiler):
    """None must not take one of them from here and another from Triton, which has other bits."""
    call = on_cute(DECODE)
    arrays = call.draw(0, k_dim=128, dtype="bfloat16")
    for form in decode.FORMS:
        with pytest.raises(NotImplementedError, match=rf"FORM={form}\) for sm_90a is not compiled"):
            lowered("9.0", call, arrays)
        artifact.write(made(kernel=Kernel("decode", tuple((CHOICES | {"FORM": form}).items()), "sm_90a")), empty)
    assert lowered("9.0", call, arrays).count("@CuteDSLRT_NvJaxCutlassCall_v2") == 1


def test_a_compiler_that_fails_is_asked_once(empty, monkeypatch):
    asked = []

    def fail(kernels):
        asked.extend(kernels)
        raise compiler.CompilationError("of another version")

    monkeypatch.setattr(store, "can_compile", lambda: True)
    monkeypatch.setattr(compiler, "compile_all", fail)
    for _ in range(2):
        with pytest.raises(store.UnavailableError, match="of another version"):
            store.fetch(KERNEL)
    assert asked == [KERNEL]


def test_what_is_missing_is_compiled_once_and_kept(empty, monkeypatch):
    pytest.importorskip("cutlass")
    found = store.fetch(KERNEL)
    assert [path.name for path in empty.iterdir()] == [KERNEL.filename]
    store._fetch.cache_clear()
    monkeypatch.setattr(compiler, "compile_all", None)
    assert store.fetch(KERNEL) == found


def test_loading_takes_less_than_50_ms(built, empty, monkeypatch):
    monkeypatch.setenv("KDA_CUTE_STORE", str(built))
    times = []
    for _ in range(5):
        store._fetch.cache_clear()
        began = time.perf_counter()
        store.fetch(KERNEL)
        times.append(time.perf_counter() - began)
    assert min(times) < 0.05


DAMAGES = {
    "truncated": lambda data: data[:-3],
    "altered": lambda data: data[:-3] + b"xyz",
    "cut in its first line": lambda data: data[:40],
    "empty": lambda data: b"",
    "of another kind": lambda data: b"\x7fELF\x02\n\x00",
    "JSON, but no artifact's": lambda data: b"[1]\n",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_artifacts_are_refused(empty, no_compiler, damage):
    path = artifact.write(made(), empty)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DamagedArtifactError, match=KERNEL.filename):
        artifact.read(KERNEL, empty)
    with pytest.raises(store.UnavailableError, match=KERNEL.filename):
        store.fetch(KERNEL)


def test_artifacts_of_other_architectures_are_refused(empty):
    other = dataclasses.replace(KERNEL, arch="sm_100a")
    artifact.write(made(kernel=other), empty).rename(empty / KERNEL.filename)
    with pytest.raises(DamagedArtifactError, match="sm_100a"):
        artifact.read(KERNEL, empty)


def test_damaged_artifacts_are_compiled_anew(empty, monkeypatch):
    monkeypatch.setattr(store, "can_compile", lambda: True)
    monkeypatch.setattr(compiler, "compile_all", lambda kernels: [made()])
    (empty / KERNEL.filename).write_bytes(b"no artifact")
    with pytest.warns(UserWarning, match="compiling anew"):
        assert store.fetch(KERNEL) == made()
    assert artifact.read(KERNEL, empty) == made()


def test_a_cache_that_cannot_be_written_is_no_error(empty, monkeypatch):
    monkeypatch.setattr(store, "can_compile", lambda: True)
    monkeypatch.setattr(compiler, "compile_all", lambda kernels: [made()])
    (empty / "file").touch()
    monkeypatch.setenv("KDA_CUTE_CACHE", str(empty / "file"))
    with pytest.warns(UserWarning, match="is not kept"):
        assert store.fetch(KERNEL) == made()


def test_what_changes_the_object_changes_its_name(monkeypatch):
    others = {KERNEL.filename}
    others |= {dataclasses.replace(KERNEL, arch="sm_100a").filename, dataclasses.replace(KERNEL, host="aarch64").filename}
    others |= {dataclasses.replace(KERNEL, choices=tuple((OF_DECODE | {"K": 64, "V": 64}).items())).filename}
    monkeypatch.setattr(artifact, "source_digest", lambda: "of another source")
    assert len(others | {KERNEL.filename}) == 5


def test_writers_at_the_same_time_leave_a_whole_file(tmp_path):
    """Whoever reads meanwhile finds one of theirs or none."""
    versions = [made(bytes([i]) * 300_000) for i in range(4)]

    def work(i):
        for _ in range(20):
            artifact.write(versions[i], tmp_path)
            assert artifact.read(KERNEL, tmp_path) in versions

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert [path.name for path in tmp_path.iterdir()] == [KERNEL.filename]


def test_the_compiler_s_refusal_is_passed_on(monkeypatch):
    pytest.importorskip("cutlass")
    with pytest.raises(compiler.CompilationError, match=r"(?s)STATE=float8.*Traceback.*float8"):
        compiler.compile_all([dataclasses.replace(KERNEL, choices=tuple((OF_DECODE | {"STATE": "float8"}).items()))])
