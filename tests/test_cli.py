"""The program around the commands: exit codes, messages, config file, environment, spellings."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from chatbind_cli import cli, hardware, launch
from chatbind_cli.errors import MediaError, SomeRecordsFailed, UsageError
from chatbind_cli.jsonl import dumps

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "accelerate", "openai", "numpy", "rich", "av", "PIL", "httpx")


@pytest.fixture
def base():
    return importlib.import_module("chatbind_cli.commands._base")


@pytest.fixture
def show(base, monkeypatch):
    """A command `show` that prints its parameters as JSON, put into the program for one test."""

    @base.command("show", examples=["chatbind show", "chatbind show --n 2"])
    @click.option("--n", "--count", "n", type=int, default=1, cls=base.GroupedOption, group="Work")
    @click.option("--model-name", cls=base.GroupedOption)
    @click.option("--answer-list", cls=base.ListOption)
    @click.option("--bf16", cls=base.BoolOption, default=False)
    @click.option("--style", type=click.Choice(["llava_v1", "chat"]), cls=base.GroupedOption)
    def show(**values):
        """Show the values."""
        click.echo(dumps(values))

    monkeypatch.setitem(cli.app.commands, "show", show)
    monkeypatch.setitem(cli.COMMANDS, "show", "Show.")

    def run(*args):
        result = CliRunner().invoke(cli.app, ["show", *args], obj=["show", *args])
        return (
            result.output
            if result.exit_code
            else eval(result.output, {"null": None, "true": True, "false": False})
        )

    return run


def failing(base, monkeypatch, error):
    @base.command("fail", examples=[])
    def fail():
        """Fail."""
        raise error

    monkeypatch.setitem(cli.app.commands, "fail", fail)
    return cli.run(["fail"])


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_a_command_has_examples_and_a_help_for_every_option(name):
    command = cli.app.commands[name].load()
    assert command.name == name
    assert len(command.examples) >= 2
    undocumented = [p.name for p in command.params if isinstance(p, click.Option) and not p.help]
    assert undocumented == []


@pytest.mark.parametrize("args", [["--help"], *([name, "--help"] for name in sorted(cli.COMMANDS))])
def test_help_loads_nothing_heavy(args):
    code = (
        "import sys; from chatbind_cli import cli; code, text = cli.run(sys.argv[1:]);"
        f"loaded = [n for n in {HEAVY!r} if n in sys.modules];"
        "sys.exit(f'{code} {text} {loaded}' if code or loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage: chatbind" in done.stdout


def test_a_usage_error_loads_nothing_heavy_and_exits_2():
    code = (
        "import sys; from chatbind_cli import cli; code, text = cli.run(['vqa', '--nosuch']);"
        f"sys.exit(f'{{code}} {{text}}' if code != 2 or any(n in sys.modules for n in {HEAVY!r})"
        " else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_subpackage_is_in_the_wheel():
    listed = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    )
    folders = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "chatbind_cli").rglob("__init__.py")
    }
    assert listed == folders | {"chatbind_cli.commands", "chatbind_cli.harness.tasks"}


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (
            MediaError("is empty", where="a.png", hint="look"),
            1,
            "chatbind: error: a.png: is empty; look",
        ),
        (UsageError("two questions"), 2, "chatbind: error: two questions"),
        (SomeRecordsFailed("2 of 3 failed"), 3, "chatbind: error: 2 of 3 failed"),
        (KeyboardInterrupt(), 130, "chatbind: interrupted"),
        (BrokenPipeError(), 141, ""),
        (OSError(28, "No space left on device"), 1, "chatbind: error: No space left on device"),
        (FileNotFoundError(2, "No such file", "a"), 1, "chatbind: error: a: No such file"),
        (OSError(18, "Other device", "a", None, "b"), 1, "chatbind: error: a -> b: Other device"),
        (KeyError("x"), 1, "internal error: KeyError: 'x'; run again with --debug"),
    ],
)
def test_every_way_to_fail_is_one_line_and_a_code(base, monkeypatch, error, code, text):
    got, message = failing(base, monkeypatch, error)
    assert got == code
    assert text in message
    assert "\n" not in message


def test_debug_shows_the_traceback(base, monkeypatch):
    monkeypatch.setenv("CHATBIND_DEBUG", "1")
    assert "Traceback" in failing(base, monkeypatch, KeyError("x"))[1]


def test_a_worker_leaves_its_outcome_for_its_parent(tmp_path):
    environment = {**os.environ, "CHATBIND_STATUS_FOLDER": str(tmp_path), "RANK": "1"}
    line = [sys.executable, "-m", "chatbind_cli", "nosuch"]
    # the launcher would add a traceback to any other code
    assert subprocess.run(line, env=environment, timeout=60, check=False).returncode == 0
    with pytest.raises(launch.WorkerFailed, match="No such command") as failed:
        launch._raise_outcome(tmp_path, 1)
    assert failed.value.exit_code == 2


def test_the_program_s_name_alone_shows_the_help_once():
    code, message = cli.run([])
    assert code == 2
    assert message.count("Usage: ") == 1
    assert "Commands:" in message
    assert "Error" not in message


@pytest.mark.parametrize(
    ("line", "ours"),
    [
        ("pretrain --nnodes 2", "--num-machines"),
        ("finetune --nproc_per_node=4", "--num-processes"),
        ("vqa --max_tokens 8", "--max-new-tokens"),
        ("ask --image-file x.png", "--image"),
        ("vqa --num_machines 2", "--shard"),
    ],
)
def test_what_other_programs_call_an_option_suggests_ours(line, ours):
    code, message = cli.run(line.split())
    assert code == 2
    assert message.endswith(f"Did you mean '{ours}'?")


def test_every_suggested_option_and_every_option_in_a_text_is_there(base):
    options = {"--help", "--version"}
    for command in cli.app.commands.values():
        for param in command.load().params:
            options.update(name.replace("_", "-") for name in (*param.opts, *param.secondary_opts))
    assert set(base._KNOWN_ELSEWHERE.values()) <= options
    # of `accelerate launch`
    options |= {"--config-file", "--multi-gpu", "--mixed-precision", "--dynamo-backend"}
    options |= {"--main-process-ip", "--main-process-port"}
    options |= {"--query-gpu"}  # of `nvidia-smi`
    options |= {"--enable-prompt-embeds", "--enable-prefix-caching"}  # of `vllm serve`
    options |= {"--model-args", "--include-path"}  # of `lmms-eval`
    options |= {"--ntasks-per-node", "--gpus-per-node"}  # of `srun` and `sbatch`
    unknown = [
        (path.name, word)
        for folder in ("chatbind_cli", "commands")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.name != "_base.py"  # where the others' options are listed
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for word in re.findall(r"(?<![\w-])--[a-z][\w-]*", node.value)
        if word.replace("_", "-") not in options
    ]
    assert unknown == []


@pytest.mark.parametrize(
    "line",
    [
        "ask -m nosuch Hello",
        "ask -m . --projector nosuch Hello",
        "ask -m nosuch --projector p.safetensors Hello",
        "convert nosuch -o out",
        "convert . --projector nosuch -o out",
        "extract-projector nosuch -o p.safetensors",
        "make-delta --base nosuch --target . --delta out",
        "pretrain -m nosuch --data d.json -o out",
        "pretrain -m llama --data nosuch -o out",
        "summarize nosuch",
        "vqa -m nosuch -q q.jsonl",
    ],
)
def test_a_path_that_is_not_there_is_named_in_words(tmp_path, monkeypatch, line):
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama/config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "d.json").write_text("[]")
    monkeypatch.chdir(tmp_path)
    code, message = cli.run(line.split())
    assert code in (1, 2)
    assert re.fullmatch("chatbind: error: [^\n]*nosuch: [^\n]*", message)
    assert "Errno" not in message
    if line.startswith(("ask -m nosuch Hello", "vqa")):
        assert "`chatbind download`" in message


def test_a_wrong_command_suggests_the_right_one():
    assert cli.run(["reviw"])[1].endswith("No such command 'reviw'. Did you mean 'review'?")


def test_seed_spellings_are_the_same_options(show):
    values = show(
        "--model_name", "m_x", "--bf16", "True", "--answer_list", "a", "b", "--count", "3"
    )
    assert values["model_name"] == "m_x"
    assert values["bf16"] is True
    assert values["answer_list"] == ["a", "b"]
    assert values["n"] == 3


def test_a_switch_needs_no_value_and_takes_one(show):
    assert show("--bf16", "--n", "2")["bf16"] is True
    assert show("--bf16", "False")["bf16"] is False
    assert show()["bf16"] is False


def test_a_list_ends_at_the_next_option_and_may_be_repeated(show):
    values = show("--answer-list", "a", "b", "--n", "2", "--answer-list=c")
    assert (values["answer_list"], values["n"]) == (["a", "b", "c"], 2)
    assert "'--answer-list' needs words" in show("--answer-list", "--n", "2")


def test_the_line_beats_the_environment_which_beats_the_file(show, tmp_path, monkeypatch):
    config = tmp_path / "c.toml"
    config.write_text('count = 5\nother = 1\n[show]\nmodel-name = "file"\nanswer_list = ["x"]\n')
    values = show("--config", str(config))
    assert (values["n"], values["model_name"], values["answer_list"]) == (5, "file", ["x"])
    monkeypatch.setenv("CHATBIND_SHOW_MODEL_NAME", "env")
    assert show("--config", str(config))["model_name"] == "env"
    assert show("--config", str(config), "--model-name", "line")["model_name"] == "line"


def test_the_program_s_own_config_option_does_the_same(show, tmp_path):
    config = tmp_path / "c.toml"
    config.write_text('count = 5\n[show]\nmodel-name = "file"\n')
    result = CliRunner().invoke(cli.app, ["--config", str(config), "show"])
    assert '"n": 5' in result.output
    assert '"model_name": "file"' in result.output


@pytest.mark.parametrize("text", ["[show]\nnosuch = 1\n", "not toml"])
def test_a_config_that_cannot_be_meant_is_a_usage_error(show, tmp_path, text):
    (tmp_path / "c.toml").write_text(text)
    code, message = cli.run(["show", "--config", str(tmp_path / "c.toml")])
    assert code == 2
    assert "c.toml" in message


def test_help_has_groups_and_examples(base, show):
    result = CliRunner().invoke(cli.app, ["show", "--help"])
    assert result.output.index("Work:") < result.output.index("Common:")
    assert "  chatbind show --n 2\n" in result.output


def test_help_lists_what_people_set_and_help_all_everything():
    short, whole = (
        CliRunner().invoke(cli.app, ["vqa", word]).output for word in ("--help", "--help-all")
    )
    assert "--num-chunks" not in short and "vqa --help-all" in short
    assert "--num-chunks" in whole and "more options" not in whole


@pytest.mark.parametrize(("device", "processes"), [("cuda", 4), ("cpu", 1), ("cuda:1", 1)])
def test_the_device_decides_how_a_command_runs(device, processes, monkeypatch):
    monkeypatch.setattr(hardware, "gpu_count", lambda: 4)
    words = ["vqa", "-m", "m", "-q", "q.jsonl", "--device", device, "--dry-run"]
    output = CliRunner().invoke(cli.app, words, obj=words).output
    assert output.endswith(f"--device {device}" + " --num-processes 4" * (processes > 1) + "\n")


def test_completion_offers_commands_without_loading_them():
    code = "from chatbind_cli.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"_CHATBIND_COMPLETE": "bash_complete", "COMP_WORDS": "chatbind ex", "COMP_CWORD": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "plain,extract-projector\n"


@pytest.mark.parametrize(
    ("closed", "code"), [("", 0), ("<&-", 0), (">&-", 1), ("<&- >&- 2>&-", 1), (">/dev/full", 1)]
)
def test_standard_streams_may_be_closed_or_full(closed, code):
    line = f'"{sys.executable}" -m chatbind_cli --help {closed}'
    done = subprocess.run(line, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == code
    if code and "2>" not in closed:
        assert re.fullmatch("chatbind: error: .*(closed|No space left).*\n", done.stderr)


def test_reading_a_closed_standard_input_is_one_line():
    program = "import sys; from chatbind_cli import cli; cli._open_streams(); sys.stdin.read()"
    line = f'"{sys.executable}" -c "{program}" <&-'
    done = subprocess.run(line, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert "Bad file descriptor" in done.stderr
