"""The checkout's root is on the path, so that the tests also run without an installed package."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))
