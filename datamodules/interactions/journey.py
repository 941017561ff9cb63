"""Purchases at a grocer, simulated from real patterns as their package says: for many domains at size, not for conclusions.

Shape suffixes: N purchases, P products.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from datamodules.interactions.interaction_log import RawLog

__all__ = ["DEPARTMENTS", "journey_log", "read_journey"]

DEPARTMENTS = {
    "Grocery": ["GROCERY"],
    "Drug": ["DRUG GM"],
    "Produce": ["PRODUCE"],
    "Meat": ["MEAT", "MEAT-PCKGD", "SEAFOOD", "SEAFOOD-PCKGD"],
    "Deli": ["DELI", "PASTRY", "SALAD BAR"],
}
"""Departments of each domain."""


def read_journey(folder: Path) -> RawLog:
    """Read the asset ``journey``.

    Args:
        folder: Folder with ``transactions.parquet`` and ``products.parquet``.

    Raises:
        ModuleNotFoundError: The extra ``recsys`` is not installed.
    """
    if find_spec("pyarrow") is None:
        raise ModuleNotFoundError("The source journey is parquet, which needs pyarrow: pip install 'lightning-zoo[recsys]'.")
    from pyarrow.parquet import read_table

    products = read_table(folder / "products.parquet").to_pydict()
    names = ["household_id", "product_id", "transaction_timestamp"]
    table = read_table(folder / "transactions.parquet", columns=names)
    household, product, time = (table[name].to_numpy() for name in names)
    return journey_log(products, household, product, time.astype("datetime64[s]").astype(np.int64))


def journey_log(products: dict[str, list], household_N: np.ndarray, product_N: np.ndarray, time_N: np.ndarray) -> RawLog:
    """The first purchase of each item by each household; an item is a type of product of a category and a brand.

    Args:
        products: Columns ``product_id``, ``department``, ``product_category``, ``product_type``, ``brand``; products without a
            type, or of other departments, are left out.
        household_N: Household of each purchase, int64 (N,).
        product_N: Product id, int64 (N,).
        time_N: Time in seconds, int64 (N,).
    """
    names = list(DEPARTMENTS)
    domain_of = {department: names.index(domain) for domain, departments in DEPARTMENTS.items() for department in departments}
    keys: list[tuple[int, str, str, str] | None] = []
    columns = ("department", "product_category", "product_type", "brand")
    for department, category, kind, brand in zip(*(products[name] for name in columns), strict=True):
        keys.append((domain_of[department], category or "", kind, brand or "") if department in domain_of and kind else None)
    items = {key: number for number, key in enumerate(sorted({key for key in keys if key is not None}))}
    item_P = np.array([-1 if key is None else items[key] for key in keys])
    id_P = np.array(products["product_id"])
    order_P = np.argsort(id_P)
    place_N = np.searchsorted(id_P, product_N, sorter=order_P).clip(max=len(id_P) - 1)
    found_P = order_P[place_N]
    item_N = np.where(id_P[found_P] == product_N, item_P[found_P], -1)
    households, user_N = np.unique(household_N, return_inverse=True)
    kept = np.flatnonzero(item_N >= 0)
    kept = kept[np.lexsort((time_N[kept], item_N[kept], user_N[kept]))]
    _, first = np.unique(user_N[kept] * len(items) + item_N[kept], return_index=True)
    kept = kept[first]
    domain_I = np.array([key[0] for key in items], dtype=np.int64)
    return RawLog(
        domains=names,
        user_keys=[str(each) for each in households.tolist()],
        item_keys=["|".join((names[domain], *parts)) for domain, *parts in items],
        titles=[", ".join(part for part in (kind, category, brand) if part) for _, category, kind, brand in items],
        item_domain=domain_I,
        rank_I=np.arange(len(items)),
        user_N=user_N[kept],
        item_N=item_N[kept],
        domain_N=domain_I[item_N[kept]],
        time_N=time_N[kept],
        rating_N=np.zeros(len(kept)),
    )
