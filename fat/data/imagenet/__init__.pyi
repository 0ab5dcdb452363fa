from .subset import choose as choose
