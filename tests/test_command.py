"""The console command from its first moment on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

INTERRUPTED_IMPORT = """
import os, signal, time
os.kill(os.getpid(), signal.SIGINT)
time.sleep(0.2)
"""


def command(folder: Path, *words: str, ignore: bool = False) -> subprocess.CompletedProcess[str]:
    """The command in a fresh process that looks for modules in ``folder`` first."""
    paths = [str(folder), *(str(ROOT / name) for name in ("", "baselines", "agents", "hardware"))]
    code = "import sys; from llmsched_command import main; sys.exit(main(sys.argv[1:]))"
    # Said here, as a process in the background of a shell inherits that it ignores Ctrl-C.
    handler = "SIG_IGN" if ignore else "default_int_handler"
    code = f"import signal; signal.signal(signal.SIGINT, signal.{handler}); {code}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run([sys.executable, "-c", code, *words], env=environment, cwd=folder, capture_output=True, text=True, timeout=120)


def test_ctrl_c_while_the_first_packages_are_imported_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "gymnasium.py").write_text(INTERRUPTED_IMPORT)
    ended = command(tmp_path, "--version")
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "Interrupted.\n")


def test_ctrl_c_while_the_commands_are_imported_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tyro.py").write_text(INTERRUPTED_IMPORT)
    ended = command(tmp_path, "--version")
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "Interrupted.\n")


def test_a_process_that_ignores_ctrl_c_goes_on_doing_so(tmp_path: Path) -> None:
    (tmp_path / "tyro.py").write_text(INTERRUPTED_IMPORT + "raise ImportError")
    ended = command(tmp_path, "--version", ignore=True)
    assert ended.returncode == 2 and "tyro is not installed" in ended.stderr


def test_it_carries_commands_out(tmp_path: Path) -> None:
    ended = command(tmp_path, "--version")
    assert ended.returncode == 0 and ended.stdout.startswith("llmsched-env ")
    assert command(tmp_path, "no-such-command").returncode == 2
