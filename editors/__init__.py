"""What edits models: facts in language models, concepts in text-to-image models, and updates kept in a null space."""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
