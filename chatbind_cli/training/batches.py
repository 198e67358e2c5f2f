"""Which samples make a step, and in which forward passes they are read.

The samples of a step follow from the seed, the epoch, the global batch size and, where steps are
grouped by length, about how long samples are: not from the number of processes, nor from how many
samples a pass holds. So a run can go on with other numbers of both, and switches that only move
samples between the passes of a step change sums by rounding.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, Final, NamedTuple, cast

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import TrainerCallback, TrainerState, TrainingArguments

from chatbind_cli import worker
from chatbind_cli.console import note
from chatbind_cli.model.chatbind import ChatBindForConditionalGeneration
from chatbind_cli.model.config import encoder_of
from chatbind_cli.model.label_loss import IGNORE_INDEX
from chatbind_cli.model.packed_attention import read_by_sequence
from chatbind_cli.stopping import leave_to_parent
from chatbind_cli.training.arguments import on_gpu
from chatbind_cli.training.noise import EmbeddingNoise
from chatbind_cli.training.packing import Packing, packs_exactly
from chatbind_cli.training.positions import WithPositions
from chatbind_cli.training.samples import Collator, TrainingSamples
from chatbind_cli.training.settings import TrainingSettings
from chatbind_cli.training.throughput import ModelFlops, Work

WINDOW: Final = 32
"""How many steps are sorted by length together, where they are grouped."""

# of layers that take no lengths
_NOT_HANDED_ON: Final = (RuntimeError, TypeError, ValueError)


class Step(NamedTuple):
    """What an optimizer step is made of.

    Attributes:
        epoch: from 0.
        samples: their numbers, at most the global batch size.
    """

    epoch: int
    samples: list[int]


class StepSampler(Sampler[Step]):
    """The steps of an epoch; every sample is in one of them, and the last may be short.

    Args:
        count: of samples.
        per_step: the global batch size.
        seed: of the run.
        sizes: about how long samples are, int64 [count], to group steps by; None: they are not.

    Attributes:
        epoch: which one the next iteration is; set by whoever iterates.
    """

    def __init__(
        self, count: int, per_step: int, *, seed: int, sizes: np.ndarray | None = None
    ) -> None:
        self._count, self._per_step, self._seed, self._sizes = count, per_step, seed, sizes
        self.epoch = 0

    def __len__(self) -> int:
        return -(-self._count // self._per_step)

    def __iter__(self) -> Iterator[Step]:
        generator = np.random.default_rng([self._seed, self.epoch])
        order = generator.permutation(self._count)
        if self._sizes is not None:
            self._group(order, generator)
        for start in range(0, self._count, self._per_step):
            yield Step(self.epoch, order[start : start + self._per_step].tolist())

    def _group(self, order: np.ndarray, generator: np.random.Generator) -> None:
        """Sorts windows of whole steps by length, in place, and shuffles the steps of each."""
        assert self._sizes is not None
        whole = self._count - self._count % self._per_step
        for start in range(0, whole, WINDOW * self._per_step):
            window = order[start : min(start + WINDOW * self._per_step, whole)]
            by_length = window[np.argsort(self._sizes[window], kind="stable")]
            steps = by_length.reshape(-1, self._per_step)
            window[:] = generator.permutation(steps).ravel()


@dataclass(frozen=True)
class Share:
    """The part of every step that one process reads.

    Attributes:
        rank: of the process.
        processes: how many there are.
        samples: a forward pass of padded samples holds at most so many.
    """

    rank: int = 0
    processes: int = 1
    samples: int = 1

    def passes(self, sizes: np.ndarray, *, by_length: bool) -> list[list[int]]:
        """This process's samples, pass by pass, where samples are not packed.

        All processes have the same number of passes; where samples do not suffice, some are empty.

        Args:
            sizes: about how long the step's samples are.
            by_length: whether a pass holds samples of about the same length, and as long ones as
                those that other processes read meanwhile.
        """
        order = np.argsort(-sizes, kind="stable") if by_length else np.arange(len(sizes))
        count = -(-len(order) // (self.samples * self.processes))
        return [
            together[self.rank :: self.processes].tolist()
            for together in np.array_split(order, count)
        ]


@dataclass(eq=False)
class StepSamples(Dataset[Any]):
    """Steps, each with the forward passes of one process ready to be read.

    Args:
        samples: all samples.
        collate: makes batches of samples.
        share: this process's.
        sizes: about how long samples are, int64.
        by_length: see `Share.passes`.
        packing: how samples are packed; None: they are not.
        noise: added to the embeddings; None for none.
    """

    samples: TrainingSamples
    collate: Collator | WithPositions
    share: Share
    sizes: np.ndarray
    by_length: bool = False
    packing: Packing | None = None
    noise: EmbeddingNoise | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, step: Step) -> list[dict[str, Any]]:
        """A list of one: the batches of this process under `passes`."""
        make = self._apart if self.packing is None else self._in_rows
        return [{"passes": make(step)}]

    def _apart(self, step: Step) -> list[dict[str, Any]]:
        made = []
        for one in self.share.passes(self.sizes[step.samples], by_length=self.by_length):
            samples = self.samples.__getitems__([step.samples[n] for n in one])
            made.append(self.collate(self._noisy(samples, step)) if one else self._filler(step))
        return made

    def _in_rows(self, step: Step) -> list[dict[str, Any]]:
        """Every process counts all tokens of the step: only so do all find the same rows."""
        assert self.packing is not None
        texts = [self.samples.tokens(index) for index in step.samples]
        lengths = np.array([len(text.input_ids) for text in texts])
        made = []
        for shares in self.packing.passes(lengths, self.share.processes):
            rows = shares[self.share.rank]
            numbers = list(chain.from_iterable(rows))
            plain = self.samples.with_media(
                [step.samples[n] for n in numbers], [texts[n] for n in numbers]
            )
            samples = iter(self._noisy(plain, step))
            packed = [list(islice(samples, len(row))) for row in rows]
            made.append(self.collate.packed(packed) if rows else self._filler(step))
        return made

    def _noisy(self, samples: list[dict[str, Any]], step: Step) -> list[dict[str, Any]]:
        if self.noise is not None:
            for sample in (s for s in samples if s["media_embeddings"] is not None):
                rows, index = sample["media_embeddings"], sample["number"]
                sample["media_embeddings"] = self.noise.add(rows, index, step.epoch)
        return samples

    def _filler(self, step: Step) -> dict[str, Any]:
        """A pass that nothing is learned from, for a process that has none left.

        Processes wait for each other in every pass.
        """
        shortest = step.samples[int(np.argmin(self.sizes[step.samples]))]
        sample = self.samples[shortest]
        sample["labels"] = [IGNORE_INDEX] * len(sample["labels"])
        return {**self.collate([sample]), "work": Work(0, 0, 0, 0)}


def step_loader(
    steps: StepSamples, order: Iterable[Step], workers: int, seed: int
) -> DataLoader[Any]:
    """Makes steps, ahead of their use where there are workers, which leave signals to this process.

    Each has its batches under `passes`, with arrays for `tensors` to make tensors of.
    """
    return DataLoader(
        steps,
        batch_sampler=cast(Any, order),
        collate_fn=_in_arrays,
        num_workers=workers,
        worker_init_fn=_begin_worker,
        # the workers' seed: the process's own random state is left alone
        generator=torch.Generator().manual_seed(seed),
    )


def _in_arrays(made: list[dict[str, Any]]) -> dict[str, Any]:
    """A step without tensors: for each a worker would open a connection, a millisecond's work."""
    [step] = made
    return {
        "passes": [
            {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            for batch in step["passes"]
        ]
    }


def tensors(passes: list[dict[str, Any]], *, pin: bool) -> list[dict[str, Any]]:
    """The batches of a loader's step, for a model; `pin`: from where a GPU can fetch them alone."""

    def tensor(value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        made = torch.from_numpy(value)
        return made.pin_memory() if pin else made

    return [{name: tensor(value) for name, value in batch.items()} for batch in passes]


class Steps(TrainerCallback):
    """The steps of a run, which follow the Trainer from epoch to epoch.

    Args:
        settings: of the run.
        samples: to train on.
        collate: makes batches of samples.
        model: a ChatBind model.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        samples: TrainingSamples,
        collate: Collator | WithPositions,
        model: ChatBindForConditionalGeneration,
    ) -> None:
        self._model, self._compiled = model, settings.compile
        sizes = np.array(samples.conversations.sizes())
        world = worker.world_size()
        noise = None
        if settings.embedding_noise:
            widths = encoder_of(model.config).widths
            noise = EmbeddingNoise(settings.embedding_noise, settings.seed, widths)
        self._order = StepSampler(
            len(sizes),
            settings.samples_per_step(world),
            seed=settings.seed,
            sizes=sizes if settings.group_by_length else None,
        )
        self._samples = StepSamples(
            samples,
            collate,
            Share(worker.rank(), world, settings.per_device_train_batch_size),
            sizes,
            by_length=settings.group_by_length,
            packing=_packing(settings, model) if settings.packing else None,
            noise=noise,
        )

    def loader(self, arguments: TrainingArguments) -> DataLoader[Any]:
        """Makes steps, see `step_loader`."""
        workers, seed = arguments.dataloader_num_workers, arguments.seed
        return step_loader(self._samples, self._order, workers, seed)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, **others: Any
    ) -> None:
        """Decides, with the model on its device, how rows are read, or that nothing is packed."""
        packing, language_model = self._samples.packing, self._model.language_model
        if packing is None:
            return
        # a GPU may compute float32, too, with the precision of half of it
        precise = args.device.type == "cpu" and not (args.bf16 or args.fp16)
        precise &= self._model.dtype == torch.float32

        def exact(allowed: tuple[type[Exception], ...] = ()) -> bool:
            found = [False]
            with suppress(*allowed):
                found = [packs_exactly(self._model, args.device, precise=precise)]
            return bool(broadcast_object_list(found)[0])

        # a GPU would wait for the launches of short sequences, a compiler for every new length
        by_sequence = args.device.type == "cpu" and not self._compiled
        by_sequence &= self._model.accepts_loss_kwargs  # and lengths
        if by_sequence and read_by_sequence(language_model, on=True):
            if exact(_NOT_HANDED_ON):
                self._samples.packing = replace(packing, one_row=True)
                return
            read_by_sequence(language_model, on=False)
        if not exact():
            note("--packing has no effect: this language model mixes up samples that share a row")
            self._samples.packing, self._samples.by_length = None, True

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, **others: Any
    ) -> None:
        """Counts epochs by steps, as the Trainer does that goes on inside one."""
        self._order.epoch = state.global_step // len(self._order)


def _packing(settings: TrainingSettings, model: ChatBindForConditionalGeneration) -> Packing:
    """Rows as the run's attention kernels read them.

    On a GPU passes are filled to the brim; on CPUs larger ones only cost memory.
    """
    flops = ModelFlops.of(model)
    samples = settings.per_device_train_batch_size
    return Packing(
        tokens=samples * settings.model_max_length,
        row=settings.model_max_length,
        one_row="flash" in str(model.language_model.config._attn_implementation),
        samples=None if on_gpu(settings) else samples,
        attention=flops.body / max(2 * flops.attention, 1),
    )


def _begin_worker(number: int) -> None:
    leave_to_parent(number)
    # one thread a worker: there are others
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
