"""Edits facts of language models and concepts of pipelines, keeps updates in a null space: begin with alpha_edit."""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
