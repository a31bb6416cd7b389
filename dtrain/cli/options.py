"""Options that several verbs share, so that one word means one thing everywhere.

Each but ``-o`` can also come from the environment, as ``DTRAIN_`` and the option's name.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

DEFAULT_PREFIX = "/dtrain"
DEFAULT_DATA_DIR = ".dtrain"
UPLOAD_CAP_MIN_MIB_PER_S = 1.0  # below it a slice would wait so long that servers take its sender for dead

# torchrun's flags come with either spelling: --nproc_per_node and --nproc-per-node.
EITHER_DASH: dict[str, Any] = {"token_normalize_func": lambda token: token.replace("_", "-")}


def etcd_option(required: bool = False) -> Callable[[Command], Command]:
    return click.option(
        "--etcd",
        envvar="DTRAIN_ETCD",
        metavar="HOST:PORT[,...]",
        required=required,
        help="Endpoints of etcd, separated by commas." + ("" if required else " Without it: this machine alone."),
    )


def prefix_option(command: Command) -> Command:
    return click.option(
        "--prefix", envvar="DTRAIN_PREFIX", default=DEFAULT_PREFIX, show_default=True, help="Where dtrain's keys begin."
    )(command)


def data_dir_option(command: Command) -> Command:
    return click.option(
        "--data-dir",
        envvar="DTRAIN_DATA_DIR",
        type=click.Path(file_okay=False),
        default=DEFAULT_DATA_DIR,
        show_default=True,
        help="The data folder of runs on this machine.",
    )(command)


def upload_cap_option(command: Command) -> Command:
    return click.option(
        "--upload-mib-per-s",
        envvar="DTRAIN_UPLOAD_MIB_PER_S",
        type=click.FloatRange(UPLOAD_CAP_MIN_MIB_PER_S),
        metavar="N",
        help="MiB a second that a worker's uploads may take together. Default: as fast as they go.",
    )(command)


def output_option(command: Command) -> Command:
    return click.option(
        "-o",
        "--output",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        help="Words for people, or JSON for programs.",
    )(command)


def cluster_options(command: Command) -> Command:
    """--etcd, --prefix, --data-dir: which cluster a verb talks to."""
    return etcd_option()(prefix_option(data_dir_option(command)))
