"""The settings by which vLLM itself keeps prefill and requests back, against vLLM's scheduler: no difference allowed in any step.

Cases are those of ``test_scheduler_equality`` with these settings drawn besides, as far as the installed vLLM has them. The interval
between prefills is vLLM's own from 0.33 on. Before, ``schedule(throttle_prefills=True)`` has the same gate for one call; there a
scheduler counts the iterations itself and asks for it.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here (make test-vllm)", allow_module_level=True)

from llmsched_env.backends import make_backend
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.errors import ConfigError
from llmsched_env.types import QueueLayout, Workload
from llmsched_hardware import vllm_scheduler as hw
from llmsched_hardware.gated_scheduler import GatedScheduler
from llmsched_hardware.options import SETTINGS
from llmsched_hardware.versions import release
from tests.real_vllm.test_scheduler_equality import Case, Tally, compare, compare_all

WORKLOADS = int(os.environ.get("LLMSCHED_VLLM_RIVAL_WORKLOADS", "60"))
MIN_ITERATIONS = 50_000
NATIVE_INTERVAL = (0, 33)
KNOWN = {setting.name: setting.known() for setting in SETTINGS}


class CountingScheduler(GatedScheduler):
    """vLLM before 0.33 with an interval between prefills: its gate for one call, asked for by the rule of 0.33.

    Attributes:
        interval: ``prefill_schedule_interval``.
        executed, last_prefill: iterations that scheduled tokens, and which of them carried prefill last.
    """

    interval = 1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.executed, self.last_prefill = 0, -self.interval

    def schedule(self) -> Any:
        prefilling = {r.request_id for r in self.running if r.is_prefill_chunk}
        tokens = {i: r.num_tokens for i, r in self.requests.items()}
        output = super().schedule(throttle_prefills=self.executed + 1 - self.last_prefill < self.interval)
        if self.gate.tokens:
            self.executed += 1
        if any(i in prefilling or (i in self.gate.admitted and tokens[i] > 1) for i in self.gate.tokens):
            self.last_prefill = self.executed
        return output


class IntervalBackend(hw.VllmSchedulerBackend):
    """``vllm-scheduler`` with intervals on a vLLM that has none of its own."""

    def scheduler_of(self, engine: EngineConfig) -> Any:
        counting = type("Counting", (CountingScheduler,), {"interval": engine.prefill_schedule_interval})
        return hw.faked_scheduler(counting, self.vllm_config(engine.replace(prefill_schedule_interval=1)), engine)


def since_prefill(scheduler: Any) -> tuple[int, bool]:
    """Iterations since the last that carried prefill, and whether the last release was bound by capacity."""
    if isinstance(scheduler, CountingScheduler):
        return scheduler.executed - scheduler.last_prefill, scheduler.prefill_capacity_bound
    return scheduler.num_executed_steps - scheduler.last_prefill_step, scheduler.prefill_capacity_bound


@dataclass(frozen=True)
class RivalCase(Case):
    """A random episode with these settings; every third under asynchronous scheduling."""

    @classmethod
    def of(cls, seed: int, names: tuple[str, ...] = ()) -> RivalCase:
        """``names``: settings to draw; default all that the installed vLLM has."""
        case = super().of(seed)
        g = np.random.default_rng((seed, 7))
        engine = case.engine
        drawn = {
            "prefill_schedule_interval": int(g.choice([1, 2, 3, 4, 8, 20])),
            "max_num_active_seqs": int(g.integers(1, engine.max_num_seqs + 1)) if g.random() < 0.6 else None,
            "long_prefill_token_threshold": int(g.choice([0, 1, 2, 5, 16, 40, 64])),
        }
        drawn["long_prefill_token_threshold"] = min(drawn["long_prefill_token_threshold"] or 0, engine.max_model_len)
        chosen = names or tuple(name for name in drawn if KNOWN[name] or name == "prefill_schedule_interval")
        # Half of the prompts are short, some of one token, which no gate keeps back.
        prompt = np.where(g.random(case.prompt.size) < 0.15, 1, case.prompt)
        changes = {name: drawn[name] for name in chosen} | {"async_scheduling": seed % 3 == 2}
        return replace(case, engine=engine.replace(**changes), prompt=prompt)


@pytest.fixture
def backends() -> Any:
    theirs = make_backend("vllm-scheduler", trace=True) if release() >= NATIVE_INTERVAL else IntervalBackend(trace=True)
    pair = make_backend("sim", trace=True), theirs
    yield pair
    for backend in pair:
        backend.close()


class Watch:
    """Compares what the two remember of prefills after every step of the simulator's partner."""

    def __init__(self, sim: Any, vllm: Any) -> None:
        self.sim, self.vllm, self.steps = sim, vllm, 0

    def __enter__(self) -> Watch:
        self._step = self.vllm.step
        self.vllm.step = self.step
        return self

    def __exit__(self, *_: Any) -> None:
        del self.vllm.step

    def step(self, decision: Any) -> Any:
        report = self._step(decision)
        if self.sim.engine.prefill_schedule_interval > 1:
            cadence = self.sim.record.cadence
            assert (cadence.since_prefill, bool(cadence.capacity_bound)) == since_prefill(self.vllm._scheduler)
            self.steps += 1
        return report


def run_cases(backends: Any, names: tuple[str, ...], count: int) -> Tally:
    sim, vllm = backends
    with Watch(sim, vllm) as watch:
        total = compare_all((RivalCase.of(seed, names) for seed in range(count)), sim, vllm)
    print(
        f"\n{count} workloads with {', '.join(names) or 'all settings of this vLLM'}: {total.iterations:,} iterations "
        f"({watch.steps:,} steps with an interval), {total.preemptions:,} preemptions, {total.evictions:,} evictions: no difference"
    )
    return total


def test_simulator_equals_vllm_with_all_of_them(backends: Any) -> None:
    total = run_cases(backends, (), WORKLOADS)
    assert total.preemptions > WORKLOADS and total.evictions > WORKLOADS / 4
    if WORKLOADS >= 60:
        assert total.iterations >= MIN_ITERATIONS


@pytest.mark.parametrize("name", ["prefill_schedule_interval", "max_num_active_seqs", "long_prefill_token_threshold"])
def test_simulator_equals_vllm_with_one_of_them(backends: Any, name: str) -> None:
    if name != "prefill_schedule_interval" and not KNOWN[name]:
        pytest.skip(f"vLLM {'.'.join(map(str, release()))} has no such {name}")
    run_cases(backends, (name,), max(WORKLOADS // 6, 1))


@pytest.mark.parametrize("name", ["prefill_schedule_interval", "max_num_active_seqs", "long_prefill_token_threshold"])
def test_a_setting_that_is_ignored_is_found(backends: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison itself: a simulator that ignores a setting must be caught."""
    if name != "prefill_schedule_interval" and not KNOWN[name]:
        pytest.skip(f"vLLM {'.'.join(map(str, release()))} has no such {name}")
    sim, vllm = backends
    original = sim.reset
    off = {setting.name: setting.off for setting in SETTINGS}[name]

    def without(workload: Workload, layout: QueueLayout, engine: EngineConfig, limits: EpisodeLimits) -> Any:
        return original(workload, layout, engine.replace(**{name: off}), limits)

    monkeypatch.setattr(sim, "reset", without)
    cases = [case for case in (RivalCase.of(seed, (name,)) for seed in range(24)) if getattr(case.engine, name) != off]
    assert any(compare(case, sim, vllm).difference for case in cases)


def test_a_vllm_without_a_setting_refuses_it() -> None:
    backend = make_backend("vllm-scheduler")
    values = {"prefill_schedule_interval": 4, "max_num_active_seqs": 8, "long_prefill_token_threshold": 64}
    for name, value in values.items():
        if not KNOWN[name]:
            with pytest.raises(ConfigError, match=rf"engine\.{name}: {value}, must be .* with vLLM"):
                backend.reset(Workload.of([0.0], [5], [5]), QueueLayout(), EngineConfig.vllm(**{name: value}), EpisodeLimits())
    engine = EngineConfig.vllm(prefill_schedule_interval=4, prefill_interval_release=False)
    with pytest.raises(ConfigError, match=r"engine\.prefill_interval_release: False, must be True"):
        backend.reset(Workload.of([0.0], [5], [5]), QueueLayout(), engine, EpisodeLimits())
    backend.close()
