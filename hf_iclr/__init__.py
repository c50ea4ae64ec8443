"""The six ICLR 2025 award papers as drop-in parts of the Hugging Face stack."""

import lazy_loader

from hf_iclr import _register


__version__ = "0.1.0"

# The public names stand in __init__.pyi; each is imported on first use, so this costs neither torch nor transformers.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

_register.install()
