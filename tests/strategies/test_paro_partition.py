"""Fourteen of the twenty-seven codes are admissible, and the others are told why not."""

from itertools import product

import pytest

from strategies.paro import CODES, Partition


def test_the_optimizer_is_never_coarser() -> None:
    fineness = "NIG".index
    rule = {"".join(code) for code in product("NIG", repeat=3) if fineness(code[2]) >= max(map(fineness, code[:2]))}
    assert set(CODES) == rule and len(CODES) == 14
    assert [str(Partition.of(code)) for code in CODES] == list(CODES)
    assert Partition.of("NIG") == Partition(parameters="N", gradients="I", optimizer="G")


@pytest.mark.parametrize("code", sorted({"".join(code) for code in product("NIG", repeat=3)} - set(CODES)))
def test_the_thirteen_others_break_a_rule_that_is_named(code: str) -> None:
    p, g, os = code
    state, letter = ("parameters", p) if "NIG".index(os) < "NIG".index(p) else ("gradients", g)
    with pytest.raises(ValueError, match=rf"'{code}': the optimizer state \({os}\) is coarser than the {state} \({letter}\)"):
        Partition.of(code)
    with pytest.raises(ValueError, match=" ".join(CODES)):
        Partition(p, g, os)  # type: ignore[arg-type]


@pytest.mark.parametrize("code", ["", "II", "IIGG", "iig", "XIG", "DDP"])
def test_what_is_no_code_is_refused(code: str) -> None:
    with pytest.raises(ValueError, match=f"partition '{code}': a code is three letters of N"):
        Partition.of(code)
