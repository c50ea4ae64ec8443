"""What trains: SFT that keeps an alignment, DPO that watches itself, and the measurements that belong to them."""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
