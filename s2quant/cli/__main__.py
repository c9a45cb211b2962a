"""`python -m s2quant.cli`."""

import sys

from s2quant.cli import main

sys.exit(main())
