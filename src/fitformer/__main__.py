"""`python -m fitformer` is `fitformer`."""

import sys

from fitformer.cli import main

sys.exit(main())
