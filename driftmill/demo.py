"""The whole loop in front of one's eyes: train, serve, send traffic, drift, retrain, promote.

Everything is the real thing: the stack's processes, the pipeline, HTTP, the store. The demo only
sends the traffic, watches what happens, and at the end checks that each stage did.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType

import httpx
import numpy as np
import pandas as pd
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from driftmill import bundle, contract, demo_page, replay, rollout, runs, stack
from driftmill.bundle import Bundle
from driftmill.contract import EMBEDDING, Contract, ContractError
from driftmill.data import simulate, sources
from driftmill.demo_page import Check, Event, Story, Stretch
from driftmill.evaluate import metrics
from driftmill.features import IMAGE, TIME
from driftmill.home import Home
from driftmill.monitor import windows
from driftmill.monitor.drift import WindowResult
from driftmill.retrain.ledger import Decision, Ledger
from driftmill.retrain.ledger import Run as LedgerRun

#: What must show which corruption of images, so that the alarm can name it.
SHOWN_BY = {
    "blur": "sharpness",
    "brightness": "brightness",
    "contrast": "contrast",
    "noise": "noise",
    "rotation": EMBEDDING,
}
#: Images of the stream that the page shows, from before and from after the onset.
PICTURES = 12
EXAMPLES = Path(__file__).parent.parent / "examples"
#: How often the demo looks what has happened, in seconds; its measured times are that exact.
LOOK = 0.2
#: Seconds that the last rows of a short stream wait for the retraining at most.
PATIENCE = 120.0


@dataclass(frozen=True)
class Settings:
    """How an example is shown."""

    rate: float
    """Rows a second."""
    label_delay: float
    """Seconds from a prediction to its label."""
    rows_after: int | None
    """Rows still sent after the new model serves; None sends the whole stream."""
    block: int
    """Rows whose quality is one point of the plot."""
    reserve: int = 0
    """Of a short stream: the last rows wait until the retraining has ended."""


SETTINGS = {
    "payments": Settings(rate=200, label_delay=1.0, rows_after=2000, block=500),
    "bike-sharing": Settings(rate=150, label_delay=2.0, rows_after=None, block=336),
    "digits": Settings(rate=20, label_delay=1.0, rows_after=None, block=100, reserve=200),
    "fashion-mnist": Settings(rate=150, label_delay=1.0, rows_after=None, block=500, reserve=1500),
}


@dataclass
class Watched:
    """What was seen while traffic ran; times are seconds since the epoch."""

    ledger: Ledger
    """Where the controller writes its decisions; open as long as the demo looks."""
    windows: list[tuple[float, WindowResult]] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    runs: list[LedgerRun] = field(default_factory=list)
    rollouts: list[rollout.Rollout] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    """Peak bytes of the whole stack (`stack`) and of each service."""


class DemoError(RuntimeError):
    """The demo cannot go on; the message says why."""


def main(
    example: str = "payments",
    *,
    home: Home,
    output: Path | None = None,
    keep: bool = False,
    prometheus: bool = False,
) -> int:
    """Run the demo of an example.

    Args:
        example: a folder of `examples/`, one of `SETTINGS`.
        home: where everything lies; a folder of the example's own below it is emptied first.
        output: the page; default `demo.html` in that folder.
        keep: leave the stack running afterwards.
        prometheus: let the alarm come from Prometheus and Alertmanager instead of the monitor.

    Returns:
        0 if each stage really happened, 1 if not, 2 if the example or its contract is not usable.
    """
    console = Console(highlight=False, soft_wrap=True)
    if example not in SETTINGS:
        names = " or ".join(SETTINGS)
        hint = contract.did_you_mean(example, list(SETTINGS))
        Console(stderr=True).print(f"no demo {example!r}: choose {names}{hint}", markup=False)
        return 2
    path = EXAMPLES / example / "contract.yaml"
    place = _place(home, example)
    signal.signal(signal.SIGTERM, _end)
    stack.down(place)
    if place.folder.exists():
        shutil.rmtree(place.folder)
    place.folder.mkdir(parents=True)
    try:
        document = contract.load(path)
        return _run(console, document, path, example, place, output, keep, prometheus)
    except (ContractError, contract.ContractError) as error:
        Console(stderr=True).print(str(error), markup=False)
        return 2
    except (DemoError, stack.StackError, bundle.BundleError, sources.DataError) as error:
        Console(stderr=True).print(f"the demo stopped: {error}", markup=False)
        return 1
    finally:
        if not keep:
            stack.down(place)


def _end(number: int, frame: FrameType | None) -> None:
    """End like after Ctrl-C: with everything that was started."""
    raise SystemExit(128 + number)


def _place(home: Home, example: str) -> Home:
    """A home of the demo's own, so that it never touches what the user runs."""
    folder = home.folder / f"demo-{example}"
    return Home(
        folder=folder,
        store_uri=str(folder / "store"),
        ledger_url=f"sqlite:///{folder / 'ledger.db'}",
        tracking_uri=f"sqlite:///{folder / 'mlflow.db'}",
    )


def _run(
    console: Console,
    document: Contract,
    path: Path,
    example: str,
    home: Home,
    output: Path | None,
    keep: bool,
    prometheus: bool,
) -> int:
    settings = SETTINGS[example]
    began = time.time()
    console.print(f"[bold]Driftmill demo: {example}[/bold]   {document.description}")

    def say(text: str) -> None:
        console.print(f"{time.time() - began:7.1f} s  {text}", markup=False)

    stream = sources.stream(document)
    say(
        f"{len(stream):,} rows will arrive as traffic; training the first model on what came before"
    )
    with _training(path, home) as training:
        ports = dict.fromkeys(stack.PORTS, 0)
        running = stack.up(path, home, ports=ports, prometheus=prometheus)
        say(f"{', '.join(running.services)} are up")
        if training.wait():
            log = (home.folder / "first-training.log").read_text()[-2000:]
            raise DemoError(f"the first training failed (exit {training.returncode}):\n{log}")
    first = rollout.read(home.store, document.model)
    if first is None:
        raise DemoError("the first training left no champion; see driftmill runs")
    trained = time.time()
    say(f"first champion {first.champion} promoted: {first.reason}")

    onset_row = _onset_row(document, stream)
    with closing(Ledger(home.ledger_url)) as ledger:
        watched = Watched(ledger)
        result = asyncio.run(
            _traffic(console, document, settings, home, running, stream, onset_row, watched, say)
        )
        _look(home, document.model, watched)
    if not result.answers:
        raise DemoError(f"no request was answered: {dict(result.errors)}")

    champions = list(dict.fromkeys(r.champion for r in watched.rollouts))
    first_bundle = bundle.fetch(home.store, document.model, first.champion)
    labelled = [a for a in result.answers if a.label is not None]
    answers = _answers(labelled, stream, began, settings.block)
    truth = metrics.encode(first_bundle.signature.labels, [a.label for a in labelled])
    served = _served(labelled, first_bundle)
    never = first_bundle.predict(stream.iloc[answers["row"].to_numpy()])
    stretches = _stretches(document, answers, truth, served, never, champions[1:])
    times = _times(home, document, watched, result, onset_row)
    checks = _checks(document, watched, result, stretches, times, onset_row)
    seconds = _seconds(times)
    memory = {name: size / 2**20 for name, size in watched.memory.items()}
    story = Story(
        contract=document,
        title=f"{example}: from drift to a better model",
        answers=answers,
        quality=_quality(document, answers, truth, served, never),
        windows=[w for _, w in watched.windows],
        window_at=[at - began for at, _ in watched.windows],
        events=_events(document, watched, times, began, trained, first),
        decisions=_decisions(watched, began),
        stretches=stretches,
        checks=checks,
        pictures=_pictures(document, stream, onset_row, answers),
        facts={
            "onset → new champion serving": f"{seconds['onset_to_served']:.1f} s"
            if "onset_to_served" in seconds
            else "never",
            "predictions": f"{result.sent:,}",
            "failed requests": str(result.failed + result.labels_failed),
            "models trained": str(len(runs.outcomes(home.store, document.model))),
            "promotions after the first": str(len(champions) - 1),
            "peak memory of the stack": f"{memory['stack']:,.0f} MiB",
        },
        marks={
            name: times[key] - began
            for name, key in (
                ("onset", "onset"),
                ("alarm", "alarm"),
                ("run started", "run_started"),
                ("new champion serves", "served"),
            )
            if key in times
        },
    )
    page = (output or home.folder / "demo.html").resolve()
    demo_page.write(page, story)
    summary = {
        "example": example,
        "seconds": {k: round(v, 2) for k, v in seconds.items()},
        "memory_mib": {k: round(v) for k, v in memory.items()},
        "sent": result.sent,
        "failed": result.failed + result.labels_failed,
        "versions": champions,
        "stretches": [vars(s) for s in stretches],
        "checks": [vars(c) for c in checks],
    }
    (home.folder / "demo.json").write_text(json.dumps(summary, indent=1) + "\n")
    return _conclude(console, story, seconds, memory, page, path, home, keep)


@contextmanager
def _training(path: Path, home: Home) -> Iterator[subprocess.Popen[bytes]]:
    """The first training, beside the start of the stack. It never outlives the demo."""
    with (home.folder / "first-training.log").open("wb") as log:
        process = None
        try:
            with stack.hold_signals() as held:  # no process may start without being known
                process = subprocess.Popen(
                    [
                        *(sys.executable, "-m", "pipelines.run"),
                        *("--contract", str(path), "--trigger", "the first model"),
                    ],
                    env={**os.environ, **home.environment()},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            stack.raise_held(held)
            yield process
        finally:
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGTERM)  # it ends its steps itself
                process.wait()


def _onset_row(document: Contract, stream: pd.DataFrame) -> int | None:
    """The first row of the stream after the onset, where it is known."""
    uri, simulated = document.data.source.uri, document.data.simulate
    onset = simulate.onset_time(uri) if uri.startswith("sim:") else None
    if simulated is not None and simulated.onset is not None:
        onset = simulated.start + timedelta(seconds=simulated.step * simulated.onset)
    if onset is None:
        return None
    return int((stream[TIME] < pd.Timestamp(onset)).sum())


async def _traffic(
    console: Console,
    document: Contract,
    settings: Settings,
    home: Home,
    running: stack.Running,
    stream: pd.DataFrame,
    onset_row: int | None,
    watched: Watched,
    say: Callable[[str], None],
) -> replay.ReplayResult:
    """Send the stream, and look what happens, until enough has."""
    stop = asyncio.Event()
    seen: dict[str, int] = {}
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    bar = progress.add_task("traffic", total=len(stream))
    onset_said = False

    def on_progress(result: replay.ReplayResult) -> None:
        nonlocal onset_said
        progress.update(bar, completed=result.sent + result.failed)
        if onset_row is not None and not onset_said and result.sent > onset_row:
            onset_said = True
            say("onset: from this row on the world is another one")
        version = result.answers[-1].version if result.answers else None
        if version is not None and version not in seen:
            seen[version] = result.sent
            if len(seen) > 1:
                say(f"served: the first answer of {version}")
        if (
            settings.rows_after is not None
            and len(seen) > 1
            and result.sent >= list(seen.values())[1] + settings.rows_after
        ):
            stop.set()

    waited = False

    async def hold(row: int) -> None:
        nonlocal waited
        if waited or row < len(stream) - settings.reserve:
            return
        if not await _settled(watched, running):
            say(f"the last {settings.reserve} rows wait until the retraining has ended")
        until = time.monotonic() + PATIENCE
        while not await _settled(watched, running) and time.monotonic() < until:
            await asyncio.sleep(LOOK)
        waited = True

    async def watch() -> None:
        while True:
            for text in await asyncio.to_thread(_look, home, document.model, watched):
                say(text)
            await asyncio.sleep(LOOK)

    with progress:
        watcher = asyncio.create_task(watch())
        sender = asyncio.create_task(
            replay.replay(
                stream,
                running.services["service"].url,
                contract=document,
                rate=settings.rate,
                label_delay=settings.label_delay,
                on_progress=on_progress,
                stop_event=stop,
                hold=hold if settings.reserve else None,
            )
        )
        try:
            # A watcher that fails must not leave the traffic running unwatched.
            await asyncio.wait({watcher, sender}, return_when=asyncio.FIRST_COMPLETED)
            if watcher.done():
                watcher.result()
            return await sender
        finally:
            watcher.cancel()
            sender.cancel()


async def _settled(watched: Watched, running: stack.Running) -> bool:
    """Whether the retraining has ended, and its model serves if it was promoted."""
    if not watched.runs or any(run.state in ("pending", "running") for run in watched.runs):
        return False
    if len(watched.rollouts) < 2:
        return True
    async with httpx.AsyncClient(base_url=running.services["service"].url) as client:
        serves = (await client.get("/model")).json()["version"]
    return bool(serves == watched.rollouts[-1].champion)


def _look(home: Home, model: str, watched: Watched) -> list[str]:
    """Take note of what is new; returns it in words."""
    said: list[str] = []
    now = time.time()
    seen = watched.windows[-1][1].index if watched.windows else None
    for window in windows.results(home.store, model, after=seen):
        watched.windows.append((now, window))
        changed = [c.name for c in window.columns if c.drifted]
        if window.alarm:
            before = watched.windows[-2][1].alarm if len(watched.windows) > 1 else False
            if not before:
                said.append(f"alarm: window {window.index} drifted again ({', '.join(changed)})")
        elif window.drifted:
            said.append(f"window {window.index} drifted ({', '.join(changed)}); one is not enough")
    decisions = list(reversed(watched.ledger.decisions(model, limit=1000)))
    watched.runs = list(reversed(watched.ledger.runs(model, limit=1000)))
    for decision in decisions[len(watched.decisions) :]:
        if decision.code in ("duplicate", "running"):
            continue  # the page has them all
        said.append(f"controller: {decision.action}: {decision.reason}")
    watched.decisions = decisions
    history = rollout.history(home.store, model)
    for change in history[max(1, len(watched.rollouts)) :]:
        said.append(f"promoted {change.champion}: {change.reason}")
    watched.rollouts = history
    sizes = {s.name: s.memory_bytes or 0 for s in stack.status(home)}
    for name, size in {**sizes, "stack": stack.memory(home)}.items():
        watched.memory[name] = max(size, watched.memory.get(name, 0))
    return said


def _answers(
    labelled: list[replay.Answer], stream: pd.DataFrame, began: float, block: int
) -> pd.DataFrame:
    """What was answered, a row each; see `demo_page.Story`."""
    frame = pd.DataFrame(
        {
            "at": [a.at - began for a in labelled],
            "row": [a.row for a in labelled],
            "version": [a.version for a in labelled],
        }
    )
    frame["block"] = np.arange(len(frame)) // block
    if TIME in stream:
        frame[TIME] = stream[TIME].to_numpy()[frame["row"].to_numpy()]
    return frame


def _served(labelled: list[replay.Answer], first: Bundle) -> np.ndarray:
    """What was answered, as the metrics take it; of more than two labels the answer alone."""
    if first.signature.task == "regression":
        return np.array([a.prediction for a in labelled], dtype=np.float64)
    labels = first.signature.labels
    if len(labels) > 2:
        chosen: np.ndarray = np.eye(len(labels))[
            metrics.encode(labels, [a.prediction for a in labelled])
        ]
        return chosen
    score = np.array([a.score for a in labelled], dtype=np.float64)
    return np.column_stack([1 - score, score])


def _stretches(
    document: Contract,
    answers: pd.DataFrame,
    truth: np.ndarray,
    served: np.ndarray,
    never: np.ndarray,
    versions: list[str],
) -> list[Stretch]:
    """Each retrained version against the first champion, on the rows that it answered."""
    name = document.metric.name
    found = []
    for version in versions:
        rows = (answers["version"] == version).to_numpy()
        if rows.sum() > 0:
            found.append(
                Stretch(
                    version=version,
                    rows=int(rows.sum()),
                    served=metrics.score(name, truth[rows], served[rows]),
                    never_retrained=metrics.score(name, truth[rows], never[rows]),
                )
            )
    return found


def _quality(
    document: Contract,
    answers: pd.DataFrame,
    truth: np.ndarray,
    served: np.ndarray,
    never: np.ndarray,
) -> pd.DataFrame:
    name = document.metric.name
    points: list[dict[str, float]] = []
    for block, rows in answers.groupby("block").indices.items():
        if block == answers["block"].iloc[-1] and len(points) > 1:
            continue  # the last block is not whole
        points.append(
            {
                "at": float(answers["at"].to_numpy()[rows].mean()),
                "served": metrics.score(name, truth[rows], served[rows]),
                "never_retrained": metrics.score(name, truth[rows], never[rows]),
            }
        )
    return pd.DataFrame(points)


def _times(
    home: Home,
    document: Contract,
    watched: Watched,
    result: replay.ReplayResult,
    onset_row: int | None,
) -> dict[str, float]:
    """When the stages of the first retraining happened, in seconds since the epoch. Where the
    onset is not known, it is the first answer of the first window of the incident."""
    times: dict[str, float] = {}
    onset = None
    if onset_row is not None:
        onset = next((a.at for a in result.answers if a.row >= onset_row), None)
    alarm = next(((at, w) for at, w in watched.windows if w.alarm and at >= (onset or 0.0)), None)
    if onset is None and onset_row is None and alarm is not None:
        started = alarm[1].started_at or alarm[1].from_at
        onset = started.timestamp()
    if onset is not None:
        times["onset"] = onset
    if alarm is not None:
        times["alarm"] = alarm[0]
    promoted = [
        o
        for o in runs.outcomes(home.store, document.model)
        if o.state == "promoted" and o.run_id in {r.run_id for r in watched.runs}
    ]
    if not promoted:
        return times
    outcome = promoted[0]
    times["run_started"] = outcome.started.timestamp()
    judged = [s.ended for s in outcome.steps if s.name == "judge" and s.ended]
    if judged:
        times["verdict"] = judged[0].timestamp()
    served = next((a.at for a in result.answers if a.version == outcome.version), None)
    if served is not None:
        times["served"] = served
    return times


def _seconds(times: dict[str, float]) -> dict[str, float]:
    """The measured spans between the stages that happened."""
    spans = [
        ("onset", "alarm"),
        ("alarm", "run_started"),
        ("run_started", "verdict"),
        ("verdict", "served"),
        ("onset", "served"),
    ]
    return {f"{a}_to_{b}": times[b] - times[a] for a, b in spans if a in times and b in times}


def _checks(
    document: Contract,
    watched: Watched,
    result: replay.ReplayResult,
    stretches: list[Stretch],
    times: dict[str, float],
    onset_row: int | None,
) -> list[Check]:
    """What must have happened for the demo to count."""
    sign = document.metric.sign
    started = [d for d in watched.decisions if d.action == "start"]
    alarms = [(at, w) for at, w in watched.windows if w.alarm]
    checks = [
        Check(
            "every request was answered",
            result.ok and result.sent > 0,
            f"{result.sent:,} answered, {result.failed} failed, {result.labelled:,} labels sent",
        ),
        Check("drift raised an alarm", bool(alarms), f"{len(alarms)} windows in alarm"),
    ]
    if onset_row is not None:
        early = [w for at, w in watched.windows if at < times.get("onset", np.inf)]
        false = [w.index for w in early if w.alarm]
        checks.append(
            Check(
                "no alarm before the onset",
                not false and bool(early),
                f"{len(early)} clean windows, {sum(w.drifted for w in early)} of them drifted, "
                f"{len(false)} false alarms",
            )
        )
        checks.append(
            Check(
                "exactly one run was started",
                len(watched.runs) == 1,
                f"{len(watched.runs)} runs, {len(watched.decisions)} decisions",
            )
        )
    checks += [
        Check(
            "the controller started a run and wrote down why",
            bool(started),
            started[0].reason if started else "no decision to start",
        ),
        Check(
            "a better model was promoted",
            "verdict" in times,
            next((r.reason for r in watched.rollouts[1:]), "no promotion"),
        ),
        Check(
            "the new model answers",
            "served" in times,
            ", ".join(f"{v}: {n:,}" for v, n in result.versions.items()),
        ),
    ]
    simulated = document.data.simulate
    if simulated is not None and alarms:
        named = {c.name for _, w in alarms for c in w.columns if c.drifted}
        expected = [SHOWN_BY[kind] for kind in simulated.corruptions]
        checks.append(
            Check(
                "the alarm names what changed",
                named >= set(expected),
                f"{', '.join(simulated.corruptions)}: named are {', '.join(sorted(named))}",
            )
        )
    if stretches:
        rows = sum(s.rows for s in stretches)
        gain = sum((s.served - s.never_retrained) * sign * s.rows for s in stretches) / rows
        checks.append(
            Check(
                "retrained models beat the first champion on the rows after promotion",
                gain > 0,
                f"{document.metric.name} better by {gain:.4f} on {rows:,} rows",
            )
        )
    return checks


def _events(
    document: Contract,
    watched: Watched,
    times: dict[str, float],
    began: float,
    trained: float,
    first: rollout.Rollout,
) -> list[Event]:
    events = [Event(trained - began, f"first champion {first.champion}", first.reason)]
    names = {
        "onset": "onset of the drift",
        "alarm": "alarm",
        "run_started": "retraining started",
        "verdict": "verdict",
        "served": "the new champion's first answer",
    }
    seconds = _seconds(times)
    after = {key.split("_to_")[1]: value for key, value in seconds.items() if key[:5] != "onset"}
    for key, name in names.items():
        if key in times:
            detail = f"{after[key]:.1f} s later" if key in after else ""
            if key == "alarm":
                detail = f"{seconds['onset_to_alarm']:.1f} s after the onset"
            events.append(Event(times[key] - began, name, detail))
    for change in watched.rollouts[1:]:
        events.append(
            Event(change.at.timestamp() - began, f"promoted {change.champion}", change.reason)
        )
    for run in watched.runs:
        if run.state in ("rejected", "stopped", "failed") and run.ended is not None:
            at = run.ended.timestamp() - began
            events.append(Event(at, f"run {run.state}", run.reason or ""))
    return sorted(events, key=lambda e: e.at)


def _pictures(
    document: Contract, stream: pd.DataFrame, onset_row: int | None, answers: pd.DataFrame
) -> list[demo_page.Picture]:
    """Some images from before and from after the onset, each with its label."""
    if document.data.image is None or onset_row is None:
        return []
    from driftmill.vision import images

    sent = answers["row"].to_numpy()
    found = []
    for when, rows in (("before", sent[sent < onset_row]), ("after", sent[sent >= onset_row])):
        if len(rows):
            for row in np.unique(rows[np.linspace(0, len(rows) - 1, PICTURES).astype(int)]):
                of = stream.iloc[int(row)]
                label = str(of[document.data.target.name])
                found.append(demo_page.Picture(when, images.to_png(of[IMAGE]), label))
    return found


def _decisions(watched: Watched, began: float) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "second": f"{d.at.timestamp() - began:.1f}",
                "trigger": d.trigger,
                "answer": d.action,
                "reason": d.reason,
                "deliveries": d.deliveries,
            }
            for d in watched.decisions
        ],
        columns=["second", "trigger", "answer", "reason", "deliveries"],
    )


def _conclude(
    console: Console,
    story: Story,
    seconds: dict[str, float],
    memory: dict[str, float],
    page: Path,
    path: Path,
    home: Home,
    keep: bool,
) -> int:
    console.print("\n[bold]Measured[/bold]")
    for key, value in seconds.items():
        console.print(f"  {key.replace('_to_', ' → ').replace('_', ' '):24}{value:6.1f} s")
    peaks = ", ".join(f"{n} {m:,.0f}" for n, m in memory.items() if n != "stack")
    console.print(f"  {'peak memory':24}{memory['stack']:6,.0f} MiB  ({peaks})", markup=False)
    console.print("\n[bold]Checks[/bold]")
    for check in story.checks:
        mark = "[green]✓[/green]" if check.passed else "[red]✗[/red]"
        console.print(f"  {mark} {check.name}", end="")
        console.print(f": {check.detail}", markup=False)
    console.print("\n[bold]Open next[/bold]")
    console.print(f"  the page            {page}", markup=False, soft_wrap=True)
    reports = home.store.folder
    if reports is not None:
        last = f"{reports}/{story.contract.model}/runs/*/report.html"
        console.print(f"  the models' reports {last}", markup=False, soft_wrap=True)
        drift = f"{reports}/{story.contract.model}/monitor/windows/*/report.html"
        console.print(f"  the drift reports   {drift}", markup=False, soft_wrap=True)
    command = f"driftmill --home {home.folder}"
    if keep:
        console.print(f"  the stack is up     {command} status; {command} down", markup=False)
    else:
        console.print(f"  serve it again      {command} up {path}", markup=False, soft_wrap=True)
    return 0 if all(check.passed for check in story.checks) else 1
