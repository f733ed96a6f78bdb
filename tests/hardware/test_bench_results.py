"""Result files of serving benchmarks: what is read from each tool's, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_files import Served, aiperf_records, guidellm_report, vllm_result, write

from llmsched_env.errors import ConfigError
from llmsched_hardware.calibration.bench_metrics import check_counters, read_counters
from llmsched_hardware.calibration.bench_results import BenchResult, read_results


def few(count: int = 12) -> Served:
    """Requests of 3 tokens, one sent every half second, the tokens 0.1, 0.15 and 0.25 s later."""
    arrival = 1000.0 + 0.5 * np.arange(count)
    return Served(arrival, [50 + i for i in range(count)], [3] * count, [a + np.array([0.1, 0.15, 0.25]) for a in arrival])


def check_few(result: BenchResult) -> None:
    assert np.allclose(result.arrival, 0.5 * np.arange(12), atol=1e-6)
    assert result.prompt_tokens.tolist() == [50 + i for i in range(12)] and set(result.output_tokens) == {3}
    assert np.allclose(result.first, 0.1) and np.allclose(result.last, 0.25) and np.allclose(result.tpot, 0.075)
    assert result.counted.all() and result.rate == pytest.approx(2.0)


def test_every_tool_tells_the_same(tmp_path: Path) -> None:
    served = few()
    for value, tool, told in (
        (vllm_result(served), "vllm", True),
        (guidellm_report(served), "guidellm", False),
        (aiperf_records(served), "aiperf", True),
    ):
        (result,) = read_results(write(tmp_path / tool, value))
        assert result.tool == tool and not result.notes
        check_few(result)
        assert result.has_gaps.all() == told and (not told or np.allclose(np.concatenate(result.gaps), [0.05, 0.1] * 12))


def test_requests_are_put_in_the_order_of_sending(tmp_path: Path) -> None:
    value = vllm_result(few())
    turned = {name: column[::-1] if isinstance(column, list) else column for name, column in value.items()}
    check_few(read_results(write(tmp_path / "r.json", turned))[0])


def test_several_runs_in_a_file(tmp_path: Path) -> None:
    appended = read_results(write(tmp_path / "a.json", [vllm_result(few()), vllm_result(few())]))
    assert [r.label for r in appended] == ["a.json#1", "a.json#2"]
    report = guidellm_report(few())
    report["benchmarks"] *= 3
    swept = read_results(write(tmp_path / "g.json", report))
    assert [r.label for r in swept] == ["g.json#1", "g.json#2", "g.json#3"]
    for result in (*appended, *swept):
        check_few(result)


def test_a_chunk_without_a_token_is_joined_and_two_tokens_in_a_chunk_are_no_times(tmp_path: Path) -> None:
    value = vllm_result(few())
    value["itls"][0] = [0.0, 0.05, 0.1]
    value["itls"][1] = [0.05, 0.1, 0.0]
    value["itls"][2] = [0.15]
    (result,) = read_results(write(tmp_path / "r.json", value))
    assert result.has_gaps.tolist() == [True, True, False] + [True] * 9
    assert np.allclose(result.gaps[0], [0.05, 0.1]) and np.allclose(result.gaps[1], [0.05, 0.1])
    assert np.allclose(result.last, 0.25)


def test_few_failures_are_left_out_with_a_note(tmp_path: Path) -> None:
    value = vllm_result(few(120))
    value["errors"][3], value["output_lens"][3], value["itls"][3], value["ttfts"][3] = "refused", 0, [], 0.0
    (result,) = read_results(write(tmp_path / "r.json", value))
    assert len(result) == 119 and result.notes == ("1 failed requests left out",)


def test_requests_beside_ones_that_guidellm_cut_off_are_load_alone(tmp_path: Path) -> None:
    report = guidellm_report(few())
    report["benchmarks"][0]["requests"]["incomplete"] = [{"info": {"timings": {"request_start": 1005.3}}}]
    (result,) = read_results(write(tmp_path / "r.json", report))
    assert result.counted.tolist() == [True] * 11 + [False] and "count as load alone" in result.notes[0]


def test_aiperf_units_warm_up_and_missing_chunks(tmp_path: Path) -> None:
    records = aiperf_records(few(13))
    records[0]["metadata"]["benchmark_phase"] = "warmup"
    for record in records:
        del record["metrics"]["inter_chunk_latency"]
        record["metrics"]["time_to_first_token"] = {"value": 100_000.0, "unit": "us"}
    (result,) = read_results(write(tmp_path / "r.jsonl", records))
    assert len(result) == 12 and result.notes == ("1 requests of the warm-up left out",) and not result.has_gaps.any()
    assert np.allclose(result.first, 0.1) and np.allclose(result.last, 0.25)


def changed(**changes: Any) -> dict[str, Any]:
    return vllm_result(few()) | changes


def without(*names: str) -> dict[str, Any]:
    return {name: column for name, column in vllm_result(few()).items() if name not in names}


def with_entry(name: str, entry: Any) -> dict[str, Any]:
    value = vllm_result(few())
    value[name][2] = entry
    return value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (without("ttfts", "itls", "start_times", "input_lens", "output_lens"), "run vllm bench serve with --save-result --save-detailed"),
        (without("itls"), "fields itls are missing"),
        ({"hello": 1}, "not a benchmark's result file"),
        (changed(ttfts=[0.1]), "input_lens has 12 entries, ttfts 1"),
        (changed(ttfts=0.1), "ttfts is 0.1, must be a list"),
        (changed(errors=["no"] * 12), "12 of 12 requests failed, must be at most 1 %"),
        (vllm_result(few(3)), "3 completed requests, must be at least 10"),
        (with_entry("ttfts", float("nan")), "request 2: TTFT: nan, must be a number > 0"),
        (with_entry("ttfts", "0.1"), "request 2: TTFT: '0.1'"),
        (with_entry("ttfts", -0.1), "request 2: TTFT: -0.1"),
        (with_entry("itls", [0.1, float("inf")]), "request 2: inter-token time 1: inf"),
        (with_entry("itls", [0.1, None]), "request 2: inter-token time 1: None"),
        (with_entry("itls", 0.1), "request 2: itls is 0.1, must be a list of seconds"),
        (with_entry("input_lens", 0), "request 2: prompt tokens: 0, must be an integer from 1"),
        (with_entry("input_lens", 1.5), "request 2: prompt tokens: 1.5"),
        (with_entry("start_times", None), "request 2: start: None"),
        ({"benchmarks": []}, "benchmarks is [], must be a list with a benchmark"),
        ({"benchmarks": [{}]}, "requests: None, must be an object"),
        ({"benchmarks": [{"requests": {"successful": [{}] * 12}}]}, "request 0:: info: None, must be an object"),
    ],
)
def test_what_is_refused(tmp_path: Path, value: Any, message: str) -> None:
    path = write(tmp_path / "r.json", value)
    with pytest.raises(ConfigError) as refused:
        read_results(path)
    assert message in str(refused.value) and "r.json" in str(refused.value)


@pytest.mark.parametrize("text", ["", "  \n", "{", "[1, 2]", "3", '{"ttfts": [0.1]} x', "\x00"])
def test_what_is_no_json_object(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"r\.json: "):
        read_results(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_results(tmp_path / "none.json")
    (tmp_path / "b").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a text file"):
        read_results(tmp_path / "b")


def test_guidellm_without_streaming_and_aiperf_without_its_metrics(tmp_path: Path) -> None:
    report = guidellm_report(few())
    report["benchmarks"][0]["requests"]["successful"][4]["info"]["timings"]["first_token_iteration"] = None
    with pytest.raises(ConfigError, match="request 4:: times of its tokens are missing; run GuideLLM with streaming"):
        read_results(write(tmp_path / "g.json", report))
    for change, message in (
        (lambda r: r["metrics"].pop("time_to_first_token"), "metric time_to_first_token is missing; record it with --streaming"),
        (lambda r: r["metrics"]["time_to_first_token"].update(unit="hours"), "unit 'hours', must be one of s, sec"),
        (lambda r: r["metadata"].pop("request_start_ns"), "request_start_ns: None, must be an integer"),
        (lambda r: r.update(metrics=None), "metrics: None, must be an object"),
    ):
        records = copy.deepcopy(aiperf_records(few()))
        change(records[5])
        with pytest.raises(ConfigError, match=f"line 6: .*{message}|line 6:.*{message}"):
            read_results(write(tmp_path / "a.jsonl", records))


# --- the server's own counters ----------------------------------------------------------------------
BEFORE = """# HELP vllm:num_preemptions_total Cumulative number of preemptions.
# TYPE vllm:num_preemptions_total counter
vllm:num_preemptions_total{engine="0",model_name="m"} 1.0
vllm:prompt_tokens_total{engine="0",model_name="m"} 100.0
vllm:generation_tokens_total{engine="0",model_name="m"} 10.0
vllm:iteration_tokens_total_bucket{engine="0",le="1.0",model_name="m"} 0.0
vllm:iteration_tokens_total_count{engine="0",model_name="m"} 7.0
vllm:cache_config_info{block_size="32",engine="0",gpu_memory_utilization="0.92",num_gpu_blocks="1025",a="x \\" y"} 1.0
process_cpu_seconds_total 7.81
"""
AFTER = (
    BEFORE.replace(" 1.0\nvllm:prompt", " 4.0\nvllm:prompt").replace(" 100.0", " 766.0").replace(" 10.0", " 46.0").replace(" 7.0", " 47.0")
)


def texts(tmp_path: Path, before: str = BEFORE, after: str = AFTER) -> tuple[Path, Path]:
    paths = tmp_path / "before.txt", tmp_path / "after.txt"
    for path, text in zip(paths, (before, after), strict=True):
        path.write_text(text)
    return paths


def test_counters_are_differences_and_the_null_block_is_not_usable(tmp_path: Path) -> None:
    counters = read_counters(*texts(tmp_path))
    assert (counters.iterations, counters.preemptions, counters.prompt_tokens, counters.output_tokens) == (40, 3, 666, 36)
    assert (counters.num_blocks, counters.block_size, counters.cached_tokens) == (1024, 32, None)
    (result,) = read_results(write(tmp_path / "r.json", vllm_result(few())))
    assert check_counters(counters, [result]) == []


def test_counters_of_another_run_are_refused_and_a_prefix_cache_is_said(tmp_path: Path) -> None:
    (result,) = read_results(write(tmp_path / "r.json", vllm_result(few())))
    other = read_counters(*texts(tmp_path, after=AFTER.replace(" 766.0", " 76600.0")))
    with pytest.raises(ConfigError, match="counted 76,500 prompt tokens more than in --metrics-before, the result files hold 666"):
        check_counters(other, [result])
    hits = 'vllm:prefix_cache_hits_total{engine="0"} '
    cached = read_counters(*texts(tmp_path, before=f"{BEFORE}{hits}0\n", after=f"{AFTER}{hits}64\n"))
    assert "64 of 666 prompt tokens came from the prefix cache" in check_counters(cached, [result])[0]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (AFTER, BEFORE, "must not be less: another start of the server"),
        (BEFORE, "", "holds no metric of vLLM"),
        ("hello", AFTER, "must be lines of NAME"),
        ("vllm:x y", AFTER, "must be a number"),
        (BEFORE.replace(" 7.0", " NaN"), AFTER, "must be finite"),
    ],
)
def test_metrics_that_are_refused(tmp_path: Path, before: str, after: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_counters(*texts(tmp_path, before, after))
    assert message in str(refused.value)


def test_json_of_python_holds_nan(tmp_path: Path) -> None:
    assert "NaN" in json.dumps(with_entry("ttfts", float("nan")))  # so the refusal above reads what a benchmark can have written
