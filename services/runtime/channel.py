"""gRPC channel options, the same on both ends: message sizes, flow control, keepalive."""

from __future__ import annotations

from typing import Final

import grpc

MESSAGE_BYTES_MAX: Final = 40 * 1024 * 1024
"""Above the 32 MiB that Envoy lets through, so that Envoy answers 413 before gRPC answers RESOURCE_EXHAUSTED."""

KEEPALIVE_MS: Final = 20_000
KEEPALIVE_TIMEOUT_MS: Final = 10_000

_BOTH_ENDS: Final = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    # The probe measures the bandwidth by a PING after nearly each message of a quiet connection: idle processes wake up half
    # as often again. Without it the receive window stays at 64 KiB, or at the message that is being read where that is larger.
    # Over loopback, messages of 1 MiB (FetchBlocks) pass as fast, and larger windows (grpc.http2.lookahead_bytes) were no
    # faster; over a network with milliseconds of delay they would be. The window also bounds what a stalled reader is sent.
    ("grpc.http2.bdp_probe", 0),
)

CLIENT_OPTIONS: Final = (
    *_BOTH_ENDS,
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # How long an attempt to connect may take; one that is refused at once is repeated after the backoff all the same.
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Calls of one process to different channels must not share a connection that a stalled reader can block.
    ("grpc.use_local_subchannel_pool", 1),
)

SERVER_OPTIONS: Final = (
    *_BOTH_ENDS,
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    # Long silent prefills are normal: pings without data must not end the connection (GOAWAY too_many_pings).
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    # Two servers on one port would hide a mistake; a taken port is an error.
    ("grpc.so_reuseport", 0),
)


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel to host:port without TLS. The caller closes it."""
    return grpc.aio.insecure_channel(address, options=CLIENT_OPTIONS)
