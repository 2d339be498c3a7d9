import sys

from relssl.cli import main

if __name__ == "__main__":
    sys.exit(main())
