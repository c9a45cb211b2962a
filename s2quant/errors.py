"""Errors that s2quant shows to a person.

Everything that a user can cause is a `UserError` (exit status 2); everything that a check of our own output
finds is a `VerificationError` (exit status 1). A failed `assert` is a defect of s2quant itself.
"""

from __future__ import annotations

from collections.abc import Sequence


class S2QuantError(Exception):
    """Base class of the errors that the command line prints without a traceback."""


class UserError(S2QuantError):
    """The input cannot be used: says what was got, what was expected and what to do.

    Args:
        got: What s2quant found, with the offending value or path.
        expected: What it needs instead.
        todo: The next thing for the user to do.
    """

    def __init__(self, got: str, expected: str, todo: str) -> None:
        self.got, self.expected, self.todo = got, expected, todo
        super().__init__(f"got: {got}\nexpected: {expected}\ndo: {todo}")


class OutOfMemory(UserError):
    """There is not enough memory, on the host or on a device."""


def is_out_of_memory(error: Exception) -> bool:
    """Tell a lack of memory, on the CPU or on a GPU, from other errors; torch is not imported for that.

    Args:
        error: Any exception.

    Returns:
        Whether it is one.
    """
    texts = ("out of memory", "can't allocate memory", "not enough memory")
    named = type(error).__name__ == "OutOfMemoryError"  # torch's
    return isinstance(error, MemoryError) or named or any(text in str(error) for text in texts)


def is_lost_process(error: Exception) -> bool:
    """Tell the end of another process of a run, which this one was in a meeting with, from other errors.

    Args:
        error: Any exception.

    Returns:
        Whether it is one, as gloo and NCCL word it; their other errors, such as a lack of memory, are none.
    """
    texts = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
    is_theirs = type(error).__name__.startswith("Dist") or "gloo" in str(error)
    return is_theirs and any(text in str(error) for text in texts)


class DiskError(UserError):
    """A disk refused to be written: what was finished before stays."""


class VerificationError(S2QuantError):
    """A finished artefact does not hold what it should.

    Args:
        what: The artefact that was checked.
        faults: Every fault found, one sentence each.
    """

    def __init__(self, what: str, faults: Sequence[str]) -> None:
        self.what, self.faults = what, list(faults)
        super().__init__(f"{what}: {len(self.faults)} fault(s)\n" + shorten_list(self.faults, limit=50))


def shorten_list(items: Sequence[str], limit: int = 20) -> str:
    """Put items on lines of their own, naming how many were left out.

    Args:
        items: One line of text each.
        limit: The most lines to print.

    Returns:
        The lines, indented by two spaces, joined by newlines.
    """
    lines = [f"  {item}" for item in items[:limit]]
    if len(items) > limit:
        lines.append(f"  ... and {len(items) - limit} more")
    return "\n".join(lines)
