"""Knowledge edits in a null space (https://huggingface.co/papers/2410.02355): begin with editor.py."""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
