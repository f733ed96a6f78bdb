"""Scenarios: what they hold, how they draw, exact replays, and agreement of the shipped tables with the raw data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_readers import raw_trace, write

from llmsched_env.cli import build_statistics
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError
from llmsched_env.fluid import equilibrium_of, stability_boundary
from llmsched_env.types import QueueLayout, Workload
from llmsched_env.workload import MMPP2, Gamma, Poisson, load_lengths, load_scenario, read_trace, scenario_from_trace, scenario_names

ROOT = Path(__file__).resolve().parents[1]

TABLES = {
    "azure-conv": "azure_2023_conv.csv.gz",
    "azure-code": "azure_2023_code.csv.gz",
    "sharegpt": "sharegpt_lengths_10k.csv.gz",
    "mooncake": "mooncake_conversation.jsonl.gz",
}
STATISTICS = ROOT / "llmsched_env" / "workload" / "statistics"
STEADY = ["two-type", "nested-two-type", "p512d20", "lmsys", "azure-conv", "azure-code", "sharegpt", "mooncake"]
PRESSED = ["azure-conv-40gb", "azure-conv-40gb-bursts"]  # azure-conv at the limit of a smaller memory
NAMES = [*STEADY[:5], *PRESSED, *STEADY[5:], "tenants"]


def same(first: Workload, second: Workload) -> bool:
    columns = ("arrival", "prompt_tokens", "output_tokens", "type_id")
    return all(getattr(first, c).tobytes() == getattr(second, c).tobytes() for c in columns)


def test_names() -> None:
    assert scenario_names() == NAMES
    assert load_scenario("lmsys") is load_scenario("lmsys")


@pytest.mark.parametrize(("name", "near"), [("azure-con", "azure-conv"), ("two_type", "two-type"), ("ShareGPT", None)])
def test_unknown_names_give_the_nearest(name: str, near: str | None) -> None:
    with pytest.raises(ConfigError, match=r"is unknown.*known: two-type") as caught:
        load_scenario(name)
    assert near is None or f"did you mean {near!r}" in str(caught.value)


# --- definitions ----------------------------------------------------------------------------------


def test_two_type_is_the_papers() -> None:
    scenario = load_scenario("two-type")
    assert scenario.engine == EngineConfig.paper(3750, d0=1.0, d1=1e-3) and scenario.rate == 3.0
    equilibrium = equilibrium_of(scenario.statistics, scenario.rate, scenario.engine)
    assert equilibrium.rho == pytest.approx(0.75) and equilibrium.kv_tokens == pytest.approx(3000.0)
    workload = scenario.generate(0, horizon=20_000.0)
    assert len(workload) == pytest.approx(60_000, rel=0.02) and workload.arrival[-1] <= 20_000.0
    assert np.bincount(workload.type_id) / 20_000 == pytest.approx([2.0, 1.0], rel=0.03)
    assert set(zip(workload.prompt_tokens.tolist(), workload.output_tokens.tolist(), strict=True)) == {(10, 10), (10, 20)}
    assert scenario.known_layout == QueueLayout(by="type", num_types=2)


def test_nested_two_type_has_the_required_memory() -> None:
    """C = M_req = M^pi + l'_1-boundary term at n = (16, 6), delta = 0.1, T = 20,000 s, m = 2 (arXiv 2504.11320 v4, unknown types)."""
    scenario = load_scenario("nested-two-type")
    base = 16 * 15 * 11 + 6 * 25.5 * 10
    theta = 0.361916  # root of exp(-6 t) (2/3 + exp(t) / 3)^16 = 1
    assert np.exp(-6 * theta) * (2 / 3 + np.exp(theta) / 3) ** 16 == pytest.approx(1.0, abs=1e-5)
    required = base + 20 * (6 + np.log(2 * (1 + 20_000) / 0.1) / theta)
    assert base == 4170 and scenario.engine.capacity_tokens == round(required) == 5003
    assert scenario.layout == QueueLayout(segment_ends=(10,)) and scenario.layout.num_queues == 2
    assert same(scenario.generate(3), load_scenario("two-type").generate(3))


def test_p512d20() -> None:
    scenario = load_scenario("p512d20")
    workload = scenario.generate(0, num_requests=50)
    assert set(workload.prompt_tokens) == {512} and set(workload.output_tokens) == {20}
    assert scenario.rate == 18.0 and scenario.engine == EngineConfig.vllm()


@pytest.mark.parametrize("name", NAMES)
def test_every_scenario_is_whole(name: str) -> None:
    scenario = load_scenario(name)
    assert scenario.name == name and scenario.description and scenario.source
    expected = "tenant" if name == "tenants" else "single" if name in STEADY else "prompt"
    assert not scenario.layout.reveals_output_length and scenario.layout.by == expected
    assert scenario.known_layout.by in ("type", "output")
    load = scenario.rate / stability_boundary(scenario.statistics, scenario.engine)
    low, high = {"azure-conv-40gb": (1.1, 1.2), "azure-code": (0.36, 0.4)}.get(name, (0.4, 0.96))
    assert low < load < high
    workload = scenario.generate(5)
    assert len(workload) == scenario.num_requests
    total = workload.prompt_tokens.astype(np.int64) + workload.output_tokens
    assert total.max() <= scenario.engine.longest_request
    classes = scenario.known_layout.classify(workload.prompt_tokens, workload.output_tokens, workload.type_id)
    shares = np.bincount(classes, minlength=scenario.known_layout.num_classes) / len(workload)
    assert shares.min() > 0.15, "no class is nearly empty"


@pytest.mark.parametrize("name", ["lmsys", "azure-conv", "azure-code", "sharegpt"])
def test_realistic_scenarios_have_four_segments_and_four_classes(name: str) -> None:
    scenario = load_scenario(name)
    assert scenario.layout.num_segments == 4 and scenario.known_layout.num_classes == 4
    assert scenario.layout.segment_ends == scenario.known_layout.edges
    output = scenario.generate(1, num_requests=50_000).output_tokens
    for level, end in zip((0.25, 0.5, 0.75), scenario.layout.segment_ends, strict=True):
        assert np.mean(output < end) - 0.02 <= level <= np.mean(output <= end) + 0.02


def test_the_smaller_memory_changes_no_request() -> None:
    base, small, bursts = (load_scenario(name) for name in ("azure-conv", *PRESSED))
    assert same(small.generate(3, rate=5.0, num_requests=500), base.generate(3, num_requests=500))
    assert small.engine == bursts.engine == base.engine.replace(num_blocks=2816) and small.layout == bursts.layout
    assert (small.layout.num_classes, small.layout.num_segments, small.num_requests) == (4, 2, 500)
    assert small.known_layout == bursts.known_layout == base.known_layout
    assert isinstance(small.arrivals, Poisson) and small.rate == 6.5
    assert bursts.arrivals == MMPP2(2.0, 11.0, 30.0, 15.0) and bursts.rate == pytest.approx(5.0)
    workload = small.generate(1, num_requests=50_000)
    shares = np.bincount(small.layout.classify(workload.prompt_tokens, workload.output_tokens, workload.type_id)) / 50_000
    assert shares.min() > 0.15


def test_azure_code_arrives_with_the_measured_burstiness() -> None:
    scenario = load_scenario("azure-code")
    assert isinstance(scenario.arrivals, Gamma) and scenario.arrivals.cv == 12.182
    assert isinstance(load_scenario("azure-conv").arrivals, Poisson)


# --- drawing --------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not() -> None:
    scenario = load_scenario("azure-conv")
    assert same(scenario.generate(7), scenario.generate(7))
    assert not same(scenario.generate(7), scenario.generate(8))
    assert same(scenario.generate(7), scenario.generate(np.random.default_rng(7)))
    sequence = np.random.SeedSequence(7)
    assert same(scenario.generate(7), scenario.generate(sequence)) and same(scenario.generate(7), scenario.generate(sequence))
    rng = np.random.default_rng(7)
    assert not same(scenario.generate(rng), scenario.generate(rng)), "a generator gives a new episode at each call"


@pytest.mark.parametrize("name", NAMES[:-1])  # with tenants it holds for each: ``test_tenants``
def test_rates_share_lengths_and_arrivals_up_to_scale(name: str) -> None:
    scenario = load_scenario(name)
    slow, fast = scenario.generate(7, rate=2.0), scenario.generate(7, rate=4.0)
    assert slow.prompt_tokens.tobytes() == fast.prompt_tokens.tobytes()
    assert slow.output_tokens.tobytes() == fast.output_tokens.tobytes()
    if not isinstance(scenario.arrivals, MMPP2):  # whose phases last as long at any rate
        assert slow.arrival == pytest.approx(2.0 * fast.arrival)


@pytest.mark.parametrize("name", ["two-type", "azure-conv"])
def test_lengths_do_not_depend_on_the_arrivals(name: str) -> None:
    """Processes that draw differently from the generator, and different counts: the same requests in the same order."""
    scenario = load_scenario(name)
    first = scenario.generate(7, num_requests=300)
    for arrivals in (Gamma(3.0, 2.0), MMPP2(1.0, 9.0, 5.0, 2.0)):
        other = replace(scenario, arrivals=arrivals).generate(7, num_requests=300)
        assert other.prompt_tokens.tobytes() == first.prompt_tokens.tobytes()
        assert other.output_tokens.tobytes() == first.output_tokens.tobytes()
        assert other.arrival.tobytes() != first.arrival.tobytes()
    for rate in (2.0, 4.0):
        until = scenario.generate(7, rate=rate, horizon=50.0)
        assert until.output_tokens.tobytes() == first.output_tokens[: len(until)].tobytes()


def test_arrivals_do_not_depend_on_how_many_lengths_are_drawn() -> None:
    scenario = load_scenario("azure-conv")
    few, many = scenario.generate(7, num_requests=10), scenario.generate(7, num_requests=500)
    assert few.arrival.tobytes() == many.arrival[:10].tobytes()


def test_horizon_and_count() -> None:
    scenario = load_scenario("azure-conv")
    free = scenario.generate(1, horizon=100.0)
    assert free.arrival[-1] <= 100.0 and len(free) == pytest.approx(500, abs=100)
    assert len(scenario.generate(1, horizon=100.0, num_requests=20)) == 20
    assert len(scenario.generate(1, horizon=1e-9)) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": -1.0}, r"arrivals\.rate: -1\.0"),
        ({"rate": float("nan")}, r"arrivals\.rate: nan"),
        ({"num_requests": 0}, "num_requests: 0"),
        ({"num_requests": 1.5}, r"num_requests: 1\.5"),
        ({"horizon": 0.0}, r"horizon: 0\.0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_scenario("azure-conv").generate(0, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-1, 1.5, True, None])
def test_bad_seeds_are_refused(seed: object) -> None:
    with pytest.raises(ConfigError, match="seed"):
        load_scenario("azure-conv").generate(seed)  # type: ignore[arg-type]


# --- exact replays --------------------------------------------------------------------------------

ROWS = "arrived_at,num_prefill_tokens,num_decode_tokens\n0.125,4,5\n0.375,6,7\n0.375,8,9\n1.125,5,1\n"


def test_a_trace_is_replayed_exactly(tmp_path: Path) -> None:
    scenario = scenario_from_trace(write(tmp_path, ROWS, "my.csv"))
    assert scenario.name == "my" and scenario.num_requests == 4 and scenario.rate == pytest.approx(3.0)
    for seed in (0, 1):
        workload = scenario.generate(seed, rate=scenario.rate)
        assert workload.arrival.tolist() == [0.0, 0.25, 0.25, 1.0]
        assert workload.prompt_tokens.tolist() == [4, 6, 8, 5] and workload.output_tokens.tolist() == [5, 7, 9, 1]
    assert scenario.generate(0, num_requests=2).prompt_tokens.tolist() == [4, 6]
    assert scenario.generate(0, horizon=0.5).prompt_tokens.tolist() == [4, 6, 8]
    assert scenario.generate(0, horizon=100.0).prompt_tokens.tolist() == [4, 6, 8, 5], "a replay does not repeat"
    assert len(scenario.generate(0, horizon=1e12)) == 4
    assert scenario.generate(0, rate=6.0).arrival == pytest.approx([0.0, 0.125, 0.125, 0.5])
    with pytest.raises(ConfigError, match="num_requests: 5, but my has 4 requests"):
        scenario.generate(0, num_requests=5)
    assert scenario.statistics.mean_output == pytest.approx(5.5)
    assert scenario.known_layout.by == "output" and scenario.layout.by == "single"


def test_a_trace_at_another_rate(tmp_path: Path) -> None:
    scenario = scenario_from_trace(write(tmp_path, ROWS), rate=6.0, name="fast")
    assert scenario.name == "fast" and scenario.rate == pytest.approx(6.0)
    assert scenario.generate(0).arrival.tolist() == scenario.generate(0, rate=6.0).arrival.tolist() == [0.0, 0.125, 0.125, 0.5]
    with pytest.raises(ConfigError, match=r"arrivals\.rate: 0"):
        scenario_from_trace(write(tmp_path, ROWS), rate=0)


def test_a_type_column_gives_the_classes(tmp_path: Path) -> None:
    text = "request_id,arrived_at,prompt_tokens,output_tokens,type\na,0,4,5,1\nb,1,6,7,2\n"
    scenario = scenario_from_trace(write(tmp_path, text))
    assert scenario.known_layout == QueueLayout(by="type", num_types=2)
    workload = scenario.generate(0)
    assert workload.type_id.tolist() == [0, 1] and workload.request_id == ("a", "b")
    assert scenario.generate(0, num_requests=1).request_id == ("a",)
    assert scenario.statistics.num_types == 2


def test_lengths_only_files_need_a_rate(tmp_path: Path) -> None:
    file = write(tmp_path, "num_prefill_tokens,num_decode_tokens\n4,5\n6,7\n8,0\n")
    with pytest.raises(ConfigError, match="has lengths only: give a rate"):
        scenario_from_trace(file)
    scenario = scenario_from_trace(file, rate=2.0)
    assert isinstance(scenario.arrivals, Poisson) and scenario.num_requests == 2 and "1 rows dropped" in scenario.description
    first, second = scenario.generate(0), scenario.generate(1)
    assert first.prompt_tokens.tolist() == second.prompt_tokens.tolist() == [4, 6]
    assert first.arrival.tolist() != second.arrival.tolist()


def test_the_default_engine_holds_the_longest_request(tmp_path: Path) -> None:
    text = "arrived_at,num_prefill_tokens,num_decode_tokens\n0,{},5\n"
    default = EngineConfig.vllm()
    assert scenario_from_trace(write(tmp_path, text.format(100))).engine == default
    assert scenario_from_trace(write(tmp_path, text.format(9000))).engine == default.replace(max_model_len=9005)
    huge = scenario_from_trace(write(tmp_path, text.format(10**6))).engine
    assert huge.max_model_len == default.kv_capacity_tokens, "longer requests are the engine's to refuse"
    mine = EngineConfig.paper(100, d0=0.1, d1=0.0)
    assert scenario_from_trace(write(tmp_path, text.format(9000)), engine=mine).engine is mine


def test_one_request_and_constant_outputs(tmp_path: Path) -> None:
    scenario = scenario_from_trace(write(tmp_path, "arrived_at,num_prefill_tokens,num_decode_tokens\n2,4,1\n"))
    assert scenario.rate == 1.0 and scenario.layout.num_queues == 1 and scenario.known_layout.num_classes == 1
    assert scenario.generate(0, rate=scenario.rate).arrival.tolist() == [0.0]


@pytest.mark.parametrize("name", ["azure_2023_conv.csv.gz", "burstgpt_1_head.csv.gz", "vllm_measured_RTX4090_llama31-8b_requests.jsonl.gz"])
def test_real_traces_replay(name: str) -> None:
    file = raw_trace(name)
    trace, scenario = read_trace(file), scenario_from_trace(file)
    assert trace.arrival is not None
    workload = scenario.generate(0)
    assert workload.arrival.tobytes() == trace.arrival.tobytes() and workload.request_id == trace.request_id
    assert workload.prompt_tokens.tobytes() == trace.prompt_tokens.tobytes()
    longest = int((trace.prompt_tokens.astype(np.int64) + trace.output_tokens).max())
    assert scenario.engine.max_model_len == max(4096, longest)
    assert scenario.statistics.mean_prompt == pytest.approx(trace.prompt_tokens.mean())
    assert scenario.statistics.mean_output == pytest.approx(trace.output_tokens.mean())


# --- shipped tables -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lmsys", *TABLES])
def test_tables_are_small_and_name_their_source(name: str) -> None:
    text = (STATISTICS / f"{name}.json").read_text()
    record = json.loads(text)
    assert len(text) < 30_000 and record["name"] == name
    provenance = record["provenance"]
    assert "@ " in provenance["source"] and provenance["licence"] and provenance["rows"] and provenance["rule"]
    assert sorted(f.stem for f in STATISTICS.iterdir()) == sorted(["lmsys", "mooncake-sessions", *TABLES])


@pytest.mark.parametrize("name", TABLES)
def test_the_script_rebuilds_each_table_byte_for_byte(name: str, tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    assert build_statistics.main([str(raw_trace(TABLES[name])), "--name", name, "--out", str(out)]) == 0
    assert out.read_bytes() == (STATISTICS / f"{name}.json").read_bytes()


def test_the_script_takes_other_traces_with_their_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "".join(f"{i},{i % 50 + 1},{i % 7 + 1}\n" for i in range(500))
    file = write(tmp_path, ROWS.split("\n")[0] + "\n" + rows)
    out = tmp_path / "mine.json"
    arguments = [str(file), "--name", "mine", "--out", str(out)]
    assert build_statistics.main(arguments) == 2 and "give --source and --licence" in capsys.readouterr().err
    assert not out.exists()
    described = [*arguments, "--source", "test rows", "--licence", "none"]
    assert build_statistics.main([*described, "--max-total", "20"]) == 2 and "must be at least 400" in capsys.readouterr().err
    assert not out.exists()
    assert build_statistics.main(described) == 0
    table = load_lengths(str(out))
    assert table.source == "test rows" and table.statistics().mean_prompt == pytest.approx(25.5, rel=0.02)
    capsys.readouterr()
    below_a_file = [*described[:4], str(out / "x.json"), *described[5:]]
    assert build_statistics.main(below_a_file) == 2 and capsys.readouterr().err.startswith("error: --out: ")
    deeper = tmp_path / "new" / "x.json"
    assert build_statistics.main([*described[:4], str(deeper), *described[5:]]) == 0 and deeper.read_bytes() == out.read_bytes()


@pytest.mark.parametrize("name", ["lmsys", *TABLES])
def test_samples_match_the_raw_data(name: str) -> None:
    """Means to 2 %, P50, P90 and P99 to 5 %, memory of a request S = (l'+1)(l + l'/2) to 2 %, correlation to 0.03."""
    trace = read_trace(raw_trace(TABLES.get(name, "lmsys_lengths_wait_100k.csv.gz")))
    prompt, output = trace.prompt_tokens.astype(np.float64), trace.output_tokens.astype(np.float64)
    longest = load_scenario(name).engine.max_model_len
    keep = (prompt < 500) & (output < 500) if name == "lmsys" else prompt + output <= longest
    prompt, output = prompt[keep], output[keep]
    scenario = load_scenario(name)
    workload = scenario.generate(11, num_requests=400_000)
    for drawn, raw, mean in (
        (workload.prompt_tokens, prompt, scenario.statistics.mean_prompt),
        (workload.output_tokens, output, scenario.statistics.mean_output),
    ):
        assert drawn.mean() == pytest.approx(raw.mean(), rel=0.02)
        assert mean == pytest.approx(raw.mean(), rel=0.02)
        assert drawn.min() >= 1 and drawn.max() <= raw.max()
        for level in (0.5, 0.9, 0.99):
            assert np.quantile(drawn, level) == pytest.approx(np.quantile(raw, level), rel=0.05)
    memory = float(((output + 1) * (prompt + output / 2)).mean())
    drawn_memory = float(((workload.output_tokens + 1.0) * (workload.prompt_tokens + workload.output_tokens / 2.0)).mean())
    statistics = scenario.statistics
    known_memory = float(((statistics.output + 1) * (statistics.prompt + statistics.output / 2)) @ statistics.weight)
    assert drawn_memory == pytest.approx(memory, rel=0.02) and known_memory == pytest.approx(memory, rel=0.02)
    raw_correlation = np.corrcoef(prompt, output)[0, 1]
    correlation = np.corrcoef(workload.prompt_tokens, workload.output_tokens)[0, 1]
    assert correlation == pytest.approx(raw_correlation, abs=0.03)
    if abs(raw_correlation) > 0.03:
        assert np.sign(correlation) == np.sign(raw_correlation)


@pytest.mark.parametrize("name", ["azure-conv", "azure-code"])
def test_recorded_arrival_statistics_are_those_of_the_trace(name: str) -> None:
    trace = read_trace(raw_trace(TABLES[name]))
    assert trace.arrival is not None
    keep = trace.prompt_tokens.astype(np.int64) + trace.output_tokens <= 4096
    for key, times in (("all", trace.arrival), ("kept", trace.arrival[keep])):
        gaps = np.diff(times)
        recorded = load_lengths(name).record["arrivals"][key]
        assert recorded["rate"] == pytest.approx(1 / gaps.mean(), rel=1e-4)
        assert recorded["gap_cv"] == pytest.approx(gaps.std() / gaps.mean(), rel=1e-3)
