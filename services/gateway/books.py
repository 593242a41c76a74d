"""Where money is written down, and what every generation shares."""

from __future__ import annotations

from dataclasses import dataclass

from libs.clock import Clock
from libs.process import Background
from libs.receipts import ReceiptSigner
from services.gateway.journal import Journal
from services.gateway.release import Releaser
from services.gateway.settlement import Settler
from services.gateway.slices import SliceBook


@dataclass(frozen=True, slots=True, kw_only=True)
class Books:
    """Where money is written down, and what every generation shares.

    Attributes:
        journal: counts, before they are released.
        slices: what is held.
        settler: what has ended.
        clock: time.
        releaser: releases output.
        background: runs what moves generations to other workers.
        move_wait_s: how long a generation whose worker was lost waits for another one.
        signer: signs receipts; None makes none.
    """

    journal: Journal
    slices: SliceBook
    settler: Settler
    clock: Clock
    releaser: Releaser
    background: Background
    move_wait_s: float
    signer: ReceiptSigner | None = None
