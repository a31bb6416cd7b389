"""The ``dtrain`` command: its verbs, and the one place where an error becomes words and an exit code.

A person who asks for help must not wait for grpc or torch, so a verb's file is imported only when that verb
is run, and the short help of every verb stands here.

Exit codes:

====  ===================================================================================
0     done; for ``run``: the job succeeded
1     something failed that the person did not cause; for ``run`` often the job's own code
2     what was asked for cannot be done; one sentence on stderr names the mend
3     for ``worker``: another one has taken its name, and would lose it again to a restart
130   Ctrl-C
====  ===================================================================================

``run`` ends with the exit code of the job, whatever that is.
"""

import errno
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from dtrain import __version__
from dtrain.common.errors import DisplacedError, DtrainError, PermanentError, UserError
from dtrain.common.leaving import leave

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_DISPLACED = 3
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count

_A_PERSONS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOENT, errno.EEXIST),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL),
}

_VERBS: dict[str, tuple[str, str]] = {
    "run": ("run", "Run a training script and wait for its end, on this machine or on a cluster."),
    "submit": ("run", "Hand a job to a cluster and return at once."),
    "list": ("jobs", "Show all jobs."),
    "status": ("jobs", "Show one job: ranks, steps, metrics, checkpoints, what it waits for."),
    "history": ("history", "Show every decision about a job, and its cause."),
    "logs": ("logs", "Show what the ranks of a job printed."),
    "checkpoint": ("jobs", "Take a checkpoint now and wait until it is committed."),
    "checkpoints": ("keeping", "Show the committed checkpoints of a job, and which are kept."),
    "pin": ("keeping", "Keep a checkpoint whatever the job's --keep options say."),
    "unpin": ("keeping", "Let a pinned checkpoint go."),
    "verify": ("keeping", "Look whether storage still holds a job's checkpoints."),
    "export": ("export", "Write a checkpoint for other programs: one safetensors file, or torch's own format."),
    "cancel": ("jobs", "End a job and wait until it has ended."),
    "workers": ("jobs", "Show the workers of the cluster."),
    "coordinator": ("services", "Serve as a coordinator (or as a standby of one)."),
    "worker": ("services", "Serve as the worker agent of this node."),
    "etcd": ("services", "Look into the etcd of a data folder with etcdctl."),
}


class _LazyGroup(click.Group):
    """A group that knows its verbs by name and imports a verb only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS:
            return None
        module = importlib.import_module(f"dtrain.cli.{_VERBS[cmd_name][0]}")
        command = getattr(module, f"{cmd_name}_command")
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _VERBS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="dtrain")
def dtrain() -> None:
    """Distributed PyTorch training that survives the crash of anything.

    Start here: dtrain run --nproc-per-node 2 --every-seconds 30 train.py
    """


def entry() -> NoReturn:
    """What the ``dtrain`` command is: its process ends with its work, whatever a storage still holds up."""
    leave(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code of the process."""
    try:
        code = dtrain.main(args=argv, prog_name="dtrain", standalone_mode=False)
    except click.exceptions.Exit as exit_request:
        return exit_request.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return EXIT_USER_ERROR
    except click.UsageError as error:
        hint = f" Try '{error.ctx.command_path} --help'." if error.ctx is not None else ""
        return _say(_one_line(error.format_message()) + hint, EXIT_USER_ERROR)
    except click.ClickException as error:
        return _say(_one_line(error.format_message()), EXIT_USER_ERROR)
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output left (`dtrain history | head`). Python would complain again at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except UserError as error:
        code = EXIT_DISPLACED if isinstance(error, DisplacedError) else EXIT_USER_ERROR
        return _say(_one_line(str(error)), code)
    except PermanentError as error:
        # A damaged log or shard: nothing crashed, and the sentence names what to look at.
        return _say(_one_line(str(error)), EXIT_USER_ERROR)
    except DtrainError as error:
        return _say(_one_line(f"{error} (set DTRAIN_TRACEBACK=1 to see where)"), EXIT_FAILED, error)
    except OSError as error:
        # What a person named cannot be used: a folder, a file, where output goes. Services tell theirs (services.py).
        where = f"{error.filename}: " if error.filename else ""
        words = f"{where}{error.strerror or error} (set DTRAIN_TRACEBACK=1 to see where)"
        return _say(_one_line(words), EXIT_USER_ERROR if error.errno in _A_PERSONS else EXIT_FAILED, error)
    return code if isinstance(code, int) else 0


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _say(sentence: str, code: int, error: BaseException | None = None) -> int:
    if error is not None and os.environ.get("DTRAIN_TRACEBACK"):
        raise error
    click.echo(f"dtrain: {sentence}", err=True)
    return code
