"""Outputs that are complete or not there: written beside their name, synced to the disk, and renamed."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import InputError, KernelizeError

log = logging.getLogger(__name__)
MARK = "config.json"  # what makes a folder a model: of an output that is replaced, it goes first and comes last
PART = ".part"


@contextmanager
def new_folder(output: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write to, which becomes `output` when the block ends, and is removed if it fails.

    `output` is then complete; a process that is killed in between leaves what was there, or no model at all. Of an
    output that may be overwritten, files of other names (logs, checkpoints, reports) stay, weights do not. Symbolic
    links in it are replaced, never followed. InputError if it holds something and `overwrite` is off; KernelizeError
    if it cannot be written.
    """
    output = check_output(output, overwrite)
    aside = output.parent / f".{output.name}{PART}"
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            yield aside
            _share(aside)
            _sync_all(aside)
            _take_over(aside, output)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def check_output(output: str | Path, overwrite: bool = False) -> Path:
    """The folder, if it may and can be written: absent, empty, or to be overwritten. InputError says why not."""
    path = Path(output)
    try:
        if path.exists() and not path.is_dir():
            raise InputError(f"output {path} is a file, not a folder")
        if path.is_dir() and any(path.iterdir()) and not overwrite:
            raise InputError(f"output folder {path} is not empty; choose another, or give --overwrite")
    except OSError as error:
        raise InputError(f"output folder {path} cannot be used: {error.strerror}") from error
    if path.is_symlink() and not path.exists():
        raise InputError(f"output {path} is a symbolic link to nothing")
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"output folder {path} cannot be written: {there} does not allow it")
    return path


def check_apart(output: str | Path, *sources: str | Path | None) -> None:
    """InputError if a folder that is read is also to be written: what is converted or trained is never touched."""
    for source in sources:
        if source is not None and os.path.realpath(Path(source).expanduser()) == os.path.realpath(output):
            raise InputError(f"output folder {output} is the source, which is only read; choose another folder")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Makes the folder and holds it: InputError if another process does. However a process ends, it lets go.

    Windows has no such locks: there nothing is held. Nor on a file system without them, which is logged.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with writing(folder):
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another run is writing to {folder}; wait for it, or choose another folder") from None
        except OSError as error:
            log.warning("%s cannot be locked (%s): let no second run write to it", folder, error.strerror)
        yield
    finally:
        os.close(descriptor)


def write_file(path: str | Path, content: str | bytes) -> Path:
    """Writes or replaces a file at once; text as UTF-8. A symbolic link is replaced, what is no file (a pipe, a
    device) written to. KernelizeError if that fails."""
    path, raw = Path(path), content.encode() if isinstance(content, str) else content
    with writing(path):
        if path.exists() and not path.is_file():
            path.write_bytes(raw)
            return path
        aside = path.with_name(f".{path.name}{PART}")
        try:
            aside.write_bytes(raw)
            sync(aside)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        sync(path.parent)
    return path


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the operating system refuses becomes one line that names the path."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise KernelizeError(f"cannot write {str(path)!r}: {reason}") from error


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _share(folder: Path) -> None:
    """Gives the files the permissions that the umask gives: safetensors 0.8 makes files for their owner alone."""
    allowed = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(allowed)


def _sync_all(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        sync(path)


def _take_over(new: Path, output: Path) -> None:
    """Gives `output` the files of `new`. A rename cannot replace a folder that is not empty, so there they move one
    by one, and until the last one did it is no model."""
    if not output.exists():
        new.rename(output)
    else:
        (output / MARK).unlink(missing_ok=True)
        for stale in output.glob("*.safetensors*"):
            stale.unlink()
        sync(output)
        for file in sorted(new.iterdir(), key=lambda file: file.name == MARK):
            _replace(file, output / file.name)
        sync(output)
    sync(output.parent)


def _replace(new: Path, old: Path) -> None:
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(old)
    os.replace(new, old)
