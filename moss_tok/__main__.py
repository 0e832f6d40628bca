"""`python -m moss_tok` is `moss-tok`."""

import sys

from moss_tok.cli.main import main

sys.exit(main())
