"""avalanche 0.6.0's DER++ on a stream: https://avalanche.continualai.org.

`pip install avalanche-lib==0.6.0 torchvision`; beside a CPU build of torch take torchvision's CPU
build, too, or its import fails. Its strategy `DER` as its documentation has it, without evaluation
and logging. It differs from ours where its own comments say so: one draw for both losses, and rows
remembered at the end of an experience.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from avalanche.benchmarks import tensors_benchmark
from avalanche.training.supervised.der import DER
from torch import Tensor, nn

from fedistill.data.stream import Experience

Trained = tuple[float, Callable[[Tensor], Tensor]]


def trained(
    stream: Sequence[Experience],
    module: nn.Module,
    *,
    memory: int,
    batch: int,
    replayed: int,
    rate: float,
    alpha: float,
    beta: float,
) -> Trained:
    """Processor seconds of training on a stream, and what predicts."""
    parts = [
        (torch.from_numpy(one.train.inputs), torch.from_numpy(one.train.labels)) for one in stream
    ]
    benchmark = tensors_benchmark(
        train_tensors=parts,
        test_tensors=[(inputs[:1], labels[:1]) for inputs, labels in parts],
        task_labels=[0] * len(parts),
    )
    strategy = DER(
        model=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=rate),
        mem_size=memory,
        batch_size_mem=replayed,
        alpha=alpha,
        beta=beta,
        train_mb_size=batch,
        train_epochs=1,
        evaluator=None,
    )
    began = time.process_time()
    for experience in benchmark.train_stream:
        strategy.train(experience, num_workers=0)
    seconds = time.process_time() - began
    module.eval()
    return seconds, module
