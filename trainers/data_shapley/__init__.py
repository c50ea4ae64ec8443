"""Data Shapley values of one training run (https://huggingface.co/papers/2406.11011): begin with callback.py."""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
