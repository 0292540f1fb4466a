"""The command line: options in, one line out for whatever is wrong with them. What a command does is in `commands`.

Nothing heavy is imported here, so that ``--help`` and errors of spelling come at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

from swiftsure.errors import InputError, SoundnessError
from swiftsure.suggestion import unknown

USAGE_ERROR, INTERRUPTED = 2, 130


class Parser(ArgumentParser):
    """A parser whose errors are an InputError of one line, with the nearest option for an unknown one."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what argparse would print.

        Raises:
            InputError: always.
        """
        raise InputError(self._in_words(" ".join(message.split())))

    def _in_words(self, message: str) -> str:
        known = [option for action in self._actions for option in action.option_strings]
        if message.startswith("unrecognized arguments: "):
            given = message.removeprefix("unrecognized arguments: ").split()[0].partition("=")[0]
            if not given.startswith("-"):
                return f"unexpected argument {given!r}; {self._see_help()}"
            return f"{unknown('option', given, known)}; {self._see_help()}"
        if message.startswith("the following arguments are required: "):
            missing = message.removeprefix("the following arguments are required: ").split(", ")
            shown = " and ".join(str(action.metavar) for action in self._actions if action.dest in missing)
            return f"{shown} is missing; {self._see_help()}"
        option, _, fault = message.removeprefix("argument ").partition(": ")
        for theirs, ours in (
            ("expected one argument", "a value is missing"),
            ("ignored explicit argument", "it takes no value, and was given"),
        ):
            fault = fault.replace(theirs, ours)
        return f"{option}: {fault}"

    def _see_help(self) -> str:
        return f"see `{self.prog} --help`"


@dataclass(frozen=True)
class Command:
    """One command: where it stands in the overview, what it does, an example, and its options."""

    group: str
    summary: str
    example: str
    options: Sequence[Callable[[ArgumentParser], None]]


def _argument(*names: str, **settings: Any) -> Callable[[ArgumentParser], None]:
    def add(parser: ArgumentParser) -> None:
        parser.add_argument(*names, **settings)

    return add


def _count(value: str | int) -> int:
    """A number of samples; jsonargparse passes it through twice, as text and as the number that it became.

    Raises:
        argparse.ArgumentTypeError: it is no integer >= 1.
    """
    text = str(value)
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of samples; allowed: an integer >= 1")
    return int(text)


def _whole(value: str | int) -> int:
    """A whole number, 0 included.

    Raises:
        argparse.ArgumentTypeError: something else.
    """
    text = str(value)
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of samples; allowed: an integer >= 0")
    return int(text)


def _number(value: str | float) -> float:
    """A number.

    Raises:
        argparse.ArgumentTypeError: something else.
    """
    try:
        return float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is no number; allowed: such as 5e6") from None


def _numbers(value: str | Sequence[float]) -> list[float]:
    """Numbers with commas between them; jsonargparse passes them through twice, as text and as what it became.

    Raises:
        argparse.ArgumentTypeError: something else.
    """
    if not isinstance(value, str):
        return list(value)
    try:
        return [float(part) for part in value.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{value!r} is no list of numbers; allowed: such as 0.1,0.5"
        ) from None


_RUN = _argument("run", metavar="RUN", help="a run directory, as `swiftsure train` writes it")
_DEVICE = _argument(
    "--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps (default: auto)"
)
_DATA = _argument(
    "--data",
    metavar="ROOT",
    help="where the data sets lie (default: $SWIFTSURE_DATA, else ~/.cache/swiftsure)",
)
_MODEL = _argument(
    "--model",
    metavar="MODULE:FUNCTION",
    help="your builder of the network, for one that no name is registered for",
)
_SUITE = _argument("--suite", metavar="NAME", help="quick, standard, full or rdi (default: the recipe's)")
_TRANSFER = _argument(
    "--transfer",
    action="append",
    default=[],
    metavar="RUN",
    help="another network for the same images, to attack from as well; repeatable",
)
_GUARDS = _argument(
    "--guards",
    type=_whole,
    metavar="N",
    help="samples that the guards of the attacks ask about, 0 for no guards (default: the recipe's)",
)
_METHOD = _argument(
    "--method",
    metavar="NAME",
    help="interval, crown-ibp, symbolic, crown, alpha-crown, or auto: all in turn (default: the recipe's)",
)
_MEMORY = _argument(
    "--memory",
    metavar="SIZE",
    help="what bounds may hold at once, such as 4GB (default: half of what is free, at most 1GiB)",
)
_MEASURED = (
    _RUN,
    _argument(
        "--limit", type=_count, metavar="N", help="the first N test images (default: the recipe's, else all)"
    ),
    _argument(
        "--eps", metavar="EPS", help="another radius, in pixel units: 0.1 or 8/255 (default: the recipe's)"
    ),
    _DEVICE,
    _DATA,
    _MODEL,
)
_NAME = _argument("name", metavar="NAME", help="a data set, as `swiftsure data list` names it")

COMMANDS = {
    "demo": Command(
        "Start here",
        "train, attack, certify and report a network for 8x8 digits, in under 3 minutes",
        "swiftsure demo",
        (
            _argument(
                "--out", default="runs/demo", metavar="RUN", help="the run directory (default: runs/demo)"
            ),
        ),
    ),
    "train": Command(
        "Train",
        "train a recipe into a run directory",
        "swiftsure train recipes/digits_mixtrain.yaml --set loss.k=2 --out runs/mine",
        (
            _argument(
                "recipe",
                metavar="RECIPE",
                help="a YAML file, or the name of one that comes with swiftsure",
            ),
            _argument(
                "--set",
                action="append",
                default=[],
                metavar="KEY=VALUE",
                help="change a key of the recipe; repeatable",
            ),
            _argument("--out", metavar="RUN", help="a new folder (default: runs/<the recipe's name>)"),
            _argument("--resume", action="store_true", help="go on with an interrupted training"),
            _DEVICE,
            _DATA,
            _MODEL,
        ),
    ),
    "evaluate": Command(
        "Measure",
        "attack, certify and measure on the same images, then write the page",
        "swiftsure evaluate runs/demo --limit 1000",
        (*_MEASURED, _SUITE, _TRANSFER, _GUARDS, _METHOD, _MEMORY),
    ),
    "attack": Command(
        "Measure",
        "the accuracy that is left under a suite of attacks",
        "swiftsure attack runs/demo --suite standard",
        (*_MEASURED, _SUITE, _TRANSFER, _GUARDS),
    ),
    "certify": Command(
        "Measure",
        "the accuracy that is proven, and a certificate for each image",
        "swiftsure certify runs/demo --method symbolic",
        (*_MEASURED, _METHOD, _MEMORY),
    ),
    "measure": Command(
        "Measure",
        "multiply-adds, parameters and milliseconds an image",
        "swiftsure measure runs/demo",
        _MEASURED,
    ),
    "calibrate": Command(
        "Deploy",
        "fit the thresholds of a network's exits on held-out images",
        "swiftsure calibrate runs/mine --macs 5e6",
        (
            _RUN,
            _argument(
                "--macs",
                type=_number,
                metavar="NUMBER",
                help="mean multiply-adds an image may cost (default: equally many images leave at each exit)",
            ),
            _argument(
                "--certified-macs",
                type=_number,
                metavar="NUMBER",
                help="mean of the proven worst-case multiply-adds, for the best verified accuracy within them",
            ),
            _argument(
                "--forced-macs",
                type=_number,
                metavar="NUMBER",
                help="mean multiply-adds that attacks on the cost may force on held-out images, for the best accuracy",
            ),
            _argument(
                "--attacked",
                action="store_true",
                help="with --macs or --forced-macs: the best accuracy under attacks on each exit as well",
            ),
            _argument(
                "--thresholds", type=_numbers, metavar="LIST", help="by hand: one for each exit but the last"
            ),
            _argument("--policy", metavar="NAME", help="entropy or confidence (default: the recipe's)"),
            _DEVICE,
            _DATA,
            _MODEL,
        ),
    ),
    "predict": Command(
        "Deploy",
        "label, exit and cost of image files; with --eps a proof as well",
        "swiftsure predict runs/mine image.png",
        (
            _RUN,
            _argument("images", nargs="+", metavar="IMAGE", help="image files of the network's size"),
            _argument("--eps", metavar="EPS", help="certify each answer within this radius: 0.1 or 8/255"),
            _METHOD,
            _DEVICE,
            _MODEL,
        ),
    ),
    "recheck": Command(
        "Measure",
        "prove the certificates of a run again, by plain reference code in float64, and compare",
        "swiftsure recheck runs/demo --limit 100",
        (
            _RUN,
            _argument(
                "--limit",
                type=_count,
                metavar="N",
                help="the first N certificates (default: all). For an image of mnist_small one core takes 1 ms by "
                "intervals, 12 ms by CROWN; a network with other operations than affine ones and ReLU is bounded "
                "again as certify does it, in float64",
            ),
            _DEVICE,
            _DATA,
            _MODEL,
            _MEMORY,
        ),
    ),
    "report": Command(
        "Report",
        "one page of one run, or of several side by side",
        "swiftsure report runs/demo runs/mine --out page.html",
        (
            _argument("runs", nargs="+", metavar="RUN", help="run directories"),
            _argument("--out", default="report.html", metavar="PAGE", help="the file (default: report.html)"),
        ),
    ),
    "record": Command(
        "Report",
        "a record of a run as RobustBench keeps them, in JSON or as a row of a table",
        "swiftsure record runs/demo --about name=mine --row",
        (
            _RUN,
            _argument(
                "--about",
                action="append",
                default=[],
                metavar="KEY=VALUE",
                help="what a run does not know: link, name, authors, venue, additional_data, reported or footnote",
            ),
            _argument("--row", action="store_true", help="a row of a markdown table, with its head"),
        ),
    ),
    "data list": Command(
        "Data", "the data sets, and which of them are there", "swiftsure data list", (_DATA,)
    ),
    "data path": Command(
        "Data", "the folder that holds a data set", "swiftsure data path mnist", (_NAME, _DATA)
    ),
    "data fetch": Command(
        "Data", "download a data set from its public home", "swiftsure data fetch mnist", (_NAME, _DATA)
    ),
}

_FAMILIES = tuple(dict.fromkeys(name.partition(" ")[0] for name in COMMANDS if " " in name))
_HELP = ("-h", "--help", "help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 2 for an error of use or a broken certificate, 130 for Ctrl-C."""
    try:
        code = _dispatch(list(sys.argv[1:] if arguments is None else arguments))
        # Here rather than at exit, where a closed pipe could no longer be caught.
        sys.stdout.flush()
        return code
    except (InputError, SoundnessError) as error:
        print(f"swiftsure: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt as interrupt:
        hint = str(interrupt) or "run the same command again"
        print(f"swiftsure: interrupted; {hint}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe (head, less) has gone; Python must not complain about that at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f"cannot use {error.filename}: " if error.filename else ""
        print(f"swiftsure: {where}{error.strerror or error}", file=sys.stderr)
        return USAGE_ERROR


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in _HELP:
        print(overview(), end="")
        return 0
    if words[0] == "--version":
        from swiftsure import __version__

        print(f"swiftsure {__version__}")
        return 0
    if words[0] in _FAMILIES and words[1:2] and words[1] in _HELP:
        print(overview(words[0]), end="")
        return 0
    name, rest = _command(words)
    try:
        options = parser(name).parse_args(rest)
    except SystemExit:  # after --help
        return 0
    from swiftsure import commands

    run: Callable[[Namespace], int | None] = getattr(commands, name.replace(" ", "_"))
    return run(options) or 0


def parser(name: str) -> Parser:
    """The parser of one command's options."""
    command = COMMANDS[name]
    made = Parser(
        prog=f"swiftsure {name}",
        description=f"{command.summary[0].upper()}{command.summary[1:]}.",
        epilog=f"example:\n  {command.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for add in command.options:
        add(made)
    return made


def overview(family: str = "") -> str:
    """What ``swiftsure --help`` prints: every command, grouped, with an example; or those of one family."""
    shown = {name: command for name, command in COMMANDS.items() if name.startswith(family)}
    lines = ["swiftsure: image classifiers that are swift and sure", "", "usage: swiftsure COMMAND [options]"]
    width = max(map(len, shown))
    for group in dict.fromkeys(command.group for command in shown.values()):
        lines += ["", f"{group}:"]
        for name, command in shown.items():
            if command.group == group:
                lines += [f"  {name:<{width}}  {command.summary}", f"  {'':<{width}}    $ {command.example}"]
    lines += [
        "",
        "`swiftsure COMMAND --help` lists a command's options; `swiftsure --version` says which this is.",
        "",
    ]
    return "\n".join(lines)


def _command(words: list[str]) -> tuple[str, list[str]]:
    """The command that the words begin with, and the words left."""
    first = words[0]
    if first not in _FAMILIES:
        if first not in COMMANDS:
            raise InputError(
                unknown("command", first, [name for name in COMMANDS if " " not in name] + [*_FAMILIES])
            )
        return first, words[1:]
    actions = [name.partition(" ")[2] for name in COMMANDS if name.startswith(f"{first} ")]
    if len(words) == 1:
        raise InputError(f"`swiftsure {first}` needs one of: {', '.join(actions)}")
    if words[1] not in actions:
        raise InputError(unknown(f"command of `swiftsure {first}`", words[1], actions))
    return f"{first} {words[1]}", words[2:]


if __name__ == "__main__":
    sys.exit(main())
