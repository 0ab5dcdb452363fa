from .batch_norm_folding import FoldReport as FoldReport
from .batch_norm_folding import fold_batch_norms as fold_batch_norms
from .equalization import EqualizeReport as EqualizeReport
from .equalization import PairReport as PairReport
from .equalization import equalize as equalize
from .quantizer_insertion import InsertReport as InsertReport
from .quantizer_insertion import insert_quantizers as insert_quantizers
