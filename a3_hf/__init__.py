"""A3: any-order generation from a pretrained LLaMA. Importing it registers `a3_llama` and the controls
`decoupled_rope_llama` and `masked_diffusion_llama` with the Auto classes.
"""

import sys
from importlib import import_module

# The console script `a3` delays the registration until a command runs; a3_command.py says why.
if "a3_command" not in sys.modules:
    from .registration import *  # noqa: F403
    from .registration import __all__ as __all__
else:

    def __getattr__(name: str):
        return getattr(import_module(".registration", __name__), name)
