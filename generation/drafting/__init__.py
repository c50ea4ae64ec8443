"""A small draft model made of the large model's own weights: begin with draft_model.py."""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
