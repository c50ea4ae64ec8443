"""What sees: prompts on any frame of a video, corrections that hold, endless streams in constant memory."""

import lazy_loader

from hf_iclr.extras import require


require("vision", __name__)

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
