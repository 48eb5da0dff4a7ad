"""Lightning's Trainer, end to end: it must do what the same loop written by hand does, and resume."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from loop import METHODS, Loop, adamw, assert_corrected, corrected
from sdsopt import SDSPreconditioner, attach
from toy import Network, assert_same

pytest.importorskip("lightning.pytorch", exc_type=ImportError)

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision

BATCHES = 4  # of each epoch; an epoch's batches are its own
EPOCHS = 4
HALF_WAY = "epoch=1.ckpt"

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
methods = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    levels = {logging.getLogger(f"lightning.{part}"): logging.NOTSET for part in ("pytorch", "fabric")}
    for logger in levels:
        levels[logger] = logger.level
        logger.setLevel(logging.ERROR)
    yield
    for logger, level in levels.items():
        logger.setLevel(level)


class Automatic(LightningModule):
    """Lightning steps: `optimizer.step(closure)`, with clipping inside the closure."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.network = Network()
        self.method = method

    def loss(self, batch: Tensor) -> Tensor:
        return self.network.loss(self.current_epoch * BATCHES + int(batch))

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Tensor, index: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        optimizer = corrected(self, self.method)
        scheduler = CosineAnnealingLR(optimizer, BATCHES * EPOCHS)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Manual(Automatic):
    """The module steps by itself."""

    def __init__(self, method: str) -> None:
        super().__init__(method)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, index: int) -> None:  # pyright: ignore
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        assert isinstance(optimizer, SDSPreconditioner) or self.method in {"plain", "hooks"}
        self.manual_backward(self.loss(batch) / 2)
        if index % 2:
            self.clip_gradients(optimizer, gradient_clip_val=0.3, gradient_clip_algorithm="norm")
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def fit(module: LightningModule, folder: Path, resume: str | None = None, **options: Any) -> Trainer:
    """Trains for four epochs, from the beginning or from a checkpoint in the folder."""
    checkpoints = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, enable_version_counter=False)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[checkpoints, *options.pop("callbacks", [])],
        **options,
    )
    loaders = DataLoader(range(BATCHES), batch_size=None), DataLoader(range(1), batch_size=None)  # pyright: ignore
    trainer.fit(module, *loaders, ckpt_path=resume and folder / resume)
    return trainer


def loop(method: str, **options: Any) -> Loop:
    network = Network()
    optimizer = corrected(network, method)
    return Loop(network, optimizer, CosineAnnealingLR(optimizer, BATCHES * EPOCHS), **options)


def by_hand(method: str, **options: Any) -> Network:
    """The same in a loop."""
    return loop(method, **options).run(0, BATCHES * EPOCHS).network


def scaler() -> Any:
    return torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)  # pyright: ignore


# Module, options of the Trainer, and the same options of the loop.
CASES: dict[str, tuple[type[Automatic], Callable[[], dict[str, Any]], Callable[[], dict[str, Any]]]] = {
    "plain": (Automatic, dict, dict),
    "accumulation and clipping": (
        Automatic,
        lambda: {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3},
        lambda: {"accumulate": 2, "clip": 0.3},
    ),
    "bf16-mixed": (Automatic, lambda: {"precision": "bf16-mixed"}, lambda: {"autocast": torch.bfloat16}),
    "16-mixed": (
        Automatic,
        lambda: {"plugins": [MixedPrecision("16-mixed", "cpu", scaler())], "gradient_clip_val": 0.3},
        lambda: {"autocast": torch.float16, "scaler": scaler(), "clip": 0.3},
    ),
    "manual": (Manual, dict, lambda: {"accumulate": 2, "clip": 0.3}),
}


@methods
@pytest.mark.parametrize(("module", "options", "in_loop"), CASES.values(), ids=CASES)
def test_it_trains_as_the_loop_does_and_resumes(
    method: str, module: type[Automatic], options: Any, in_loop: Any, tmp_path: Path
) -> None:
    whole, resumed = module(method), module(method)
    fit(whole, tmp_path, **options())
    fit(resumed, tmp_path, HALF_WAY, **options())
    assert_same(whole.network, by_hand(method, **in_loop()))
    assert_same(whole.network, resumed.network)
    assert_corrected(whole.network, by_hand("plain", **in_loop()))


def test_hooks_for_the_time_of_a_fit(tmp_path: Path) -> None:
    """As the docs write it: the module's optimizer knows nothing of the correction."""
    module = Automatic("plain")
    with attach(module):
        fit(module, tmp_path, gradient_clip_val=0.3)
    assert_same(module.network, by_hand("hooks", clip=0.3))
    assert_corrected(module.network, by_hand("sds", clip=0.3))  # hooks are clipped corrected, the wrapper raw


class Recorded(Automatic):
    """Remembers the weights that each epoch begins with."""

    def __init__(self, method: str) -> None:
        super().__init__(method)
        self.starts: list[list[Tensor]] = []

    def on_train_epoch_start(self) -> None:
        self.starts.append([p.detach().clone() for p in self.parameters()])

    def configure_optimizers(self) -> Any:
        return corrected(self, self.method)


@methods
def test_stochastic_weight_averaging(method: str, tmp_path: Path) -> None:
    def swa(method: str, resume: str | None = None) -> Recorded:
        module = Recorded(method)
        callback = StochasticWeightAveraging(swa_lrs=0.005, swa_epoch_start=2, annealing_epochs=2)
        fit(module, tmp_path / method, resume, callbacks=[callback])
        return module

    whole, plain = swa(method), swa("plain")
    assert len(whole.starts) == EPOCHS
    for average, *weights in zip(whole.parameters(), *whole.starts[1:], strict=True):
        torch.testing.assert_close(average.data, torch.stack(weights).mean(0))
    assert_corrected(whole, plain)
    assert_same(swa(method, HALF_WAY).network, whole.network)


@methods
def test_ema_weight_averaging(method: str, tmp_path: Path) -> None:
    """It swaps the weights with the averaged ones for each validation, and back."""

    def ema(method: str, resume: str | None = None) -> tuple[Automatic, list[Tensor]]:
        module, last = Automatic(method), []

        class Watch(Callback):
            def on_train_batch_end(self, *args: Any) -> None:
                last[:] = [p.detach().clone() for p in module.parameters()]

        average = EMAWeightAveraging(decay=0.5, update_every_n_steps=1)
        fit(module, tmp_path / method, resume, callbacks=[Watch(), average])
        return module, last

    module, last = ema(method)
    assert all(torch.equal(*pair) for pair in zip(last, by_hand(method).parameters(), strict=True))
    assert not any(torch.equal(*pair) for pair in zip(last, module.parameters(), strict=True))
    assert_corrected(module, ema("plain")[0])
    assert_same(ema(method, HALF_WAY)[0].network, module.network)


def test_two_optimizers_each_correct_their_own(tmp_path: Path) -> None:
    """With closures, and with the other's parameters switched off meanwhile."""

    class Two(Manual):
        def training_step(self, batch: Tensor, index: int) -> None:  # pyright: ignore
            for optimizer in self.optimizers():  # pyright: ignore

                def closure(optimizer: Any = optimizer) -> Tensor:
                    optimizer.zero_grad()
                    loss = self.loss(batch)
                    self.manual_backward(loss)
                    return loss

                with optimizer.toggle_model():
                    optimizer.step(closure)

        def configure_optimizers(self) -> Any:
            return optimizers_of(self.network, self.method)

    def optimizers_of(network: Network, method: str) -> list[Any]:
        rest = nn.ModuleList([network.second, network.head])
        return [corrected(part, method) for part in (network.first, rest)]

    module, network, plain = Two("sds"), Network(), Network()
    fit(module, tmp_path)
    for model, method in ((network, "sds"), (plain, "plain")):
        optimizers = optimizers_of(model, method)
        for batch in range(BATCHES * EPOCHS):
            for optimizer in optimizers:
                model.zero_grad()
                model.loss(batch).backward()
                optimizer.step()
    assert_same(module.network, network)
    assert_corrected(network, plain)


def test_lightnings_optimizer_wrapper_reaches_ours(tmp_path: Path) -> None:
    """It makes itself a subclass of SDSPreconditioner that was never initialised."""

    class Asking(Manual):
        seen: Any = None

        def training_step(self, batch: Tensor, index: int) -> None:  # pyright: ignore
            super().training_step(batch, index)
            optimizer: Any = self.optimizers()
            self.seen = optimizer
            assert isinstance(optimizer, SDSPreconditioner)
            assert optimizer.optimizer.param_groups is optimizer.param_groups
            assert optimizer.inner is optimizer.optimizer.inner
            assert [pair.name for pair in optimizer.pairs] == ["network.first[default]", "network.second[default]"]
            optimizer.load_state_dict(optimizer.state_dict())
            assert repr(optimizer).count("AdamW") == 1

    module = Asking("sds")
    trainer = fit(module, tmp_path)
    assert module.seen is not None
    assert isinstance(trainer.optimizers[0], SDSPreconditioner)
    assert_same(module.network, by_hand("sds", accumulate=2, clip=0.3))
    assert_corrected(module.network, by_hand("plain", accumulate=2, clip=0.3))


@pytest.mark.parametrize(("before", "after"), [("plain", "sds"), ("sds", "plain")])
def test_checkpoints_move_between_bare_and_wrapped(before: str, after: str, tmp_path: Path) -> None:
    fit(Automatic(before), tmp_path)
    module, unchanged = Automatic(after), Automatic(before)
    fit(module, tmp_path, HALF_WAY)
    fit(unchanged, tmp_path, HALF_WAY)
    first, second = loop(before).run(0, BATCHES * EPOCHS // 2), loop(after)
    second.load(first.save()).run(BATCHES * EPOCHS // 2, BATCHES * EPOCHS)
    assert_same(module.network, second.network)
    assert_corrected(module.network, unchanged.network)


def test_a_scheduler_on_the_inner_optimizer_is_refused(tmp_path: Path) -> None:
    class Wrong(Automatic):
        def configure_optimizers(self) -> Any:
            inner = adamw(self.parameters())
            return [SDSPreconditioner(inner, self)], [CosineAnnealingLR(inner, 10)]

    with pytest.raises(Exception, match="attached with an optimizer that wasn't returned"):
        fit(Wrong("sds"), tmp_path)
