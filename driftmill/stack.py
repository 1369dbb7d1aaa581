"""The laptop stack: the services of one model as background processes.

`up` starts them and waits until they answer, `down` stops them and whatever training they have
started, `status` tells how they are. What runs is written down in `<home>/processes/<name>.json`,
with the process's start time, so that a reused process id is never taken for a service. One lock
for each home keeps two of these commands from working at once.
"""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from driftmill import alerting, rollout
from driftmill import contract as contracts
from driftmill.contract import Contract
from driftmill.home import Home
from driftmill.store import Store, write_atomic

#: The services and the ports that they take if these are free. The last two, of which
#: `driftmill.alerting` tells, only where they are asked for.
PORTS = {
    "service": 3000,
    "monitor": 3001,
    "controller": 3002,
    "alertmanager": 9093,
    "prometheus": 9090,
}
HOST = "127.0.0.1"
#: Seconds that a service gets to finish its work before it is killed, and a training run.
GRACE, RUN_GRACE = 15.0, 20.0
#: A log beyond this size is set aside at the next start.
MAX_LOG_BYTES = 10_000_000


class StackError(RuntimeError):
    """The stack cannot do what it was asked; the message says why and what to do."""


@dataclass(frozen=True)
class Service:
    """A service that was started, as it is written down."""

    name: str
    pid: int
    started: float
    """Start time of the process, seconds since the epoch."""
    port: int
    log: str
    model: str
    contract: str
    """Path of the contract file."""
    contract_sha256: str
    """Digest of what the contract said, comments apart."""

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://{HOST}:{self.port}"


@dataclass(frozen=True)
class Running:
    """A stack that is up."""

    services: dict[str, Service]
    ready: bool
    """Whether a model serves; false before the first one is trained."""
    token_file: Path
    children: tuple[subprocess.Popen[bytes], ...] = ()
    """The processes that this call started."""


@dataclass(frozen=True)
class ServiceStatus:
    """How a service is."""

    name: str
    state: str
    """`ready`, `not ready` (it runs, but has no model or does not answer), `dead` (it was started
    and is gone) or `not started`."""
    pid: int | None = None
    port: int | None = None
    url: str | None = None
    uptime_seconds: float | None = None
    memory_bytes: int | None = None


def up(
    contract_path: Path,
    home: Home,
    *,
    ports: Mapping[str, int] | None = None,
    monitor: bool = True,
    controller: bool = True,
    prometheus: bool = False,
    deadline: float = 120.0,
    say: Callable[[str], None] = lambda text: None,
) -> Running:
    """Start the services that do not run yet and wait until each answers.

    Where it fails or is interrupted, what it has started is stopped again.

    Args:
        contract_path: the contract file.
        home: where everything lies.
        ports: port of a service by name; 0 takes any free one. A service that is not named takes
            its usual port, or a free one if that is taken.
        monitor: whether to start the monitor.
        controller: whether to start the controller.
        prometheus: whether to start Prometheus and Alertmanager, and let alarms come from them.
        deadline: seconds until all must answer.
        say: called with a line for each thing worth knowing.

    Raises:
        ContractError: the contract is not valid.
        StackError: a port is taken, a process died or did not answer in time, another contract's
            stack runs in this home, another command works on it, or Prometheus is not installed.
    """
    path = contract_path.resolve()
    document = contracts.load(path)
    wanted = ["service", *(["monitor"] if monitor else []), *(["controller"] if controller else [])]
    if prometheus:
        wanted += _watchers(monitor and controller)
    with _lock(home), hold_signals() as stopped, ExitStack() as undo:
        known = services(home)
        running = {name: s for name, s in known.items() if _process(s) is not None}
        _check_same(running, document, path)
        chosen = _ports(wanted, running, known, ports or {}, say)
        token_file = _token(home)
        children: list[tuple[Service, subprocess.Popen[bytes], int]] = []
        processes: dict[str, subprocess.Popen[bytes]] = {}
        undo.callback(_undo, home, processes)
        for name in wanted:
            if name in running:
                continue
            if name in known:
                _end_orphans(known[name], home)
            offset = _rotate(home, name)
            child = _start(name, home, _command(name, document, path, home, chosen))
            processes[name] = child
            service = Service(
                name=name,
                pid=child.pid,
                started=psutil.Process(child.pid).create_time(),
                port=chosen[name],
                log=str(home.logs / f"{name}.log"),
                model=document.model,
                contract=str(path),
                contract_sha256=_digest(document),
            )
            write_atomic(_record(home, name), json.dumps(asdict(service), indent=1).encode())
            running[name] = service
            children.append((service, child, offset))
            raise_held(stopped)
        has_model = rollout.read(home.store, document.model) is not None
        until = time.monotonic() + deadline
        for service, child, offset in children:
            # Without a first model the service is up, but has nothing to be ready with.
            page = _page(service.name) if has_model or service.name != "service" else "/livez"
            _await(service, child, page, until, stopped, offset)
            say(f"{service.name} answers at {service.url}")
        undo.pop_all()
    return Running(
        services={name: running[name] for name in PORTS if name in running},
        ready=has_model,
        token_file=token_file,
        children=tuple(child for _, child, _ in children),
    )


def down(home: Home, *, say: Callable[[str], None] = lambda text: None) -> list[str]:
    """Stop the stack, with the training runs that its controller has started.

    Each process is asked to finish (SIGTERM), and killed if it takes too long. Where nothing
    runs, nothing happens.

    Returns:
        The services and runs that were stopped.

    Raises:
        StackError: another command works on this stack.
    """
    if not home.folder.is_dir():
        return []
    with _lock(home):
        known = services(home)
        stopped: list[str] = []
        # The controller goes first, so that it starts nothing new, and does not take a run that
        # is stopped here for one that failed by itself.
        alive = {n: p for n, s in known.items() if (p := _process(s)) is not None}
        if "controller" in alive:
            stopped += _stop({"controller": alive.pop("controller")}, GRACE, say)
        runs = _runs(home, {s.model for s in known.values()}, say)
        stopped += _stop(runs, RUN_GRACE, say)
        stopped += _stop(alive, GRACE, say)
        for name, service in known.items():
            _end_orphans(service, home)
            _record(home, name).unlink(missing_ok=True)
    return stopped


def services(home: Home) -> dict[str, Service]:
    """The services that were started in this home and not stopped since; some may have died."""
    found = {}
    for name in PORTS:
        path = _record(home, name)
        try:
            found[name] = Service(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            continue
        except (json.JSONDecodeError, TypeError) as error:
            raise StackError(f"{path} is damaged ({error}); delete it") from None
    return found


def status(home: Home) -> list[ServiceStatus]:
    """How each service is."""
    known = services(home)
    usual = set(PORTS) - set(alerting.PROGRAMS)
    return [_status(name, known.get(name)) for name in PORTS if name in known or name in usual]


def memory(home: Home) -> int:
    """Bytes of memory that the stack holds, its training runs included.

    Pages that several processes share are counted once where the system tells (Linux).
    """
    roots = [p for s in services(home).values() if (p := _process(s)) is not None]
    members = {m.pid: m for p in roots for m in _family(p)}
    return sum(_memory(p) for p in members.values())


def address(home: Home, name: str) -> str | None:
    """URL of a service that runs, else None."""
    service = services(home).get(name)
    return service.url if service is not None and _process(service) is not None else None


def pages(store: Store, model: str) -> dict[str, Any]:
    """The newest rollout and the monitor's newest window of a model, as plain values or None."""
    now = rollout.read(store, model)
    windows = [k for k in store.list(f"{model}/monitor/windows") if k.endswith("/result.json")]
    return {
        "rollout": rollout.to_dict(now) if now else None,
        "window": json.loads(store.read(windows[-1])) if windows else None,
    }


def _record(home: Home, name: str) -> Path:
    return home.processes / f"{name}.json"


def _digest(document: Contract) -> str:
    return sha256(document.to_json().encode()).hexdigest()


@contextmanager
def _lock(home: Home) -> Iterator[None]:
    home.folder.mkdir(parents=True, exist_ok=True)
    with (home.folder / "stack.lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StackError(
                f"another `driftmill up` or `down` works on {home.folder}; wait until it is done"
            ) from None
        yield  # closing the file gives the lock back


@contextmanager
def hold_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them, so that no process is started without
    being written down. Signals reach the main thread only; elsewhere nothing changes."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def raise_held(stopped: list[int]) -> None:
    """Die of the first signal that was held, if any, as without the holding."""
    if stopped:
        if stopped[0] == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + stopped[0])


def _process(service: Service) -> psutil.Process | None:
    """The living process of a service; None if it is gone, or its id now belongs to another."""
    try:
        process = psutil.Process(service.pid)
        # The start time is kept in clock ticks: it is compared with some room.
        same = abs(process.create_time() - service.started) < 2.0
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def _check_same(running: Mapping[str, Service], document: Contract, path: Path) -> None:
    for service in running.values():
        if service.contract != str(path) or service.model != document.model:
            raise StackError(
                f"the stack of {service.contract} runs in this home; stop it with `driftmill down`"
                " or choose another --home"
            )
        if service.contract_sha256 != _digest(document):
            raise StackError(
                f"{path} has changed since the stack was started; `driftmill down`, then `up` again"
            )


def _ports(
    wanted: list[str],
    running: Mapping[str, Service],
    known: Mapping[str, Service],
    asked: Mapping[str, int],
    say: Callable[[str], None],
) -> dict[str, int]:
    chosen = {name: service.port for name, service in running.items()}
    for name in wanted:
        port = asked.get(name)
        if name in running:
            if port not in (None, 0, running[name].port):
                raise StackError(
                    f"{name} already runs on port {running[name].port}; `driftmill down` first"
                )
            continue
        taken = set(chosen.values())
        if port:
            if port in taken or not _is_free(port):
                raise StackError(
                    f"port {port} for {name} is taken; choose another, or 0 for any free one"
                )
        elif port is None and running and name in known:
            # The services that still run know it by this port.
            port = known[name].port
            if not _is_free(port):
                raise StackError(
                    f"{name} died and its port {port} is taken by another process;"
                    " `driftmill down`, then `up` again"
                )
        elif port is None and PORTS[name] not in taken and _is_free(PORTS[name]):
            port = PORTS[name]
        else:
            if port is None:
                say(f"port {PORTS[name]} is taken: {name} takes a free one")
            port = _free(taken)
        chosen[name] = port
    return chosen


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: a port in TIME_WAIT counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def _free(taken: set[int]) -> int:
    while True:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind((HOST, 0))
            port: int = probe.getsockname()[1]
        if port not in taken:
            return port


def _token(home: Home) -> Path:
    """The file with the webhook's token, made if need be, readable by its owner only."""
    path = home.token_file
    if not path.exists() or not path.read_text().strip():
        handle, temporary = tempfile.mkstemp(prefix=".tmp-", dir=home.folder)
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
        os.replace(temporary, path)
    path.chmod(0o600)
    return path


def _watchers(complete: bool) -> list[str]:
    """Alertmanager and Prometheus, in the order in which they start."""
    if not complete:
        raise StackError("Prometheus needs both monitor and controller; leave none of them out")
    try:
        for name in alerting.PROGRAMS:
            alerting.program(name)
    except alerting.MissingProgram as error:
        raise StackError(str(error)) from None
    return [name for name in PORTS if name in alerting.PROGRAMS]


def _command(
    name: str, document: Contract, path: Path, home: Home, ports: Mapping[str, int]
) -> list[str]:
    """What runs a service."""
    if name in alerting.PROGRAMS:
        return alerting.command(name, document, home, HOST, ports)
    arguments = ["--model", document.model] if name == "service" else ["--contract", str(path)]
    if name == "controller":
        arguments += ["--token-file", str(home.token_file)]
    # With an Alertmanager, alarms take the way over Prometheus.
    if name == "monitor" and "controller" in ports and "alertmanager" not in ports:
        webhook = f"http://{HOST}:{ports['controller']}/alerts"
        arguments += ["--webhook", webhook, "--token-file", str(home.token_file)]
    module = f"services.{name}"
    if name == "service":
        module = "services.vision" if document.is_vision else "services.tabular"
    return [sys.executable, "-m", module, *arguments, "--port", str(ports[name])]


def _page(name: str) -> str:
    """Where a service says whether it is ready."""
    return "/-/ready" if name in alerting.PROGRAMS else "/readyz"


def _rotate(home: Home, name: str) -> int:
    """Set a large log aside; the size of what is left."""
    log = home.logs / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    size = log.stat().st_size if log.exists() else 0
    if size > MAX_LOG_BYTES:
        log.replace(log.with_suffix(".log.1"))
        size = 0
    return size


def _start(name: str, home: Home, command: list[str]) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        **home.environment(),
        "PYTHONUNBUFFERED": "1",
        "BENTOML_DO_NOT_TRACK": "True",
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    with (home.logs / f"{name}.log").open("ab") as log:
        # A session of its own: the terminal's Ctrl-C and hang-up do not reach it.
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def _await(
    service: Service,
    child: subprocess.Popen[bytes],
    page: str,
    until: float,
    stopped: list[int],
    offset: int,
) -> None:
    while _get(service.port, page) != 200:
        raise_held(stopped)
        if child.poll() is not None:
            raise StackError(
                f"{service.name} stopped with exit code {child.returncode} while it started;"
                f" the end of {service.log}:\n{_tail(Path(service.log), offset)}"
            )
        if time.monotonic() > until:
            raise StackError(
                f"{service.name} did not answer {service.url}{page} in time;"
                f" the end of {service.log}:\n{_tail(Path(service.log), offset)}"
            )
        time.sleep(0.1)
    raise_held(stopped)


def _get(port: int, page: str) -> int | None:
    """The status of a page, or None where nobody answers."""
    connection = http.client.HTTPConnection(HOST, port, timeout=2.0)
    try:
        connection.request("GET", page)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _tail(log: Path, offset: int, lines: int = 15) -> str:
    with log.open("rb") as file:
        file.seek(offset)
        text = file.read().decode(errors="replace")
    return "\n".join("  " + line for line in text.splitlines()[-lines:]) or "  (it is empty)"


def _undo(home: Home, started: Mapping[str, subprocess.Popen[bytes]]) -> None:
    alive = {n: psutil.Process(c.pid) for n, c in started.items() if c.poll() is None}
    _stop(alive, GRACE, lambda text: None)
    for name, child in started.items():
        child.wait()
        _record(home, name).unlink(missing_ok=True)


def _stop(
    processes: Mapping[str, psutil.Process], grace: float, say: Callable[[str], None]
) -> list[str]:
    """Ask process groups to end, and kill what is left of them."""
    for process in processes.values():
        _signal(process, signal.SIGTERM)
    psutil.wait_procs(list(processes.values()), timeout=grace)
    left = _members({p.pid for p in processes.values()})
    for member in left:
        _signal(member, signal.SIGKILL)
    psutil.wait_procs(left, timeout=5.0)
    killed = {member.pid for member in left}
    for name, process in processes.items():
        say(f"{name} {'was killed' if process.pid in killed else 'stopped'}")
    return list(processes)


def _signal(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def _members(leaders: set[int]) -> list[psutil.Process]:
    """Living processes in the groups and sessions of these leaders, themselves included.

    A training run leads a session of its own: it does not belong to the controller's.
    """
    found = []
    for process in psutil.process_iter():
        try:
            group, session = os.getpgid(process.pid), os.getsid(process.pid)
            of_leader = group in leaders or session in leaders
            if of_leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def _end_orphans(service: Service, home: Home) -> None:
    """Kill what a service that was killed has left behind."""
    if psutil.pid_exists(service.pid):
        return
    for process in _members({service.pid}):
        try:
            # The id may have led another session since.
            if process.environ().get("DRIFTMILL_HOME") == str(home.folder):
                process.kill()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


def _family(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _memory(process: psutil.Process) -> int:
    try:
        info = process.memory_full_info()
    except psutil.NoSuchProcess:
        return 0
    except psutil.AccessDenied:
        resident: int = process.memory_info().rss
        return resident
    size: int = getattr(info, "pss", info.uss)
    return size


def _runs(
    home: Home, models: Iterable[str], say: Callable[[str], None]
) -> dict[str, psutil.Process]:
    """Training runs of these models that the ledger counts as active and that are alive here."""
    if not models:
        return {}
    from driftmill.retrain.ledger import Ledger, LedgerError

    try:
        ledger = Ledger(home.ledger_url)
    except LedgerError as error:
        say(f"training runs cannot be looked up: {error}")
        return {}
    try:
        active = [run for model in models if (run := ledger.active(model)) is not None]
    finally:
        ledger.close()
    found = {}
    for run in active:
        # A controller that was killed may have started a run without noting its process.
        note = home.folder / "runs" / run.run_id / "process"
        text = str(run.pid) if run.pid is not None else note.read_text() if note.exists() else ""
        process = _run_process(text, run.run_id)
        if process is not None:
            found[f"run {run.run_id}"] = process
    return found


def _run_process(pid: str, run_id: str) -> psutil.Process | None:
    """The living process with this id, if its command line names the run."""
    try:
        process = psutil.Process(int(pid))
        return process if run_id in process.cmdline() else None
    except (ValueError, psutil.NoSuchProcess, psutil.AccessDenied):
        return None


def _status(name: str, service: Service | None) -> ServiceStatus:
    if service is None:
        return ServiceStatus(name, "not started")
    process = _process(service)
    if process is None:
        return ServiceStatus(name, "dead", service.pid, service.port, service.url)
    return ServiceStatus(
        name,
        "ready" if _get(service.port, _page(name)) == 200 else "not ready",
        service.pid,
        service.port,
        service.url,
        time.time() - service.started,
        sum(_memory(p) for p in _family(process)),
    )
