"""Make one bundle from the candidates."""

from typing import List  # noqa: UP035 (KFP knows `List`, not `list`, of artifacts)

from kfp.dsl import Dataset, Input, Model, Output

from components.image import component


@component
def assemble(
    contract: str,
    store: str,
    run_id: str,
    job_id: str,
    data: Input[Dataset],
    models: Input[List[Model]],  # noqa: UP006
    bundle: Output[Model],
) -> None:
    """Pick the best candidate by its cross-validation score and write its bundle."""
    from driftmill import steps

    paths = [model.path for model in models]
    steps.assemble(contract, store, run_id or job_id, data.path, paths, bundle.path)
