"""A disk of a few kilobytes that can be filled, where this system lets us have one; elsewhere a folder that can go away."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Disk:
    """Attributes: folder: where it is; mounted: whether it has a size of its own."""

    folder: Path
    mounted: bool

    def fail(self) -> None:
        """Nothing more can be written."""
        if self.mounted:
            fill(self.folder)
        else:
            self.folder.rename(self._away)

    def heal(self) -> None:
        """As before."""
        if self.mounted:
            (self.folder / "filling").unlink()
        else:
            self._away.rename(self.folder)

    @property
    def _away(self) -> Path:
        return self.folder.with_name(self.folder.name + ".away")


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Disk]:
    """``folder``, made here, as a disk in memory with so much room, if mounting is allowed."""
    folder.mkdir()
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder], capture_output=True, check=False)
        disk = Disk(folder, mounted.returncode == 0)
    except FileNotFoundError:
        disk = Disk(folder, False)
    try:
        yield disk
    finally:
        if disk.mounted:
            subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path) -> None:
    """Take all the room there is, with a file ``filling``."""
    with (folder / "filling").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
