"""One federation as the papers tell it: plain loops, no messages, no classes of the library.

Two rounds are told here, DS-FL's (a phase of distillation, then local training) and the default
preset's (both in one step, teachers weighted by familiarity). They share with the library the
derived seeds, the order in which rows are drawn from them, and the shapes of the models; every
number between is computed anew. What the library does must equal this.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional as F

from fedistill.seeding import derive, generator

# --- pieces --------------------------------------------------------------------------------------


def build(factory, seed):
    """Every model starts from one seed, whatever its size."""
    with torch.random.fork_rng():
        torch.manual_seed(derive(seed, "weights"))
        return factory()


def asked_rows(seed, number, count, total):
    """Proxy rows of a round: consecutive pieces of one shuffled pass (count divides total)."""
    turn, offset = divmod((number - 1) * count, total)
    order = generator(derive(seed, "proxy-rows"), "proxy-pass", turn).permutation(total)
    return order[offset : offset + count]


def shuffled_batches(rows, size, epochs, seed, name):
    for epoch in range(epochs):
        order = list(generator(seed, name, epoch).permutation(rows))
        batches = [order[start : start + size] for start in range(0, rows, size)]
        if len(batches) > 1 and len(batches[-1]) == 1:
            last = batches.pop()
            batches[-1] += last
        yield from batches


def through_u8(probs):
    """What is left of probabilities that travel as one byte a value."""
    codes = np.round(-np.log(np.maximum(probs, math.exp(-12))) * 255 / 12)
    back = np.exp(-np.minimum(codes, 255) * 12 / 255)
    return (back / back.sum(axis=1, keepdims=True)).astype(np.float32)


def through_simplex6(probs):
    """What is left of probabilities that travel as 63 units a row, dealt by largest remainder."""
    back = np.empty(probs.shape)
    for row, shares in enumerate(probs / probs.sum(axis=1, keepdims=True)):
        units = np.floor(shares * 63).astype(int)
        remainders = shares * 63 - units
        for c in np.argsort(-remainders, kind="stable")[: 63 - units.sum()]:
            units[c] += 1
        back[row] = np.maximum(units / 63, 1e-4)
    return (back / back.sum(axis=1, keepdims=True)).astype(np.float32)


def through_float32(probs):
    return probs.astype(np.float32)


def softmax64(scores):
    scores = np.asarray(scores, dtype=np.float64)
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def clipped_gradients(loss, weights, limit):
    gradients = torch.autograd.grad(loss, weights)
    norm = torch.stack([g.norm() for g in gradients]).norm()
    return [g * min(1.0, limit / (norm.item() + 1e-6)) for g in gradients]


def sgd_step(weights, gradients, lr):
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            weight -= lr * gradient


def tensor(array):
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


def predict(model, inputs):
    with torch.no_grad():
        return model(tensor(inputs)).numpy()


# --- DS-FL ---------------------------------------------------------------------------------------


def distil(model, inputs, targets, size, epochs, lr, clip, seed):
    """Minimise KL(target || student): the same gradient as the cross-entropy to the target."""
    for batch in shuffled_batches(len(inputs), size, epochs, seed, "distil"):
        logs = model(tensor(inputs[batch])).log_softmax(dim=1)
        wanted = tensor(targets[batch])
        divergence = (wanted * (wanted.clamp_min(1e-30).log() - logs)).sum(dim=1).mean()
        weights = list(model.parameters())
        sgd_step(weights, clipped_gradients(divergence, weights, clip), lr)


def train(model, rows, size, epochs, lr, clip, seed):
    for batch in shuffled_batches(len(rows.labels), size, epochs, seed, "own"):
        labels = torch.from_numpy(rows.labels[batch])
        loss = F.cross_entropy(model(tensor(rows.inputs[batch])), labels)
        weights = list(model.parameters())
        sgd_step(weights, clipped_gradients(loss, weights, clip), lr)


def mean_rule(predictions):
    return sum(predictions) / len(predictions)


def era_rule(predictions):
    """Entropy-reduction aggregation: softmax of the mean *probabilities* at temperature 0.1."""
    return softmax64(mean_rule(predictions) / 0.1)


def ds_fl(clients, proxy, student, rule, codec, rounds, seed, per_round, recipe, distil_epochs):
    """DS-FL (arXiv 2008.06180), algorithm 1.

    Args:
        clients: name to (factory, rows).
        proxy: ``[rows, ...]``.
        student: factory of the server's model.
        rule: :func:`mean_rule` or :func:`era_rule`.
        codec: :func:`through_float32` or :func:`through_u8`, on the way up and down.
        rounds: how many.
        seed: of the experiment.
        per_round: proxy rows of a round.
        recipe: batch_size, epochs, lr and clip of every optimisation.
        distil_epochs: passes of a distillation phase.

    Yields:
        After each round: soft targets of that round's rows, by row number; student logits.
    """
    size, lr, clip = recipe.batch_size, recipe.lr, recipe.clip
    models = {name: build(factory, seed) for name, (factory, _) in sorted(clients.items())}
    server = build(student, seed)
    told = None
    for number in range(1, rounds + 1):
        asked = asked_rows(seed, number, per_round, len(proxy))
        predictions = []
        for name, model in models.items():
            if told is not None:
                rows, targets = told
                distil(
                    model,
                    proxy[rows],
                    targets,
                    size,
                    distil_epochs,
                    lr,
                    clip,
                    derive(seed, name, number, "absorb"),
                )
            train(
                model,
                clients[name][1],
                size,
                recipe.epochs,
                lr,
                clip,
                derive(seed, name, number, "train"),
            )
            sent = codec(softmax64(predict(model, proxy[asked])))
            predictions.append(sent.astype(np.float64))
        targets = codec(rule(predictions))
        order = np.argsort(asked)
        told = asked[order], targets[order]
        distil(
            server,
            proxy[told[0]],
            told[1],
            size,
            distil_epochs,
            lr,
            clip,
            derive(seed, "server", number),
        )
        yield dict(zip(told[0].tolist(), told[1], strict=True)), predict(server, proxy)
