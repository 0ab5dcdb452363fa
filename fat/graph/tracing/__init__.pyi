from .capture import trace as trace
