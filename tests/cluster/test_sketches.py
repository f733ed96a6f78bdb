"""Estimated quantiles within the library's own error, everything else exact, and memory that does not grow."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from call_rows import drawn
from hypothesis import given
from hypothesis import strategies as hs

from llmsched_env.cluster.metrics import METRICS, ClusterSummary, Terms, call_metrics, summarize_calls
from llmsched_env.errors import ConfigError, MissingExtraError, install_command
from llmsched_env.parallel import unordered
from llmsched_env.types import FloatArray

pytest.importorskip("datasketches", reason="datasketches is not installed (extra: cluster)")

from llmsched_env.cluster.sketches import SketchSink  # the skip comes first, as with every optional library

REPLICAS = 3
TERMS = Terms(REPLICAS, warmup=5.0, ttft_limit=0.5, tpot_limit=0.06)
SETTINGS = {"replicas": REPLICAS, "warmup": 5.0, "ttft_limit": 0.5, "tpot_limit": 0.06}
SKETCHED = tuple(f"{name}_{share}" for name in METRICS for share in ("p50", "p95", "p99"))


def sketched(n: int, seed: int = 0, *, k: int = 4096, batch: int = 65_536, terms: Terms = TERMS) -> SketchSink:
    sink, rows = SketchSink(terms, k=k), drawn(n, seed)
    with sink:
        for begin in range(0, n, batch):
            sink.write(rows[begin : begin + batch])
    return sink


def same_but_quantiles(found: ClusterSummary, expected: ClusterSummary) -> None:
    for name, value in dataclasses.asdict(expected).items():
        if name not in SKETCHED:
            assert getattr(found, name) == pytest.approx(value, rel=1e-12, nan_ok=True), name


def rank_error(values: FloatArray, estimate: float, share: float) -> float:
    """How far the rank of ``estimate`` among the values is from ``share``; equal values have a range of ranks."""
    values = np.sort(values[np.isfinite(values)])
    low, high = (float(np.searchsorted(values, estimate, side)) / values.size for side in ("left", "right"))
    return max(low - share, share - high, 0.0)


@given(n=hs.integers(0, 300), seed=hs.integers(0, 2**31), batch=hs.integers(1, 400))
def test_what_fits_into_a_sketch_is_exact(n: int, seed: int, batch: int) -> None:
    terms = Terms(REPLICAS, warmup=0.5)
    found = sketched(n, seed, batch=batch, terms=terms).summary()
    expected = summarize_calls(drawn(n, seed), replicas=REPLICAS, warmup=0.5)
    same_but_quantiles(found, expected)
    for name in SKETCHED:
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-12, nan_ok=True), name


def test_quantiles_are_within_the_stated_error_and_the_rest_is_exact() -> None:
    rows, sink = drawn(300_000, 1), sketched(300_000, 1)
    found = sink.summary()
    same_but_quantiles(found, summarize_calls(rows, **SETTINGS))  # type: ignore[arg-type]
    counted = rows[rows["arrival"] >= TERMS.warmup]
    values = call_metrics(counted)
    values["program_latency"][counted["program_start"] < TERMS.warmup] = np.nan
    assert sink.rank_error == pytest.approx(0.000706, abs=1e-6)
    for name in METRICS:
        for share, suffix in ((0.5, "p50"), (0.95, "p95"), (0.99, "p99")):
            # Twice: the library promises the error itself of 99 sketches in 100 alone.
            assert rank_error(values[name], getattr(found, f"{name}_{suffix}"), share) <= 2 * sink.rank_error, (name, suffix)


def test_the_library_keeps_its_promise() -> None:
    """Of 60 small sketches few may be off by more than the error that holds for 99 of 100."""
    rows = drawn(20_000, 2)
    latency = call_metrics(rows[rows["arrival"] >= TERMS.warmup])["latency"]
    off = 0
    for _ in range(60):
        sink = SketchSink(TERMS, k=200)
        sink.write(rows)
        shares = (0.1, 0.5, 0.9, 0.95, 0.99)
        estimates = sink.quantiles("latency", shares)
        off += max(rank_error(latency, estimate, share) for estimate, share in zip(estimates, shares, strict=True)) > sink.rank_error
    assert sink.rank_error == pytest.approx(0.0133, abs=1e-4) and off <= 6


def test_memory_does_not_grow_with_the_calls() -> None:
    sink, rows = SketchSink(Terms(REPLICAS), k=200), drawn(50_000, 3)
    sizes = []
    for _ in range(4):
        for _ in range(10):
            sink.write(rows)
        sizes.append(len(sink.to_bytes()))
    assert sink.summary().requests == 2_000_000
    assert max(sizes) <= 1.05 * sizes[0] and max(sizes) < 35_000
    assert len(sketched(400_000, 3).to_bytes()) < 600_000


def test_seeds_are_merged() -> None:
    first, second = sketched(30_000, 1), sketched(50_000, 2)
    one, two = first.summary(), second.summary()
    first.merge(second)
    found = first.summary()
    rows = np.concatenate([drawn(30_000, 1), drawn(50_000, 2)])
    rows["number"] = np.arange(len(rows))  # figures of one run, in which no call is there twice
    whole = summarize_calls(rows, **SETTINGS)  # type: ignore[arg-type]
    seconds = one.sim_seconds + two.sim_seconds
    rates = {"throughput_req_s", "throughput_tok_s", "sim_seconds"}
    same_but_quantiles(dataclasses.replace(found, **{name: getattr(whole, name) for name in rates}), whole)
    assert found.sim_seconds == seconds
    assert found.throughput_req_s == pytest.approx(found.completed / (seconds - 2 * TERMS.warmup))
    counted = rows[rows["arrival"] >= TERMS.warmup]
    assert rank_error(call_metrics(counted)["latency"], found.latency_p99, 0.99) <= 2 * first.rank_error
    assert second.summary() == two, "the other one is as it was"
    first.write(drawn(100, 9))
    assert first.summary().sim_seconds == seconds


def test_worker_processes_hand_sketches_back() -> None:
    pytest.importorskip("joblib", reason="joblib is not installed (extra: cli)")
    merged = SketchSink(TERMS)
    for sink in unordered("loky", 2, sketched, [(2000, seed) for seed in range(4)]):
        merged.merge(sink)
    here = SketchSink(TERMS)
    for seed in range(4):
        here.merge(sketched(2000, seed))
    same_but_quantiles(merged.summary(), here.summary())
    assert merged.summary().requests > 4000


def test_only_like_is_merged_with_like() -> None:
    sink = sketched(1000)
    before = sink.to_bytes()
    with pytest.raises(ConfigError, match=r"merge: sketches of k = 200, must be 4096"):
        sink.merge(sketched(1000, k=200))
    with pytest.raises(ConfigError, match=r"merge: Terms\(replicas=3, warmup=0\.0.*must be counted by the same terms"):
        sink.merge(sketched(1000, terms=Terms(REPLICAS)))
    with pytest.raises(ConfigError, match="itself"):
        sink.merge(sink)
    assert sink.to_bytes() == before


def test_files_and_pickles_hold_all_of_it(tmp_path: Path) -> None:
    sink = sketched(20_000, 4)
    sink.ended(1000.0)
    sink.merge(sketched(20_000, 5))
    path = tmp_path / "figures.json"
    sink.save(path)
    for again in (SketchSink.load(path), SketchSink.load(str(path)), pickle.loads(pickle.dumps(sink))):
        assert again.summary() == sink.summary() and (again.k, again.terms) == (sink.k, sink.terms)
        assert again.to_bytes() == sink.to_bytes()
        again.merge(sketched(100, 6))
        assert again.summary().requests == sink.summary().requests
    empty = SketchSink.from_bytes(SketchSink(TERMS).to_bytes())
    assert math.isnan(empty.summary().latency_mean) and empty.summary().requests == 0


@pytest.mark.parametrize("field", ["form", "terms", "k", "counts", "present", "sums", "largest", "by_replica", "seconds", "sketches"])
def test_damaged_files_are_refused(field: str, tmp_path: Path) -> None:
    whole = json.loads(sketched(1000).to_bytes())
    path = tmp_path / "figures.json"
    for value in (None, 7, "x", [], {}):
        path.write_text(json.dumps(whole | {field: value}))
        with pytest.raises(ConfigError, match=r"figures\.json: not what SketchSink wrote"):
            SketchSink.load(path)
    path.write_text(json.dumps({key: value for key, value in whole.items() if key != field}))
    with pytest.raises(ConfigError, match="not what SketchSink wrote"):
        SketchSink.load(path)


def test_what_is_no_file_of_sketches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        SketchSink.load(tmp_path / "none")
    with pytest.raises(ConfigError, match="path: None, must be a path"):
        SketchSink.load(None)  # type: ignore[arg-type]
    for text in (b"", b"\xff", b"[]", b"3"):
        with pytest.raises(ConfigError, match="not what SketchSink wrote"):
            SketchSink.from_bytes(text)
    whole = json.loads(sketched(1000).to_bytes())
    cut = whole["sketches"] | {"ttft": whole["sketches"]["ttft"][:40]}
    for sketches in (cut, whole["sketches"] | {"ttft": whole["sketches"]["tpot"]}):
        with pytest.raises(ConfigError, match="not what SketchSink wrote"):
            SketchSink.from_bytes(json.dumps(whole | {"sketches": sketches}).encode())


@pytest.mark.parametrize("k", [7, 65_536, 1.5, True])
def test_sizes_out_of_range_are_refused(k: int) -> None:
    with pytest.raises(ConfigError, match="k: "):
        SketchSink(TERMS, k=k)


def test_quantiles_by_name() -> None:
    sink = sketched(1000)
    assert len(sink.quantiles("ttft", (0.0, 0.25, 1.0))) == 3
    assert sink.quantiles("latency", (1.0,)) == [sink.summary().latency_max]
    with pytest.raises(ConfigError, match="name: 'wait'"):
        sink.quantiles("wait")
    with pytest.raises(ConfigError, match=r"shares: 1\.5"):
        sink.quantiles("ttft", (1.5,))


def test_without_datasketches_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketches", None)
    with pytest.raises(MissingExtraError, match="datasketches is not installed; run: " + re.escape(install_command("cluster"))):
        SketchSink(TERMS)
