"""dtrain: distributed PyTorch training that does not lose work.

This is what a training script imports. Nothing heavy is loaded until it is used.
"""

from typing import TYPE_CHECKING, Any

from dtrain.common.version import VERSION as __version__

if TYPE_CHECKING:
    from dtrain.storage import dcp
    from dtrain.storage.codecs import storable
    from dtrain.trainer.run import Run, join

__all__ = ["Run", "__version__", "dcp", "join", "storable"]


def __getattr__(name: str) -> Any:
    if name in ("Run", "join"):
        from dtrain.trainer import run

        return getattr(run, name)
    if name == "storable":
        from dtrain.storage.codecs import storable

        return storable
    if name == "dcp":
        from dtrain.storage import dcp

        return dcp
    raise AttributeError(f"module 'dtrain' has no attribute {name!r}")
