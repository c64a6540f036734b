"""Rules that particular published methods need; several targets a row are in ``clusters``.

Each is a rule in the sense of :mod:`fedistill.aggregate.rules`: ``logits`` ``[clients, rows,
classes]``, ``weights`` ``[clients]`` or ``[clients, rows]``, result ``[rows, classes]``, NaN on a
row that nobody answers. A client of weight zero has no say, whatever stands in its row.
"""

from __future__ import annotations

import numpy as np

from fedistill.aggregate.basics import pool, softmax, spread
from fedistill.aggregate.chunked import rowwise
from fedistill.aggregate.evidence import FAMILIARITY_LIMIT
from fedistill.aggregate.voices import TIE, top_class, voices
from fedistill.errors import FedistillError
from fedistill.types import FloatArray, IntArray, Logits, Probs


def _entropy(logs: Logits) -> FloatArray:
    entropy: FloatArray = -(np.exp(logs) * logs).sum(axis=-1)
    return entropy


# --- weights by row ------------------------------------------------------------------------------


@rowwise
def confidence(logits: Logits, weights: FloatArray) -> Probs:
    """Mean of probabilities, each client's share of a row in proportion to its top probability.

    q = sum_k w_k m_k p_k / sum_k w_k m_k with m_k = max_c p_k(x). The most that a sure client can
    weigh against a clueless one is C to 1.
    """
    logs, given = voices(logits, weights)
    probs = np.exp(logs)
    return pool(probs, spread(given * probs.max(axis=2), probs.shape[1]))


@rowwise
def entropy_weighted(logits: Logits, weights: FloatArray, *, scale: float = 1.0) -> Probs:
    """Mean of probabilities with weights in proportion to w_k exp(-H(p_k(x)) / scale).

    Args:
        logits: ``[clients, rows, classes]``.
        weights: ``[clients]`` or ``[clients, rows]``.
        scale: nats of entropy that cost a factor e of weight; large is the plain mean, small
            listens to the surest client only. Its own setting, no temperature of a loss.

    Raises:
        FedistillError: ``scale`` is not above 0.
    """
    if not scale > 0:
        raise FedistillError(f"scale: expected nats above 0, found {scale}: 1.0 is the default")
    logs, given = voices(logits, weights)
    entropy = _entropy(logs)
    # Measured from the surest who answers: a small scale must not make every weight zero.
    least = np.where(given > 0, entropy, np.inf).min(axis=0)
    excess = np.where(given > 0, entropy - np.where(np.isfinite(least), least, 0.0), 0.0)
    return pool(np.exp(logs), spread(given * np.exp(-excess / scale), logs.shape[1]))


@rowwise
def certainty(logits: Logits, weights: FloatArray, *, familiarity: FloatArray) -> Probs:
    """FedAUX: softmax(sum_k w_k s_k z_k / sum_k w_k s_k) with a certainty score s_k(x).

    The paper's score is the probability that a logistic regression of a client's own rows against
    negatives of the auxiliary set gives to "own". With as many of either that probability is the
    sigmoid of the log density ratio, which is what ``familiarity`` is: s = sigmoid(familiarity).
    Logits enter as log-probabilities, which leaves the result as it is (see ``mean_logits``).

    Deviations: no regression with noised weights, whose stated sensitivity is wrong in the
    authors' code (its bound belongs to a mean loss, the fit minimises a sum); what guards the
    familiarity is the client's own policy. Weights of models are not averaged. Sattler et al.,
    arXiv 2102.02514.

    Args:
        logits: ``[clients, rows, classes]``.
        weights: ``[clients]`` or ``[clients, rows]``.
        familiarity: ``[clients, rows]`` log density ratio, clamped to plus and minus 8.

    Raises:
        FedistillError: ``familiarity`` has another shape.
    """
    logs, given = voices(logits, weights)
    said = np.asarray(familiarity, dtype=np.float64)
    if said.shape != given.shape:
        raise FedistillError(
            f"familiarity must be [clients, rows] = {list(given.shape)}, found "
            f"{list(said.shape)}: give one log density ratio per client and row"
        )
    limited = np.clip(np.where(given > 0, said, 0.0), -FAMILIARITY_LIMIT, FAMILIARITY_LIMIT)
    share = spread(given / (1 + np.exp(-limited)), logs.shape[1])
    return softmax(np.einsum("kr,krc->rc", share, logs))


# --- votes and choices ---------------------------------------------------------------------------


@rowwise
def vote(logits: Logits, weights: FloatArray) -> Probs:
    """SSFL: the class with the most (weighted) votes as a one-hot row.

    A client votes for its top class; abstaining (the paper's label -1, for a row that a client's
    discriminator rejects) is weight 0 in ``[clients, rows]``. Zhao et al., "Semisupervised
    Federated-Learning-Based Intrusion Detection Method for Internet of Things", IEEE Internet of
    Things Journal, 2022.

    Deviation: of classes with equal votes the one with the higher mean probability wins, and of
    those the lowest. Where clients send labels only, as in the paper, that is the lowest class at
    once; where they send more it is used, and the names of classes matter less. Neither depends
    on the order of clients or on chance.
    """
    logs, given = voices(logits, weights)
    share = spread(given, logs.shape[1])
    units = np.eye(logs.shape[2])
    votes = np.einsum("kr,krc->rc", share, units[logs.argmax(axis=2)])
    ahead = votes >= votes.max(axis=1, keepdims=True) - TIE
    label = top_class(np.where(ahead, pool(np.exp(logs), share), 0.0))
    return np.where(np.isnan(votes), np.nan, units[label])


@rowwise
def consensus(logits: Logits, weights: FloatArray, *, diversity: float = 0.2) -> Probs:
    """Fed-ET: one target that stands for a consensus label and the diversity of those against it.

    Weights of a row are in proportion to w_k Var_c z_k(x): a confident client spreads its logits.
    The label is y = argmax_c sum_k v_k z_k with these weights v, and the diversity target d is
    the mean, with the same weights, of the probabilities of the clients whose top class is not y.
    The paper's student minimises CE(y) + lambda KL(d || p). Cross-entropies are linear in their
    target and KL(d || p) is one up to the constant entropy of d, so that the loss is, up to that
    constant, 1 + lambda times the cross-entropy to::

        (onehot(y) + lambda d) / (1 + lambda)

    which is returned: one target a row serves, and the gradient is the paper's up to the factor
    1 + lambda. Where nobody disagrees the target is onehot(y). Cho et al., arXiv 2204.12703.

    Deviations: z are log-probabilities, centred by row (variance and argmax do not see the
    constant by which they differ from raw logits); d is a mean of probabilities, not of logits,
    so that no single dissenter has a veto; without the factor 1 + lambda rows with and without
    dissent count alike; a client that ties y with another class agrees; where all variances are
    0 the given weights decide, and ties go to the lowest class.

    Args:
        logits: ``[clients, rows, classes]``.
        weights: ``[clients]`` or ``[clients, rows]``.
        diversity: lambda, 0.05 to 0.5 in the paper; 0 is the label alone.

    Raises:
        FedistillError: ``diversity`` is negative or not finite.
    """
    if not 0 <= diversity < np.inf:
        raise FedistillError(f"diversity: expected a finite number from 0, found {diversity}")
    logs, given = voices(logits, weights)
    centred = logs - logs.mean(axis=2, keepdims=True)
    weighed = given * (centred**2).mean(axis=2)
    weighed = np.where(weighed.sum(axis=0) > 0, weighed, given)
    share = spread(weighed, logs.shape[1])
    label = top_class(np.einsum("kr,krc->rc", share, centred))

    at_label = np.take_along_axis(logs, label[None, :, None], axis=2)[:, :, 0]
    against = weighed * (at_label < logs.max(axis=2) - TIE)
    one_hot = np.eye(logs.shape[2])[label]
    dissent = pool(np.exp(logs), spread(against, logs.shape[1]))
    target = np.where(np.isnan(dissent), one_hot, (one_hot + diversity * dissent) / (1 + diversity))
    return np.where(np.isnan(share[0])[:, None], np.nan, target)


@rowwise
def best_teacher(
    logits: Logits, weights: FloatArray, *, anchors: IntArray, soft: bool = False
) -> Probs:
    """FedMKT: each row is taught by the client with the smallest cross-entropy on its label.

    CE_k(x) = -log p_k(y | x). Of clients that tie, the mean by their weights. With ``soft`` all
    teach, with weights w_k times softmax_k(exp(-CE_k)), the paper's other form: at most e to 1.
    Otherwise weights decide only who may be chosen (those above 0). Fan et al., arXiv 2406.02224.

    Deviations: on a row without a label the entropy of p_k stands for CE_k, so that the most
    confident client teaches; the cross-entropies are computed here from labels that the server
    holds, and no client sends them; the receiver's own distribution is no special candidate, as all
    receive the same target.

    Args:
        logits: ``[clients, rows, classes]``.
        weights: ``[clients]`` or ``[clients, rows]``.
        anchors: ``[rows]`` whole numbers, the label of a row or -1 where it is unknown.
        soft: weigh by cross-entropy instead of choosing.

    Raises:
        FedistillError: ``anchors`` are not one label from -1 to classes - 1 per row.
    """
    logs, given = voices(logits, weights)
    labels = np.asarray(anchors)
    clients, rows, classes = logs.shape
    if labels.shape != (rows,) or labels.dtype.kind not in "iu":
        raise FedistillError(
            f"anchors must be whole numbers [rows] = [{rows}], found {labels.dtype} "
            f"{list(labels.shape)}: give each row its label, or -1"
        )
    if not ((labels >= -1) & (labels < classes)).all():
        raise FedistillError(
            f"anchors must be -1 (unknown) or a class from 0 to {classes - 1}, found "
            f"{labels.min()} to {labels.max()}: check how the labels were read"
        )
    at_label = np.broadcast_to(np.maximum(labels, 0)[None, :, None], (clients, rows, 1))
    error = -np.take_along_axis(logs, at_label, axis=2)[:, :, 0]
    cost = np.where(labels >= 0, error, _entropy(logs))
    if soft:
        return pool(np.exp(logs), spread(given * np.exp(np.exp(-cost)), rows))
    cost = np.where(given > 0, cost, np.inf)
    return pool(np.exp(logs), spread(given * (cost <= cost.min(axis=0) + TIE), rows))


# --- after the rule ------------------------------------------------------------------------------


def keep_clear(targets: Probs, ambiguity: float) -> Probs:
    """Selective-FD's filter at the server: rows that nobody is sure of become NaN.

    A row stays if ||q - onehot(argmax q)||_1 < ``ambiguity``. For probabilities that distance is
    2 (1 - max q), always below 2: 2.0 or more switches the filter off. Rows that are NaN stay
    NaN. The result is a new array. Shao, Wu and Zhang, arXiv 2304.01731.

    Args:
        targets: ``[rows, classes]``.
        ambiguity: the smallest L1 distance, above 0, at which a row is dropped.

    Raises:
        FedistillError: ``targets`` is no table, or ``ambiguity`` is not above 0.
    """
    if not ambiguity > 0:
        raise FedistillError(
            f"ambiguity: expected a distance above 0, found {ambiguity}: 2.0 keeps every row"
        )
    probs = np.asarray(targets, dtype=np.float64)
    if probs.ndim != 2 or not probs.shape[1]:
        raise FedistillError(
            f"targets must be [rows, classes], found {list(probs.shape)}: combine clients first"
        )
    distance = 2 * (1 - probs.max(axis=1))
    return np.where((distance < ambiguity)[:, None], probs, np.nan)
