"""`python -m amed_core`."""

import sys

from .tools.command_line import main

if __name__ == "__main__":
    sys.exit(main())
