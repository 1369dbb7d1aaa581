"""The command line. It only asks and shows: each command calls the library, or a process of the
pipelines or the stack, and imports what it needs when it runs, so that `--help` stays quick."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from driftmill.contract import Contract
    from driftmill.home import Home
    from driftmill.replay import ReplayResult
    from driftmill.rollout import Rollout

#: Exit codes, also in docs/cli.md.
OK, FAILED, USAGE, REFUSED, STOPPED, NOT_UP, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130

_EPILOG = (
    "Exit codes: 0 done (train: promoted), 1 failed, 2 wrong usage or a bad contract,"
    " 3 not promoted (trigger: not started), 4 stopped by the data, 5 the stack is not up,"
    " 130 interrupted."
)

app = typer.Typer(
    name="driftmill",
    help="One contract file per model: train, serve, watch, decide, train again.",
    epilog=_EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
rollout_app = typer.Typer(
    help="Which version serves: show, set, roll back, history.", no_args_is_help=True
)
app.add_typer(rollout_app, name="rollout")

ContractFile = Annotated[
    Path, typer.Argument(metavar="CONTRACT", help="The contract file.", show_default=False)
]
Which = Annotated[
    str | None,
    typer.Argument(
        metavar="CONTRACT|MODEL",
        help="A contract file or the name of a model. Default: the model of the running stack, or"
        " the only one in the store.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Reason = Annotated[str, typer.Option("--reason", "-r", help="Why; kept in the history.")]


class Problem(RuntimeError):
    """What the user has to know, and the exit code."""

    def __init__(self, message: str, code: int = FAILED) -> None:
        super().__init__(message)
        self.code = code


def main() -> NoReturn:
    """Entry point: errors of the user become a message on stderr and an exit code."""
    try:
        app()
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader of the output has gone, as `head` does; nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(OK)
    except (ValueError, RuntimeError) as error:
        # Errors that Driftmill raises itself are written for people; others are bugs.
        if type(error).__module__.partition(".")[0] != "driftmill":
            raise
        name = type(error).__name__
        codes = {"ContractError": USAGE, "InitError": USAGE}
        codes |= {"DataError": STOPPED, "QuarantineError": STOPPED}
        _fail(str(error), error.code if isinstance(error, Problem) else codes.get(name, FAILED))
    except ModuleNotFoundError as error:
        from driftmill import extras

        advice = extras.advice(error)
        if advice is None:
            raise
        _fail(advice, FAILED)
    except OSError as error:
        # Of a file, or of a store, which says in a sentence what is wrong.
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), FAILED)
    sys.exit(OK)


def _fail(message: str, code: int) -> NoReturn:
    print(f"driftmill: {message}", file=sys.stderr)
    sys.exit(code)


@app.callback()
def _options(
    home: Annotated[
        Path | None,
        typer.Option(
            "--home",
            envvar="DRIFTMILL_HOME",
            help="Folder of store, ledger and logs. Default: .driftmill",
            show_default=False,
        ),
    ] = None,
) -> None:
    if home is not None:
        os.environ["DRIFTMILL_HOME"] = str(home.resolve())


# Contracts


@app.command()
def init(
    data: Annotated[
        Path,
        typer.Argument(
            help="A CSV or Parquet file (also .gz), or a folder of images in a sub-folder a label.",
            show_default=False,
        ),
    ],
    target: Annotated[
        str | None,
        typer.Option("--target", "-t", help="Column to predict. Default: guessed, and said."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path(
        "contract.yaml"
    ),
    force: Annotated[bool, typer.Option("--force", "-f", help="Overwrite the file.")] = False,
) -> None:
    """Draft a contract from a data file or a folder of images.

    Types, ranges, categories, target, id and time (of images: labels, size,
    colours, formats) are guessed from the data and explained in comments;
    look at every line once.

    Example: driftmill init sales.csv --target price
    """
    from driftmill import init as drafts
    from driftmill.store import write_atomic

    if output.exists() and not force:
        raise Problem(f"{output} exists; choose another --output, or --force", USAGE)
    draft = drafts.draft(data, target=target, folder=output.resolve().parent)
    write_atomic(output, draft.text.encode())
    contract = draft.contract
    print(
        f"wrote {output}: {contract.task} of {contract.data.target.name} from {_inputs(contract)}"
    )
    for note in draft.notes:
        print(f"- {note}")
    print(f"next: read it, then `driftmill validate {output} --data`")


@app.command()
def validate(
    contract: ContractFile,
    data: Annotated[
        bool, typer.Option("--data", help="Also read the data and check every row.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check a contract, and with --data its data.

    Exit code 2 where the contract is not valid, 4 where too many rows break it.

    Example: driftmill validate contract.yaml --data
    """
    document = _load(contract)
    summary: dict[str, Any] = {
        "valid": True,
        "model": document.model,
        "task": document.task,
        "target": document.data.target.name,
        "columns": len(document.data.columns),
        "metric": document.metric.name,
    }
    if data:
        summary["data"] = checked = _check_data(document)
    if as_json:
        _print_json(summary)
    else:
        print(
            f"{contract} is valid: {document.model}, {document.task} of"
            f" {document.data.target.name} from {_inputs(document)},"
            f" metric {document.metric.name} ({document.metric.direction})"
        )
    if not data:
        return
    if not as_json:
        print(f"{checked['rows']} rows, {checked['quarantined']} break the contract")
        for reason, rows in checked["reasons"].items():
            print(f"  {rows:>8}  {reason}")
    if checked["fraction"] > document.data.quarantine.max_fraction:
        raise Problem(
            f"{checked['fraction']:.1%} of the rows break the contract, more than"
            f" data.quarantine.max_fraction {document.data.quarantine.max_fraction:.1%};"
            " mend the source or the contract",
            STOPPED,
        )


def _inputs(document: Contract) -> str:
    """What a model sees, in words."""
    image = document.data.image
    if image is None:
        return f"{len(document.data.columns)} columns"
    colours = "grey" if image.channels == 1 else "colour"
    return f"{colours} images of {image.size[1]} x {image.size[0]} pixels"


def _check_data(document: Contract) -> dict[str, Any]:
    from driftmill.data import schema, sources

    quarantines, rows = [], 0
    for source in (document.data.source, document.data.test):
        if source is not None:
            raw = sources.load(source, document)
            checked = schema.validate(raw, document, origin=source.uri)
            quarantines.append(checked.quarantine)
            rows += len(raw)
    bad = sum(len(q) for q in quarantines)
    return {
        "rows": rows,
        "quarantined": bad,
        "fraction": bad / rows,
        "reasons": schema.count_reasons(quarantines),
    }


@app.command()
def schema(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the reference for people instead.")
    ] = False,
) -> None:
    """Print the JSON Schema of the contract, for editors.

    Example: driftmill schema > contract.schema.json
    """
    if markdown:
        from driftmill import docs

        print(docs.markdown(), end="")
        return
    from driftmill.contract import json_schema

    _print_json(json_schema())


# Training


@app.command()
def train(
    contract: ContractFile,
    run_id: Annotated[
        str | None, typer.Option("--run-id", help="Name of the run. Default: made from the time.")
    ] = None,
    runner: Annotated[
        str,
        typer.Option(
            "--runner",
            help="Run the steps as processes (subprocess) or in the images of a cluster (docker).",
        ),
    ] = "subprocess",
    as_json: AsJson = False,
) -> None:
    """Train, judge and, if the new model is better, promote.

    Exit code 0 promoted, 3 judged and not promoted, 4 stopped by the data, 1 failed.
    A network whose training was cut short goes on from its last checkpoint: start it again.

    Example: driftmill train contract.yaml
    """
    from driftmill import runs

    document = _load(contract)
    home = _home()
    run_id = run_id or runs.new_id()
    command = [sys.executable, "-m", "pipelines.run", "--contract", str(contract)]
    command += ["--run-id", run_id, "--trigger", "driftmill train", "--runner", runner]
    code = _run(command, home, quiet=as_json)
    if as_json:
        outcome = runs.read(home.store, document.model, run_id)
        if outcome is not None:
            print(outcome.model_dump_json(indent=1))
    raise typer.Exit(code)


# Clusters. Programs of their own answer these, so that the library needs no client of a cluster;
# their options are theirs to describe.

_PASSED_ON = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],
}


@app.command("compile", context_settings=_PASSED_ON)
def compile_package(context: typer.Context) -> None:
    """Write what a cluster takes: Kubeflow package, chart values, alert rules, dashboards."""
    _pass_on("pipelines.compile", context)


@app.command(context_settings=_PASSED_ON)
def submit(context: typer.Context) -> None:
    """Run the pipeline on a Kubeflow cluster and follow it."""
    _pass_on("pipelines.submit", context)


@app.command(context_settings=_PASSED_ON)
def schedule(context: typer.Context) -> None:
    """Run the pipeline on a Kubeflow cluster again and again."""
    _pass_on("pipelines.schedule", context)


@app.command(context_settings=_PASSED_ON)
def images(context: typer.Context) -> None:
    """Build the container images of steps and services."""
    _pass_on("driftmill.images", context)


@app.command(context_settings=_PASSED_ON)
def cluster(context: typer.Context) -> None:
    """Make, look at and remove a kind cluster with Kubeflow Pipelines."""
    _pass_on("k8s.cluster", context)


@app.command(context_settings=_PASSED_ON)
def doctor(context: typer.Context) -> None:
    """Compare what is installed, here and on a cluster, with what is supported."""
    _pass_on("k8s.doctor", context)


def _pass_on(module: str, context: typer.Context) -> NoReturn:
    raise typer.Exit(_run([sys.executable, "-m", module, *context.args], _home()))


def _run(command: list[str], home: Home, quiet: bool = False) -> int:
    """Run a process of the pipelines and give back its exit code.

    It is in a group of its own and gets this process's signals passed on once each: it ends its
    own children. A second Ctrl-C kills the group.
    """
    child: subprocess.Popen[bytes] | None = None
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if child is None:
            return
        if len(received) > 1:
            os.killpg(child.pid, signal.SIGKILL)
        else:
            child.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        child = subprocess.Popen(
            command,
            env={**os.environ, **home.environment()},
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr if quiet else None,
            process_group=0,
        )
        if received:  # the signal came while the process was started
            child.send_signal(received[0])
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        return 128 + received[0]  # what that means for its work, the program has said itself
    return code if code >= 0 else FAILED


# The stack


@app.command()
def up(
    contract: ContractFile,
    port: Annotated[
        int | None, typer.Option("--port", help="Port of the service; 0: any free one. [3000]")
    ] = None,
    monitor_port: Annotated[
        int | None, typer.Option("--monitor-port", help="Port of the monitor. [3001]")
    ] = None,
    controller_port: Annotated[
        int | None, typer.Option("--controller-port", help="Port of the controller. [3002]")
    ] = None,
    monitor: Annotated[
        bool, typer.Option("--monitor/--no-monitor", help="Watch the predictions for drift.")
    ] = True,
    controller: Annotated[
        bool, typer.Option("--controller/--no-controller", help="Retrain when alarms come.")
    ] = True,
    prometheus: Annotated[
        bool,
        typer.Option(
            "--with-prometheus",
            help="Also start Prometheus and Alertmanager, and let alarms come from them.",
        ),
    ] = False,
    wait: Annotated[
        float, typer.Option("--wait", help="Seconds until every process must answer.")
    ] = 120.0,
) -> None:
    """Start service, monitor and controller in the background, until `driftmill down`.

    Example: driftmill up contract.yaml --port 8080
    """
    from driftmill import stack

    asked = {"service": port, "monitor": monitor_port, "controller": controller_port}
    with _spinner("starting") as say:
        running = stack.up(
            contract,
            _home(),
            ports={name: number for name, number in asked.items() if number is not None},
            monitor=monitor,
            controller=controller,
            prometheus=prometheus,
            deadline=wait,
            say=say,
        )
    for service in running.services.values():
        print(f"{service.name:<11}{service.url}   pid {service.pid}   log {service.log}")
    if not running.ready:
        print(f"no model serves yet; train one: driftmill train {contract}")


@app.command()
def down() -> None:
    """Stop the stack and the training that it started.

    Example: driftmill down
    """
    from driftmill import stack

    stopped = stack.down(_home(), say=print)
    if not stopped:
        print("nothing was running")


@app.command()
def status(as_json: AsJson = False) -> None:
    """Show what runs, which version serves, and the last window and decision.

    Exit code 0 where all that was started is ready, 1 where something is not,
    5 where nothing was started.

    Example: driftmill status --json
    """
    from driftmill import stack

    home = _home()
    services = stack.status(home)
    known = stack.services(home)
    started = [s for s in services if s.state != "not started"]
    code = NOT_UP if not started else int(any(s.state != "ready" for s in started))
    model = next((s.model for s in known.values()), None)
    facts: dict[str, Any] = {"rollout": None, "window": None, "decision": None}
    if model is not None:
        facts |= stack.pages(home.store, model)
        facts["decision"] = next(iter(_decisions(home, model, 1)), None)
    if as_json:
        _print_json({"model": model, "services": [asdict(s) for s in services], **facts})
        raise typer.Exit(code)
    _table(
        ["service", "state", "pid", "url", "up", "memory"],
        [
            [
                s.name,
                s.state,
                s.pid,
                s.url,
                _span(s.uptime_seconds),
                f"{s.memory_bytes / 2**20:.0f} MiB" if s.memory_bytes is not None else None,
            ]
            for s in services
        ],
    )
    if model is not None:
        _print_facts(model, facts)
    if any(s.state == "dead" for s in services):
        _say("a process has died; see `driftmill logs`, then `driftmill up` starts it again")
    raise typer.Exit(code)


def _print_facts(model: str, facts: dict[str, Any]) -> None:
    now, window, decision = facts["rollout"], facts["window"], facts["decision"]
    serves = "no version yet" if now is None else _describe(now)
    print(f"\nmodel     {model}: {serves}")
    if window is not None:
        drifted = [c["name"] for c in window["columns"] if c["drifted"]]
        told = f"drifted in {', '.join(drifted) or 'no column'}" if window["drifted"] else "calm"
        alarm = ", ALARM" if window["alarm"] else ""
        print(
            f"window    #{window['index']}, {window['rows']} rows until {window['to_at']}: ", end=""
        )
        print(f"{told}, score {window['score']:.3f}{alarm}")
    if decision is not None:
        print(f"decision  {decision['at']}: {decision['action']}: {decision['reason']}")


@app.command()
def logs(
    service: Annotated[
        str | None,
        typer.Argument(help="service, monitor, controller or a run's id.", show_default=False),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="Last lines of each.")] = 40,
) -> None:
    """Show what the processes printed.

    Example: driftmill logs controller -f
    """
    folder = _home().logs
    names = {p.stem: p for p in sorted(folder.glob("*.log"))} if folder.is_dir() else {}
    if not names:
        raise Problem(f"{folder} holds no logs yet; start the stack with `driftmill up`", NOT_UP)
    if service is None:
        chosen = {n: p for n, p in names.items() if not n.startswith("run-")} or names
    else:
        name = service if service in names else f"run-{service}"
        if name not in names:
            raise Problem(f"there is no log {service!r}; there are {', '.join(names)}", USAGE)
        chosen = {name: names[name]}
    ends = {}
    for name, path in chosen.items():
        if len(chosen) > 1:
            print(f"==> {name} <==")
        content = path.read_bytes()
        ends[name] = len(content)
        for line in content.decode(errors="replace").splitlines()[-lines:]:
            print(line)
    while follow:
        time.sleep(0.3)
        for name, path in chosen.items():
            ends[name] = _print_new(name if len(chosen) > 1 else None, path, ends[name])


def _print_new(name: str | None, path: Path, offset: int) -> int:
    """Print what a log holds beyond `offset`, and give back where it ends."""
    if path.stat().st_size < offset:  # it was set aside and begins anew
        offset = 0
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read()
    for line in content.decode(errors="replace").splitlines():
        print(f"{name}: {line}" if name else line, flush=True)
    return offset + len(content)


# Traffic


@app.command()
def predict(
    which: Annotated[
        str, typer.Argument(metavar="CONTRACT|MODEL", help="Whose model.", show_default=False)
    ],
    record: Annotated[
        str | None, typer.Option("--record", help="One record as JSON.", show_default=False)
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="Records: CSV, or JSON (a list, or a record a line). Of a model of images: an "
            "image.",
            show_default=False,
        ),
    ] = None,
    more: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[IMAGE]...", help="More images after --file.", show_default=False),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="The service. Default: the running stack's.")
    ] = None,
    offline: Annotated[
        bool,
        typer.Option("--offline", help="Load the champion here instead; nothing is logged."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Ask the model; of a service that asks for a token with that in DRIFTMILL_TOKEN.

    Example: driftmill predict contract.yaml --record '{"amount": 12.5, "channel": "web"}'
    """
    if (record is None) == (file is None):
        raise Problem("give either --record or --file", USAGE)
    home = _home()
    document = _document(which, home)
    if document.is_vision and file is not None:
        batches = _image_batches([file, *(more or [])], document)
    elif more:
        raise Problem("only a model of images takes more than one file", USAGE)
    else:
        records = _records(record, file, document)
        size = document.serve.max_records
        batches = [records[i : i + size] for i in range(0, len(records), size)]
    if offline:
        answers = [_predict_here(document, home, batch) for batch in batches]
    else:
        address = url or _address(home, "service", document.model)
        token = os.environ.get("DRIFTMILL_TOKEN")
        answers = [_post(f"{address}/predict", {"records": batch}, token) for batch in batches]
    answer = {**answers[0], "predictions": [p for a in answers for p in a["predictions"]]}
    if as_json:
        _print_json(answer)
        return
    _say(f"{answer['model']} {answer['version']}")
    _table(
        ["prediction", "score"], [[p["prediction"], p.get("score")] for p in answer["predictions"]]
    )


@app.command()
def batch(
    which: Annotated[
        str, typer.Argument(metavar="CONTRACT|MODEL", help="Whose model.", show_default=False)
    ],
    source: Annotated[
        str,
        typer.Option(
            "--input",
            "-i",
            help="Parquet: a file, a folder or a pattern; a path or a URL (s3://, gs://).",
            show_default=False,
        ),
    ],
    into: Annotated[
        str,
        typer.Option(
            "--output", "-o", help="Folder or URL for the scores; made.", show_default=False
        ),
    ],
    model_version: Annotated[
        str | None,
        typer.Option("--version", help="Version. Default: the champion.", show_default=False),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="Column to copy from the input; may be given again. Default: the contract's id.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score a Parquet set. Given again after an interruption, it goes on where it stopped.

    Example: driftmill batch contract.yaml --input rows/ --output scores/ --keep customer
    """
    from driftmill import batch as batches
    from driftmill import bundle, rollout
    from driftmill.store import Store

    home = _home()
    model = _model(which, home)
    now = rollout.read(home.store, model)
    if now is None and model_version is None:
        raise Problem(f"{model} has no champion yet; `driftmill train` makes one")
    loaded = bundle.fetch(home.store, model, model_version or (now.champion if now else ""))
    started = time.monotonic()
    with _progress(None, "rows") as progress:
        done = batches.score(loaded, source, Store(into), keep=keep or None, progress=progress)
    if as_json:
        _print_json(asdict(done))
        return
    seconds = time.monotonic() - started
    _say(
        f"{done.model} {done.version}: {done.rows:,} rows in {done.parts} files below {into}, "
        f"{seconds:.1f} s" + (f", {done.kept} files were there" if done.kept else "")
    )
    if done.problems:
        _say(f"{done.problems:,} rows have no prediction; the column `problem` says why")


def _records(record: str | None, file: Path | None, document: Contract) -> list[dict[str, Any]]:
    """Records from the command line or a file; texts of a CSV become values by the contract."""
    try:
        if record is not None:
            values = json.loads(record)
        elif file is not None and file.name.endswith((".json", ".jsonl", ".ndjson")):
            text = file.read_text()
            whole = text.lstrip().startswith("[")
            values = json.loads(text) if whole else [json.loads(t) for t in text.splitlines() if t]
        else:
            assert file is not None
            values = _csv_records(file, document)
    except (OSError, ValueError) as error:
        raise Problem(f"{file or '--record'} cannot be read: {error}", USAGE) from None
    values = values if isinstance(values, list) else [values]
    if not values or not all(isinstance(v, dict) for v in values):
        raise Problem(f"{file or '--record'} does not hold a JSON object a record", USAGE)
    return values


def _image_batches(files: list[Path], document: Contract) -> list[list[dict[str, Any]]]:
    """Images as records, as many in a request as its limits allow."""
    import base64

    batches: list[list[dict[str, Any]]] = []
    room = 0
    for file in files:
        try:
            text = base64.b64encode(file.read_bytes()).decode()
        except OSError as error:
            raise Problem(f"{file} cannot be read: {error}", USAGE) from None
        size = len(text) + 20  # with what stands around it
        if size > room or len(batches[-1]) == document.serve.max_records:
            batches.append([])
            room = document.serve.max_body_bytes - 20
        batches[-1].append({"image": text})
        room -= size
    return batches


def _csv_records(file: Path, document: Contract) -> list[dict[str, Any]]:
    import csv

    dialect = document.data.source.csv
    names = {c.name: c.type for c in document.data.columns}
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(
            lines,
            fieldnames=None if dialect.header else dialect.names,
            delimiter=dialect.separator,
            skipinitialspace=True,
        )
        rows = [
            {k.strip(): v.strip() for k, v in row.items() if k is not None and v is not None}
            for row in reader
        ]
    if rows and (missing := [name for name in names if name not in rows[0]]):
        raise ValueError(f"it lacks the column {', '.join(missing)}")
    return [
        {
            name: None if row[name] in ("", *dialect.missing) else _value(row[name], kind)
            for name, kind in names.items()
        }
        for row in rows
    ]


def _value(text: str, kind: str) -> Any:
    """A text as the contract's type. What is none is left to the service, which names it."""
    if kind in ("int", "float"):
        try:
            number = float(text)
        except ValueError:
            return text
        return int(number) if kind == "int" and number.is_integer() else number
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    return words.get(text.lower(), text) if kind == "bool" else text


def _predict_here(document: Contract, home: Home, records: list[dict[str, Any]]) -> dict[str, Any]:
    from driftmill import bundle, rollout
    from driftmill.serving.codec import RequestError, codec_for, encode_answers

    now = rollout.read(home.store, document.model)
    if now is None:
        raise Problem(f"{document.model} has no champion yet; `driftmill train` makes one")
    champion = bundle.fetch(home.store, document.model, now.champion)
    codec = codec_for(champion.signature, champion.manifest.contract)
    try:
        decoded = codec.decode(codec.records(json.dumps({"records": records}).encode()))
    except RequestError as error:
        raise Problem(f"{error.path or 'the records'}: {error.message}", USAGE) from None
    output, _ = codec.run(champion.session, decoded)
    answers = codec.answers([f"{i:026x}" for i in range(len(records))], output)
    content: dict[str, Any] = json.loads(encode_answers(document.model, champion.version, answers))
    for prediction in content["predictions"]:
        del prediction["id"]  # there is nothing in the log that a label could be given to
    return content


@app.command()
def replay(
    contract: ContractFile,
    rate: Annotated[float, typer.Option("--rate", min=0.1, help="Rows a second.")] = 200.0,
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="At most this many.")] = None,
    begin: Annotated[
        str | None,
        typer.Option("--from", help="First row: its number, or a time where the data has one."),
    ] = None,
    label_delay: Annotated[
        str, typer.Option("--label-delay", help="From answer to label: 2s, 5m, or none.")
    ] = "2s",
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help="Rows in a request. Default: by the rate.")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="The service. Default: the running stack's.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Send the data's stream to the service as traffic, in order, and its labels later.

    The stream is what comes after data.time.until, else the test file, else all rows.
    Exit code 1 where a request failed. A service that asks for tokens gets those in DRIFTMILL_TOKEN
    and, with labels, in DRIFTMILL_FEEDBACK_TOKEN, where that is another one.

    Example: driftmill replay contract.yaml --rate 500 --label-delay 5s
    """
    import asyncio

    from driftmill.contract import parse_duration
    from driftmill.data import sources

    document = _load(contract)
    address = url or _address(_home(), "service", document.model)
    try:
        delay = None if label_delay == "none" else float(str(parse_duration(label_delay)))
    except ValueError as error:
        raise Problem(f"--label-delay {label_delay}: {error}, or none", USAGE) from None
    table = _from(sources.stream(document), begin).head(rows if rows is not None else sys.maxsize)
    if table.empty:
        raise Problem("no rows are left to send; see --from and --rows", USAGE)

    async def send() -> tuple[ReplayResult, bool]:
        from driftmill import replay as sender

        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        with _progress(len(table), "rows") as advance:
            result = await sender.replay(
                table,
                address,
                contract=document,
                rate=rate,
                batch=batch,
                label_delay=delay,
                on_progress=lambda r: advance(r.sent + r.failed),
                stop_event=stop,
                token=os.environ.get("DRIFTMILL_TOKEN"),
                feedback_token=os.environ.get("DRIFTMILL_FEEDBACK_TOKEN"),
            )
        return result, stop.is_set()

    result, interrupted = asyncio.run(send())
    if as_json:
        _print_json(
            {
                "sent": result.sent,
                "failed": result.failed,
                "labelled": result.labelled,
                "labels_failed": result.labels_failed,
                "seconds": round(result.seconds, 3),
                "versions": dict(result.versions),
                "errors": dict(result.errors),
            }
        )
    else:
        by = ", ".join(f"{n} by {version}" for version, n in result.versions.items())
        print(f"{result.sent} rows answered in {result.seconds:.1f} s ({by or 'none'})")
        print(f"{result.labelled} labels accepted, {result.failed + result.labels_failed} failed")
    for text, count in result.errors.most_common(5):
        _say(f"{count} times: {text}")
    if interrupted:
        raise Problem("interrupted; the labels of the rows sent were given", INTERRUPTED)
    raise typer.Exit(OK if result.ok else FAILED)


def _from(table: Any, begin: str | None) -> Any:
    """The rows from a position or a time on."""
    if begin is None:
        return table
    if begin.isdecimal():
        return table.iloc[int(begin) :]
    import pandas as pd

    from driftmill.features import TIME

    if TIME not in table:
        raise Problem("--from takes a row number: the contract names no time", USAGE)
    try:
        moment = pd.to_datetime(begin, utc=True)
    except ValueError:
        raise Problem(f"--from {begin}: neither a number nor a time", USAGE) from None
    return table[table[TIME] >= moment]


# Rollout


@rollout_app.command("show")
def rollout_show(which: Which = None, as_json: AsJson = False) -> None:
    """Show which version serves.

    Example: driftmill rollout show payments --json
    """
    from driftmill import rollout

    home = _home()
    model = _model(which, home)
    now = rollout.read(home.store, model)
    if now is None:
        raise Problem(f"{model} has no rollout yet; `driftmill train` makes one")
    _print_rollouts([now], as_json, single=True)


@rollout_app.command("history")
def rollout_history(which: Which = None, as_json: AsJson = False) -> None:
    """Show all that ever served.

    Example: driftmill rollout history payments
    """
    from driftmill import rollout

    home = _home()
    _print_rollouts(rollout.history(home.store, _model(which, home)), as_json)


@rollout_app.command("set")
def rollout_set(
    which: Which = None,
    champion: Annotated[
        str | None, typer.Option(help="Version that serves. Default: as now.", show_default=False)
    ] = None,
    challenger: Annotated[
        str | None, typer.Option(help="Version beside it. Default: none.", show_default=False)
    ] = None,
    weight: Annotated[
        float, typer.Option(min=0, max=1, help="Share of requests for the challenger.")
    ] = 0.0,
    shadow: Annotated[
        bool, typer.Option("--shadow", help="The challenger sees the rest, without answering.")
    ] = False,
    reason: Reason = "",
    as_json: AsJson = False,
) -> None:
    """Set what serves.

    Example: driftmill rollout set payments --challenger 1f2e3d4c5b6a --weight 0.1
    """
    from driftmill import bundle, rollout

    home = _home()
    model = _model(which, home)
    if champion is None and challenger is None and rollout.read(home.store, model) is None:
        raise Problem(f"{model} has no champion yet; give --champion VERSION")
    for version in (champion, challenger):
        if version is not None:
            bundle.fetch(home.store, model, version)  # refuses what could not be served
    try:
        new = rollout.change(
            home.store,
            model,
            champion=champion,
            challenger=challenger,
            weight=weight,
            shadow=shadow,
            by=_person(),
            reason=reason,
        )
    except ValueError as error:
        raise Problem(_first_line(error), USAGE) from None
    _mirror(home, new, model)
    _print_rollouts([new], as_json, single=True)


@rollout_app.command("rollback")
def rollout_rollback(which: Which = None, reason: Reason = "", as_json: AsJson = False) -> None:
    """Drop the challenger, or return to the champion before this one.

    Example: driftmill rollout rollback payments --reason "complaints from the shop"
    """
    from driftmill import rollout

    home = _home()
    model = _model(which, home)
    try:
        new = rollout.rollback(home.store, model, by=_person(), reason=reason)
    except ValueError as error:
        raise Problem(_first_line(error)) from None
    _mirror(home, new, model)
    _print_rollouts([new], as_json, single=True)


def _mirror(home: Home, now: Rollout, model: str) -> None:
    """Let the tracking server's aliases follow a person's change."""
    from driftmill import bundle, tracking

    folder = bundle.locate(home.store, model, now.champion)
    os.environ.setdefault("MLFLOW_TRACKING_URI", home.tracking_uri)
    said = tracking.mirror(bundle.read_manifest(folder).contract, home.store)
    if said.startswith("unavailable"):
        _say(f"the tracking server's aliases are behind: {said}")


def _print_rollouts(rollouts: list[Rollout], as_json: bool, single: bool = False) -> None:
    from driftmill import rollout

    if as_json:
        values = [rollout.to_dict(r) for r in rollouts]
        _print_json(values[0] if single else values)
        return
    _table(
        ["revision", "champion", "challenger", "weight", "shadow", "at", "by", "reason"],
        [
            [
                r.revision,
                r.champion,
                r.challenger,
                f"{r.weight:g}",
                "yes" if r.shadow else "",
                f"{r.at:%Y-%m-%d %H:%M:%S}",
                r.by,
                r.reason,
            ]
            for r in rollouts
        ],
    )


def _describe(now: dict[str, Any]) -> str:
    text = f"champion {now['champion']} (revision {now['revision']} by {now['by']})"
    if now["challenger"]:
        kind = "in the shadow" if now["shadow"] else f"with {now['weight']:.0%} of the requests"
        text += f", challenger {now['challenger']} {kind}"
    return text


# What happened


@app.command()
def runs(
    which: Which = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Newest runs.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List training runs, newest first, and how they ended.

    Example: driftmill runs payments --json
    """
    home = _home()
    model = _model(which, home)
    found = _runs(home, model)[:limit]
    if as_json:
        _print_json(found)
        return
    _table(
        ["run", "state", "trigger", "started", "took", "version", "reason"],
        [
            [
                r["run_id"],
                r["state"],
                r["trigger"],
                r["started"][:19].replace("T", " "),
                _span(r.get("seconds")),
                r.get("version"),
                r.get("reason"),
            ]
            for r in found
        ],
    )


def _runs(home: Home, model: str) -> list[dict[str, Any]]:
    """Outcomes, and runs without one: these are under way, or were killed."""
    from driftmill import runs as records

    store = home.store
    found = []
    ended = set()
    for outcome in records.outcomes(store, model):
        ended.add(outcome.run_id)
        seconds = (outcome.ended - outcome.started).total_seconds()
        found.append({**outcome.model_dump(mode="json"), "seconds": seconds})
    for key in store.list(f"{model}/runs"):
        run_id = key.split("/")[2]
        if key.endswith(f"{run_id}/run.json") and run_id not in ended:
            found.append({**json.loads(store.read(key)), "state": "unfinished"})
    return sorted(found, key=lambda r: (r["started"], r["run_id"]), reverse=True)


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="The run's id, or `last`.", show_default=False)],
    which: Which = None,
    open_it: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Print the path of a run's report, and open it with --open.

    Example: driftmill report last --open
    """
    import tempfile
    import webbrowser

    from driftmill import runs as records

    home = _home()
    model = _model(which, home)
    store = home.store
    reports = sorted(k for k in store.list(f"{model}/runs") if k.endswith("/report.html"))
    ids = [key.split("/")[2] for key in reports]
    if run == "last" and ids:
        run = ids[-1]
    if run not in ids:
        raise Problem(
            f"{model} has no run {run!r} with a report; `driftmill runs` lists the runs", USAGE
        )
    key = records.key(model, run, "report.html")
    if store.folder is not None:
        path = store.folder / key
    else:
        path = Path(tempfile.gettempdir()) / f"driftmill-report-{run}.html"
        path.write_bytes(store.read(key))
    print(path)
    if open_it:
        webbrowser.open(path.as_uri())


@app.command()
def decisions(
    which: Which = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Newest decisions.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List what the controller decided, "no" included, and why; newest first.

    Example: driftmill decisions --json
    """
    home = _home()
    found = _decisions(home, _model(which, home), limit)
    if as_json:
        _print_json(found)
        return
    _table(
        ["at", "trigger", "decision", "times", "run", "reason"],
        [
            [
                d["at"][:19].replace("T", " "),
                d["trigger"],
                d["action"],
                d["deliveries"],
                d["run_id"],
                d["reason"],
            ]
            for d in found
        ],
    )


def _decisions(home: Home, model: str, limit: int) -> list[dict[str, Any]]:
    from driftmill.retrain.ledger import Ledger, to_dict

    ledger = Ledger(home.ledger_url)
    try:
        return [to_dict(d) for d in ledger.decisions(model, limit)]
    finally:
        ledger.close()


@app.command()
def trigger(
    reason: Annotated[
        str, typer.Option("--reason", "-r", help="Why; kept in the ledger.")
    ] = "asked for on the command line",
    as_json: AsJson = False,
) -> None:
    """Ask the controller for a retraining; its policy decides, and the ledger says why.

    Exit code 0 where a run starts, 3 where the policy says no.

    Example: driftmill trigger --reason "new product line"
    """
    home = _home()
    address = _address(home, "controller", None)
    token = home.token_file.read_text().strip()
    answer = _post(f"{address}/trigger", {"reason": reason}, token)
    if as_json:
        _print_json(answer)
    else:
        for decision in answer["decisions"]:
            print(f"{decision['action']}: {decision['reason']}")
    started = any(decision["action"] == "start" for decision in answer["decisions"])
    raise typer.Exit(OK if started else REFUSED)


@app.command()
def verify(
    which: Annotated[
        str,
        typer.Argument(
            metavar="BUNDLE|CONTRACT|MODEL",
            help="A bundle's folder, or a model.",
            show_default=False,
        ),
    ],
    model_version: Annotated[
        str | None,
        typer.Argument(metavar="[VERSION]", help="Default: the champion.", show_default=False),
    ] = None,
    sign: Annotated[
        bool,
        typer.Option("--sign", help="Sign it with DRIFTMILL_SIGNING_KEY, if it holds otherwise."),
    ] = False,
    pack: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Then write it there as one .tar.gz.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a bundle: files, version, answers, components, signature; and say where it is from.

    A signature is demanded where DRIFTMILL_TRUSTED_KEYS names public keys.

    Example: driftmill verify payments
    """
    from driftmill import bundle, rollout
    from driftmill.signing import SIGNATURE

    if Path(which, bundle.MANIFEST).is_file():
        folder, found = Path(which), None
    else:
        home = _home()
        model = _model(which, home)
        now = rollout.read(home.store, model)
        if now is None and model_version is None:
            raise Problem(f"{model} has no champion yet; `driftmill train` makes one")
        version = model_version or (now.champion if now else "")
        folder, found = bundle.locate(home.store, model, version), home.store
    checked = bundle.examine(folder, signed=not sign)
    if sign:
        bundle.sign(folder)
        if found is not None:
            key = f"{bundle.key(checked['model'], checked['version'])}/{SIGNATURE}"
            found.write(key, (folder / SIGNATURE).read_bytes())
        checked = bundle.examine(folder)
    if pack is not None:
        checked["packed"] = str(bundle.pack(folder, pack))
    if as_json:
        _print_json(checked)
        return
    print(f"{checked['model']} {checked['version']} holds")
    print("checked:")
    for name, value in checked["checked"].items():
        print(f"  {name:<12} {value}")
    print("the manifest says:")
    for name, value in checked["provenance"].items():
        print(f"  {name:<12} {value}")
    if pack is not None:
        print(f"packed into {checked['packed']}")


@app.command()
def backup(
    path: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A new file, .tar or .tar.gz.", show_default=False),
    ],
) -> None:
    """Write store, ledger, tracking and log into one file, while everything runs.

    Example: driftmill backup /backups/driftmill-$(date +%F).tar.gz
    """
    from driftmill import backup as backups

    with _spinner("reading") as show:
        done = backups.backup(_home(), path, show)
    _say(f"{path}: {done.files:,} files, {done.bytes / 1e6:,.1f} MB")
    for what in done.elsewhere:
        _say(f"note: the {what} lies elsewhere and is not in it; back it up there")


@app.command()
def restore(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A backup.", show_default=False)],
) -> None:
    """Bring back what `driftmill backup` wrote, into an empty home and store.

    Example: driftmill restore driftmill-2026-11-25.tar.gz
    """
    from driftmill import backup as backups
    from driftmill import stack

    home = _home()
    if running := [name for name in stack.PORTS if stack.address(home, name)]:
        raise Problem(f"{', '.join(running)} runs in {home.folder}; `driftmill down` first")
    with _spinner("checking") as show:
        done = backups.restore(home, path, show)
    _say(f"{home.folder}: {done.files:,} files as of {done.created:%F %T} UTC")
    for what in done.elsewhere:
        _say(f"note: the {what} lay elsewhere; restore it there")


@app.command()
def demo(
    example: Annotated[
        str, typer.Argument(help="payments, bike-sharing, digits or fashion-mnist.")
    ] = "payments",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page. Default: in the home folder.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the stack running.")] = False,
    prometheus: Annotated[
        bool,
        typer.Option("--with-prometheus", help="Let the alarm come from a real Alertmanager."),
    ] = False,
) -> None:
    """Run the whole loop: train, serve, traffic, drift, alarm, retrain, promote.

    Example: driftmill demo bike-sharing
    """
    from driftmill.demo import main as run_demo

    code = run_demo(example, home=_home(), output=output, keep=keep, prometheus=prometheus)
    raise typer.Exit(code)


@app.command()
def version() -> None:
    """Print the version.

    Example: driftmill version
    """
    from importlib.metadata import version as installed

    print(installed("driftmill"))


# Helpers


def _home() -> Home:
    from driftmill import home

    return home.find()


def _load(path: Path) -> Contract:
    from driftmill import contract

    return contract.load(path)


def _is_file(text: str) -> bool:
    return text.endswith((".yaml", ".yml", ".json")) or Path(text).is_file()


def _model(which: str | None, home: Home) -> str:
    """The model that an argument means."""
    if which is not None:
        return _load(Path(which)).model if _is_file(which) else _known(which, home)
    from driftmill import stack

    running = stack.services(home)
    if running:
        return next(iter(running.values())).model
    models = _models(home)
    if len(models) != 1:
        listed = f"there are {', '.join(models)}" if models else "the store is empty"
        raise Problem(f"which model? {listed}; name it, or give a contract file", USAGE)
    return models[0]


def _known(model: str, home: Home) -> str:
    from driftmill.contract import did_you_mean

    models = _models(home)
    if model not in models:
        raise Problem(
            f"{home.store_uri} holds no model {model!r}{did_you_mean(model, models)}", USAGE
        )
    return model


def _models(home: Home) -> list[str]:
    """Models that the store holds."""
    return sorted({key.split("/")[0] for key in home.store.list("") if "/" in key})


def _document(which: str, home: Home) -> Contract:
    """The contract that an argument means; of a model, the one that its champion was made with."""
    if _is_file(which):
        return _load(Path(which))
    from driftmill import bundle, rollout

    model = _known(which, home)
    now = rollout.read(home.store, model)
    if now is None:
        raise Problem(f"{model} has no champion yet; `driftmill train` makes one")
    return bundle.fetch(home.store, model, now.champion).manifest.contract


def _address(home: Home, name: str, model: str | None) -> str:
    """URL of a service of the running stack."""
    from driftmill import stack

    service = stack.services(home).get(name)
    address = stack.address(home, name)
    if service is None or address is None:
        raise Problem(f"{name} does not run; start it with `driftmill up CONTRACT`", NOT_UP)
    if model is not None and service.model != model:
        raise Problem(f"the stack serves {service.model}, not {model}; give --url", NOT_UP)
    return address


def _post(url: str, body: dict[str, Any], token: str | None = None) -> dict[str, Any]:
    import httpx

    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        response = httpx.post(url, json=body, headers=headers, timeout=60.0)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Problem(f"{url} does not answer: {error}; see `driftmill status`", NOT_UP) from None
    if response.status_code >= 400:
        # 4xx: what was asked is at fault; 5xx: the service is.
        code = USAGE if response.status_code < 500 else FAILED
        raise Problem(f"{url} answers {response.status_code}: {_explain(response.text)}", code)
    answer: dict[str, Any] = response.json()
    return answer


def _explain(text: str) -> str:
    """The message and the path of an error that a service answers with."""
    try:
        error = json.loads(text)["error"]
        where = f" (at {error['path']})" if error.get("path") else ""
        return f"{error['message']}{where}"
    except (ValueError, KeyError, TypeError):
        return " ".join(text.split())[:500]


def _person() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in containers
        return f"uid {os.getuid()}"


def _first_line(error: ValueError) -> str:
    """What is wrong, also where Pydantic says it."""
    problems = getattr(error, "errors", None)
    if problems is None:
        return str(error)
    return str(problems()[0]["msg"]).removeprefix("Value error, ")


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False))


def _span(seconds: float | None) -> str | None:
    """A length of time for people."""
    if seconds is None:
        return None
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _table(head: list[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table; without a terminal, columns are not cut to its width."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in head:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*("" if value is None else escape(str(value)) for value in row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=10_000)
    console.print(table)


@contextmanager
def _spinner(text: str) -> Iterator[Callable[[str], None]]:
    """A sign of life on stderr; what is yielded prints a line above it."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False, markup=False)
    with console.status(text):
        yield console.print


@contextmanager
def _progress(total: int | None, unit: str) -> Iterator[Callable[..., None]]:
    """A bar with rate and time left on stderr, where that is a terminal; what is yielded takes how
    many are done and, where that was not known before, of how many."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    bar = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{{task.fields[rate]:.0f}} {unit}/s, left:"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    task = bar.add_task("", total=total, rate=0.0)
    started = time.monotonic()

    def advance(done: int, total: int | None = total) -> None:
        rate = done / max(time.monotonic() - started, 1e-9)
        bar.update(task, completed=done, total=total, rate=rate)

    with bar:
        yield advance
