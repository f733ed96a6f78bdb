"""Frames as a file: an animated GIF, an MP4, or the last of them as a PNG."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmsched_env.errors import ConfigError, require
from llmsched_env.render import painter as p

Frame = npt.NDArray[np.uint8]
SUFFIXES = (".gif", ".mp4", ".png")
LAST_SECONDS = 2.0
"""A GIF that repeats rests this long on its last frame."""


def check_film(name: str, path: Path) -> None:
    """Refuse a file of an unknown kind, and one whose package is missing.

    Raises:
        ConfigError: naming ``name``.
        MissingExtraError: the extra ``render`` is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{name}: {path}, must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    require("imageio_ffmpeg" if path.suffix.lower() == ".mp4" else "PIL.Image", "render")
    require("pygame", "render")


def write_film(path: Path, frames: Iterable[Frame], fps: float) -> int:
    """Write frames as they come; how many they were.

    Args:
        path: ``.gif`` (repeats), ``.mp4`` or ``.png`` (the last frame).
        frames: (height, width, 3) uint8, all of one size, at least one.
        fps: frames per second.

    Raises:
        ConfigError, MissingExtraError: as ``check_film``.
    """
    check_film("path", path)
    writers = {".gif": write_gif, ".mp4": write_mp4, ".png": write_png}
    return writers[path.suffix.lower()](path, frames, fps)


def write_gif(path: Path, frames: Iterable[Frame], fps: float) -> int:
    """One palette for all frames, nothing dithered: what stands still costs nothing."""
    image = require("PIL.Image", "render")
    colours = np.array(p.film_colours(), dtype=np.uint8)
    palette = image.new("P", (1, 1))
    palette.putpalette(colours.tobytes())
    shown = [image.fromarray(frame).quantize(palette=palette, dither=image.Dither.NONE) for frame in frames]
    seconds = [1 / fps] * (len(shown) - 1) + [LAST_SECONDS]
    # GIFs count hundredths of a second.
    durations = [max(round(100 * each), 2) * 10 for each in seconds]
    shown[0].save(path, format="GIF", save_all=True, append_images=shown[1:], duration=durations, loop=0, optimize=True)
    return len(shown)


def write_mp4(path: Path, frames: Iterable[Frame], fps: float) -> int:
    """H.264, in the form that browsers and slides play."""
    ffmpeg: Any = require("imageio_ffmpeg", "render")
    each: Iterator[Frame] = iter(frames)
    first = next(each)
    height, width = first.shape[:2]
    options = {"fps": fps, "codec": "libx264", "quality": 8, "macro_block_size": 2, "ffmpeg_log_level": "error"}
    writer = ffmpeg.write_frames(str(path), (width, height), **options)
    count = 1
    try:
        writer.send(None)
        writer.send(first)
        for frame in each:
            writer.send(frame)
            count += 1
    finally:
        writer.close()
    return count


def write_png(path: Path, frames: Iterable[Frame], fps: float) -> int:
    """The last frame."""
    drawn: deque[tuple[int, Frame]] = deque(enumerate(frames, start=1), maxlen=1)
    count, last = drawn[0]
    require("PIL.Image", "render").fromarray(last).save(path, format="PNG", optimize=True)
    return count
