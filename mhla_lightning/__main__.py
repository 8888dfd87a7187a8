"""Run `python -m mhla_lightning`."""

import sys

from mhla_lightning.cli.main import main

sys.exit(main())
