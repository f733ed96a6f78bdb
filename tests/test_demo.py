"""``llmsched demo``: both regimes run, and the sentences say what was measured and nothing else."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest

from llmsched_env.bench.comparison import Row, finished_rows
from llmsched_env.bench.demo import PAPER, REGIMES, comparison_of, why
from llmsched_env.bench.reason import reason
from llmsched_env.cli import demo
from llmsched_env.metrics import Summary

BLANK = Summary(**{f.name: 0 for f in dataclasses.fields(Summary)})


def rows(policy: str, latency: float, *, ttft: float, evictions: int = 0, p99: float = 10.0, known: bool = False, n: int = 4) -> list[Row]:
    """Runs on seeds with the same noise for every policy."""
    found = []
    for seed in range(n):
        noise = (1.05, 0.95, 1.02, 0.98)[seed % 4]
        changes = {"latency_mean": latency * noise, "ttft_mean": ttft * noise, "latency_p99": p99 * noise, "evictions": evictions}
        figures = dataclasses.replace(BLANK, requests=100, completed=100, **changes)
        found.append(Row("s", policy, 5.0, seed, figures, 0.0, known, ""))
    return found


def said(*runs: list[Row]) -> str:
    found = reason([row for run in runs for row in run], "greedy", loses="starts again")
    assert found is not None
    return found.sentence


def test_evictions_are_a_cause_only_where_greedy_has_more_of_them() -> None:
    better = rows("a", 4.0, ttft=1.0, evictions=1)
    with_evictions = said(rows("greedy", 10.0, ttft=7.0, evictions=50), better)
    assert "greedy evicts 50 times per 100 requests, after which the request starts again, and a evicts 1 times per" in with_evictions
    without = said(rows("greedy", 10.0, ttft=7.0, evictions=1), better)
    assert "evicts" not in without
    for text in (with_evictions, without):
        assert text.startswith("At 5 requests/s a has the least mean latency, 4 s against 10 s of greedy greedy (-60.0 %")
        assert "100 % of the difference is time before the first token" in text


def test_time_in_service_is_the_cause_where_it_is_what_differs() -> None:
    text = said(rows("greedy", 10.0, ttft=1.0), rows("a", 7.0, ttft=2.0))
    assert "100 % of the difference is time after the first token" in text
    assert "though requests wait longer for it (2 s for 1 s)" in text


def test_the_price_is_named_where_the_tail_is_longer() -> None:
    base = rows("greedy", 10.0, ttft=7.0, p99=20.0)
    assert "the price is the tail, a P99 latency of 80 s for 20 s" in said(base, rows("a", 4.0, ttft=1.0, p99=80.0))
    assert "price" not in said(base, rows("a", 4.0, ttft=1.0, p99=20.2))


def test_nobody_ahead_is_said_so() -> None:
    slower = reason(rows("greedy", 10.0, ttft=7.0) + rows("a", 11.0, ttft=8.0), "greedy", loses="starts again")
    assert slower is not None and slower.winner == "greedy"
    assert "no policy has a lower mean latency than greedy greedy" in slower.sentence and "evicts nothing" in slower.sentence
    noisy = rows("a", 9.99, ttft=7.0)
    noisy[0] = dataclasses.replace(noisy[0], figures=dataclasses.replace(noisy[0].figures, latency_mean=12.0))
    noisy[1] = dataclasses.replace(noisy[1], figures=dataclasses.replace(noisy[1].figures, latency_mean=8.0))
    assert "no policy" in said(rows("greedy", 10.0, ttft=7.0), noisy)


def test_a_winner_that_is_told_lengths_has_the_best_of_the_others_beside_it() -> None:
    text = said(rows("greedy", 10.0, ttft=7.0), rows("a", 4.0, ttft=1.0, known=True), rows("b", 6.0, ttft=3.0, evictions=3))
    assert "a (known lengths) has" in text
    assert "of the policies not told lengths, b has 6 s and evicts 3 times per 100 requests" in text


def test_the_highest_rate_counts_and_seeds_that_all_share() -> None:
    low = [dataclasses.replace(row, rate=3.0) for row in rows("b", 1.0, ttft=0.5)]
    found = reason([*low, *rows("greedy", 10.0, ttft=7.0, n=6), *rows("a", 4.0, ttft=1.0)], "greedy", loses="starts again")
    assert found is not None and (found.rate, found.winner, found.difference.seeds) == (5.0, "a", 4)


def test_no_sentence_without_something_to_compare() -> None:
    assert reason([], "greedy", loses="x") is None
    assert reason(rows("a", 1.0, ttft=1.0), "greedy", loses="x") is None
    assert reason(rows("greedy", 1.0, ttft=1.0), "greedy", loses="x") is None


def test_one_seed_has_no_interval() -> None:
    assert "(-60.0 %, one seed)" in said(rows("greedy", 10.0, ttft=7.0, n=1), rows("a", 4.0, ttft=1.0, n=1))


def test_demo_writes_both_regimes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    words = ["--out", str(out), "--seeds", "2", "--num-requests", "60", "--jobs", "1"]
    assert demo.main(words) == 0
    text = capsys.readouterr().out
    for regime in REGIMES:
        assert f"{regime.title}: 60 requests a run" in text
        assert sorted(p.name for p in (out / regime.key).iterdir()) == ["kv.png", "latency.png", "ttft.png", "ttft_cdf.png"]
    assert text.count("requests/s ") >= 2
    with (out / "summary.csv").open() as file:
        found = list(csv.DictReader(file))
    assert len(found) == sum(len(r.rates) * len(r.policies) for r in REGIMES) * 2
    html = (out / "report.html").read_text(encoding="utf-8")
    assert html.count("data:image/png;base64,") == 8 and html.count('class="sentence"') == 2
    assert "{{" not in html and "src=" not in html.replace('src="data:', "") and "<link" not in html
    assert demo.main(words) == 2
    assert "holds results already; use --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"), [(["--seeds", "0"], "--seeds"), (["--jobs", "0"], "--jobs"), (["--num-requests", "0"], "--num")]
)
def test_demo_refuses_counts_below_one(tmp_path: Path, words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--out", str(tmp_path), *words]) == 2
    assert named in capsys.readouterr().err


def test_the_paper_regime_is_the_paper_regime() -> None:
    """Greedy FCFS collapses where WAIT does not evict at all: two seeds at the highest rate."""
    comparison = comparison_of(dataclasses.replace(PAPER, rates=(3.1,), policies=("fcfs", "wait", "nested-wait")), 2)
    found = finished_rows(comparison, comparison.tasks())
    figures = {(row.policy, row.seed): row.figures for row in found}
    for seed in (0, 1):
        assert figures["fcfs", seed].latency_mean > 5 * figures["wait", seed].latency_mean
        assert figures["fcfs", seed].latency_mean > 2 * figures["nested-wait", seed].latency_mean
        assert figures["fcfs", seed].evictions > 10_000
        assert figures["wait", seed].evictions == figures["nested-wait", seed].evictions == 0
    result = why(PAPER, found)
    assert result is not None and result.winner == "wait" and "starts again from nothing" in result.sentence
