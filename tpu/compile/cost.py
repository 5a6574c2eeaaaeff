"""What a run costs in money, by public prices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tpu.chips import Chip

if TYPE_CHECKING:
    pass


def run_cost(step_seconds: float, steps: int, chip: Chip, chips: int, prices: dict[str, Any]) -> dict[str, Any]:
    """Chip-hours, energy (an estimate, from `Chip.watts`) and price of a whole run; None where no price is known.

    `prices` is what tpu/prices.json holds.
    """
    chip_hours = step_seconds * steps * chips / 3600
    price = prices["prices"].get(chip.name)
    return {
        "steps": steps,
        "days": step_seconds * steps / 86400,
        "chip_hours": chip_hours,
        "kwh_estimate": chip_hours * chip.watts / 1000,
        "cost": None if price is None else chip_hours * price,
        "currency": prices["currency"],
        "prices_of": prices["date"],
    }
