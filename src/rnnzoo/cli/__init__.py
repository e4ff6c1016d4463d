"""The `rnnzoo` command: exit codes, errors on one line, and commands that are imported only when called.

Exit codes: 0 done, 1 the run failed, 2 wrong usage, 130 stopped by Ctrl-C. An error is one line on stderr; with
RNNZOO_DEBUG=1 the traceback stands before it.
"""

from __future__ import annotations

import errno
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import click

from ..kernels.errors import RnnzooError
from .lazy import LazyGroup

__all__ = ["main", "rnnzoo"]

COMMANDS = {
    "list": "Architectures, recipes, and the kernels of this machine.",
    "plan": "What a conversion would do and cost; nothing is run.",
    "convert": "Turn a Transformer into a recurrent model.",
    "train": "Train an architecture from scratch on text.",
    "eval": "Measure a model, against its teacher and a bounded cache.",
    "import": "Take in a checkpoint of another implementation.",
    "export": "Write a model as another implementation's checkpoint.",
    "card": "Write the model card from what was measured.",
    "save": "Copy a model, with its code on request.",
    "push": "Upload a model to the Hub, with card and code.",
    "generate": "Continue a prompt, or answer it, as a stream of text.",
    "demo": "A local page: the model at work beside its teacher.",
    "bench": "Time the kernels against what else is installed.",
    "env": "Versions, devices, and why each kernel backend is (not) chosen.",
}


@click.group(
    cls=LazyGroup,
    commands_help=COMMANDS,
    package=__name__,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(None, "--version", package_name="rnnzoo", message="rnnzoo %(version)s")
def rnnzoo() -> None:
    """Turn a pretrained Transformer into a recurrent language model that loads with AutoModel.

    Exit codes: 0 done, 1 the run failed, 2 wrong usage, 130 stopped by Ctrl-C. RNNZOO_DEBUG=1 shows tracebacks.
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave the process with its exit code.

    Args:
        arguments: what stands after `rnnzoo`; None takes it from the process.
    """
    sys.exit(_run(list(sys.argv[1:] if arguments is None else arguments)))


def _run(arguments: list[str]) -> int:
    try:
        code = rnnzoo.main(arguments, prog_name="rnnzoo", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.UsageError as error:
        return _usage(error)
    except click.ClickException as error:
        return _fail(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        return _interrupted(arguments)
    except BrokenPipeError:
        return _broken_pipe()
    except RnnzooError as error:
        return _fail(str(error))
    except OSError as error:
        if error.errno == errno.EPIPE:
            return _broken_pipe()
        return _fail(_describe_os_error(error))
    except Exception as error:
        return _fail(f"{type(error).__name__}: {error}", unexpected=True)


def _fail(message: str, *, unexpected: bool = False) -> int:
    if os.environ.get("RNNZOO_DEBUG"):
        traceback.print_exc()
    elif unexpected:
        message += " (RNNZOO_DEBUG=1 shows where)"
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 1


def _usage(error: click.UsageError) -> int:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return 2
    command = error.ctx.command_path if error.ctx is not None else "rnnzoo"
    print(f"error: {' '.join(error.format_message().split())} See `{command} --help`.", file=sys.stderr)
    return 2


def _interrupted(arguments: list[str]) -> int:
    message = "stopped"
    if arguments[:1] in (["convert"], ["train"], ["eval"], ["push"]):
        # --restart would throw away what this run has reached.
        again = [argument for argument in arguments if argument != "--restart"]
        message += f"; the same command goes on from here: rnnzoo {shlex.join(again)}"
    print(f"\n{message}", file=sys.stderr)
    return 130


def _broken_pipe() -> int:
    # Whoever reads stdout has gone (`rnnzoo list | head`): what Python flushes at exit must go nowhere, without a word.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _describe_os_error(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return f"The disk is full{_at(error)}; free some space and run the same command again."
    if isinstance(error, PermissionError):
        return f"No permission to write or read{_at(error)}; choose another folder or change its permissions."
    return str(error)


def _at(error: OSError) -> str:
    return f" at {error.filename}" if error.filename else ""
