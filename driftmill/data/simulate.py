"""Simulated streams with a known onset of change, so that delay and false alarms can be measured.

`sim:payments?rows=16000&seed=7&onset=6000` is a stream of card payments, some of them fraud. From
row `onset` on the world is another one: a wallet channel takes over part of the traffic, amounts
fall, and fraud moves from large payments of young accounts on the web to bursts of small payments
by wallet from old accounts that were taken over. A model that learnt the first world loses much of
its power; one that has seen some rows of the second gets it back.

`sim:stationary` is the same stream without the change.

Row i depends on seed, onset, start, step and i only, never on how many rows are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import pandas as pd

from driftmill.contract import did_you_mean
from driftmill.data.schema import DataError

#: Rows are drawn in blocks of this size, each with a generator of its own.
BLOCK = 1000
NAMES = ("payments", "stationary")
KEYS = ("rows", "seed", "onset", "start", "step")

CHANNELS = ("web", "app", "store", "wallet")
MERCHANTS = ("grocery", "fuel", "travel", "electronics", "games")


@dataclass(frozen=True)
class Simulation:
    """What a `sim:` URI asks for."""

    name: str
    rows: int = 20_000
    seed: int = 0
    onset: int | None = 6000
    """First row of the changed world; None: it never changes."""
    start: datetime = datetime(2026, 1, 1, tzinfo=UTC)
    """Time of row 0."""
    step: float = 60.0
    """Seconds between two rows."""


def parse(uri: str) -> Simulation:
    """Read a `sim:` URI. Raises DataError for an unknown name or key, or a bad value."""
    parts = urlsplit(uri)
    if parts.path not in NAMES:
        raise DataError(
            f"{uri}: no such simulation {parts.path!r}{did_you_mean(parts.path, NAMES)}; "
            f"there are {', '.join(NAMES)}"
        )
    given = dict(parse_qsl(parts.query, keep_blank_values=True))
    for key in given:
        if key not in KEYS:
            raise DataError(
                f"{uri}: unknown key {key!r}{did_you_mean(key, KEYS)}; there are {', '.join(KEYS)}"
            )
    default = Simulation(parts.path)
    onset = given.get("onset", "none" if parts.path == "stationary" else str(default.onset))
    try:
        start = datetime.fromisoformat(given["start"]) if "start" in given else default.start
        found = Simulation(
            name=parts.path,
            rows=int(given.get("rows", default.rows)),
            seed=int(given.get("seed", default.seed)),
            onset=None if onset == "none" else int(onset),
            start=start.replace(tzinfo=UTC) if start.tzinfo is None else start.astimezone(UTC),
            step=float(given.get("step", default.step)),
        )
    except ValueError as error:
        raise DataError(f"{uri}: {error}; e.g. sim:payments?rows=16000&seed=7&onset=6000") from None
    if found.rows < 1 or found.seed < 0 or found.step <= 0 or (found.onset or 0) < 0:
        raise DataError(f"{uri}: rows and step must be above 0, seed and onset not below 0")
    if found.name == "stationary" and found.onset is not None:
        raise DataError(f"{uri}: a stationary stream has no onset; use sim:payments")
    return found


def onset_time(uri: str) -> datetime | None:
    """When the world changes in the stream of a `sim:` URI; None where it never does."""
    found = parse(uri)
    if found.onset is None or found.onset >= found.rows:
        return None
    return found.start + timedelta(seconds=found.step * found.onset)


def generate(uri: str) -> pd.DataFrame:
    """The rows of a `sim:` URI: `payment_id`, `at` (UTC), eight inputs and `fraud` (yes or no)."""
    found = parse(uri)
    blocks = [_block(found, number) for number in range(-(-found.rows // BLOCK))]
    return pd.concat(blocks, ignore_index=True).head(found.rows)


def _block(found: Simulation, number: int) -> pd.DataFrame:
    """All rows of one block; every draw is made for every row, whichever world it lies in."""
    draw = np.random.default_rng([found.seed, number])
    row = np.arange(number * BLOCK, (number + 1) * BLOCK)
    changed = row >= found.onset if found.onset is not None else np.zeros(BLOCK, dtype=bool)

    channel = np.where(
        changed,
        draw.choice(CHANNELS, BLOCK, p=[0.24, 0.20, 0.16, 0.40]),
        draw.choice(CHANNELS, BLOCK, p=[0.45, 0.33, 0.22, 0.0]),
    )
    # A shop has a terminal, a wallet lives on a phone, the rest is mixed.
    device = np.select(
        [channel == "store", (channel == "wallet") | (channel == "app")],
        ["terminal", "phone"],
        draw.choice(["laptop", "phone"], BLOCK, p=[0.6, 0.4]),
    ).astype(object)
    merchant = draw.choice(MERCHANTS, BLOCK, p=[0.34, 0.16, 0.14, 0.20, 0.16])
    size = draw.normal(0.0, 0.9, BLOCK)
    amount = np.exp(3.9 + size - 0.55 * changed)
    age = draw.gamma(1.6, 420.0, BLOCK)
    # Two draws, not one with two rates: that would shift all draws after it.
    count = draw.poisson(2.0, BLOCK) + changed * draw.poisson(0.6, BLOCK)
    far = draw.normal(0.0, 1.2, BLOCK)
    distance = np.exp(1.8 + far)
    pause = draw.exponential(240.0, BLOCK)

    # Standardised pieces that both worlds weigh in their own way.
    young = np.clip((500.0 - age) / 500.0, -2.0, 1.0)
    many = (count - 2.0) / 1.5
    costly = np.isin(merchant, ["travel", "electronics"])
    before = -4.6 + 1.9 * size + 1.5 * far + 1.6 * young + 1.4 * costly + 1.2 * (channel == "web")
    after = -4.8 - 0.5 * size + 1.0 * far + 0.6 * young + 1.8 * many + 2.3 * (channel == "wallet")
    after += 1.2 * (merchant == "games")
    fraud = draw.random(BLOCK) < 1 / (1 + np.exp(-1.2 * np.where(changed, after, before)))

    device[draw.random(BLOCK) < 0.04] = None
    at = pd.Timestamp(found.start) + pd.to_timedelta(row * found.step, unit="s")
    return pd.DataFrame(
        {
            "payment_id": [f"p{found.seed}-{i:08d}" for i in row],
            "at": at,
            "amount": amount.round(2),
            "account_age_days": age.astype(np.int64),
            "payments_last_day": count,
            "distance_km": np.where(draw.random(BLOCK) < 0.08, np.nan, distance.round(1)),
            "minutes_since_last": np.where(draw.random(BLOCK) < 0.05, np.nan, pause.round(1)),
            "channel": channel,
            "device": device,
            "merchant": merchant,
            "fraud": np.where(fraud, "yes", "no"),
        }
    )
