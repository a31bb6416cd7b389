"""``python -m dtrain``: the same as the ``dtrain`` command, and how a run starts its services."""

from dtrain.cli.main import entry
from dtrain.standalone.parents import bind_to_parent

bind_to_parent()
entry()
