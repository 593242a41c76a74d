"""Many clients at once, over several gateways, for credit that is enough for some of them."""

from __future__ import annotations

from pathlib import Path

from typing_extensions import override

from tests.sim.money_clients import Ask
from tests.sim.money_gateway import FREE, RATES
from tests.sim.money_network import Prompt
from tests.sim.money_themes import Theme
from tests.sim.money_world import World

RACERS = 256
_PROMPT = Prompt(output_tokens=5, spared_tokens=0, cached_tokens=0, token_s=0.3)
"""Takes seconds: what is held comes back when nobody asks any more."""
HOLD = RATES.most(
    input_tokens=_PROMPT.input_tokens,
    output_tokens=_PROMPT.output_tokens,
    is_background=False,
)


class Race(World):
    """All ask for the same within a moment."""

    def __init__(self, seed: int, folder: Path, affordable: int) -> None:
        theme = Theme(
            name="race",
            faults=(0,),
            requests=(RACERS, RACERS),
            span_s=0.06,
            credits=(affordable * HOLD + HOLD - 1,),
            slices=(100, 3000, 100_000),
        )
        super().__init__(seed, folder, theme)

    @override
    def arrive(self) -> None:
        self.ask(
            Ask(
                gateway=self.rng.choice(self.gateways).name,
                principal=FREE,
                at_s=self.loop.time(),
                prompt=_PROMPT,
                max_output_tokens=_PROMPT.output_tokens,
            ),
            stays=True,
        )

    @property
    def admitted(self) -> int:
        """Racers that were admitted before the first of them was done."""
        return sum(bool(ask.generation_id) for ask in self.asks)
