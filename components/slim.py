"""Makes images small: the Dockerfiles run it while they build; it is of no use elsewhere.

    python3 slim.py system              # trims the file system that it runs in
    python3 slim.py packages MODULE …   # trims the environment of this Python

Nothing goes that a program which imports the named modules could miss: documentation, package
managers, headers, tests of packages, symbol tables, and libraries for parts of packages that
nothing here uses. What the modules do load is compiled, because a container on a read-only file
system would compile it anew at each start; the rest stays uncompiled, which is smaller.
"""

from __future__ import annotations

import py_compile
import shutil
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

#: Compiled code is valid as it is: nothing in an image changes.
UNCHECKED = py_compile.PycInvalidationMode.UNCHECKED_HASH
#: User that the images run as; a name for it keeps programs content that look for one.
USER = "driftmill:x:65532:65532:Driftmill:/tmp:/usr/sbin/nologin"

#: Programs that stay, beside Python: a shell and what its scripts use; `tar` is for `kubectl cp`.
PROGRAMS = """
    [ awk base64 bash basename cat chmod cp cut date dd df dirname du echo env false find
    getent grep gzip head hostname id kill ln ls mawk mkdir mktemp mv nice nohup ps pwd readlink
    realpath rm rmdir sed seq sh sha256sum sleep sort stat tail tar tee test timeout touch tr true
    uname wc which xargs
"""
SYSTEM = (
    # Written for people; the copyright files stay.
    "usr/share/doc/*/[!c]*",
    "usr/share/doc/*/changelog*",
    *(f"usr/share/{n}" for n in ("info", "lintian", "locale", "man", "menu", "pixmaps", "bug")),
    # Package managers and Perl, which only they use. The list of packages, /var/lib/dpkg/status,
    # stays: scanners for known weaknesses read it.
    *("etc/apt", "etc/dpkg", "usr/lib/apt", "usr/lib/dpkg", "usr/share/dpkg", "usr/share/keyrings"),
    *("usr/lib/*/libapt-*", "usr/lib/*/perl*", "usr/share/perl*"),
    *("var/cache/*", "var/lib/apt", "var/lib/dpkg/info", "var/lib/dpkg/*-old", "var/log/*"),
    # Administration: users, disks, services; and the libraries of what goes here and above.
    *(
        "usr/lib/udev",
        "usr/lib/systemd",
        "usr/lib/*/security",
        "usr/lib/*/gconv",
        "usr/share/tabset",
    ),
    *(
        f"usr/lib/*/lib{n}.so*"
        for n in ("blkid", "ext2fs", "e2p", "fdisk", "gcrypt", "gmp", "gnutls", "gpg-error", "idn2")
    ),
    *(
        f"usr/lib/*/lib{n}.so*"
        for n in ("hogweed", "mount", "nettle", "p11-kit", "pam*", "seccomp", "semanage", "sepol")
    ),
    *(f"usr/lib/*/lib{n}.so*" for n in ("smartcols", "systemd", "tasn1", "udev", "unistring")),
    # Time zones with leap seconds, and once more without.
    *("usr/share/zoneinfo/right", "usr/share/zoneinfo/posix"),
    # For those who develop in Python.
    *("usr/share/python-wheels", "usr/include", "usr/local/include"),
)
#: Parts of the standard library that go.
STANDARD = (
    "test",
    "distutils",
    "idlelib",
    "tkinter",
    "turtledemo",
    "lib2to3",
    "ensurepip",
    "pydoc_data",
)
INSTALLERS = ("pip", "setuptools", "pkg_resources", "wheel", "_distutils_hack")
#: Parts of the standard library that are compiled: what most packages import.
USUAL = """
    argparse ast asyncio calendar cgi concurrent.futures.process concurrent.futures.thread
    configparser csv ctypes.util doctest email.mime.text encodings.idna fileinput fractions
    html.parser http.cookiejar http.server importlib.resources json.tool logging.config
    logging.handlers multiprocessing.pool multiprocessing.shared_memory netrc optparse plistlib
    runpy shelve sqlite3 statistics symtable sysconfig timeit tomllib tracemalloc unittest.mock
    urllib.robotparser uuid webbrowser wsgiref.simple_server xml.dom.minidom xml.etree.ElementTree
    xmlrpc.client zipfile zoneinfo
"""

#: Below site-packages.
PACKAGES = (
    # Sources and headers of compiled modules.
    *(f"**/*.{end}" for end in ("a", "c", "cpp", "f90", "h", "hpp", "pxd", "pxi", "pyi", "pyx")),
    "*/include",
    "pyarrow/src",
    # A library under three names; modules load it by the second.
    "pyarrow/libarrow_python*.so",
    "pyarrow/libarrow_python*.so.*.*.*",
    # Arrow Flight, a network protocol.
    "pyarrow/libarrow_flight*",
    "pyarrow/libarrow_python_flight*",
    "pyarrow/_flight*",
    # ONNX Runtime for other languages (Python has its own copy inside), and its converters.
    "onnxruntime/capi/libonnxruntime.so*",
    *(f"onnxruntime/{part}" for part in ("datasets", "quantization", "tools", "transformers")),
    "matplotlib/mpl-data/sample_data",
    # Colours for some hundred programming languages; a traceback is in Python.
    "pygments/lexers/[!_p]*.py",
    "pygments/lexers/_[!m_]*.py",
    "tornado/test",
)
#: Services of Amazon whose descriptions botocore needs here: the store, and who may use it.
AMAZON = {"s3", "sts", "sso", "sso-oidc", "signin"}


def main() -> None:
    """Trim what the first argument says."""
    if sys.argv[1] == "system":
        system()
    else:
        packages(Path(sysconfig.get_path("purelib")), sys.argv[2:])


def system() -> None:
    """Trim the file system that this runs in."""
    for pattern in SYSTEM:
        remove(Path("/").glob(pattern))
    folders = [Path(f"/usr/{name}") for name in ("bin", "sbin", "local/bin")]
    named = [f / n for f in folders for n in (*PROGRAMS.split(), "nologin", "python", "python3")]
    # With what they are links to: `sh` is `dash`.
    kept = {path.name for path in named} | {path.resolve().name for path in named}
    remove(path for folder in folders for path in folder.glob("*") if path.name not in kept)
    standard = Path(sysconfig.get_path("stdlib"))
    remove(standard / name for name in STANDARD)
    for place in {Path(p) for p in sys.path if "-packages" in p} | {standard / "site-packages"}:
        for name in INSTALLERS:
            remove([*place.glob(name), *place.glob(f"{name}-*")])
    remove(standard.rglob("__pycache__"))
    compile_files(files_of(USUAL.split()))
    # Nothing needs to become root.
    for path in Path("/usr").rglob("*"):
        if path.is_file() and path.stat().st_mode & (stat.S_ISUID | stat.S_ISGID):
            path.chmod(path.stat().st_mode & 0o755)
    with open("/etc/passwd", "a") as users, open("/etc/group", "a") as groups:
        users.write(f"{USER}\n")
        groups.write("driftmill:x:65532:\n")


def packages(site: Path, modules: list[str]) -> None:
    """Trim an environment to what `modules` need, and compile what they load."""
    for pattern in PACKAGES:
        remove(site.glob(pattern))
    data = site / "botocore" / "data"
    remove(p for p in data.glob("*") if p.is_dir() and p.name not in AMAZON)
    loaded = files_of(modules)
    # Some packages import helpers from their tests; these stay.
    for folder in [p for p in site.rglob("tests") if p.is_dir()]:
        if not any(folder in path.parents for path in loaded):
            remove([folder])
    strip(site)
    # Once more, in a new process: what went must not be missed.
    compile_files(path for path in files_of(modules) if site in path.parents)


def files_of(modules: list[str]) -> set[Path]:
    """The files that importing these modules loads. Fails where one of them cannot be imported."""
    script = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\n"
    script += "for m in list(sys.modules.values()): print(getattr(m, '__file__', None) or '')"
    done = subprocess.run(
        [sys.executable, "-B", "-c", script, *modules],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return {Path(line) for line in done.stdout.splitlines() if line.startswith("/")}


def compile_files(paths: Iterable[Path]) -> None:
    """Compile the Python files among these."""
    for path in paths:
        if path.suffix == ".py":
            py_compile.compile(str(path), doraise=True, invalidation_mode=UNCHECKED)


def strip(site: Path) -> None:
    """Take symbol tables out of compiled modules, but leave libraries below `*.libs`: the tool that
    renamed them has laid them out in a way that `strip` may break; and NVIDIA's, which have none.
    """
    compiled = [
        path
        for path in site.rglob("*.so*")
        if path.is_file() and not path.is_symlink() and not _is_foreign(path.relative_to(site))
    ]
    compiled = [path for path in compiled if path.open("rb").read(4) == b"\x7fELF"]
    subprocess.run(["/usr/bin/strip", "--strip-unneeded", *map(str, compiled)], check=True)


def _is_foreign(path: Path) -> bool:
    return path.parts[0] == "nvidia" or path.parts[0].endswith(".libs")


def remove(paths: Iterable[Path]) -> None:
    """Remove files and folders."""
    for path in list(paths):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
