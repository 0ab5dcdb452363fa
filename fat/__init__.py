"""FAT: a pretrained network in integers, without labels, in minutes."""

from fat.calibrate import calibrate
from fat.errors import FatError
from fat.pipeline import prepare
from fat.spec import EqualizeSpec, InitSpec, QuantSpec

__all__ = ["EqualizeSpec", "FatError", "InitSpec", "QuantSpec", "calibrate", "prepare"]
