"""Configuration of a gateway."""

from __future__ import annotations

from pathlib import Path

import pydantic

from libs.config import Address, AuthSection, Seconds, Section, ServiceConfig


class PeersSection(Section):
    """Services that the gateway calls.

    Attributes:
        catalog: host:port; offerings come from there.
        billing: host:port; prices and credit slices come from there, settlements go there.
        scheduler: host:port; places on workers come from there.
    """

    catalog: Address
    billing: Address
    scheduler: Address


class GatewaySection(Section):
    """The gateway itself.

    Attributes:
        instance: names this gateway among all; part of every generation id.
        journal_dir: folder of the usage journal; must outlive the process.
        slice_nanos: largest credit slice, nanos; a request that needs more gets more.
        slice_refill: a slice is to last for two of these; the shorter, the smaller are slices.
        slice_idle: a slice without work for this long is given back.
        settle_interval: longest time between an end and its settlement.
        queue_wait: longest wait for a place on a worker.
        stall_limit: a client that reads nothing for this long with a full window is cut off.
        replay_window: how long after its end a generation can be resumed or repeated.
        replay_bytes_max: output kept of one stream; above it the oldest frames go. A whole result
            is kept as far as max_output_tokens lets it grow.
        replay_total_bytes_max: output kept of all, and more than plain text that waits for its
            readers; above it new generations are refused once nothing is left to drop.
        move_wait: how long a generation whose worker was lost waits for another one.
        generations_max: generations at the same time; one more is refused.
        slices_max: open credit slices; one more is refused.
        questions_max: calls at the same time that count, tokenize, detokenize or quote; of one
            project a quarter of it.
        cache_secret_file: file with a secret that all gateways of the cluster have: it keeps the
            prefix caches of tenants apart. Without it each start makes one of its own, and caches
            are shared neither between gateways nor across their restarts.
        embeds_max: calls at the same time that embed; of one project a quarter of it.
        receipt_key_file: file with the Ed25519 seed that receipts are signed with, base64 of 32
            bytes. Billing has to know its public key. Without it there are no receipts.
    """

    instance: str = pydantic.Field(pattern="^[a-z][a-z0-9-]{0,30}$")
    journal_dir: Path
    slice_nanos: int = pydantic.Field(default=20_000_000, ge=1)
    slice_refill: Seconds = 1.0
    slice_idle: Seconds = 2.0
    settle_interval: Seconds = 0.1
    queue_wait: Seconds = 30.0
    stall_limit: Seconds = 30.0
    replay_window: Seconds = 60.0
    replay_bytes_max: int = pydantic.Field(default=4 * 1024 * 1024, ge=65_536)
    replay_total_bytes_max: int = pydantic.Field(default=256 * 1024 * 1024, ge=1_048_576)
    move_wait: Seconds = 15.0
    generations_max: int = pydantic.Field(default=4096, ge=1)
    slices_max: int = pydantic.Field(default=4096, ge=1)
    questions_max: int = pydantic.Field(default=64, ge=1)
    cache_secret_file: Path | None = None
    embeds_max: int = pydantic.Field(default=256, ge=1)
    receipt_key_file: Path | None = None


class Config(ServiceConfig):
    """All of it.

    Attributes:
        auth: where the table of API keys comes from.
        peers: services that the gateway calls.
        gateway: the gateway itself.
    """

    auth: AuthSection
    peers: PeersSection
    gateway: GatewaySection
