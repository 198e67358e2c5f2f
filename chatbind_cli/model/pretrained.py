"""The door to transformers' `from_pretrained`: a model folder is hostile until it is read.

transformers opens what it finds in a folder: code that a config names, adapters and the models that
those name, weights under other names, kernels of the hub, code for generation. So it never sees the
folder but what `staging` makes of it.

What the weights hold bounds what a config may ask for: a model is built without memory first, and
what is larger than its files is refused.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from chatbind_cli.checkpoints.checkpoint import Checkpoint, open_checkpoint
from chatbind_cli.checkpoints.json_file import read_json
from chatbind_cli.console import note
from chatbind_cli.errors import ChatBindError, CheckpointError, reason
from chatbind_cli.model.config import saved_end_ids
from chatbind_cli.model.quantization import keep_whole
from chatbind_cli.model.staging import (
    MOST_CONFIG,
    check_config,
    check_kind,
    cleaned,
    staged_tokenizer,
    staged_weights,
)

_FREE_ELEMENTS = 64 << 20  # masks and the like, which are computed and lie in no file


def open_config(path: str | Path) -> PreTrainedConfig:
    """The configuration of a model folder.

    Raises:
        CheckpointError: there is none, it needs code, or it asks for what no model has.
    """
    folder = _model_folder(path)
    fields = read_json(folder / "config.json", most_bytes=MOST_CONFIG)
    config = make_config(fields, folder)
    config.name_or_path = str(path)
    return config


def make_config(fields: Mapping[str, Any], folder: Path) -> PreTrainedConfig:
    """The configuration that settings mean, a folder's own or those of another layout.

    Raises:
        CheckpointError: as for `open_config`.
    """
    with one_line("its config.json cannot be used", folder), quiet_transformers():
        check_kind(fields, folder / "config.json")
        check_config(fields, folder / "config.json")
        return CONFIG_MAPPING[fields["model_type"]].from_dict(cleaned(fields))


def open_tokenizer(path: str | Path, kind: type[Any] = AutoTokenizer) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, read by the class `kind`.

    Raises:
        CheckpointError: there is none, it needs code, or it is broken.
    """
    folder = _model_folder(path)
    with (
        one_line("no usable tokenizer", path),
        staged_tokenizer(folder) as stage,
        quiet_transformers(),
    ):
        tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(
            str(stage), trust_remote_code=False, local_files_only=True
        )
        # what it remembers of its files is where they lie, not where they lay for a moment
        for known in (vars(tokenizer), tokenizer.init_kwargs):
            for key, value in known.items():
                if isinstance(value, str) and value.startswith(str(stage)):
                    known[key] = value.replace(str(stage), str(folder), 1)
        return tokenizer


def open_model(
    path: str | Path, *, config: PreTrainedConfig | None = None, **options: Any
) -> PreTrainedModel:
    """The causal language model of a folder, ours among them, with all of its weights.

    `config` takes the place of the folder's config.json; `options` are those of `from_pretrained`
    (dtype, ...), None as if it were not given.

    Raises:
        CheckpointError: it cannot be used, or weights are missing.
        WeightsError: a weights file is broken, or holds more than tensors.
    """
    folder = _model_folder(path)
    given = {key: value for key, value in options.items() if value is not None}
    # of a folder's own generation settings nothing else counts
    given.setdefault("generation_config", GenerationConfig(eos_token_id=saved_end_ids(folder)))
    with one_line("cannot be opened", path), open_checkpoint(folder) as checkpoint:
        config = config or open_config(folder)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise CheckpointError(f"a {config.model_type} model is no causal language model")
        given |= _attention(given.pop("attn_implementation", None), config)
        with staged_weights(checkpoint) as stage, quiet_transformers():
            blank = model_without_memory(config, checkpoint)
            if "quantization_config" in given:
                keep_whole(given["quantization_config"], blank)
            found: type[Any] = type(blank)
            model, report = found.from_pretrained(
                _source(checkpoint, stage, given),
                config=config,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                **given,
            )
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{len(missing)} tensors are missing, the first is {missing[0]}", where=str(path)
        )
    model.config.name_or_path = model.name_or_path = str(path)
    return cast(PreTrainedModel, model)


def _source(checkpoint: Checkpoint, stage: Path, given: dict[str, Any]) -> str | None:
    """What `from_pretrained` reads: a folder, or None where `given` has the tensors now.

    Files are mapped, which costs no memory where weights stay as they are. What is converted is
    read tensor by tensor: else file and copy would both be held until the last one is done.
    """
    wanted = given.get("dtype")
    converted = isinstance(wanted, torch.dtype) and any(
        info.dtype.is_floating_point and info.dtype != wanted
        for info in checkpoint.tensors.values()
    )
    if converted and not given.keys() & {"device_map", "quantization_config"}:
        lock = threading.Lock()
        given["state_dict"] = {name: _Tensor(checkpoint, name, lock) for name in checkpoint.tensors}
        return None
    return str(stage)


@dataclass(frozen=True)
class _Tensor:
    """A tensor that is read when it is indexed: transformers has slices of safetensors so."""

    checkpoint: Checkpoint
    name: str
    lock: threading.Lock

    def __getitem__(self, index: Any) -> torch.Tensor:
        with self.lock:  # a checkpoint is read by one thread at a time
            tensor: torch.Tensor = self.checkpoint.read(self.name)[index]
        return tensor


def blank_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A causal language model of a configuration, with fresh weights."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model


def model_without_memory(
    config: PreTrainedConfig, checkpoint: Checkpoint, kind: type[Any] = AutoModelForCausalLM
) -> PreTrainedModel:
    """The model that a configuration describes, on PyTorch's `meta` device.

    Raises:
        CheckpointError: it is larger than the checkpoint's weights.
    """
    too_large = CheckpointError(
        "config.json describes a larger model than the weights are", where=str(checkpoint.path)
    )
    infos = checkpoint.tensors.values()
    left = 16 * len(infos) + 10_000  # parameters; modules take memory, even those of no weight

    def count(*_: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise too_large

    hook = register_module_parameter_registration_hook(count)
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")  # what is wrong is an error, of one line
            own = deepcopy(config)
            model = blank_model(own) if kind is AutoModelForCausalLM else kind(own)
    finally:
        hook.remove()
    # tied tables lie in a file once; bits may be packed
    packed = 8 if "quantization_config" in checkpoint.config else 2
    room = packed * sum(info.numel for info in infos) + _FREE_ELEMENTS
    if sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers())) > room:
        raise too_large
    return cast(PreTrainedModel, model)


def _attention(wanted: str | None, config: PreTrainedConfig) -> dict[str, str]:
    """The option that asks for an implementation; none where transformers' own choice will do.

    A few kinds of models know neither flash attention nor `sdpa`; they go on as transformers has
    them.
    """
    text_config = getattr(config, "text_config", config)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text_config), None)
    if wanted in (None, "sdpa"):
        return {}
    if wanted != "eager" and not getattr(kind, "_supports_flash_attn", True):
        note(f"a {text_config.model_type} model has no flash attention, and goes without")
        return {}
    return {"attn_implementation": str(wanted)}


def _model_folder(path: str | Path) -> Path:
    if Path(path).is_dir():
        return Path(path)
    raise CheckpointError(
        "no model folder",
        where=str(path),
        hint="`chatbind download hf:OWNER/NAME` fetches one of the Hugging Face hub",
    )


@contextmanager
def one_line(what: str, where: str | Path) -> Iterator[None]:
    """Makes one line of whatever a library raises over a hostile folder.

    Raises:
        CheckpointError: in place of any `Exception`, and of what the tokenizers library panics
            with, which is none. Our own errors pass.
    """
    try:
        yield
    except ChatBindError as error:
        if error.where:
            raise
        raise CheckpointError(error.what, where=str(where), hint=error.hint) from error
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = reason(error)
        if isinstance(error, KeyError):  # its words are the key alone
            said = f"KeyError: {said}"
        if "ignore_mismatched_sizes" in str(error):
            said = "its tensors do not have the shapes that config.json says"
        raise CheckpointError(f"{what} ({said})", where=str(where)) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Lets transformers say nothing but errors, and draw bars on a terminal only.

    Bars are a mess in a batch job's log; and of unexpected tensors and old keys it would warn where
    a projector lies among a language model's weights.
    """
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
