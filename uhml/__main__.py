"""``python -m uhml``."""

import sys

from uhml.cli import main

sys.exit(main())
