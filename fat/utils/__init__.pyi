from .errors import FatError as FatError
