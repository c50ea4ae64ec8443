"""What a model refuses, how deep its refusals go and what undoes them: begin with audit.py."""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
