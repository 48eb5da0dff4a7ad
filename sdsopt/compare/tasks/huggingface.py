"""The user's own Hugging Face model and data, as they lie on disk."""

from __future__ import annotations

import hashlib
import re
from abc import abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from sdsopt.compare.learning_rates import default_learning_rates
from sdsopt.compare.task import Task
from sdsopt.compare.tasks.adapters import adapt
from sdsopt.compare.tasks.digest import digest
from sdsopt.compare.tasks.labelled import LabelledTexts, accuracy
from sdsopt.compare.tasks.prepared import ensure_prepared, prepared
from sdsopt.compare.tasks.quiet import quiet_transformers
from sdsopt.compare.tasks.rows import Columns, read_rows
from sdsopt.compare.tasks.streams import next_token_accuracy, windows
from sdsopt.errors import TaskError
from sdsopt.extras import extra

_LINEAR = {"Linear", "Conv1D"}  # GPT-2's Conv1D is a linear layer with its weight transposed
_ELSEWHERE = {"model", "data", "device"}  # where things are does not change what they are
_LARGEST_OF_EMBEDDED = 10  # the default rates are those of small models; a large one's are about this factor lower


@dataclass(frozen=True)
class HuggingFaceTask(Task):
    """Base of the tasks on a model and data of the user's.

    The model is loaded in float32, without dropout, which would draw other numbers in each method.

    Attributes:
        model: Folder with a model and its tokenizer, as `save_pretrained` writes them.
        data: JSON lines (.jsonl), a folder that `datasets.Dataset.save_to_disk` wrote, or a plain text.
        text: Name of the column of texts.
        target_modules: Names, or ends of names, of the linear layers to adapt; empty for all but the output layer.
        length: Tokens per sequence.
        batch_size: Sequences per step.
        held_out: Share of the data to evaluate on, where these hold out nothing themselves.
        device: Where to train, such as "cuda"; with one, jobs share it.
    """

    model: str
    data: str
    text: str = "text"
    target_modules: tuple[str, ...] = ()
    length: int = 128
    batch_size: int = 8
    held_out: float = 0.1
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, least in (("length", 2), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be a share between 0 and 1, got {self.held_out}")

    @property
    def name(self) -> str:
        """Of the model and the data."""
        return f"{Path(self.model).resolve().name} on {Path(self.data).resolve().stem}"

    @property
    def fingerprint(self) -> str:
        """Covers the content of both, wherever they lie."""
        settings = [(f.name, getattr(self, f.name)) for f in fields(self) if f.name not in _ELSEWHERE]
        contents = [digest(Path(place)) for place in (self.model, self.data)]
        text = f"{type(self).__name__}, v1, {settings}, {contents}, torch {torch.__version__}"
        return f"hf-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def prepare(self) -> None:
        """Reads the data and tries the model, so that what is wrong with either shows before the first run.

        Raises:
            TaskError: The data or the model cannot be used.
            MissingExtraError: A package is missing.
        """
        if not Path(self.model).is_dir():
            raise TaskError(
                f"--model: there is no folder {self.model}. Download a model first (hf download NAME --local-dir DIR), "
                "or save yours with save_pretrained"
            )
        if not Path(self.data).exists():
            raise TaskError(f"--data: there is no {self.data}")
        ensure_prepared(self)
        self._require_fit(self.build_model(rank=1))

    @abstractmethod
    def make_tensors(self) -> dict[str, Tensor]:
        """Returns the tokenised data."""

    @abstractmethod
    def _auto_model(self) -> Any:
        """The class of transformers that loads the model."""

    def _options(self) -> dict[str, Any]:
        """What to change in the model's configuration."""
        return {}

    def build_model(self, rank: int | None) -> nn.Module:
        """Returns the model with adapters on its linear layers; a head that is not in the folder is drawn anew."""
        with extra("hf"):
            from transformers import AutoConfig
        with quiet_transformers(), _reported(f"the model in {self.model}"):
            config: Any = AutoConfig.from_pretrained(self.model, local_files_only=True, trust_remote_code=False)
            dropouts = {n: 0.0 for n, value in vars(config).items() if "drop" in n and isinstance(value, float)}
            config.update({**dropouts, **self._options()})
            model: nn.Module = self._auto_model().from_pretrained(
                self.model, config=config, local_files_only=True, trust_remote_code=False
            )
        self._require_positions(config)
        heads = self._heads(model)
        targets = "|".join(re.escape(name) for name in self._targets(model, heads))
        return adapt(model.float(), targets, rank, heads).to(self.device)

    def _heads(self, model: Any) -> Sequence[str]:
        """Names of fresh modules that learn in every method."""
        del model
        return ()

    def _targets(self, model: Any, heads: Sequence[str]) -> list[str]:
        output = model.get_output_embeddings()
        linear = [
            name
            for name, module in model.named_modules()
            if type(module).__name__ in _LINEAR and module is not output and name.partition(".")[0] not in heads
        ]
        wanted = self.target_modules
        found = [name for name in linear if not wanted or any(f".{name}".endswith(f".{end}") for end in wanted)]
        if not found:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear})) or "none"
            raise TaskError(
                f"the model in {self.model} has no linear layer to adapt called {' or '.join(wanted) or 'anything'}; "
                f"there are: {known} (--target-modules)"
            )
        return found

    def _require_positions(self, config: Any) -> None:
        positions = getattr(config, "max_position_embeddings", None)
        if isinstance(positions, int) and self.length > positions > 0:
            raise TaskError(
                f"sequences of {self.length} tokens exceed the model's {positions} positions; lower --length"
            )

    def _require_fit(self, model: Any) -> None:
        size: int = model.get_input_embeddings().weight.shape[0]
        largest = max(int(t.max()) for name, t in prepared(self).items() if name.endswith("tokens"))
        if largest >= size:
            raise TaskError(
                f"the tokenizer in {self.model} is another model's: it gives the token {largest}, and the model knows "
                f"{size}"
            )

    def _tokenizer(self) -> Any:
        with extra("hf"):
            from transformers import AutoTokenizer
        with quiet_transformers(), _reported(f"the tokenizer in {self.model}"):
            tokenizer: Any = AutoTokenizer.from_pretrained(self.model, local_files_only=True, trust_remote_code=False)
        return tokenizer

    def learning_rates(self, inner: str, method: str) -> Sequence[float]:
        """A grid that starts lower than that of the embedded tasks' small models."""
        return [float(f"{rate / _LARGEST_OF_EMBEDDED:.3g}") for rate in default_learning_rates(inner, method)]


@contextmanager
def _reported(what: str) -> Generator[None]:
    """Says what cannot be loaded, and why; transformers raises many kinds of errors."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise TaskError(
            f"cannot load {what}: {reason}. It must be a folder that save_pretrained wrote, of a model and its "
            "tokenizer, and of a kind that this version of transformers knows. For any other, write a task: --task "
            "package.module:Task"
        ) from error


def _trains(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _order(count: int) -> list[int]:
    """The same for all runs: what varies between them is the method, not what it is tested on."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()


def _stream(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """All texts as one row of tokens, shuffled, each with the token that ends texts."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    with quiet_transformers():  # which warns of texts that are longer than the model's window
        parts = [tokenizer(texts[i], add_special_tokens=False)["input_ids"] + end for i in _order(len(texts))]
    return torch.tensor([token for part in parts for token in part], dtype=torch.int32)


@final
@dataclass(frozen=True)
class CausalLMTask(HuggingFaceTask):
    """A language model learns to continue the user's texts.

    The texts are put one after the other, in an order of its own where there are several, and cut into windows.
    """

    def make_tensors(self) -> dict[str, Tensor]:
        """Returns the tokens to train on, and those that are held out."""
        tokenizer = self._tokenizer()
        rows = read_rows(Path(self.data), self.text)
        streams = {"train_tokens": _stream(tokenizer, rows.train[self.text])}
        if rows.held_out is not None:
            streams["held_out_tokens"] = _stream(tokenizer, rows.held_out[self.text])
        else:
            whole = streams["train_tokens"]
            cut = int((1 - self.held_out) * len(whole))
            streams = {"train_tokens": whole[:cut], "held_out_tokens": whole[cut:]}
        if len(streams["train_tokens"]) <= self.length or len(streams["held_out_tokens"]) < 2:
            counts = " and ".join(str(len(stream)) for stream in streams.values())
            raise TaskError(
                f"{self.data} has {counts} tokens to train and to evaluate on, too few for sequences of {self.length}; "
                "give more text, or lower --length"
            )
        return streams

    def _auto_model(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def batches(self, seed: int) -> Iterator[Tensor]:
        """Yields random windows, (batch_size, length)."""
        for batch in windows(prepared(self)["train_tokens"], self.length, self.batch_size, seed):
            yield batch.to(self.device)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """The model's own: cross-entropy of the next token."""
        return model(input_ids=batch, labels=batch).loss

    def evaluate(self, model: nn.Module) -> float:
        """Share of the next tokens of held-out text that the model ranks first."""
        return next_token_accuracy(model, prepared(self)["held_out_tokens"], self.length, self.device)


@final
@dataclass(frozen=True)
class ClassificationTask(HuggingFaceTask):
    """A model learns to tell the user's classes of texts.

    Attributes:
        label: Name of the column of labels, whole numbers or names.
    """

    label: str = "label"

    def make_tensors(self) -> dict[str, Tensor]:
        """Returns tokens, masks and labels of both parts."""
        tokenizer = self._tokenizer()
        tokenizer.padding_side = "right"
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        if tokenizer.pad_token is None:
            raise TaskError(f"the tokenizer in {self.model} has neither a token to pad with nor one that ends texts")
        rows = read_rows(Path(self.data), self.text, self.label)
        parts = self._split(rows.train) if rows.held_out is None else (rows.train, rows.held_out)
        names = sorted({str(label) for part in parts for label in part[self.label]})
        if len(names) < 2 or not all(len(part[self.text]) for part in parts):
            counts = " and ".join(str(len(part[self.text])) for part in parts)
            raise TaskError(
                f"{self.data} has {len(names)} classes, and {counts} rows to train and to evaluate on; there must be "
                "two classes and a row of each part"
            )
        if len(parts[0][self.text]) < self.batch_size:
            raise TaskError(
                f"{self.data} has fewer rows to train on than a batch has ({self.batch_size}); lower --batch-size"
            )
        tensors = {"classes": torch.tensor(len(names)), "padding_token": torch.tensor(tokenizer.pad_token_id)}
        for prefix, part in zip(("train", "held_out"), parts, strict=True):
            encoded = tokenizer(
                list(part[self.text]),
                truncation=True,
                max_length=self.length,
                padding="max_length",
                return_tensors="pt",
            )
            tensors[f"{prefix}_tokens"], tensors[f"{prefix}_mask"] = encoded["input_ids"], encoded["attention_mask"]
            tensors[f"{prefix}_labels"] = torch.tensor([names.index(str(label)) for label in part[self.label]])
        return tensors

    def _split(self, columns: Columns) -> tuple[Columns, Columns]:
        order = _order(len(columns[self.text]))
        cut = int((1 - self.held_out) * len(order))
        train, held_out = (
            {n: [column[i] for i in rows] for n, column in columns.items()} for rows in (order[:cut], order[cut:])
        )
        return train, held_out

    def _auto_model(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def _options(self) -> dict[str, Any]:
        tensors = prepared(self)
        return {
            "num_labels": int(tensors["classes"]),
            "pad_token_id": int(tensors["padding_token"]),
            "problem_type": "single_label_classification",
        }

    def _heads(self, model: Any) -> Sequence[str]:
        """What the model has beside its body."""
        return [name for name, module in model.named_children() if name != model.base_model_prefix and _trains(module)]

    def batches(self, seed: int) -> Iterator[LabelledTexts]:
        """Yields shuffled batches, epoch after epoch."""
        for batch in self._part("train").shuffled(self.batch_size, seed):
            yield batch.to(self.device)

    def loss(self, model: nn.Module, batch: LabelledTexts) -> Tensor:
        """The model's own: cross-entropy."""
        return model(input_ids=batch.tokens, attention_mask=batch.mask, labels=batch.labels).loss

    def evaluate(self, model: nn.Module) -> float:
        """Accuracy on the held-out texts."""
        return accuracy(model, self._part("held_out"), self.device)

    def shared_parameters(self, model: Any) -> list[Parameter]:
        """The head's."""
        base = getattr(model, "get_base_model", lambda: model)()
        return [parameter for head in self._heads(base) for parameter in base.get_submodule(head).parameters()]

    def _part(self, prefix: str) -> LabelledTexts:
        tensors = prepared(self)
        return LabelledTexts(*(tensors[f"{prefix}_{name}"] for name in ("tokens", "mask", "labels")))
