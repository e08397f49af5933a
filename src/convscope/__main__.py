"""`python -m convscope`."""

import os
import sys

# `-m` lets the working folder be searched before the libraries, as the command `convscope` does not: a downloaded
# file there must not be imported in the place of one of them.
if not sys.flags.safe_path and sys.path and os.path.abspath(sys.path[0]) == os.getcwd():
    del sys.path[0]

from convscope.cli import main

main()
