"""`check`: do two data files tell the same?

Compared are ratios, not figures: every claim's, and tapgate's over each other kind at each place that
both files have. Status 1 if a claim's differs by more than allowed; the others are told only, since a
single place may be a matter of luck.
"""

import statistics

from claims import CLAIMS
from data import Data, in_words, places, ratio


def main(options):
    """The whole of `check`; gives the exit status."""
    old, new = Data.load(options.old), Data.load(options.new)
    within = options.within / 100
    claims = compared(claim_ratios(old), claim_ratios(new))
    others = compared(place_ratios(old), place_ratios(new))
    if not claims:
        print("nothing to compare: the files have no claim in common")
        return 1
    off = told("claim", claims, within)
    off_places = told("place", others, within)
    print(f"claims: {len(claims) - off} of {len(claims)} within {options.within:g} %; "
          f"places: {len(others) - off_places} of {len(others)}")
    return 1 if off else 0


def claim_ratios(data):
    found = {claim.name: claim.figure(data) for claim in CLAIMS}
    return {name: figure[0] for name, figure in found.items() if figure}


def place_ratios(data):
    """tapgate's figure over another kind's, at every place."""
    found = {}
    for of_set, where, metric in places(data):
        own = data.values(of_set, "tapgate", metric, **where)
        for kind in data.kinds(of_set):
            figure = ratio(own, data.values(of_set, kind, metric, **where))
            if kind != "tapgate" and figure:
                found[f"{of_set}, {in_words(where)}: {metric} over {kind}"] = figure[0]
    return found


def compared(old, new):
    return {name: (old[name], new[name]) for name in old if name in new}


def told(what, pairs, within):
    """Prints the pairs that differ by more, largest first; gives their number."""
    factors = {name: max(one / other, other / one) if one and other else (1 if one == other else float("inf"))
               for name, (one, other) in pairs.items()}
    off = sorted((name for name in pairs if factors[name] > 1 + within), key=lambda name: -factors[name])
    for name in off:
        print(f"{what}: {name}: {pairs[name][0]:.4g} before, {pairs[name][1]:.4g} now")
    if factors:
        print(f"{what}s: the median differs by {(statistics.median(factors.values()) - 1) * 100:.0f} %")
    return len(off)
