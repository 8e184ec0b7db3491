"""The command line: one subcommand per task, every wrong input answered in one line with exit code 2."""

from __future__ import annotations

import contextlib
import inspect
import pkgutil
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_origin, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from dgsnet.config import CONFIG_FILE, RECIPES, Config, read_config, recipe
from dgsnet.errors import UserError
from dgsnet.files import one_line
from dgsnet.model.catalogue import check_no_code, own_settings


@dataclass
class Command:
    """A subcommand: its help line and its function, imported only when the command is called."""

    summary: str
    function: str

    def load(self) -> Callable[..., Any]:
        return pkgutil.resolve_name(f"dgsnet.{self.function}")


# A command is a function whose parameters become options by their types and docstring. Those in POSITIONAL
# stand without a name; a list of strings takes one or more words, a list of such lists one each time it is
# named, a bool no words, and is false without its name.
# `train` alone has a configuration file.
COMMANDS = {
    "audit": Command("tell how much of the label files and captions give away", "audit.audit:audit_command"),
    "train": Command("train a detector", "cli:train_command"),
    "update": Command("teach a detector new generators", "training.update:update"),
    "evaluate": Command("measure a detector on labelled images", "evaluation.evaluate:evaluate_command"),
    "predict": Command("score images", "detection.scoring:predict_command"),
    "calibrate": Command(
        "set the threshold for a false-positive rate", "detection.calibrate:calibrate_command"
    ),
    "monitor": Command(
        "tell whether a calibration's promise still holds", "detection.monitor:monitor_command"
    ),
    "average": Command("write the mean of several detectors", "model.averages:average_command"),
    "convert": Command("import published weights", "exchange.convert:convert_command"),
    "export": Command("write a detector for other programs", "exchange.export:export_command"),
    "serve": Command("show a page to drop images on", "detection.serve:serve_command"),
    "caption": Command("write captions for training", "data.captioning:caption_command"),
    "twins": Command("make generated twins of real images", "twins.command:twins_command"),
    "demo": Command("train and compare detectors on the built-in data", "demo.command:demo_command"),
}
# Control characters but tab and new line, what turns the direction of writing, and bytes that are no UTF-8.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
POSITIONAL = ("paths", "checkpoint")
LISTS = (list[str], list[str] | None)
GROUPS = (list[list[str]], list[list[str]] | None)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command line; exit codes: 0, 2 (wrong input, one line), 3 (an alarm, lost pins), 130 (Ctrl-C).

    Example:
        >>> main(["train", "--data.train", "photos", "--out", "runs/mine"])  # doctest: +SKIP
    """
    argv = [_option(word) for word in (sys.argv[1:] if argv is None else argv)]
    # A warning shows no line of code.
    warnings.formatwarning = lambda message, *_, **__: f"dgsnet: warning: {one_line(message)}\n"
    with (
        contextlib.redirect_stdout(_Printable(sys.stdout)),
        contextlib.redirect_stderr(_Printable(sys.stderr)),
    ):
        _run(argv)


def _run(argv: list[str]) -> None:
    try:
        _call(argv)
    except UserError as error:
        _fail(str(error), error.code)
    except ArgumentError as error:
        _fail(_plain(str(error), argv))
    except OSError as error:
        # The disk is full, or a folder may not be written.
        _fail(str(error) or type(error).__name__)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


class _Printable:
    """A stream whose terminal obeys no name: what a file or a stranger is called may hold control characters.

    A line that begins with a carriage return is a progress bar's.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write it, with the codes of control characters in their places."""
        begin = text[:1] if text[:1] == "\r" else ""
        self.stream.write(begin + CONTROLS.sub(_code, text[len(begin) :]))
        return len(text)


def _code(found: re.Match[str]) -> str:
    number = ord(found[0])
    return f"\\x{number & 0xFF:02x}" if number < 0x100 or number >= 0xD800 else f"\\u{number:04x}"


def train_command(config: Config, out: Path, resume: bool = False) -> None:
    """Train a detector: both stages, from one YAML file or flags. docs/training.md says what is written.

    Args:
        config: the run.
        out: the run's folder; must be new or empty unless --resume is given.
        resume: go on where a run was stopped or killed; its own configuration is used. Starts a new run when
            there is none in `out`, so the same command line serves a restarted job.
    """
    from dgsnet.training.train import train

    train(config, out, resume=resume)


def _call(argv: list[str]) -> None:
    name = next((word for word in argv if not word.startswith("-")), "")
    command = COMMANDS.get(name)
    parser = ArgumentParser(
        prog="dgsnet",
        description="Train and use a detector of generated images.",
        version=version("dgs-kernels"),
        exit_on_error=False,
    )
    subcommands = parser.add_subcommands(dest="command")
    for other, entry in COMMANDS.items():
        chosen = _arguments(name, entry) if entry is command else ArgumentParser(exit_on_error=False)
        subcommands.add_subcommand(other, chosen, help=entry.summary)
    if name == "train":
        return _train(parser, subcommands.choices["train"], argv)
    arguments = vars(parser.parse_args(argv)[name])
    # For others, the parser has refused the words.
    assert command
    command.load()(**{key: value for key, value in arguments.items() if not key.startswith("__")})


def _arguments(name: str, command: Command) -> ArgumentParser:
    """The parser of one command, from its function's signature."""
    function = command.load()
    _describe(function)
    described = _described(function)
    parser = ArgumentParser(
        exit_on_error=False, description=(inspect.getdoc(function) or "").partition("\n")[0]
    )
    if name == "train":
        parser.add_argument("--config", action="config", help="YAML file of the settings below")
        parser.add_class_arguments(Config)
        names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
        known = "settings to start from, which all others change; docs/training.md has them"
        parser.add_argument("--recipe", choices=names, default="published", help=known)
        parser.add_argument("--out", required=True, help=described.get("out"))
        parser.add_argument("--resume", action="store_true", help=described.get("resume"))
        return parser
    own = [
        parameter
        for parameter in inspect.signature(function, eval_str=True).parameters.values()
        if parameter.name in POSITIONAL or parameter.annotation in (*LISTS, *GROUPS, bool)
    ]
    for parameter in own:
        if parameter.annotation is bool:
            flag = f"--{parameter.name}"
            parser.add_argument(flag, action="store_true", help=described.get(parameter.name))
            continue
        options: dict[str, Any] = {}
        # Given twice, an option keeps its first words.
        if parameter.annotation in (*LISTS, *GROUPS):
            options = {"nargs": "+", "action": "append" if parameter.annotation in GROUPS else "extend"}
        if parameter.name not in POSITIONAL:
            options["required"] = parameter.default is inspect.Parameter.empty
        flag = parameter.name if parameter.name in POSITIONAL else f"--{parameter.name}"
        parser.add_argument(flag, help=described.get(parameter.name), **options)
    parser.add_function_arguments(function, skip={parameter.name for parameter in own})
    return parser


def _describe(function: Callable[..., Any]) -> None:
    """Put the words that arguments' types bring into a command's docstring, and leave the types alone."""
    doc, known = inspect.getdoc(function) or "", _described(function)
    for name, kind in inspect.get_annotations(function, eval_str=True).items():
        if get_origin(kind) is Annotated and name not in known:
            doc = doc.replace("Args:\n", f"Args:\n    {name}: {kind.__metadata__[0]}\n", 1)
    function.__doc__ = doc
    # jsonargparse would import what a module imports for type checkers alone, torch among it.
    function.__annotations__ = get_type_hints(function)


def _option(word: str) -> str:
    """An option as the parsers know it: hyphens are underscores, and --surgery is --surgery.mode."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    name = name.replace("-", "_")
    return f"--{'surgery.mode' if name == 'surgery' else name}{equals}{value}"


def _described(function: Callable[..., Any]) -> dict[str, str]:
    """What a function's docstring says of its parameters."""
    from docstring_parser import parse

    return {found.arg_name: found.description or "" for found in parse(function.__doc__ or "").params}


def _train(parser: ArgumentParser, train_parser: ArgumentParser, argv: list[str]) -> None:
    # A look ahead, in which printing the settings must neither end the program nor need a folder.
    words = [word for word in argv if not word.startswith("--print_config")]
    ahead = parser.parse_args(words if words == argv else [*words, "--out", ""]).train
    saved = Path(ahead.out) / CONFIG_FILE
    # The settings of the run or the model become the defaults; the command line changes what it names.
    if ahead.resume and saved.is_file():
        train_parser.set_defaults(read_config(saved).flat())
    else:
        train_parser.set_defaults(recipe(ahead.recipe) | own_settings(ahead.model.name))
    arguments = parser.parse_args(argv).train
    pretrained = arguments.model.pretrained
    # The saved run named these weights, not this command line.
    if ahead.resume and saved.is_file() and pretrained != ahead.model.pretrained:
        check_no_code(saved, pretrained, "--model.pretrained")
    train_command(_to_config(arguments), Path(arguments.out), arguments.resume)


def _to_config(arguments: Namespace) -> Config:
    fields = {
        name: value for name, value in arguments.as_dict().items() if name in Config.__dataclass_fields__
    }
    try:
        return Config.from_dict(fields)
    except ValueError as error:
        raise UserError(str(error)) from None


def _plain(message: str, argv: list[str]) -> str:
    """jsonargparse's message in the words of the command line, with where to look."""
    message = re.sub(r"<class '(\w+)'>|typing\.(\w+)", r"\1\2", message)
    message = re.sub(rf"\b({'|'.join(COMMANDS)})\.", "--", message).replace("Parser key", "setting")
    message = re.sub(rf"--({'|'.join(POSITIONAL)})\b", lambda found: found[1].upper(), message)
    if message.startswith("Problems parsing config"):
        files = re.findall(r"--config[= ](\S+)", " ".join(argv))
        message = message.replace("config", " or ".join(files), 1)
    command = f"{argv[0]} " if argv and argv[0] in COMMANDS else ""
    return f"{message}; see dgsnet {command}--help"


def _fail(message: str, code: int = 2) -> NoReturn:
    print(f"dgsnet: {one_line(message)}", file=sys.stderr)
    sys.exit(code)
