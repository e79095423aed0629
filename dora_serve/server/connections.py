"""What a client may do before anybody knows who it is, and how the server ends: its bounds."""

from __future__ import annotations

import os
import resource
import signal
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

GRACE = 50  # seconds for what was accepted, once the server shall end
END = 60  # seconds after which it ends whatever happens

_LOOK = 10  # seconds: who keeps this waiting at two looks in a row is cut off
_HEADERS = 16 << 10  # bytes of a request's head
_PIECE = 4 << 10  # bytes read at once: what they say is done in one step of the event loop
_BACKLOG = 256  # connections that are not accepted yet
_CONNECTIONS = 1000


class Connection(H11Protocol):
    """Cuts off a client that sends no request, or takes no more of an answer, for `_LOOK` to twice
    as many seconds; and when there are too many connections, those that keep it waiting longest.
    """

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.max_size = _PIECE
        self._begun = self.loop.time()
        self._look(None)
        if len(self.connections) > connections_bound():
            self._make_room()

    def _make_room(self) -> None:
        """Cut off those that keep this waiting longest, many at once since all are looked at."""
        mine = [each for each in self.connections if isinstance(each, Connection) and each._waits]
        oldest = sorted(mine, key=lambda each: each._begun)[: 1 + len(mine) // 10]
        for each in oldest or [self]:
            self.connections.discard(each)
            each.transport.abort()

    def on_response_complete(self) -> None:
        self._begun = self.loop.time()  # it waits for the next request from now on
        super().on_response_complete()

    @property
    def _waits(self) -> bool:
        """For a whole request."""
        cycle = self.cycle
        return cycle is None or cycle.response_complete or cycle.more_body

    def _look(self, before: object) -> None:
        unread = self.transport.get_write_buffer_size()
        idle = self.cycle is None or self.cycle.response_complete
        found = (self.cycle, unread) if unread or idle else None
        if found is not None and found == before:
            self.transport.abort()
        else:
            self._timer = self.loop.call_later(_LOOK, self._look, found)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What is no request is refused, unless it comes behind an answer that ends the connection,
        or in the midst of one: then nothing may be said any more."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()

    def shutdown(self) -> None:
        """What has come whole is answered; for nothing else is waited."""
        if self._waits and self.cycle is not None and not self.cycle.response_started:
            self.transport.abort()
        else:
            super().shutdown()


def connections_bound() -> int:
    """As many as leave half of the files that this process may open."""
    return min(_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


class Server(uvicorn.Server):
    """Ends within `END` seconds of the first signal, and at once with a second."""

    def handle_exit(self, sig: int, _: FrameType | None) -> None:
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True
        signal.alarm(END)


def serve(app: Any, host: str, port: int) -> bool:
    """Serve `app` until SIGTERM, SIGINT or SIGHUP; whether it could."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * _CONNECTIONS + _BACKLOG
    most = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        loop="asyncio",  # with which a connection tells how much it reads at once
        http=Connection,
        ws="none",
        h11_max_incomplete_event_size=_HEADERS,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=GRACE,
        log_config=None,
        access_log=False,
        server_header=False,
    )
    server = Server(config)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # which nohup changes
        signal.signal(signal.SIGHUP, server.handle_exit)
    server.run()
    signal.alarm(0)
    return server.started
