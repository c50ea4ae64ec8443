"""Promptable segmentation of images and videos (https://huggingface.co/papers/2408.00714): begin with session.py."""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
