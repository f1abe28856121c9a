"""Which replica a request goes to: policies by name, and what they know of a fleet.

Each is a function of the fleet, the numbers of the replicas that a request may go to (there is
one), the request, the time and chance. Knows nothing of how requests get there.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from shoal.core.errors import ConfigError
from shoal.policy.routing.counted import (
    least_outstanding,
    power_of_two,
    prefix_aware,
    round_robin,
    weighted,
)
from shoal.policy.routing.fleet import Ask, Fleet, Numbers
from shoal.policy.routing.predicted import predicted

Policy = Callable[[Fleet, Numbers, Ask, float, Random], int]

POLICIES: dict[str, Policy] = {
    "round-robin": round_robin,
    "weighted": weighted,
    "least-outstanding": least_outstanding,
    "power-of-two": power_of_two,
    "prefix-aware": prefix_aware,
    "predicted": predicted,
}


def policy_named(name: str) -> Policy:
    """
    Raises:
        ConfigError: there is none of that name.
    """
    if name not in POLICIES:
        raise ConfigError(f"router policy is {name!r}; it must be one of {', '.join(POLICIES)}")
    return POLICIES[name]
