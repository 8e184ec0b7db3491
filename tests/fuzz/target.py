"""A kind of file that is fuzzed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

Change = Callable[[bytes, random.Random], bytes]


@dataclass
class Target:
    """A kind of file. What reads one returns, or refuses it in one line."""

    name: str
    seeds: list[bytes]
    change: Change
    read: Callable[[bytes], object]
    # One file may take so many seconds of this process's processor time.
    seconds: float = 1.0
