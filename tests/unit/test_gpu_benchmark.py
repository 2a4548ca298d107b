"""Test the GPU benchmark without a GPU: its arithmetic, tables, plot and errors, and the whole flow on the
CPU with invented times.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MODULES = ("gpu_record", "gpu_device", "gpu_vs_softmax", "gpu_tables", "gpu_cases", "gpu_parts")
TINY = (
    "--hidden=1024 --tokens=64 --head-dims=64,128,256 --seqlens=32,64 --batches=1,2 --contexts=16,48".split()
)
NOT_BUILT = (
    "This flash attention build has no kernels with softmax: pass use_softmax=False, or rebuild "
    "without NO_SOFTMAX_ONLY"
)
TIMES = [2.0, 1.6, 1.8]  # ms of the sides of a row, in their order
MATMUL_TFLOPS, COPY_TB_PER_S = 800.0, 3.0


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Import the modules of benchmarks/, which import one another as scripts in one folder. Those that need
    flash_attn are left out if it is not installed.
    """
    monkeypatch.syspath_prepend(BENCHMARKS)
    names = MODULES if importlib.util.find_spec("flash_attn") else MODULES[:-2]
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in names:
        sys.modules.pop(name)


@pytest.fixture
def flow(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The same modules, for tests that call the package on CPU tensors. ``machine`` stands in for the GPU."""
    if not hasattr(bench, "gpu_parts"):
        pytest.skip("needs the installed flash_attn: run `make wheel`")
    monkeypatch.setattr(bench.gpu_cases, "BACKEND", "cpu")

    class OnCpu(bench.gpu_device.Gpu):
        device = "cpu"
        cache_bytes = 20_000  # two or more caches for the smallest decode rows, one for the others
        held = iter(())  # results of allocated() and peak(), in turn

        def __init__(self, budget_ms):
            self.budget_ms = budget_ms

        @staticmethod
        def missing():
            return None

        def describe(self):
            return {
                "device": "a CPU",
                "driver": "none",
                "cuda": "none",
                "torch": torch.__version__,
                "build": {},
            }

        def medians(self, functions):
            for function in functions:
                function()
            return TIMES[: len(functions)]

        def captured(self, calls):
            return lambda: [call() for call in calls]

        def copy_bandwidth(self):
            return COPY_TB_PER_S

        def matmul_tflops(self, dtype):
            return MATMUL_TFLOPS

        def allocated(self):
            return next(self.held, 0)

        peak = allocated

    bench.machine = OnCpu
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # the sizes are tiny: a second thread would only wait, for long on a busy machine
    yield bench
    torch.set_num_threads(threads)


def case_of(
    bench: SimpleNamespace,
    direction: str = "forward",
    *,
    causal: bool = False,
    name: str = "plain",
    **changes: int,
):
    sizes = {"batch": 2, "seqlen": 8, "nheads": 4, "nheads_k": 4, "head_dim": 64, **changes}
    return bench.gpu_record.Case(name, direction, **sizes, causal=causal)


# Arithmetic


@pytest.mark.parametrize(
    "direction, causal, share",
    [("forward", False, 1), ("forward", True, 0.5), ("backward", False, 2.5), ("backward", True, 1.25)],
)
def test_flops_by_the_rule_of_the_field(bench, direction, causal, share):
    case = case_of(bench, direction, causal=causal, batch=1, seqlen=16384, nheads=32)
    assert bench.gpu_record.attention_flops(case) == share * 4 * 16384 * 16384 * 64 * 32


def test_ratio_is_above_one_where_it_is_faster_without_softmax(bench):
    assert bench.gpu_record.ratio({"softmax": 3.0, "no_softmax": 2.0, "no_softmax_kernel": 9.0}) == 1.5
    assert bench.gpu_record.ratio({"no_softmax": 2.0}) is None
    assert bench.gpu_record.ratio({"softmax": 2.0}) is None


def test_bytes_of_k_and_v_and_units(bench):
    case = case_of(bench, "decode", batch=64, seqlen=131072, nheads=32, nheads_k=4, head_dim=128)
    assert bench.gpu_record.kv_bytes(case, 2) == 2 * 64 * 131072 * 4 * 128 * 2
    assert bench.gpu_record.tera_per_second(3e9, 1.0) == pytest.approx(3.0)


@pytest.mark.parametrize("budget, round_ms, expected", [(100, 5, 20), (100, 40, 7), (100, 0.01, 50)])
def test_rounds_fit_the_budget_within_limits(bench, budget, round_ms, expected):
    assert bench.gpu_device.rounds_for(budget, round_ms) == expected


# What is missing


def test_no_gpu_is_an_error_in_one_line(bench, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.gpu_vs_softmax.main([]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: torch ") and "no CUDA device" in said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("absent", ["flash_attn", "flash_attn_2_cuda"])
def test_no_extension_is_an_error_that_says_how_to_build_it(bench, monkeypatch, capsys, absent):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("flash_attn", "flash_attn_2_cuda"):
        monkeypatch.setitem(sys.modules, name, None if name == absent else SimpleNamespace())
    assert bench.gpu_vs_softmax.main([]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {absent} is not there") and "make wheel BACKEND=cuda" in said


@pytest.mark.parametrize(
    "option, words",
    [
        ("--parts=dense,sparse", "there is no part 'sparse'"),
        ("--seqlens=512,x", "invalid comma-separated int"),
        ("--seqlens=32768", "not between 1 and --tokens 16384"),
        ("--head-dims=0", "not between 1 and --hidden 2048"),
    ],
)
def test_bad_options_are_named(bench, capsys, option, words):
    with pytest.raises(SystemExit) as stopped:
        bench.gpu_vs_softmax.main([option])
    assert stopped.value.code == 2 and words in capsys.readouterr().err


# The calls that are compared


def ones(*shape, **options):
    """Replace randn. Scores are then sqrt(head_dim), and outputs are 1 with softmax, and the number of keys
    times sqrt(head_dim) without.
    """
    return torch.ones(*shape, **options)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_each_side_calls_what_its_name_says(flow, monkeypatch, direction):
    monkeypatch.setattr(torch, "randn", ones)
    sides = flow.gpu_cases.attention(flow.gpu_cases.PLAIN, case_of(flow, direction), torch.float32, "cpu")
    assert list(sides) == ["softmax", "no_softmax", "no_softmax_kernel"][: 2 if direction == "forward" else 3]
    for name, side in sides.items():
        (out, *gradients), again = side()
        torch.testing.assert_close(out, torch.full((2, 8, 4, 64), 1.0 if name == "softmax" else 8 * 8.0))
        torch.testing.assert_close(again(), tuple(gradients) if gradients else out)
        assert len(gradients) == (0 if direction == "forward" else 3)


def test_varlen_attends_within_uneven_sequences(flow, monkeypatch):
    monkeypatch.setattr(torch, "randn", ones)
    lengths = flow.gpu_cases.uneven_lengths(16384, 8192)
    assert sum(lengths) == 16384 and lengths[:3] == [8192, 4609, 2016] and min(lengths) >= 1
    varlen = next(f for f in flow.gpu_cases.FEATURES if f.varlen)
    lengths = torch.tensor(flow.gpu_cases.uneven_lengths(128, 64), dtype=torch.float32)
    sides = flow.gpu_cases.attention(varlen, case_of(flow, seqlen=64), torch.float32, "cpu")
    (out,), _ = sides["no_softmax"]()
    torch.testing.assert_close(out[:, 0, 0], 8 * lengths.repeat_interleave(lengths.long()))


def test_options_of_features_reach_the_function(flow, monkeypatch):
    seen, real = [], flow.gpu_cases.flash_attn_func

    def spy(q, k, v, **options):
        seen.append((k.shape[2], options))
        return real(q, k, v, **options)

    monkeypatch.setattr(flow.gpu_cases, "flash_attn_func", spy)
    args = flow.gpu_vs_softmax.parse_args([*TINY, "--head-dims=64"])
    list(flow.gpu_parts.features(args, flow.machine(1), {}))
    given = {name for _, options in seen for name in options} - {"causal", "use_softmax", "backend"}
    assert given == {"dropout_p", "softcap", "alibi_slopes", "decay_slopes", "window_size", "activation"}
    for name in ("alibi_slopes", "decay_slopes"):
        slopes = next(options[name] for _, options in seen if name in options)
        torch.testing.assert_close(slopes, 2 ** (-8 * torch.arange(1, 17) / 16))
    assert not any(options["use_softmax"] for _, options in seen if "decay_slopes" in options)
    assert {heads for heads, _ in seen} == {16, 2}
    assert {options["causal"] for _, options in seen if "window_size" in options} == {True}


def test_backward_kernel_is_forced_for_its_own_side_alone(flow, monkeypatch):
    switch = flow.gpu_cases.BACKWARD_SWITCH
    monkeypatch.setenv(switch, "what a person set")
    seen, real = [], torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *a, **o: seen.append(os.environ.get(switch)) or real(*a, **o)
    )
    for side in flow.gpu_cases.attention(
        flow.gpu_cases.PLAIN, case_of(flow, "backward"), torch.float32, "cpu"
    ).values():
        side()
    assert seen == [None, None, "kernel"]
    assert os.environ[switch] == "what a person set"


def test_decode_walks_over_caches_that_overflow_the_cache_of_the_device(flow, monkeypatch):
    monkeypatch.setattr(torch, "randn", ones)
    case = case_of(flow, "decode", batch=1, seqlen=16, nheads=4, nheads_k=1)
    gpu = flow.machine(1)
    sides, calls = flow.gpu_cases.decode(case, torch.float32, gpu)
    assert calls == 3  # three caches of 8192 bytes
    (out,), again = sides["no_softmax"]()
    torch.testing.assert_close(out, torch.full((1, 1, 4, 64), 16 * 8.0))
    assert len(again()) == 3
    gpu.cache_bytes = 0
    assert flow.gpu_cases.decode(case, torch.float32, gpu)[1] == 1


def test_memory_of_a_training_step_is_counted_from_the_inputs_on(flow):
    gpu = flow.machine(1)
    gradients = 3 * 2 * 8 * 4 * 64 * 4
    gpu.held = iter(
        [1000, 1500, 1300, 1000 + gradients + 200]
    )  # before, peak of forward, between the passes, peak of backward
    found = flow.gpu_cases.training_step_memory(case_of(flow, causal=True), "softmax", torch.float32, gpu)
    assert found == {"kept_bytes": 300, "gradient_bytes": gradients, "peak_bytes": 200}


# The whole flow


def test_all_parts_on_the_cpu_with_made_up_times(flow, tmp_path, capsys):
    target = tmp_path / "results" / "gpu.json"
    assert flow.gpu_vs_softmax.main([*TINY, "--json", str(target), "--min-ratio", "1"], flow.machine) == 0
    record = json.loads(target.read_text())
    assert {part: len(record[part]) for part in flow.gpu_record.PARTS} == {
        "dense": 24,
        "activations": 0,  # for no N of this run is long enough
        "features": 60,
        "decode": 8,
        "memory": 6,
    }
    assert record["command"].startswith("python benchmarks/gpu_vs_softmax.py --hidden=1024")
    assert (
        record["device"] == "a CPU"
        and record["flash_attn"]
        and record["dtype"] == "bfloat16"
        and record["date"]
    )
    rows = [row for part in ("dense", "features", "decode") for row in record[part]]
    assert all(row["finite"] and row["skipped"] == {} and row["ratio"] == pytest.approx(1.25) for row in rows)
    backward = [row for row in rows if row["direction"] == "backward"]
    forced = {row["name"]: ("no_softmax_kernel" in row["ms"], row["backward_by"]) for row in backward}
    by_kernel = {
        name for name, (has_both, by) in forced.items() if not has_both and by == "the backward kernel"
    }
    assert by_kernel == {"dropout 0.17", "softcap 30", "silu, decay"}
    assert all(
        has_both and by == "three forwards"
        for name, (has_both, by) in forced.items()
        if name not in by_kernel
    )
    dense = record["dense"][1]
    assert (dense["direction"], dense["seqlen"], dense["batch"], dense["causal"]) == (
        "backward",
        32,
        2,
        False,
    )
    assert dense["tflops"]["no_softmax"] == pytest.approx(2.5 * 4 * 32 * 32 * 1024 * 2 / 1.6e-3 / 1e12)
    small, *_, large = record["decode"]
    assert small["ms"]["no_softmax"] == pytest.approx(1.6 / 2)  # two steps in each call
    assert large["bandwidth"]["no_softmax"] == pytest.approx(2 * 2 * 48 * 4 * 128 * 2 / 1.6e-3 / 3e12)
    assert capsys.readouterr().err.count("\n") == 24 + 60 + 8 + 6


def test_a_row_that_is_slower_is_named(flow, tmp_path, capsys):
    assert (
        flow.gpu_vs_softmax.main([*TINY, "--parts=decode", "--head-dims=64", "--min-ratio=1.3"], flow.machine)
        == 1
    )
    assert (
        "kvcache decode, head_dim 64, batch 2, seqlen 48: ratio 1.250 is below 1.3" in capsys.readouterr().out
    )


def test_nan_fails_the_run(flow, monkeypatch, capsys):
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: torch.full(shape, float("nan"), **options))
    assert (
        flow.gpu_vs_softmax.main([*TINY, "--parts=dense", "--head-dims=64", "--seqlens=32"], flow.machine)
        == 1
    )
    assert "plain causal backward, head_dim 64, batch 2, seqlen 32: NaN or Inf" in capsys.readouterr().out


def test_what_the_wheel_lacks_is_a_row_with_its_words(flow, monkeypatch, tmp_path, capsys):
    real = flow.gpu_cases.flash_attn_func

    def without_softmax_kernels(*args, use_softmax, **options):
        if use_softmax:
            raise RuntimeError(f"{NOT_BUILT}\nException raised from check_built at kernel_dispatch.h")
        return real(*args, use_softmax=False, **options)

    monkeypatch.setattr(flow.gpu_cases, "flash_attn_func", without_softmax_kernels)
    target = tmp_path / "gpu.json"
    options = [*TINY, "--parts=dense,memory", "--head-dims=64", "--json", str(target)]
    assert flow.gpu_vs_softmax.main(options, flow.machine) == 0
    record = json.loads(target.read_text())
    for row in record["dense"]:
        assert (
            row["skipped"] == {"softmax": NOT_BUILT}
            and row["ratio"] is None
            and row["ms"]["no_softmax"] == 2.0
        )
    assert [row["skipped"] for row in record["memory"]] == [NOT_BUILT, "", ""]
    assert (
        flow.gpu_tables.main(
            ["--json", str(target), "--markdown", str(tmp_path / "t.md"), "--plot", str(tmp_path / "p.png")]
        )
        == 0
    )
    assert (tmp_path / "t.md").read_text().count(NOT_BUILT) == 1
    assert flow.gpu_vs_softmax.main([*options, "--min-ratio=1"], flow.machine) == 1
    assert "no row of dense or decode has both sides" in capsys.readouterr().out


def test_any_other_error_is_not_hidden(flow, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(flow.gpu_cases, "flash_attn_func", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        flow.gpu_vs_softmax.main([*TINY, "--parts=dense"], flow.machine)


def test_caches_above_the_limit_are_skipped_without_being_made(flow, tmp_path):
    target = tmp_path / "gpu.json"
    options = [
        *TINY,
        "--parts=decode",
        "--contexts=16,1000000000",
        "--memory-limit=0.001",
        "--json",
        str(target),
    ]
    assert flow.gpu_vs_softmax.main(options, flow.machine) == 0
    for row in json.loads(target.read_text())["decode"]:
        assert bool(row["skipped"]) == (row["seqlen"] > 16)
        assert all("more than --memory-limit 0.001" in why for why in row["skipped"].values())


def test_a_run_that_is_stopped_keeps_the_parts_that_were_done(flow, monkeypatch, tmp_path):
    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(flow.gpu_parts, "decode", stopped)
    target = tmp_path / "gpu.json"
    with pytest.raises(KeyboardInterrupt):
        flow.gpu_vs_softmax.main(
            [*TINY, "--parts=dense,decode", "--head-dims=64", "--json", str(target)], flow.machine
        )
    assert len(json.loads(target.read_text())["dense"]) == 8


# Tables and plot


@pytest.fixture
def small_record(bench) -> dict:
    """The record of a run with one head size, as gpu_vs_softmax.py writes it."""
    common = {"skipped": {}, "finite": True}
    case = {"name": "plain", "batch": 32, "nheads": 32, "nheads_k": 32, "head_dim": 64, "causal": False}
    forward = {
        **case,
        "direction": "forward",
        "ms": {"softmax": 3.0, "no_softmax": 2.0},
        "ratio": 1.5,
        **common,
    }
    backward = {**forward, "direction": "backward", "backward_by": "three forwards", "ratio": 1.25}
    dense = [
        row
        for seqlen in (512, 16384)
        for row in (
            {**forward, "seqlen": seqlen, "tflops": {"softmax": 300.0, "no_softmax": 450.4}},
            {
                **backward,
                "seqlen": seqlen,
                "tflops": {"softmax": 300.0, "no_softmax": 375.0, "no_softmax_kernel": 333.0},
            },
        )
    ]
    step = {**case, "direction": "decode", "seqlen": 1024, "nheads_k": 4, **common}
    memory = {**case, "direction": "forward+backward", "seqlen": 16384, "causal": True, "skipped": ""}
    return {
        "date": "2026-01-02", "command": "python benchmarks/gpu_vs_softmax.py --json x.json",
        "device": "A Device", "driver": "1.2.3",
        "cuda": "13.0", "torch": "2.11.0", "flash_attn": "2.8.3", "dtype": "bfloat16", "tokens": 16384,
        "hidden": 2048,
        "yardsticks": {"matmul_tflops": MATMUL_TFLOPS, "copy_tb_per_s": COPY_TB_PER_S},
        "dense": dense,
        "features": [{**backward, "name": "softcap 30", "seqlen": 8192,
        "backward_by": "the backward kernel"}],
        "decode": [
            {**step, "ms": {"softmax": 0.02, "no_softmax": 0.016}, "ratio": 1.25,
            "bandwidth": {"no_softmax": 0.956}},
            {**step, "batch": 64, "ms": {}, "ratio": None, "bandwidth": {},
            "skipped": {"softmax": "too large", "no_softmax": "too large"}},
        ],
        "memory": [
            {**memory, "side": "softmax", "kept_bytes": 66 * 2**20, "peak_bytes": 200 * 2**20,
            "gradient_bytes": 192 * 2**20}, {**memory, "side": "no_softmax", "skipped": "not built"},
        ],
    }  # fmt: skip


def test_tables_say_what_was_run_and_what_came_out(bench, small_record):
    text = bench.gpu_tables.markdown(small_record)
    for line in (
        "2026-01-02, driver 1.2.3, CUDA 13.0, torch 2.11.0, flash_attn 2.8.3:",
        "    python benchmarks/gpu_vs_softmax.py --json x.json",
        "| head_dim, mask | N = 512 | N = 16k |",
        "| 64 full | 450 (1.50×) | 450 (1.50×) |",
        "| 64 full | 375 (1.25×) | 375 (1.25×) |",
        "| 64 full | 375 / 333 | 375 / 333 |",
        "| softcap 30, full | 1.25× |",
        "How backward runs without softmax: the backward kernel: softcap 30.",
        "| 64, 32 | 16 µs, 96% (1.25×) |",
        "| 64, 64 | – |",
        "| 64 | softmax | 66.0 | 200.0 | 192.0 |",
        "| 64 | `use_softmax=False` | – | – | – |",
    ):
        assert line in text.splitlines(), line
    assert text.startswith("# use_softmax=False against softmax on A Device\n")
    assert "cuBLAS 8192³ 800 TFLOP/s" in text and "3.00 TB/s" in text
    assert text.endswith("## Not measured\n\n- too large\n- not built\n")


def test_tables_of_a_run_with_fewer_parts(bench, small_record):
    del small_record["dense"], small_record["memory"]
    text = bench.gpu_tables.markdown(small_record)
    assert "## Decode" in text and "## Forward" not in text and "## Memory" not in text


def test_files_are_written_and_the_plot_fits_a_page(bench, small_record, tmp_path, capsys):
    source, table, plot = (tmp_path / name for name in ("r.json", "r.md", "r.png"))
    source.write_text(json.dumps(small_record))
    assert bench.gpu_tables.main(["--json", str(source), "--markdown", str(table), "--plot", str(plot)]) == 0
    assert table.read_text() == bench.gpu_tables.markdown(small_record)
    width, height = (
        int.from_bytes(plot.read_bytes()[i : i + 4], "big") for i in (16, 20)
    )  # from the PNG's header
    assert width == 1100 and 500 <= height <= 800
    assert capsys.readouterr().out == f"wrote {table}\nwrote {plot}\n"


def test_tables_without_a_run_say_what_to_do(bench, tmp_path, capsys):
    assert bench.gpu_tables.main(["--json", str(tmp_path / "none.json")]) == 2
    assert "make bench-gpu" in capsys.readouterr().err


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch sees none")
def test_times_and_memory_on_the_device(bench):
    gpu = bench.gpu_device.Gpu(budget_ms=20)
    small, large = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for n in (512, 8192))
    quick, slow = gpu.medians([lambda: small @ small, lambda: large @ large])
    assert 0 < quick < slow
    (replayed,) = gpu.medians([gpu.captured([lambda: large @ large] * 3)])
    assert 2 * slow < replayed < 4 * slow
    before = gpu.allocated()
    extra = torch.empty(2**20, dtype=torch.int8, device="cuda")
    del extra
    assert gpu.peak() - before == 2**20 and gpu.allocated() == before
