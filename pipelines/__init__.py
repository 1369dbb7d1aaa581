"""KFP pipelines, the compiler from a contract to a package, and the local runner."""

from importlib.metadata import version


def code_version() -> str:
    """The version of Driftmill that runs. (The bundle's function says the same, and imports the
    whole serving stack.)"""
    return version("driftmill")
