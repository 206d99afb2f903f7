"""`python -m bert_fast` is `bert-fast`."""

import sys

from bert_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
