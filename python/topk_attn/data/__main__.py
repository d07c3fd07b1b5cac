"""``python -m topk_attn.data`` is ``topk-data``."""

import sys

from topk_attn.data.cli import main

sys.exit(main())
