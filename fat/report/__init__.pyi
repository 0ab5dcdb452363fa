from .records import Run as Run
from .records import Sweep as Sweep
from .records import read_run as read_run
from .records import read_sweep as read_sweep
from .run_page import write_run as write_run
from .sweep_page import write_sweep as write_sweep
