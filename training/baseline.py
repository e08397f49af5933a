"""Classification from colours alone: rules that use six numbers of a patch, and no texture.

The numbers are the mean and the standard deviation of each colour channel.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize
from scipy.spatial import cKDTree
from scipy.special import log_softmax, softmax


def colours(batch: np.ndarray) -> np.ndarray:
    """Mean and spread of each channel of each patch, `(n, 6)`."""
    x = batch.astype(np.float64)
    return np.concatenate([x.mean(axis=(1, 2)), x.std(axis=(1, 2))], axis=1)


def nearest(x: np.ndarray, y: np.ndarray, asked: np.ndarray, k: int) -> np.ndarray:
    """The class that most of the `k` nearest known patches have, `(n,)`."""
    _, found = cKDTree(x).query(asked, k=[*range(1, k + 1)])
    votes = (y[found][..., None] == np.arange(y.max() + 1)).sum(axis=1)
    return votes.argmax(axis=1)


def gaussian(x: np.ndarray, y: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """The class whose normal distribution (own mean and covariance) makes the numbers likeliest, `(n,)`."""
    scores = []
    for label in range(y.max() + 1):
        own = x[y == label]
        covariance = np.cov(own.T) + 1e-3 * np.eye(x.shape[1])
        off = asked - own.mean(axis=0)
        distance = np.einsum("ni,ij,nj->n", off, np.linalg.inv(covariance), off)
        scores.append(-0.5 * (distance + np.linalg.slogdet(covariance)[1]))
    return np.argmax(scores, axis=0)


def logistic(x: np.ndarray, y: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Multinomial logistic regression on the numbers, their squares and products, `(n,)`."""
    x, asked = expand(x), expand(asked)
    classes = int(y.max()) + 1
    truth = np.eye(classes)[y]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(-1, classes)
        scores = x @ weights
        value = -(log_softmax(scores, axis=1) * truth).sum() / len(x) + 1e-4 * (weights**2).sum()
        slope = x.T @ (softmax(scores, axis=1) - truth) / len(x) + 2e-4 * weights
        return value, slope.ravel()

    start = np.zeros(x.shape[1] * classes)
    best = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 500})
    return (asked @ best.x.reshape(-1, classes)).argmax(axis=1)


def expand(x: np.ndarray) -> np.ndarray:
    """The numbers, all their products, and a one."""
    rows, columns = np.triu_indices(x.shape[1])
    return np.concatenate([x, x[:, rows] * x[:, columns], np.ones((len(x), 1))], axis=1)


def strongest(known: np.ndarray, labels: np.ndarray, asked: np.ndarray, truth: np.ndarray) -> tuple[str, float]:
    """Name and accuracy of the rule that does best on the patches asked: all doubts go to the baseline."""
    x, questions = colours(known), colours(asked)
    centre, spread = x.mean(axis=0), x.std(axis=0)
    x, questions = (x - centre) / spread, (questions - centre) / spread
    answers = {f"{k} nearest": nearest(x, labels, questions, k) for k in (1, 5, 15, 45)}
    answers["gaussian"] = gaussian(x, labels, questions)
    answers["logistic"] = logistic(x, labels, questions)
    scores = {name: float((found == truth).mean()) for name, found in answers.items()}
    name = max(scores, key=scores.__getitem__)
    return name, scores[name]
