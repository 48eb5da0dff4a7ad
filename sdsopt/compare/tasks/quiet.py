"""Loading a model without the reports and progress bars of transformers."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from sdsopt.extras import extra


@contextmanager
def quiet_transformers() -> Generator[None]:
    """Silences transformers; afterwards it is as talkative as before."""
    with extra("demo"):
        from transformers.utils import logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
