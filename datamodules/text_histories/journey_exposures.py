"""Promoted products that households saw or could see: simulated from real patterns, as their package says.

Shape suffixes: E events, P products, V visits, S promotions, K drawn products of a visit.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from datamodules.interactions.journey import DEPARTMENTS
from datamodules.text_histories.event_log import EventLog
from zoo.base.random import SampleRandom

__all__ = ["exposures", "read_exposures"]

_OTHER = "Other"


def read_exposures(folder: Path, negatives: int, seed: int) -> EventLog:
    """Read the asset ``journey``: purchases are behaviours of their department, exposures are candidates.

    Args:
        folder: Folder with ``transactions.parquet``, ``products.parquet`` and ``promotions.parquet``.
        negatives: As of :func:`exposures`.
        seed: As of :func:`exposures`.

    Raises:
        ModuleNotFoundError: The extra ``recsys`` is not installed.
    """
    if find_spec("pyarrow") is None:
        raise ModuleNotFoundError("The source journey is parquet, which needs pyarrow: pip install 'lightning-zoo[recsys]'.")
    from pyarrow.parquet import read_table

    def columns(name: str, *names: str) -> list[np.ndarray]:
        table = read_table(folder / f"{name}.parquet", columns=list(names))
        return [table[each].to_numpy() for each in names]

    household, store, week, product, time = columns(
        "transactions", "household_id", "store_id", "week", "product_id", "transaction_timestamp"
    )
    time = time.astype("datetime64[s]").astype(np.int64)
    promotions = columns("promotions", "store_id", "week", "product_id")
    visitor, shown, when, bought, rate = exposures(promotions, [household, store, week, product, time], negatives, seed)
    features = (*DEPARTMENTS, _OTHER)
    number = {name: features.index(domain) for domain, names in DEPARTMENTS.items() for name in names}
    found: dict[int, tuple[str, int]] = {}
    names = ("product_id", "product_type", "product_category", "brand", "department")
    for key, *parts, department in zip(*(each.tolist() for each in columns("products", *names)), strict=True):
        text = ", ".join(part for part in parts if part)
        found[key] = (text or department or _OTHER, number.get(department, len(DEPARTMENTS)))
    items = np.concatenate([product, shown])
    distinct, item_E = np.unique(items, return_inverse=True)
    texts, lists = zip(*(found.get(key, (_OTHER, len(DEPARTMENTS))) for key in distinct.tolist()), strict=True)
    return EventLog.of(
        features,
        np.concatenate([household, visitor]),
        items,
        np.array(texts)[item_E],
        np.concatenate([time, when]),
        np.concatenate([np.full(len(product), -1), bought]),
        np.concatenate([np.array(lists)[item_E[: len(product)]], np.full(len(shown), -1)]),
        np.concatenate([np.zeros(len(product)), np.log(rate)]),
    )


def exposures(
    promotions: list[np.ndarray], purchases: list[np.ndarray], negatives: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Products that were promoted in the store and week of a visit, all that were bought and some that were not.

    A visit is a household's week in a store, at the time of its first purchase there. Of its n promoted products, each draw, with
    replacement, takes one; those that were bought are left out. A product that was not bought so comes ``negatives / n`` times.

    Args:
        promotions: Store, week and product of each promotion, integers (S,).
        purchases: Household, store, week, product and time of each purchase, integers.
        negatives: Draws of a visit, K.
        seed: Seed of the draws.

    Returns:
        Household, product, time, whether it was bought, and the rate at which the row was sampled (of those that were not bought;
        the others are all there, and have that of their visit as well, since it corrects the odds), each (E,).
    """
    household, store, week, product, time = (each.astype(np.int64) for each in purchases)
    weeks = int(max(week.max(), promotions[1].max())) + 1
    products, place = np.unique(np.concatenate([promotions[2], product]), return_inverse=True)
    number_S, number_N = place[: len(promotions[2])].astype(np.int64), place[len(promotions[2]) :].astype(np.int64)
    pair_S = np.unique((promotions[0].astype(np.int64) * weeks + promotions[1]) * len(products) + number_S)
    places, begin, count = np.unique(pair_S // len(products), return_index=True, return_counts=True)
    place_N = store * weeks + week
    order = np.lexsort((time, place_N, household))
    household, place_N, number_N, time = household[order], place_N[order], number_N[order], time[order]
    is_first = np.append(True, (np.diff(household) != 0) | (np.diff(place_N) != 0))
    visit_N, first_V = np.cumsum(is_first) - 1, np.flatnonzero(is_first)
    at_V = np.searchsorted(places, place_N[first_V]).clip(max=len(places) - 1)
    count_V = np.where(places[at_V] == place_N[first_V], count[at_V], 0)
    pair_N = place_N * len(products) + number_N
    is_promoted = pair_S[np.searchsorted(pair_S, pair_N).clip(max=len(pair_S) - 1)] == pair_N
    bought = np.unique((visit_N * len(products) + number_N)[is_promoted])
    drawn_VK = SampleRandom(seed, torch.arange(len(first_V))).uniform("negatives", (negatives,), torch.float64).numpy()
    visit_D, draw_D = np.nonzero((count_V[:, None] > 0) & (drawn_VK >= 0))
    pair_D = pair_S[begin[at_V[visit_D]] + (drawn_VK[visit_D, draw_D] * count_V[visit_D]).astype(np.int64)]
    drawn = visit_D * len(products) + pair_D % len(products)
    drawn = drawn[~np.isin(drawn, bought)]
    visit_E, number_E = np.divmod(np.concatenate([bought, drawn]), len(products))
    first_E = first_V[visit_E]
    label_E = np.arange(len(visit_E)) < len(bought)
    return household[first_E], products[number_E], time[first_E], label_E, negatives / count_V[visit_E]
