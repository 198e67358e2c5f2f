"""What would waste a night is found before anything heavy begins, by the process that was started.

Media that cannot be read, samples that teach nothing, a disk or a GPU that is too small.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from chatbind_cli.checkpoints.checkpoint import open_checkpoint
from chatbind_cli.console import Progress, note
from chatbind_cli.data.conversations import Conversations
from chatbind_cli.data.decoders import Reading, decode
from chatbind_cli.data.media_items import MediaItem
from chatbind_cli.data.tokens import PromptEncoder
from chatbind_cli.encoders.encoder import Encoder
from chatbind_cli.errors import ChatBindError, RecordError
from chatbind_cli.files import free_bytes
from chatbind_cli.hardware import memory
from chatbind_cli.media.medium import Medium
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.model.assemble import read_without_weights
from chatbind_cli.model.base import adapted_base, find_base
from chatbind_cli.model.label_loss import IGNORE_INDEX
from chatbind_cli.training.embeddings import known_media
from chatbind_cli.training.encoders import Before, open_named, refuse_twice
from chatbind_cli.training.inputs import Inputs, refuse_rejected
from chatbind_cli.training.needs import GIB, Shape, advice, disk_needed, memory_needed
from chatbind_cli.training.settings import TrainingSettings

_MEDIA, _LONGEST = 32, 1000  # that are looked at unless all are
_THREADS = 4
_ROOM = 0.95  # of a GPU's memory: the rest is the driver's, and holes


def preflight(settings: TrainingSettings, inputs: Inputs, *, gpus: int) -> Inputs:
    """Looks at what can be known beforehand; tells what a run will need.

    Args:
        settings: of the run.
        inputs: what `check_inputs` found.
        gpus: how many work on it on this machine; 0: CPUs.

    Returns:
        The inputs, without conversations whose media were found unreadable.

    Raises:
        RecordError: media cannot be read (unless such are to be skipped), or no sample has a
            token to learn from.
        ChatBindError: the disk has no room for the result.
    """
    everything = settings.check == "all"
    if inputs.encoders and not settings.stores:
        encoders = [open_named(one, settings) for one in inputs.encoders]
        refuse_twice(encoders)
        inputs = known_media(settings, inputs, encoders)
        apart = 1 if everything else max(1, -(-len(inputs.media) // _MEDIA))
        inputs = inputs.leave_out(_unreadable(settings, encoders, inputs.media[::apart]))
        if settings.on_error == "fail":
            refuse_rejected(inputs.rejected)
    tokens = _look_at_samples(settings, inputs.conversations, everything=everything)
    shape = _shape(settings.model)
    half = settings.bf16 is True or settings.fp16 is True or (settings.bf16 is None and gpus > 0)
    _look_at_disk(settings, shape, half=half)
    _look_at_memory(settings, shape, tokens, half=half, gpus=gpus)
    return inputs


def _unreadable(
    settings: TrainingSettings, encoders: Sequence[Encoder], media: Sequence[Medium]
) -> dict[Medium, str]:
    """Those of the media that an encoder cannot decode which knows such, each with the reason."""
    options = MediaOptions.known(Before.of(settings).media_options)
    ways = [Reading(encoder.modalities, encoder.read, options) for encoder in encoders]

    def look(medium: Medium) -> str | None:
        item = MediaItem(medium, settings.media_root, medium.name)
        for reading in ways:
            if medium.modality in reading.known:
                found = decode(medium, item.open, reading)
                if isinstance(found, ChatBindError):
                    return str(found)
        return None

    with ThreadPoolExecutor(_THREADS) as pool, Progress(len(media), "reading media") as progress:
        problems = {}
        for medium, problem in zip(media, pool.map(look, media), strict=True):
            progress.advance()
            if problem is not None:
                problems[medium] = problem
    return problems


def _look_at_samples(
    settings: TrainingSettings, conversations: Conversations, *, everything: bool
) -> int:
    """Counts the samples that are cut before their answer; returns a long sample's tokens."""
    tokenizer, config = read_without_weights(
        settings.model,
        projector=settings.projector,
        prompt_style=settings.prompt_style,
        use_start_end=settings.use_start_end,
        tokens_per_embedding=settings.tokens_per_embedding,
    )
    encoder = PromptEncoder(tokenizer, config)
    longest = conversations.sizes().argsort(kind="stable").tolist()
    looked_at = longest if everything else longest[-_LONGEST:]
    lengths, untrained = [], 0
    for index in looked_at:
        sample = encoder.conversation(conversations[index], settings.model_max_length)
        untrained += all(label == IGNORE_INDEX for label in sample.labels)
        lengths.append(len(sample.input_ids))
    longest_of = f"{len(looked_at):,} {'' if everything else 'longest '}samples"
    if untrained == len(conversations):
        raise RecordError(
            f"all samples are cut before their first answer at {settings.model_max_length} tokens",
            hint="raise --model-max-length",
        )
    if untrained:
        note(
            f"{untrained:,} of the {longest_of} are cut before their first answer, and teach "
            "nothing: raise --model-max-length, or see `chatbind inspect`"
        )
    return max(lengths)


def _shape(model: Path) -> Shape:
    if adapted_base(model) is not None:
        model = find_base(model)
    weights = open_checkpoint(model)
    return Shape.of(weights.config, {name: info.shape for name, info in weights.tensors.items()})


def _look_at_disk(settings: TrainingSettings, shape: Shape, *, half: bool) -> None:
    free = free_bytes(settings.output)
    result, checkpoint = disk_needed(settings, shape, half=half)
    kept = 0 if settings.save_strategy == "no" else (settings.save_total_limit or 1) + 1
    if result + min(kept, 1) * checkpoint > free:
        raise ChatBindError(
            f"has {free / GIB:.1f} GiB free, and the result takes {result / GIB:.1f} GiB, a "
            f"checkpoint {checkpoint / GIB:.1f} GiB",
            where=str(settings.output),
            hint="make room, choose another --output, or say --save-strategy no",
        )
    if result + kept * checkpoint > free:
        note(
            f"{settings.output}: {free / GIB:.1f} GiB are free; {kept} checkpoints of "
            f"{checkpoint / GIB:.1f} GiB and the result of {result / GIB:.1f} GiB will not fit: "
            "take a smaller --save-total-limit"
        )


def _look_at_memory(
    settings: TrainingSettings, shape: Shape, longest: int, *, half: bool, gpus: int
) -> None:
    # on GPUs packed passes are filled
    width = settings.model_max_length if settings.packing and gpus else longest
    tokens = settings.per_device_train_batch_size * width
    shards = gpus if settings.fsdp and settings.backbone_trains and gpus else 1
    needs = memory_needed(settings, shape, tokens=tokens, half=half, shards=shards)
    parts = (needs.total, needs.weights, needs.training, needs.activations)
    told = (
        "a process needs about {:.1f} GiB: {:.1f} for weights, {:.1f} for gradients and optimizer, "
        "{:.1f} for activations of {:,} tokens"
    ).format(*(part / GIB for part in parts), tokens)
    free = memory()
    room = _gpu_memory() if gpus else free and free[1]
    if room is None:
        note(told)
    elif needs.total > _ROOM * room:
        told += f"; there are {room / GIB:.1f}"
        saving = replace(settings, gradient_checkpointing=True)
        saved = memory_needed(saving, shape, tokens=tokens, half=half, shards=shards).total
        if gpus and settings.gradient_checkpointing is None and saved <= _ROOM * room:
            note(f"{told}, and so activations will be computed twice")
            return
        how = advice(settings, shape, tokens=tokens, half=half, room=_ROOM * room, gpus=gpus)
        note(told + (f": try {how}" if how else ""))
    elif gpus:
        note(f"{told}, of {room / GIB:.1f}")


def _gpu_memory() -> float | None:
    """Bytes of the smallest GPU; asked of the driver's tool, since CUDA would take some itself."""
    asked = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout
        return min(float(line) for line in said.split()) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
