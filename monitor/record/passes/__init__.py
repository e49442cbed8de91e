"""Fused reductions: pure tensor functions that read a tensor once and return a small vector of sufficient statistics.

Each file defines ``STATS``, the names of what it returns, and, where several micro-batches make one step, ``MERGE``,
how two vectors of them become one. Passes know nothing of hooks, rows or files.
"""
