"""Bookkeeping of input lines that cannot be used."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

from recsys_models.data.errors import DataError

logger = logging.getLogger(__name__)

MAX_KEPT = 20
"""How many malformed lines are kept with their reasons; the rest are only counted."""


@dataclass(frozen=True)
class MalformedLine:
    """An input line that was left out.

    Args:
        file: name of the file, without its folder.
        line: line number, counted from 1.
        reason: what was found and what was expected.
    """

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        """Return ``file:line: reason``."""
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass
class MalformedLog:
    """Counts lines and malformed lines per file, and keeps the first few malformed ones.

    Args:
        max_kept: how many malformed lines to keep with their reasons.
    """

    max_kept: int = MAX_KEPT
    kept: list[MalformedLine] = field(default_factory=list)
    num_lines: dict[str, int] = field(default_factory=dict)
    num_malformed: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Number of malformed lines in all files."""
        return sum(self.num_malformed.values())

    @property
    def room(self) -> int:
        """How many more malformed lines will be kept with their reasons."""
        return max(0, self.max_kept - len(self.kept))

    def count_lines(self, path: Path, lines: int) -> None:
        """Add ``lines`` lines, good and bad, to the count of ``path``."""
        self.num_lines[path.name] = self.num_lines.get(path.name, 0) + lines

    def count_malformed(self, path: Path, lines: int) -> None:
        """Add ``lines`` malformed lines to the count of ``path``."""
        self.num_malformed[path.name] = self.num_malformed.get(path.name, 0) + lines

    def keep(self, path: Path, line: int, reason: str) -> None:
        """Keep one malformed line with its reason, if there is room."""
        if self.room:
            self.kept.append(MalformedLine(path.name, line, reason))

    def sort(self) -> None:
        """Order the kept lines by file, in the order of reading, and line."""
        files = list(self.num_lines)
        self.kept.sort(key=lambda line: (files.index(line.file), line.line))

    def check_share(self, max_share: float) -> None:
        """Raise if any file holds a larger share of malformed lines than ``max_share``.

        Raises:
            DataError: naming the file, the share, the first malformed lines and the option that sets the limit.
        """
        for name, bad in self.num_malformed.items():
            lines = self.num_lines.get(name, bad)
            if bad > max_share * lines:
                examples = "\n  ".join(str(line) for line in self.kept if line.file == name)
                raise DataError(
                    f"{name}: {bad} of {lines} lines ({bad / lines:.2%}) are malformed, more than the allowed "
                    f"{max_share:.2%}. Check that this is the right file in its original format, or raise the option "
                    f"'max_malformed' to leave these lines out:\n  {examples}"
                )

    def warn(self, dataset: str) -> None:
        """Log all malformed lines as one warning; nothing if there are none."""
        if self.total:
            examples = "\n  ".join(map(str, self.kept))
            logger.warning("%s: %d malformed lines were left out; the first:\n  %s", dataset, self.total, examples)
