"""Concepts of text-to-image models replaced in closed form: begin with editor.py."""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
