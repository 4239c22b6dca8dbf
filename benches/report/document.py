"""`draw`: makes the plots, and fills the generated parts of the document.

What was taken in a virtual machine lies in a file of its own beside the data (`vm.json`), so that neither
run touches what the other took.

A part of the document between `<!-- measured: NAME -->` and `<!-- end of measured -->` is written anew;
the prose around it is left alone. Every part that there is must have its place, and every place its part.
"""

import os
import re

from data import Data
from plots import all_plots
from processes import Failed
from tables import blocks

PART = re.compile(r"(<!-- measured: (\w+) -->\n).*?(<!-- end of measured -->)", re.DOTALL)


def main(options):
    """The whole of `draw`; gives the exit status."""
    crowd = options.crowd or os.path.join(os.path.dirname(os.path.abspath(options.data)), "vm.json")
    data = Data.load(options.data, *([crowd] if options.crowd or os.path.exists(crowd) else []))
    plots = all_plots(data)
    folder = os.path.splitext(options.document)[0]
    os.makedirs(folder, exist_ok=True)
    for name, picture in plots.items():
        write(os.path.join(folder, f"{name}.svg"), picture.render())
    with open(options.document) as file:
        text = filled(file.read(), blocks(data, plots, os.path.basename(folder)), options.document)
    write(options.document, text)
    print(f"{options.document}: {len(plots)} plots in {folder}")
    return 0


def filled(text, parts, name):
    placed = [found.group(2) for found in PART.finditer(text)]
    missing, unknown = set(parts) - set(placed), set(placed) - set(parts)
    if missing or unknown:
        raise Failed(f"{name}: no place for {sorted(missing)}, nothing to put in {sorted(unknown)}; "
                     "a place is <!-- measured: NAME --> and <!-- end of measured -->")
    return PART.sub(lambda found: f"{found.group(1)}\n{parts[found.group(2)]}\n\n{found.group(3)}", text)


def write(path, text):
    with open(path, "w") as file:
        file.write(text)
