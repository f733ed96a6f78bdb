"""What a live server's operator gives: a policy of their own that is not one, options of other types, names that cannot be."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llmsched_agents.ensemble import averaged, with_bonus
from llmsched_agents.network import Network
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError
from llmsched_env.types import Decision, QueueLayout
from llmsched_hardware.live_config import LiveConfig, build_policy

ENGINE = EngineConfig.vllm()
GOOD: dict[str, Any] = {
    "name": "mine",
    "layout": QueueLayout(),
    "engine": ENGINE,
    "known_lengths": False,
    "notes": "",
    "decide": lambda view: Decision.greedy(1),
    "reset": lambda: None,
}


def built(monkeypatch: pytest.MonkeyPatch, make: Any, **options: Any) -> Any:
    module = ModuleType("operators_own")
    module.make = make  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "operators_own", module)
    return build_policy(LiveConfig("operators_own:make", options=options), ENGINE)


def test_a_policy_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert built(monkeypatch, lambda setting: SimpleNamespace(**GOOD)).policy.name == "mine"


def test_without_a_policy_everything_that_ships_is_named() -> None:
    with pytest.raises(ConfigError) as refusal:
        LiveConfig.from_environment({"LLMSCHED_POLICY": " "})
    text = str(refusal.value)
    assert "name a policy (fcfs, vllm" in text and "a shipped agent (generalist, slo)" in text and "module:attribute" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 3}, "name is 3, must be a str"),
        ({"layout": (1, 2)}, r"layout is \(1, 2\), must be a QueueLayout"),
        ({"engine": None}, "engine is None, must be a EngineConfig"),
        ({"known_lengths": "no"}, "known_lengths is 'no', must be a bool"),
        ({"notes": None}, "notes is None, must be a str"),
        ({"decide": 3}, "decide is 3, must be a method"),
        ({"reset": None}, "reset is None, must be a method"),
    ],
)
def test_a_policy_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        built(monkeypatch, lambda setting: SimpleNamespace(**{**GOOD, **change}))


@pytest.mark.parametrize(
    "error", [ValueError("v"), KeyError("k"), ZeroDivisionError("z"), RuntimeError("r"), OSError("o"), AssertionError("a")]
)
def test_whatever_it_raises_is_told(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def make(setting: Any) -> Any:
        raise error

    with pytest.raises(ConfigError, match=rf"operators_own:make.*{type(error).__name__}"):
        built(monkeypatch, make)
    with pytest.raises(ConfigError, match=r"operators_own:make.*TypeError"):
        built(monkeypatch, lambda: None)
    with pytest.raises(ConfigError, match=r"policy\.segments: not an option of 'operators_own:make'; did you mean 'segment'"):
        built(monkeypatch, lambda setting, segment=1: None, segments=3)


def test_an_agent_that_ships_goes_by_its_name() -> None:
    pytest.importorskip("safetensors")
    config = LiveConfig.from_environment({"LLMSCHED_POLICY": "generalist"})
    live = build_policy(config, ENGINE.replace(max_num_batched_tokens=256))
    assert config.is_checkpoint and live.policy.name == "generalist"
    assert f"no length statistics given: those of {config.assumed_scenario} assumed" in live.notes
    with pytest.raises(ConfigError, match=r"start vllm serve with --max-num-batched-tokens 256$"):
        build_policy(config, ENGINE)


@pytest.mark.parametrize("policy", ["", " ", 3, None, "x" * 5000, "x/" + "y" * 300, "\0", ":", "a:", ":b", "no.such:x", "a\0/b"])
def test_names_that_cannot_be(policy: Any) -> None:
    with pytest.raises(ConfigError):
        build_policy(LiveConfig(policy), ENGINE)


@pytest.mark.parametrize("value", [None, "x", [1], {}, float("nan"), 1e300, -1, True])
def test_options_of_another_type(value: Any) -> None:
    for policy, option in (("reserve", "theta"), ("nested-wait", "segment_ends"), ("nested-wait", "delta"), ("mc-sf", "num_classes")):
        try:
            build_policy(LiveConfig(policy, options={option: value}, assume_max_tokens=True), ENGINE)
        except ConfigError:
            continue


def network(width: int = 2) -> Network:
    zero, one = np.zeros(width, np.float32), np.ones(width, np.float32)
    hidden = np.ones((3, width), np.float32), np.zeros(3, np.float32)
    return Network(zero, one, (hidden,), (np.ones((2, 3), np.float32), np.zeros(2, np.float32)), (2,))


def test_ensembles_of_what_is_no_network() -> None:
    assert with_bonus(averaged([network(), network()]), 1, -0.5).head[1].tolist() == [0.0, -0.5]
    for members in ([], [network(), network(3)], [network(), None], [3]):
        with pytest.raises(ConfigError, match="ensemble: "):
            averaged(members)  # type: ignore[arg-type]
    for choice, logits in ((2, 0.0), (-1, 0.0), (0.5, 0.0), (True, 0.0), (0, float("nan")), (0, 1e300), (0, "1")):
        with pytest.raises(ConfigError, match=r"choice: |logits: "):
            with_bonus(network(), choice, logits)  # type: ignore[arg-type]


def test_a_setting_that_the_installed_vllm_does_not_have_is_refused_by_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with the advice to give vLLM a flag that it takes and does not use."""
    from llmsched_hardware import options

    monkeypatch.setattr(options, "release", lambda: (0, 32))
    with pytest.raises(ConfigError, match=r"prefill_schedule_interval: 2, must be 1 with vLLM 0\.32 \(needs 0\.33 or later\)"):
        build_policy(LiveConfig("prefill-cadence"), ENGINE)
    monkeypatch.setattr(options, "release", lambda: (0, 33))
    with pytest.raises(ConfigError, match="start vllm serve with --prefill-schedule-interval 2"):
        build_policy(LiveConfig("prefill-cadence"), ENGINE)
    with pytest.raises(ConfigError, match="prefill_interval_release = False, for which no vLLM has a setting"):
        build_policy(LiveConfig("prefill-decode-interval"), ENGINE)


def test_a_report_cannot_go_to_a_folder(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=r"report_path: .* is a folder, must be a file"):
        LiveConfig("vllm", report_path=str(tmp_path))
