"""``python -m dtrain``: the same as the ``dtrain`` command."""

import sys

from dtrain.cli.main import main

sys.exit(main())
