"""Frames: what they show, that nothing in them overlaps, that they change nothing, and the files made of them."""

from __future__ import annotations

import itertools
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.wrappers import RecordVideo

from llmsched_env.env import LLMSchedEnv
from llmsched_env.errors import ConfigError
from llmsched_env.render import History, Names
from llmsched_env.render.env_viewer import asked_words
from llmsched_env.render.frame import whole_squares
from llmsched_env.render.history import CLOCK, EVICTIONS, KV, MOST_SAMPLES, RUNNING, WAITING
from llmsched_env.render.names import admission_words, class_names, type_names
from llmsched_env.render.painter import BLUE, HEIGHT, WIDTH, Painter, film_colours
from llmsched_env.render.scene import Scene, decision_words
from llmsched_env.types import ADMIT_ALL, Decision, QueueLayout
from llmsched_env.workload import load_scenario

pygame = pytest.importorskip("pygame")

SMALL = {"scenario": "azure-conv", "engine": {"num_blocks": 300}, "rate": 12.0, "num_requests": 60}


def make(render_mode: str | None = "rgb_array", **settings: Any) -> LLMSchedEnv:
    given = {**SMALL, **settings}
    return LLMSchedEnv(**given, render_mode=render_mode)


def walk(env: LLMSchedEnv, steps: int, seed: int = 0) -> None:
    """Random actions from a reset on, to the end at most."""
    env.action_space.seed(seed)
    env.reset(seed=seed)
    for _ in range(steps):
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            return


def frame_of(env: LLMSchedEnv) -> np.ndarray:
    frame = env.render()
    assert frame is not None
    return frame


# --- frames of an environment ----------------------------------------------------------------------
def test_a_frame_is_a_picture_without_a_display(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    env = make()
    env.reset(seed=0)
    first = frame_of(env)
    assert first.shape == (HEIGHT, WIDTH, 3) and first.dtype == np.uint8
    env.step(env.action_space.sample())
    assert not np.array_equal(first, frame_of(env))
    env.close()


@pytest.mark.parametrize("settings", [{"hold": 32}, {"hold": 1, "action_set": "admit"}, {"action_set": "reserve", "hold": 32}])
def test_a_frame_does_not_depend_on_the_frames_before_it(settings: dict[str, Any]) -> None:
    often, once = make(**settings), make(**settings)
    for env in (often, once):
        env.action_space.seed(1)
        env.reset(seed=1)
    for _ in range(40):
        action = often.action_space.sample()
        often.step(action)
        once.step(action)
        shown = frame_of(often)
    assert np.array_equal(shown, frame_of(once))


@pytest.mark.parametrize("settings", [{}, {"hold": 1, "action_set": "admit"}, {"discount_seconds": 5.0}])
def test_frames_change_nothing(settings: dict[str, Any]) -> None:
    runs = []
    for render_mode in (None, "rgb_array"):
        env = make(render_mode, **settings)
        env.action_space.seed(2)
        observation, _ = env.reset(seed=2)
        rows = []
        for _ in range(50):
            observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
            rows.append((reward, info["clock"], info["seconds"], *map(float, np.concatenate(list(observation.values())))))
            if terminated or truncated:
                break
        runs.append(rows)
    assert runs[0] == runs[1]


def test_a_new_episode_starts_a_new_course() -> None:
    env, fresh = make(), make()
    walk(env, 30)
    for each in (env, fresh):
        each.reset(seed=5)
    assert np.array_equal(frame_of(env), frame_of(fresh))


def test_the_rate_of_the_episode_stands_in_the_title(texts: list[str]) -> None:
    env = make()
    env.reset(seed=0, options={"rate": 9.5})
    frame_of(env)
    assert "azure-conv, 9.5 requests/s" in texts


def test_frames_after_close_and_after_pickling() -> None:
    env = make()
    walk(env, 5)
    assert frame_of(pickle.loads(pickle.dumps(env))).shape == (HEIGHT, WIDTH, 3)
    env.close()
    env.reset(seed=0)
    assert frame_of(env).shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize(
    "settings",
    [
        {"backend": "sim-prefix-cache", "engine": {"num_blocks": 300, "enable_prefix_caching": True}},
        {"scenario": "two-type", "engine": None, "rate": 3.0},
        {"scenario": "two-type", "engine": None, "rate": 3.0, "reveal_output_length": True},
        {"reveal_output_length": True},
        {"class_by": "prompt", "class_edges": tuple(range(100, 1600, 100)), "segment_ends": (50, 100, 200)},
        {"class_by": "prompt", "class_edges": (200,), "segment_ends": tuple(range(10, 170, 10)), "token_budgets": (0, 512)},
        {"engine": {"num_blocks": 300, "watermark": 0.1}, "backlog": 50},
    ],
)
def test_every_engine_and_layout_has_a_frame(settings: dict[str, Any]) -> None:
    env = make(**settings)
    walk(env, 12)
    assert len(np.unique(frame_of(env).reshape(-1, 3), axis=0)) > 20


def test_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    env = make("human")
    walk(env, 3)
    assert pygame.display.get_surface().get_size() == (WIDTH, HEIGHT)
    assert env.render() is None
    env.close()
    assert pygame.display.get_surface() is None


def test_nothing_is_imported_before_the_first_frame() -> None:
    code = (
        "import sys, llmsched_env.env as e\n"
        "env = e.LLMSchedEnv('azure-conv', num_requests=5, render_mode='rgb_array'); env.reset(seed=0)\n"
        "env.step(env.action_space.sample()); assert 'pygame' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.parametrize("size", [(800, 480), (1600, 960), (1000, 480), (400, 240)])
def test_sizes(size: tuple[int, int]) -> None:
    env = make()
    env.render_size = size  # type: ignore[attr-defined]
    env.reset(seed=0)
    assert frame_of(env).shape == (size[1], size[0], 3)


@pytest.mark.parametrize("size", [(100, 100), (800,), "800x480", (800, 10**6), (800.5, 480)])
def test_sizes_that_are_refused(size: Any) -> None:
    env = make()
    env.render_size = size  # type: ignore[attr-defined]
    env.reset(seed=0)
    with pytest.raises(ConfigError, match="size"):
        env.render()


# --- what stands in a frame -------------------------------------------------------------------------
@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines as they are written."""
    written: list[str] = []
    original = Painter.text

    def text(self: Painter, text: str, *args: Any, **options: Any) -> float:
        written.append(text)
        return original(self, text, *args, **options)

    monkeypatch.setattr(Painter, "text", text)
    return written


def test_figures_are_those_of_the_episode(texts: list[str]) -> None:
    env = make(num_requests=40)
    walk(env, 10_000)
    texts.clear()
    frame_of(env)
    summary = env.summary()
    assert f"{summary['latency_mean']:.2f} s" in texts or f"{summary['latency_mean']:.1f} s" in texts
    assert f"{summary['latency_p99']:.2f} s" in texts or f"{summary['latency_p99']:.1f} s" in texts
    assert f"{int(summary['evictions']):,}" in texts and "40" in texts
    assert f"iteration {int(summary['iterations']):,}, all served" in texts
    assert f"{summary['sim_seconds']:,.2f} s" in texts


@pytest.mark.slow
@pytest.mark.parametrize(("num_classes", "num_segments"), [*itertools.product(range(1, 9), range(1, 5)), (20, 3), (1, 16)])
def test_no_text_stands_on_another_in_any_layout(num_classes: int, num_segments: int, monkeypatch: pytest.MonkeyPatch) -> None:
    test_no_text_stands_on_another(num_classes, num_segments, monkeypatch)


@pytest.mark.parametrize(("num_classes", "num_segments"), [(1, 4), (2, 1), (8, 4), (64, 1)])
def test_no_text_stands_on_another(num_classes: int, num_segments: int, monkeypatch: pytest.MonkeyPatch) -> None:
    edges = {8: (64, 128, 256, 512, 1024, 2048, 3072)}.get(num_classes, tuple(100 * (i + 1) for i in range(num_classes - 1)))
    kind = "prompt" if num_classes > 1 else "single"
    ends = tuple(100 * (k + 1) for k in range(num_segments - 1))
    env = make(
        class_by=kind, class_edges=edges, segment_ends=ends, num_requests=3000, rate=400.0, backlog=2900, engine={"num_blocks": 2816}
    )
    boxes: list[tuple[Any, str]] = []
    original = Painter.text

    def text(self: Painter, text: str, x: float, y: float, size: float, *args: Any, **options: Any) -> float:
        before = self.surface.copy()
        wide = original(self, text, x, y, size, *args, **options)
        changed = np.argwhere((pygame.surfarray.array3d(before) != pygame.surfarray.array3d(self.surface)).any(axis=2))
        if len(changed):
            (left, top), (right, bottom) = changed.min(axis=0), changed.max(axis=0)
            boxes.append((pygame.Rect(left, top, right - left + 1, bottom - top + 1), text))
        return wide

    walk(env, 20)
    monkeypatch.setattr(Painter, "text", text)
    frame_of(env)
    assert len(boxes) > 30
    for (one, first), (other, second) in itertools.combinations(boxes, 2):
        assert not one.colliderect(other), (first, second)
    whole = pygame.Rect(0, 0, WIDTH, HEIGHT)
    assert all(whole.contains(box) for box, _ in boxes)


def test_squares_add_up() -> None:
    for shares, unit in (([1, 1, 1], 2), ([5, 0, 7, 3], 4), ([0, 0], 3), ([1000, 1, 1, 1, 1], 16)):
        counts = whole_squares([(n, BLUE, False) for n in shares], unit, sum(shares))
        assert sum(count for count, _, _ in counts) == round(sum(shares) / unit)
        assert all(abs(count - n / unit) < 1 for (count, _, _), n in zip(counts, shares, strict=True))


def test_a_film_has_one_palette() -> None:
    colours = film_colours()
    assert len(colours) == len(set(colours)) <= 250


# --- words -------------------------------------------------------------------------------------------
def test_classes_and_segments_have_names() -> None:
    names = Names.of(QueueLayout(by="prompt", edges=(512, 1024), segment_ends=(64, 150)))
    assert names.rows == ("prompt \N{LESS-THAN OR EQUAL TO} 512", "prompt 513\N{EN DASH}1,024", "prompt > 1,024")
    assert names.columns == ("tokens \N{LESS-THAN OR EQUAL TO} 64", "tokens 65\N{EN DASH}150", "tokens > 150")
    assert Names.of(QueueLayout(by="type", num_types=2), ("chat", "code")).rows == ("chat", "code")
    assert Names.of(QueueLayout(by="type", num_types=2)).rows == ("type 1", "type 2")
    assert Names.of(QueueLayout()).columns == ("running",) and Names.of(QueueLayout()).rows == ("all requests",)
    assert class_names(load_scenario("tenants"), load_scenario("tenants").layout) == ("chat", "assistant", "premium", "batch")
    assert Names.of(QueueLayout(by="tenant", num_types=2)).rows == ("tenant 1", "tenant 2")
    assert type_names(load_scenario("two-type")) == ("10 + 10 tokens", "10 + 20 tokens")


def test_many_queues_share_rows_and_columns() -> None:
    layout = QueueLayout(by="prompt", edges=tuple(range(10, 640, 10)), segment_ends=(1, 2, 3, 4, 5))
    names = Names.of(layout)
    assert len(names.rows) == 8 and len(names.columns) == 3
    assert names.rows[1] == "prompt 81\N{EN DASH}160" and names.columns[1] == "tokens 3\N{EN DASH}4"
    values = np.arange(layout.num_queues).reshape(64, 6)
    assert names.grouped(values).sum() == values.sum() and names.grouped(values)[0, 0] == values[:8, :2].sum()
    assert names.by_row(values[:, 0]).sum() == values[:, 0].sum()


def test_one_queue_alone_is_shown_in_bands() -> None:
    assert Names.of(QueueLayout(), bands=(50, 100)).columns[1] == "tokens 51\N{EN DASH}100"
    assert Names.of(QueueLayout(segment_ends=(10,)), bands=(50, 100)).bands == ()


def test_admissions_in_words() -> None:
    two = QueueLayout(by="type", num_types=2, segment_ends=(10,))
    for admit, words in (
        ([ADMIT_ALL, 0, ADMIT_ALL, 0], "admit as many as fit"),
        ([0, 9, 0, 9], "admit nobody"),
        ([3, 0, ADMIT_ALL, 0], "admit 3 / all by class"),
    ):
        assert admission_words(np.array(admit, dtype=np.int32), two) == words
    assert admission_words(np.array([7], dtype=np.int32), QueueLayout()) == "admit up to 7"
    eight = QueueLayout(by="prompt", edges=tuple(range(1, 8)))
    assert admission_words(np.array([1, 0, 0, 2, 0, 0, 0, 0], dtype=np.int32), eight) == "admit from 2 of 8 classes"


def test_levels_in_words() -> None:
    env = make(levels=(0.5, np.inf), orders=("arrival", "work"), class_by="prompt", class_edges=(500,))
    assert asked_words(env.codec, np.array([0, 1])) == "level 0.5, least work first"
    assert asked_words(env.codec, np.array([1, 0])) == "no limit, in order of arrival"
    assert asked_words(make(action_set="reserve", thetas=(0.9,)).codec, np.array([0])) == "level 0.9"
    assert asked_words(make(action_set="admit").codec, np.array([0, 1])) == ""
    assert asked_words(env.codec, None) == ""


def test_what_a_decision_holds_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def spoken(scene: Scene) -> str:
        said.append(decision_words(scene))
        return said[-1]

    monkeypatch.setattr("llmsched_env.render.frame.decision_words", spoken)
    env = make(segment_ends=(5, 20), engine={"num_blocks": 2000}, backlog=20)
    env.reset(seed=0)
    frame_of(env)
    for _ in range(12):
        env.step_decision(Decision.of([1, 1, 1], [5, 5, 5]))
    frame_of(env)
    env.step_decision(Decision.of([1, 0, 1], [0, 0, 0], token_budget=512))
    frame_of(env)
    assert said[0] == "No decision yet"
    assert said[1].startswith("Decision: admit up to 5") and "step of" in said[1]
    assert "admit nobody" in said[2] and "hold tokens 6\N{EN DASH}20" in said[2] and "token budget 512" in said[2]


# --- the course --------------------------------------------------------------------------------------
class Fake:
    """As much of an engine's record as a course reads."""

    class settings:
        paper = False

    clock, kv_blocks, num_waiting, num_residents, evictions = 0.0, 0, 0, 0, 0


def test_a_course_of_any_length_keeps_peaks_and_sums() -> None:
    record: Any = Fake()
    history, decision = History(record), Decision.greedy(1)
    steps = 3 * MOST_SAMPLES + 17
    for n in range(1, steps + 1):
        record.clock, record.kv_blocks, record.num_waiting, record.num_residents = float(n), n % 100, 0, 3
        record.num_waiting = 7 if n == 5000 else 0
        record.evictions += n % 1000 == 0
        history.begin()
        history.note(record, decision)
    samples = history.samples
    assert len(samples) <= MOST_SAMPLES and (np.diff(samples[:, CLOCK]) > 0).all()
    assert samples[-1, CLOCK] == steps and samples[:, EVICTIONS].sum() == steps // 1000
    assert samples[:, KV].max() == 99 and samples[:, WAITING].max() == 7 and samples[:, RUNNING].max() == 3
    assert history.last is not None and history.last.start == steps - 1


def test_every_iteration_of_a_macro_step_is_in_the_course() -> None:
    env = make(hold=16)
    walk(env, 20)
    samples = env._viewer._history.samples
    counters = env.backend.counters()
    assert len(samples) == counters.iterations + counters.idle_steps + 1
    assert samples[-1, CLOCK] == counters.clock and samples[:, EVICTIONS].sum() == counters.evictions


# --- videos and films ------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_gymnasium_records_a_video(tmp_path: Path) -> None:
    pytest.importorskip("moviepy")
    env = RecordVideo(gym.make("llmsched_env:LLMSched-v1", render_mode="rgb_array", num_requests=10), str(tmp_path))
    env.reset(seed=0)
    over = False
    while not over:
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        over = terminated or truncated
    env.close()
    assert next(tmp_path.glob("*.mp4")).stat().st_size > 1000


FILM = ("--scenario", "azure-conv", "--policy", "vllm", "--num-requests", "20", "--quiet", "--set", "engine.num_blocks=600")


@pytest.mark.parametrize("suffix", [".gif", ".mp4", ".png"])
def test_films(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    from llmsched_env.cli import film

    out = tmp_path / "new" / f"film{suffix}"
    assert film.main([*FILM, "--until", "3", "--every", "0.5", "--size", "400", "240", "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    if suffix == ".mp4":
        assert b"ftyp" in out.read_bytes()[:16]
        return
    with Image.open(out) as image:
        assert image.size == (400, 240)
        assert getattr(image, "n_frames", 1) == (7 if suffix == ".gif" else 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--out", "film.avi"), "--out: film.avi, must end in .gif, .mp4 or .png"),
        (("--out", "f.gif", "--every", "0"), "--every: 0, must be > 0"),
        (("--out", "f.gif", "--fps", "80"), "--fps: 80, must be > 0 and <= 50"),
        (("--out", "f.mp4", "--size", "801", "481"), "--size: 801 481, must be even numbers"),
        (("--out", "f.gif", "--size", "10", "10"), "--size: (10, 10)"),
        (("--out", "f.gif", "--rate", "-1"), "--rate: -1, must be > 0"),
        (("--out", "f.gif", "--seed", "-1"), "--seed: -1, must be >= 0"),
    ],
)
def test_films_that_are_refused(words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    from llmsched_env.cli import film

    assert film.main([*FILM, *words]) == 2
    assert said in capsys.readouterr().err
