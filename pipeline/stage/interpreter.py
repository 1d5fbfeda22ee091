"""Stages run in the project's own environment, also where it is not activated.

`.venv/bin/dvc repro` starts `python -m pipeline.…` with whatever `python` comes first on PATH. One
that lacks what a stage needs hands over to one that has it: that of `.venv`, or the one that runs
DVC. Read by any Python 3, and so written for it; it imports nothing but the standard library.
"""

import importlib.util
import os
import subprocess
import sys

NEEDED = ("psutil", "pydantic", "torch", "pyarrow")
HANDED_OVER = "TIGHTBOUND_INTERPRETER"  # set for the one that is handed over to: never twice
MOST_PARENTS = 5


def use_the_projects_own():
    """Go on in an interpreter that has the packages; return where this one has them.

    Ends the process with a sentence where there is none.
    """
    missing = _missing()
    if not missing:
        return
    if HANDED_OVER not in os.environ:
        for other in _candidates():
            if _has_all(other):
                os.environ[HANDED_OVER] = other
                os.execv(other, [other, *sys.orig_argv[1:]])
    sys.exit(
        "error: {} has no {}, which the stages need; activate the project's environment "
        "(source .venv/bin/activate), or use `make run`, which makes it".format(
            sys.executable, ", ".join(missing)
        )
    )


def _missing():
    """The needed packages that this interpreter lacks."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def _candidates():
    """Interpreters that may have them, each once: the project's, the activated one, DVC's."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    folders = [os.path.join(root, ".venv"), os.path.join(os.getcwd(), ".venv")]
    folders += [os.environ.get("VIRTUAL_ENV", ""), os.environ.get("CONDA_PREFIX", "")]
    found = [os.path.join(folder, "bin", "python") for folder in folders if folder]
    unique = []
    for path in found + _parents():
        if path not in unique and path != sys.executable and os.access(path, os.X_OK):
            unique.append(path)
    return unique


def _parents():
    """The interpreters of the processes that started this one (Linux)."""
    found, pid = [], os.getppid()
    for _ in range(MOST_PARENTS):
        try:
            with open("/proc/{}/cmdline".format(pid), "rb") as file:  # noqa: UP032
                command = os.fsdecode(file.read()).split("\0")[0]
            with open("/proc/{}/stat".format(pid)) as file:  # noqa: UP032
                parent = int(file.read().rpartition(")")[2].split()[1])
            if os.path.basename(command).startswith("python"):
                # not resolved: a virtual environment's python is a link to another's
                found.append(os.path.join(os.readlink("/proc/{}/cwd".format(pid)), command))  # noqa: UP032
            pid = parent
        except (OSError, ValueError, IndexError):
            break
    return found


def _has_all(python):
    code = "import importlib.util as u, sys; sys.exit(any(u.find_spec(n) is None for n in {!r}))"
    try:
        done = subprocess.run(
            [python, "-c", code.format(NEEDED)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=60,
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0
