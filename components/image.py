"""The image that every component runs in, and the decorator that says so.

The image holds the `driftmill` package, so that nothing is installed when a step starts.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal

from kfp import dsl

from driftmill import images


def image(kind: Literal["tabular", "vision", "vision-cuda"]) -> str:
    """The image of the steps for tables or for images; only the latter hold PyTorch.

    `DRIFTMILL_IMAGE` or `driftmill compile --image` name another one.
    """
    return os.environ.get("DRIFTMILL_IMAGE") or images.reference(f"python-{kind}")


def component(function: Callable[..., Any]) -> Any:
    """A lightweight KFP component: only the function's body is shipped, the rest is in the image,
    which the compiler replaces by the contract's.

    A module that defines components must not import `annotations` from `__future__`: KFP reads
    the types themselves.
    """
    return dsl.component(base_image=image("tabular"), install_kfp_package=False)(function)
