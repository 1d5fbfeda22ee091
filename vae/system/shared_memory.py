"""Memory that the processes of one machine share, and a place where they meet.

Loopback sockets take 4 ms for the gradients of a small network, as long as a training step does.
The memory has no name, and ends with the last process that holds it, however that ends.
"""

from __future__ import annotations

import math
import mmap
import os
import secrets
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

LARGEST = 2**30  # bytes of shared memory, all that is in it
MOST_RANKS = 16  # each has a socket to each, and reads what each has written
PATIENCE = 1800.0  # seconds until a silent rank counts as gone, as with torch.distributed
GONE = "another worker of this training ended"
LINE = 64  # bytes, of which each piece begins a new one
RANK_BYTES = 4
CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: unix(7)


class Piece(NamedTuple):
    """A tensor to be in the memory."""

    shape: Sequence[int]
    dtype: torch.dtype

    @property
    def values(self) -> int:
        return math.prod(self.shape)

    @property
    def lines(self) -> int:
        return -(-self.values * self.dtype.itemsize // LINE)


@dataclass
class SharedMemory:
    """tensors: one for each piece, shared by all ranks; peers: a socket to each other rank."""

    tensors: Sequence[Tensor]
    rank: int
    peers: Sequence[socket.socket]

    def barrier(self) -> None:
        """Return once every rank has come here as often as this one.

        What a rank wrote before, all read after. Raises ConnectionError where another rank's
        process ended or was silent for half an hour.
        """
        try:
            for peer in self.peers:
                peer.send(b".")
            gone = not all([peer.recv(1) for peer in self.peers])
        except (BrokenPipeError, ConnectionResetError):
            gone = True
        except TimeoutError as error:
            raise ConnectionError(f"{GONE}, or was silent for {PATIENCE:.0f} s") from error
        if gone:
            raise ConnectionError(GONE)

    def close(self) -> None:
        self.tensors = ()  # the memory goes with the last tensor that views it
        for peer in self.peers:
            peer.close()


def open_shared_memory(pieces: Sequence[Piece]) -> SharedMemory | None:
    """Memory for such tensors, zero at first, or None on every rank.

    None where the ranks can't all reach rank 0 by a socket of one machine, on systems without
    anonymous memory files (Linux has them), and beyond `LARGEST` or `MOST_RANKS`. All ranks take
    part, with the same pieces.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    size = LINE * sum(piece.lines for piece in pieces)
    suits = ranks <= MOST_RANKS and size <= LARGEST
    host = _Host.start(size, ranks) if rank == 0 and suits else None
    address = [None if host is None else host.address]
    dist.broadcast_object_list(address, src=0)
    link = None if rank == 0 else _connect(address[0], rank)
    if not _all(host is not None or link is not None):
        for mine in (host, link):
            if mine is not None:
                mine.close()
        return None
    if host is not None:
        memory, peers = host.introduce(ranks)
    else:
        assert link is not None
        memory, *ends = _receive(link, ranks)
        peers = [socket.socket(fileno=end) for end in ends]
        for peer in peers:
            peer.set_inheritable(False)
    for peer in peers:
        peer.settimeout(PATIENCE)
    shared = mmap.mmap(memory, size)
    os.close(memory)
    return SharedMemory(_tensors_in(shared, pieces), rank, peers)


def _tensors_in(memory: mmap.mmap, pieces: Sequence[Piece]) -> list[Tensor]:
    tensors, line = [], 0
    for piece in pieces:
        flat = torch.frombuffer(memory, dtype=piece.dtype, count=piece.values, offset=line * LINE)
        tensors.append(flat.view(tuple(piece.shape)))
        line += piece.lines
    return tensors


@dataclass
class _Host:
    """Rank 0's memory file, and the socket at which the others come for it."""

    memory: int
    door: socket.socket
    address: bytes

    @classmethod
    def start(cls, size: int, ranks: int) -> _Host | None:
        """None where this system or its memory doesn't allow it."""
        try:
            memory = os.memfd_create("tightbound")
        except (AttributeError, OSError):
            return None
        door = socket.socket(socket.AF_UNIX)
        address = b"\0tightbound-" + secrets.token_hex(16).encode()
        try:
            os.posix_fallocate(memory, 0, size)
            door.bind(address)
            door.listen(ranks)
        except OSError:
            os.close(memory)
            door.close()
            return None
        door.settimeout(PATIENCE)
        return cls(memory, door, address)

    def introduce(self, ranks: int) -> tuple[int, list[socket.socket]]:
        """Give every other rank the memory and a socket to each of its peers; returns rank 0's."""
        links: dict[int, socket.socket] = {}
        while len(links) < ranks - 1:
            link, _ = self.door.accept()
            link.settimeout(PATIENCE)
            if _is_ours(link):
                links[int.from_bytes(link.recv(RANK_BYTES), "little")] = link
            else:
                link.close()
        ends: list[list[socket.socket]] = [[] for _ in range(ranks)]
        for first in range(ranks):
            for second in range(first + 1, ranks):
                pair = socket.socketpair()
                ends[first].append(pair[0])
                ends[second].append(pair[1])
        for other, link in links.items():
            given = [self.memory, *(end.fileno() for end in ends[other])]
            socket.send_fds(link, [b"."], given)
            link.close()
            for end in ends[other]:
                end.close()
        self.door.close()
        return self.memory, ends[0]

    def close(self) -> None:
        os.close(self.memory)
        self.door.close()


def _is_ours(link: socket.socket) -> bool:
    """Whether a process of the same user is at the other end: the door's name is no secret."""
    content = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    return CREDENTIALS.unpack(content)[1] == os.getuid()


def _connect(address: bytes | None, rank: int) -> socket.socket | None:
    if address is None:
        return None
    link = socket.socket(socket.AF_UNIX)
    try:
        link.connect(address)
        link.send(rank.to_bytes(RANK_BYTES, "little"))
    except OSError:
        link.close()
        return None
    link.settimeout(PATIENCE)
    return link


def _receive(link: socket.socket, count: int) -> list[int]:
    _, found, _, _ = socket.recv_fds(link, 1, count)
    link.close()
    if len(found) < count:
        raise ConnectionError("the first worker of this training ended while it started")
    return list(found)


def _all(fine: bool) -> bool:
    """Whether it is so on every rank."""
    flag = torch.tensor([fine], dtype=torch.uint8)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())
