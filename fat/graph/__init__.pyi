from .partition import block_outputs as block_outputs
from .partition import cut_points as cut_points
from .partition import segment as segment
