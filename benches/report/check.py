"""`check`: do two data files tell the same?

Compared are ratios, not figures: every claim's, and tapgate's over each other kind at each place that
both files have. Status 1 if a claim's differs by more than allowed; the others are told only, since a
single place may be a matter of luck. So are the ratios of the other kinds over one another, in which tapgate has
no part: how far these differ is the machine's doing, and no claim can be held to less.
"""

import itertools
import statistics

from claims import CLAIMS
from data import ON_LOOPBACK, Data, in_words, places, ratio


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
    machines = factors(compared(machine_ratios(old), machine_ratios(new)))
    off_machines = len(beyond(machines, within))
    told_median("without tapgate", machines)
    print(f"claims: {len(claims) - off} of {len(claims)} within {options.within:g} %; "
          f"places: {len(others) - off_places} of {len(others)}; "
          f"without tapgate: {len(machines) - off_machines} of {len(machines)}")
    return 1 if off else 0


def claim_ratios(data):
    found = {claim.name: claim.figure(data) for claim in CLAIMS}
    return {name: figure[0] for name, figure in found.items() if figure}


def place_ratios(data):
    """tapgate's figure over another kind's, at every place."""
    return ratios(data, lambda kinds: [("tapgate", kind) for kind in kinds if kind != "tapgate"])


def machine_ratios(data):
    """Every other kind's over each other's."""
    def pairs(kinds):
        others = [kind for kind in kinds if not kind.startswith("tapgate")]
        # What has no MTU is the same at each.
        return [pair for pair in itertools.combinations(others, 2) if not set(pair) <= set(ON_LOOPBACK)]
    return ratios(data, pairs)


def ratios(data, pairs):
    """At every place, one kind's figure over another's, for the pairs that are chosen of the kinds there."""
    found = {}
    for of_set, where, metric in places(data):
        for one, other in pairs(data.kinds(of_set)):
            figure = ratio(data.values(of_set, one, metric, **where), data.values(of_set, other, metric, **where))
            if figure:
                found[f"{of_set}, {in_words(where)}: {metric} of {one} over {other}"] = figure[0]
    return found


def compared(old, new):
    return {name: (old[name], new[name]) for name in old if name in new}


def factors(pairs):
    """By how much the ratios of each pair differ; 1 is not at all."""
    return {name: max(one / other, other / one) if one and other else (1 if one == other else float("inf"))
            for name, (one, other) in pairs.items()}


def beyond(differ, within):
    """What differs by more than that, largest first."""
    off = [name for name, factor in differ.items() if factor > 1 + within]
    return sorted(off, key=lambda name: -differ[name])


def told(what, pairs, within):
    """Prints the pairs that differ by more, largest first; gives their number."""
    differ = factors(pairs)
    off = beyond(differ, within)
    for name in off:
        print(f"{what}: {name}: {pairs[name][0]:.4g} before, {pairs[name][1]:.4g} now")
    told_median(f"{what}s", differ)
    return len(off)


def told_median(what, differ):
    if differ:
        print(f"{what}: the median differs by {(statistics.median(differ.values()) - 1) * 100:.0f} %")
