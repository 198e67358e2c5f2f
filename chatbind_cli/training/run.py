"""A training run from its settings to its artefact: what happens inside the workers.

Encodes the media, builds the model, trains from the newest whole checkpoint on, and writes the
result. Every step that leaves something on disk can be killed and done again.
"""

from __future__ import annotations

import gc
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import cache
from typing import Any

import transformers
from accelerate import PartialState
from transformers import TrainingArguments, set_seed

from chatbind_cli import worker
from chatbind_cli.artifacts import artifact_record, emit_artifact
from chatbind_cli.console import note
from chatbind_cli.data.lookup import part_name
from chatbind_cli.files import sha256_file
from chatbind_cli.folders import RECORD
from chatbind_cli.jsonl import Record
from chatbind_cli.model.assemble import build_chatbind
from chatbind_cli.model.loading import ChatBind
from chatbind_cli.stopping import listening
from chatbind_cli.training.adapters import put_adapters, quantization, write_adapted
from chatbind_cli.training.arguments import (
    attention,
    saved_dtype,
    training_arguments,
    weights_dtype,
)
from chatbind_cli.training.embeddings import embedded, stores_below
from chatbind_cli.training.encoders import stored_embeddings
from chatbind_cli.training.inputs import Inputs
from chatbind_cli.training.launched import with_launcher
from chatbind_cli.training.log import plot_loss
from chatbind_cli.training.rundir import (
    LOG_FILE,
    PICTURES,
    STAGING,
    RunFolder,
    read_log,
)
from chatbind_cli.training.saved import saving
from chatbind_cli.training.settings import TrainingSettings, one_or_several, place_of
from chatbind_cli.training.sharding import Sharding, is_sharded, make_whole, shard, sharding_of
from chatbind_cli.training.stages import (
    CONFIG_NAME,
    MADE,
    fold_rows,
    select_trainable,
    weights_sha256,
    write_model,
    write_stage_1,
)
from chatbind_cli.training.trainer import ChatBindTrainer


def train(settings: TrainingSettings, inputs: Inputs) -> None:
    """Runs a stage, or what is left of it, and tells what it made."""
    _libraries_stay()
    # bars that know nothing of --quiet and of pipes
    transformers.utils.logging.disable_progress_bar()
    settings = with_launcher(settings)
    how = sharding_of(settings, worker.world_size())
    arguments = training_arguments(settings)
    kernels = attention(settings, arguments)
    quantization(settings)  # which may not be possible
    folder = RunFolder(settings.output, settings.stage)
    with ExitStack() as held:
        if worker.rank() == 0:
            identity = settings.identity(worker.world_size())
            identity["encoder"] = one_or_several([place_of(one) for one in inputs.encoders])
            identity["data_sha256"] = [sha256_file(file.path) for file in settings.data]
            if settings.projector is not None:
                identity["projector_sha256"] = sha256_file(settings.projector)
            also = _written_by_others(settings, len(inputs.encoders))
            held.enter_context(folder.claimed(identity, also, overwrite=settings.overwrite))
        PartialState().wait_for_everyone()
        artifact = folder.finished_artifact()
        if artifact is None:
            artifact = _train(settings, inputs, folder, arguments, kernels, how)
        else:
            note(
                f"{folder.path}: this run is finished, nothing was trained; to train anew say "
                "--overwrite or another --output"
            )
        emit_artifact(artifact)


@cache
def _libraries_stay() -> None:
    """What is in memory by now is not looked through again and again, a quarter second each."""
    gc.freeze()


def _written_by_others(settings: TrainingSettings, encoders: int) -> Iterator[str]:
    """What lands in the run's folder by other hands than `RunFolder`'s."""
    for place in stores_below(encoders):
        for rank in range(worker.world_size()):
            yield f"{place}/{part_name(rank)}/{RECORD}"
    if {"tensorboard", "all"} & set(settings.report_to):
        yield "runs/"  # the Trainer's place for it
    if settings.plot is not None:
        with suppress(ValueError):  # it goes elsewhere
            plot = settings.plot.resolve().relative_to(settings.output.resolve())
            yield plot.as_posix()


def _train(
    settings: TrainingSettings,
    inputs: Inputs,
    folder: RunFolder,
    arguments: TrainingArguments,
    kernels: str,
    how: Sharding | None,
) -> Record:
    if settings.stores:
        embeddings, encoder, options = stored_embeddings(settings, inputs.media)
    else:
        inputs, embeddings, encoder, options = embedded(settings, inputs, folder)
    names = [one.name for one in encoder.each]
    inputs = inputs.seen_with(names, [part.known for part in embeddings.parts])
    set_seed(settings.seed)
    bundle = build_chatbind(
        settings.model,
        encoder=encoder,
        projector=settings.projector,
        stage=settings.stage,
        media_options=options.deciding(),
        command=shlex.join(["chatbind", *settings.command]),
        dtype=weights_dtype(settings),
        # of a model that is shared out one process reads the weights
        device_map="meta" if how is not None and worker.rank() != 0 else None,
        attn_implementation=kernels,
        quantization=quantization(settings),
        merge=settings.lora_r is None,
        projector_type=settings.projector_type,
        tokens_per_embedding=settings.tokens_per_embedding,
        use_start_end=settings.use_start_end,
        prompt_style=settings.prompt_style,
    )
    if worker.rank() == 0:
        base = (bundle.config.provenance or {})["language_model"]
        found = {"encoder_sha256": encoder.sha256, "language_model": base.get("fingerprint")}
        if len(settings.stores) > 1:  # they say what is seen with which, and may have grown
            found["samples"] = len(inputs.conversations)
        folder.confirm(found)
    if settings.lora_r is not None:
        put_adapters(bundle.model, settings, mixed=arguments.bf16 or arguments.fp16)
    freeze = settings.freeze_backbone
    note(select_trainable(bundle.model, settings.stage, freeze_backbone=freeze))
    if how is not None:
        if settings.loss_at_labels and worker.rank() == 0:
            bundle.model.find_loss_way()  # while one process has all weights
        shard(bundle.model, how, arguments.device, bf16=arguments.bf16)
    with listening():  # what comes after the last step waits for nothing, and signals for it
        trainer = ChatBindTrainer(settings, inputs, embeddings, bundle, folder, arguments)
        trainer.fit()
        _write_result(settings, bundle, trainer, folder)
        record = {"artifact": MADE[settings.stage]}
        if worker.rank() == 0:
            record = _finish(settings, inputs, folder)
        PartialState().wait_for_everyone()
    return record


def _write_result(
    settings: TrainingSettings, bundle: ChatBind, trainer: ChatBindTrainer, folder: RunFolder
) -> None:
    """Writes the stage's result into the run's folder, a whole file at a time."""
    staged = folder.path / STAGING / "result"
    if settings.lora_r is not None and is_sharded(bundle.model):
        make_whole(bundle.model)
    if settings.stage == "finetune" and settings.lora_r is None:
        if worker.rank() == 0:
            fold_rows(bundle.model)
        state = trainer.gathered_state()
    if worker.rank() != 0:
        return
    with saving(folder.path / STAGING):
        staged.mkdir(parents=True)
        if settings.stage == "pretrain":
            write_stage_1(bundle, staged)
        elif settings.lora_r is not None:
            write_adapted(bundle, staged, settings)
        else:
            dtype = saved_dtype(settings, next(bundle.model.parameters()).dtype, trainer.args)
            rounded = write_model(bundle, staged, state, dtype)
            if rounded:
                note(
                    f"saved in {str(dtype).removeprefix('torch.')}: rounding has changed the "
                    f"weights by {rounded:.2g} of their size; --save-dtype float32 keeps them"
                )
    folder.publish_files(staged, last=CONFIG_NAME)
    folder.clear_staging()


def _finish(settings: TrainingSettings, inputs: Inputs, folder: RunFolder) -> Record:
    """Draws the loss, and notes in the folder that the run is done."""
    log = read_log(folder.path / LOG_FILE)
    losses = [record["loss"] for record in log if "loss" in record]
    extra: dict[str, Any] = {"steps": log[-1]["step"] if log else 0}
    if losses:
        extra["loss"] = losses[-1]
        pictures = [folder.path / name for name in PICTURES]
        for picture in filter(None, (*pictures, settings.plot)):
            plot_loss(log, picture, title=f"{settings.stage}: {folder.path.name}")
    if inputs.rejected:
        extra["left_out"] = len(inputs.rejected)
    artifact = artifact_record(
        MADE[settings.stage],
        folder.path,
        made_by=settings.stage,
        sha256=weights_sha256(folder.path),
        **extra,
    )
    folder.finish(artifact, settings.command)
    return artifact
