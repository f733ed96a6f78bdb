"""Files that users give: loaded right, or refused with ``ConfigError`` that names the file; nothing else, whatever the bytes."""

from __future__ import annotations

import copy
import io
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as hs

from llmsched_agents.checkpoint import CONFIG, RECORD, WEIGHTS, load_checkpoint, read_record, save_checkpoint
from llmsched_agents.domain import Domain
from llmsched_agents.interface import Interface
from llmsched_agents.network import Network
from llmsched_agents.recipe import Recipe
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError
from llmsched_env.perf import Batch, FormulaTime, LinearTime, MixedAttentionTime, Provenance, TableTime, load_calibration
from llmsched_env.perf.store import calibration_bytes, parse_calibration
from llmsched_hardware.live_config import LiveConfig, build_policy

FEW = settings(max_examples=60, suppress_health_check=list(HealthCheck))
MANY = settings(max_examples=int(os.environ.get("LLMSCHED_FUZZ_EXAMPLES", "2000")), suppress_health_check=list(HealthCheck))

# --- valid files ------------------------------------------------------------------------------------
TABLES = TableTime(
    [1, 8, 64], [1e-3, 2e-3, 4e-3], [1, 4], [0, 64, 512], np.full((2, 3), 1e-4), [0, 64], [1, 16], np.full((2, 2), 1e-4),
    [1, 8], [1e-5, 2e-5], 1e-4, provenance=Provenance("t", num_blocks=10),
)  # fmt: skip
MIXED = MixedAttentionTime(
    [1, 8], [1e-3, 2e-3], [1, 4], [1e-5, 2e-5], [8, 16], [0, 32], [1, 2, 4], [16, 64], np.full((2, 2), 1e-4), np.full((3, 2), 1e-4),
    np.full((2, 2, 2, 2), 2e-4),
)  # fmt: skip
MODELS = {
    "linear": LinearTime(1e-3, 1e-6),
    "formula": FormulaTime(1e-3, 1e-6, 1e-3, 1e-6, 1e-9, 1e-9, 1e-9, 1e-6, max_tokens=4096.0),
    "tables": TABLES,
    "mixed-attention": MIXED,
}
FILES = {form: calibration_bytes(model)[1] for form, model in MODELS.items()}
SCENARIO = "azure-conv"
SERVER = {
    "lengths": {"prompt": [100, 200], "output": [10, 50], "weight": [1, 3]},
    "rate": 1.5,
    "horizon_seconds": 60.0,
    "calibration": "a100-llama2-7b-c10",
    "options": {"theta": 0.9},
    "overload": True,
    "max_wait_seconds": 5,
    "policy_timeout_seconds": 1,
    "retry_after_iterations": 3,
    "report_interval_seconds": 1.0,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("safetensors", reason="safetensors is not installed (extra: checkpoints)")
    folder = tmp_path_factory.mktemp("agent")
    recipe, domain = Recipe(action_set="reserve", num_segments=2, levels=(0.8, 1.0)), Domain((SCENARIO,), (0.8,), (300,))
    setting = domain.grid()[0]
    interface = Interface(recipe, setting.setting)
    width, out = interface.width, sum(interface.components)
    head = np.zeros((out, 2), np.float32), np.zeros(out, np.float32)
    hidden = (np.zeros((2, width), np.float32), np.zeros(2, np.float32))
    network = Network(np.zeros(width, np.float32), np.ones(width, np.float32), (hidden,), head, interface.components)
    save_checkpoint(
        folder, network, recipe, domain, recipe.layout_for(setting.scenario.statistics), name="x", deterministic=True, record={"seed": 1}
    )
    return folder


# --- mutations --------------------------------------------------------------------------------------
NASTY = [
    None, True, False, 0, -1, 1, 2, 0.5, -0.0, 1.5, 1e-320, 1e300, -1e300, 2**31, 2**53 + 1, 2**63, 2**64, 10**30, 10**400,
    float("nan"), float("inf"), -float("inf"), "", "x", "nan", "1", "\ud800", "\x00", "a" * 5000, "../..", ":clip", "a+b", [], [1], [None],
    [[1]], [1, "2"], [True], list(range(300)), {}, {"x": 1}, {"": {}}, [float("nan")], [2**31], "tables", "linear", "paper", "output",
]  # fmt: skip

NEW = hs.sampled_from(NASTY).map(copy.deepcopy)  # the next mutation may change it


@hs.composite
def changed_bytes(draw: hs.DrawFn, data: bytes) -> bytes:
    found = bytearray(data)
    for _ in range(draw(hs.integers(1, 4))):
        at = draw(hs.integers(0, max(len(found) - 1, 0)))
        length = draw(hs.sampled_from([1, 1, 2, 4, 16, 200]))
        kind = draw(hs.sampled_from(["flip", "set", "cut", "insert", "delete", "repeat", "zero"]))
        if kind == "cut":
            del found[at:]
        elif kind == "delete":
            del found[at : at + length]
        elif kind == "insert":
            found[at:at] = draw(hs.binary(min_size=1, max_size=8))
        elif kind == "repeat":
            found[at:at] = found[at : at + length]
        elif kind == "zero":
            found[at : at + length] = bytes(len(found[at : at + length]))
        elif found and kind == "flip":
            found[at] ^= 1 << draw(hs.integers(0, 7))
        elif found:
            found[at] = draw(hs.integers(0, 255))
    return bytes(found)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in children for place in places(child, (*path, key)))]


@hs.composite
def changed_json(draw: hs.DrawFn, value: Any) -> Any:
    found = copy.deepcopy(value)
    for _ in range(draw(hs.integers(1, 3))):
        all_places = [place for place in places(found) if place]
        if not all_places:
            return found
        *path, key = draw(hs.sampled_from(all_places))
        parent = found
        for step in path:
            parent = parent[step]
        kind = draw(hs.sampled_from(["replace", "replace", "replace", "delete", "add", "wrap"]))
        if kind == "replace":
            parent[key] = draw(NEW)
        elif kind == "wrap":
            parent[key] = [parent[key]]
        elif kind == "delete":
            del parent[key]
        elif isinstance(parent, dict):
            parent[draw(hs.sampled_from(["x", "", "provenance", "form", "engine", "levels", "overload", "seed"]))] = draw(NEW)
        else:
            parent.insert(0, draw(NEW))
    return found


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def npz_of(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def members_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {entry.filename: archive.read(entry) for entry in archive.infolist()}


def npy(array: Any) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, np.asanyarray(array))
    return out.getvalue()


ARRAYS = hs.sampled_from(
    [
        np.zeros(0), np.zeros(3), np.ones((2, 2)), np.array(1.0), np.array([np.nan, 1.0]), np.array([1, np.inf]), np.array([2.0, 1.0]),
        np.array([1, 2], np.int8), np.array([1, 2], np.uint64), np.array([True, False]), np.array(["1", "2"]), np.array([1j, 2]),
        np.array([0, 1e300]), np.array([1e-320, 2e-320]), np.array([1, 2], ">f8"), np.array([1, 2], np.float16), np.array([1, 2], "M8[s]"),
        np.array([1, 2], np.longdouble), np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.zeros((0, 3)), np.array([1, 1 + 1e-12]),
        np.array(json.dumps({"form": "tables", "coefficients": {}, "provenance": {}})), np.zeros(2, [("a", "f8")]), 
        np.array([2**31, 2**62]),
    ]
)  # fmt: skip


# --- what must hold ---------------------------------------------------------------------------------
SAMPLES = (Batch(4, 400, 1, 64, 4096, 128, 128, 10240, 5, 600, 5), Batch(1, 1, sampled=1, load=1, batch_size=1), Batch(300, 1e6, load=1e6))


def right_or_refused(label: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except ConfigError as error:
        assert label in str(error) and str(error).encode("utf-8", "backslashreplace")
        assert len(str(error)) < 20_000
        return None


def check_calibration(data: bytes) -> None:
    model = right_or_refused("FILE", lambda: parse_calibration("FILE", data))
    if model is not None:
        for batch in SAMPLES:
            seconds = model.seconds(batch)
            assert np.isfinite(seconds) and seconds >= 0
            assert model.in_range(batch) in (True, False)
        assert parse_calibration("again", calibration_bytes(model)[1]).pack().shape == model.pack().shape
        EngineConfig(time_model=model)


def check_checkpoint(folder: Path, changed: dict[str, bytes], to: Path) -> None:
    for name in (WEIGHTS, CONFIG, RECORD):
        (to / name).write_bytes(changed.get(name, (folder / name).read_bytes()))
    right_or_refused(str(to), lambda: load_checkpoint(to))
    right_or_refused(str(to), lambda: read_record(to))


def check_server(data: bytes, path: Path) -> None:
    path.write_bytes(data)
    config = right_or_refused(
        str(path), lambda: LiveConfig.from_environment({"LLMSCHED_POLICY": "reserve", "LLMSCHED_POLICY_CONFIG": str(path)})
    )
    if config is not None:
        right_or_refused("", lambda: build_policy(config, EngineConfig.vllm()))


def calibration_bytes_case(data: hs.DataObject) -> None:
    check_calibration(data.draw(changed_bytes(FILES[data.draw(hs.sampled_from(sorted(FILES)))])))


def calibration_fields_case(data: hs.DataObject) -> None:
    check_calibration(dumped(data.draw(changed_json(json.loads(FILES[data.draw(hs.sampled_from(["linear", "formula"]))])))))


def calibration_arrays_case(data: hs.DataObject) -> None:
    members = members_of(FILES[data.draw(hs.sampled_from(["tables", "mixed-attention"]))])
    for _ in range(data.draw(hs.integers(1, 2))):
        name = data.draw(hs.sampled_from(sorted(members)))
        kind = data.draw(hs.sampled_from(["bytes", "array", "field", "drop", "extra"]))
        if kind == "bytes":
            members[name] = data.draw(changed_bytes(members[name]))
        elif kind == "array":
            members[name] = npy(data.draw(ARRAYS))
        elif kind == "drop" and len(members) > 1:
            del members[name]
        elif kind == "extra":
            members[data.draw(hs.sampled_from(["x.npy", "provenance.npy", "constant.npy", "_packed.npy", "y", "../z.npy"]))] = npy(
                data.draw(ARRAYS)
            )
        elif "calibration.npy" in members and kind == "field":
            try:
                text = json.loads(str(np.load(io.BytesIO(members["calibration.npy"]), allow_pickle=False)))
            except Exception:  # changed before; what numpy's parser raises has no common type
                continue
            members["calibration.npy"] = npy(np.array(json.dumps(data.draw(changed_json(text)))))
    check_calibration(npz_of(members))


CALIBRATION_CASES = [calibration_bytes_case, calibration_fields_case, calibration_arrays_case]


@pytest.mark.parametrize("case", CALIBRATION_CASES)
def test_calibrations(case: Callable[[hs.DataObject], None]) -> None:
    FEW(given(hs.data())(case))()


@pytest.mark.slow
@pytest.mark.parametrize("case", CALIBRATION_CASES)
def test_calibrations_long(case: Callable[[hs.DataObject], None]) -> None:
    MANY(given(hs.data())(case))()


def checkpoint_case(folder: Path, to: Path) -> Callable[[hs.DataObject], None]:
    def case(data: hs.DataObject) -> None:
        name = data.draw(hs.sampled_from([CONFIG, CONFIG, CONFIG, WEIGHTS, RECORD]))
        whole = (folder / name).read_bytes()
        if name == CONFIG and data.draw(hs.booleans()):
            changed = dumped(data.draw(changed_json(json.loads(whole))))
        else:
            changed = data.draw(changed_bytes(whole))
        check_checkpoint(folder, {name: changed}, to)

    return case


def test_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    settings(FEW, max_examples=25)(given(hs.data())(checkpoint_case(checkpoint, tmp_path)))()


@pytest.mark.slow
def test_checkpoints_long(checkpoint: Path, tmp_path: Path) -> None:
    MANY(given(hs.data())(checkpoint_case(checkpoint, tmp_path)))()


def server_case(path: Path) -> Callable[[hs.DataObject], None]:
    def case(data: hs.DataObject) -> None:
        if data.draw(hs.booleans()):
            check_server(dumped(data.draw(changed_json(SERVER))), path)
        else:
            check_server(data.draw(changed_bytes(dumped(SERVER))), path)

    return case


def test_server_files(tmp_path: Path) -> None:
    FEW(given(hs.data())(server_case(tmp_path / "server.json")))()


@pytest.mark.slow
def test_server_files_long(tmp_path: Path) -> None:
    MANY(given(hs.data())(server_case(tmp_path / "server.json")))()


# --- single cases -----------------------------------------------------------------------------------
class Bomb:
    def __reduce__(self) -> Any:
        return pytest.fail, ("a file was unpickled",)


def test_pickled_arrays_are_never_loaded() -> None:
    out = io.BytesIO()
    np.lib.format.write_array(out, np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(ConfigError, match="must be of numbers or text"):
        parse_calibration("FILE", npz_of(members_of(FILES["tables"]) | {"tokens.npy": out.getvalue()}))


def test_what_an_archive_claims_is_checked_before_it_is_unpacked() -> None:
    members = members_of(FILES["tables"])
    zeros = bytes(200 * 2**20)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tokens.npy", zeros)
    assert len(out.getvalue()) < 2**20
    with pytest.raises(ConfigError, match="bytes unpacked"):
        parse_calibration("FILE", out.getvalue())
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**15,)})
    with pytest.raises(ConfigError, match="0 bytes for float64"):
        parse_calibration("FILE", npz_of(members | {"tokens.npy": header.getvalue()}))


@pytest.mark.parametrize("order", ["<", ">"])
def test_text_that_is_no_text_is_refused(order: str) -> None:
    whole = npy(np.array(json.dumps(json.loads(FILES["linear"])), f"{order}U200"))
    assert parse_calibration("FILE", npz_of({"calibration.npy": whole})) == MODELS["linear"]
    damaged = whole[:-4] + b"\x7f\xff\xff\x7f"  # no code point in either order
    with pytest.raises(ConfigError, match="text that is not Unicode"):
        parse_calibration("FILE", npz_of({"calibration.npy": damaged}))


def test_what_single_precision_would_lose_is_saved_in_double() -> None:
    kept = {field.name: getattr(MIXED, field.name) for field in fields(MIXED) if field.name not in ("_packed", "provenance")}
    for name, values in (("linear", [1e-320, 2e-320]), ("tokens", [1000.0, 1000.00001])):
        model = MixedAttentionTime(**{**kept, name: values})
        assert getattr(parse_calibration("x", calibration_bytes(model)[1]), name).tolist() == values


def test_text_that_could_not_be_saved_again_is_refused() -> None:
    record = json.loads(FILES["linear"])
    record["provenance"]["name"] = "\ud800"
    with pytest.raises(ConfigError, match=r"provenance\.name: .*ud800', must be a text"):
        parse_calibration("FILE", dumped(record))


@pytest.mark.parametrize("suffix", [".json", ".npz"])
@pytest.mark.parametrize("kind", ["empty", "directory", "missing", "pipe", "nul"])
def test_what_is_no_file(tmp_path: Path, suffix: str, kind: str) -> None:
    path = tmp_path / f"{kind}{suffix}"
    if kind == "empty":
        path.touch()
    elif kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    name = str(path).replace("nul.", "\0.")
    for load in (
        lambda: load_calibration(name),
        lambda: LiveConfig.from_environment({"LLMSCHED_POLICY": "vllm", "LLMSCHED_POLICY_CONFIG": name}),
        lambda: load_checkpoint(name),
        lambda: read_record(name),
    ):
        with pytest.raises(ConfigError):
            load()


@pytest.mark.parametrize("name", ["", None, 3, "x" * 5000, "x" * 300, "x:clip", ":clip" * 2000, ["a"], b"a"])
def test_what_is_no_name_of_a_calibration(name: Any) -> None:
    with pytest.raises(ConfigError):
        load_calibration(name)


def test_a_path_is_a_name_and_repeated_options_are_one(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(FILES["tables"])
    assert load_calibration(tmp_path / "x.npz") == load_calibration(str(tmp_path / "x.npz"))
    assert load_calibration(f"{tmp_path / 'x.npz'}:clip:clip") == load_calibration(f"{tmp_path / 'x.npz'}:clip")


def test_valid_files_are_loaded_right(checkpoint: Path, tmp_path: Path) -> None:
    for form, model in MODELS.items():
        assert parse_calibration("x", FILES[form]).pack() == pytest.approx(model.pack(), rel=1e-6)
        check_calibration(FILES[form])
    assert load_checkpoint(checkpoint).name == "x" and read_record(checkpoint) == {"seed": 1}
    path = tmp_path / "server.json"
    path.write_bytes(b"\xef\xbb\xbf" + dumped(SERVER))  # editors on Windows put a mark in front
    config = LiveConfig.from_environment({"LLMSCHED_POLICY": "reserve", "LLMSCHED_POLICY_CONFIG": str(path)})
    assert config.rate == 1.5 and build_policy(config, EngineConfig.vllm()).policy.name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "not JSON"),
        ('{"rate": 1' + "0" * 5000 + "}", "not JSON"),
        ('{"rate": 1, "rate": 2}', "field 'rate' is given twice"),
        ('{"rate": 1e999}', "rate: inf, must be a number > 0"),
        ('{"rate": NaN}', "rate: nan, must be a number > 0"),
        ('{"horizon_seconds": 1' + "0" * 400 + "}", "horizon_seconds: 1000"),
        ('{"retry_after_iterations": 1e3}', "retry_after_iterations: 1000.0, must be an integer from 1"),
        ('{"report_path": "' + "x" * 5000 + '"}', "report_path: 'xxx"),
        ('{"report_path": "' + "x" * 4000 + '/y"}', "its folder does not exist"),
    ],
)
def test_server_files_name_the_field(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "server.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        LiveConfig.from_environment({"LLMSCHED_POLICY": "vllm", "LLMSCHED_POLICY_CONFIG": str(path)})
    assert message in str(refused.value) and str(path) in str(refused.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), True, "format True"),
        (("name",), {}, "name: {}"),
        (("deterministic",), "yes", "deterministic: 'yes'"),
        (("environment",), [], "environment: []"),
        (("environment", "package"), 3, "llmsched-env 3"),
        (("observation", "fields"), None, "reads another observation"),
        (("observation", "fields"), [1], "reads another observation"),
        (("components",), 3, "components: 3"),
        (("components",), [2**40], "components[0]: 1099511627776"),
        (("recipe",), None, "recipe: None"),
        (("recipe", "spare"), "x", "recipe.spare: 'x'"),
        (("recipe", "max_admit"), 10**9, "recipe.max_admit: 1000000000"),
        (("recipe", "levels"), ["a"], "recipe.levels[0]: 'a'"),
        (("recipe", "layout"), {"by": "single"}, "recipe.layout: fields by"),
        (("recipe", "engine"), {"num_blocks": "x"}, "num_blocks"),
        (("trained_on", "scenarios"), [], "trained_on.scenarios: none given"),
        (("trained_on", "loads"), [1e400], "trained_on.loads[0]: inf"),
        (("trained_on", "kv"), [0], "trained_on.kv[0]: 0"),
        (("trained_on", "bursts"), ["gamma-x"], "gamma-x"),
    ],
)
def test_checkpoints_name_the_field(checkpoint: Path, tmp_path: Path, path: tuple[str, ...], value: Any, message: str) -> None:
    config = json.loads((checkpoint / CONFIG).read_text())
    parent = config
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    for name in (WEIGHTS, CONFIG):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ConfigError) as refused:
        load_checkpoint(tmp_path)
    assert message in str(refused.value) and str(tmp_path) in str(refused.value)


@pytest.mark.parametrize("arguments", [{"seed": -1}, {"seed": 1.5}, {"seed": "1"}, {"deterministic": "yes"}])
def test_arguments_of_a_checkpoint(checkpoint: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        load_checkpoint(checkpoint, **arguments)
