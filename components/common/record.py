"""Write down how a run ended."""

from kfp.dsl import PipelineTaskFinalStatus

from components.image import component


@component
def record(
    contract: str,
    store: str,
    run_id: str,
    job_id: str,
    trigger: str,
    code_version: str,
    status: PipelineTaskFinalStatus,
) -> None:
    """The exit handler: runs last, whatever happened before."""
    from driftmill import steps

    failure = (status.error_message or "") if status.state != "SUCCEEDED" else ""
    steps.record(contract, store, run_id or job_id, trigger, code_version, failure)
