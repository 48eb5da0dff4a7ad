"""The ablation harness: methods × learning rates × seeds, on the embedded task or on your own.

from sdsopt.compare import Settings, Task, compare

class MyTask(Task): ...  # build_model, batches, loss, evaluate

comparison = compare(MyTask(), Settings(corrections=["lora", "sds"], steps=200))
rich.print(comparison.table())
"""

from sdsopt.compare.api import Comparison, compare, load_comparison
from sdsopt.compare.difference import Difference
from sdsopt.compare.grid import Run, Settings
from sdsopt.compare.learning_rates import log_grid
from sdsopt.compare.methods import Inner, Method
from sdsopt.compare.observer import Observer
from sdsopt.compare.records import Record
from sdsopt.compare.summary import Cell, Row, Stat, summarise
from sdsopt.compare.task import Task
from sdsopt.compare.tasks import (
    TASKS,
    CausalLMTask,
    ClassificationTask,
    DigitsTask,
    FactorizationTask,
    LanguageTask,
    MiniLMTask,
)
from sdsopt.errors import MissingExtraError

__all__ = [
    "TASKS",
    "CausalLMTask",
    "Cell",
    "ClassificationTask",
    "Comparison",
    "Difference",
    "DigitsTask",
    "FactorizationTask",
    "Inner",
    "LanguageTask",
    "Method",
    "MiniLMTask",
    "MissingExtraError",
    "Observer",
    "Record",
    "Row",
    "Run",
    "Settings",
    "Stat",
    "Task",
    "compare",
    "load_comparison",
    "log_grid",
    "summarise",
]
