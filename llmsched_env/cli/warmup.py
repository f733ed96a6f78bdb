"""``llmsched warmup``: compile for this machine what would else be compiled at the first use."""

from __future__ import annotations

import time
from dataclasses import dataclass

from llmsched_env import compiled
from llmsched_env.bench.warmup import parts, warm
from llmsched_env.cli.frame import FAILED, Command, Options, Outcome, Screen


@dataclass(frozen=True, kw_only=True)
class Warmup(Options):
    """Compile everything that environments, policies and shipped agents need, and keep it on disk for later processes.

    The place is NUMBA_CACHE_DIR, else the user's cache folder. Run it again after an upgrade or an edit of the package, or while an
    image is built; what is there already is only loaded.
    """


def run(options: Warmup, screen: Screen) -> Outcome:
    """Every part in order, with its seconds where something was compiled."""
    compiled.compiling_is_meant()
    start, chosen = time.perf_counter(), parts()
    done = []
    with screen.progress(len(chosen)) as bar:
        for one in warm(chosen):
            done.append(one)
            bar.advance(description=one.name)
    if not options.quiet:
        for one in done:
            if one.compiled:
                screen.print(f"{one.name:<40} {one.compiled:>3} functions {one.seconds:>6.1f} s")
    count = sum(one.compiled for one in done)
    seconds = time.perf_counter() - start
    kept = any(compiled.CACHE_FOLDER.glob("*.nbc"))
    if not kept:
        screen.note(f"error: nothing could be kept in {compiled.CACHE_FOLDER}; set NUMBA_CACHE_DIR to a folder that can be written")
        return Outcome({"parts": done, "folder": compiled.CACHE_FOLDER}, FAILED)
    what = f"{count} functions compiled" if count else "nothing to compile"
    screen.print(f"{len(done)} parts, {what}, {seconds:.0f} s; kept in {compiled.CACHE_FOLDER}")
    return Outcome({"parts": done, "compiled": count, "seconds": seconds, "folder": compiled.CACHE_FOLDER})


COMMAND = Command("warmup", Warmup, run, "compile ahead what the first use would compile")
main = COMMAND.main
