"""How a live server is told its policy. Needs no vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from serve_policies import random_agent

from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError, InfeasibleError
from llmsched_env.types import QueueLayout
from llmsched_hardware import live
from llmsched_hardware.live import LiveMirror
from llmsched_hardware.live_config import LiveConfig, build_policy
from llmsched_hardware.live_rehearsal import rehearse

ENGINE = EngineConfig.vllm()


def config_of(tmp_path: Path, policy: str = "nested-wait", text: str | None = None, **values: Any) -> LiveConfig:
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(values) if text is None else text)
    return LiveConfig.from_environment({"LLMSCHED_POLICY": policy, "LLMSCHED_POLICY_CONFIG": str(path)})


def test_one_variable_is_enough() -> None:
    config = LiveConfig.from_environment({"LLMSCHED_POLICY": "nested-wait"})
    live = build_policy(config, ENGINE)
    assert live.policy.name == "nested-wait" and live.policy.layout.num_segments > 1
    assert config.max_wait_seconds == 10.0
    text = "; ".join(live.notes)
    assert (
        "azure-conv assumed" in text
        and "M_req" in live.policy.notes
        and "80% of this engine's stability boundary" in text
        and "a100-llama2-7b-vllm assumed" in text
    )
    rehearse(live.policy, LiveMirror(live.policy.layout, live.policy.engine))


def test_everything_given_leaves_nothing_assumed(tmp_path: Path) -> None:
    trace = tmp_path / "lengths.csv"
    trace.write_text("arrived_at,prompt_tokens,output_tokens\n0,100,20\n1,200,40\n2,300,5000\n")
    config = config_of(tmp_path, "reserve", trace=str(trace), rate=2, calibration="a100-llama2-7b-c10", options={"theta": 0.9})
    live = build_policy(config, ENGINE)
    assert live.notes == ("33.3% of the lengths exceed max_model_len and are left out",)
    assert live.setting.statistics.prompt.tolist() == [100, 200] and live.setting.rate == 2


def test_types_of_a_workload_mean_nothing_to_a_server(tmp_path: Path) -> None:
    config = config_of(tmp_path, "mc-sf", scenario="two-type", rate=1.0, assume_max_tokens=True, options={"num_classes": 2})
    assert build_policy(config, ENGINE).policy.layout == QueueLayout(by="output", edges=(10,))


@pytest.mark.parametrize(
    ("policy", "values", "message"),
    [
        ("nested-wiat", {}, "did you mean 'nested-wait'"),
        ("no/such/folder", {}, "neither a folder with a checkpoint nor a policy"),
        ("no_such_module:Policy", {}, "no_such_module"),
        ("json:no_such_attribute", {}, "no_such_attribute"),
        ("json:dumps", {}, "not JSON serializable"),
        ("builtins:repr", {}, "str has no 'name'"),
        ("wait", {}, 'set "assume_max_tokens": true'),
        ("mc-sf", {}, 'set "assume_max_tokens": true'),
        ("sarathi", {}, r"start vllm serve with --max-num-batched-tokens 512 --max-num-seqs 128 --watermark 0\.01$"),
        ("vllm-v0", {}, r"--max-num-batched-tokens 4096 --max-num-seqs 128 --no-enable-chunked-prefill --watermark 0\.01"),
        ("nested-wait", {"max_wait": 3}, "'max_wait' is unknown; did you mean 'max_wait_seconds'"),
        ("nested-wait", {"max_wait_seconds": 0}, "max_wait_seconds: 0, must be a number > 0 and <= 86400"),
        ("nested-wait", {"max_wait_seconds": None}, "max_wait_seconds: None"),
        ("nested-wait", {"max_wait_seconds": True}, "max_wait_seconds: True"),
        ("nested-wait", {"rate": -1}, "rate: -1, must be a number > 0"),
        ("nested-wait", {"rate": "5"}, "rate: '5', must be a number > 0"),
        ("nested-wait", {"rate": 500.0}, 'plan for another "rate", or set "overload": true'),
        ("nested-wait", {"scenario": "azure"}, "scenario: 'azure' is unknown"),
        ("nested-wait", {"scenario": "lmsys", "trace": "x.csv"}, "scenario, trace: both given"),
        ("nested-wait", {"trace": "/no/such/file.csv"}, "file.csv"),
        ("nested-wait", {"lengths": {"prompt": [1]}}, "lengths.output: missing"),
        ("nested-wait", {"lengths": {"prompt": [1], "output": [1], "weight": [1], "x": 1}}, "lengths.x: unknown"),
        ("nested-wait", {"lengths": {"prompt": ["a"], "output": [1], "weight": [1]}}, "lengths: "),
        ("nested-wait", {"lengths": {"prompt": [5000], "output": [1], "weight": [1]}}, "no request fits max_model_len = 4096"),
        ("nested-wait", {"calibration": "a100"}, "calibration 'a100' is unknown"),
        ("nested-wait", {"options": {"segments": 2}}, r"policy.segments: not an option of 'nested-wait'; did you mean 'segment_ends'"),
        ("nested-wait", {"options": [2]}, "options: .* must be an object"),
        ("nested-wait", {"overload": "yes"}, "overload: 'yes', must be true or false"),
        ("nested-wait", {"retry_after_iterations": 0}, "retry_after_iterations: 0"),
        ("nested-wait", {"policy_timeout_seconds": 0}, r"policy_timeout_seconds: 0, must be a number >= 0\.001 and <= 3600"),
        ("nested-wait", {"policy_timeout_seconds": "1"}, "policy_timeout_seconds: '1'"),
        ("nested-wait", {"report_path": "/no/such/folder/report.json"}, "its folder does not exist"),
        ("nested-wait", {"horizon_seconds": float("inf")}, "horizon_seconds"),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path: Path, policy: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_policy(config_of(tmp_path, policy, **values), ENGINE)


def test_the_policy_and_its_file_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"LLMSCHED_POLICY is not set: name a policy \(fcfs, vllm"):
        LiveConfig.from_environment({})
    with pytest.raises(ConfigError, match=r"missing\.json"):
        LiveConfig.from_environment({"LLMSCHED_POLICY": "vllm", "LLMSCHED_POLICY_CONFIG": str(tmp_path / "missing.json")})
    with pytest.raises(ConfigError, match="LLMSCHED_POLICY_CONFIG"):
        config_of(tmp_path, text="{'rate': 1}")
    with pytest.raises(ConfigError, match="must be a JSON object"):
        config_of(tmp_path, text="[1]")


def test_overload_is_accepted_when_asked_for(tmp_path: Path) -> None:
    with pytest.raises(InfeasibleError):
        build_policy(config_of(tmp_path, rate=500.0), ENGINE)
    live = build_policy(config_of(tmp_path, rate=500.0, overload=True), ENGINE)
    assert live.policy.notes and live.policy.notes in live.notes


def test_sarathi_runs_on_the_engine_it_stands_for(tmp_path: Path) -> None:
    engine = ENGINE.replace(max_num_batched_tokens=512, max_num_seqs=128, watermark=0.01)
    assert build_policy(config_of(tmp_path, "sarathi"), engine).policy.name == "sarathi"
    smaller = ENGINE.replace(max_num_batched_tokens=256, max_num_seqs=64, watermark=0.01)
    build_policy(config_of(tmp_path, "sarathi", options={"budget": 256, "max_num_seqs": 64}), smaller)


@pytest.mark.parametrize(
    "recipe",
    [
        {"action_set": "admit"},
        {"action_set": "reserve", "num_segments": 1, "num_classes": 4, "order": "class"},
        {"action_set": "peak", "features": True, "order": "work", "num_classes": 3, "late_last": 1.0},
    ],
    ids=["admit", "reserve", "peak"],
)
def test_a_checkpoint_is_a_policy(tmp_path: Path, recipe: dict[str, Any]) -> None:
    pytest.importorskip("safetensors")
    folder = random_agent(tmp_path / "agent", **recipe)
    live = build_policy(LiveConfig(str(folder), options={"seed": 3}), ENGINE)
    assert live.policy.name == "agent" and "those of sharegpt assumed" in live.notes[0]
    rehearse(live.policy, LiveMirror(live.policy.layout, live.policy.engine))
    with pytest.raises(ConfigError, match=r"options\.theta: not an option of a learned agent"):
        build_policy(LiveConfig(str(folder), options={"theta": 1}), ENGINE)


def test_a_checkpoint_with_an_engine_of_its_own_names_the_flags(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    folder = random_agent(tmp_path / "agent", engine={"max_num_batched_tokens": 512})
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens = 512 \(server: 2048\).*--max-num-batched-tokens 512"):
        build_policy(LiveConfig(str(folder)), ENGINE)


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not one"):
        build_policy(LiveConfig(str(tmp_path)), ENGINE)


def test_renumbered_keys_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Preempted requests, late ones and arrivals, before and after keys move back towards 0."""
    monkeypatch.setattr(live, "_RENUMBER_ABOVE", 9)
    mirror = LiveMirror(QueueLayout("prompt", (10,)), ENGINE.replace(late_after=5.0))
    order: list[str] = []

    def check() -> None:
        keys = mirror.record.requests.key
        assert sorted(order, key=lambda name: int(keys[mirror.index(name)])) == order

    for i in range(6):
        mirror.arrive(f"{i}", 8 + i, 0.0, 0.0)
    mirror.note(0.0, [], ["0", "1", "2"], [])
    mirror.note(0.0, [], [], ["2"])
    order[:] = ["2", "3", "4", "5"]
    check()
    running = [SimpleNamespace(request_id=i, num_computed_tokens=4, num_tokens=8 + int(i), num_output_placeholders=0) for i in "01"]
    mirror.refresh(6.0, running, order, 2)
    mirror.arrive("6", 8, 6.0, 6.0)
    order[:] = ["2", "6", "3", "4", "5"]  # those that never entered in time stand last
    check()
    mirror.leave("3")
    for i in range(7, 12):
        mirror.arrive(f"{i}", 8, 6.0, 6.0)
    mirror.note(6.0, [], [], ["1"])
    order[:] = ["1", "2", *map(str, range(6, 12)), "4", "5"]
    check()
    assert int(mirror.record.requests.key[mirror.index("11")]) <= 9
    assert mirror.view.late.tolist() == [0, 2]


def test_layouts_a_server_cannot_classify_by_are_refused() -> None:
    for layout, why in ((QueueLayout(by="type", num_types=2), "no type"), (QueueLayout(by="output", edges=(4,)), "output lengths")):
        with pytest.raises(ConfigError, match=why):
            LiveMirror(layout, ENGINE)
    with pytest.raises(ConfigError, match="preset"):
        LiveMirror(QueueLayout(), EngineConfig.paper(100, 1.0, 0.0))
