"""`freezecache zo-cost`: prints what random numbers for zeroth-order training would cost in hardware."""

from __future__ import annotations

import argparse
import json

from ..zeroth_order.hardware import estimate_costs


def print_costs(options: argparse.Namespace) -> None:
    """Prints the estimates for the options of the command line.

    Raises:
        ValueError: if an option is not possible; the message names it.
    """
    costs = estimate_costs(
        options.parameters,
        options.lanes,
        options.bits,
        options.pool_size,
        options.estimator,
        options.estimates,
        options.exact_scaling,
    )
    print(json.dumps(costs.to_dict()) if options.json else costs)
