"""``python -m timm_reparam``, the same as ``timm-reparam``."""

import sys

from .cli import main

if __name__ == '__main__':
    sys.exit(main())
