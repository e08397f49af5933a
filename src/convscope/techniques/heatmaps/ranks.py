"""Similarity of two maps, independent of their scales."""

from __future__ import annotations

import numpy as np


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's rank correlation of two arrays; 0 where one of them is constant."""
    ranks = [_ranks(np.asarray(values, np.float64).ravel()) for values in (one, other)]
    centred = [rank - rank.mean() for rank in ranks]
    size = np.linalg.norm(centred[0]) * np.linalg.norm(centred[1])
    return float(centred[0] @ centred[1] / size) if size > 0 else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    """The rank of each value; equal ones share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]
