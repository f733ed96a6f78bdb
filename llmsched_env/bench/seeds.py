"""Which requests are drawn for what: tuning, evaluation and the measurement of loads never share any.

Every purpose has a key of its own in numpy's ``SeedSequence``, so its streams differ from those of all
other purposes whatever the seed. Training draws from plain integers, which have an empty key.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from llmsched_env.errors import ConfigError

Purpose = Literal["tuning", "evaluation", "boundary"]
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)


def seed_of(purpose: Purpose, number: int, part: int = 0) -> np.random.SeedSequence:
    """The seed of episode ``number`` of a purpose.

    Args:
        number: >= 0; the same for all policies that are compared.
        part: of an episode that is put together from several.

    Raises:
        ConfigError: unknown purpose or a negative number.
    """
    if purpose not in PURPOSES:
        raise ConfigError(f"purpose: {purpose!r}, must be one of {', '.join(PURPOSES)}")
    if number < 0 or part < 0:
        raise ConfigError(f"seed: {number}, part {part}, must be >= 0")
    return np.random.SeedSequence(number, spawn_key=(1 + PURPOSES.index(purpose), part))
