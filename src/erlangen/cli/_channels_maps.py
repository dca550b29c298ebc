"""Attention maps, and how much goes from each channel to each other: of ``erlangen channels``.

Shape suffixes: N positions of a window, W windows of a map, M attention maps, K channels.
"""

import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from erlangen.finite import PermutationGroup, channel_transfer

from ._channels_config import CHUNK, ChannelsConfig, Report, expect_degree, is_name, read_group


@dataclass(frozen=True)
class Maps:
    """Transfer of attention maps between channels."""

    group: PermutationGroup
    group_text: str
    labels: Sequence[str]
    indices: Sequence[tuple[int, ...]]
    """Of each map, its place among the leading dimensions."""
    transfer: np.ndarray
    """float64 [M, K, K]: the mean over a map's windows; shares from column to row."""
    commuting: np.ndarray
    """float64 [M]: the share that commutes with the group."""
    channels: Sequence[Mapping[str, Any]]
    num_windows: int
    """Of each map."""
    size: int
    total: int

    @property
    def stopped(self) -> bool:
        return len(self.labels) < self.total


def measure_maps(config: ChannelsConfig, progress: Report) -> Maps:
    """The transfer matrices of every attention map of a file."""
    maps = list(read_maps(config.file))
    sizes = {get().shape[-1] for _, _, get in maps}
    text = config.group or "reversal"
    if is_name(text) and config.window is None and len(sizes) > 1:
        raise ValueError(f"{config.file} has maps of sizes {', '.join(map(str, sorted(sizes)))}: give a --window")
    group = read_group(text, config.window or (min(sizes) if is_name(text) else None), config.alphabet)
    expect_degree(config, group)
    length = group.degree
    if length > min(sizes):
        raise ValueError(
            f"{group!r} has more positions than the maps of {config.file}, received {min(sizes)}: take a smaller group"
        )
    orbitals = group.orbitals().ravel()
    orbital_sizes = np.bincount(orbitals)
    labels, indices, transfers, commuting, num_windows = [], [], [], [], 0
    try:
        for label, index, get in maps:
            a_NN = get()
            energy = float(torch.linalg.vector_norm(a_NN)) ** 2
            if not 0 < energy < float("inf"):
                raise ValueError(f"an attention map must be finite and not all zero, received {label} of {config.file}")
            starts = range(0, len(a_NN) - length + 1, config.stride if length < len(a_NN) else 1)
            windows_WNN = [a_NN[start : start + length, start : start + length] for start in starts]
            windows_WNN = torch.stack([one for one in windows_WNN if one.any()] or windows_WNN[:1])
            parts = windows_WNN.split(max(1, CHUNK // length**2))
            transfer_KK = sum(channel_transfer(part, group).sum(0) for part in parts) / len(windows_WNN)
            shares = []
            for one in windows_WNN.numpy():
                sums = np.bincount(orbitals, one.ravel())
                shares.append(float((np.square(sums) / orbital_sizes).sum() / np.square(one).sum()))
            num_windows = len(starts)
            labels.append(label)
            indices.append(index)
            transfers.append(np.asarray(transfer_KK))
            commuting.append(float(np.mean(shares)))
            progress(len(commuting), len(maps))
    except KeyboardInterrupt:
        if not commuting:
            raise
    done = len(commuting)
    channels = group.channels()
    mean_KK = np.mean(transfers[:done], axis=0)
    ranks = [irrep.dimension * irrep.multiplicity for irrep in channels]
    return Maps(
        group=group,
        group_text=str(group),
        labels=labels[:done],
        indices=indices[:done],
        transfer=np.stack(transfers[:done]),
        commuting=np.array(commuting),
        channels=[
            {
                "name": irrep.name, "dimension": irrep.dimension, "kind": irrep.kind,
                "multiplicity": irrep.multiplicity, "to": float(mean_KK[k].sum()), "from": float(mean_KK[:, k].sum()),
                "kept": float(mean_KK[k, k]), "kept_by_a_random_map": ranks[k] ** 2 / length**2,
            }
            for k, irrep in enumerate(channels)
        ],
        num_windows=num_windows,
        size=min(sizes),
        total=len(maps),
    )  # fmt: skip


def read_maps(path: Path) -> Iterator[tuple[str, tuple[int, ...], Callable[[], torch.Tensor]]]:
    """Label, index and a function that reads it in float64 [N, N], of each map of a file; nothing is unpickled.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not of its format, or holds what is no map [.., N, N] of real numbers.
    """
    if path.suffix.lower() == ".npy":
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is no array of numbers in NumPy's format ({error})") from error
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{path} is an archive of arrays: save one array by np.save")
        tensors: dict[str, Any] = {"": array}
    else:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        except SafetensorError as error:
            raise ValueError(f"{path} is not in the format of safetensors ({error})") from error
        if not tensors:
            raise ValueError(f"{path} holds no tensor")
    for name, tensor in tensors.items():
        what = f"{path}: {name}" if name else f"{path}"
        real = tensor.dtype.kind in "fiub" if isinstance(tensor, np.ndarray) else not tensor.is_complex()
        shape = tuple(tensor.shape)
        if len(shape) < 2 or shape[-1] != shape[-2] or 0 in shape or not real:
            raise ValueError(
                f"{what} must be attention maps, real numbers [.., N, N], received {tensor.dtype} {list(shape)}: save "
                "the maps alone"
            )
        for index in np.ndindex(*shape[:-2]):
            label = f"{name}[{', '.join(map(str, index))}]" if index else name or "map"

            def get(tensor: Any = tensor, index: tuple[int, ...] = index) -> torch.Tensor:
                found = tensor[index]
                return (
                    torch.from_numpy(np.array(found, np.float64)) if isinstance(found, np.ndarray) else found.double()
                )

            yield label, index, get
