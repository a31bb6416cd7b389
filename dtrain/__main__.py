"""``python -m dtrain``: the same as the ``dtrain`` command, and how a run starts its services."""

import sys

from dtrain.cli.main import main
from dtrain.standalone.parents import bind_to_parent

bind_to_parent()
sys.exit(main())
