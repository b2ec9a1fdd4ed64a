"""`python -m planlm`, and `torchrun -m planlm`."""

import sys

from planlm.cli import main

sys.exit(main())
