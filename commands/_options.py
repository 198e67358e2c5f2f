"""Options that several commands share, so that they read and mean the same everywhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial, reduce, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from chatbind_cli import launch, worker
from chatbind_cli.console import note
from chatbind_cli.encoders.reference import is_reference
from chatbind_cli.errors import UsageError
from chatbind_cli.numerals import whole_number
from chatbind_cli.plan import Dispatch
from chatbind_cli.worker_pool import WorkerPool, pool_of

from ._base import in_group

if TYPE_CHECKING:
    from chatbind_cli.media.root import MediaRoot

F = TypeVar("F", bound=Callable[..., Any])

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
NEW_FILE = click.Path(dir_okay=False, path_type=Path)
NEW_FOLDER = click.Path(file_okay=False, path_type=Path)
STREAM = click.Path(dir_okay=False, allow_dash=True)
"""A file, or `-` for standard input or output."""

_output, _compute = in_group("Output"), in_group("Compute")
_media, _dispatch = in_group("Media"), in_group("Dispatch")
_SHARED = "each medium goes to the first that knows its modality"


def stack(*decorators: Callable[[Any], Any]) -> Callable[[F], F]:
    """Several option decorators as one; the first one's option comes first in the help."""

    def wrap(function: F) -> F:
        return reduce(lambda wrapped, decorate: decorate(wrapped), reversed(decorators), function)

    return wrap


def gather(
    argument: str,
    make: Callable[..., Any],
    *decorators: Callable[[Any], Any],
    shared: Sequence[str] = (),
) -> Callable[[F], F]:
    """Several options, handed to the command as one argument.

    Args:
        argument: its name.
        make: makes it of the options' values.
        decorators: the options.
        shared: options of other groups that it needs, too.
    """
    options = stack(*decorators)
    params: list[click.Option] = vars(options(lambda: None))["__click_params__"]
    names = [param.name for param in params if param.expose_value and param.name]

    def wrap(function: F) -> F:
        @wraps(function)
        def gathered(*args: Any, **kwargs: Any) -> Any:
            values = {name: kwargs.pop(name) for name in names}
            values.update((name, kwargs[name]) for name in shared if name in kwargs)
            return function(*args, **{argument: make(**values)}, **kwargs)

        return options(gathered)  # type: ignore[return-value]

    return wrap


def output_option(help_text: str, *aliases: str) -> Callable[[F], F]:
    """`-o/--output`: a file, or `-` for stdout."""
    names = ("-o", "--output", *aliases, "output")
    return _output(*names, default="-", metavar="FILE", type=STREAM, help=help_text)


overwrite_option = _output(
    "--overwrite",
    is_flag=True,
    help="Start anew instead of continuing what is there; only what this command made, and has "
    "on its record, is replaced.",
)

on_error_option = _output(
    "--on-error",
    type=click.Choice(["record", "skip", "fail"]),
    default="record",
    help="A record that fails: write it with its id and an `error`, leave it out, or stop.",
)

seed_option = _compute(
    "--seed", type=click.IntRange(min=0), default=0, help="Seed of everything random."
)

device_options = stack(
    _compute(
        "--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1, mps."
    ),
    _compute(
        "--dtype",
        type=click.Choice(["auto", "float32", "float16", "bfloat16"]),
        default="auto",
        help="Numbers of the model; auto: bfloat16 on a GPU, float32 on a CPU, where `ask` and "
        "`vqa` keep bfloat16 if the CPU multiplies it, or if float32 would not fit.",
    ),
)

attention_option = _compute(
    "--attn-implementation",
    advanced=True,
    type=click.Choice(["auto", "sdpa", "flash_attention_2", "flash_attention_3", "eager"]),
    default="auto",
    metavar="NAME",
    help="Attention kernels: sdpa (PyTorch's own), flash_attention_2, flash_attention_3, eager; "
    "auto: the fastest that is installed and fits.",
)

base_option = in_group("Model")(
    "--base",
    advanced=True,
    metavar="DIR",
    type=FOLDER,
    help="The language model that a folder of adapters belongs to, where it does not lie any more "
    "where it lay in training.",
)


def _media_root(media_root: Path | None, media_prefix: str, allow_outside: bool) -> MediaRoot:
    from chatbind_cli.media.root import MediaRoot  # noqa: PLC0415  9 ms, which help need not pay

    return MediaRoot(media_root, media_prefix, allow_outside)


media_root_options = gather(
    "media_root",
    _media_root,
    _media(
        "--media-root",
        "--image-folder",
        "media_root",
        metavar="DIR",
        type=NEW_FOLDER,
        help="Folder that the media paths of records start from.",
    ),
    _media(
        "--media-prefix",
        advanced=True,
        default="",
        help="Put before the file names of records, as COCO_val2014_; a folder named after "
        "COCO's 2014 pictures (val2014, coco2014_val) needs none.",
    ),
    _media(
        "--allow-outside",
        advanced=True,
        is_flag=True,
        help="Let records name files outside the media root.",
    ),
)
"""Where the media of records lie, handed to the function as one argument `media_root`."""


class _Encoder(click.Path):
    """An encoder's path, which has to be there, or a reference that a scheme begins."""

    def split_envvar_value(self, rv: str) -> list[str]:
        return rv.strip("\n").split("\n")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        word = str(value)  # a config file may say a number
        return word if is_reference(word) else str(super().convert(word, param, ctx))


def encoder_option(
    group: str, help_text: str, several: str = _SHARED, **how: Any
) -> Callable[[F], F]:
    """`--encoder`, repeatable: paths and references in their order."""
    return in_group(group)(
        "--encoder",
        multiple=True,
        metavar="PATH|SCHEME:NAME",
        type=_Encoder(exists=True),
        help=f"{help_text} Weights of ImageBind, a folder of LanguageBind's or of a Hugging Face "
        f"encoder, hf:OWNER/NAME, timm:NAME. Repeat: {several}.",
        **how,
    )


_num_processes = partial(_dispatch, "--num-processes", type=click.IntRange(min=1))
_dry_run = _dispatch(
    "--dry-run", is_flag=True, help="Print the command line that would run, and stop."
)
_sbatch = _dispatch(
    "--sbatch",
    advanced=True,
    is_flag=True,
    help="Print a batch script for SLURM that runs this command, and stop.",
)

dispatch_options = gather(
    "plan",
    Dispatch,
    _num_processes(help="Worker processes over all machines; default: one a GPU, else one."),
    _dispatch(
        "--num-machines",
        advanced=True,
        type=click.IntRange(min=1),
        help="Machines; default: those of SLURM's step, else 1.",
    ),
    _dispatch(
        "--machine-rank",
        advanced=True,
        type=click.IntRange(min=0),
        help="This machine's number, from 0; default: $SLURM_NODEID in a step, else 0.",
    ),
    _dispatch(
        "--main-address",
        advanced=True,
        metavar="HOST:PORT",
        help="Where machine 0 listens; default: $MASTER_ADDR and $MASTER_PORT, else the first "
        "host of SLURM's step and a port by its job's number.",
    ),
    _dispatch(
        "--launch-config",
        advanced=True,
        metavar="YAML",
        type=FILE,
        help="A config of `accelerate config` to launch with.",
    ),
    _dry_run,
    _sbatch,
    shared=["device"],
)
"""The options of `Dispatch`, handed to the function as one argument `plan`."""

pool_options = gather(
    "plan",
    Dispatch,
    _num_processes(
        help="Worker processes on this machine; default: one a GPU, else one. One that dies is "
        "replaced, and others take what it had. Several machines: --shard."
    ),
    _dry_run,
    _sbatch,
    shared=["device"],
)
"""Those of a command whose work is shared out item by item, in the same argument."""


def dispatched(
    plan: Dispatch,
    extra: Sequence[str] = (),
    meanwhile: Callable[[Path], None] | None = None,
) -> bool:
    """Runs the command that is being handled in worker processes, where the plan wants that.

    Args:
        plan: what `dispatch_options` gave.
        extra: words that replace what this process has read from its standard input.
        meanwhile: what this process does while workers start, if they do; see `launch.dispatch`.

    Returns:
        Whether the work is done; else the caller goes on in this process.
    """
    invocation = click.get_current_context().obj
    return launch.dispatch(invocation or sys.argv[1:], plan, extra, meanwhile)


def worker_pool(plan: Dispatch, extra: Sequence[str] = ()) -> WorkerPool | None:
    """Who does the work of the command that is being handled; None: that is said, or done.

    Args:
        plan: what `pool_options` gave.
        extra: words that replace what this process has read from its standard input.
    """
    invocation = click.get_current_context().obj
    return pool_of(invocation or sys.argv[1:], plan, extra)


def shard_option(help_text: str) -> Callable[[F], F]:
    """`--shard I/N`, as two numbers; 1 and 1 where nothing is given."""
    return in_group("Input")(
        "--shard", advanced=True, metavar="I/N", callback=_shard, help=help_text
    )


def _shard(context: click.Context, param: click.Parameter, given: str | None) -> tuple[int, int]:
    if given is None:
        return 1, 1
    number, slash, count = given.partition("/")
    share = whole_number(number) or 0, whole_number(count) or 0
    if not slash or not 1 <= share[0] <= share[1]:
        raise click.BadParameter(f"{given} is not like 3/16, from 1/16 to 16/16")
    return share


def one_reader(*words: tuple[str, str | None]) -> None:
    """Refuses a call in which standard input would have to be two things.

    Args:
        words: what may be read from it, and the word for it on the line: `-` if it is.

    Raises:
        UsageError: several are.
    """
    reading = [what for what, word in words if word == "-"]
    if len(reading) > 1:
        raise UsageError(
            f"standard input cannot be both {reading[0]} and {reading[1]}",
            hint="give one of them on the line",
        )


def without_effect(*names: str, because: str, needs_value: bool = False) -> Callable[[F], F]:
    """An option of the seed that is accepted, does nothing here, and says so when it is used.

    Args:
        names: its spellings.
        because: why, in a few words that end the sentence "has no effect: ...".
        needs_value: whether a value always follows; only then may it begin with a minus.
    """

    def tell(ctx: click.Context, param: click.Parameter, value: object) -> None:
        # the process that started the workers has said it already
        if value is not None and not worker.is_worker():
            note(f"{names[0]} has no effect: {because}")

    return in_group("Accepted for the seed's sake")(
        *names,
        advanced=True,
        expose_value=False,
        callback=tell,
        metavar="VALUE" if needs_value else "[VALUE]",
        **({} if needs_value else {"is_flag": False, "flag_value": "true"}),
        help=f"No effect: {because}.",
    )
