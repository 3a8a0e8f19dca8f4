"""`python -m fitformer.cli`: the command line without its script."""

import sys

from fitformer.cli import main

sys.exit(main())
