"""Train one candidate family."""

from kfp.dsl import Dataset, Input, Model, Output

from components.image import component


@component
def fit(
    contract: str,
    store: str,
    run_id: str,
    job_id: str,
    family: str,
    data: Input[Dataset],
    model: Output[Model],
) -> None:
    """Search the family's settings, train the best on all training rows, export to ONNX."""
    from driftmill import steps

    scores = steps.fit(contract, store, run_id or job_id, family, data.path, model.path)
    model.metadata.update({"family": family, **scores})
