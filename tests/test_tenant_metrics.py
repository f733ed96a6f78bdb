"""Figures of tenants on logs whose figures can be told by hand."""

from __future__ import annotations

import numpy as np
import pytest

from llmsched_baselines import Setting, make_policy
from llmsched_env.errors import ConfigError
from llmsched_env.runner import run_episode
from llmsched_env.tenant_metrics import _backlogged, _service_until, summarize_tenants
from llmsched_env.tenant_terms import TenantTerms
from llmsched_env.types import RequestLog
from llmsched_env.workload import load_scenario

TERMS = (TenantTerms("a", 1.0, 2.0, 1.0), TenantTerms("b", 3.0, 100.0, 100.0))


def log(tenant: list[int] | None, **columns: list[float]) -> RequestLog:
    n = len(columns["arrival"])
    zeros = np.zeros(n, dtype=np.int32)
    return RequestLog(
        arrival=np.array(columns["arrival"], dtype=np.float64),
        prompt_tokens=np.array(columns["prompt"], dtype=np.int32),
        output_tokens=np.array(columns["output"], dtype=np.int32),
        class_id=zeros,
        admitted=np.array(columns["admitted"], dtype=np.float64),
        first_token=np.array(columns["first"], dtype=np.float64),
        completed=np.array(columns["completed"], dtype=np.float64),
        evictions=zeros,
        forced_evictions=zeros,
        rejected=np.zeros(n, dtype=np.bool_),
        tenant=None if tenant is None else np.array(tenant, dtype=np.int32),
    )


HAND = log(
    [0, 1, 1],
    arrival=[0.0, 0.0, 1.0],
    prompt=[10, 20, 30],
    output=[3, 1, 5],
    admitted=[4.0, 2.0, 6.0],
    first=[5.0, 3.0, np.nan],
    completed=[9.0, 3.0, np.nan],
)


def test_service_by_time() -> None:
    times = np.array([0.0, 4.0, 4.9, 5.0, 7.0, 9.0])
    assert _service_until(HAND, np.array([True, False, False]), times).tolist() == [0.0, 10.0, 10.0, 12.0, 14.0, 16.0]
    assert _service_until(HAND, np.array([False, True, True]), times).tolist() == [0.0, 22.0, 22.0, 22.0, 52.0, 52.0]


def test_backlog_joins_requests_that_overlap() -> None:
    edges = np.arange(8.0)
    assert _backlogged(HAND, np.array([False, True, True]), edges).tolist() == [True] * 6 + [False]
    assert _backlogged(HAND, np.array([True, False, False]), edges).tolist() == [True] * 4 + [False] * 3


def test_figures_by_hand() -> None:
    found = summarize_tenants(HAND, TERMS, window=1.0)
    a, b = found.tenants
    assert (a.requests, a.completed, a.service, a.goodput, a.latency_mean, a.ttft_mean) == (1, 1, 16.0, 0.0, 9.0, 5.0)
    assert (b.requests, b.completed, b.service, b.goodput, b.latency_mean) == (2, 1, 52.0, 0.5, 3.0)
    assert found.contended_seconds == 4.0
    # Until 1 nobody gets anything; at 2 b its prompt, at 3 its token, at 4 a its prompt.
    assert found.jain == pytest.approx((1 + 0.5 + 0.5 + 0.5) / 4)
    assert found.fair_latency == pytest.approx((9.0 + 3 * 3.0) / 4) and found.weighted_goodput == pytest.approx(3 * 0.5 / 4)
    assert (a.contended_service, b.contended_service) == (10.0, 22.0)


def test_equal_shares_over_weight_have_index_one() -> None:
    """Weights 1 : 3, and prompts of 10 and 30 at the same times."""
    both = log(
        [0, 1] * 4,
        arrival=[0.0] * 8,
        prompt=[10, 30] * 4,
        output=[1] * 8,
        admitted=[1.5, 1.5, 2.5, 2.5, 3.5, 3.5, 9.0, 9.0],
        first=[np.nan] * 8,
        completed=[np.nan] * 8,
    )
    found = summarize_tenants(both, TERMS, window=1.0)
    assert found.jain == pytest.approx(1.0) and found.contended_seconds == 9.0


def test_a_log_without_tenants_is_one_tenants() -> None:
    alone = log(None, arrival=[0.0], prompt=[4], output=[1], admitted=[0.0], first=[1.0], completed=[1.0])
    found = summarize_tenants(alone, TERMS[:1])
    assert found.tenants[0].service == 6.0 and np.isnan(found.jain) and found.weighted_goodput == 1.0
    empty = log(None, arrival=[], prompt=[], output=[], admitted=[], first=[], completed=[])
    assert np.isnan(summarize_tenants(empty, TERMS).fair_latency)


def test_bad_arguments() -> None:
    with pytest.raises(ConfigError, match="terms: 1 given, must be one for each tenant, up to number 1"):
        summarize_tenants(HAND, TERMS[:1])
    with pytest.raises(ConfigError, match=r"window: 0.0, must be finite"):
        summarize_tenants(HAND, TERMS, window=0.0)
    with pytest.raises(ConfigError, match="'a' is named 2 times"):
        summarize_tenants(HAND, (TERMS[0], TERMS[0]))


def test_sums_agree_with_the_requests_of_a_run() -> None:
    scenario = load_scenario("tenants")
    requests = scenario.generate(0, num_requests=200)
    result = run_episode(make_policy("vtc", Setting(scenario.statistics, scenario.rate, scenario.engine)), requests)
    found = summarize_tenants(result.log, scenario.statistics.tenants)
    tokens = requests.prompt_tokens.astype(np.int64) + 2 * requests.output_tokens
    for j, one in enumerate(found.tenants):
        assert one.service == pytest.approx(tokens[requests.tenant == j].sum(), rel=1e-12) and one.completed == one.requests
    assert 0.25 <= found.jain <= 1.0
