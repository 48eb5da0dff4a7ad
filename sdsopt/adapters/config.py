"""The part of a PEFT configuration that says what the tensors mean."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from sdsopt.errors import AdapterError
from sdsopt.pairs.peft import REFUSED_VARIANTS

# Options of LoraConfig whose layers are not B·A, and the class in PEFT that implements them.
_REFUSED_OPTIONS = {
    "arrow_config": "ArrowLinearVariant",
    "use_bdlora": "BdLoraLinearVariant",
    "kasa_config": "KasaLinearVariant",
    "monteclora_config": "MontecloraLinearVariant",
    "use_qalora": "QALoraLinearVariant",
}


@final
@dataclass(frozen=True)
class LayerRule:
    """What is known of a layer besides its tensors.

    Attributes:
        rank: The rank that its factors must have, for stacked experts that of each; None where any will do.
        scaling: The factor in front of B·A, or of AdaLoRA's B·E·A.
        stacked: Whether the factors may be those of several experts.
        note: What had to be assumed, or "".
    """

    rank: int | None
    scaling: float
    stacked: bool = False
    note: str = ""


@final
@dataclass(frozen=True)
class AdapterConfig:
    """What PEFT needs to know to apply the factors.

    Attributes:
        rank: The rank r of layers that `rank_pattern` does not name.
        alpha: The α of layers that `alpha_pattern` does not name.
        rslora: Whether the scaling is α/√r instead of α/r.
        rank_pattern: Ranks by regular expression, matched against the end of a module's name.
        alpha_pattern: α by regular expression.
        target_parameters: Names of adapted parameters (stacked experts), or of their ends.
        adalora: Whether this is AdaLoRA, whose ranks differ from layer to layer and whose scaling is its own.
        refused: Why no layer is a plain product B·A; None where they are.
    """

    rank: int
    alpha: float
    rslora: bool = False
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    target_parameters: tuple[str, ...] = ()
    adalora: bool = False
    refused: str | None = None

    @classmethod
    def parse(cls, content: Mapping[str, Any], where: str) -> AdapterConfig:
        """Reads a configuration, such as that in `adapter_config.json`.

        Args:
            content: The JSON object.
            where: Where it is from, for the errors' messages.

        Raises:
            AdapterError: A value has a type or a size that it cannot have.
        """
        read = _Reader(content, where)
        kind = read.text("peft_type", "LORA")
        if kind == "ADALORA":
            return cls(read.positive("init_r", 12), read.number("lora_alpha", 8), adalora=True)
        if kind != "LORA":
            return cls(1, 1.0, refused=f"{kind.lower()} is not a plain product B·A")
        refused = next(
            (REFUSED_VARIANTS[name] for option, name in _REFUSED_OPTIONS.items() if content.get(option)), None
        )
        return cls(
            read.positive("r", 8),
            read.number("lora_alpha", 8),
            read.flag("use_rslora"),
            {pattern: read.positive_value("rank_pattern", rank) for pattern, rank in read.patterns("rank_pattern")},
            {pattern: read.number_value("alpha_pattern", alpha) for pattern, alpha in read.patterns("alpha_pattern")},
            read.texts("target_parameters"),
            refused=refused,
        )

    def rule_for(self, module: str) -> LayerRule | str:
        """Returns the rule for the module of this name in the base model, or why there is none."""
        if self.refused is not None:
            return self.refused
        if self.adalora:
            # PEFT divides by the initial rank, also after it has pruned some.
            return LayerRule(None, (self.alpha if self.alpha > 0 else self.rank) / (self.rank + 1e-5))
        parameters = self._parameters_of(module)
        rules = {self._rule(name, stacked=bool(parameters)) for name in parameters or [module]}
        if len(rules) > 1:
            return f"rank or alpha differ between {' and '.join(parameters)}, and no tensor's name says which it is"
        return rules.pop()

    def _rule(self, name: str, *, stacked: bool) -> LayerRule:
        rank = int(_matching(self.rank_pattern or {}, name, self.rank))
        alpha = _matching(self.alpha_pattern or {}, name, self.alpha)
        return LayerRule(rank, alpha / (math.sqrt(rank) if self.rslora else rank), stacked)

    def _parameters_of(self, module: str) -> list[str]:
        split = (target.rpartition(".") for target in self.target_parameters)
        return [f"{module}.{name}" for parent, _, name in split if not parent or f".{module}".endswith(f".{parent}")]


def _matching(patterns: Mapping[str, float], name: str, default: float) -> float:
    # As in PEFT: the first expression that matches the whole name, or all of it after a dot.
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


@final
@dataclass(frozen=True)
class _Reader:
    """Reads values of known types; a missing or null value has a default."""

    content: Mapping[str, Any]
    where: str

    def text(self, key: str, default: str) -> str:
        value = self._get(key, default)
        return value if isinstance(value, str) else self._fail(key, value, "a text")

    def flag(self, key: str) -> bool:
        value = self._get(key, False)
        return value if isinstance(value, bool) else self._fail(key, value, "true or false")

    def positive(self, key: str, default: int) -> int:
        return self.positive_value(key, self._get(key, default))

    def positive_value(self, key: str, value: object) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31:
            return value
        return self._fail(key, value, "a positive whole number")

    def number(self, key: str, default: float) -> float:
        return self.number_value(key, self._get(key, default))

    def number_value(self, key: str, value: object) -> float:
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30:
            return float(value)
        return self._fail(key, value, "a finite number")

    def texts(self, key: str) -> tuple[str, ...]:
        value = self._get(key, [])
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        return self._fail(key, value, "a list of texts")

    def patterns(self, key: str) -> list[tuple[str, object]]:
        value = self._get(key, {})
        if not isinstance(value, dict):
            return self._fail(key, value, "an object")
        for pattern in value:
            try:
                re.compile(rf"(.*\.)?({pattern})$")
            except (re.error, RecursionError, OverflowError) as error:
                raise AdapterError(f"{self.where}: {key} holds {pattern!r:.80}, no regular expression") from error
        return list(value.items())

    def _get(self, key: str, default: Any) -> Any:
        value = self.content.get(key)
        return default if value is None else value

    def _fail(self, key: str, value: object, expected: str) -> Any:
        raise AdapterError(f"{self.where}: {key} must be {expected}, and is {value!r:.80}; correct it by hand")
