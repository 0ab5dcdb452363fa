"""Passes over the graph of a network: trace, fold, equalize, insert."""
