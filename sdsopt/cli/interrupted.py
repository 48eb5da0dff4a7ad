"""What Ctrl-C leaves of a comparison."""

from __future__ import annotations

import sys

EXIT_CODE = 130


def say_interrupted(directory: str, resume: str = "the same command") -> int:
    """Says where the finished runs are and how to go on; returns the exit code."""
    print(f"\nsdsopt: interrupted; finished runs are in {directory}, {resume} resumes", file=sys.stderr)
    return EXIT_CODE
