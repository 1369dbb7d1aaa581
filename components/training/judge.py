"""Decide whether the new model may serve."""

from kfp.dsl import HTML, Dataset, Input, Metrics, Model, Output

from components.image import component


@component
def judge(
    contract: str,
    store: str,
    run_id: str,
    job_id: str,
    data: Input[Dataset],
    candidate: Input[Model],
    bundle: Output[Model],
    metrics: Output[Metrics],
    report: Output[HTML],
) -> str:
    """Compare with the champion on the same test rows; answers `promote` or `reject`."""
    from driftmill import steps

    verdict = steps.judge(
        contract, store, run_id or job_id, data.path, candidate.path, bundle.path, report.path
    )
    metrics.metadata.update(verdict.challenger_metrics)
    return "promote" if verdict.promote else "reject"
