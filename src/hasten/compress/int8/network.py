"""A convolutional network that runs in bytes, as a module: float32 images in, float32 results out."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hasten.compress.int8.lowering import Lowered
from hasten.compress.int8.program import Program
from hasten.compress.int8.run import run_images
from hasten.compress.int8.simulate import simulate
from hasten.compress.replace import told_of
from hasten.errors import ConfigurationError
from hasten.nn.product.instructions import has_bytes

__all__ = ["IntegerNetwork"]


class IntegerNetwork(nn.Module):
    """Runs what :mod:`lowering` made of a model; inference only, one shape of images.

    A batch is shared out image by image to as many threads as torch uses; one image runs in one thread. Not to be
    called by two threads at once: the arenas are its own.
    """

    def __init__(self, lowered: Lowered, float_model: nn.Module) -> None:
        super().__init__()
        self.lowered = lowered
        self.program = Program(lowered)
        self._float = [float_model]  # in a list: its parameters are not those of this module
        self._arenas: Any = None
        self._sums: Any = None
        self._pool: Any = None
        entry = lowered.entry
        self.image_shape = (entry.channels, entry.height, entry.width)

    @property
    def packed_bytes(self) -> int:
        """Bytes of weights and scales."""
        return self.program.num_bytes

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, channels, height, width) float32 -> what the float model gives, float32."""
        if x.dim() != 4 or tuple(x.shape[1:]) != self.image_shape:
            raise ConfigurationError(
                f"images of shape {tuple(x.shape[1:])} were given, the network was lowered for {self.image_shape}; "
                "resize them, or apply the technique with an example of that shape"
            )
        program, batch = self.program, x.shape[0]
        threads = min(batch, torch.get_num_threads())
        self._prepare(threads)
        images = np.ascontiguousarray(x.detach().numpy(), np.float32)
        lost = np.isnan(images.reshape(batch, -1).min(1)) if images.size else np.zeros(batch, bool)
        if self.lowered.output is not None:
            return _without(self._feature_maps(images), lost)
        outs = np.empty((batch, program.floats), np.float32)
        if threads <= 1:
            self._run(images, outs, 0)
        else:
            cuts = [batch * part // threads for part in range(threads + 1)]
            parts = [slice(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
            rest = [self._pool.submit(self._run, images[p], outs[p], n) for n, p in enumerate(parts) if n]
            self._run(images[parts[0]], outs[parts[0]], 0)
            for job in rest:
                job.result()
        outs[lost] = np.nan  # a byte holds no NaN: such an image would come out as numbers
        return self._shaped(torch.from_numpy(outs))

    def _prepare(self, threads: int) -> None:
        """An arena for each thread, and the threads beside the caller's."""
        threads = max(1, threads)
        if self._arenas is None or len(self._arenas) < threads:
            self._arenas = self.program.arenas(threads)
            self._sums = np.zeros((threads, self.program.sums_size), np.int32)
            if threads > 1:
                self._pool = ThreadPoolExecutor(threads - 1, "hasten-int8")

    def _run(self, images: Any, outs: Any, part: int) -> None:
        program = self.program
        run_images(
            images, program.entry, program.inverse, program.zero, program.table, program.numbers, self._arenas[part],
            program.weights, program.params, outs, self._sums[part],
        )  # fmt: skip

    def _shaped(self, outs: Tensor) -> Tensor:
        shape = self.lowered.shape
        if len(shape) == 3:
            channels, height, width = shape
            return outs.view(-1, height, width, channels).permute(0, 3, 1, 2).contiguous()
        return outs.view(-1, *shape)

    def _feature_maps(self, images: Any) -> Tensor:
        """Results that end as bytes are read from the arena, image by image."""
        program, value = self.program, self.lowered.output
        assert value is not None
        place, nothing = program.places[id(value)], np.empty((1, 1), np.float32)
        arena = self._arenas[0]
        results = []
        for index in range(len(images)):
            self._run(images[index : index + 1], nothing, 0)
            lines = np.lib.stride_tricks.as_strided(
                arena[place.start :], (value.height, value.width, value.channels), (place.line, place.held, 1)
            )
            results.append((lines.astype(np.float32) - np.float32(value.zero)) * np.float32(value.scale))
        stacked = torch.from_numpy(np.stack(results)).permute(0, 3, 1, 2).contiguous()
        return stacked.reshape(len(images), *self.lowered.shape)

    def simulate(self, x: Tensor) -> Tensor:
        """The same result from plain operations, bit for bit; slow."""
        return torch.from_numpy(simulate(self.lowered, x.detach().numpy().astype(np.float32)))

    def plain(self) -> nn.Module:
        """The float network with the weights that the bytes stand for, for ``torch.export``."""
        return copy.deepcopy(self._float[0])

    def __deepcopy__(self, memo: dict[int, Any]) -> IntegerNetwork:
        return told_of(self, IntegerNetwork(self.lowered, self._float[0]).train(self.training))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "program": None, "_arenas": None, "_sums": None, "_pool": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if not has_bytes():
            raise ConfigurationError(
                "a network in bytes runs on processors with vpdpbusd on registers of 512 bits, and this is none; load "
                "the model as it was before and apply its recipe"
            )
        super().__setstate__(state)
        self.program = Program(self.lowered)

    def get_extra_state(self) -> Any:
        """Raises :class:`~hasten.errors.ConfigurationError`: a ``state_dict`` would be without what is computed."""
        raise ConfigurationError(
            "a network in bytes has no state_dict: bytes, ranges and operations belong together; store it whole with "
            "torch.save(model, path), or the float model and the recipe"
        )

    def set_extra_state(self, state: Any) -> None:
        """As :meth:`get_extra_state`."""
        self.get_extra_state()

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        count = len(self.lowered.operations)
        return f"{count} operations, {self.program.macs / 1e6:.1f} M multiply-adds, images {self.image_shape}"


def _without(results: Tensor, lost: Any) -> Tensor:
    results[torch.from_numpy(lost)] = torch.nan
    return results
