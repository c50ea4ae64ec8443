"""The squeezing effect of DPO (https://huggingface.co/papers/2407.10490): begin with trainer.py, then probes.py."""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
