"""``python -m embcomp.cli``."""

import sys

from embcomp.cli.main import main

sys.exit(main())
