"""Sampling parameters of speech, as recipes, suites and requests give them, and their ranges."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How speech is sampled; the defaults are those of the model's public API server.

    Args:
        temperature: Softmax temperature of the draw.
        top_p: Cumulative probability kept (untempered).
        top_k: Most candidates kept.
    """

    temperature: float = 0.8
    top_p: float = 0.8
    top_k: int = 30


def sampling_faults(sampling: Sampling, where: str) -> list[str]:
    """Check the ranges of sampling parameters.

    Args:
        sampling: The parameters.
        where: How messages name them.

    Returns:
        One sentence per fault.
    """
    faults = []
    if not 0 < sampling.temperature <= 2:
        faults.append(f"{where}.temperature is {sampling.temperature}, not in (0, 2]")
    if not 0 < sampling.top_p <= 1:
        faults.append(f"{where}.top_p is {sampling.top_p}, not in (0, 1]")
    if sampling.top_k < 1:
        faults.append(f"{where}.top_k is {sampling.top_k}, not positive")
    return faults
