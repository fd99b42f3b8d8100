"""Every error a user can meet: what is wrong, where, and what to do about it.

A ``PathfmError`` is printed as one clear line and ends the command with its ``exit_code``. Anything else that escapes is a
defect of pathfm (exit code 1, with the place it came from).
"""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """How a command ended. Documented in ``docs/exit-codes.md``."""

    DONE = 0
    INTERNAL = 1
    USAGE = 2
    SOME_FAILED = 3
    PREEMPTED = 75
    INTERRUPTED = 130


class PathfmError(Exception):
    """Base of all errors that carry a message for the user.

    Args:
        what: what is wrong, in one sentence.
        where: the file, slide, row or setting it concerns.
        fix: what the user can do about it.
    """

    exit_code: ExitCode = ExitCode.INTERNAL

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what, where, fix)

    @property
    def reason(self) -> str:
        """The message without its place: for outcome rows, which name the slide and must not carry anybody's paths."""
        return f"{self.what} ({self.fix})" if self.fix else self.what

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        advice = f" ({self.fix})" if self.fix else ""
        return f"{place}{self.what}{advice}"

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process borders, and keyword arguments do not survive the default pickling of exceptions.
        return _rebuild, (type(self), self.what, self.where, self.fix)


def _rebuild(kind: type[PathfmError], what: str, where: str, fix: str) -> PathfmError:
    return kind(what, where=where, fix=fix)


class UsageError(PathfmError):
    """The command line, the study file or the cohort table asks for something that cannot be."""

    exit_code = ExitCode.USAGE


class MissingExtraError(UsageError):
    """An optional library is needed; the message carries its install line."""

    def __init__(self, what: str, *, where: str = "", fix: str = "", extra: str = "") -> None:
        super().__init__(what, where=where, fix=fix or f"pip install 'pathfm[{extra}]'")


class SlideError(PathfmError):
    """One slide cannot be used. It becomes a ``failed`` row in the record; the batch goes on."""

    exit_code = ExitCode.SOME_FAILED


class UnreadableSlideError(SlideError):
    """The file cannot be opened, or a region of it cannot be decoded."""


class MissingMppError(SlideError):
    """No trustworthy micrometres per pixel are known for the slide."""


class StoreError(PathfmError):
    """An artifact on disk is absent, damaged, foreign, or of a newer version."""

    exit_code = ExitCode.SOME_FAILED


class TrainingError(PathfmError):
    """Training cannot go on (a loss that is not finite, no data, a collapse)."""


class PreemptedError(PathfmError):
    """The scheduler wants its machine back (SIGTERM, SIGUSR1); everything is saved, and the same command goes on from there."""

    exit_code = ExitCode.PREEMPTED
