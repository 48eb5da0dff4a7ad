"""The embedded tasks, which need no download, and those on what the user has on disk.

A new one is one file here and one line in `TASKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sdsopt.compare.task import Task
from sdsopt.compare.tasks.digits import DigitsTask
from sdsopt.compare.tasks.factorization import FactorizationTask
from sdsopt.compare.tasks.huggingface import CausalLMTask, ClassificationTask
from sdsopt.compare.tasks.language import LanguageTask
from sdsopt.compare.tasks.minilm import MiniLMTask

__all__ = [
    "TASKS",
    "CausalLMTask",
    "ClassificationTask",
    "DigitsTask",
    "FactorizationTask",
    "LanguageTask",
    "MiniLMTask",
]

TASKS: Mapping[str, Callable[[], Task]] = {
    "digits": DigitsTask,
    "language": LanguageTask,
    "minilm": MiniLMTask,
    "factorization": FactorizationTask,
    "sensing": lambda: FactorizationTask(measurements=600),
}
