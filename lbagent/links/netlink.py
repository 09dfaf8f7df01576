"""Netlink sockets: requests and their answers, events, and the kernel's own words when it refuses."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

from pyroute2.netlink import nlmsg, rtnl
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from lbagent.errors import LinkError

ANSWER_S = 5  # the kernel answers at once; a driver may take a while to attach a program
BATCH = 128  # requests in one datagram
DUMP_TRIES = 5  # a table that changes while it is read is read again
DRAIN = 2000  # datagrams of events taken in at once
RECEIVE_BUFFER = 4 << 20
DATAGRAM = 1 << 17  # bytes; the kernel's are 32 KiB at most

# linux/netlink.h
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 0x1, 0x4, 0x300
NLM_F_EXCL, NLM_F_CREATE = 0x200, 0x400
NLM_F_DUMP_INTR, NLM_F_ACK_TLVS = 0x10, 0x200  # in answers
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLMSGERR_ATTR_MSG = 1
SOL_NETLINK = 270
SO_RCVBUFFORCE = 33  # asm-generic/socket.h; beyond net.core.rmem_max
NETLINK_ADD_MEMBERSHIP, NETLINK_CAP_ACK, NETLINK_EXT_ACK = 1, 10, 11
HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
ATTRIBUTE = struct.Struct("=HH")  # struct nlattr: length, type
NLA_TYPE_MASK = 0x3FFF


class Refused(OSError):
    """The kernel's answer to a request; strerror has what it said beyond the number."""


class Netlink:
    """A NETLINK_ROUTE socket of the calling thread's network namespace. For one thread at a time."""

    def __init__(self, groups: Sequence[int] = ()) -> None:
        self._sequence = 0
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
        )
        try:
            with contextlib.suppress(PermissionError):  # reading needs no rights
                self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
            self._socket.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
            self._socket.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
            self._socket.bind((0, 0))
            for group in groups:
                self._socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
            # not settimeout(): with it, Python waits even for a read that must not (MSG_DONTWAIT)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", ANSWER_S, 0))
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def ask(self, request: nlmsg, kind: int, flags: int = 0) -> list[nlmsg]:
        """Send one request and return all its answers. Raises Refused."""
        encoded = encode(request, kind, NLM_F_REQUEST | NLM_F_ACK | flags)
        for _ in range(DUMP_TRIES):
            answers, is_whole = self._answers(self._send([encoded]))
            if is_whole:
                break
        return answers

    def _answers(self, sequence: int) -> tuple[list[nlmsg], bool]:
        """All answers to a request, and whether the table stayed as it was while it was read."""
        answers: list[nlmsg] = []
        is_whole = True
        while True:
            for type_, flags, at, message in self._receive():
                if at != sequence:
                    continue  # a late answer to a request that was given up
                is_whole &= not flags & NLM_F_DUMP_INTR
                if type_ in (NLMSG_ERROR, NLMSG_DONE):
                    _raise_if_refused(type_, flags, message)
                    return answers, is_whole
                answers.append(decode(type_, message))

    def ask_each(self, requests: Sequence[bytes]) -> list[bytes | None]:
        """Send encoded requests that have one answer each; None where the kernel refused."""
        answers: list[bytes | None] = []
        for start in range(0, len(requests), BATCH):
            batch = requests[start : start + BATCH]
            first = self._send(batch)
            found: dict[int, bytes | None] = {}
            while len(found) < len(batch):
                for type_, _, at, message in self._receive():
                    if at >= first:
                        found[at] = None if type_ == NLMSG_ERROR else message
            answers.extend(found[first + i] for i in range(len(batch)))
        return answers

    def tell(self, requests: Sequence[bytes]) -> None:
        """Send encoded requests and care for no answer."""
        for start in range(0, len(requests), BATCH):
            self._send(requests[start : start + BATCH])
        for _ in self.pending():
            pass

    def pending(self) -> Iterator[tuple[int, bytes]]:
        """Type and content of messages that have come, up to DRAIN datagrams. Raises OSError ENOBUFS."""
        for _ in range(DRAIN):
            try:
                data = self._socket.recv(DATAGRAM, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            for type_, _, _, message in _split(data):
                yield type_, message

    def _receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        try:
            return _split(self._socket.recv(DATAGRAM))
        except BlockingIOError as error:
            raise TimeoutError(errno.ETIMEDOUT, f"no answer from the kernel in {ANSWER_S} s") from error

    def _send(self, requests: Sequence[bytes]) -> int:
        """In one datagram, numbered; returns the first number."""
        first = self._sequence + 1
        out = bytearray()
        for request in requests:
            self._sequence += 1
            length, type_, flags, _, port = HEADER.unpack_from(request)
            out += HEADER.pack(length, type_, flags, self._sequence, port) + request[HEADER.size :]
        self._socket.send(out)
        return first


def _split(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Type, flags, sequence and whole content of each message in a datagram."""
    at = 0
    while at + HEADER.size <= len(data):
        length, type_, flags, sequence, _ = HEADER.unpack_from(data, at)
        yield type_, flags, sequence, data[at : at + length]
        at += max(length + 3 & ~3, HEADER.size)


_MESSAGES: dict[int, type[nlmsg]] = {
    rtnl.RTM_NEWLINK: ifinfmsg,
    rtnl.RTM_DELLINK: ifinfmsg,
    rtnl.RTM_NEWADDR: ifaddrmsg,
    rtnl.RTM_NEWROUTE: rtmsg,
    rtnl.RTM_DELROUTE: rtmsg,
    rtnl.RTM_NEWNEIGH: ndmsg,
    rtnl.RTM_DELNEIGH: ndmsg,
}


def decode(type_: int, content: bytes) -> nlmsg:
    message = _MESSAGES[type_](content)
    message.decode()
    return message


def encode(message: nlmsg, kind: int, flags: int) -> bytes:
    message["header"] = {"type": kind, "flags": flags}
    message.encode()
    return bytes(message.data)


def attributes(content: bytes, at: int) -> dict[int, bytes]:
    """Type -> value of the attributes that start there. A tenth of the time that decode() takes."""
    found: dict[int, bytes] = {}
    while at + 4 <= len(content):
        length, type_ = ATTRIBUTE.unpack_from(content, at)
        found[type_ & NLA_TYPE_MASK] = content[at + 4 : at + length]
        at += max(length + 3 & ~3, 4)
    return found


def _raise_if_refused(type_: int, flags: int, message: bytes) -> None:
    """An error is struct nlmsgerr: the number, the header of the request (by NETLINK_CAP_ACK no more of it),
    then attributes. The end of a dump is the number and the attributes."""
    if len(message) < HEADER.size + 4:
        return
    (number,) = struct.unpack_from("=i", message, HEADER.size)
    if number == 0:
        return
    said = ""
    if flags & NLM_F_ACK_TLVS:
        told = attributes(message, HEADER.size + 4 + (HEADER.size if type_ == NLMSG_ERROR else 0))
        said = told.get(NLMSGERR_ATTR_MSG, b"").rstrip(b"\0").decode(errors="replace")
    raise Refused(-number, f"{os.strerror(-number)}: {said}" if said else os.strerror(-number))


def index_of(device: str) -> int:
    try:
        return socket.if_nametoindex(device)
    except OSError as error:
        names = ", ".join(sorted(name for _, name in socket.if_nameindex()))
        raise LinkError(f"no network device {device!r}; there are: {names}") from error
