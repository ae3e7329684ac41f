"""Makes ``documents`` importable: the code blocks of the Markdown files, for the tests that run them."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
