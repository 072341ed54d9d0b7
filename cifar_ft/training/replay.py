"""A training step on an NVIDIA GPU, recorded once as a CUDA graph and replayed.

A step starts some 500 small computations. At the batch sizes of this course the GPU is done with each of them sooner
than Python has started the next; replayed, all of them start at once. The same kernels run on the same numbers, so the
weights are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from cifar_ft import log

EAGER_STEPS = 2  # at each size: they load the kernels, and the first of all makes the optimiser's state


class Replay:
    """Calls a training step: kernel by kernel at first, then as a recording.

    Only steps on a whole batch are recorded, so that the smaller last one of an epoch does not displace the recording.

    Parameters
    ----------
    batch_size : int
        Images of a whole batch; 0 never records.
    """

    def __init__(self, batch_size: int = 0):
        self.batch_size = batch_size
        self.forget()

    def forget(self) -> bool:
        """Drop the recording and the memory it holds; whether there was one."""
        had_one = getattr(self, "graph", None) is not None
        self.graph = self.key = self.inputs = self.labels = None
        self.steps = 0
        return had_one

    def __call__(
        self, step: Callable[..., None], inputs: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer, *settings
    ) -> None:
        """Do `step(inputs, labels)`, where `settings` are the numbers on which its computation depends beside them."""
        if len(inputs) != self.batch_size:
            return step(inputs, labels)
        key = (inputs.shape, settings)
        if key != self.key:
            self.forget()
            self.key = key
        if self.graph is None and self.steps >= EAGER_STEPS:
            self._record(step, inputs, labels, optimizer)
        if self.graph is None:
            self.steps += 1
            return step(inputs, labels)
        self.inputs.copy_(inputs)
        self.labels.copy_(labels)
        self.graph.replay()

    @staticmethod
    def capture(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Record what `work` starts on the current stream, which must not be the default one."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do, such as writing a checkpoint, cannot break the recording.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            work()
        return graph

    def _record(
        self, step: Callable[..., None], inputs: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer
    ) -> None:
        """Record the step, which is not carried out by it. What cannot be recorded is not tried again."""
        self.inputs, self.labels = inputs.clone(), labels.clone()
        try:
            with _capturable(optimizer):
                self.graph = self.capture(lambda: step(self.inputs, self.labels))
        except RuntimeError as error:
            self.forget()
            self.batch_size = 0
            optimizer.zero_grad()
            reason = str(error).strip().splitlines()[0]
            log.warning(f"The GPU could not record a training step ({reason}); training continues without, slower")


@contextmanager
def _capturable(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Say to an optimiser that asks for it that its step may be recorded: the fused ones do all on the GPU."""
    groups = [group for group in optimizer.param_groups if "capturable" in group]
    before = [group["capturable"] for group in groups]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group, value in zip(groups, before, strict=True):
            group["capturable"] = value


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Compute on a stream of its own on a GPU, where steps can be recorded; elsewhere nothing changes."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        torch.cuda.current_stream(device).wait_stream(stream)
