"""Every limit that more than one part of the suite knows, with its unit and its reason."""

from __future__ import annotations

# Pages. Generated clients in every language refuse responses over 4 MiB by default.
PAGE_SIZE_DEFAULT = 50
PAGE_SIZE_MAX = 1000

# Messages, bytes. Prompts are at most 1 MiB of text (generation.proto), with room for a chat.
PUBLIC_REQUEST_BYTES_MAX = 4 * 1024 * 1024
INTERNAL_MESSAGE_BYTES_MAX = 64 * 1024 * 1024
METADATA_BYTES_MAX = 8 * 1024

# Streams of one connection. Without it one client can starve all others by opening and resetting
# streams; clients that need more open several connections.
CONCURRENT_STREAMS_MAX = 128

# Keepalive, milliseconds. Clients that ping every 30 s during a long prefill are welcome.
KEEPALIVE_TIME_MS = 30_000
KEEPALIVE_TIMEOUT_MS = 10_000
PING_INTERVAL_MIN_MS = 10_000
PING_STRIKES_MAX = 2

# Public connections are renewed so that balancers see new servers; running calls get the grace.
CONNECTION_AGE_MAX_MS = 30 * 60 * 1000
CONNECTION_AGE_GRACE_MS = 15 * 60 * 1000

# Status details travel in trailers; above about 8 KiB the whole status is lost.
STATUS_DETAILS_BYTES_MAX = 6 * 1024

# Watches. A watcher that hears nothing for longer than the silence starts again.
WATCH_BOOKMARK_S = 4.0
WATCH_SILENCE_MAX_S = 10.0
# How late a change made by another process of the same service may be seen.
WATCH_POLL_S = 0.9

# A key table older than this refuses everybody: a revoked key must not live on.
KEY_TABLE_AGE_MAX_S = 60.0

assert PAGE_SIZE_DEFAULT <= PAGE_SIZE_MAX
assert WATCH_BOOKMARK_S * 2 < WATCH_SILENCE_MAX_S < KEY_TABLE_AGE_MAX_S
assert PUBLIC_REQUEST_BYTES_MAX < INTERNAL_MESSAGE_BYTES_MAX
