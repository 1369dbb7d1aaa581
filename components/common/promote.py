"""Let a judged model serve."""

from kfp.dsl import Input, Model

from components.image import component


@component
def promote(contract: str, store: str, run_id: str, job_id: str, bundle: Input[Model]) -> None:
    """Put the bundle into the store and change the rollout, if it is still as judged against."""
    from driftmill import steps

    steps.promote(contract, store, run_id or job_id, bundle.path)
