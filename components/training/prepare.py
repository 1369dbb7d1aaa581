"""Read, check, clean and split the rows."""

from kfp.dsl import Dataset, Metrics, Output

from components.image import component


@component
def prepare(
    contract: str,
    store: str,
    run_id: str,
    job_id: str,
    data: Output[Dataset],
    rows: Output[Metrics],
) -> None:
    """Read the source and the labelled log, set bad rows aside, freeze the test rows."""
    from driftmill import steps

    counts = steps.prepare(contract, store, run_id or job_id, data.path)
    rows.metadata.update(counts)
