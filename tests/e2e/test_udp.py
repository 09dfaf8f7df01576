"""UDP through the balancer: a flow stays with the backend it began on, also when others come."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from functools import partial

from tests.e2e.conftest import Service
from tests.world.lab import WEB_PORT
from tests.world.procs import until

FLOWS = 40


@contextlib.contextmanager
def answering(service: Service, *nodes: str) -> Iterator[None]:
    """A server on each node's VIP that answers every datagram with the node's name."""
    with contextlib.ExitStack() as undo:
        for node in nodes:
            server = service.here.backends[node].host.socket(socket.SOCK_DGRAM)
            undo.callback(server.close)
            until(partial(bind, server, service.vip), f"the VIP on {node}")
            server.settimeout(0.1)
            stop = threading.Event()
            thread = threading.Thread(target=answer, args=(server, node, stop))
            thread.start()
            undo.callback(thread.join)
            undo.callback(stop.set)
        yield


def bind(server: socket.socket, vip: str) -> bool:
    server.bind((vip, WEB_PORT))
    return True


def answer(server: socket.socket, node: str, stop: threading.Event) -> None:
    while not stop.is_set():
        with contextlib.suppress(TimeoutError):
            _, sender = server.recvfrom(2048)
            server.sendto(node.encode(), sender)


def ask(client: socket.socket) -> str:
    client.send(b"who?")
    return client.recv(2048).decode()


def test_udp_flows_are_spread_and_stay_when_a_backend_comes_or_drains(service: Service) -> None:
    meta = {"lb-proto": "both", "lb-settle": "3s"}
    service.serve("b1", "b2", meta=meta)
    with contextlib.ExitStack() as undo:
        undo.enter_context(answering(service, "b1", "b2"))
        clients = [service.here.client.socket(socket.SOCK_DGRAM) for _ in range(FLOWS)]
        for client in clients:
            undo.callback(client.close)
            client.settimeout(5)
            client.connect((service.vip, WEB_PORT))
        began = [ask(client) for client in clients]
        assert set(began) == {"b1", "b2"}

        service.register("b3", meta=meta)
        undo.enter_context(answering(service, "b3"))
        service.until_serving("b1", "b2", "b3")
        assert [ask(client) for client in clients] == began
        service.drain("b1")
        assert [ask(client) for client in clients] == began
        assert service.backend("b1")["records"] == began.count("b1")
        service.requests(20)  # TCP on the same port of the same service
