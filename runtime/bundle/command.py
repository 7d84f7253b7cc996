"""What all commands share: their arguments, their exit statuses, and what -q, -v and --json do to their output.

Nothing here imports more than the standard library, so that `--help` is there at once and needs no package.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from .advice import COMMANDS, command, install_package
from .backend_specs import BACKENDS
from .console import StdoutError, checked, discard_stdout, prepare_console, printable
from .errors import InvalidInputError, RfsqError
from .paths import as_path

DONE, WANTING, UNUSABLE, INTERRUPTED = 0, 1, 2, 130
#: What `--data` reads; docs/datasets.md has more of each.
DATA_FORMATS = ".npz, .npy, HDF5 or LeRobot"


@dataclass(frozen=True)
class Outcome:
    """How a command ends. verdict: its last lines, which -q shows too; document: what --json writes.

    status: DONE, or WANTING where a check failed.
    """

    verdict: str
    document: Any = None
    status: int = DONE


class CommandParser(argparse.ArgumentParser):
    """The parser of one command, with -v, -q and --json; its help ends with the exit statuses.

    name: of COMMANDS, or a script; summary: what the command does, where it is none of COMMANDS; wanting: what status 1
    means, empty where nothing is judged; interrupted: what holds after Ctrl-C, where the KeyboardInterrupt does not say
    it; settings: of argparse.

    >>> parser = CommandParser("selftest", wanting="a check failed")
    >>> parser.add_bundle()
    >>> parser.parse_args(["build/bundle", "-q"]).quiet
    True
    """

    def __init__(
        self, name: str, summary: str = "", *, wanting: str = "", interrupted: str = "", **settings: Any
    ) -> None:
        judged = f"a check failed: {wanting}" if wanting else "not used, nothing is checked"
        super().__init__(
            description=summary or COMMANDS[name].summary,
            epilog=f"exit status: {DONE} done; {WANTING} {judged}; {UNUSABLE} bad input or a missing package, "
            f"as the message says; {INTERRUPTED} interrupted",
            **settings,
        )
        self._name, self.interrupted = name, interrupted
        group = self.add_argument_group("output")
        shown = group.add_mutually_exclusive_group()
        for where, names, text in (
            (shown, ("-v", "--verbose"), "more details, where there are some"),
            (shown, ("-q", "--quiet"), "errors and the verdict alone"),
            (group, ("--json",), "the result as JSON on stdout, all else on stderr"),
        ):
            where.add_argument(*names, action="store_true", default=False, help=text)

    def add_bundle(self, name: str = "bundle", text: str = "") -> None:
        """A bundle to read, positional; `--bundle`, as some commands once had it, says so."""
        self.add_argument(
            name, metavar=name.upper(), type=path_argument, help=text or f"a folder that {command('build')} wrote"
        )
        if name == "bundle":
            self.refuse_former("--bundle", lambda: f"the bundle is given first, without --bundle: {self._needed()}")

    def _needed(self) -> str:
        """The command with all that it cannot do without."""
        parts = [
            " ".join([*action.option_strings[:1], str(action.metavar)]) for action in self._actions if action.required
        ]
        return command(self._name, " ".join(parts))

    def add_data(
        self, *spellings: str, text: str = "", default: str = "the embedded demonstrations", required: bool = False
    ) -> None:
        """`--data F`, and what chooses from it. spellings: other names of --data; default: what it stands for."""
        what = text or f"recorded actions in the robot's units: {DATA_FORMATS}"
        self.add_argument(
            "--data",
            *spellings,
            dest="data",
            type=path_argument,
            metavar="F",
            required=required,
            help=what if required else f"{what}; default: {default}",
        )
        self.add_argument("--key", metavar="NAME", help="action array or column of --data; default: the usual names")
        self.add_argument("--filter-key", metavar="NAME", help="episodes that this filter of a robomimic file lists")

    def add_output(self, text: str, default: Path | None = None, *, required: bool = False) -> None:
        """`--output`, what is written, and `--overwrite`. text: says what it is, and the default where it has one."""
        given: dict[str, Any] = {} if default is None else {"default": default}
        said = text if default is None else f"{text}; default: {default}"
        self.add_argument("--output", type=path_argument, metavar="PATH", required=required, help=said, **given)
        self.add_argument("--overwrite", action="store_true", help="replace what is there")

    def add_checkpoint(self, **settings: Any) -> None:
        """`--checkpoint`, and how to read what it does not say. settings: of argparse."""
        self.add_argument(
            "--checkpoint", type=path_argument, metavar="F", help="default: the embedded robust one", **settings
        )
        self.add_argument(
            "--use-layernorm",
            action=argparse.BooleanOptionalAction,
            help="how a checkpoint that does not say it was trained: by normalised residuals (robust), or not (naive)",
        )
        self.add_argument(
            "--weights",
            metavar="NAME",
            help="which model of a checkpoint that holds several, such as ema; default: the model, no average",
        )

    def add_backend(self, default: str = "auto, the fastest that works here", *, has_auto: bool = True) -> None:
        """`--backend`, one of all, or `auto`. default: in words; without `auto` it is None."""
        names, given = (("auto", *BACKENDS), "auto") if has_auto else (tuple(BACKENDS), None)
        said = f"of {', '.join(names)}; default: {default}"
        self.add_argument("--backend", choices=names, default=given, metavar="NAME", help=said)

    def add_backends(self, default: str) -> None:
        """`--backend`, several of all; `--backends` is the same. default: in words."""
        said = f"of {', '.join(BACKENDS)}; default: {default}"
        self.add_argument(
            "--backend", "--backends", dest="backends", nargs="+", choices=tuple(BACKENDS), metavar="NAME", help=said
        )

    def add_settings(self, settings: object, texts: Mapping[str, str]) -> None:
        """Options with the names, types and defaults of settings. texts: what to say of each, by its name."""
        for name, text in texts.items():
            default = getattr(settings, name)
            self.add_argument(
                f"--{name.replace('_', '-')}",
                type=type(default),
                default=default,
                metavar={int: "N", float: "X"}.get(type(default), "NAME"),
                help=f"{text}; default: %(default)s",
            )

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        # argparse itself would name the class, and not the choices.
        if isinstance(action.type, type) and issubclass(action.type, StrEnum) and arg_string not in list(action.type):
            raise argparse.ArgumentError(action, f"{arg_string!r} is not known; expected {', '.join(action.type)}")
        return super()._get_value(action, arg_string)

    def refuse_former(self, option: str, advice: str | Callable[[], str]) -> None:
        """An option of former versions ends the command; advice: what is given in its place, or what says it."""
        self.add_argument(
            option, action=_Former, dest=argparse.SUPPRESS, const=advice, nargs="?", help=argparse.SUPPRESS
        )


class _Former(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        parser.error(self.const() if callable(self.const) else self.const)


def refuse_idle_choices(options: argparse.Namespace) -> None:
    """Raises InvalidInputError for `--key` or `--filter-key` without the `--data` that they would choose from."""
    given = vars(options)
    for name in ("key", "filter_key"):
        if given.get("data") is None and given.get(name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise InvalidInputError(
                f"{flag} chooses from --data, which is not given; give --data too, or leave {flag} out"
            )


def path_argument(text: str) -> Path:
    """For argparse: a path with `~` expanded, which a shell leaves as it is in `--output=~/x`."""
    return as_path(text, "it", argparse.ArgumentTypeError)


def positive(text: str) -> int:
    """For argparse: a number from 1 up."""
    return _at_least(text, 1)


def natural(text: str) -> int:
    """For argparse: a number from 0 up."""
    return _at_least(text, 0)


def _at_least(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of {least} or more")
    return int(text)


def run(
    parser: CommandParser, work: Callable[[argparse.Namespace], Outcome], arguments: Sequence[str] | None = None
) -> int:
    """Parse, work, show how it ended, and return the exit status.

    work: prints for people, and returns how it ended. Raises SystemExit for arguments that cannot be used, and whatever
    is a fault of the program.
    """
    options = parser.parse_args(arguments)
    try:
        with _streams(is_quiet=options.quiet, has_document=options.json), _interrupts_between_imports():
            outcome = work(options)
        with contextlib.redirect_stdout(checked(sys.stdout)):
            _show(outcome, has_document=options.json)
    except KeyboardInterrupt as interrupt:
        state = str(interrupt) or parser.interrupted
        return _end(f"interrupted{state and '; '}{state}", INTERRUPTED)
    except ImportError as error:
        advice = explanation(error, work.__module__)
        if not advice:
            raise
        return _end(advice, UNUSABLE)
    except RfsqError as error:
        if isinstance(error, StdoutError):
            discard_stdout()
        return _end(f"error: {error}", error.exit_status)
    except MemoryError as error:
        return _end(f"error: out of memory: {error or 'nothing is left'}; ask for less at once", UNUSABLE)
    except OSError as error:
        where = error.filename or "a file"
        return _end(f"error: cannot use {where}: {error.strerror or error}; choose another folder or file", UNUSABLE)
    return outcome.status


def _show(outcome: Outcome, *, has_document: bool) -> None:
    if has_document:
        print(json.dumps(_finite(outcome.document), indent=1, allow_nan=False))
    elif outcome.verdict:
        print(printable(outcome.verdict))
    sys.stdout.flush()


@contextlib.contextmanager
def _interrupts_between_imports() -> Iterator[None]:
    """Ctrl-C during an import is raised after it: modules of Cython swallow it, numpy's among them."""

    def interrupt(_number: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
                signal.setitimer(signal.ITIMER_REAL, 0.05)
                return
            frame = frame.f_back
        raise KeyboardInterrupt

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGALRM)}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _streams(*, is_quiet: bool, has_document: bool) -> Iterator[None]:
    """Where the lines for people go: to stdout, beside a document to stderr, and with -q nowhere."""
    with contextlib.ExitStack() as stack:
        if is_quiet:
            nowhere = stack.enter_context(Path(os.devnull).open("w", errors="replace"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        else:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr if has_document else checked(sys.stdout)))
        yield


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _end(message: str, status: int) -> int:
    print(printable(message), file=sys.stderr)
    return status


def explanation(error: BaseException, started: str = "") -> str:
    """What to say where a package is missing that this project advises to install; empty for anything else.

    started: the module of the command.
    """
    module = (error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
    advice = install_package(module, started)
    return advice and f"error: this command needs {module}, which cannot be imported ({error}); {advice}"


def run_command(module: str) -> NoReturn:
    """For a script of its own: end with the status that `main` of `module` returns."""
    end_with(lambda: import_module(module).main(), module)


def end_with(main: Callable[[], Any], module: str = "") -> NoReturn:
    """End the process with the status that `main`, of `module`, returns, once all that it has printed is written.

    A fault of the program is a traceback and no verdict: Python's own status for it would be WANTING.
    """
    prepare_console()
    try:
        with contextlib.redirect_stdout(checked(sys.stdout)):
            try:
                status = main()
            except SystemExit as ended:
                status = ended.code
            sys.stdout.flush()
    except KeyboardInterrupt:
        status = _end("interrupted", INTERRUPTED)
    except StdoutError as error:
        discard_stdout()
        status = _end(f"error: {error}", UNUSABLE)
    except Exception as error:
        advice = explanation(error, module)
        if not advice:
            traceback.print_exc()
        status = _end(advice or "error: this is a fault of the program; please report the lines above", UNUSABLE)
    sys.exit(status)
