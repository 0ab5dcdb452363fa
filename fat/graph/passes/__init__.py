"""Graph passes, each changing one graph in place.

:func:`fat.prepare` applies them in this order:

1. :func:`fold_batch_norms`: fold batch norms and per-channel factors into layers;
2. :func:`equalize`: balance the ranges of channels by the methods of ``spec.equalize``;
3. :func:`insert_quantizers`: replace layers by quantized ones and insert activation quantizers.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
