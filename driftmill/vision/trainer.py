"""Training a network: one loop for a laptop's CPU, a GPU, and many processes.

Nothing random has a state that could be lost: order, augmentation and dropout of a step are drawn
from generators seeded with the run's seed and the step's number. So a run that goes on from a
checkpoint does what it would have done, and processes that train together draw the same.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from driftmill.contract import Vision
from driftmill.vision import augment
from driftmill.vision.checkpoints import Checkpoints
from driftmill.vision.nets import Net

log = logging.getLogger("driftmill")

#: The highest learning rate for a batch of 256, by optimizer; families that start from a
#: transformer's recipe take less.
LEARNING_RATES = {"sgd": 0.1, "adam": 2e-3, "adamw": 2e-3, "rmsprop": 5e-4}
GENTLE = {"convnext-tiny": 0.1}
#: Part of the training in which the rate rises, and what of the highest it starts and ends with.
RISE, LOWEST = 0.25, 0.02
#: Training images on which the final weights are tried once more, to see the gap to validation.
GAP_ROWS = 5_000
#: Images that mean and deviation are measured of.
NORMALISATION_ROWS = 50_000
#: Images that are only read, not learnt from, go through the network this many at a time.
BATCH = 1024
#: Seconds after which a checkpoint is written within an epoch.
CHECKPOINT_SECONDS = 60.0
#: Multiplications of a whole training, roughly, that are worth a thread more: what `small-cnn` does
#: with some 50,000 images of 28 by 28 pixels.
THREAD_WORK = 1e13
#: Processes that read images which do not fit into memory.
READERS = 2

History = dict[str, float]


class TrainingError(ValueError):
    """Settings or data that cannot be trained with."""


@dataclass(frozen=True)
class Rows:
    """Labelled images, of which nothing is copied: `images` may be a memory-mapped file.

    Args:
        images: (N, C, H, W) uint8.
        y: (N,) index of each image's label.
        rows: which of them; None: all.
    """

    images: np.ndarray
    y: np.ndarray
    rows: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.y) if self.rows is None else len(self.rows)

    def read(self, chosen: np.ndarray | slice) -> np.ndarray:
        """Images (n, C, H, W) by their place among these rows."""
        places = chosen if self.rows is None else self.rows[chosen]
        # A copy in any case: PyTorch takes no array that is read-only.
        return np.array(self.images[places])

    def labels(self) -> Tensor:
        """Labels (N,) int64."""
        y = self.y if self.rows is None else self.y[self.rows]
        return torch.from_numpy(np.array(y, dtype=np.int64))

    def __getitems__(self, chosen: list[int]) -> Tensor:
        # What a DataLoader asks of a data set that reads a batch at once.
        return torch.from_numpy(self.read(np.asarray(chosen)))


@dataclass
class Result:
    """How a training went. The history has an entry for each epoch: `epoch` (from 1),
    `train_loss`, `validation_loss`, `validation_accuracy`, `lr` (of its last step), `seconds`."""

    history: list[History]
    #: Loss and accuracy of the final weights on the validation rows, and on up to 5,000 training
    #: rows as they are.
    validation: dict[str, float]
    train: dict[str, float]
    best_epoch: int
    steps: int
    seconds: float
    #: Of the first step with `compile`, which is where the compiler works; part of `seconds`.
    compile_seconds: float
    device: str
    precision: str
    resident: bool
    processes: int
    #: The step after which a killed run went on; 0: from the start.
    resumed_at: int

    @property
    def epochs(self) -> int:
        """Epochs trained."""
        return len(self.history)

    @property
    def gap(self) -> float:
        """How much better it is on what it has learnt from, in accuracy."""
        return self.train["accuracy"] - self.validation["accuracy"]

    def to_dict(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        return asdict(self) | {"epochs": self.epochs, "gap": self.gap}


def split(y: np.ndarray, part: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to learn from and rows to validate with, each label in the same proportion.

    Args:
        y: (N,) labels.
        part: of the rows, for validation; of a label with two rows or more, one at least goes to
            either side.
        seed: of the choice.

    Returns:
        Two sorted arrays of places in `y`.
    """
    rng = np.random.default_rng(seed)
    chosen = []
    for label in np.unique(y):
        places = rng.permutation(np.flatnonzero(y == label))
        chosen.append(places[: min(max(round(part * len(places)), 1), len(places) - 1)])
    validation = np.sort(np.concatenate(chosen))
    return np.setdiff1d(np.arange(len(y)), validation), validation


def choose_device(wish: str) -> torch.device:
    """The device for `cpu`, `cuda` or `auto`. Of several GPUs a process takes the one that
    torchrun's LOCAL_RANK names.

    Raises:
        TrainingError: `cuda` is wished for and there is none.
    """
    there = torch.cuda.is_available()
    if wish == "cuda" and not there:
        raise TrainingError(
            "train.vision.device is cuda, but PyTorch finds no GPU; choose auto or cpu"
        )
    if wish == "cpu" or not there:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def choose_precision(wish: str, device: torch.device, net: nn.Module) -> torch.dtype:
    """What convolutions compute in.

    On a CPU bfloat16 pays where the processor multiplies it (AVX512-BF16, AMX): `small-cnn` and
    ResNets then take about half the time; elsewhere it is emulated, which is slow. It does not pay
    for depthwise convolutions: MobileNet and EfficientNet take twice the time, and oneDNN's
    gradient of small maps is not the same twice.
    """
    if wish != "auto":
        return torch.bfloat16 if wish == "bfloat16" else torch.float32
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        able = torch.cpu.get_capabilities()
        depthwise = any(isinstance(m, nn.Conv2d) and m.groups > 1 for m in net.modules())
        fast = bool(able.get("avx512_bf16") or able.get("amx_bf16")) and not depthwise
    return torch.bfloat16 if fast else torch.float32


def learning_rate(settings: Vision, family: str) -> float:
    """The highest learning rate: the contract's, or what suits optimizer, family and batch."""
    if settings.learning_rate is not None:
        return settings.learning_rate
    usual = LEARNING_RATES[settings.optimizer] * GENTLE.get(family, 1.0)
    # Goyal et al. 2017 for SGD; adaptive optimizers follow the square root (Malladi et al. 2022).
    power = 1.0 if settings.optimizer == "sgd" else 0.5
    start = 0.1 if settings.weights is not None else 1.0
    return float(usual * start * (min(settings.batch, 2048) / 256) ** power)


def scheduled(schedule: str, done: float) -> float:
    """The part of the highest learning rate when `done` (0 to 1) of the training is behind."""
    if schedule == "constant":
        return 1.0
    rising = done < RISE
    part = done / RISE if rising else (1 - done) / (1 - RISE)
    if schedule == "one-cycle":
        part = (1 - math.cos(math.pi * part)) / 2
    return LOWEST + (1 - LOWEST) * part


def make_optimizer(net: Net, settings: Vision, rate: float) -> torch.optim.Optimizer:
    """The contract's optimizer. Biases and norms, which have one dimension, do not decay."""
    groups = [
        {
            "params": [p for p in net.parameters() if p.dim() > 1],
            "weight_decay": settings.weight_decay,
        },
        {"params": [p for p in net.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    momentum = settings.momentum
    match settings.optimizer:
        case "sgd":
            return torch.optim.SGD(groups, lr=rate, momentum=momentum, nesterov=momentum > 0)
        case "adam":
            return torch.optim.Adam(groups, lr=rate)
        case "adamw":
            return torch.optim.AdamW(groups, lr=rate)
        case "rmsprop":
            return torch.optim.RMSprop(groups, lr=rate, momentum=momentum)


def generator(device: torch.device, *numbers: int) -> torch.Generator:
    """A generator that depends on nothing but the numbers."""
    return torch.Generator(device).manual_seed(_mixed(*numbers))


def _mixed(*numbers: int) -> int:
    return int(np.random.SeedSequence([n % 2**64 for n in numbers]).generate_state(1)[0])


# What the numbers after a seed stand for.
_ORDER, _AUGMENT, _DROPOUT = 1, 2, 3


def train(
    net: Net,
    learn: Rows,
    validate: Rows,
    settings: Vision,
    seed: int,
    device: str | torch.device = "auto",
    checkpoints: Checkpoints | None = None,
    on_epoch: Callable[[History], None] | None = None,
) -> Result:
    """Train a network in place.

    With torch.distributed initialised it trains with all processes of the group, which must be
    given the same arguments: each takes its part of every batch, and all end with the same weights.
    The same seed on the same machine gives the same weights, bit by bit (see `choose_precision`
    for an exception, where bfloat16 is asked for).

    Args:
        net: from `nets.build`; afterwards it holds the final weights (of the average or the best
            epoch, where asked for), on the CPU, ready to answer.
        learn: images to learn from; they also give the normalisation.
        validate: images that rank and stop.
        settings: the contract's `train.vision`.
        seed: of order, augmentation and dropout.
        device: as in `choose_device`, or a device.
        checkpoints: where to go on from and to write to; removed at the end.
        on_epoch: gets each new entry of the history.

    Raises:
        TrainingError: too few images, no such device, or the loss became infinite.
    """
    place = choose_device(device) if isinstance(device, str) else device
    processes = dist.get_world_size() if dist.is_initialized() else 1
    with (
        torch.random.fork_rng([place] if place.type == "cuda" else []),
        _settled(_threads(net, settings.epochs * len(learn), processes)),
    ):
        return _Run(net, learn, validate, settings, seed, place, checkpoints).train(on_epoch)


def predict(
    net: Net, rows: Rows, device: str | torch.device = "auto", batch: int = BATCH
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (N, labels) and embeddings (N, width), float32, in the order of the rows."""
    place = choose_device(device) if isinstance(device, str) else device
    there = copy.deepcopy(net).to(place, memory_format=torch.channels_last).eval()
    probabilities, embeddings = [], []
    with torch.inference_mode():
        for start in range(0, len(rows), batch):
            images = torch.from_numpy(rows.read(slice(start, start + batch))).to(place)
            embedding = there.embed(there.normalise(_channels_last(images)))
            probabilities.append(functional.softmax(there.head(embedding), dim=1).cpu().numpy())
            embeddings.append(embedding.cpu().numpy())
    return np.concatenate(probabilities), np.concatenate(embeddings)


def measure_normalisation(rows: Rows) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) of the pixels of each channel, over 50,000 images spread
    evenly where there are more."""
    channels = rows.images.shape[1]
    total, squares, count = np.zeros(channels), np.zeros(channels), 0
    places = np.linspace(0, len(rows) - 1, min(len(rows), NORMALISATION_ROWS)).round().astype(int)
    for chosen in np.split(places, range(BATCH, len(places), BATCH)):
        images = rows.read(chosen)
        for c in range(channels):
            # Counting the 256 values is exact, and cheaper than floating-point sums.
            values = np.bincount(images[:, c].ravel(), minlength=256)
            total[c] += (values * np.arange(256)).sum()
            squares[c] += (values * np.arange(256) ** 2).sum()
        count += images[:, 0].size
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return torch.from_numpy(mean).float(), torch.from_numpy(std).float()


@dataclass
class _Progress:
    """What a checkpoint keeps beside tensors."""

    step: int = 0
    history: list[History] = field(default_factory=list)
    best_loss: float = math.inf
    best_epoch: int = 0
    loss: float = 0.0  # sum over the images of the epoch that is under way
    seconds: float = 0.0  # of the epoch that is under way


class _Run:
    """A training under way."""

    def __init__(
        self,
        net: Net,
        learn: Rows,
        validate: Rows,
        settings: Vision,
        seed: int,
        device: torch.device,
        checkpoints: Checkpoints | None,
    ) -> None:
        self.started = time.perf_counter()
        self.settings, self.seed, self.checkpoints = settings, seed, checkpoints
        self.device = device
        self.precision = choose_precision(settings.precision, device, net)
        self.rank, self.processes = 0, 1
        if dist.is_initialized():
            self.rank, self.processes = dist.get_rank(), dist.get_world_size()
        self.learn, self.validate = learn, validate
        # Norms need two images at least in each part of a batch.
        if len(learn) < 2 * self.processes or len(validate) < 1:
            raise TrainingError(
                f"{len(learn)} images to learn from and {len(validate)} to validate with are too "
                f"few for {self.processes} processes; give more images or fewer GPUs"
            )
        self.per_epoch = math.ceil(len(learn) / min(settings.batch, len(learn)))
        self.steps = self.per_epoch * settings.epochs
        self.rate = learning_rate(settings, net.family)
        net.set_normalisation(*measure_normalisation(learn))
        self.net = net.to(self.device, memory_format=torch.channels_last)
        self.optimizer = make_optimizer(self.net, settings, self.rate)
        self.average: AveragedModel | None = None
        if settings.ema is not None:
            self.average = AveragedModel(
                self.net, multi_avg_fn=get_ema_multi_avg_fn(settings.ema), use_buffers=True
            )
        self.best: dict[str, Tensor] = {}
        self.progress = _Progress()
        self.module: Callable[[Tensor], Tensor] = self.net
        self.frozen: bool | None = None
        self.feed = _Feed(learn, settings.resident, self.device)
        self.tested = _Feed(validate, settings.resident, self.device)
        self.blank = self.net.mean.clone()
        self.saved_at = time.perf_counter()

    def train(self, on_epoch: Callable[[History], None] | None) -> Result:
        self._resume()
        resumed_at, progress = self.progress.step, self.progress
        compile_seconds = 0.0
        first = progress.step // self.per_epoch
        for epoch in range(first, self.settings.epochs):
            if self._stopped():
                break
            module = self._module(epoch)
            began = time.perf_counter() - progress.seconds
            order = torch.randperm(
                len(self.learn), generator=generator(torch.device("cpu"), self.seed, _ORDER, epoch)
            )
            batches = list(order.to(self.device).tensor_split(self.per_epoch))
            mine = [self._mine(batch) for batch in batches]
            skipped = progress.step - epoch * self.per_epoch
            loss = torch.tensor(progress.loss, dtype=torch.float64, device=self.device)
            for i, (images, y) in enumerate(self.feed.batches(mine[skipped:]), start=skipped):
                step_began = time.perf_counter()
                loss += self._step(module, images, y, len(batches[i]))
                progress.step += 1
                if self.settings.compile and progress.step == resumed_at + 1:
                    loss.item()  # waits for the device
                    compile_seconds = time.perf_counter() - step_began
                late = time.perf_counter() - self.saved_at > CHECKPOINT_SECONDS
                if late and i + 1 < len(batches):  # after the last one the epoch has to end first
                    progress.loss = loss.item()
                    progress.seconds = time.perf_counter() - began
                    self._save()
            self._end_epoch(epoch, loss, began)
            if on_epoch is not None and self.rank == 0:
                on_epoch(progress.history[-1])
            self._save()
        return self._finish(resumed_at, compile_seconds)

    def _mine(self, batch: Tensor) -> Tensor:
        """This process's part of a batch."""
        return batch.tensor_split(self.processes)[self.rank]

    def _module(self, epoch: int) -> Callable[[Tensor], Tensor]:
        """What a step calls, with those layers free to learn that may."""
        frozen = self.settings.weights is not None and epoch < self.settings.frozen
        self.net.train()
        if frozen:
            self.net.body.eval()  # the norms' averages are part of the given weights
        if frozen is self.frozen:
            return self.module
        self.frozen = frozen
        self.net.freeze(frozen)
        module: nn.Module = self.net
        if self.processes > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            module = DistributedDataParallel(self.net, device_ids=ids)
        self.module = torch.compile(module) if self.settings.compile else module
        return self.module

    def _step(
        self, module: Callable[[Tensor], Tensor], images: Tensor, y: Tensor, count: int
    ) -> Tensor:
        """One step of the optimizer with this process's part of a batch of `count` images; returns
        the sum of the loss over the part."""
        settings, step = self.settings, self.progress.step
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * scheduled(settings.schedule, step / self.steps)
        images = self._augmented(images, step, count)
        torch.manual_seed(_mixed(self.seed, _DROPOUT, step, self.rank))
        parts = max(1, min(settings.accumulate, len(y) // 2))
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for i, (some, labels) in enumerate(
            zip(images.tensor_split(parts), y.tensor_split(parts), strict=True)
        ):
            with self._unsynchronised(module) if i < parts - 1 else nullcontext():
                with self._autocast():
                    logits = module(self.net.normalise(some))
                    loss = functional.cross_entropy(
                        logits.float(),
                        labels,
                        reduction="sum",
                        label_smoothing=settings.label_smoothing,
                    )
                # The mean over the whole batch, whoever has which part: processes average theirs.
                (loss * (self.processes / count)).backward()
            total += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.net)
        return total

    def _augmented(self, images: Tensor, step: int, count: int) -> Tensor:
        how = self.settings.augment
        size = (images.shape[2], images.shape[3])
        draws = augment.draw(how, count, size, generator(self.device, self.seed, _AUGMENT, step))
        if self.processes > 1:
            draws = {name: self._mine(values) for name, values in draws.items()}
        return _channels_last(augment.apply(images, draws, how, self.blank))

    def _unsynchronised(self, module: object) -> AbstractContextManager[None]:
        """Gradients stay in this process until the last part of a batch."""
        inner = getattr(module, "_orig_mod", module)
        return inner.no_sync() if isinstance(inner, DistributedDataParallel) else nullcontext()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.precision is torch.bfloat16
        )

    def _end_epoch(self, epoch: int, loss: Tensor, began: float) -> None:
        """Validate, and note how the epoch went."""
        progress = self.progress
        self._sum(loss)
        train_loss = loss.item() / len(self.learn)
        if not math.isfinite(train_loss):
            raise TrainingError(
                f"the loss is not a number in epoch {epoch + 1}; "
                f"lower train.vision.learning_rate (it is {self.rate:g})"
            )
        answer = self._evaluate(self._current(), self.tested, autocast=True)
        progress.history.append(
            {
                "epoch": epoch + 1,
                "train_loss": train_loss,
                "validation_loss": answer["loss"],
                "validation_accuracy": answer["accuracy"],
                "lr": float(self.optimizer.param_groups[0]["lr"]),
                "seconds": round(time.perf_counter() - began, 3),
            }
        )
        progress.loss = progress.seconds = 0.0
        if answer["loss"] < progress.best_loss or progress.best_epoch == 0:
            progress.best_loss, progress.best_epoch = answer["loss"], epoch + 1
            if self.settings.patience is not None:
                self.best = {k: v.clone() for k, v in self._current().state_dict().items()}

    def _current(self) -> Net:
        """The network that would be taken now."""
        net: Net = self.net if self.average is None else self.average.module
        return net

    def _stopped(self) -> bool:
        """Whether validation has not become better for too long. All processes agree, for they all
        know the same sums."""
        progress = self.progress
        return (
            self.settings.patience is not None
            and len(progress.history) - progress.best_epoch >= self.settings.patience
        )

    def _evaluate(self, net: Net, feed: _Feed, autocast: bool) -> dict[str, float]:
        """Mean loss and accuracy; each process takes its part of the images."""
        count = len(feed.rows)
        if self.processes > 1:
            for buffer in net.buffers():
                dist.broadcast(buffer, 0)
        net.eval()
        places = list(self._mine(torch.arange(count)).split(BATCH))
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for images, y in feed.batches(places):
                with self._autocast() if autocast else nullcontext():
                    logits = net(net.normalise(_channels_last(images))).float()
                sums[0] += functional.cross_entropy(logits, y, reduction="sum")
                sums[1] += (logits.argmax(dim=1) == y).sum()
        self._sum(sums)
        loss, right = (sums / count).tolist()
        return {"loss": loss, "accuracy": right}

    def _sum(self, values: Tensor) -> None:
        """Add up what all processes have, in place."""
        if self.processes > 1:
            dist.all_reduce(values)

    def _finish(self, resumed_at: int, compile_seconds: float) -> Result:
        """Take the weights that were asked for, and try them once more in full precision."""
        progress = self.progress
        final = self.best or self._current().state_dict()
        self.net.load_state_dict(final)
        self.net.freeze(False)
        validation = self._evaluate(self.net, self.tested, autocast=False)
        some = min(GAP_ROWS, len(self.learn))
        seen = generator(torch.device("cpu"), self.seed, _ORDER)
        chosen = torch.randperm(len(self.learn), generator=seen)[:some].sort().values
        train = self._evaluate(self.net, self.feed.of(chosen), autocast=False)
        self.net.to("cpu", memory_format=torch.contiguous_format)
        self.net.eval()
        self.optimizer.zero_grad(set_to_none=True)
        if self.checkpoints is not None and self.rank == 0:
            self.checkpoints.clear()
        return Result(
            history=progress.history,
            validation=validation,
            train=train,
            best_epoch=progress.best_epoch if self.best else len(progress.history),
            steps=progress.step,
            seconds=round(time.perf_counter() - self.started, 3),
            compile_seconds=round(compile_seconds, 3),
            device=str(self.device),
            precision=str(self.precision).removeprefix("torch."),
            resident=self.feed.resident,
            processes=self.processes,
            resumed_at=resumed_at,
        )

    def _save(self) -> None:
        """Write a checkpoint; only the first process does."""
        self.saved_at = time.perf_counter()
        if self.checkpoints is None or self.rank > 0:
            return
        tensors = {f"net.{k}": v for k, v in self.net.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        if self.average is not None:
            tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for place, state in self.optimizer.state_dict()["state"].items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{place}.{name}"] = value
        self.checkpoints.save(self.progress.step, tensors, asdict(self.progress))

    def _resume(self) -> None:
        """Go on from the newest checkpoint, if there is one. All processes read the same: none
        writes before all have read."""
        found = self.checkpoints.load() if self.checkpoints is not None else None
        if self.processes > 1:
            dist.barrier()
        if found is None:
            return

        def part(prefix: str) -> dict[str, Tensor]:
            return {
                name.removeprefix(prefix): value
                for name, value in found.tensors.items()
                if name.startswith(prefix)
            }

        self.progress = _Progress(**found.facts)
        self.net.load_state_dict(part("net."))
        if self.average is not None:
            self.average.load_state_dict(part("average."))
        self.best = {k: v.to(self.device) for k, v in part("best.").items()}
        state: dict[int, dict[str, Tensor]] = {}
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for key, value in part("optimizer.").items():
            place, _, name = key.partition(".")
            parameter = parameters[int(place)]
            # In the parameter's order of memory, as it was.
            like = parameter.detach() if value.shape == parameter.shape else value
            state.setdefault(int(place), {})[name] = torch.empty_like(like).copy_(value)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        log.info("training goes on after step %d of %d", found.step, self.steps)


class _Feed:
    """Images by their place among the rows, as batches on the device.

    Args:
        rows: which images.
        resident: whether to keep all in the device's memory; None: if they fit into half of it.
        device: where the batches go.
    """

    def __init__(self, rows: Rows, resident: bool | None, device: torch.device) -> None:
        self.rows, self.device = rows, device
        size = len(rows) * int(np.prod(rows.images.shape[1:]))
        self.resident = resident if resident is not None else size <= _memory(device) / 2
        self.y = rows.labels().to(device)
        self.images: Tensor | None = None
        if self.resident:
            self.images = torch.from_numpy(rows.read(slice(None))).to(device)

    def of(self, chosen: Tensor) -> _Feed:
        """Some of these images, by their places (n,)."""
        places = chosen.numpy()
        some = copy.copy(self)
        before = self.rows.rows
        some.rows = Rows(
            self.rows.images, self.rows.y, places if before is None else before[places]
        )
        some.y = self.y[chosen.to(self.device)]
        if self.images is not None:
            some.images = self.images[chosen.to(self.device)]
        return some

    def batches(self, places: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (n, C, H, W) uint8 and labels (n,) of each of the lists of places."""
        if self.images is not None:
            for chosen in places:
                here = chosen.to(self.device)
                yield self.images[here], self.y[here]
            return
        loader = DataLoader(
            self.rows,
            batch_sampler=[chosen.tolist() for chosen in places],
            collate_fn=_as_they_are,
            num_workers=READERS if len(places) > READERS else 0,
            # They inherit the open file; to pickle a memory-mapped array would read all of it.
            multiprocessing_context="fork" if len(places) > READERS else None,
            pin_memory=self.device.type == "cuda",
        )
        for chosen, images in zip(places, loader, strict=True):
            yield images.to(self.device, non_blocking=True), self.y[chosen.to(self.device)]


def _as_they_are(images: Tensor) -> Tensor:
    return images


def _memory(device: torch.device) -> float:
    """Bytes that a process may use on a device."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        size = min(size, int(text))
    return float(size)


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def _threads(net: Net, images: int, processes: int) -> int:
    """How many threads a training is worth that goes through so many images. Threads wait for each
    other at every layer, and where other processes want the cores too, as on a laptop that serves
    meanwhile, they wait ten times as long as they work: a short training had better be alone."""
    places = net.image.size[0] * net.image.size[1]
    used = sum(p.numel() * (places if p.dim() == 4 else 1) for p in net.parameters())
    worth = 1 + int(used * images / processes / THREAD_WORK)
    return min(worth, int(torch.get_num_threads()))


@contextmanager
def _settled(threads: int) -> Iterator[None]:
    """So many threads, and only algorithms that give the same twice."""
    # cuBLAS reads it when it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # It would also write to all memory that is about to be overwritten: a quarter of the time.
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]
