"""Run a contract's pipeline on Kubeflow Pipelines again and again: `driftmill schedule CONTRACT`.

A model has one recurring run, `driftmill-<model>`. Its description holds the digest of all that it
was made from: the same command again changes nothing, and another package or time replaces it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys

from croniter import CroniterBadCronError, croniter

from driftmill.contract import Contract, load
from pipelines import compile as packages
from pipelines import kubeflow
from pipelines.kubeflow import ApiError, Kubeflow, Object

_EPILOG = """\
Example: driftmill schedule contract.yaml --cron '0 3 * * *' --store s3://models/driftmill
         driftmill schedule contract.yaml --remove

KF_PIPELINES_ENDPOINT names the endpoint, KF_PIPELINES_TOKEN holds a bearer token.
exit codes: 0 done, 1 failed, 2 wrong usage or a bad contract
"""


def main(arguments: list[str] | None = None) -> int:
    """Create, replace or remove the recurring run, and return the exit code."""
    options = _options(arguments)

    def command() -> int:
        contract = load(options.contract)
        print(_remove(contract, options) if options.remove else _schedule(contract, options))
        return 0

    return kubeflow.answer(command)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="driftmill schedule",
        description="Run the pipeline on a Kubeflow cluster again and again.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("contract", metavar="CONTRACT", help="the contract file")
    parser.add_argument(
        "--cron",
        metavar="'M H D M W'",
        help="when, in five fields, UTC; default: the contract's retrain.schedule",
    )
    parser.add_argument("--remove", action="store_true", help="remove the recurring run")
    packages.add_package_options(parser)
    kubeflow.add_options(parser)
    return parser.parse_args(arguments)


def name(contract: Contract) -> str:
    """The recurring run's name."""
    return f"driftmill-{contract.model}"


def six_fields(cron: str) -> str:
    """A cron expression of five fields as Kubeflow reads it: with seconds, and with nothing in it
    that its parser understands in another way (names, Sunday as 7, ranges over the week's end).

    Raises:
        ValueError: it is not a cron expression, or one that Kubeflow knows no word for.
    """
    try:
        fields, nth = croniter.expand(cron)
    except (CroniterBadCronError, AttributeError) as error:
        raise ValueError(f"{cron!r} is not a cron expression ({error})") from None
    texts = [",".join(str(value) for value in field) for field in fields]
    if len(fields) != 5 or nth or not all(t.replace(",", "").isdigit() or t == "*" for t in texts):
        raise ValueError(
            f"{cron!r} is not a cron expression of five fields that Kubeflow takes, e.g. "
            "'0 3 * * *'"
        )
    return " ".join(["0", *texts])


def _schedule(contract: Contract, options: argparse.Namespace) -> str:
    """Create or replace the recurring run; what was done."""
    cron = options.cron or contract.retrain.schedule
    if cron is None:
        raise ApiError(
            f"{contract.model} has no schedule: give --cron '0 3 * * *', or set retrain.schedule "
            "in the contract",
            usage=True,
        )
    try:
        six = six_fields(cron)
    except ValueError as error:
        raise ApiError(str(error), usage=True) from None
    store = kubeflow.store_uri(options)
    api = Kubeflow(options.endpoint, options.namespace)
    wanted: Object = {
        **kubeflow.body(contract, store, {"trigger": "schedule"}, options),
        "display_name": name(contract),
        "experiment_id": api.experiment(options.experiment or contract.model),
        "trigger": {"cron_schedule": {"cron": six}},
        "max_concurrency": "1",
        "no_catchup": True,
    }
    digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
    wanted["description"] = f"made by driftmill schedule, {digest}"
    return f"{name(contract)}: {_replace(api, wanted)} ({cron}, UTC)"


def _replace(api: Kubeflow, wanted: Object) -> str:
    """Bring about that the wanted recurring run is the only one of its name; what was done.

    The new one is made asleep and wakes when no other is awake: at no moment two start runs, and a
    command that was cut short is simply given again.
    """
    found = api.recurring_runs(wanted["display_name"])
    same = [r for r in found if r.get("description") == wanted["description"]]
    chosen = same[0] if same else api.create_recurring_run({**wanted, "mode": "DISABLE"})
    others = [r for r in found if r["recurring_run_id"] != chosen["recurring_run_id"]]
    for other in others:
        api.disable(other["recurring_run_id"])
    asleep = not same or chosen.get("status") != "ENABLED"
    if asleep:
        api.enable(chosen["recurring_run_id"])
    for other in others:
        api.delete_recurring_run(other["recurring_run_id"])
    if not same:
        return "replaced" if others else "created"
    return "enabled again" if asleep else "unchanged, others removed" if others else "unchanged"


def _remove(contract: Contract, options: argparse.Namespace) -> str:
    """Remove all recurring runs of the name; what was done."""
    api = Kubeflow(options.endpoint, options.namespace)
    found = api.recurring_runs(name(contract))
    for recurring in found:
        api.delete_recurring_run(recurring["recurring_run_id"])
    return f"{name(contract)}: {'removed' if found else 'there is none'}"


if __name__ == "__main__":
    sys.exit(main())
