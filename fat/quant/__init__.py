"""Quantization: observers → range estimators → thresholds → quantizers and quantized layers.

Observers collect statistics of a tensor, range estimators turn statistics into an initial range,
and thresholds turn the range and trained factors into scale and zero point.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
