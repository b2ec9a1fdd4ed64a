"""`python -m planlm`, and `torchrun -m planlm`."""

import contextlib
import os
import sys

from planlm.cli import main
from planlm.errors import InputError
from planlm.ranks import world_size

status = main()
with contextlib.suppress(InputError):  # which `main` has told
    if world_size() > 1:  # gloo's threads may abort a process that ends as usual
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
sys.exit(status)
