"""Edits facts of language models and concepts of pipelines, and keeps updates in a null space: see alpha_edit first."""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
