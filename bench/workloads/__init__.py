"""The workloads W1 to W10: one file per family; what they have in common is workload, contest and session."""

from __future__ import annotations

from .batching import W3
from .bodies import W4
from .closed_loop import W1, W2
from .growth import W10
from .handles import W5
from .open_loop import W9
from .routes import W7
from .start import W6
from .streaming import W8
from .workload import Workload

WORKLOADS: dict[str, Workload] = {each.id: each for each in (W1, W2, W3, W4, W5, W6, W7, W8, W9, W10)}
