"""Who goes next when not all can: shares by weight between classes, and equal ones between the tenants of a class.

Theory of operation. This is start-time fair queueing (Goyal, Vin and Cheng, 1996) on two levels. Whoever is served is
charged what it takes of the scarcest limit, divided by its weight; whoever has been charged least goes next. One that
comes back after having had nothing to ask for starts where the others are, so that nobody saves up. There is no clock
in it, and nothing to tune but the weights.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..core.types import Priority

MIN_SWEEP = 64
"""Tenants of a class that may be remembered without a call waiting."""
REMEMBERED = 32
"""Those of them, the ones that have had the most, who are still remembered after a sweep."""


class Class:
    """The tenants of one priority, and what the priority has been charged."""

    __slots__ = ("backlog", "priority", "start", "tenants", "virtual", "weight")

    def __init__(self, priority: Priority, weight: float) -> None:
        self.priority = priority
        self.weight = weight
        self.start = 0.0
        self.virtual = 0.0
        """The start of whichever of its tenants was served last."""
        self.backlog = 0
        self.tenants: dict[str, Flow] = {}


class Flow:
    """The calls of one tenant at one priority, and what it has been charged."""

    __slots__ = ("backlog", "group", "start", "tenant")

    def __init__(self, group: Class, tenant: str) -> None:
        self.group = group
        self.tenant = tenant
        self.start = 0.0
        self.backlog = 0


class Fairness:
    """The turns of one provider's waiting calls."""

    __slots__ = ("_classes", "_virtual")

    def __init__(self, weights: Mapping[Priority, float]) -> None:
        self._classes = {priority: Class(priority, weights[priority]) for priority in Priority}
        self._virtual = 0.0

    def flow(self, priority: Priority, tenant: str) -> Flow:
        """The flow of *tenant* at *priority*."""
        group = self._classes[priority]
        flow = group.tenants.get(tenant)
        if flow is None:
            # Also for who is only asked about, and never comes to wait.
            _sweep(group)
            flow = group.tenants[tenant] = Flow(group, tenant)
        return flow

    def join(self, flow: Flow) -> None:
        """One more call of *flow* waits."""
        group = flow.group
        if not group.backlog:
            group.start = max(group.start, self._virtual)
        if not flow.backlog:
            flow.start = max(flow.start, group.virtual)
        group.backlog += 1
        flow.backlog += 1

    def leave(self, flow: Flow) -> None:
        """One of its calls waits no more, whether or not it was served."""
        flow.backlog -= 1
        flow.group.backlog -= 1
        if not flow.backlog:
            _sweep(flow.group)

    def serve(self, flow: Flow, share: float) -> None:
        """A call of *flow*, the one whose turn it was, took *share* of the scarcest limit."""
        group = flow.group
        self._virtual = max(self._virtual, group.start)
        group.virtual = max(group.virtual, flow.start)
        group.start += share / group.weight
        flow.start += share

    def clear(self) -> None:
        """Nobody waits: whoever comes next starts level."""
        self._virtual = 0.0
        for group in self._classes.values():
            group.start = group.virtual = 0.0
            group.backlog = 0
            group.tenants.clear()

    def backlog(self) -> dict[Priority, dict[str, int]]:
        """How many wait, by priority and tenant."""
        return {
            priority: {name: flow.backlog for name, flow in group.tenants.items() if flow.backlog}
            for priority, group in self._classes.items()
            if group.backlog
        }

    def lowest(self) -> Priority | None:
        """The lowest priority of which anybody waits."""
        return next((priority for priority in reversed(Priority) if self._classes[priority].backlog), None)


def _sweep(group: Class) -> None:
    """Forget tenants of whom nobody waits. Whoever is forgotten starts where the others are, and no sooner."""
    tenants = group.tenants
    if len(tenants) <= MIN_SWEEP or len(tenants) <= 2 * group.backlog:
        return
    ahead = sorted(each.start for each in tenants.values() if not each.backlog and each.start > group.virtual)
    if len(ahead) > REMEMBERED:
        # Where tenants come once and never again, that is how much each has had: whoever is new has had it too.
        group.virtual = ahead[-REMEMBERED]
    group.tenants = {name: each for name, each in tenants.items() if each.backlog or each.start > group.virtual}
