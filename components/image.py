"""The image that every component runs in, and the decorator that says so.

The image holds the `driftmill` package, so that nothing is installed when a step starts. Its name
contains `python` because KFP's local runner takes any other name for a foreign image and warns.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from kfp import dsl

#: `DRIFTMILL_IMAGE` or `python -m pipelines.compile --image` name another one.
IMAGE = os.environ.get("DRIFTMILL_IMAGE") or f"driftmill/python-tabular:{version('driftmill')}"


def component(function: Callable[..., Any]) -> Any:
    """A lightweight KFP component: only the function's body is shipped, the rest is in the image.

    A module that defines components must not import `annotations` from `__future__`: KFP reads
    the types themselves.
    """
    return dsl.component(base_image=IMAGE, install_kfp_package=False)(function)
