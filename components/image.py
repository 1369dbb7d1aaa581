"""The image that every component runs in, and the decorator that says so.

The image holds the `driftmill` package, so that nothing is installed when a step starts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kfp import dsl

from driftmill.images import for_steps


def component(function: Callable[..., Any]) -> Any:
    """A lightweight KFP component: only the function's body is shipped, the rest is in the image,
    which the compiler replaces by the contract's.

    A module that defines components must not import `annotations` from `__future__`: KFP reads
    the types themselves.
    """
    return dsl.component(base_image=for_steps("tabular"), install_kfp_package=False)(function)
