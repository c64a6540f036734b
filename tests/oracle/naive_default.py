"""The default preset's round in plain loops: see :mod:`oracle.naive`, whose pieces it shares."""

from __future__ import annotations

import math

import numpy as np
import torch
from oracle.naive import (
    asked_rows,
    build,
    clipped_gradients,
    shuffled_batches,
    softmax64,
    tensor,
    through_simplex6,
)
from torch import nn
from torch.nn import functional as F

from fedistill.seeding import derive, generator


class Averaged:
    """A model with a moving average of its weights, which predicts; the last weights train."""

    def __init__(self, weights, decay):
        self.weights, self.decay, self.steps = weights, decay, 0
        self.mean = [weight.detach().clone() for weight in weights]

    def step(self):
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for mean, weight in zip(self.mean, self.weights, strict=True):
            mean.copy_(decay * mean + (1 - decay) * weight.detach())

    def predict(self, forward, inputs):
        kept = [weight.detach().clone() for weight in self.weights]
        with torch.no_grad():
            for weight, mean in zip(self.weights, self.mean, strict=True):
                weight.copy_(mean)
            found = forward(tensor(inputs))
            for weight, last in zip(self.weights, kept, strict=True):
                weight.copy_(last)
        return found


class Teacher:
    """A client's model: an MLP with one more output on its hidden layer, for familiarity."""

    def __init__(self, factory, seed, decay):
        self.mlp = build(factory, seed)
        self.score = nn.Linear(self.mlp.head.in_features, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)
        self.weights = [*self.mlp.parameters(), *self.score.parameters()]
        self.speed = [torch.zeros_like(weight) for weight in self.weights]
        self.averaged = Averaged(self.weights, decay)

    def forward(self, inputs):
        hidden = self.mlp.trunk(inputs.flatten(1))
        return self.mlp.head(hidden), self.score(hidden)[:, 0]


def mixture(inputs, targets, count, concentration, random):
    """Mixup (arXiv 1710.09412); the larger share goes to the first row of a pair."""
    first, second = random.integers(0, len(inputs), (2, count))
    share = random.beta(concentration, concentration, count)
    share = tensor(np.maximum(share, 1 - share))[:, None]
    return (
        share * inputs[first] + (1 - share) * inputs[second],
        share * targets[first] + (1 - share) * targets[second],
    )


def entropy_to(targets, logits):
    return -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()


def train(teacher, rows, lesson, proxy, classes, recipe, seed):
    """Own rows, soft targets and mixtures of both in one step; and own rows told from proxy."""
    size, count = recipe.batch_size, len(rows.labels)
    batches = list(shuffled_batches(count, size, recipe.epochs, seed, "own"))
    if lesson is not None:
        taught, targets, weights = lesson
        more = 0
        while len(batches) < math.ceil(recipe.distil_epochs * weights.sum() / size):
            batches += shuffled_batches(count, size, 1, seed, f"more-{more}")
            more += 1
        drawn = generator(seed, "soft").choice(
            len(taught), (len(batches), size), p=weights / weights.sum()
        )
    strangers = generator(seed, "background").integers(0, len(proxy), (len(batches), size))
    strength = recipe.soft_weight * max(1.0, recipe.scarce_rows / count)
    for step, batch in enumerate(batches):
        own, labels = (
            tensor(rows.inputs[batch]),
            F.one_hot(torch.from_numpy(rows.labels[batch]), classes).float(),
        )
        logits, score = teacher.forward(own)
        loss = entropy_to(labels, logits)
        if lesson is None:
            other = tensor(proxy[strangers[step]])
        else:
            other, wanted = tensor(proxy[taught[drawn[step]]]), tensor(targets[drawn[step]])
            loss = loss + strength * entropy_to(wanted, teacher.forward(other)[0])
            if recipe.mixup:
                mixed, between = mixture(
                    torch.cat([own, other]),
                    torch.cat([labels, wanted]),
                    size,
                    recipe.mixup,
                    generator(seed, "mix", step),
                )
                loss = loss + strength * entropy_to(between, teacher.forward(mixed)[0])
        elsewhere = teacher.forward(other)[1]
        loss = loss - F.logsigmoid(score).mean() - F.logsigmoid(-elsewhere).mean()
        gradients = clipped_gradients(loss, teacher.weights, recipe.clip)
        with torch.no_grad():
            for weight, speed, gradient in zip(
                teacher.weights, teacher.speed, gradients, strict=True
            ):
                speed.copy_(recipe.momentum * speed + gradient)
                weight -= recipe.lr * speed
        teacher.averaged.step()


class Student:
    """The server's model: Adam with a falling rate, on the soft targets, mixed or not."""

    def __init__(self, factory, seed, recipe):
        self.model, self.recipe = build(factory, seed), recipe
        self.weights = list(self.model.parameters())
        self.first = [torch.zeros_like(weight) for weight in self.weights]
        self.second = [torch.zeros_like(weight) for weight in self.weights]
        self.averaged = Averaged(self.weights, recipe.average)

    def distil(self, lesson, proxy, seed):
        recipe = self.recipe
        taught, targets, weights = lesson
        size = recipe.batch_size
        if len(set(weights)) == 1:
            batches = list(
                shuffled_batches(len(taught), size, recipe.distil_epochs, seed, "distil")
            )
        else:
            steps = math.ceil(len(taught) / size) * recipe.distil_epochs
            batches = generator(seed, "soft").choice(
                len(taught), (steps, size), p=weights / weights.sum()
            )
        for step, batch in enumerate(batches):
            inputs, wanted = tensor(proxy[taught[batch]]), tensor(targets[batch])
            if recipe.mixup:
                inputs, wanted = mixture(
                    inputs, wanted, len(batch), recipe.mixup, generator(seed, "mix", step)
                )
            loss = entropy_to(wanted, self.model(inputs))
            gradients = clipped_gradients(loss, self.weights, recipe.clip)
            self.adam(gradients, recipe.lr * 0.5 * (1 + math.cos(math.pi * step / len(batches))))
            self.averaged.step()

    def adam(self, gradients, lr):
        number = self.averaged.steps + 1
        with torch.no_grad():
            for weight, first, second, gradient in zip(
                self.weights, self.first, self.second, gradients, strict=True
            ):
                first.copy_(0.9 * first + 0.1 * gradient)
                second.copy_(0.999 * second + 0.001 * gradient**2)
                mean, square = first / (1 - 0.9**number), second / (1 - 0.999**number)
                weight -= lr * mean / (square.sqrt() + 1e-8)


def default_round(
    clients,
    proxy,
    student,
    classes,
    rounds,
    seed,
    per_round,
    recipe,
    server_recipe,
    memory,
    prior_rows,
):
    """Yields after each round the table of all soft targets so far, and student logits."""
    teachers = {
        name: Teacher(factory, seed, recipe.average)
        for name, (factory, _) in sorted(clients.items())
    }
    server = Student(student, seed, server_recipe)
    table, made = np.zeros((len(proxy), classes), np.float32), np.zeros(len(proxy), int)
    lesson = None
    for number in range(1, rounds + 1):
        asked = asked_rows(seed, number, per_round, len(proxy))
        said, evidence = [], []
        for name, teacher in teachers.items():
            rows = clients[name][1]
            train(
                teacher, rows, lesson, proxy, classes, recipe, derive(seed, name, number, "train")
            )
            logits, score = teacher.averaged.predict(teacher.forward, proxy[asked])
            said.append(through_simplex6(softmax64(logits.numpy())).astype(np.float64))
            byte = np.round((score.numpy().clip(-8, 8) + 8) * 255 / 16)
            ratio = np.exp(byte * 16 / 255 - 8)
            size = 2 ** round(math.log2(len(rows.labels)))
            evidence.append(size * ratio / ratio.mean() + prior_rows)
        share = np.array(evidence) / np.sum(evidence, axis=0)
        targets = through_simplex6(sum(w[:, None] * p for w, p in zip(share, said, strict=True)))
        table[asked], made[asked] = targets, number
        taught = np.flatnonzero(made)
        lesson = taught, table[taught], memory ** (number - made[taught]).astype(np.float64)
        server.distil(lesson, proxy, derive(seed, "server", number))
        yield table.copy(), server.averaged.predict(server.model, proxy).numpy()
