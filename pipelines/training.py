"""The pipeline: prepare, fit each family, assemble, judge, promote; record at the end.

One function builds it for tables and images, for the local runner and for a cluster: all run the
same graph. What a step does for which kind of contract is decided in `driftmill.steps`.
"""

# No `annotations` from `__future__` here: KFP reads the types of the pipeline's parameters.

from collections.abc import Callable
from typing import Any, Literal

from kfp import dsl

from components.common.promote import promote
from components.common.record import record
from components.training.assemble import assemble
from components.training.fit import fit
from components.training.judge import judge
from components.training.prepare import prepare
from driftmill.contract import Contract

#: What a step needs: little; memory for the data; or all that training may use.
Need = Literal["little", "data", "training"]


def name(contract: Contract) -> str:
    """The pipeline's name."""
    return f"driftmill-{contract.model}"


def build(
    contract: Contract,
    *,
    store: str,
    code_version: str,
    configure: Callable[[Any, Need], None] = lambda task, need: None,
) -> Any:
    """The pipeline of a contract.

    Args:
        contract: gives the candidate families, and is the default of the parameter `contract`.
        store: default of the parameter `store`.
        code_version: default of the parameter `code_version`.
        configure: called with each task and what it needs, to say how it runs on a cluster.

    Returns:
        A KFP pipeline with the parameters contract, store, run_id, trigger and code_version. An
        empty run_id stands for the id that Kubeflow Pipelines gives the run.
    """
    default_contract, default_store, default_code = contract.to_json(), store, code_version
    families = list(contract.train.candidates)

    @dsl.pipeline(  # type: ignore[untyped-decorator]
        name=name(contract), description=contract.description or None
    )
    def pipeline(
        contract: str = default_contract,
        store: str = default_store,
        run_id: str = "",
        trigger: str = "manual",
        code_version: str = default_code,
    ) -> None:
        run = {
            "contract": contract,
            "store": store,
            "run_id": run_id,
            "job_id": dsl.PIPELINE_JOB_ID_PLACEHOLDER,
        }
        recorded = record(**run, trigger=trigger, code_version=code_version)
        configure(recorded, "little")
        with dsl.ExitHandler(recorded, name="train"):
            prepared = prepare(**run)
            configure(prepared, "data")
            with dsl.ParallelFor(families) as family:
                # Here only artifacts, pipeline parameters and the loop's own item may be used:
                # the local runner puts the item in the place of any other task's parameter.
                fitted = fit(**run, family=family, data=prepared.outputs["data"])
                configure(fitted, "training")
            assembled = assemble(
                **run,
                data=prepared.outputs["data"],
                models=dsl.Collected(fitted.outputs["model"]),
            )
            configure(assembled, "data")
            judged = judge(
                **run, data=prepared.outputs["data"], candidate=assembled.outputs["bundle"]
            )
            configure(judged, "data")
            # Compared with one plain word: a text with quotes would make the condition false.
            with dsl.If(judged.outputs["Output"] == "promote", name="if-promote"):
                promoted = promote(**run, bundle=judged.outputs["bundle"])
                configure(promoted, "little")

    return pipeline
