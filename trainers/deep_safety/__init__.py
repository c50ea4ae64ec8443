"""SFT that keeps a model's refusals (https://huggingface.co/papers/2406.05946): begin with trainer.py."""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
