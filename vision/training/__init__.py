"""SAM 2 trained on clips with prompts and corrections: begin with trainer.py."""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
