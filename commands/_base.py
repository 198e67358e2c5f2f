"""What every command shares: grouped options, examples, the config file, the seed's spellings.

A command file says `@command("vqa", ...)` and gets the whole contract of the command line.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from chatbind_cli.cli import COMMANDS, CONFIG, kebab

# What torchrun, accelerate, DeepSpeed, LLaVA and Hugging Face's tools call an option, and what it
# is here, in the commands that have it.
_KNOWN_ELSEWHERE = {
    "--nnodes": "--num-machines",
    "--num-nodes": "--num-machines",
    "--nproc-per-node": "--num-processes",
    "--num-gpus": "--num-processes",
    "--node-rank": "--machine-rank",
    "--master-addr": "--main-address",
    "--master-port": "--main-address",
    "--main-process-ip": "--main-address",
    "--main-process-port": "--main-address",
    "--rdzv-endpoint": "--main-address",
    "--config-file": "--launch-config",
    "--model-path": "--model",
    "--image-file": "--image",
    "--media": "--attach",
    "--file": "--attach",
    "--prompt": "--query",
    "--question": "--query",
    "--max-length": "--max-new-tokens",
    "--max-tokens": "--max-new-tokens",
    "--num-epochs": "--num-train-epochs",
    "--epochs": "--num-train-epochs",
    "--lr": "--learning-rate",
    "--force": "--overwrite",
    "--num-return-sequences": "--samples",
    "--num-samples": "--samples",
    "--max-questions": "--limit",
    # ours, in commands that work on one machine
    "--num-machines": "--shard",
    "--machine-rank": "--shard",
    "--main-address": "--shard",
    "--launch-config": "--num-processes",
}


_SHOW_ALL = "chatbind.show_all"  # in a context's `meta`: list advanced options, too


class GroupedOption(click.Option):
    """An option that the help lists under a heading of its own.

    Args:
        group: the heading.
        advanced: few set it; `--help-all` alone lists it.
    """

    def __init__(
        self, *args: Any, group: str = "Options", advanced: bool = False, **kwargs: Any
    ) -> None:
        if not kwargs.get("is_flag") and kwargs.get("default") is not None:
            kwargs.setdefault("show_default", True)
        super().__init__(*args, **kwargs)
        self.group = group
        self.advanced = advanced


def is_given(name: str) -> bool:
    """Whether the user has said an option: on the line, in the environment or in a config file."""
    source = click.get_current_context().get_parameter_source(name)
    return source not in (None, ParameterSource.DEFAULT)


def in_group(group: str, cls: type[GroupedOption] = GroupedOption) -> Callable[..., Any]:
    """A decorator of options under one heading, to be called as `click.option` is."""
    return partial(click.option, cls=cls, group=group)


class ListOption(GroupedOption):
    """An option that takes one or more words: `--answer-list A B`, or repeated."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["multiple"] = True
        super().__init__(*args, **kwargs)


class BoolOption(GroupedOption):
    """A switch that may also be given a value, as the seed does: `--bf16` or `--bf16 True`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.update(is_flag=False, flag_value="true")
        kwargs.setdefault("type", click.BOOL)
        kwargs.setdefault("metavar", "[BOOL]")
        super().__init__(*args, **kwargs)


class ChatBindCommand(click.Command):
    """A click command with examples, option groups, `--config`, `--debug` and `--quiet`."""

    def __init__(
        self,
        *args: Any,
        examples: Sequence[str] = (),
        elsewhere: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        # the rest comes from the program's own context; this, too, where a command is called alone
        kwargs.setdefault("context_settings", {"token_normalize_func": kebab})
        super().__init__(*args, **kwargs)
        self.examples = examples
        self.elsewhere = elsewhere
        advanced = any(getattr(param, "advanced", False) for param in self.params)
        self.params.extend(_common_options(help_all=advanced))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeats list options before every one of their words, then parses as click does."""
        _apply_config(ctx, None, ctx.meta.get(CONFIG))
        try:
            return super().parse_args(ctx, self._one_word_each(ctx, args))
        except click.NoSuchOption as error:
            theirs = error.option_name
            ours = _KNOWN_ELSEWHERE.get(theirs)
            if not any(ours in param.opts for param in self.params):
                raise
            said = f"No such option {theirs!r}. Did you mean {ours!r}?"
            raise click.NoSuchOption(theirs, said, ctx=error.ctx) from None

    def _one_word_each(self, ctx: click.Context, args: list[str]) -> list[str]:
        lists = {
            kebab(name)
            for param in self.get_params(ctx)
            if isinstance(param, ListOption)
            for name in (*param.opts, *param.secondary_opts)
        }
        out: list[str] = []
        current: str | None = None
        for position, word in enumerate([*args, "--"]):
            if word.startswith("-") and word != "-":
                if current is not None and args[position - 1] == current:
                    raise click.BadOptionUsage(current, f"Option {current!r} needs words.", ctx)
                if word == "--":
                    return [*out, *args[position:]]
                name, equals, _ = word.partition("=")
                # `--opt=value` is complete in itself; only the two-word form goes on.
                current = word if kebab(name) in lists and not equals else None
                out += [word] if current is None else []
            elif current is not None:
                out += [current, word]
            else:
                out.append(word)
        return out

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the options under their headings, the common ones last."""
        groups: dict[str, list[tuple[str, str]]] = {}
        common: list[tuple[str, str]] = []
        hidden = 0
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None or isinstance(param, click.Argument):  # the usage line has those
                continue
            if getattr(param, "advanced", False) and not ctx.meta.get(_SHOW_ALL):
                hidden += 1
                continue
            group = getattr(param, "group", "Common")  # click's own `--help` has none
            (common if group == "Common" else groups.setdefault(group, [])).append(record)
        for heading, records in [*groups.items(), ("Common", common)]:
            with formatter.section(heading):
                formatter.write_dl(records)
        if hidden:
            formatter.write(f"\n{hidden} more options: {ctx.command_path} --help-all\n")

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the examples, unwrapped, so that they can be pasted."""
        for heading, lines in (
            ("Examples that work as they stand, where `chatbind toy .` was run", self.examples),
            ("Examples that need the network, a key or files of yours", self.elsewhere),
        ):
            if lines:
                with formatter.section(heading):
                    formatter.write("".join(f"  {line}\n" for line in lines))


def command(
    name: str, *, examples: Sequence[str], elsewhere: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], ChatBindCommand]:
    """Makes a function the ChatBind command `name`.

    Args:
        name: the command's word on the line.
        examples: at least two lines that work as they stand where `chatbind toy .` was run.
        elsewhere: lines that need more than that.
    """
    return click.command(name, cls=ChatBindCommand, examples=examples, elsewhere=elsewhere)


def _common_options(*, help_all: bool) -> list[click.Option]:
    """What every command has; `--help-all` is listed where it shows more than `--help`."""
    return [
        GroupedOption(
            ["--config"],
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            is_eager=True,
            expose_value=False,
            callback=_apply_config,
            group="Common",
            help="TOML file with values for options; the line and the environment win over it.",
        ),
        _switch("--debug", "CHATBIND_DEBUG", "Show a traceback when something fails."),
        _switch("--quiet", "CHATBIND_QUIET", "No notes and no progress on stderr."),
        GroupedOption(
            ["--help-all"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_show_all,
            hidden=not help_all,
            group="Common",
            help="Show every option and exit.",
        ),
    ]


def _show_all(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[_SHOW_ALL] = True
        click.echo(ctx.get_help(), color=ctx.color)
        ctx.exit()


def _switch(name: str, variable: str, text: str) -> click.Option:
    def remember(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        # The environment reaches the workers of a launched command too.
        if value:
            os.environ[variable] = "1"

    return GroupedOption(
        [name],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=remember,
        envvar=variable,
        group="Common",
        help=text,
    )


def _apply_config(ctx: click.Context, param: click.Parameter | None, value: Path | None) -> None:
    """Makes a config file's values the options' defaults.

    Values outside the tables of commands are for every command that has such an option.

    Raises:
        click.UsageError: it is not TOML, or names a command or an option that is not there.
    """
    if value is None:
        return
    try:
        document = tomllib.loads(value.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise click.UsageError(f"{value}: is not TOML ({error})") from error
    shared = {key: item for key, item in document.items() if not isinstance(item, dict)}
    tables = {kebab(key): item for key, item in document.items() if isinstance(item, dict)}
    for unknown in tables.keys() - COMMANDS.keys():
        raise click.UsageError(f"{value}: no command is named {unknown!r}", ctx)
    command = ctx.command.name or ""
    own = tables.get(command, {})
    names = _names_of_options(ctx)
    lists = {param.name for param in ctx.command.params if getattr(param, "multiple", False)}
    values: dict[str, Any] = {}
    for key, item in [*shared.items(), *own.items()]:
        name = names.get(kebab(key))
        if name is not None:
            # click would take a text for the list of its letters
            values[name] = [item] if name in lists and isinstance(item, str) else item
        elif key in own:
            raise click.UsageError(f"{value}: {key!r} is no option of `chatbind {command}`", ctx)
    ctx.default_map = {**(ctx.default_map or {}), **values}


def _names_of_options(ctx: click.Context) -> dict[str, str]:
    """A command's parameters by every spelling: `max-new-tokens`, an alias."""
    names: dict[str, str] = {}
    for param in ctx.command.get_params(ctx):
        for option in (param.name or "", *param.opts, *param.secondary_opts):
            names[kebab(option.lstrip("-"))] = param.name or ""
    return names
