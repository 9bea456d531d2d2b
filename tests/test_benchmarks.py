"""What the benchmarks say without a GPU: the bytes they count, chunk's programs, and the report of a few rows."""

import itertools
import json
import pathlib
import sys
import types

import jax
import pytest

# benchmarks is no part of the installation. Last, so that kda_jax is the installed one.
sys.path.append(str(pathlib.Path(__file__).parents[1]))

from benchmarks import chunk_gpu, gpu, harness, mtp, q8_0, record, report
from benchmarks.cells import POOLS, VARIANTS, Cell, Projection, Sequences, accepted, cells, projections, sequences


def test_bytes():
    cell = Cell(dim=128, heads=16, value_heads=32, pool="float32", n=2, tokens=3)
    assert cell.states == 2 * 32 * 128 * 128 * 4
    q_and_k, v_g_o, beta = 2 * 2 * 3 * 16 * 128, 3 * 2 * 3 * 32 * 128, 2 * 3 * 32
    parameters, slots = 4 * (32 + 32 * 128), 4 * 2
    assert cell.tokens_in_out == 2 * (q_and_k + v_g_o + beta) + parameters + slots
    assert cell.decode_bytes()["state_bytes"] == 2 * cell.states
    chain = cell.chain_bytes(accepted=1)
    assert chain["state_bytes"] == 3 * cell.states
    update = 4 * 2 * 128 * (32 + 16 + 32)  # a token's u, k and g
    assert chain["other_bytes"] == cell.tokens_in_out + (3 + 1) * update + 2 * 8


@pytest.mark.parametrize("suite", ["decode", "mtp"])
def test_the_calls_of_a_program_exceed_the_cache(suite):
    chosen = cells(suite, "full")
    assert len(set(chosen)) == len(chosen)
    assert all(cell.calls * cell.states >= 128e6 for cell in chosen if cell.dim == 128)
    assert {t // 2 for t in (2, 3, 4, 6)} == {accepted(t)["half"] for t in (2, 3, 4, 6)}


@pytest.mark.parametrize("size", ["full", "quick", "tiny"])
def test_packed_sequences_fill_their_row(size):
    chosen = sequences(size)
    assert len(set(chosen)) == len(chosen)
    for cell in chosen:
        assert cell.value_heads % cell.heads == 0
        if cell.lengths:
            assert cell.batch == 1
            assert cell.offsets[-1] == cell.tokens


def test_chains_and_drafts(monkeypatch):
    """Every cell both ways: verify and flush by two counts, and decode_mtp in its paged form, which writes T states."""
    monkeypatch.setattr(gpu, "ROUND_SECONDS", 0.0)
    rows = mtp.run("tiny", "xla")
    assert [row for row in rows if "error" in row] == []
    assert all(row["us"] > 0 for row in rows)
    expected = {(str(cell), variant) for cell in cells("mtp", "tiny") for variant in ("all", "half", "paged")}
    found = {(str(Cell(**{key: row[key] for key in Cell.__dataclass_fields__})), row["variant"]): row for row in rows}
    assert set(found) == expected
    for row in rows:
        state = row["n"] * row["value_heads"] * row["dim"] ** 2 * POOLS[row["pool"]]
        assert row["state_bytes"] == (1 + row["tokens"] if row["variant"] == "paged" else 3) * state


def test_chunk_programs(monkeypatch):
    monkeypatch.setattr(gpu, "ROUND_SECONDS", 0.0)
    rows = chunk_gpu.run("tiny", "xla")
    assert [(row["shape"], row["variant"]) for row in rows] == [(str(c), v) for c in sequences("tiny") for v in VARIANTS]
    assert [row["compiled_alone"] for row in rows] == [True] * 2 + [False] * 2
    for row in rows:
        assert "error" not in row
        assert row["us"] > 0
        assert row["compile_s"] > 0
    both, forward = rows[:2]
    tokens, values = 2 * 40, 2 * 40 * 2 * 16
    inputs = 2 * (2 * tokens * 16 + 2 * values + tokens * 2) + 4 * (2 + 2 * 16)
    moved = 2 * inputs + 2 * 2 * values  # inputs and their gradients, o and its cotangent
    assert both["peak_bytes"] - both["temp_bytes"] == pytest.approx(moved, abs=1000)  # and XLA's table of outputs
    states = 4 * 2 * 2 * 16 * 16
    assert forward["peak_bytes"] - forward["temp_bytes"] == pytest.approx(inputs + 2 * values + states, abs=1000)


def test_chunk_gives_the_gradients_of_all_inputs():
    program = chunk_gpu.Program(sequences("tiny")[1], "xla", VARIANTS[0])
    arguments = chunk_gpu._arguments(program, chunk_gpu._draw)
    o, gradients = jax.eval_shape(chunk_gpu.function(program), *arguments)
    inputs, _, do = arguments
    described = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
    assert described((o, gradients)) == described((do, inputs))
    assert len(gradients) == 7


def test_a_failure_is_a_row():
    rows = chunk_gpu.run("tiny", "no such implementation")
    assert len(rows) == 4
    assert all("implementation" in row["error"] for row in rows)


def test_products_of_q8_0(monkeypatch):
    monkeypatch.setattr(gpu, "ROUND_SECONDS", 0.0)
    read, *rows = q8_0.run("tiny", "xla")
    assert read["tb_s"] > 0
    others = {"matmul": "bfloat16 dot", "matmul_pair": "two of matmul", "matmul_hc_expand": "matmul, then XLA"}
    expected = [(str(cell), name) for cell in projections("tiny") for name in (cell.operation, others[cell.operation])]
    assert [(row["shape"], row["variant"]) for row in rows] == expected
    for row in rows:
        assert "error" not in row
        assert row["share"] == row["weight_bytes"] / row["us"] / 1e6 / read["tb_s"]
    quantised, dot = rows[:2]
    assert (quantised["weight_bytes"], dot["weight_bytes"]) == (40 * 2 * 34, 2 * 40 * 64)


def test_the_weights_of_a_program_exceed_the_cache():
    for cell in projections("full"):
        assert 125e6 <= cell.weights * cell.weight_bytes <= 200e6
        assert cell.weight_bytes * 32 == sum(cell.outputs) * cell.inputs * 34


def test_the_platform_is_said_once(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "environment", lambda: {"platform": "cpu"})
    assert harness.write("chunk-cpu", [], tmp_path).name == harness.write("chunk", [], tmp_path).name == "chunk-cpu.json"
    assert harness.write("chunk-gpu", [], tmp_path).name == "chunk-gpu-cpu.json"


def test_kernels_are_found_by_window():
    def event(name, start, duration):
        return types.SimpleNamespace(name=name, start_ns=start, duration_ns=duration)

    def plane(name, **lines):
        return types.SimpleNamespace(
            name=name, lines=[types.SimpleNamespace(name=line, events=events) for line, events in lines.items()]
        )

    host = plane("/host:CPU", python=[event("cell 0", 100, 50), event("cell 1", 200, 50), event("other", 0, 999)])
    kernels = [event("a", 90, 5), event("b", 110, 1000), event("a", 120, 2000), event("b", 130, 3000), event("a", 210, 500)]
    device = plane("/device:GPU:0", **{"Stream #1": kernels}, Modules=[event("all", 110, 9000)])
    profile = types.SimpleNamespace(planes=[device, host])
    assert gpu._by_window(profile, 2) == [{"b": 4.0, "a": 2.0}, {"a": 0.5}]


@pytest.fixture
def results(tmp_path):
    """A folder with the JSON of two shapes whose ratios are round numbers."""
    said = {"device": "a card", "platform": "gpu"} | record.stamp(["numpy"])
    shapes = [Cell(128, 32, 32, pool, 128, t) for pool in POOLS for t in (1, 4)]
    ours: dict = {"decode": [], "mtp": []}
    for cell, us in zip(shapes[1::2], (40.0, 60.0), strict=True):  # faster than verify and flush, and slower
        row = cell.row() | {"variant": "paged", "implementation": "cute", "us": us, "kernel_us": us - 1}
        ours["mtp"].append(row | {"state_bytes": 5 * cell.states, "other_bytes": 0})
    peers = []
    for cell in shapes:
        us = 100.0 if cell.pool == "float32" else 50.0
        counts = {"decode": 1} if cell.tokens == 1 else accepted(cell.tokens)
        for variant, m in counts.items():
            moved = cell.decode_bytes() if variant == "decode" else cell.chain_bytes(m)
            row = cell.row() | {"variant": variant}
            suite = ours["decode" if variant == "decode" else "mtp"]
            for name, n in {"triton": 2, "cute": 1}.items():
                suite.append(row | {"implementation": name, "us": n * us, "kernel_us": n * us - 1} | moved)
            peers.append(row | {"peer": "sglang", "us": 3 * us})
        if cell.tokens == 1:
            peers += [row | {"peer": "fla", "us": 2 * us}, row | {"peer": "fla", "variant": "x", "error": ["refused"]}]
    loop = [{"flags": "graphs", "n": n, "us": 11.0, "kernel_us": 10.0, "ratio": 1.1} for n in (1, 8)]
    bandwidth = {"read_modify_write": 4.0, "copy": 4.1}
    ours["q8_0"] = _q8_0_rows()
    ours["verify"], theirs = _verify_rows()
    record.write("verify-peers-gpu", said | {"bandwidth": bandwidth, "rows": theirs}, tmp_path)
    ours["chunk"], theirs = _chunk_rows()
    record.write("chunk-peers-gpu", said | {"bandwidth": bandwidth, "rows": theirs}, tmp_path)
    for name, rows in {**ours, "loop": loop}.items():
        record.write(f"{name}-gpu", said | {"rows": rows}, tmp_path)
    for suite in ("decode", "mtp"):
        theirs = [row for row in peers if (row["tokens"] == 1) == (suite == "decode")]
        record.write(f"{suite}-peers-gpu", said | {"bandwidth": bandwidth, "rows": theirs}, tmp_path)
    return tmp_path


def _verify_rows():
    """CuTe takes 40 us and 44, Triton twice that, FlashInfer 42 and 66."""
    ours, theirs = [], []
    for pool, (t, us) in itertools.product(POOLS, {2: 40.0, 6: 44.0}.items()):
        cell = Cell(128, 32, 32, pool, 128, t)
        ours += [cell.row() | {"implementation": name, "us": us * n} for name, n in {"triton": 2, "cute": 1}.items()]
        if pool == "bfloat16":
            theirs.append(cell.row() | {"peer": "flashinfer", "variant": "verify", "us": 42.0 if t == 2 else 66.0})
    return ours, theirs


def _q8_0_rows():
    """matmul takes 10 us at N = 1, and everything else longer in proportion."""

    def row(cell, variant, us, implementation="triton"):
        measured = {"implementation": implementation, "us": us, "share": 0.9, "weight_bytes": cell.weight_bytes}
        return {"shape": str(cell)} | cell.row() | {"variant": variant} | measured

    one, four = (Projection("matmul", n, 4096, (4096,)) for n in (1, 4))
    pair, expand = Projection("matmul_pair", 1, 4096, (4096, 64)), Projection("matmul_hc_expand", 1, 4096, (4096,), 4)
    rows = [{"variant": "read", "implementation": "xla", "tb_s": 4.0}]
    rows += [
        row(one, "matmul", 10.0),
        row(one, "bfloat16 dot", 17.0, "xla"),
        row(one, "matmul", 90.0, "xla"),
    ]
    rows += [row(four, "matmul", 12.0), row(four, "bfloat16 dot", 18.0, "xla")]
    rows += [row(pair, "matmul_pair", 10.0), row(pair, "two of matmul", 14.0)]
    return [*rows, row(expand, "matmul_hc_expand", 10.5), row(expand, "matmul, then XLA", 21.0)]


def _chunk_rows():
    """Forward takes 100 us, and with backward 400; FLA twice that, xla twelve times, or it runs out of memory."""
    ours, theirs = [], []
    for cell in (Sequences(64, 64, 1, 8192), Sequences(16, 32, 2, 4096, gate="softplus")):
        for variant, us in {"forward": 100.0, "forward + backward": 400.0}.items():
            row = cell.row() | {"variant": variant, "peak_bytes": 2e9, "compile_s": 20.0, "compiled_alone": cell.batch == 1}
            xla = {"us": 12 * us} if cell.batch == 1 else {"error": "XlaRuntimeError('RESOURCE_EXHAUSTED: ...')"}
            ours += [row | {"implementation": "triton", "us": us}, row | {"implementation": "xla"} | xla]
            theirs.append(cell.row() | {"variant": variant, "peer": "fla", "us": 2 * us, "peak_bytes": 3e9})
    return ours, theirs


def test_report(results, monkeypatch):
    monkeypatch.setattr("sys.argv", ["report", str(results)])
    report.main()
    page = (results / "gpu.md").read_text()
    assert "| decode: faster peer / ours, float32 pool | 2.00 |" in page
    assert "| chain, half accepted: SGLang / ours, bfloat16 pool | 3.00 |" in page
    assert "| decode: float32 / bfloat16 pool, N HV >= 4096 | 2.00 |" in page
    share = 2 * 128 * 32 * 128 * 128 * 4 / 100e-6 / 4e12
    assert f"| decode: share of RMW bandwidth, N HV >= 4096, float32 | {share:.2f} |" in page
    assert "| loop / kernels, N >= 8, flags: graphs | 1.10 |" in page
    assert f"| chain, all accepted: SGLang / ours, float32 pool | {300 / 40:.2f} |" in page
    assert f"40.0 (CP; 39.0; {300 / 40:.2f})" in page
    assert "50.0 (C; 49.0; 3.00)" in page
    first = "B=1 T=8192 H=64 HV=64 lower_bound"
    assert f"| {first} | 100 | 2.00 | 12.00 | 400 | 2.00 | 12.00 | 2.00 | 3.00 | 20.00 |" in page
    second = "B=2 T=4096 H=16 HV=32 softplus"
    assert f"| {second} | 100 | 2.00 | out of memory | 400 | 2.00 | out of memory | 2.00 | 3.00 | 20.00 |" in page
    assert f"| chunk, forward + backward, HV > H: FLA / ours | 2.00 | {second} | 2.00 | 1 |" in page
    assert f"| chunk, forward: xla / ours | 12.00 | {first} | 12.00 | 1 |" in page
    assert "| chunk, peak memory: FLA / ours | 1.50 |" in page
    assert f"| chunk, first compilation of forward + backward, s | 20.00 | {first} | 20.00 | 1 |" in page
    assert "| 128 | 32 | bfloat16 | 6 | 88.00 | 44.00 | 66.00 | 1.50 |" in page
    assert (
        "| verify alone, bfloat16 pool: FlashInfer / ours | 1.05 | K=128 H=32 HV=32 bfloat16 N=128 T=2 | 1.50 | 2 |" in page
    )
    assert "| verify alone, float32 pool: T = 6 / T = 2 | 1.10 |" in page
    assert "| matmul | 4096 -> 4096, N=1 | 10.00 | 0.90 | 1.70 |  |  |  | 9.00 |" in page
    assert "| matmul_hc_expand | 4096 -> 4096, N=1 | 10.50 | 0.90 |  |  | 2.00 | 1.05 |  |" in page
    assert "| q8_0.matmul, N = 1, 16 MB and more: share of read bandwidth | 0.90 | 4096 -> 4096, N=1 | 0.90 | 1 |" in page
    assert "| q8_0.matmul, N = 1 and 4: bfloat16 jnp.dot / ours | 1.50 | 4096 -> 4096, N=4 | 1.70 | 2 |" in page
    assert "| q8_0.matmul_pair, N = 1: two calls / ours | 1.40 |" in page
    assert "| q8_0.matmul_hc_expand, N = 1: ours / matmul | 1.05 |" in page
    assert (results / "gpu.png").stat().st_size > 0


def test_report_of_a_part(results):
    """Each suite may be missing, and a row that failed has no time."""
    suites = "decode-peers", "mtp", "loop", "chunk-peers", "mtp-peers", "verify", "decode", "q8_0", "verify-peers", "chunk"
    for missing in suites:
        (results / f"{missing}-gpu.json").unlink()
        records = {path.stem.removesuffix("-gpu"): json.loads(path.read_text()) for path in results.glob("*.json")}
        if records:
            report.markdown(records)
            report.plot(records, results / "part.png")


def test_commit_is_taken_from_the_environment(monkeypatch):
    monkeypatch.setenv("KDA_JAX_COMMIT", "abc")
    assert record.stamp(["numpy", "no-such-distribution"])["commit"] == "abc"
    assert set(record.stamp(["numpy", "no-such-distribution"])["versions"]) == {"numpy", "python"}
