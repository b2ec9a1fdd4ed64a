"""`python -m planlm`, and `torchrun -m planlm`."""

import os
import sys

from planlm.cli import main

status = main()
if os.environ.get("WORLD_SIZE") not in (None, "", "1"):  # gloo's threads may abort a process that ends as usual
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
sys.exit(status)
