"""What every entry point shares: flags, `--help`, and errors as one line with exit status 2.

Nothing here imports jax, so that `--help` and mistakes answer at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import io
import json
import logging
import os
import pathlib
import re
import sys
import typing
from collections.abc import Callable
from typing import NoReturn

import absl.logging
from absl import app, flags

from tpu.errors import UserError
from train.config import Experiment
from train.resolve import resolve
from train.tree import type_name

FLAGS = flags.FLAGS


class _Path(flags.ArgumentParser):
    """A file or directory. A leading ~ is the home: shells leave it as it is after `--workdir=`.

    What is read and written by libraries that have UTF-8 alone must be that here too.
    """

    syntactic_help = "a path"

    def parse(self, argument: str) -> str:
        path = os.path.expanduser(argument)
        if path == "~" or path.startswith("~/"):
            raise ValueError("there is no home directory; write it without ~")
        whole = os.path.abspath(path)
        if not whole.isascii() and (sys.getfilesystemencoding() != "utf-8" or not _is_unicode(whole)):
            raise ValueError("its characters are not those of this locale; set LC_ALL=C.UTF-8, or use plain letters")
        return path


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


PATH = _Path()  # for flags.DEFINE


def define_config() -> flags.FlagHolder:
    """Defines `--config=FILE.py[:ARGUMENT]` with its dotted overrides, `--config.model.layers=12`."""
    from ml_collections import config_flags

    return config_flags.DEFINE_config_file(
        "config",
        help_string="experiment file and its argument, such as configs/gpt2.py:124m; any field of it can be overridden "
        "by a flag of its own, such as --config.model.layers=12",
    )


def run(main: Callable[[], int | None]) -> NoReturn:
    """Parses the flags and runs `main`; exits with what it returns (None is 0), 2 for a UserError, 130 for Ctrl-C."""
    try:
        try:
            app.run(lambda _: _guarded(main), flags_parser=_parse)
        finally:
            sys.stdout.flush()  # Here, for what goes wrong as the interpreter ends nobody can catch.
    except BrokenPipeError:  # The reader of our output, such as `head`, has gone.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def experiment_from_flags() -> Experiment:
    """The resolved experiment of `--config` and its overrides. Raises UserError."""
    if FLAGS.config is None:
        raise UserError(f"--config is missing; give one of {_known_configs()}, or a file of your own")
    if (kind := FLAGS.config.adapter.kind) != "none":
        raise UserError(f"adapter.kind={kind!r}: an adapter needs a base; use train.finetune --checkpoint=BASE")
    return resolve(FLAGS.config)


def need(**values: object) -> None:
    """Raises UserError for the first flag without a value."""
    for name, value in values.items():
        if not value:
            raise UserError(f"--{name} is missing")


def need_writable(**files: str | None) -> None:
    """Raises UserError for the first flag that names a file that cannot be written."""
    for name, file in files.items():
        path = pathlib.Path(file or os.devnull).absolute()
        if not path.parent.is_dir():
            raise UserError(f"{name}={file}: its directory does not exist")
        if path.is_dir():
            raise UserError(f"{name}={file}: is a directory; give the name of a file")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise UserError(f"{name}={file}: cannot be written (permission denied)")


def write_file(name: str, text: str) -> None:
    """Writes `text` to the file that the flag --NAME gives, if it gives one. Raises UserError."""
    if file := FLAGS[name].value:
        try:
            pathlib.Path(file).write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{name}={file}: cannot be written ({error.strerror})") from error


def write_json(tree: object) -> None:
    """Writes `tree` to the file that --json gives, if it gives one. Raises UserError."""
    write_file("json", json.dumps(tree, indent=1))


def _guarded(main: Callable[[], int | None]) -> None:
    _plain_log_lines()
    for stream in (sys.stdout, sys.stderr):  # Texts may hold what the terminal's encoding does not.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = main()
    except UserError as error:
        fail(str(error))
    except (OSError, MemoryError, RuntimeError) as error:
        if exhausted := _exhausted(error):
            fail(exhausted)
        raise
    sys.exit(status or 0)


def _exhausted(error: Exception) -> str:
    """Of which of its means the machine has run out, where that is the error; else nothing."""
    said = (str(error).splitlines() or [""])[0]
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
        return f"{error.filename or 'writing'}: {error.strerror}" if full else ""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in said:  # of jax, whose type is not known here
        return (
            f"out of memory: {said.removeprefix('RESOURCE_EXHAUSTED: ') or 'none was left'}; make the model, its batch "
            "or its context smaller, or spread it over more devices"
        )
    return ""


def _plain_log_lines() -> None:
    """Our own log lines without prefix; those of the libraries only from warnings on."""
    absl.logging.get_absl_handler().setFormatter(logging.Formatter("%(message)s"))
    absl.logging.set_verbosity(absl.logging.WARNING)
    for room in ("model", "serve", "tpu", "train"):
        logging.getLogger(room).setLevel(logging.INFO)


def fail(message: str) -> NoReturn:
    """Prints one line to standard error and exits with status 2."""
    if "No module named 'model.vision_config'" in message:  # as imports wrote it into their experiment.py
        message += "; VisionConfig has moved: write `from model.config import VisionConfig` in that file"
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _parse(argv: list[str]) -> list[str]:
    if any(a in ("--help", "-help", "-h", "--helpfull") for a in argv[1:]):
        main = sys.modules["__main__"]
        shared = FLAGS.module_help(sys.modules[__name__]) if "config" in FLAGS else ""
        print(f"{(main.__doc__ or '').strip()}\n\nflags:\n{FLAGS.module_help(main)}\n{shared}")
        sys.exit(0)
    try:
        for argument in argv[1:]:
            _check_override(argument)
        rest = FLAGS(_with_tuples(argv))
        if len(rest) > 1:
            raise UserError(f"{rest[1]!r} is not a flag; flags begin with --")
        config = FLAGS["config"].value if "config" in FLAGS else None
        if config is not None and not isinstance(config, Experiment):
            raise UserError(f"--config: {_reason(config)}")
        return rest
    except UserError as error:
        fail(str(error))
    except flags.IllegalFlagValueError as error:
        fail(_illegal_value(str(error).strip()))
    except flags.Error as error:
        fail(str(error))
    except Exception as error:  # of the experiment file, while it is read
        fail(f"--config: {type(error).__name__}: {error}")


def _check_override(argument: str) -> None:
    """Raises UserError for a --config file that does not exist and for an override of a field that does not exist."""
    if match := re.fullmatch(r"--?config=([^:]*)(:.*)?", argument):
        if not pathlib.Path(match[1]).is_file():
            raise UserError(f"--config={match[1]}: no such file; there is {_known_configs()}")
    elif match := re.match(r"--?(?:no)?config\.([\w.]+)", argument):
        _field_type(match[1])


def _with_tuples(argv: list[str]) -> list[str]:
    """`argv` with overrides such as `--config.data.sources=a,b` as the tuples of strings that they stand for."""
    argv = list(argv)
    for place, argument in enumerate(argv):
        match = re.fullmatch(r"--?config\.([\w.]+)(?:=(.*))?", argument, re.DOTALL)
        if place == 0 or not match or _field_type(match[1]) != tuple[str, ...]:
            continue
        if match[2] is not None:
            argv[place] = f"--config.{match[1]}={_as_tuple(match[2])}"
        elif place + 1 < len(argv):
            argv[place + 1] = _as_tuple(argv[place + 1])
    return argv


def _as_tuple(text: str) -> str:
    """`a,b` as `('a', 'b')`; what is in brackets or quotes stays as it is."""
    names = [name.strip() for name in text.split(",")]
    return text if text.lstrip().startswith(("(", "[", "'", '"')) or not all(names) else repr(tuple(names))


def _field_type(path: str) -> typing.Any:
    """The declared type of a field of the experiment, such as "model.layers"."""
    hint: typing.Any = Experiment
    walked = "config"
    for name in path.split("."):
        hints = typing.get_type_hints(hint) if dataclasses.is_dataclass(hint) else {}
        if name not in hints:
            close = difflib.get_close_matches(name, hints, 1)
            guess = f"did you mean {close[0]}? " if close else ""
            valid = f"valid: {', '.join(hints)}" if hints else f"{walked} has no fields"
            raise UserError(f"{walked}.{name}: no such field; {guess}{valid}")
        hint, walked = hints[name], f"{walked}.{name}"
    return hint


def _illegal_value(message: str) -> str:
    match = re.match(r"flag --config\.([\w.]+)=(.*?): ", message)
    if not match:  # A failing config file comes with its whole traceback; the last line is the reason.
        return message.splitlines()[-1].removeprefix(f"{UserError.__module__}.{UserError.__name__}: ")
    hint = _field_type(match[1])
    if dataclasses.is_dataclass(hint):
        return f"config.{match[1]}={match[2]}: set one of its fields: {', '.join(typing.get_type_hints(hint))}"
    example = """, such as a,b or "('a', 'b')" """ if hint == tuple[str, ...] else ""
    return f"config.{match[1]}={match[2]}: must be {type_name(hint)}{example}"


def _reason(config: object) -> str:
    """Why a config file did not give an experiment."""
    try:
        config.model  # noqa: B018 (what ml_collections gives instead of a config raises here)
    except UserError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return f"get_config returned a {type(config).__name__}, not a train.config.Experiment"


def _known_configs() -> str:
    return ", ".join(sorted(f"configs/{p.name}" for p in pathlib.Path("configs").glob("[a-z]*.py"))) or "none here"
